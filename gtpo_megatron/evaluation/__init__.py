"""Figures that the field accepts: suites, their engines, estimates with intervals, comparisons; and those of training."""
