"""Sources: their contracts, their files, reading them, digests of their days, dead letters."""
