"""Arrow schemas of the tables that Millrace writes besides the feature tables (see `FeatureView.output_schema`)."""

from __future__ import annotations

import pyarrow as pa

from schemas.errors import DefinitionError

TIME = pa.timestamp("us", tz="UTC")

# Columns that a prediction adds to the key, time and `row_id` of its feature row; the scores follow `prediction_id`.
PREDICTION = pa.schema(
    [
        ("prediction_id", pa.int64()),
        ("model", pa.string()),
        ("model_version", pa.string()),
        ("arm", pa.string()),
        ("fingerprint", pa.string()),
        ("date", pa.date32()),
    ]
)


def scores(classes: int) -> tuple[str, ...]:
    """Score columns (float32): `score`, or `score_0` … of a model that gives several classes' probabilities."""
    return ("score",) if classes == 1 else tuple(f"score_{k}" for k in range(classes))


def predictions(features: pa.Schema, key: tuple[str, ...], time: str, classes: int = 1) -> pa.Schema:
    """Schema of a prediction table over a feature table of schema `features`.

    Raises:
        DefinitionError: a key or the time has the name of one of these columns.
    """
    taken = sorted({*key, time} & {*PREDICTION.names, *scores(classes)})
    if taken:
        rule = (
            f"Keys and time have other names than a prediction's own columns, {', '.join(PREDICTION.names)} and score"
        )
        raise DefinitionError(rule, ", ".join(taken), "Rename the column in the spine")
    identity = [features.field(name) for name in (*key, time, "row_id")]
    numbers = [pa.field(name, pa.float32()) for name in scores(classes)]
    return pa.schema([*identity, PREDICTION.field("prediction_id"), *numbers, *list(PREDICTION)[1:]])
