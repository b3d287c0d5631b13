"""Weights on their way to the servers."""
