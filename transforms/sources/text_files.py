"""CSV files and JSON lines, read in pieces of some megabytes as if these were row groups.

A first pass finds where pieces begin.  A piece is then read by itself, so that text is cut into blocks, digested and
read by many workers as Parquet is.  A file that is compressed is decompressed up to the piece, or on from the last one.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from io import BufferedIOBase

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.errors import ContractError, in_one_line
from schemas.sources import Source
from transforms.sources import delimited, json_lines
from transforms.sources.contracts import TEXT
from transforms.sources.conversions import PROBLEM, Reading
from transforms.sources.delimited import Records
from transforms.sources.formats import CSV, GZIP, format_of
from transforms.storage.file_systems import FileSystems, open_regular

Ints = npt.NDArray[np.int64]
# Bytes of a piece, about, before compression.
PIECE = 8 << 20
_BOM = b"\xef\xbb\xbf"
_OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
# What reading compressed bytes may raise.
BROKEN = (OSError, EOFError, zlib.error)


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a file: its bytes before compression, its rows, and its lines; the first line of a file is 1."""

    offset: int
    size: int
    rows: int
    line: int
    lines: int


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file is written: where its rows begin, in bytes and lines, and of CSV the delimiter and names."""

    offset: int
    lines: int
    delimiter: bytes = b""
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class TextFile:
    """A CSV file or JSON lines of a source.

    Args:
        path: its address.
        source: whose declared columns decide what delimits values.
    """

    path: str
    source: Source

    @functools.cached_property
    def is_csv(self) -> bool:
        return format_of(self.path) == CSV

    @functools.cached_property
    def layout(self) -> Layout:
        """
        Raises:
            ContractError: the file is in another encoding, or a JSON array.
        """
        head, size = b"", 1 << 16
        while True:
            with self.open() as file:
                head = file.read(size)
            final = len(head) < size
            self._check_encoding(head)
            start = len(_BOM) if head.startswith(_BOM) else 0
            if not self.is_csv:
                if head[start:].lstrip()[:1] == b"[":
                    raise self._refused("a JSON array", "Write one object a line, as in pandas' to_json(…, lines=True)")
                return Layout(start, 0)
            found = self._header(head[start:], final)
            if found is not None:
                return dataclasses.replace(found, offset=found.offset + start)
            size *= 8

    def _header(self, head: bytes, final: bool) -> Layout | None:
        """The layout by the beginning of a file; None if more of it is needed."""
        first = head.lstrip(b"\r\n")
        skipped = len(head) - len(first)
        line = first.split(b"\n", 1)[0].split(b"\r", 1)[0]
        delimiter = delimited.sniff_delimiter(line, self.source.schema)
        records = delimited.split_records(first, delimiter, final)
        if not len(records.starts):
            return Layout(len(head), 0) if final else None
        end = int(records.ends[0])
        names = delimited.header_of(first[int(records.starts[0]) : end], delimiter)
        after = first[end : end + 2]
        end += 2 if after == b"\r\n" else min(len(after), 1)
        lines = _line_count(head[: skipped + end])
        return Layout(skipped + end, lines, delimiter, tuple(names))

    def _check_encoding(self, head: bytes) -> None:
        if head.startswith(_OTHER_ENCODINGS):
            raise self._refused("text in UTF-16 or UTF-32", "Save it as UTF-8")

    def _refused(self, what: str, fix: str) -> ContractError:
        kind = "CSV in UTF-8 with a header" if self.is_csv else "JSON lines in UTF-8"
        return ContractError(f"Source {self.source.name!r}: a file of this name is {kind}", f"{self.path}: {what}", fix)

    def open(self) -> BufferedIOBase:
        remote = "://" in self.path
        raw = FileSystems.open(self.path, compression_type="uncompressed") if remote else open_regular(self.path)
        if self.path.casefold().endswith(GZIP):
            return _Decompressed(raw)
        return raw

    def pieces(self) -> Iterator[tuple[Piece, bytes]]:
        """The file piece by piece, whole records each, with its bytes.  Pieces without rows are left out."""
        layout = self.layout
        with self.open() as file:
            _skip(file, layout.offset)
            offset, line, rest = layout.offset, layout.lines + 1, b""
            while True:
                more = file.read(PIECE)
                data, final = rest + more, len(more) < PIECE
                starts, consumed, lines = self._split(data, final)
                if len(starts):
                    yield Piece(offset, consumed, len(starts), line, lines), data[:consumed]
                offset, line, rest = offset + consumed, line + lines, data[consumed:]
                if final:
                    return

    def head(self) -> bytes:
        """What stands before the rows."""
        with self.open() as file:
            return file.read(self.layout.offset)

    def _split(self, data: bytes, final: bool) -> tuple[Ints, int, int]:
        if self.is_csv:
            records = delimited.split_records(data, self.layout.delimiter or b",", final)
            return records.starts, records.consumed, records.line_count
        starts, _, _, consumed, lines = json_lines.split_lines(data, final)
        return starts, consumed, lines

    def read(self, offset: int, size: int) -> bytes:
        """The bytes of a piece.

        Raises:
            OSError, EOFError, zlib.error: they cannot be read, or are no longer there.
        """
        data = _positions.read(self, offset, size)
        if len(data) != size:
            raise EOFError(f"it ends before byte {offset + size:,}")
        return data

    def names(self, data: bytes | None = None) -> list[str]:
        """Columns: of CSV those of its header, of JSON lines those declared ones that occur in `data`."""
        if self.is_csv:
            return list(self.layout.names)
        return [name for name in self.source.schema if name in json_lines.keys_of(data or b"", [*self.source.schema])]

    def table(self, data: bytes, columns: Sequence[str], reading: Reading) -> pa.Table:
        """Columns of the rows of a piece, and `PROBLEM` if a line cannot be read."""
        if self.is_csv:
            return self._csv_table(data, columns)
        starts, ends, _, _, _ = json_lines.split_lines(data, final=True)
        declared = {name: self.source.schema[name] for name in columns}
        return json_lines.table_of(data, starts, ends, declared, reading).replace_schema_metadata(TEXT)

    def _csv_table(self, data: bytes, columns: Sequence[str]) -> pa.Table:
        names, delimiter = self.layout.names, self.layout.delimiter
        columns = [name for name in columns if name in names]
        records = delimited.split_records(data, delimiter, final=True)
        bad = records.broken | (records.values != len(names))
        if not bad.any():
            return self._values(data, columns, len(records.starts))
        good = np.flatnonzero(~bad)
        table = self._values(b"".join(_runs(data, records, good)), columns, len(good))
        place = np.cumsum(~bad) - 1
        where = pa.array(np.maximum(place, 0), mask=bad)
        at = np.flatnonzero(bad)
        problems: dict[str, list[str | None]] = {name: [None] * len(bad) for name in PROBLEM}
        for i in at.tolist():
            line = data[int(records.starts[i]) : int(records.ends[i])]
            rule = "a quoted value ends before a delimiter or a line end"
            if not records.broken[i]:
                rule = f"a line has {len(names)} values, as the header has"
            text = in_one_line(line[:300].decode("utf-8", "backslashreplace"))
            for name, value in zip(PROBLEM, ("", rule, text), strict=True):
                problems[name][i] = value
        arrays = [column.take(where) for column in table.columns]
        more = [pa.array(values, pa.string()) for values in problems.values()]
        return pa.table([*arrays, *more], [*table.schema.names, *PROBLEM]).replace_schema_metadata(TEXT)

    def _values(self, data: bytes, columns: Sequence[str], rows: int) -> pa.Table:
        table = delimited.values_of(data, self.layout.names, self.layout.delimiter, columns)
        if table.num_rows != rows:
            raise pa.ArrowInvalid(f"{table.num_rows:,} rows by Arrow's reader, and {rows:,} by their line ends")
        return table.replace_schema_metadata(TEXT)

    def lines(self, data: bytes) -> Ints:
        """Number of lines before each row of a piece."""
        if self.is_csv:
            return delimited.split_records(data, self.layout.delimiter, final=True).lines
        return json_lines.split_lines(data, final=True)[2]

    def bounds(self, data: bytes) -> tuple[Ints, Ints]:
        """Where the rows of a piece begin and end, in bytes, without line ends."""
        if self.is_csv:
            records = delimited.split_records(data, self.layout.delimiter, final=True)
            return records.starts, records.ends
        starts, ends, *_ = json_lines.split_lines(data, final=True)
        return starts, ends


def _runs(data: bytes, records: Records, good: Ints) -> Iterator[bytes]:
    """The bytes of the good records, neighbours at once."""
    if not len(good):
        return
    breaks = np.flatnonzero(np.diff(good) > 1)
    firsts = good[np.concatenate([np.zeros(1, np.int64), breaks + 1])]
    lasts = good[np.append(breaks, len(good) - 1)]
    for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
        yield data[int(records.starts[first]) : int(records.ends[last])]
        yield b"\n"


def _line_count(data: bytes) -> int:
    return data.count(b"\n") + data.count(b"\r") - data.count(b"\r\n")


def _skip(file: BufferedIOBase, size: int) -> None:
    while size > 0:
        read = len(file.read(min(size, PIECE)))
        if not read:
            return
        size -= read


class _Decompressed(gzip.GzipFile):
    """A compressed file, which is closed with the bytes that it is made of."""

    def __init__(self, raw: BufferedIOBase) -> None:
        super().__init__(fileobj=raw)
        self.of = raw

    def close(self) -> None:
        super().close()
        self.of.close()


class _Positions(threading.local):
    """The compressed file that a thread read last: its next piece is read on from there."""

    def __init__(self) -> None:
        self.held: tuple[object, BufferedIOBase, int] | None = None

    def __del__(self) -> None:
        self.close()

    def read(self, file: TextFile, offset: int, size: int) -> bytes:
        if not file.path.casefold().endswith(GZIP) or "://" in file.path:
            with file.open() as handle:
                _skip(handle, offset) if "://" in file.path else handle.seek(offset)
                return handle.read(size)
        status = os.stat(file.path)
        which = (file.path, status.st_ino, status.st_size, status.st_mtime_ns)
        if self.held is not None and (self.held[0] != which or self.held[2] > offset):
            self.close()
        _, handle, at = self.held or (which, file.open(), 0)
        self.held = (which, handle, at)
        try:
            _skip(handle, offset - at)
            data = handle.read(size)
        except BROKEN:
            self.close()
            raise
        self.held = (which, handle, offset + len(data))
        return data

    def close(self) -> None:
        if self.held is not None:
            self.held[1].close()
            self.held = None


_positions = _Positions()
