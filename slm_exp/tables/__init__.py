"""Tables of papers from records."""
