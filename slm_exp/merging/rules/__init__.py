"""One file per merge rule; a rule combines the projection matrices of a window into one layer."""
