"""Measuring a model: zero-shot tasks, perplexity."""
