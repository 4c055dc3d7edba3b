"""Target means against a scan of the labels known before each row."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, encoders
from schemas.splits import LABEL, LABEL_TIME
from transforms.training.fit_encoders import fit
from transforms.training.target_encoding import target_encoding

SPINE = Source("spine", time="t", columns={"k": pl.Int64, "word": pl.String, "x": pl.Float32})
VIEW = FeatureView("v", SPINE, key="k", features=[Derived(x=pl.col("x"))])
EVENTS = Source("e", time="at", columns={"k": pl.Int64, "z": pl.Float32})
MODEL = Model(
    VIEW,
    Label(EVENTS, on="k", value=pl.col("z"), within="1d"),
    TimeSplit("1d", "1d"),
    objective="reg:squarederror",
    metric="rmse",
    encode={"word": encoders.Target(2.0)},
)
START = datetime(2024, 1, 1, tzinfo=UTC)
SCHEMA = pa.schema(
    [
        ("t", pa.timestamp("us", "UTC")),
        ("x", pa.float32()),
        ("word", pa.string()),
        (LABEL, pa.float32()),
        (LABEL_TIME, pa.timestamp("us", "UTC")),
    ]
)
row = st.tuples(
    st.integers(0, 8),
    st.sampled_from([None, "a", "b", "c"]),
    st.sampled_from([0.0, 1.0, 2.5, 0.1, 1e9]),
    st.integers(0, 4),
)


def oracle(rows: list[dict[str, Any]], spine_rows: dict[str, Any]) -> float:
    known = [each for each in rows if each[LABEL_TIME] < spine_rows["t"]]
    if spine_rows["word"] is None or not known:
        return math.nan
    prior = math.fsum(each[LABEL] for each in known) / len(known)
    own = [each[LABEL] for each in known if each["word"] == spine_rows["word"]]
    return (math.fsum(own) + 2.0 * prior) / (len(own) + 2.0)


@given(st.lists(row, min_size=1, max_size=25), st.integers(0, 25), st.randoms())
def test_a_training_row_sees_only_labels_known_before_it(rows: list[Any], cut: int, random: Any) -> None:
    content = [
        {
            "t": START + timedelta(hours=t),
            "x": 0.0,
            "word": word,
            LABEL: label,
            LABEL_TIME: START + timedelta(hours=t + wait),
        }
        for t, word, label, wait in rows
    ]
    random.shuffle(content)
    whole = pa.RecordBatch.from_pylist(content, SCHEMA)
    parts = [part for part in (whole.slice(cut), whole.slice(0, cut)) if part.num_rows]
    fitted = fit(MODEL, parts)
    known = target_encoding(MODEL, fitted, parts)
    assert known is not None
    for part in parts:
        matrix = fitted.apply(part)
        known.write(part, matrix)
        expected = np.array([oracle(whole.to_pylist(), each) for each in part.to_pylist()], np.float32)
        np.testing.assert_array_equal(matrix[:, fitted.names.index("word")], expected)
        assert (matrix[:, fitted.names.index("x")] == 0).all()
