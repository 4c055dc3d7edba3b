"""Use cases: one folder each, with the one file a user writes and what gets its data."""
