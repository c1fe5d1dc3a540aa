"""From records to pages people read."""
