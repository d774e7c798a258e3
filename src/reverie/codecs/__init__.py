"""Codecs: signal <-> tokens or latents. `encode(signal)`, `decode(...)`, and plain attributes (`vocab`, `stride`, ...)."""
