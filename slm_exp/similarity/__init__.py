"""Scores between a compressed and the dense model, and between layers: higher is more similar, 1 is identical."""
