"""Feature rows of the champion's own table for the challenger's test rows, for a champion that reads other features."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from datetime import date

import apache_beam as beam
import pyarrow as pa

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import StoreError
from schemas.splits import LABEL
from transforms.records.record_batches import batch, frame
from transforms.storage.delta_tables import DataFile, read_group

log = logging.getLogger("millrace.training")
MISSING = "missing"


@dataclasses.dataclass(frozen=True)
class OwnTable:
    """A feature table of the champion, resolved at launch.

    Args:
        files: its files of the test's dates, in order of date.
        key, time: columns that join the rows of both tables, since row ids depend on the view's name.
        inputs: inputs of the champion that are read from it.
    """

    files: tuple[DataFile, ...]
    key: tuple[str, ...]
    time: str
    inputs: tuple[str, ...]

    @property
    def moment(self) -> list[str]:
        """Columns that identify a spine row."""
        return [*self.key, self.time]

    def between(self, low: date, high: date) -> list[DataFile]:
        """Files that can have rows of these dates; a file's date is the first of its partition."""
        first = max((file.date for file in self.files if file.date <= low), default=low)
        return [file for file in self.files if first <= file.date <= high]


def own_rows(rows: pa.RecordBatch, tables: Sequence[OwnTable]) -> tuple[pa.RecordBatch | None, int]:
    """Join `rows` with the inputs that `tables` have for them; returns also how many rows some table lacks.

    Args:
        rows: test examples.  Their `row_id`, `date` and label are kept, so that both models have the same replicates.
        tables: the champion's feature tables, one per view.
    """
    kept, moment = ("row_id", "date", LABEL), tables[0].moment
    mine = frame(rows).select(*moment, *kept)
    joined, fields = mine, dict[str, pa.Field]()
    for table in tables:
        files = table.between(mine["date"].min(), mine["date"].max()) if len(mine) else []  # type: ignore[arg-type]
        if not files:
            return None, len(mine)
        own = read_group(files, list(dict.fromkeys([*moment, *table.inputs])))
        inputs = [name for name in table.inputs if name not in moment]
        joined = joined.join(frame(own), on=moment, how="inner", nulls_equal=True, maintain_order="left")
        fields |= {name: own.schema.field(name) for name in (*moment, *inputs)}
    schema = pa.schema([*fields.values(), *(rows.schema.field(name) for name in kept)])
    return batch(joined, schema) if len(joined) else None, len(mine) - len(joined)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class OwnRows(beam.PTransform):
    """PCollection[RecordBatch] of test examples → (the champion's rows, PCollection of the number of rows it lacks)."""

    tables: tuple[OwnTable, ...]

    def expand(self, rows: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        found = rows | "Join" >> beam.ParDo(_Join(self.tables)).with_outputs(MISSING, main="rows")
        return found["rows"], found[MISSING] | "Missing" >> beam.CombineGlobally(sum)


class _Join(beam.DoFn):
    def __init__(self, tables: tuple[OwnTable, ...]) -> None:
        self.tables = tables

    def process(self, rows: pa.RecordBatch) -> Iterator[pa.RecordBatch | beam.pvalue.TaggedOutput]:
        try:
            found, missing = own_rows(rows, self.tables)
        except StoreError as error:  # the run itself does not need these tables
            log.warning("features of the champion cannot be read: %s", error)
            found, missing = None, rows.num_rows
        yield beam.pvalue.TaggedOutput(MISSING, missing)
        if found is not None:
            yield found
