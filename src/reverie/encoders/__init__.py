"""Signal to features."""
