"""RecordBatches as Beam elements: their coder, and the way to Polars and back."""

from __future__ import annotations

import polars as pl
import pyarrow as pa
from apache_beam import coders
from apache_beam.coders import typecoders


class RecordBatchCoder(coders.Coder):
    """Arrow IPC of exactly the slice, lz4; pickling would write the whole parent buffer."""

    def encode(self, value: pa.RecordBatch) -> bytes:
        return to_ipc(value, "lz4")

    def decode(self, encoded: bytes) -> pa.RecordBatch:
        return from_ipc(encoded)

    def is_deterministic(self) -> bool:
        return True

    def estimate_size(self, value: pa.RecordBatch) -> int:
        return int(value.nbytes)

    def to_type_hint(self) -> type:
        return pa.RecordBatch


typecoders.registry.register_coder(pa.RecordBatch, RecordBatchCoder)


def to_ipc(value: pa.RecordBatch, compression: str) -> bytes:
    """The batch as an Arrow IPC stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, value.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_batch(value)
    return bytes(sink.getvalue())


def from_ipc(encoded: bytes) -> pa.RecordBatch:
    """The batch of `to_ipc`, whatever its compression."""
    with pa.ipc.open_stream(pa.py_buffer(encoded)) as reader:
        return reader.read_next_batch()


def frame(batch: pa.RecordBatch | pa.Table) -> pl.DataFrame:
    """The batch as a Polars frame, without a copy where types allow."""
    return pl.from_arrow(batch)  # type: ignore[return-value]


def table(value: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    """The frame's columns that `schema` names, in its order and exactly its types.

    Raises:
        pa.ArrowInvalid: a value that does not fit.
    """
    return pa.table([value[name].to_arrow().cast(schema.field(name).type) for name in schema.names], schema=schema)


def batch(value: pl.DataFrame | pa.Table, schema: pa.Schema) -> pa.RecordBatch:
    """The frame or table as one RecordBatch of exactly `schema`."""
    whole = (value.cast(schema) if isinstance(value, pa.Table) else table(value, schema)).combine_chunks()
    batches = whole.to_batches()
    if not batches:
        return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
    (only,) = batches
    return only
