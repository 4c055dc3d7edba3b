"""Records of CSV: where they begin and end, against a scanner that looks at one character after the other."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import polars as pl
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from schemas import Source
from transforms.sources import text_files
from transforms.sources.conversions import Reading
from transforms.sources.delimited import split_records
from transforms.sources.text_files import TextFile

# (begins, ends, lines before it, whether its quotes are broken, number of values)
Record = tuple[int, int, int, bool, int]


def scanned(data: bytes) -> list[Record]:
    records: list[Record] = []
    at = line = 0
    while at < len(data):
        end, broken, values = record_at(data, at)
        if end > at:
            records.append((at, end, line, broken, values))
        line += lines_in(data[at:end])
        if data[end : end + 2] == b"\r\n":
            end += 2
            line += 1
        elif end < len(data):
            end += 1
            line += 1
        at = end
    return records


def lines_in(data: bytes) -> int:
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def record_at(data: bytes, start: int) -> tuple[int, bool, int]:
    at, values = start, 1
    while True:
        if data[at : at + 1] == b'"':
            at += 1
            while True:
                if at >= len(data):
                    return line_end(data, start), True, 0
                if data[at : at + 2] == b'""':
                    at += 2
                elif data[at : at + 1] == b'"':
                    at += 1
                    break
                else:
                    at += 1
            if at < len(data) and data[at : at + 1] not in (b",", b"\n", b"\r"):
                return line_end(data, start), True, 0
        else:
            while at < len(data) and data[at : at + 1] not in (b",", b"\n", b"\r"):
                at += 1
        if data[at : at + 1] != b",":
            return at, False, values
        at, values = at + 1, values + 1


def line_end(data: bytes, start: int) -> int:
    return next((i for i in range(start, len(data)) if data[i : i + 1] in (b"\n", b"\r")), len(data))


def found(data: bytes, final: bool = True) -> list[Record]:
    split = split_records(data, b",", final)
    return [
        (start, end, line, broken, 0 if broken else values)
        for start, end, line, broken, values in zip(
            split.starts.tolist(),
            split.ends.tolist(),
            split.lines.tolist(),
            split.broken.tolist(),
            split.values.tolist(),
            strict=True,
        )
    ]


text = st.lists(st.sampled_from([b"a", b",", b'"', b"\n", b"\r", b"\r\n", b'""', b'","', b"b c"]), max_size=25)


@given(text.map(b"".join))
@example(b'a,"b\na,"c"\n')
@example(b'a"b,"c\n"\n"d"')
@example(b'"a""\n"b"\n')
def test_records_are_those_of_a_scanner_of_characters(data: bytes) -> None:
    assert found(data) == scanned(data)


@given(text.map(b"".join), st.integers(1, 9))
def test_a_file_in_pieces_has_the_records_of_the_whole(data: bytes, size: int) -> None:
    records, at, line, rest = list[Record](), 0, 0, b""
    for start in range(0, len(data) + 1, size):
        final = start + size > len(data)
        piece = rest + data[start : start + size]
        split = split_records(piece, b",", final)
        records += [(at + a, at + b, line + c, d, e) for a, b, c, d, e in found(piece, final)]
        at, line, rest = at + split.consumed, line + split.line_count, piece[split.consumed :]
    assert records == scanned(data)
    assert rest == b""


values = st.text(st.characters(codec="utf-8", exclude_characters="\x00\ufeff"), max_size=6)
dialects = st.fixed_dictionaries(
    {
        "delimiter": st.sampled_from([",", ";", "\t", "|"]),
        "lineterminator": st.sampled_from(["\n", "\r\n"]),
        "quoting": st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    }
)


@given(
    st.lists(st.tuples(values, values, values), min_size=1, max_size=6), dialects, st.booleans(), st.integers(5, 400)
)
def test_what_pythons_writer_writes_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str]],
    dialect: dict[str, object],
    bom: bool,
    size: int,
) -> None:
    sink = io.StringIO()
    writer = csv.writer(sink, **dialect)  # type: ignore[arg-type]
    writer.writerows([("one", "two", "three"), *rows])
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_bytes(b"\xef\xbb\xbf" * bom + sink.getvalue().encode())
    reader = csv.reader(io.StringIO(sink.getvalue(), newline=""), delimiter=str(dialect["delimiter"]))
    expected = [row for row in list(reader)[1:] if row]
    assume(expected == [[*row] for row in rows if [*row] != [""]])  # Python writes a carriage return without quotes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE", size)
        assert texts(path) == [[value or None for value in row] for row in expected]


def texts(path: Path) -> list[list[str | None]]:
    """All values as text, empty ones as null."""
    source = Source("s", columns=dict.fromkeys(("one", "two", "three"), pl.String))
    file, result = TextFile(str(path), source), list[list[str | None]]()
    for _, data in file.pieces():
        table = file.table(data, ["one", "two", "three"], Reading())
        assert table.schema.names == ["one", "two", "three"]
        result += [[value or None for value in row.values()] for row in table.to_pylist()]
    return result
