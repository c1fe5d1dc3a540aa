"""Merge rules, and carrying out a plan on a model."""
