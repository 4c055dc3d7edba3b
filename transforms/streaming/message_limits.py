"""Limits on the expanded size of a message, checked before it is decoded: a message of some kilobytes could need
gigabytes.

Arrow's metadata says how many rows and bytes a message expands to, and its decoder allocates no more than that, so both
are summed before any buffer is decompressed.  Avro is in `avro_messages`.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import ContractError
from transforms.records.record_batches import from_ipc  # noqa: F401 (it imports pyarrow_hotfix)


@dataclasses.dataclass(frozen=True)
class MessageLimits:
    """The most that one message may hold, once expanded.

    Args:
        rows: rows.
        expanded_bytes: bytes after decompression.
        columns: columns, including those that are not declared.
        depth: levels of nesting of a JSON value or an Avro schema.
    """

    rows: int = 500_000
    expanded_bytes: int = 256 << 20
    columns: int = 4_096
    depth: int = 64

    def check_rows(self, rows: int) -> None:
        if not 0 <= rows <= self.rows:
            raise _beyond(f"A message has at most {self.rows:,} rows", f"{rows:,}")

    def check_bytes(self, size: int) -> None:
        if not 0 <= size <= self.expanded_bytes:
            raise _beyond(f"A message expands to at most {self.expanded_bytes:,} bytes", f"{size:,}")

    def check_columns(self, columns: int) -> None:
        if not 0 <= columns <= self.columns:
            raise _beyond(f"A message has at most {self.columns:,} columns", f"{columns:,}")

    def check_depth(self, depth: int) -> None:
        if depth > self.depth:
            raise _beyond(f"A message nests at most {self.depth} levels", f"{depth:,}")


DEFAULT_LIMITS = MessageLimits()


def _beyond(rule: str, value: str) -> ContractError:
    return ContractError(rule, value, "Send its rows in several messages")


# Fields of the tables in Arrow's Message.fbs: a table's first field is at position 4 of its vtable, and each further
# field 2 bytes later. They are read by hand: flatbuffers' own classes take 50 µs per message.
_MESSAGE_VERSION, _HEADER_TYPE, _HEADER, _BODY_LENGTH, _CUSTOM_METADATA = 4, 6, 8, 10, 12
_BATCH_LENGTH, _BUFFERS, _COMPRESSION, _DICTIONARY_DATA = 4, 8, 10, 6
_SCHEMA, _DICTIONARY_BATCH, _RECORD_BATCH = 1, 2, 3
_V5 = 4
_INT16, _INT32, _UINT32, _INT64 = struct.Struct("<h"), struct.Struct("<i"), struct.Struct("<I"), struct.Struct("<q")
_BUFFER = struct.Struct("<qq")
_CONTINUES = b"\xff\xff\xff\xff"
_ARROW_RULE = "A message of rows is a whole Arrow IPC stream"


def check_arrow(value: bytes, limits: MessageLimits = DEFAULT_LIMITS) -> int:
    """Checks an Arrow IPC stream by its metadata alone.

    Returns:
        Bytes of all its buffers after decompression.

    Raises:
        ContractError: it expands beyond the limits, or is not such a stream.
    """
    rows = size = position = 0
    try:
        while position < len(value):
            length = int.from_bytes(value[position + 4 : position + 8], "little", signed=True)
            if value[position : position + 4] != _CONTINUES or length < 0:
                raise ContractError(_ARROW_RULE, f"no message at byte {position}", "")
            if length == 0:
                break
            start = position + 8
            more_rows, more_bytes, body = _measured(value, start, start + length)
            rows, size, position = rows + more_rows, size + more_bytes, start + length + body
            limits.check_rows(rows)
            limits.check_bytes(size)
        if position > len(value):
            raise ContractError(_ARROW_RULE, f"{len(value)} bytes of {position}", "")
    except (struct.error, ValueError, IndexError, TypeError, OverflowError) as error:
        raise ContractError(_ARROW_RULE, f"metadata that cannot be read ({type(error).__name__})", "") from None
    return size


def _measured(value: bytes, start: int, body: int) -> tuple[int, int, int]:
    """Rows, expanded bytes, and bytes of the body of one message of a stream, whose metadata begin at `start`."""
    message = start + _UINT32.unpack_from(value, start)[0]
    at = _field(value, message, _BODY_LENGTH)
    body_length = _INT64.unpack_from(value, at)[0] if at else 0
    at = _field(value, message, _HEADER_TYPE)
    kind = value[at] if at else 0
    if body_length < 0:
        raise ContractError(_ARROW_RULE, f"a body of {body_length} bytes", "")
    if kind == _SCHEMA:
        return 0, 0, body_length
    if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        raise ContractError(_ARROW_RULE, f"a message of kind {kind}", "")
    at = _field(value, message, _MESSAGE_VERSION)
    version = _INT16.unpack_from(value, at)[0] if at else 0
    if version < _V5 and _field(value, message, _CUSTOM_METADATA):  # Arrow 0.17 named a compression here
        raise ContractError(_ARROW_RULE, "a compression of the format of before Arrow 1.0", "Use a newer writer")
    batch = _table(value, message, _HEADER)
    if kind == _DICTIONARY_BATCH:
        batch = _table(value, batch, _DICTIONARY_DATA)
    at = _field(value, batch, _BATCH_LENGTH)
    rows = _INT64.unpack_from(value, at)[0] if at else 0
    if rows < 0:
        raise ContractError(_ARROW_RULE, f"a batch of {rows} rows", "")
    size = _buffer_bytes(value, batch, body, body_length)
    return rows if kind == _RECORD_BATCH else 0, size, body_length


def _buffer_bytes(value: bytes, batch: int, body: int, body_length: int) -> int:
    """Bytes of the buffers of a batch after decompression.

    Args:
        value: the stream.
        batch: where the batch's table is.
        body: where the buffers begin.
        body_length: bytes of all buffers before decompression.
    """
    at = _field(value, batch, _BUFFERS)
    if not at:
        return 0
    at += _UINT32.unpack_from(value, at)[0]
    (count,) = _UINT32.unpack_from(value, at)
    compressed, size = bool(_field(value, batch, _COMPRESSION)), 0
    for number in range(count):  # ends with the bytes
        offset, length = _BUFFER.unpack_from(value, at + 4 + 16 * number)
        if offset < 0 or length < 0 or offset + length > body_length:
            raise ContractError(_ARROW_RULE, "a buffer outside its body", "")
        if compressed and length:
            (expanded,) = _INT64.unpack_from(value, body + offset)
            if expanded < -1 or length < 8:
                raise ContractError(_ARROW_RULE, f"a buffer of {expanded} bytes", "")
            size += length - 8 if expanded == -1 else expanded
        else:
            size += length
    return size


def _field(value: bytes, table: int, field: int) -> int:
    """The position of a field of a flatbuffers table; 0 if it is left out."""
    vtable = table - _INT32.unpack_from(value, table)[0]
    if vtable < 0 or field >= _INT16.unpack_from(value, vtable)[0]:
        return 0
    (offset,) = _INT16.unpack_from(value, vtable + field)
    return table + offset if offset else 0


def _table(value: bytes, parent: int, field: int) -> int:
    """The position of the table to which a field refers."""
    at = _field(value, parent, field)
    if not at:
        raise ContractError(_ARROW_RULE, "a message without its batch", "")
    return at + int(_UINT32.unpack_from(value, at)[0])


def read_arrow(
    value: bytes, columns: Collection[str], check: Callable[[pa.Schema], None], limits: MessageLimits = DEFAULT_LIMITS
) -> pa.Table:
    """The rows of an Arrow IPC stream, of which only `columns` are decoded.

    Args:
        value: the stream.
        columns: the declared columns; those that the stream does not have are left out.
        check: raises if the schema is not the declared one, before any row is decoded.
        limits: the most that it may contain.

    Raises:
        ContractError: it expands beyond the limits, or one of the columns has an extension type.
        Exception: whatever pyarrow raises for bytes that are not Arrow.
    """
    check_arrow(value, limits)
    with pa.ipc.open_stream(value) as reader:
        schema = reader.schema
        limits.check_columns(len(schema))
        wanted = [number for number, name in enumerate(schema.names) if name in columns]
        for number in wanted:
            _check_plain(schema.field(number))
        if len({schema.names[number] for number in wanted}) < len(wanted):
            raise ContractError("Each column of a message has its own name", ", ".join(schema.names), "")
        check(schema)
        if len(wanted) == len(schema):
            return _expanded(reader.read_all(), limits)
    if not wanted:
        raise ContractError("A message has declared columns", ", ".join(schema.names), "")
    with pa.ipc.open_stream(value, options=pa.ipc.IpcReadOptions(included_fields=wanted)) as reader:
        return _expanded(reader.read_all(), limits)


def _check_plain(field: pa.Field) -> None:
    """Refuses an extension type, whether pyarrow knows it or not: only other code defines the meaning of its values."""
    kind = field.type
    if isinstance(kind, pa.BaseExtensionType) or b"ARROW:extension:name" in (field.metadata or {}):
        raise ContractError(f"Column {field.name!r} has one of Arrow's own types", f"an extension type ({kind})", "")


def _expanded(table: pa.Table, limits: MessageLimits) -> pa.Table:
    """`table`, after a check that its columns have its length, and that its dictionaries do not expand beyond the
    limits."""
    table.validate(full=True)  # offsets outside a buffer would crash the process
    size = 0
    for column in table.columns:
        if pa.types.is_dictionary(column.type):
            for chunk in column.chunks:
                values = chunk.dictionary
                if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
                    lengths = pc.binary_length(values).take(chunk.indices)
                    size += pc.sum(lengths.cast(pa.int64())).as_py() or 0
    limits.check_bytes(size)
    return table


# The least bytes of memory that a parsed JSON value takes.
_VALUE_BYTES = 60


def check_json(value: bytes, limits: MessageLimits = DEFAULT_LIMITS) -> int:
    """Checks JSON text before it is parsed.

    Returns:
        The approximate bytes of memory that its values need.

    Raises:
        ContractError: it nests deeper, or has more values, than the limits allow.
    """
    size = len(value) + _VALUE_BYTES * (value.count(b",") + value.count(b"[") + value.count(b"{"))
    limits.check_bytes(size)
    limits.check_depth(json_depth(value, limits.depth))
    return size


def json_depth(value: bytes, enough: int = 0) -> int:
    """The deepest nesting of JSON text, or 0 if it has at most `enough` opening brackets."""
    if value.count(b"{") + value.count(b"[") <= enough:
        return 0
    if b"\\" in value:  # escaped quotes do not end a text
        value = value.replace(b"\\\\", b"__").replace(b'\\"', b"__")
    # The codes of { and [, } and ] differ in one bit.
    letters = np.frombuffer(value, np.uint8)
    outside = np.cumsum(letters == ord('"'), dtype=np.uint8) & 1 == 0
    brackets = letters[outside & (letters & 0xD9 == 0x59)] | 0x20
    return int(np.cumsum(np.where(brackets == ord("{"), 1, np.where(brackets == ord("}"), -1, 0))).max(initial=0))
