"""Avro containers as messages, read within limits.

The schema of an Avro file is part of the file, and fastavro trusts it: a schema that nests thousands of levels or
refers to itself overflows the stack, an array of two billion nulls takes a few bytes, and blocks decompress to any
size.  So the header is read here: the schema is checked, blocks are decompressed up to the limit, and fastavro reads
only the declared columns from the resulting container without compression.
"""

from __future__ import annotations

import bz2
import functools
import io
import json
import lzma
import struct
import zlib
from collections.abc import Collection
from typing import Any

import pyarrow as pa

from schemas.errors import ContractError
from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits, json_depth

MAGIC = b"Obj\x01"
_SYNC = b"\0" * 16
_RULE = "A message is a whole Avro container"
_PRIMITIVES = {"null", "boolean", "int", "long", "float", "double", "bytes", "string"}
_NAMED = {"record", "error", "enum", "fixed"}


class _Input:
    """Avro's primitive values, one after the other."""

    def __init__(self, value: bytes, position: int) -> None:
        self.value, self.position = value, position

    def long(self) -> int:
        result = shift = 0
        while True:
            if self.position >= len(self.value) or shift > 63:
                raise ContractError(_RULE, f"no number at byte {self.position}", "")
            byte = self.value[self.position]
            self.position += 1
            result |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return (result >> 1) ^ -(result & 1)
            shift += 7

    def take(self, length: int) -> bytes:
        if not 0 <= length <= len(self.value) - self.position:
            raise ContractError(_RULE, f"{length} bytes at byte {self.position} of {len(self.value)}", "")
        self.position += length
        return self.value[self.position - length : self.position]


def avro_rows(value: bytes, columns: Collection[str], limits: MessageLimits = DEFAULT_LIMITS) -> list[object]:
    """The rows of an Avro container, with only the declared columns.

    Args:
        value: the container.
        columns: the declared columns.
        limits: the most that it may contain.

    Raises:
        ContractError: it contains more, its schema nests too deep, refers to itself or has items without bytes, or
            fastavro is not installed.
        Exception: whatever fastavro raises for bytes that are not Avro.
    """
    try:
        import fastavro
    except ImportError:
        raise ContractError("Avro messages need fastavro", "it is not installed", "pip install fastavro") from None
    text, blocks = _container(value, limits)
    header, reader = _schemas(text, tuple(columns), limits)
    plain = [header, _SYNC]
    for rows, data in blocks:
        plain += [_long(rows), _long(len(data)), data, _SYNC]
    return list(fastavro.reader(io.BytesIO(b"".join(plain)), reader))


@functools.lru_cache(maxsize=256)
def _schemas(text: bytes, columns: tuple[str, ...], limits: MessageLimits) -> tuple[bytes, dict[str, Any]]:
    """The header of a container of a schema, and the schema of its declared columns."""
    limits.check_depth(json_depth(text))
    schema = _checked_schema(json.loads(text), limits)
    wanted = [field for field in schema["fields"] if field["name"] in columns]
    return _header_bytes(json.dumps(schema).encode()), {**schema, "fields": wanted}


def check_avro(value: bytes, limits: MessageLimits = DEFAULT_LIMITS) -> int:
    """Checks the blocks of an Avro container, which must be decompressed for it.

    Returns:
        Bytes of its rows after decompression.

    Raises:
        ContractError: it expands beyond the limits, or is not such a container.
    """
    return sum(len(data) for _, data in _container(value, limits)[1])


def _container(value: bytes, limits: MessageLimits) -> tuple[bytes, list[tuple[int, bytes]]]:
    """The schema of a container, as JSON, and its blocks: number of rows, and decompressed bytes."""
    source = _Input(value, len(MAGIC))
    header = _header(source)
    codec, sync = header.get("avro.codec", b"null"), source.take(16)
    blocks, rows, size = list[tuple[int, bytes]](), 0, 0
    while source.position < len(value):
        count, data = source.long(), source.take(source.long())
        if count < 0:
            raise ContractError(_RULE, f"a block of {count} rows", "")
        rows += count
        limits.check_rows(rows)
        data = _decompressed(codec, data, size, limits)
        size += len(data)
        limits.check_bytes(size)
        if source.take(16) != sync:
            raise ContractError(_RULE, f"another marker at byte {source.position - 16}", "")
        blocks.append((count, data))
    return header.get("avro.schema", b""), blocks


def _header(source: _Input) -> dict[str, bytes]:
    """The metadata of a container."""
    found: dict[str, bytes] = {}
    while count := source.long():
        if count < 0:
            source.long()  # the size of the block in bytes
        for _ in range(abs(count)):  # ends when the bytes end: an entry has at least two
            name = source.take(source.long()).decode()
            found[name] = source.take(source.long())
    return found


def _header_bytes(schema: bytes) -> bytes:
    entry = _long(len(b"avro.schema")) + b"avro.schema" + _long(len(schema)) + schema
    return MAGIC + _long(1) + entry + _long(0)


def _long(number: int) -> bytes:
    rest, result = number << 1, bytearray()
    while rest > 0x7F:
        result.append(rest & 0x7F | 0x80)
        rest >>= 7
    result.append(rest)
    return bytes(result)


def _checked_schema(schema: Any, limits: MessageLimits) -> dict[str, Any]:
    """The schema of a row with the definition of a type wherever the type is named, so that fields can be left out.

    Raises:
        ContractError: it is not a record, refers to itself, nests too deep, or has items without bytes.
    """
    if not isinstance(schema, dict) or schema.get("type") != "record" or not isinstance(schema.get("fields"), list):
        raise ContractError("The Avro schema of a row is a record", json.dumps(schema)[:100], "")
    walk = _SchemaWalk(limits)
    fields = [walk.field(each, "") for each in schema["fields"]]
    limits.check_columns(len(fields))
    return {"type": "record", "name": "row", "fields": fields}


class _SchemaWalk:
    """Puts the definitions of named types in place of their names, each under a name of its own, and checks them."""

    def __init__(self, limits: MessageLimits) -> None:
        self.limits, self.named, self.count = limits, dict[str, tuple[Any, str]](), 0

    def field(self, field: Any, space: str, depth: int = 1, inside: tuple[str, ...] = ()) -> dict[str, Any]:
        if not isinstance(field, dict) or not isinstance(field.get("name"), str):
            raise ContractError("A field of an Avro record has a name", json.dumps(field)[:100], "")
        return {"name": field["name"], "type": self.type(field.get("type"), space, depth, inside)}

    def type(self, schema: Any, space: str, depth: int, inside: tuple[str, ...]) -> Any:
        self.limits.check_depth(depth)
        self.count += 1
        self.limits.check_columns(self.count)  # names that refer to each other would expand without end
        if isinstance(schema, list):
            return [self.type(each, space, depth + 1, inside) for each in schema]
        if isinstance(schema, str):
            return schema if schema in _PRIMITIVES else self._resolved(schema, space, depth, inside)
        if not isinstance(schema, dict):
            raise ContractError("An Avro type is a name, an object or a list", json.dumps(schema)[:100], "")
        kind = schema.get("type")
        if isinstance(kind, dict | list):
            return self.type(kind, space, depth + 1, inside)
        if kind in _PRIMITIVES:
            return {key: schema[key] for key in ("type", "logicalType", "precision", "scale") if key in schema}
        if kind in ("array", "map"):
            key = "items" if kind == "array" else "values"
            items = self.type(schema.get(key), space, depth + 1, inside)
            if kind == "array" and _without_bytes(items):
                raise ContractError("An item of an Avro array has bytes", json.dumps(items)[:100], "")
            return {"type": kind, key: items}
        if kind not in _NAMED:
            return self._resolved(str(kind), space, depth, inside)
        name = _full_name(str(schema.get("name")), schema.get("namespace", space))
        self.named[name] = (schema, name.rpartition(".")[0])
        return self._definition(name, depth, inside)

    def _resolved(self, name: str, space: str, depth: int, inside: tuple[str, ...]) -> Any:
        full = name if name in self.named and "." in name else _full_name(name, space)
        if full not in self.named:
            raise ContractError("An Avro schema names types that it has", repr(name)[:100], "")
        return self._definition(full, depth, inside)

    def _definition(self, name: str, depth: int, inside: tuple[str, ...]) -> dict[str, Any]:
        if name in inside:
            raise ContractError("An Avro type does not contain itself", repr(name)[:100], "")
        schema, space = self.named[name]
        own = {"type": schema["type"], "name": f"type_{self.count}"}
        if schema["type"] == "enum":
            return {**own, "symbols": schema.get("symbols")}
        if schema["type"] == "fixed":
            return {
                **own,
                **{key: schema[key] for key in ("size", "logicalType", "precision", "scale") if key in schema},
            }
        fields = [self.field(each, space, depth + 1, (*inside, name)) for each in schema.get("fields", [])]
        return {**own, "type": "record", "fields": fields}


def _full_name(name: str, space: Any) -> str:
    return name if "." in name or not space else f"{space}.{name}"


def _without_bytes(schema: Any) -> bool:
    """Whether a value of a type that `_SchemaWalk` has checked may take no byte."""
    if isinstance(schema, list):
        return False  # a byte selects the member
    if isinstance(schema, str):
        return schema == "null"
    if schema["type"] == "record":
        return all(_without_bytes(field["type"]) for field in schema["fields"])
    return schema["type"] == "null" or (schema["type"] == "fixed" and not schema.get("size"))


def _decompressed(codec: bytes, data: bytes, before: int, limits: MessageLimits) -> bytes:
    """A decompressed block. If it exceeds the limits, only its first bytes, one more than allowed.

    Args:
        codec: its compression.
        data: the block.
        before: number of bytes of the blocks before it.
        limits: the most that all blocks may contain.
    """
    most = limits.expanded_bytes - before
    if codec == b"null":
        return data
    if codec == b"deflate":
        return zlib.decompressobj(-15).decompress(data, most + 1)
    if codec == b"bzip2":
        return bz2.BZ2Decompressor().decompress(data, most + 1)
    if codec == b"xz":
        return lzma.LZMADecompressor(memlimit=max(most, 64 << 20)).decompress(data, most + 1)
    if codec == b"zstandard":
        with pa.input_stream(pa.py_buffer(data), compression="zstd") as stream:
            return bytes(stream.read(most + 1))
    if codec == b"snappy":  # its first bytes are its length; Avro appends a checksum of four bytes
        length = _varint(data)
        limits.check_bytes(before + length)
        return _snappy(data[:-4], length, data[-4:])
    raise ContractError(
        "A block of an Avro container is compressed by deflate, zstandard, snappy, bzip2, xz or not at all", codec, ""
    )


def _varint(data: bytes) -> int:
    result = 0
    for number, byte in enumerate(data[:5]):
        result |= (byte & 0x7F) << (7 * number)
        if not byte & 0x80:
            return result
    raise ContractError(_RULE, "a block of snappy without its length", "")


def _snappy(data: bytes, length: int, checksum: bytes) -> bytes:
    plain = bytes(pa.Codec("snappy").decompress(data, decompressed_size=length, asbytes=True)) if length else b""
    if struct.pack(">I", zlib.crc32(plain)) != checksum:
        raise ContractError(_RULE, "a block with a wrong checksum", "")
    return plain
