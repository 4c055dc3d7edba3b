"""The coder of RecordBatches as Beam elements.  Importing this module registers it.

Beam looks the coder up while a graph is built.  So every module that builds steps over RecordBatches imports this one.
"""

from __future__ import annotations

import pyarrow as pa
from apache_beam import coders
from apache_beam.coders import typecoders

from transforms.records.record_batches import from_ipc, to_ipc


class RecordBatchCoder(coders.Coder):
    """Encodes only the slice, as Arrow IPC with lz4. Pickling would write the whole parent buffer."""

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
