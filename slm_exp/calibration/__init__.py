"""Where calibration tokens come from."""
