"""Captioned folders: the index, media decoding, importers, the pixel cache and the data order."""
