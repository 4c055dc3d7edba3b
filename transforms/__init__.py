"""PTransforms shared by the three pipelines, and beside each the plain function that does its work on one RecordBatch."""
