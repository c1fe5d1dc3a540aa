"""Model classes for lm-eval around a model in memory; imported where a measurement starts, since they need torch."""
