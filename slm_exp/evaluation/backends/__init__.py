"""What measures a model in memory. Needs torch and lm-eval, so it is loaded where a measurement starts."""
