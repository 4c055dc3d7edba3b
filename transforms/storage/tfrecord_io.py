"""TFRecord files of tf.Example in a pipeline: read into RecordBatches by tfx_bsl's decoder, written by
`tfrecord_codec`.

Formats: TensorFlow's TFRecord framing (length, checksum, record, checksum; masked CRC-32C) and `tf.train.Example`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import struct
from collections.abc import Iterator
from typing import IO, Any

import apache_beam as beam
import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import ContractError, StoreError
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.durable import rename
from transforms.storage.file_systems import FileSystems
from transforms.storage.tfrecord_codec import gzipped

BATCH_ROWS = 1 << 15
# A longer record means that its length is damaged.
LONGEST_RECORD = 1 << 30
_HEAD = struct.Struct("<QI")
_SUM = struct.Struct("<I")


def matching_files(pattern: str) -> list[str]:
    """Paths that match `pattern`, sorted.

    Raises:
        StoreError: no file matches, or the files cannot be listed.
    """
    try:
        (match,) = FileSystems.match([pattern])
        paths = sorted(each.path for each in match.metadata_list)
    except OSError as error:
        raise StoreError("TFRecord files can be listed", f"{pattern}: {error}", "Correct the pattern") from None
    if not paths:
        raise StoreError("A pattern of TFRecord files matches some", pattern, "Correct it, and quote it for the shell")
    return paths


def read_examples(path: str, schema: pa.Schema, rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
    """The examples of one file, gzipped or not, as batches of `schema` with at most `rows` rows.

    A feature the example leaves out is null; integers become booleans, dates and times by the schema; features
    that the schema does not name are skipped.

    Raises:
        StoreError: the file cannot be read, is truncated, or has a wrong checksum.
        ContractError: a record is not a tf.Example, or a feature has another type or several values.
    """
    decode = _decoder(schema)
    for first, records in _chunks(path, rows):
        where = f"{path}, records {first} to {first + len(records) - 1}"
        try:
            yield _flat(decode(records), schema)
        except (pa.ArrowInvalid, RuntimeError, ValueError) as error:
            reason = (str(error).splitlines() or [repr(error)])[0][:300]
            fix = "Write tf.Example with one value of the feature's type per row"
            raise ContractError("A TFRecord file holds the features that are read", f"{where}: {reason}", fix) from None


def _chunks(path: str, rows: int) -> Iterator[tuple[int, list[bytes]]]:
    """(Number of the first record, records), `rows` at a time."""
    first, found = 0, []
    for record in read_records(path):
        found.append(record)
        if len(found) == rows:
            yield first, found
            first, found = first + rows, []
    if found:
        yield first, found


def read_records(path: str) -> Iterator[bytes]:
    number = 0
    try:
        with _opened(path) as handle:
            while head := handle.read(_HEAD.size):
                length, checksum = _HEAD.unpack(head)
                _require(checksum == _masked(head[:8]) and length < LONGEST_RECORD, "the checksum of its length")
                record, foot = handle.read(length), handle.read(_SUM.size)
                _require(len(record) == length and len(foot) == _SUM.size, "its end")
                _require(_SUM.unpack(foot)[0] == _masked(record), "its checksum")
                yield record
                number += 1
    except (OSError, EOFError, struct.error, ValueError) as error:
        value = f"{path}, record {number}: {error}"
        raise StoreError("A TFRecord file is whole", value, "Restore the file, or write it again") from None


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"{what} is wrong")


def _masked(content: bytes) -> int:
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


@contextlib.contextmanager
def _opened(path: str) -> Iterator[IO[bytes]]:
    """The file's content, decompressed if it is gzipped."""
    with FileSystems.open(path, "application/octet-stream", "uncompressed") as handle:
        packed = handle.read(2) == b"\x1f\x8b"
        handle.seek(0)
        yield io.BufferedReader(gzip.GzipFile(fileobj=handle) if packed else handle, 1 << 20)


def _decoder(schema: pa.Schema) -> Any:
    """tfx_bsl's decoder keeps state while it decodes: two threads that shared one got each other's rows.  So each
    reader has its own."""
    from tensorflow_metadata.proto.v0 import schema_pb2
    from tfx_bsl.coders import example_coder

    wanted = schema_pb2.Schema()
    for field in schema:
        if pa.types.is_floating(field.type):
            kind = schema_pb2.FLOAT
        else:
            kind = schema_pb2.BYTES if pa.types.is_string(field.type) else schema_pb2.INT
        wanted.feature.add(name=field.name, type=kind)
    return example_coder.ExamplesToRecordBatchDecoder(wanted.SerializeToString()).DecodeBatch


def _flat(lists: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    """Turns lists of one value into plain columns of `schema`."""
    columns = []
    for field in schema:
        column = lists.column(lists.schema.get_field_index(field.name))
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
        if lengths.max(initial=0) > 1:
            raise ValueError(f"feature {field.name!r} has {int(lengths.max())} values")
        present = lengths == 1
        position = pa.array(np.cumsum(present) - 1, mask=~present)
        columns.append(_typed(column.flatten().take(position), field.type))
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _typed(values: pa.Array, kind: pa.DataType) -> pa.Array:
    if pa.types.is_string(kind):
        return values.cast(pa.string())
    return values.cast(pa.int32()).cast(kind) if pa.types.is_date32(kind) else values.cast(kind)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class ReadExamples(beam.PTransform):
    """PBegin → PCollection[RecordBatch] of `schema`, from the given TFRecord files, each read by one worker."""

    paths: tuple[str, ...]
    schema: pa.Schema

    def expand(self, begin: beam.PBegin) -> beam.PCollection:
        return (
            begin
            | "Paths" >> beam.Create(list(self.paths), reshuffle=len(self.paths) > 1)
            | "Read" >> beam.FlatMap(read_examples, self.schema).with_output_types(pa.RecordBatch)
        )


@dataclasses.dataclass(frozen=True)
class TFRecordFile:
    """A file under a hidden name: its path, the date of its first row and a digest (to sort by), and its number of
    rows."""

    path: str
    first: str
    rows: int


def write_tfrecord_file(batch: pa.RecordBatch, prefix: str, run_id: str) -> TFRecordFile:
    """Writes the batch as tf.Examples into a hidden file beside `prefix`.  Equal batches write the same name again."""
    content = b"".join(gzipped(batch))
    digest = hashlib.blake2b(content, digest_size=8).hexdigest()
    first = batch.column(batch.schema.get_field_index("date")).slice(0, 1).to_pylist()
    folder, base = FileSystems.split(prefix)
    name = f".{base}.{run_id}-{digest}.part"
    write_file_atomically(folder or ".", name, pa.py_buffer(content))
    return TFRecordFile(FileSystems.join(folder or ".", name), f"{first[0] if first else ''}-{digest}", batch.num_rows)


def publish_tfrecord_files(parts: list[TFRecordFile], prefix: str) -> list[str]:
    """Renames the parts to `<prefix>-00000-of-00002.tfrecord.gz` and so on, in order of date, and removes other files.

    Repeated after an interruption, it completes what is missing.
    """
    unique = sorted({each.path: each for each in parts}.values(), key=lambda each: each.first)
    names = [f"{prefix}-{i:05d}-of-{len(unique):05d}.tfrecord.gz" for i in range(len(unique))]
    try:
        (before,) = FileSystems.match([f"{prefix}-*-of-*.tfrecord.gz"])
        stale = [
            each.path
            for each in before.metadata_list
            if os.path.basename(each.path) not in map(os.path.basename, names)
        ]
        if stale:
            FileSystems.delete(stale)
        todo = [(part.path, name) for part, name in zip(unique, names) if FileSystems.exists(part.path)]
        if todo and "://" in prefix:
            FileSystems.rename([source for source, _ in todo], [target for _, target in todo])
        for source, target in todo if "://" not in prefix else ():
            rename(source, target)
    except OSError as error:
        raise StoreError("TFRecord files can be written", f"{prefix}: {error}", "Grant access or free space") from None
    return names


@dataclasses.dataclass(eq=False)  # Beam sets the label
class WriteTFRecordFiles(beam.PTransform):
    """PCollection[RecordBatch] (with a `date` column) → PCollection of one list of `TFRecordFile`, for
    `publish_tfrecord_files`."""

    prefix: str
    run_id: str

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        parts = batches | "Write" >> beam.Map(write_tfrecord_file, self.prefix, self.run_id)
        return parts | "Gather" >> beam.combiners.ToList()
