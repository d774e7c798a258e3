"""Features carried from one network to another."""
