"""One run on disk: record, state, checkpoint; statistics over runs; trackers."""
