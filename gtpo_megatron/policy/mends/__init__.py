"""Faults of Megatron-Core, Megatron-Bridge and torch that are mended here: which, on which versions, and how."""
