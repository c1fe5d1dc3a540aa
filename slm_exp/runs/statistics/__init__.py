"""Whether a difference is one: standard errors, paired tests on the same documents, spread over seeds."""
