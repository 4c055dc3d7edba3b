"""RecordBatches cross machines whole, and small when they are small."""

import subprocess
import sys
from datetime import UTC, date, datetime
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.records.record_batch_coder import RecordBatchCoder
from transforms.records.record_batches import batch, frame, table

SCHEMA = pa.schema(
    [
        ("i", pa.int64()),
        ("f", pa.float32()),
        ("s", pa.string()),
        ("b", pa.bool_()),
        ("t", pa.timestamp("us", "UTC")),
        ("d", pa.date32()),
    ]
)
row = st.fixed_dictionaries(
    {
        "i": st.none() | st.integers(-(2**63), 2**63 - 1),
        "f": st.none() | st.floats(width=32, allow_nan=False),
        "s": st.none() | st.text(max_size=5),
        "b": st.none() | st.booleans(),
        "t": st.none() | st.datetimes(datetime(1970, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
        "d": st.none() | st.dates(date(1970, 1, 1)),
    }
)
coder = RecordBatchCoder()


def of(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


@given(rows=st.lists(row, max_size=20), data=st.data())
def test_any_slice_comes_back_as_it_went(rows: list[dict[str, Any]], data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(rows)))
    length = data.draw(st.integers(0, len(rows) - start))
    piece = of(rows).slice(start, length)
    again = coder.decode(coder.encode(piece))
    assert again.equals(piece)
    assert again.schema == SCHEMA
    assert coder.encode(again) == coder.encode(piece)


def test_a_slice_is_as_small_as_its_rows() -> None:
    whole = of([{"i": i, "s": f"text {i}", "f": i / 7, "b": True, "t": None, "d": None} for i in range(200_000)])
    piece = whole.slice(100_000, 100)
    assert len(coder.encode(piece)) < 10_000
    assert coder.estimate_size(piece) < 10_000
    assert coder.estimate_size(whole.slice(5, 0)) < 1000
    assert coder.estimate_size(whole) > 1_000_000


FINDS_THE_CODER = """
import pyarrow as pa
from apache_beam.coders import typecoders
from transforms.records.record_batch_coder import RecordBatchCoder

found = typecoders.registry.get_coder(pa.RecordBatch)
assert isinstance(found, RecordBatchCoder), found
assert found.is_deterministic()
assert found.to_type_hint() is pa.RecordBatch
"""


def test_beam_finds_the_coder_and_may_use_it_in_keys() -> None:
    """In a process of its own: TFDV, which other tests import whole, registers another coder for the same type."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FINDS_THE_CODER], check=True)


@given(rows=st.lists(row, max_size=20))
def test_batches_and_frames_are_the_same_rows(rows: list[dict[str, Any]]) -> None:
    whole = of(rows)
    assert batch(frame(whole), SCHEMA).equals(whole)
    assert batch(pa.Table.from_batches([whole]), SCHEMA).equals(whole)


def test_columns_follow_the_schema_and_others_are_left() -> None:
    value = pl.DataFrame({"x": [1], "s": ["a"], "i": [2]})
    made = table(value, pa.schema([("i", pa.int64()), ("s", pa.string())]))
    assert made.to_pylist() == [{"i": 2, "s": "a"}]


def test_a_value_that_does_not_fit_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid):
        table(pl.DataFrame({"i": [300]}), pa.schema([("i", pa.int8())]))


def test_many_pieces_are_joined_into_one_batch() -> None:
    pieces = pa.Table.from_batches([of([{"i": 1}]), of([{"i": 2}]), of([])])
    assert batch(pieces, SCHEMA).column(0).to_pylist() == [1, 2]
    empty = batch(pa.Table.from_batches([], SCHEMA), SCHEMA)
    assert (empty.num_rows, empty.schema) == (0, SCHEMA)
