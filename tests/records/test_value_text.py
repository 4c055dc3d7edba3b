"""Values as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from transforms.records.value_text import format_value


@given(st.floats(width=32))
def test_a_float32_is_shown_as_the_shortest_text_that_reads_back_to_it(value: float) -> None:
    text = format_value(value, pl.Float32())
    assert np.float32(text).tobytes() == np.float32(value).tobytes() or np.isnan(value)
    assert len(text) <= len(str(value)) or "e" in str(value)


def test_other_values_are_shown_as_they_are() -> None:
    assert format_value(23.329999923706055, pl.Float32()) == "23.33"
    assert format_value(23.329999923706055, pl.Float64()) == "23.329999923706055"
    assert format_value(16777217, pl.Int64()) == "16777217"
    assert format_value("1.50", pl.String()) == "1.50"
    assert format_value(True) == "True"
    assert format_value(None, pl.Float32()) == "null"
    assert format_value(datetime(2024, 5, 1, 12, tzinfo=UTC)) == "2024-05-01T12:00:00+00:00"
