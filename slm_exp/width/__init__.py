"""Structured width pruning."""
