"""Target encoding of training rows, with the means that were known at each row's own time.

Means that include a row's own label, or later ones, would leak the label.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
import polars as pl
import pyarrow as pa

from schemas import Model, encoders
from schemas.splits import LABEL, LABEL_TIME
from transforms.models.encoders import Fitted, Matrix, as_categories, input_column
from transforms.records.window_sums import ExactSum


@dataclasses.dataclass(frozen=True, eq=False)
class TargetEncoding:
    """Labels of the training split by the time they were known.

    Args:
        fitted: the model's encoders.
        time: the column of a row's time.
        whole: `sum` and `count` of all labels up to the time `known`, sorted by it.
        each: for each `Target` input, the same by `category`.
    """

    fitted: Fitted
    time: str
    whole: pl.DataFrame
    each: Mapping[str, pl.DataFrame]

    def write(self, batch: pa.RecordBatch, matrix: Matrix) -> None:
        """Write the means that were known strictly before each row's time to the `Target` columns of `matrix`.

        A category without a known label gets the mean of all known labels; before the first label the value is NaN.
        """
        rows_at = pl.DataFrame({"at": pl.from_arrow(batch.column(batch.schema.get_field_index(self.time)))})
        rows_at = rows_at.with_row_index("place").sort("at")
        position = 0
        for encoding in self.fitted.encodings:
            if isinstance(encoding.encoder, encoders.Target):
                category = pl.Series("category", pl.from_arrow(as_categories(input_column(batch, encoding))))
                rows = rows_at.with_columns(category.gather(rows_at["place"])).join_asof(
                    self.whole, left_on="at", right_on="known", allow_exact_matches=False
                )
                rows = rows.join_asof(
                    self.each[encoding.input],
                    left_on="at",
                    right_on="known",
                    by="category",
                    allow_exact_matches=False,
                    suffix="_own",
                    check_sortedness=False,
                )
                smoothing, prior = encoding.encoder.smoothing, pl.col("sum") / pl.col("count")
                own = pl.col("sum_own").fill_null(0.0), pl.col("count_own").fill_null(0)
                mean = (own[0] + smoothing * prior) / (own[1] + smoothing)
                found = rows.sort("place").select(pl.when(pl.col("category").is_not_null()).then(mean)).to_series()
                matrix[:, position] = found.cast(pl.Float64).fill_null(np.nan).to_numpy()
            position += len(encoding.names)


def target_encoding(model: Model, fitted: Fitted, batches: Iterable[pa.RecordBatch]) -> TargetEncoding | None:
    """The labels by category in `batches` of the training split, read only where an input has a `Target` encoder; else
    None.
    """
    inputs = [each for each in fitted.encodings if isinstance(each.encoder, encoders.Target)]
    if not inputs:
        return None
    parts = []
    for batch in batches:
        columns = {each.input: pl.from_arrow(as_categories(input_column(batch, each))) for each in inputs}
        for name in (LABEL, LABEL_TIME):
            columns[name] = pl.from_arrow(batch.column(batch.schema.get_field_index(name)))
        parts.append(pl.DataFrame(columns))
    rows = pl.concat(parts) if parts else pl.DataFrame(schema={LABEL: pl.Float32, LABEL_TIME: pl.Datetime("us", "UTC")})
    return TargetEncoding(
        fitted, model.view.time, _running(rows, []), {each.input: _running(rows, [each.input]) for each in inputs}
    )


def _running(rows: pl.DataFrame, by: list[str]) -> pl.DataFrame:
    """Sum and count of labels until each moment that brought one, by category; sums are exact, rounded once."""
    frame = rows.select(
        *(pl.col(name).alias("category") for name in by),
        known=pl.col(LABEL_TIME),
        label=pl.col(LABEL).cast(pl.Float64),
    )
    keys = ["category"] if by else []
    frame = (frame.drop_nulls(keys) if keys else frame).sort(*keys, "known").with_row_index("row")
    moments = (
        frame.group_by([*keys, "known"], maintain_order=True)
        .agg(end=pl.col("row").last().cast(pl.Int64) + 1)
        .with_columns(start=pl.lit(0, pl.Int64))
    )
    if keys:
        first = frame.group_by(keys).agg(start=pl.col("row").first().cast(pl.Int64))
        moments = moments.drop("start").join(first, on=keys, how="left", maintain_order="left")
    start, end = moments["start"].to_numpy(), moments["end"].to_numpy()
    sums = ExactSum(frame["label"].to_numpy()).total(start, end)
    return moments.select(*keys, "known", sum=pl.Series(sums, dtype=pl.Float64), count=pl.Series(end - start)).sort(
        "known"
    )
