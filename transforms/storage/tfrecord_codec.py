"""RecordBatches as TFRecord files of tf.Example, gzipped, without TensorFlow and without a Python loop over values.

A column becomes a feature of one value: float32 for floats, int64 for integers, booleans, dates and times (µs), bytes
for strings.  A null leaves its feature out.

Rows differ in length only by nulls, varints and strings.  So the place of every value is computed first, and each
column is then written with one assignment for its constant bytes and one for its values, at the places of all rows.

Wire formats: https://protobuf.dev/programming-guides/encoding, `tensorflow/core/example/example.proto`, and the framing
in `tensorflow/core/lib/io/record_writer.h`.
"""

from __future__ import annotations

import functools
import os
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import google_crc32c
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from isal import isal_zlib

from transforms.records.arrays import Bools, Ints, UInt64s

# Rows encoded at a time: about 30 MB of records, so that the cost of calls per column is negligible.
CHUNK_ROWS = 1 << 14
# Rows that a thread turns into one gzip member; a gzip file may have several members.
MEMBER_ROWS = 2 * CHUNK_ROWS
# Rows whose records are written at a time, so that they stay in the CPU's caches.
CACHED_ROWS = 1 << 11
# Bytes before a record (its length, and the checksum of the length) and after it (the record's checksum).
_BEFORE, _AFTER = 12, 4
# Tags around a value, innermost first: the tag of the value in a packed FloatList, a packed Int64List or a BytesList,
# then the tag of the list.
_FLOATS, _INTEGERS, _STRINGS = b"\x0a\x12", b"\x0a\x1a", b"\x0a\x0a"
_LONGEST_VARINT = 10
# Integers are written as 8 or 16 bytes, of which only the first belong to them.  The bytes that they overwrite are
# written later: the row's further columns, its checksum, or the head of the next row.  This many bytes are left free
# after the last row.
_ROOM = 16

Bytes = npt.NDArray[np.uint8]
# An element type of several bytes, which NumPy copies without interpreting it.
Items = npt.NDArray[np.void]


@functools.cache
def _encoders() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count() or 1, "tfrecord")


def gzipped(batch: pa.RecordBatch, level: int = 1) -> Iterator[bytes]:
    """The rows of `batch` as a gzipped TFRecord file, in parts; threads begin to make the parts at once.

    Equal rows give equal bytes.
    """
    starts = range(0, max(batch.num_rows, 1), MEMBER_ROWS)
    return _encoders().map(lambda start: _member(batch.slice(start, MEMBER_ROWS), level), starts)


def _member(batch: pa.RecordBatch, level: int) -> bytes:
    packer = isal_zlib.compressobj(level, isal_zlib.DEFLATED, 31)  # writes gzip, many times faster than zlib itself
    parts = [packer.compress(records(batch.slice(start, CHUNK_ROWS))) for start in range(0, batch.num_rows, CHUNK_ROWS)]
    return b"".join([*parts, packer.flush()])


def records(batch: pa.RecordBatch) -> memoryview:
    """One framed tf.Example per row: length, its checksum, the record, its checksum; masked CRC-32C, little endian."""
    if not batch.num_rows:
        return memoryview(b"")
    columns = [_column(name, column) for name, column in zip(batch.schema.names, batch.columns, strict=True)]
    sizes = np.zeros(batch.num_rows, np.int64)
    for column in columns:
        sizes += column.widths
    heads = _Heads(sizes)
    ends = np.cumsum(heads.widths + sizes + _AFTER)
    starts = ends - (heads.widths + sizes + _AFTER)
    total = int(ends[-1])
    out = np.empty(total + _ROOM, np.uint8)
    for first in range(0, batch.num_rows, CACHED_ROWS):
        rows = slice(first, first + CACHED_ROWS)
        at = starts[rows] + heads.widths[rows]
        for column in columns:
            column.write(out, at, rows)
            at += column.widths[rows]
        heads.write(out, starts[rows], rows)
        _put(out, at, _masked(_checksums(out, starts[rows] + _BEFORE, at)).view("V4"))
    return out.data[:total]


def _checksums(out: Bytes, starts: Ints, ends: Ints) -> npt.NDArray[np.uint32]:
    """CRC-32C of each `out[start:end]`."""
    first = int(starts[0])
    content = out[first : int(ends[-1])].tobytes()  # the library does not accept views
    bounds = zip((starts - first).tolist(), (ends - first).tolist(), strict=True)
    return np.array([google_crc32c.value(content[start:end]) for start, end in bounds], np.uint32)


def _masked(sums: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return ((sums >> np.uint32(15)) | (sums << np.uint32(17))) + np.uint32(0xA282EAD8)


def _put(out: Bytes, at: Ints, items: Items) -> None:
    """Writes each item at its position; a single item is written at every position."""
    if len(at):
        _items(out, items.itemsize)[at] = items


def _items(content: Bytes, width: int) -> Items:
    """The `width` bytes that begin at each position."""
    return np.ndarray((len(content) - width + 1,), f"V{width}", content, strides=(1,))


class _Heads:
    """What precedes each row's features: the length, its checksum, and the tag and length of `Features`."""

    def __init__(self, sizes: Ints) -> None:
        # Rows have few distinct lengths.
        distinct, self.which = np.unique(sizes, return_inverse=True)
        self.heads = [_head(size) for size in distinct.tolist()]
        self.lengths = np.array([len(head) for head in self.heads], np.int64)
        self.widths = self.lengths[self.which]

    def write(self, out: Bytes, at: Ints, rows: slice) -> None:
        which = self.which[rows]
        for width in np.unique(self.lengths[which]).tolist():
            there = np.flatnonzero(self.lengths[which] == width)
            same = np.frombuffer(b"".join(head[:width].ljust(width) for head in self.heads), f"V{width}")
            _put(out, at[there], same[which[there]])


@functools.lru_cache(1 << 16)
def _head(size: int) -> bytes:
    opening = b"\x0a" + _varint(size)
    length = struct.pack("<Q", len(opening) + size)
    return length + _masked(np.array([google_crc32c.value(length)], np.uint32)).tobytes() + opening


def _column(name: str, column: pa.Array) -> _Floats | _Integers | _Strings:
    """The column's entries `name: Feature` of the map in `Features`."""
    kind = column.type
    if pa.types.is_floating(kind):
        return _Floats(name, column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind):
        return _Strings(name, column)
    return _Integers(name, column)


@functools.lru_cache(1 << 16)
def _entry_head(name: str, tags: bytes, length: int) -> Items:
    """What precedes a value of `length` bytes in its column's entry; `tags` are the tags around the value, innermost
    first."""
    head = b""
    for tag in tags:
        head = bytes([tag]) + _varint(len(head) + length) + head
    key = b"\x0a" + _varint(len(name.encode())) + name.encode()
    entry = key + b"\x12" + _varint(len(head) + length) + head
    entry = b"\x0a" + _varint(len(entry) + length) + entry
    return np.frombuffer(entry, f"V{len(entry)}")


class _Floats:
    """Constant bytes, and the four bytes of each value."""

    def __init__(self, name: str, column: pa.Array) -> None:
        self.head = _entry_head(name, _FLOATS, 4)
        values = column.cast(pa.float32()).to_numpy(zero_copy_only=False)
        self.values = np.ascontiguousarray(values, "<f4").view("V4")
        self.widths = np.full(len(column), self.head.itemsize + 4)
        self.widths[~_valid(column)] = 0

    def write(self, out: Bytes, at: Ints, rows: slice) -> None:
        values, widths = self.values[rows], self.widths[rows]
        if not widths.all():
            there = np.flatnonzero(widths)
            at, values = at[there], values[there]
        _put(out, at, self.head)
        _put(out, at + self.head.itemsize, values)


class _Integers:
    """Bytes that depend on the length of the value's varint, and the varint."""

    def __init__(self, name: str, column: pa.Array) -> None:
        if pa.types.is_date32(column.type):
            column = column.cast(pa.int32())
        column = column.cast(pa.int64())
        values = column.fill_null(0).to_numpy().view(np.uint64)
        self.lengths = _varint_lengths(values)
        self.varints = _varints(values, self.lengths)
        self.lengths[~_valid(column)] = 0
        present = np.flatnonzero(np.bincount(self.lengths, minlength=1)[1:]) + 1
        self.heads = {length: _entry_head(name, _INTEGERS, length) for length in present.tolist()}
        widths = np.zeros(_LONGEST_VARINT + 1, np.int64)
        for length, head in self.heads.items():
            widths[length] = head.itemsize + length
        self.widths = widths[self.lengths]

    def write(self, out: Bytes, at: Ints, rows: slice) -> None:
        lengths, varints = self.lengths[rows], self.varints[rows]
        for length, head in self.heads.items():
            there = np.flatnonzero(lengths == length)
            if len(there) == len(at):
                _put(out, at, head)
                _put(out, at + head.itemsize, varints)
            else:
                places = at[there]
                _put(out, places, head)
                _put(out, places + head.itemsize, varints[there])


class _Strings:
    """Bytes that depend on the length of the string, and the string."""

    def __init__(self, name: str, column: pa.Array) -> None:
        self.name = name
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        column = column.cast(pa.large_string())
        _, offsets, content = column.buffers()
        bounds = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
        self.content = np.frombuffer(content or b"", np.uint8)
        self.begins = bounds[:-1]
        self.lengths = np.where(_valid(column), np.diff(bounds), -1)
        distinct, which = np.unique(self.lengths, return_inverse=True)
        widths = [
            _entry_head(name, _STRINGS, length).itemsize + length if length >= 0 else 0 for length in distinct.tolist()
        ]
        self.widths = np.array(widths, np.int64)[which]

    def write(self, out: Bytes, at: Ints, rows: slice) -> None:
        begins, lengths = self.begins[rows], self.lengths[rows]
        for length in np.unique(lengths).tolist():
            if length < 0:
                continue
            there = np.flatnonzero(lengths == length)
            places, head = at[there], _entry_head(self.name, _STRINGS, length)
            _put(out, places, head)
            if length:
                _put(out, places + head.itemsize, _items(self.content, length)[begins[there]])


def _valid(column: pa.Array) -> Bools:
    valid: Bools = column.is_valid().to_numpy(zero_copy_only=False)
    return valid


def _varint(value: int) -> bytes:
    """A base-128 varint: seven bits per byte, least significant first, with the high bit set in all bytes but the
    last."""
    found = []
    while value >= 128:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _varint_lengths(values: UInt64s) -> Ints:
    lengths, largest = np.ones(len(values), np.int64), int(values.max(initial=0))
    for bits in range(7, 64, 7):
        if largest >> bits:
            lengths += values >= np.uint64(1 << bits)
    return lengths


def _varints(values: UInt64s, lengths: Ints) -> Items:
    """Varints of the given lengths, each followed by zeros up to 8 bytes, or up to 16 if one is longer than 8."""
    longest = int(lengths.max(initial=1))
    words = [
        _word(values >> np.uint64(7 * first), min(longest - first, 8)) | _CONTINUED[first][lengths]
        for first in range(0, longest, 8)
    ]
    return np.stack(words, axis=1).astype("<u8", copy=False).view(f"V{8 * len(words)}")[:, 0]


def _word(values: UInt64s, septets: int) -> UInt64s:
    """The lowest groups of seven bits, one per byte."""
    found = values & np.uint64(127)
    for place in range(1, septets):
        found |= (values & np.uint64(127 << 7 * place)) << np.uint64(place)
    return found


# For each length of a varint, the high bits of its first 8 bytes, and of the bytes after them.
_CONTINUED = {
    first: np.array(
        [sum(128 << 8 * (place - first) for place in range(first, min(length - 1, first + 8))) for length in range(11)],
        np.uint64,
    )
    for first in (0, 8)
}
