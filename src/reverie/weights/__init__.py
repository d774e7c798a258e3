"""Weights on disk: checked files, one remapping engine, one table per public format, converting from pickles."""
