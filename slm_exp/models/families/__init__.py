"""One file per model family: its LAYOUT, data only. A new file is found on arrival."""
