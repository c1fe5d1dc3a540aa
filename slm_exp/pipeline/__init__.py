"""One experiment: its config and its stages, in paper order."""
