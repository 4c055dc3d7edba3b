"""RecordBatches: their encoding as Arrow IPC, and conversions to and from Polars.

Every module that reads Arrow or Parquet imports this one, and with it `pyarrow_hotfix`: pyarrow before 14.0.1 runs code
that the schema of a message or a file names (CVE-2023-47248).  tests/sources/test_crafted_files.py checks this.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa
import pyarrow_hotfix  # noqa: F401


def to_ipc(value: pa.RecordBatch, compression: str) -> bytes:
    """Encodes the batch as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(value)
    return bytes(sink.getvalue())


def from_ipc(encoded: bytes) -> pa.RecordBatch:
    """Decodes a batch that `to_ipc` encoded, with any compression."""
    with pa.ipc.open_stream(pa.py_buffer(encoded)) as reader:
        return reader.read_next_batch()


def frame(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """Converts the batch to a Polars frame, without a copy where the types allow it."""
    return pl.from_arrow(batch)  # type: ignore[return-value]


def table(value: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """Selects the columns of `schema` from the frame, in the order and with exactly the types of `schema`.

    Raises:
        pa.ArrowInvalid: a value does not fit its type.
    """
    return pa.table([value[name].to_arrow().cast(schema.field(name).type) for name in schema.names], schema=schema)


def batch(value: pl.DataFrame | pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """Converts the frame or table to one RecordBatch with exactly `schema`."""
    whole = (value.cast(schema) if isinstance(value, pa.Table) else table(value, schema)).combine_chunks()
    batches = whole.to_batches()
    if not batches:
        return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
    (only,) = batches
    return only
