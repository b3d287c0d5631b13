"""Scaling studies: one recipe over several numbers of nodes, what it came to, and the planner held against it."""
