"""JSON lines: an object a line, read by Arrow; lines that it does not take are read one by one, as messages are."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.json as arrow_json

from schemas.errors import in_one_line
from transforms.sources.conversions import PROBLEM, Reading
from transforms.sources.delimited import COUNTED

Ints = npt.NDArray[np.int64]
# Values nested deeper are refused: parsers call themselves for each level.
DEEPEST = 64
_BIG = 2**63


def split_lines(data: bytes, final: bool) -> tuple[Ints, Ints, Ints, int, int]:
    """Starts and ends of the lines of a piece that are not empty, the lines before each, bytes and lines consumed."""
    scan = np.frombuffer(data, np.uint8)
    feeds = np.flatnonzero(scan == ord("\n")).astype(np.int64)
    limit = int(feeds[-1]) + 1 if len(feeds) else 0
    ends = feeds
    if final and limit < len(data):
        ends, limit = np.append(ends, len(data)), len(data)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1]) if len(ends) else np.zeros(0, np.int64)
    # Blank lines: those without a byte above the space.
    dark = np.concatenate([np.zeros(1, np.int64), np.cumsum(scan[:limit] > ord(" "))])
    there = dark[ends] > dark[starts]
    return starts[there], ends[there], np.flatnonzero(there).astype(np.int64), limit, len(feeds)


def table_of(data: bytes, starts: Ints, ends: Ints, declared: Mapping[str, pl.DataType], reading: Reading) -> pa.Table:
    """Declared columns of some lines, and `PROBLEM` if one of them is not read.  What a line lacks is null."""
    if not declared:
        return pa.table({COUNTED: pa.nulls(len(starts))})
    if not len(starts):
        return pa.table({name: pa.array([], _arrow(dtype, reading)) for name, dtype in declared.items()})
    piece = data[int(starts[0]) : int(ends[-1])]
    types = {name: _arrow(dtype, reading) for name, dtype in declared.items()}
    if _is_flat(piece):
        try:
            table = arrow_json.read_json(
                pa.BufferReader(piece),
                read_options=arrow_json.ReadOptions(use_threads=False, block_size=len(piece) + 1),
                parse_options=arrow_json.ParseOptions(
                    explicit_schema=pa.schema(types), newlines_in_values=False, unexpected_field_behavior="ignore"
                ),
            )
            if table.num_rows == len(starts):
                return table.select(list(types))
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            pass  # which line it is, and whether it can be read all the same, is found out below
    return _one_by_one(
        [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)], declared, reading
    )


def _is_flat(piece: bytes) -> bool:
    """Whether no line can be nested so deeply that Arrow's parser would exhaust its stack."""
    return piece.count(b"[") <= DEEPEST and piece.count(b"{") - piece.count(b"\n") <= DEEPEST


def _arrow(dtype: pl.DataType, reading: Reading) -> pa.DataType:
    """As what Arrow reads a declared column."""
    if dtype.is_integer():
        return pa.int64()
    if dtype.is_float():
        return pa.float64()
    if dtype == pl.Boolean:
        return pa.bool_()
    if isinstance(dtype, pl.Datetime) and reading.unit is not None:
        return pa.int64()
    return pa.string()


def keys_of(data: bytes, names: Sequence[str]) -> set[str]:
    """Those of `names` that some object in `data` may have."""
    return {
        name
        for name in names
        if any(json.dumps(name, ensure_ascii=ascii_only).encode() in data for ascii_only in (True, False))
    }


def _one_by_one(lines: Sequence[bytes], declared: Mapping[str, pl.DataType], reading: Reading) -> pa.Table:
    """Lines by Python's parser: only pieces come here in which Arrow found something that it does not take."""
    columns: dict[str, list[object]] = {name: [] for name in declared}
    problems: dict[str, list[str | None]] = {name: [] for name in PROBLEM}
    for line in lines:
        row, problem = _row(line, declared, reading)
        for name, values in columns.items():
            values.append(row.get(name))
        for values_of_problem, value in zip(problems.values(), problem, strict=True):
            values_of_problem.append(value)
    arrays: dict[str, pa.Array] = {}
    for name, dtype in declared.items():
        kind = _arrow(dtype, reading)
        if isinstance(dtype, pl.Datetime) and reading.unit is not None:
            kind = pa.string()  # numbers and text together: as text both are read
            columns[name] = [each if each is None or isinstance(each, str) else repr(each) for each in columns[name]]
        arrays[name] = pa.array(columns[name], kind)
    if any(each is not None for each in problems["__rule"]):
        arrays |= {name: pa.array(values, pa.string()) for name, values in problems.items()}
    return pa.table(arrays)


_NOTHING: tuple[None, None, None] = (None, None, None)
Problem = tuple[str, str, str] | tuple[None, None, None]


def _row(line: bytes, declared: Mapping[str, pl.DataType], reading: Reading) -> tuple[dict[str, object], Problem]:
    """The declared values of a line, and its first problem."""
    text = in_one_line(line.decode("utf-8", "backslashreplace").strip())[:300]
    try:
        if line.count(b"[") + line.count(b"{") > DEEPEST and _depth(line) > DEEPEST:
            return {}, ("", f"a line nests at most {DEEPEST} levels", text)
        found = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return {}, ("", "a line is a JSON object", text)
    if not isinstance(found, dict):
        return {}, ("", "a line is a JSON object", text)
    row: dict[str, object] = {}
    problem: Problem = _NOTHING
    for name, dtype in declared.items():
        value = found.get(name)
        fitting = _value(value, dtype, reading)
        if fitting is None and value is not None and problem is _NOTHING and not _is_nan(value):
            problem = (name, f"a value is {dtype}", in_one_line(json.dumps(value, ensure_ascii=False)[:300]))
        row[name] = fitting
    return row, _printable(problem)


def _printable(problem: Problem) -> Problem:
    """Without halves of surrogate pairs, which no column of text can hold."""
    if problem[0] is None:
        return problem
    field, rule, value = (each.encode("utf-8", "backslashreplace").decode() for each in problem)
    return field, rule, value


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and value != value


def _value(value: object, dtype: pl.DataType, reading: Reading) -> object:
    """A value as `_arrow` has it; None if it is null or does not fit."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if dtype == pl.Boolean:
        return value if isinstance(value, bool) else None
    if dtype.is_integer():
        if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
            value = int(value)
        return value if number and isinstance(value, int) and -_BIG <= value < _BIG else None
    if dtype.is_float():
        try:
            return float(value) if number else None  # type: ignore[arg-type]
        except OverflowError:
            return None
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return None  # half of a surrogate pair
        return value
    return value if isinstance(dtype, pl.Datetime) and reading.unit is not None and number else None


def _depth(line: bytes) -> int:
    """An upper bound of the levels of a line."""
    scan = np.frombuffer(line, np.uint8)
    opened = (scan == ord("[")) | (scan == ord("{"))
    closed = (scan == ord("]")) | (scan == ord("}"))
    return int(np.cumsum(opened.astype(np.int64) - closed).max())
