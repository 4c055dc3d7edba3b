"""Dead letters: rows that break a contract, files and messages that cannot be read. All their schemas are here.

A dead letter of a batch source begins without a file (`ROW_DEAD_LETTERS`), then gets its file and row
(`SOURCE_DEAD_LETTERS`), and is stored in the table of the view (`DEAD_LETTERS`). A dead letter of a live job names the
partition and offset of its message (`MESSAGE_DEAD_LETTERS`) and is stored in the live table (`LIVE_DEAD_LETTERS`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import date

import polars as pl
import pyarrow as pa

from schemas.tables import TIME
from schemas.views import FeatureView
from transforms.records.record_batches import batch

# The field that breaks the contract, the rule that it breaks, and its value as text.
_REASON = {"field": pl.String, "rule": pl.String, "value": pl.String}

# Before the file is known: `place` is the row's position in its frame. `time`: µs since 1970, or null.
ROW_DEAD_LETTERS = {"place": pl.Int64, **_REASON, "time": pl.Int64}

# With file and row. `row` is the row's number in the file, −1 for the whole file. The date follows from `time` (µs).
SOURCE_DEAD_LETTERS = {"source": pl.String, "file": pl.String, "row": pl.Int64, **_REASON, "time": pl.Int64}

# The table of a view's dead letters. `source` may be the spine.
DEAD_LETTERS = pa.schema(
    [
        ("source", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("field", pa.string()),
        ("rule", pa.string()),
        ("value", pa.string()),
        ("view", pa.string()),
        ("date", pa.date32()),
    ]
)

# Rows of messages, and refused spine rows. `place` is the row's position in the message, −1 for the whole message.
# `arrived`: µs since 1970. For a row of a file (see `as_message_dead_letters`) `partition` is negative, `offset` is its
# row in the file, and `place` is the number of the file.
MESSAGE_DEAD_LETTERS = {
    "source": pl.String,
    "partition": pl.Int32,
    "offset": pl.Int64,
    "place": pl.Int32,
    **_REASON,
    "arrived": pl.Int64,
}

# The table of a live job's dead letters.
LIVE_DEAD_LETTERS = pa.schema(
    [
        ("source", pa.string()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("place", pa.int32()),
        ("field", pa.string()),
        ("rule", pa.string()),
        ("value", pa.string()),
        ("view", pa.string()),
        ("arrived", TIME),
        ("date", pa.date32()),
    ]
)

# As a live features job writes them: of one version of the view; null for all of them.
VIEW_DEAD_LETTERS = LIVE_DEAD_LETTERS.append(pa.field("fingerprint", pa.string()))


# The date of dead letters that have no time: of dimensions, and of row groups without any plausible time.
UNDATED = date(1970, 1, 1)


def concat_dead_letters(dead_letters: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Concatenates the dead letters of several reads."""
    return pl.concat([pl.DataFrame(schema=SOURCE_DEAD_LETTERS), *dead_letters])


def dead_letters_batch(view: FeatureView, dead_letters: Sequence[pl.DataFrame]) -> pa.RecordBatch:
    """Dead letters as a RecordBatch of `DEAD_LETTERS`."""
    return batch(dated_dead_letters(view, dead_letters), DEAD_LETTERS)


def dated_dead_letters(view: FeatureView, dead_letters: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Dead letters with the columns of `DEAD_LETTERS`. Those without a time are dated `UNDATED`."""
    day = pl.col("time").clip(0).cast(pl.Datetime("us")).dt.date().alias("date")
    return (
        concat_dead_letters(dead_letters)
        .with_columns(day, pl.lit(view.name).alias("view"))
        .select(DEAD_LETTERS.names)
        .sort("date", "source", "file", "row")
    )


def message_dead_letters(source: str, rows: pl.DataFrame, field: str, rule: str, value: pl.Expr) -> pl.DataFrame:
    """Dead letters of `MESSAGE_DEAD_LETTERS` for `rows`, which have the columns of their origin (`__partition`, …)."""
    return rows.select(
        pl.lit(source).alias("source"),
        pl.col("__partition").alias("partition"),
        pl.col("__offset").alias("offset"),
        pl.col("__place").alias("place"),
        pl.lit(field).alias("field"),
        pl.lit(rule).alias("rule"),
        value.alias("value"),
        pl.col("__arrived").alias("arrived"),
    )


def as_message_dead_letters(
    dead_letters: pl.DataFrame, partition: int, paths: Iterable[str], version: str, *more: pl.Expr
) -> pl.DataFrame:
    """Dead letters of files with the columns of `MESSAGE_DEAD_LETTERS`, one per file and row, with the columns `more`
    at the end.

    Args:
        dead_letters: of `SOURCE_DEAD_LETTERS`.
        partition: negative, since no topic has such a partition.
        paths: the files that were read; `place` is the file's number among them in sorted order.
        version: what was read, for the text of the rule.
    """
    numbers = {path: number for number, path in enumerate(sorted({*paths}))}
    file = pl.col("file").str.split("/").list.last()
    return (
        dead_letters.unique(["file", "row"], keep="first", maintain_order=True)
        .select(
            "source",
            pl.lit(partition, pl.Int32).alias("partition"),
            pl.col("row").alias("offset"),
            pl.col("file").replace_strict(numbers, return_dtype=pl.Int32).alias("place"),
            "field",
            pl.format("{} ({}, {})", "rule", file, pl.lit(version)).alias("rule"),
            "value",
            *more,
        )
        .sort("place", "offset")
    )
