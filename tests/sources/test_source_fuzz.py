"""A fuzzer over source files: whatever their bytes and types, every row is read, rejected or refused with one message.

The plain suite tries some hundred files in a few seconds; `-m slow` tries thousands.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from schemas import Source
from schemas.errors import MillraceError
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey_source
from transforms.sources.reader import ReadOptions, read_slices, repeats_of, stream_slices

COLUMNS = {
    "i8": pl.Int8,
    "i32": pl.Int32,
    "i64": pl.Int64,
    "f32": pl.Float32,
    "f64": pl.Float64,
    "text": pl.String,
    "flag": pl.Boolean,
    "day": pl.Date,
    "due": pl.Datetime("us", "UTC"),
}
source = Source("ev", time="at", event_time="seen", columns=COLUMNS, unique="i64")
contract = Contract(source, tuple(source.schema), ("text",), 1_800_000_000_000_000)
ROWS = 12
GOOD = 1_700_000_000_000_000

_counter = itertools.count()


def account(root: Path) -> str:
    """What became of the rows under `root`: "read" or "refused".

    Raises:
        AssertionError: a row is lost, or another way of reading gives other rows.
        Exception: anything that a user would see as a traceback.
    """
    try:
        found, slices = survey_source(str(root), contract)
        whole = read_slices(found, slices, ReadOptions(numbered=len(slices) == 1, span=(-(2**62), 2**62)))
        parts = list(stream_slices(found, slices, ReadOptions(span=(-(2**62), 2**62)), chunk=5))
        repeats_of(found, slices)
    except MillraceError as error:
        return one_message(error)
    rows = sum(each.rows for each in slices)
    assert len(whole.frame) + len(whole.dead_letters) == rows
    assert sum(len(each.frame) + len(each.dead_letters) for each in parts) == rows
    whole.dead_letters.write_json()
    whole.frame.write_json()
    for name in ("text", "i64"):
        together = pl.concat([each.frame[name] for each in parts])
        assert sorted(together.to_list(), key=repr) == sorted(whole.frame[name].to_list(), key=repr)
    return "read"


def one_message(error: MillraceError) -> str:
    assert "\n" not in str(error), error
    assert error.exit_code in (3, 4)
    return "refused"


def put(root: Path, content: bytes) -> Path:
    folder = root / f"case-{next(_counter)}"
    (folder / "ev").mkdir(parents=True)
    (folder / "ev" / "a.parquet").write_bytes(content)
    return folder


def parquet(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def regular() -> pa.Table:
    times = pa.array([GOOD + i for i in range(ROWS)], pa.timestamp("us", "UTC"))
    values = {
        "at": times,
        "seen": times,
        "i8": pa.array(range(ROWS), pa.int8()),
        "i32": pa.array(range(ROWS), pa.int32()),
        "i64": pa.array(range(ROWS), pa.int64()),
        "f32": pa.array(range(ROWS), pa.float32()),
        "f64": pa.array([float(i) for i in range(ROWS)], pa.float64()),
        "text": pa.array([f"text {i}" for i in range(ROWS)], pa.string()),
        "flag": pa.array([i % 2 == 0 for i in range(ROWS)]),
        "day": pa.array(range(ROWS), pa.date32()),
        "due": times,
    }
    return pa.table(values)


BASE = [
    parquet(regular(), row_group_size=size, compression=how, version=version)
    for size, how, version in ((5, "NONE", "1.0"), (ROWS, "snappy", "2.6"), (1, "zstd", "2.4"))
]

mutations = st.lists(
    st.tuples(st.sampled_from(["set", "flip", "cut", "insert", "copy"]), st.floats(0, 1), st.binary(max_size=8)),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, changes: list[tuple[str, float, bytes]], footer_only: bool) -> bytes:
    result = bytearray(content)
    low = len(result) - 8 - int.from_bytes(result[-8:-4], "little") if footer_only else 0
    for how, where, value in changes:
        at = min(low + int(where * (len(result) - low)), max(len(result) - 1, 0))
        if how == "set" and result:
            result[at : at + len(value)] = value
        elif how == "flip" and result:
            result[at] ^= 1 << (len(value) % 8)
        elif how == "cut":
            del result[at : at + max(len(value), 1)]
        elif how == "insert":
            result[at:at] = value
        else:
            result[at:at] = result[at : at + 16]
    return bytes(result)


integers = st.integers(-(2**63), 2**63 - 1)
edges = st.sampled_from(
    [0, GOOD, 2**62, -(2**62), 2**63 - 1, -(2**63), 253_402_300_800_000_000, -62_135_596_800_000_001]
)


def of_type(kind: pa.DataType, bits: list[int], nulls: list[bool]) -> pa.Array:
    """An array of any type from whole numbers, some of them null."""
    mask = [None if null else value for value, null in zip(bits, nulls, strict=True)]
    if pa.types.is_dictionary(kind):
        return of_type(kind.value_type, bits, nulls).dictionary_encode()
    if pa.types.is_struct(kind):
        return pa.array([None if value is None else {"x": value} for value in mask], kind)
    if pa.types.is_list(kind):
        return pa.array([None if value is None else [value] for value in mask], kind)
    if pa.types.is_floating(kind):
        width = kind.bit_width // 8
        raw = b"".join((value % 2**64).to_bytes(8, "little")[-width:] for value in bits)
        return pa.Array.from_buffers(
            kind, len(bits), [pa.array([not n for n in nulls]).buffers()[1], pa.py_buffer(raw)]
        )
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        large = pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
        raw = pa.array([None if value is None else (value % 2**32).to_bytes(4, "big") for value in mask], large)
        return pa.Array.from_buffers(kind, len(raw), raw.buffers(), raw.null_count)
    if pa.types.is_binary(kind):
        return pa.array([None if value is None else str(value).encode() for value in mask], kind)
    if pa.types.is_boolean(kind):
        return pa.array([None if value is None else value % 2 == 0 for value in mask], kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(bits))
    if pa.types.is_decimal(kind):
        return (
            pa.array([None if value is None else value % 1000 for value in mask]).cast(pa.decimal128(20, 0)).cast(kind)
        )
    signed = {8: pa.int8(), 16: pa.int16(), 32: pa.int32(), 64: pa.int64()}[kind.bit_width]
    wrapped = [
        None if v is None else (v + 2 ** (kind.bit_width - 1)) % 2**kind.bit_width - 2 ** (kind.bit_width - 1)
        for v in mask
    ]
    return pa.array(wrapped, signed).view(kind)


KINDS = [
    *(pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()),
    *(pa.float32(), pa.float64(), pa.string(), pa.large_string(), pa.binary(), pa.bool_(), pa.null()),
    *(pa.date32(), pa.date64(), pa.time32("ms"), pa.time64("us"), pa.decimal128(9, 2)),
    *(pa.timestamp(unit, zone) for unit in ("ms", "us", "ns") for zone in (None, "UTC", "+05:30", "Europe/Berlin")),
    *(pa.dictionary(pa.int32(), kind) for kind in (pa.string(), pa.int64())),
    *(pa.struct([("x", pa.int64())]), pa.list_(pa.int64())),
]


@st.composite
def tables(draw: Any) -> pa.Table:
    """A regular table, some columns of which have another type, other values, are gone or there twice."""
    table = regular()
    for name in draw(st.lists(st.sampled_from(table.column_names), unique=True, min_size=1, max_size=3)):
        position = table.column_names.index(name)
        action = draw(st.sampled_from(["values", "values", "values", "type", "type", "gone", "twice", "case"]))
        if action == "gone":
            table = table.remove_column(position)
            continue
        if action in ("twice", "case"):
            table = table.append_column(name if action == "twice" else name.upper(), table.column(position))
            continue
        kind = table.schema.field(name).type if action == "values" else draw(st.sampled_from(KINDS))
        bits = draw(st.lists(st.one_of(edges, integers, st.integers(-5, 5)), min_size=ROWS, max_size=ROWS))
        nulls = draw(st.lists(st.booleans(), min_size=ROWS, max_size=ROWS))
        table = table.set_column(position, name, of_type(kind, bits, nulls))
    return table


def tried(count: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
    )


def bytes_case(tmp_path: Path, base: int, changes: list[tuple[str, float, bytes]], footer_only: bool) -> None:
    account(put(tmp_path, mutated(BASE[base], changes, footer_only)))


def types_case(tmp_path: Path, table: pa.Table, statistics: bool, size: int) -> None:
    try:
        content = parquet(table, write_statistics=statistics, row_group_size=size, version="2.6")
    except (pa.ArrowException, NotImplementedError):
        return  # no file can hold it
    account(put(tmp_path, content))


byte_cases = given(st.integers(0, len(BASE) - 1), mutations, st.booleans())
type_cases = given(tables(), st.booleans(), st.sampled_from([1, 5, ROWS]))


@tried(250)
@byte_cases
@example(0, [("cut", 0.0, b"")], False)
def test_files_of_any_bytes(tmp_path: Path, base: int, changes: Any, footer_only: bool) -> None:
    bytes_case(tmp_path, base, changes, footer_only)


@tried(150)
@type_cases
def test_files_of_any_types(tmp_path: Path, table: pa.Table, statistics: bool, size: int) -> None:
    types_case(tmp_path, table, statistics, size)


@pytest.mark.slow
@tried(20_000)
@byte_cases
def test_many_files_of_any_bytes(tmp_path: Path, base: int, changes: Any, footer_only: bool) -> None:
    bytes_case(tmp_path, base, changes, footer_only)


@pytest.mark.slow
@tried(5_000)
@type_cases
def test_many_files_of_any_types(tmp_path: Path, table: pa.Table, statistics: bool, size: int) -> None:
    types_case(tmp_path, table, statistics, size)


@pytest.mark.parametrize("content", BASE)
def test_the_files_that_are_mutated_are_read(tmp_path: Path, content: bytes) -> None:
    assert account(put(tmp_path, content)) == "read"
