"""Statistics of tables as TensorFlow Metadata protos, without TensorFlow; TFDV reads, shows and compares them.

Compared with TFDV's own statistics over the same rows: counts, zeros, least, greatest, unique, top values, ranks and
lengths are equal; mean and deviation are exact here, and TFDV's equal them up to rounding; histograms have TFDV's
bounds (10 equal widths, 10 quantiles). TFDV's quantiles may be off by 1 % of the ranks; these have the exact rank and
are off by at most 2⁻⁹ of the value.

The result depends only on the rows, to the last bit, and not on how they were divided or in which order parts were
merged.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
from tensorflow_metadata.proto.v0 import statistics_pb2 as pb

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.views import FeatureView
from transforms.features.kernel import kernel_pool
from transforms.records.arrays import Floats, Ints
from transforms.records.row_hashing import hash_column
from transforms.validation.numeric_sketch import NumericSketch

BUCKETS = 10
TOP_VALUES = 20
RANKS = 1000
# Most distinct strings that are counted exactly; if there are more, those with the least hashes represent all.
LEVELS = 100_000


@dataclasses.dataclass(frozen=True, eq=False)
class StringSketch:
    """The sketch of a column of strings.

    Args:
        rows, missing: number of rows, and of nulls among them.
        bytes: total length.
        levels: `value`, `count` per distinct value, ascending by value.  Beyond `LEVELS` values, only those with the
            least hashes: they and their counts do not depend on the order of merging, and the number of distinct values
            follows from how close the hashes lie (± 1 %; k minimum values, Bar-Yossef et al. 2002).
        partial: whether values were left out.
    """

    rows: int = 0
    missing: int = 0
    bytes: int = 0
    levels: pl.DataFrame = dataclasses.field(
        default_factory=lambda: pl.DataFrame(schema={"value": pl.String, "count": pl.Int64})
    )
    partial: bool = False

    @classmethod
    def of(cls, column: pa.Array) -> StringSketch:
        """The sketch of an Arrow array of strings."""
        values = pl.Series("value", pl.from_arrow(column)).cast(pl.String)
        levels = values.drop_nulls().to_frame().group_by("value").agg(count=pl.len().cast(pl.Int64))
        size = int(levels.select((pl.col("value").str.len_bytes() * pl.col("count")).sum()).item())
        return cls(len(column), column.null_count, size, *_least(levels, False))

    def __add__(self, other: StringSketch) -> StringSketch:
        levels = pl.concat([self.levels, other.levels]).group_by("value").agg(pl.col("count").sum())
        return StringSketch(
            self.rows + other.rows,
            self.missing + other.missing,
            self.bytes + other.bytes,
            *_least(levels, self.partial or other.partial),
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, StringSketch)
            and (self.rows, self.missing, self.bytes, self.partial)
            == (other.rows, other.missing, other.bytes, other.partial)
            and self.levels.equals(other.levels)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def values(self) -> int:
        return self.rows - self.missing

    @property
    def unique(self) -> int:
        if not self.partial:
            return len(self.levels)
        return round((len(self.levels) - 1) * 2.0**64 / float(hash_column(self.levels["value"]).max()))


def _least(levels: pl.DataFrame, partial: bool) -> tuple[pl.DataFrame, bool]:
    """The levels with the `LEVELS` least hashes, ascending by value, and whether any were left out, now or before."""
    if len(levels) > LEVELS:
        hashed = levels.with_columns(hash=pl.Series(hash_column(levels["value"])))
        levels, partial = hashed.sort("hash", "value").head(LEVELS).drop("hash"), True
    return levels.sort("value"), partial


@dataclasses.dataclass(frozen=True)
class Description:
    """The sketch of a table: the number of rows, and a `NumericSketch` or `StringSketch` per column, in order."""

    rows: int
    columns: Mapping[str, NumericSketch | StringSketch]
    integers: frozenset[str]

    def __add__(self, other: Description) -> Description:
        columns = {name: column + other.columns[name] for name, column in self.columns.items()}  # type: ignore[operator]
        return Description(self.rows + other.rows, columns, self.integers)


def columns_described(schema: pa.Schema, names: Iterable[str]) -> pa.Schema:
    """The columns among `names` that have statistics: numbers, booleans and strings."""
    return pa.schema(
        [schema.field(name) for name in names if _number(schema.field(name).type) or _string(schema.field(name).type)]
    )


def view_columns(view: FeatureView) -> pa.Schema:
    """The columns of a view's table that are described: features and context columns, but neither key, time nor ids."""
    beside = [name for name in view.context if name not in (*view.key, view.time)]
    return columns_described(view.output_schema, [*beside, *view.feature_names])


def describe_batch(rows: pa.RecordBatch, columns: pa.Schema) -> Description:
    """The description of a RecordBatch's `columns` (see `view_columns`)."""

    def of_column(field: pa.Field) -> NumericSketch | StringSketch:
        column = rows.column(rows.schema.get_field_index(field.name))
        return NumericSketch.of(column) if _number(field.type) else StringSketch.of(column)

    kept = dict(zip(columns.names, kernel_pool().map(of_column, columns), strict=True))
    return Description(rows.num_rows, kept, _integers(columns))


def describe_nothing(columns: pa.Schema) -> Description:
    """The description of no rows."""
    kept = {field.name: NumericSketch() if _number(field.type) else StringSketch() for field in columns}
    return Description(0, kept, _integers(columns))


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Statistics(beam.PTransform):
    """PCollection[RecordBatch] → PCollection of one `DatasetFeatureStatisticsList` over the batches' `columns`."""

    columns: pa.Schema

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return (
            batches
            | "Describe" >> beam.CombineGlobally(Describe(self.columns))
            | "Proto" >> beam.Map(statistics_proto).with_output_types(pb.DatasetFeatureStatisticsList)
        )


class Describe(beam.CombineFn):
    """RecordBatches → one Description."""

    def __init__(self, columns: pa.Schema) -> None:
        self.columns = columns

    def create_accumulator(self) -> Description:
        return describe_nothing(self.columns)

    def add_input(self, accumulator: Description, rows: pa.RecordBatch) -> Description:
        return accumulator + describe_batch(rows, self.columns)

    def merge_accumulators(self, accumulators: Iterable[Description]) -> Description:
        return functools.reduce(lambda one, other: one + other, accumulators, describe_nothing(self.columns))

    def extract_output(self, accumulator: Description) -> Description:
        return accumulator


def statistics_proto(description: Description) -> pb.DatasetFeatureStatisticsList:
    """The description as a `DatasetFeatureStatisticsList` of one dataset."""
    result = pb.DatasetFeatureStatisticsList()
    dataset = result.datasets.add(num_examples=description.rows)
    for name, column in description.columns.items():
        feature = dataset.features.add()
        feature.path.step.append(name)
        if isinstance(column, NumericSketch):
            feature.type = feature.INT if name in description.integers else feature.FLOAT
            _write_numbers(feature.num_stats, column)
        else:
            feature.type = feature.STRING
            _write_strings(feature.string_stats, column)
    return result


def _write_common(common: pb.CommonStatistics, column: NumericSketch | StringSketch) -> None:
    present = column.rows - column.missing
    common.num_missing, common.num_non_missing = column.missing, present
    if not present:
        return
    common.min_num_values = common.max_num_values = 1
    common.avg_num_values, common.tot_num_values = 1.0, present
    common.num_values_histogram.type = pb.Histogram.QUANTILES
    for _ in range(BUCKETS):
        common.num_values_histogram.buckets.add(low_value=1, high_value=1, sample_count=present / BUCKETS)


def _write_numbers(stats: pb.NumericStatistics, column: NumericSketch) -> None:
    _write_common(stats.common_stats, column)
    if column.rows == column.missing:
        return
    widths = stats.histograms.add(type=pb.Histogram.STANDARD, num_nan=column.strange)
    quantiles = stats.histograms.add(type=pb.Histogram.QUANTILES, num_nan=column.strange)
    if not column.values:
        return
    stats.mean, stats.std_dev, stats.median = column.mean, column.deviation, column.median
    stats.num_zeros, stats.min, stats.max = column.zeros, column.least, column.greatest
    for histogram, (bounds, counts) in ((widths, equal_widths(column)), (quantiles, equal_counts(column))):
        for low, high, count in zip(bounds[:-1].tolist(), bounds[1:].tolist(), counts.tolist(), strict=True):
            histogram.buckets.add(low_value=low, high_value=high, sample_count=count)


def equal_widths(column: NumericSketch, buckets: int = BUCKETS) -> tuple[Floats, Ints]:
    """Bounds [buckets + 1] of equal widths, and counts [buckets]. A value on a bound counts in the bucket below; a bin
    counts where its mean does.
    """
    if column.least == column.greatest:
        return np.array([column.least, column.greatest]), np.array([column.values])
    bounds = np.linspace(column.least, column.greatest, buckets + 1)
    position = np.clip(np.searchsorted(bounds, column.interiors) - 1, 0, buckets - 1)
    counts = np.zeros(buckets, np.int64)
    np.add.at(counts, position, column.counts)
    return bounds, counts


def equal_counts(column: NumericSketch, buckets: int = BUCKETS) -> tuple[Floats, Floats]:
    """Bounds [buckets + 1] at quantiles, and counts [buckets]. Buckets that end at the same value share its count, as
    in TFDV.
    """
    ranks = -(-np.arange(buckets + 1) * column.values // buckets) - 1
    bounds = column.ranked(np.maximum(ranks, 0))
    ends, share = np.unique(bounds[1:], return_counts=True)
    held = np.maximum(np.searchsorted(column.interiors, ends, "right") - 1, 0)
    below = np.cumsum(column.counts)[held]
    return bounds, np.repeat(np.diff(below, prepend=0) / share, share)


def _write_strings(stats: pb.StringStatistics, column: StringSketch) -> None:
    _write_common(stats.common_stats, column)
    if not column.values:
        return
    stats.unique, stats.avg_length = column.unique, column.bytes / column.values
    top = column.levels.sort("count", "value", descending=True).head(RANKS)
    for rank, (value, count) in enumerate(top.iter_rows()):
        if rank < TOP_VALUES:
            stats.top_values.add(value=value, frequency=count)
        stats.rank_histogram.buckets.add(low_rank=rank, high_rank=rank, label=value, sample_count=count)


def _number(dtype: pa.DataType) -> bool:
    return pa.types.is_floating(dtype) or pa.types.is_integer(dtype) or pa.types.is_boolean(dtype)


def _string(dtype: pa.DataType) -> bool:
    return pa.types.is_string(dtype) or pa.types.is_large_string(dtype)


def _integers(columns: pa.Schema) -> frozenset[str]:
    return frozenset(field.name for field in columns if not pa.types.is_floating(field.type) and _number(field.type))
