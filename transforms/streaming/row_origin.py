"""The origin of a live row: partition, offset and position in its message, and what is derived from these.

A row's identity is a hash of its origin.  A *cut* is the next offset of every partition at one turn of the journal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from transforms.records.row_hashing import combine_hashes, hash_column, hash_columns

# Columns of a row's origin, and the column of its identity.
ORIGIN_COLUMNS = ["__partition", "__offset", "__place"]
RID = "__rid"


def row_identity(rows: pl.DataFrame) -> pl.Series:
    """The identities of rows, from the columns of their origin."""
    if not len(rows):
        return pl.Series(RID, [], pl.Int64)
    return pl.Series(RID, combine_hashes([hash_column(rows[name]) for name in ORIGIN_COLUMNS]).view(np.int64))


def digest(rows: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """The hash of each row's content."""
    if not len(rows):
        return pl.Series("__digest", [], pl.UInt64)
    exact = [
        rows[name].cast(pl.Float64).reinterpret(signed=True) if rows[name].dtype.is_float() else rows[name]
        for name in columns
    ]
    hashed = hash_columns(pl.DataFrame(exact), columns)
    return pl.Series("__digest", combine_hashes([hashed[name] for name in columns]))


def cut_text(offsets: Mapping[str, Mapping[int, int]]) -> str:
    """Next offset by source and partition as text: `source/partition:offset`, in order, separated by commas.

    >>> cut_text({"sales": {1: 5, 0: 7}})
    'sales/0:7,sales/1:5'
    """
    return ",".join(
        f"{name}/{partition}:{offsets[name][partition]}"
        for name in sorted(offsets)
        for partition in sorted(offsets[name])
    )


def cut_of(text: str) -> dict[tuple[str, int], int]:
    """The text of a cut as (source, partition) → next offset.

    >>> cut_of("sales/0:7,sales/1:5")
    {('sales', 0): 7, ('sales', 1): 5}
    """
    pairs = (part.rsplit(":", 1) for part in text.split(",") if part)
    return {(position.rsplit("/", 1)[0], int(position.rsplit("/", 1)[1])): int(offset) for position, offset in pairs}
