"""Codecs: signal <-> tokens or latents; `encode`, `decode`, plain attributes (`vocab`, `stride`, `channels`)."""
