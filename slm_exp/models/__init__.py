"""Where models come from, and what their layers are made of."""
