"""Values as people read them."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import polars as pl
from hypothesis import example, given
from hypothesis import strategies as st

from transforms.records.value_text import format_value


def digits(text: str) -> str:
    """The significant digits of a number: without sign, point, exponent, and zeros that only place the point."""
    return text.partition("e")[0].lstrip("-").replace(".", "").strip("0")


@given(st.floats(width=32))
@example(999999986991104.0)  # 1000000000000000.0: one digit, and more letters
def test_a_float32_is_shown_with_the_fewest_digits_that_read_back_to_it(value: float) -> None:
    text = format_value(value, pl.Float32())
    assert np.float32(text).tobytes() == np.float32(value).tobytes() or np.isnan(value)
    assert len(digits(text)) <= len(digits(str(value)))
    if np.isfinite(value) and len(digits(text)) > 1:
        fewer = f"{value:.{len(digits(text)) - 2}e}"
        assert np.float32(fewer) != np.float32(value)


def test_other_values_are_shown_as_they_are() -> None:
    assert format_value(23.329999923706055, pl.Float32()) == "23.33"
    assert format_value(23.329999923706055, pl.Float64()) == "23.329999923706055"
    assert format_value(16777217, pl.Int64()) == "16777217"
    assert format_value("1.50", pl.String()) == "1.50"
    assert format_value(True) == "True"
    assert format_value(None, pl.Float32()) == "null"
    assert format_value(datetime(2024, 5, 1, 12, tzinfo=UTC)) == "2024-05-01T12:00:00+00:00"
