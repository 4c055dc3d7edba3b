"""PTransforms over Delta tables: read data files, write them, and make them visible by one final commit."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import apache_beam as beam
import pyarrow as pa

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    DataFile,
    commit,
    file_groups,
    read_group,
    write_files,
)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class ReadTable(beam.PTransform):
    """PBegin → PCollection[RecordBatch]: the given data files, fixed at launch; about 250 000 rows per element."""

    files: tuple[DataFile, ...]
    columns: tuple[str, ...] | None = None

    def expand(self, begin: beam.PBegin) -> beam.PCollection:
        columns = None if self.columns is None else list(self.columns)
        return (
            begin
            | "Files" >> beam.Create(list(file_groups(self.files)), reshuffle=len(self.files) > 1)
            | "Read" >> beam.Map(read_group, columns).with_output_types(pa.RecordBatch)
        )


@dataclasses.dataclass(eq=False)  # Beam sets the label
class WriteFiles(beam.PTransform):
    """PCollection[RecordBatch] (with a `date` column) → PCollection of one list of (DataFile, partition values)."""

    uri: str
    run_id: str
    extra: Mapping[str, str] | None = None
    days: int = 1

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        return (
            batches
            | "Files" >> beam.FlatMap(write_files, self.uri, self.run_id, self.extra, self.days)
            | "Gather" >> beam.combiners.ToList()
        )


@dataclasses.dataclass(eq=False)  # Beam sets the label
class CommitFiles(beam.PTransform):
    """PCollection of one list of written files → PCollection[Committed] of one element.

    `prepare(table or None, *side)` makes further metadata from the same snapshot that the commit builds on.
    """

    target: CommitTarget
    prepare: Callable[..., dict[str, str]] | None = None
    side: tuple[object, ...] = ()

    def expand(self, files: beam.PCollection) -> beam.PCollection:
        step = functools.partial(commit, self.target, prepare=self.prepare)
        return files | "Commit" >> beam.Map(
            lambda written, *side: step(written, side=side), *self.side
        ).with_output_types(Committed)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class WriteTable(beam.PTransform):
    """PCollection[RecordBatch] (with a `date` column) → PCollection[Committed] of one element.

    Workers write files; one final step commits them all.  A second run with the same `run_id` commits nothing twice.
    """

    target: CommitTarget

    def expand(self, batches: beam.PCollection) -> beam.PCollection:
        target = self.target
        files = batches | "Write" >> WriteFiles(target.uri, target.run_id, target.extra, target.days)
        return files | CommitFiles(self.target)
