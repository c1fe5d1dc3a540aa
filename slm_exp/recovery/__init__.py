"""Healing a compressed model."""
