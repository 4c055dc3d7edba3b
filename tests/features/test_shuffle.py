"""Rows that go through a shuffle arrive as they were."""

from __future__ import annotations

from datetime import UTC, date, datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from transforms.features.shuffle import received, sent

SCHEMA = {
    "at": pl.Datetime("us", "UTC"),
    "key": pl.String,
    "value": pl.Float64,
    "number": pl.Int16,
    "day": pl.Date,
    "flag": pl.Boolean,
}
row = st.tuples(
    st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)).map(lambda at: at.replace(tzinfo=UTC)),
    st.none() | st.sampled_from(["", "a", "é", "\0"]) | st.text(max_size=20),
    st.none() | st.floats(),
    st.none() | st.integers(-(1 << 15), (1 << 15) - 1),
    st.none() | st.dates(date(1, 1, 1), date(9999, 12, 31)),
    st.none() | st.booleans(),
)


@given(st.lists(row, min_size=1, max_size=30))
def test_rows_arrive_as_they_were_sent(rows: list[tuple[object, ...]]) -> None:
    frame = pl.DataFrame(rows, SCHEMA, orient="row")
    assert_frame_equal(received(sent(frame)), frame, check_exact=True)


@pytest.mark.parametrize("distinct", [1, 127, 128, 129, 32767, 32768, 32769, 70_000])
def test_strings_arrive_however_many_distinct_ones_there_are(distinct: int) -> None:
    number = pl.int_range(150_000, eager=True)
    key = pl.select(pl.when(number % 11 > 0).then(pl.format("k{}", number % distinct))).to_series().alias("key")
    frame = pl.DataFrame([key])
    assert_frame_equal(received(sent(frame)), frame)
    assert_frame_equal(received(sent(frame.slice(77, 140_001))), frame.slice(77, 140_001))
