"""PTransforms shared by the pipelines, and beside each the plain function that does its work on one RecordBatch.

Each package lists its public names in its `__init__`; `docs/architecture.md` shows how the packages depend on each
other.
"""
