"""Records of CSV files: where each begins and ends, which are malformed, and their values by Arrow's reader.

A value may be quoted by `"`, which is doubled inside it; commas and line ends within quotes belong to the value.  A
quote inside a value that is not quoted stands for itself.  A quoted value that does not end before a delimiter or a
line end makes its *line* malformed, and reading goes on with the next line, so that one stray quote never hides the
rest of a file.
"""

from __future__ import annotations

import csv
import dataclasses
import re
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as arrow_csv

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
DELIMITERS = b",;\t|"
_QUOTE, _LF, _CR, _SPACE = b'"\n\r '
# A record longer than this has a quote that is not closed.
LONGEST = 16 << 20
# A column that stands for the rows where no column of theirs is wanted.
COUNTED = "__counted_row"


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """Records of a piece of a file.

    Args:
        starts: of each record, in bytes.
        ends: likewise, without its line end.
        lines: the number of lines before each record.
        broken: whether its quotes are.
        values: the number of values of each record.
        consumed: bytes of the piece that belong to whole records.
        line_count: lines of these bytes.
    """

    starts: Ints
    ends: Ints
    lines: Ints
    broken: Bools
    values: Ints
    consumed: int
    line_count: int


def split_records(data: bytes, delimiter: bytes, final: bool) -> Records:
    """The records of a piece that begins with a record.  Empty lines are none.

    Args:
        final: whether the file ends here; else an unfinished record at the end is left.
    """
    scan = np.frombuffer(data, np.uint8)
    broken_lines = np.zeros(0, np.int64)
    if _QUOTE in data:
        inside, ok = _inside(scan, delimiter[0], final)
        if not ok:
            masked, broken_lines = _masked(data, delimiter, final)
            final &= len(masked) == len(data)
            data, scan = masked, np.frombuffer(masked, np.uint8)
            inside, _ = _inside(scan, delimiter[0], final)
    else:
        inside = None
    ends_of_lines = _line_ends(scan, final)
    boundary = ends_of_lines if inside is None else ends_of_lines[~inside(ends_of_lines)]
    limit = int(boundary[-1]) + 1 if len(boundary) else 0
    ends = boundary.astype(np.int64)
    if final and limit < len(data):
        ends, limit = np.append(ends, len(data)), len(data)
    starts = np.concatenate([np.zeros(1, np.int64), ends[:-1] + 1]) if len(ends) else np.zeros(0, np.int64)
    lines = np.searchsorted(ends_of_lines, starts, "left").astype(np.int64)
    ends = ends - ((ends > starts) & (scan[np.maximum(ends - 1, 0)] == _CR))
    delimiters = np.flatnonzero(scan == delimiter[0])
    if inside is not None:
        delimiters = delimiters[~inside(delimiters)]
    values = np.searchsorted(delimiters, ends) - np.searchsorted(delimiters, starts) + 1
    there = ends > starts
    broken = np.isin(starts, broken_lines)
    consumed_lines = int(np.searchsorted(ends_of_lines, limit, "left"))
    return Records(
        starts[there], ends[there], lines[there], broken[there], values[there].astype(np.int64), limit, consumed_lines
    )


def _line_ends(scan: npt.NDArray[np.uint8], final: bool) -> Ints:
    """Where lines end: at a line feed, or at a carriage return that none follows."""
    feeds = np.flatnonzero(scan == _LF)
    returns = np.flatnonzero(scan == _CR)
    if not len(returns):
        return feeds
    last = returns[-1] == len(scan) - 1
    alone = returns[:-1] if last else returns
    alone = alone[scan[alone + 1] != _LF]
    if last and final:
        alone = np.append(alone, len(scan) - 1)
    return np.sort(np.concatenate([feeds, alone])) if len(alone) else feeds


class _Inside:
    """Whether positions are within quotes, where every quote opens or closes."""

    def __init__(self, quotes: Ints) -> None:
        self.quotes = quotes

    def __call__(self, positions: Ints) -> Bools:
        return (np.searchsorted(self.quotes, positions) & 1).astype(np.bool_)


def _inside(scan: npt.NDArray[np.uint8], delimiter: int, final: bool) -> tuple[_Inside, bool]:
    """What is within quotes, and whether all quotes open or close a value."""
    quotes = np.flatnonzero(scan == _QUOTE)
    opening, closing = quotes[0::2], quotes[1::2]
    before = scan[np.maximum(opening - 1, 0)]
    first = (opening == 0) | (before == delimiter) | (before == _LF) | (before == _CR)
    doubled = np.zeros(len(opening), np.bool_)
    doubled[1:] = closing[: len(opening) - 1] + 1 == opening[1:]
    ok = bool((first | doubled).all())
    whole = closing[closing + 1 < len(scan)]
    after = scan[whole + 1]
    ok &= bool(((after == delimiter) | (after == _LF) | (after == _CR) | (after == _QUOTE)).all())
    unclosed = len(quotes) % 2 == 1
    if unclosed and (final or len(scan) - int(quotes[-1]) > LONGEST):
        ok = False
    return _Inside(quotes), ok


def _masked(data: bytes, delimiter: bytes, final: bool) -> tuple[bytes, Ints]:
    """`data` with other bytes for quotes that stand for themselves and for all of malformed lines, and where those
    begin; without a record at the end that is cut off within quotes.

    Only pieces with such quotes come here: their lines with quotes are looked at one by one.
    """
    d = re.escape(delimiter)
    value = rb'(?:"(?:[^"]|"")*+"|[^"' + d + rb"\r\n][^" + d + rb"\r\n]*+)?"
    record = re.compile(value + rb"(?:" + d + value + rb")*+(?=[\r\n]|\Z)")
    line_end = re.compile(rb"\r\n|[\r\n]|\Z")
    result, broken, at = bytearray(data), list[int](), 0
    while at < len(data):
        quote = data.find(b'"', at)
        if quote < 0:
            break
        start = max(data.rfind(b"\n", at, quote), data.rfind(b"\r", at, quote)) + 1
        at = max(start, at)
        found = record.match(data, at)
        if found is not None and found.end() - at <= LONGEST:
            end = found.end()
            _mask_literals(result, data, at, end, delimiter)
        elif found is None and not final and _may_go_on(data, at, delimiter, value):
            return bytes(result[:at]), np.array(broken, np.int64)
        else:
            end = line_end.search(data, at).start()  # type: ignore[union-attr]
            broken.append(at)
            result[at:end] = b"?" * (end - at)
        following = line_end.match(data, end)
        at = following.end() if following is not None and following.end() > end else max(end, at + 1)
    return bytes(result), np.array(broken, np.int64)


def _may_go_on(data: bytes, at: int, delimiter: bytes, value: bytes) -> bool:
    """Whether a record is cut off by the end of the piece, within quotes."""
    d = re.escape(delimiter)
    cut = re.compile(rb"(?:" + value + d + rb')*+"(?:[^"]|"")*+"?\Z')
    return len(data) - at <= LONGEST and cut.match(data, at) is not None


def _mask_literals(result: bytearray, data: bytes, start: int, end: int, delimiter: bytes) -> None:
    """Masks the quotes of a well-formed record that do not belong to a quoted value."""
    d = re.escape(delimiter)
    for found in re.finditer(rb"(?:\A|(?<=" + d + rb'))"(?:[^"]|"")*+"|"', data[start:end]):
        if found.end() - found.start() == 1:
            result[start + found.start()] = ord("?")


def sniff_delimiter(line: bytes, names: Collection[str]) -> bytes:
    """The delimiter by which the first line of a file has the most of some names; a comma if several do."""

    def score(delimiter: str) -> int:
        return len({*header_of(line, delimiter.encode())} & {*names})

    return max(DELIMITERS.decode(), key=score).encode()


def header_of(line: bytes, delimiter: bytes) -> list[str]:
    """The names in the first line of a file."""
    text = line.decode("utf-8", "backslashreplace")
    try:
        return next(csv.reader([text], delimiter=delimiter.decode(), strict=False), [])
    except csv.Error:
        return [text]


def values_of(data: bytes, names: Sequence[str], delimiter: bytes, wanted: Sequence[str]) -> pa.Table:
    """Columns of records that all have as many values as there are names, as text.

    An empty value is null, unless it is quoted.
    """
    if not data:
        return pa.table({name: pa.array([], pa.string()) for name in wanted or [COUNTED]})
    places = [names.index(name) for name in wanted]
    numbered = [str(place) for place in range(len(names))]  # names may be there twice, where they are not declared
    chosen = [numbered[place] for place in places]
    table = arrow_csv.read_csv(
        pa.BufferReader(data),
        read_options=arrow_csv.ReadOptions(use_threads=False, block_size=len(data) + 1, column_names=numbered),
        parse_options=arrow_csv.ParseOptions(delimiter=delimiter.decode(), newlines_in_values=True),
        convert_options=arrow_csv.ConvertOptions(
            column_types=dict.fromkeys(chosen, pa.string()),
            include_columns=chosen or numbered[:1],
            strings_can_be_null=True,
            null_values=[""],
            quoted_strings_can_be_null=False,
            check_utf8=False,
        ),
    )
    return table.rename_columns(list(wanted) if chosen else [COUNTED])
