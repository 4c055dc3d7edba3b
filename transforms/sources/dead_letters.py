"""Dead letters of sources in batch: their schema, where a row stands, and how they are brought together."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from schemas.tables import DEAD_LETTERS
from schemas.views import FeatureView
from transforms.records.record_batches import batch

# Columns of dead letters with their place; `time` in µs decides their date.
SOURCE_DEAD_LETTERS = {
    "source": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "field": pl.String,
    "rule": pl.String,
    "value": pl.String,
    "time": pl.Int64,
}

# Columns of a dead letter, as far as they are known before its file is.
ROW_DEAD_LETTERS = {"place": pl.Int64, "field": pl.String, "rule": pl.String, "value": pl.String, "time": pl.Int64}


def concat_dead_letters(dead_letters: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Letters of several reads."""
    return pl.concat([pl.DataFrame(schema=SOURCE_DEAD_LETTERS), *dead_letters])


def dead_letters_batch(view: FeatureView, dead_letters: Sequence[pl.DataFrame]) -> pa.RecordBatch:
    """Dead letters as a RecordBatch of `DEAD_LETTERS`; those without any time are dated 1970-01-01."""
    date = pl.col("time").clip(0).cast(pl.Datetime("us")).dt.date().alias("date")
    return batch(
        concat_dead_letters(dead_letters)
        .with_columns(date, pl.lit(view.name).alias("view"))
        .sort("date", "source", "file", "row"),
        DEAD_LETTERS,
    )
