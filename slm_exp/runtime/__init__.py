"""Which device, how many threads, how deterministic."""
