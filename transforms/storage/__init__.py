"""Delta tables and their log, TFRecord files, paths in a store, run markers, vacuum."""
