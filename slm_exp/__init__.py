"""Sliding layer merging as a config-driven experiment: analyse, merge, heal, measure, record."""

__version__ = "0.1.0"
