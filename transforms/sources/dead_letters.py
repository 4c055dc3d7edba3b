"""Dead letters of batch sources: their schemas, and how they are concatenated."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl
import pyarrow as pa

from schemas.tables import DEAD_LETTERS
from schemas.views import FeatureView
from transforms.records.record_batches import batch

# Columns of dead letters that name their file and row. Their date comes from `time` (µs).
SOURCE_DEAD_LETTERS = {
    "source": pl.String,
    "file": pl.String,
    "row": pl.Int64,
    "field": pl.String,
    "rule": pl.String,
    "value": pl.String,
    "time": pl.Int64,
}

# Columns of dead letters whose file and row are not known yet.
ROW_DEAD_LETTERS = {"place": pl.Int64, "field": pl.String, "rule": pl.String, "value": pl.String, "time": pl.Int64}


def concat_dead_letters(dead_letters: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Concatenates the dead letters of several reads."""
    return pl.concat([pl.DataFrame(schema=SOURCE_DEAD_LETTERS), *dead_letters])


def dead_letters_batch(view: FeatureView, dead_letters: Sequence[pl.DataFrame]) -> pa.RecordBatch:
    """Dead letters as a RecordBatch of `DEAD_LETTERS`. Those without a time are dated 1970-01-01."""
    date = pl.col("time").clip(0).cast(pl.Datetime("us")).dt.date().alias("date")
    return batch(
        concat_dead_letters(dead_letters)
        .with_columns(date, pl.lit(view.name).alias("view"))
        .sort("date", "source", "file", "row"),
        DEAD_LETTERS,
    )
