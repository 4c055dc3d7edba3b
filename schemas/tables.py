"""Arrow schemas of the tables Millrace writes beside the feature tables (those follow their view: `FeatureView.output_schema`)."""

from __future__ import annotations

import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")

# Rows that broke their contract.  `row` is the row's number in its file, −1 for the file as a whole; `source` may be the spine's.
DEAD_LETTERS = pa.schema([
    ("source", pa.string()),
    ("file", pa.string()),
    ("row", pa.int64()),
    ("field", pa.string()),
    ("rule", pa.string()),
    ("value", pa.string()),
    ("view", pa.string()),
    ("date", pa.date32()),
])  # fmt: skip

# What a prediction adds to the key, time and `row_id` of its feature row.
PREDICTION = pa.schema([
    ("prediction_id", pa.int64()),
    ("score", pa.float32()),
    ("model", pa.string()),
    ("model_version", pa.string()),
    ("arm", pa.string()),
    ("fingerprint", pa.string()),
    ("date", pa.date32()),
])  # fmt: skip


def predictions(features: pa.Schema, key: tuple[str, ...], time: str) -> pa.Schema:
    """Schema of a prediction table over a feature table of schema `features`."""
    return pa.schema([*(features.field(name) for name in (*key, time, "row_id")), *PREDICTION])
