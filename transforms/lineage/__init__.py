"""Where a row came from, and whether live and batch agree."""
