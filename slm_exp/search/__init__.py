"""The engine that scores candidate merges without copying the model."""
