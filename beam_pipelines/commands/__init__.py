"""The commands of `millrace` that are not pipelines."""
