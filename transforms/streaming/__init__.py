"""The live engine: messages, journal, shards, live tables, recovery."""
