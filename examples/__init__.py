"""Use cases: one folder each, with the file that a user writes and the script that fetches its data."""
