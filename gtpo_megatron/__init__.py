"""GTPO (Group-relative Trajectory-based Policy Optimization, arXiv 2508.03772) on Megatron-Core."""

__version__ = "0.1.0"
