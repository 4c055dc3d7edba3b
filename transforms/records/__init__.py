"""What Beam elements are made of: RecordBatches and their coder, row hashes, exact sums, prefetch, partitions on disk."""
