"""Weights of other implementations, by name."""
