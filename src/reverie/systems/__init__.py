"""One paper, one file: the parts, the loss, what the system can do."""
