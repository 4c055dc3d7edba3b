"""Feature rows of several views, read from their tables and joined by key and time."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date

import apache_beam as beam
import polars as pl
import pyarrow as pa

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import DataError
from schemas.feature_rows import FeatureRows
from transforms.records.record_batches import batch, frame
from transforms.storage.delta_tables import READ_ROWS, DataFile, file_groups, read_group

# Per view, in the order of the model's views, its files of some dates.
TableFiles = tuple[tuple[DataFile, ...], ...]
MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class JoinCounts:
    """What became of the feature rows of several tables: rows in = `joined` + the sum of `missing`.

    Args:
        joined: rows that every view has.
        missing: by view, rows that it lacks and that the views before it have.
    """

    joined: int = 0
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Feature rows that any of the views has."""
        return self.joined + sum(self.missing.values())

    def __add__(self, other: JoinCounts) -> JoinCounts:
        names = dict.fromkeys([*self.missing, *other.missing])
        missing = {name: self.missing.get(name, 0) + other.missing.get(name, 0) for name in names}
        return JoinCounts(self.joined + other.joined, missing)


def add_counts(counts: Iterable[JoinCounts]) -> JoinCounts:
    """The sum of counts."""
    return sum(counts, JoinCounts())


def joined_groups(tables: Sequence[Sequence[DataFile]], rows: int = READ_ROWS) -> Iterator[TableFiles]:
    """Neighbouring files in groups of about `rows` rows of the largest table.

    With several tables a group has whole dates, since rows are joined within it.
    """
    if len(tables) == 1:
        yield from ((group,) for group in file_groups(tables[0], rows))
        return
    by_date: dict[date, list[list[DataFile]]] = {}
    for position, files in enumerate(tables):
        for file in files:
            by_date.setdefault(file.date, [[] for _ in tables])[position].append(file)
    held: list[list[DataFile]] = [[] for _ in tables]
    for _, parts in sorted(by_date.items()):
        sizes = [sum(file.rows for file in itertools.chain(*both)) for both in zip(held, parts, strict=True)]
        if any(held) and max(sizes) > rows:
            yield tuple(map(tuple, held))
            held = [[] for _ in tables]
        held = [[*before, *part] for before, part in zip(held, parts, strict=True)]
    if any(held):
        yield tuple(map(tuple, held))


def read_joined(rows: FeatureRows, tables: TableFiles, columns: Collection[str]) -> tuple[pa.RecordBatch, JoinCounts]:
    """Columns of the rows that every view has, in the order of the first view's table, and counts of all rows.

    Args:
        rows: which view each column comes from.
        tables: files of the same dates of each view.
        columns: of `rows.schema`.

    Raises:
        DataError: a table does not have the rows that its log lists.
    """
    if len(tables) == 1:
        found = read_group(tables[0], list(columns))
        return found, JoinCounts(found.num_rows)
    own = [name for name in ("row_id", "date") if name in columns]
    moment = [*rows.first.key, rows.first.time]
    parts: list[pl.DataFrame] = []
    for view, files in zip(rows.views, tables, strict=True):
        names = [*rows.read_from(view, columns), *(own if view is rows.first else ())]
        part = frame(read_group(files, names)) if files else _no_rows(view.output_schema, names)
        if (listed := sum(file.rows for file in files)) != len(part):
            raise DataError(
                f"The table of view {view.name!r} must have the rows that its log lists",
                f"it has {len(part)} of {listed}",
                "Files may have changed while they were read: run the same command again",
            )
        parts.append(part.cast({name: parts[0].schema[name] for name in moment}) if parts else part)
    joined = parts[0]
    for part in parts[1:]:
        joined = joined.join(part, on=moment, how="inner", nulls_equal=True, maintain_order="left")
    schema = pa.schema([rows.schema.field(name) for name in columns])
    return batch(joined, schema), _counts(rows, [part.select(moment) for part in parts], len(joined))


def _counts(rows: FeatureRows, parts: Sequence[pl.DataFrame], joined: int) -> JoinCounts:
    missing = dict.fromkeys((view.name for view in rows.views), 0)
    if all(len(part) == joined for part in parts):
        return JoinCounts(joined, missing)
    left = pl.concat(parts).unique()
    for view, part in zip(rows.views, parts, strict=True):
        there = left.join(part, on=left.columns, how="semi", nulls_equal=True)
        missing[view.name], left = len(left) - len(there), there
    return JoinCounts(len(left), missing)


def _no_rows(schema: pa.Schema, names: Sequence[str]) -> pl.DataFrame:
    fields = [schema.field(name) for name in names]
    return frame(pa.schema(fields).empty_table())


@dataclasses.dataclass(eq=False)  # Beam sets the label
class ReadJoined(beam.PTransform):
    """PBegin → (PCollection[RecordBatch] of joined rows, PCollection[JoinCounts] of one element).

    Args:
        rows: the views.
        tables: files of each, resolved at launch.
        columns: to read.
    """

    rows: FeatureRows
    tables: TableFiles
    columns: tuple[str, ...]

    def expand(self, begin: beam.PBegin) -> tuple[beam.PCollection, beam.PCollection]:
        found = (
            begin
            | "Files" >> beam.Create(list(joined_groups(self.tables)), reshuffle=sum(map(len, self.tables)) > 1)
            | "Read" >> beam.ParDo(_Read(self.rows, self.columns)).with_outputs(MISSING, main="rows")
        )
        found["rows"].element_type = pa.RecordBatch
        return found["rows"], found[MISSING] | "Count" >> beam.CombineGlobally(add_counts)


class _Read(beam.DoFn):
    def __init__(self, rows: FeatureRows, columns: tuple[str, ...]) -> None:
        self.rows, self.columns = rows, columns

    def process(self, tables: TableFiles) -> Iterator[pa.RecordBatch | beam.pvalue.TaggedOutput]:
        found, counts = read_joined(self.rows, tables, self.columns)
        yield beam.pvalue.TaggedOutput(MISSING, counts)
        if found.num_rows:
            yield found
