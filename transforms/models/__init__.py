"""Encoders, model bundles, the registry, scoring."""
