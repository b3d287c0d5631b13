"""The trajectory, its store, and what can be told from it."""
