"""Training examples: labelled feature rows, divided into splits, in Parquet and TFRecord files."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas import Model
from schemas.durations import DAY, microseconds
from schemas.errors import DataError, StoreError
from schemas.expressions import columns_of
from schemas.splits import LABEL, LABEL_TIME, SPLITS, GroupSplit, Split
from transforms.records.record_batches import batch, frame
from transforms.records.times import midnight
from transforms.sources.contracts import Contract
from transforms.sources.inventory import Slices, survey_files
from transforms.sources.listing import Listing, require_unchanged
from transforms.sources.reader import ReadOptions, read_slices, repeats_of, without_repeats
from transforms.storage.date_spans import TABLE_READ_ERRORS
from transforms.storage.delta_tables import DataFile, write_file_atomically
from transforms.storage.file_systems import FileSystems, require_regular
from transforms.storage.joined_features import JoinCounts, TableFiles, joined_groups, read_joined
from transforms.storage.tfrecord_codec import gzipped
from transforms.training import labels
from transforms.training.labels import LabelCounts

# Rows of a Parquet row group, which is what a reader of examples keeps in memory.
GROUP_ROWS = 1 << 15
EXAMPLES_FOLDER = "examples"


@dataclasses.dataclass(frozen=True)
class ExampleBlock:
    """Consecutive files of the feature tables, and the slices of the label's source that can label their rows.

    Args:
        index, of: position among all blocks, and their number.
        tables: files of the table of each of the model's views.
    """

    index: int
    of: int
    tables: TableFiles
    events: Slices

    @property
    def span(self) -> tuple[int, int]:
        """The days of its files, `[start, end)` in µs."""
        return span_of(self.tables)


@dataclasses.dataclass(frozen=True, eq=False)
class ExamplePlan:
    """The input of the examples, resolved at launch.

    Args:
        model: the model whose inputs, label and splits decide.
        split: bounds of the splits.
        folder: `<store>/examples/<model>/<run>`.
        blocks: the units of work.
        contract: contract of the label's source.
        repeats: first events of repeated unique keys (see `repeats_of`); None if the source declares none.
        tfrecords: whether to write TFRecord files beside Parquet.
        listing: files of the label's source; None of a Delta table.
    """

    model: Model
    split: Split
    folder: str
    blocks: tuple[ExampleBlock, ...]
    contract: Contract
    repeats: pl.DataFrame | None
    tfrecords: bool = True
    listing: Listing | None = None

    @property
    def alone(self) -> ExamplePlan:
        """The plan without its blocks, which are elements of the graph, so they need not be pickled again."""
        return dataclasses.replace(self, blocks=())


@dataclasses.dataclass(frozen=True)
class ExampleShard:
    """One file of examples.

    Args:
        split: train, validate or test.
        index: index of its block; shards of a split are in order of time.
        path: path of the Parquet file; the TFRecord file ends in .tfrecord.gz instead.
        rows: number of examples.
    """

    split: str
    index: int
    path: str
    rows: int


@dataclasses.dataclass(frozen=True)
class ExamplesAccount:
    """Counts of what became of feature rows: `rows` = outside + waiting + dropped + entered, over all splits.

    Args:
        rows: feature rows that were read; of several views, those that all of them have.
        counts: by split.
        labels: number of examples by split and label; for classes only.
        shards: the files that were written.
        rounded: examples whose label is a whole number that float32 does not hold.
        missing: of several views, the rows that one of them lacks, by view (see `JoinCounts`).
    """

    rows: int = 0
    counts: Mapping[str, LabelCounts] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, Mapping[float, int]] = dataclasses.field(default_factory=dict)
    shards: tuple[ExampleShard, ...] = ()
    rounded: int = 0
    missing: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def outside(self) -> int:
        """Rows in no split: those in an embargo, or after the cutoff."""
        return self.rows - sum(each.rows for each in self.counts.values())

    def of(self, split: str) -> list[ExampleShard]:
        """The split's shards, each once, in order of time."""
        return sorted({each for each in self.shards if each.split == split}, key=lambda each: each.index)


@dataclasses.dataclass(frozen=True, eq=False)
class ExampleRequest:
    """Which examples to make.

    Args:
        model: the model whose label, inputs and splits decide.
        sources: folder of the label's source.
        folder: folder that the examples are written to.
        split: bounds of the splits.
        now: µs since 1970; events with a later time are not known yet.
        tfrecords: whether to write TFRecord files beside Parquet.
        version: version of the label's source, if it is a Delta table.
    """

    model: Model
    sources: str
    folder: str
    split: Split
    now: int
    tfrecords: bool = True
    version: int | None = None


def span_of(tables: TableFiles) -> tuple[int, int]:
    """The days of the files, `[start, end)` in µs."""
    dates = [file.date for files in tables for file in files]
    return midnight(min(dates)), midnight(max(dates)) + DAY


def plan_examples(tables: Sequence[Sequence[DataFile]], request: ExampleRequest) -> ExamplePlan:
    """Divide the files of the feature tables, one table per view, into blocks, each with the label events it needs.

    Raises:
        DataError: no file is dated before the cutoff.
        ContractError: a file of the label's source cannot be read as declared.
    """
    model, split, label = request.model, request.split, request.model.label
    contract = Contract(label.source, _columns_read(model), now=request.now, ordering=_columns_ordering(model))
    surveyed = survey_files(request.sources, contract, request.version)
    contract, slices = surveyed.contract, surveyed.slices
    parts = list(joined_groups([[file for file in each if _midnight(file.date) < split.cutoff] for each in tables]))
    if not parts:
        raise DataError(
            "There are features before the cutoff",
            f"none before {split.cutoff:%Y-%m-%d}",
            "Compute them, or move --cutoff",
        )
    within = microseconds(label.within)
    blocks = []
    for index, part in enumerate(parts):
        low, high = span_of(part)
        events = slices.overlapping(low, high + within)
        blocks.append(ExampleBlock(index, len(parts), part, events))
    repeats = repeats_of(contract, slices).first if label.source.unique else None
    return ExamplePlan(
        model, split, request.folder, tuple(blocks), contract, repeats, request.tfrecords, surveyed.listing
    )


def _columns_read(model: Model) -> tuple[str, ...]:
    """Columns of the label's source that decide labels, in declared order."""
    source = model.label.source
    used = (
        {column for _, column in model.label.keys}
        | set(columns_of(model.label.value))
        | {source.time, source.event_time}
    )
    used |= set(source.unique or ()) | (set(source.schema) if source.order is None else set(source.order))
    return tuple(name for name in source.schema if name in used)


def _columns_ordering(model: Model) -> tuple[str, ...]:
    """Further columns that decide which of several events of one key and time gives the label.

    See `FeatureView.columns_ordering`.
    """
    read, order = set(_columns_read(model)), model.label.source.tie_order
    before = set(order[: max(position for position, name in enumerate(order) if name in read)]) - read
    return tuple(name for name in model.label.source.schema if name in before)


def schema_of(model: Model) -> pa.Schema:
    """Schema of the examples.

    It has key, time, inputs, columns of groups and slices, `row_id`, `date`, `__label` and `__label_time`.
    """
    view = model.view
    schema = model.rows.schema
    sliced = [name for group in model.gates.slices for name in ((group,) if isinstance(group, str) else group)]
    groups = model.split.by if isinstance(model.split, GroupSplit) else ()
    names = dict.fromkeys([*view.key, view.time, *model.inputs, *groups, *sliced, "row_id", "date"])
    fields = [schema.field(name) for name in names]
    return pa.schema([*fields, pa.field(LABEL, pa.float32()), pa.field(LABEL_TIME, pa.timestamp("us", "UTC"))])


def make_examples(plan: ExamplePlan, block: ExampleBlock) -> tuple[dict[str, pa.RecordBatch], ExamplesAccount]:
    """Make the examples of one block by split, and count what became of its rows; nothing is written."""
    model, schema = plan.model, schema_of(plan.model)
    known = [name for name in schema.names if name not in (LABEL, LABEL_TIME)]
    joined = [column for column, _ in model.label.keys if column not in known]
    found, counted = read_joined(model.rows, block.tables, [*known, *joined])
    rows = frame(found)
    low, high = block.span
    events = read_slices(plan.contract, block.events, ReadOptions(low, high + microseconds(model.label.within))).frame
    events = without_repeats(model.label.source, events, plan.repeats)
    labelled = labels.attach(rows, events, model.label, model.view.time)
    parts, counts = labels.examples(labelled, model.label, plan.split, model.view.time)
    classes = model.objective in ("binary:logistic", "multi:softprob")
    seen = {name: dict(part[LABEL].value_counts().iter_rows()) if classes else {} for name, part in parts.items()}
    rounded = sum(int(part.select(_rounded().sum()).item() or 0) for part in parts.values())
    examples = {name: batch(part, schema) for name, part in parts.items()}
    return examples, ExamplesAccount(len(rows), counts, seen, rounded=rounded, missing=counted.missing)


def _rounded() -> pl.Expr:
    """Whether float32 rounds a whole-number label; beyond 2^53 every label counts, because doubles are rounded
    already."""
    label = pl.col(LABEL)
    beyond = (label == label.round()) & (label.cast(pl.Float32).cast(pl.Float64) != label)
    return (label.abs() > 1 << 24) & (beyond | (label.abs() > 1 << 53))


def write_shard(plan: ExamplePlan, split: str, block: ExampleBlock, rows: pa.RecordBatch) -> ExampleShard:
    """Write one block's examples of a split as Parquet and TFRecord.

    The same block writes the same bytes under the same names.
    """
    name = f"{split}-{block.index:05d}-of-{block.of:05d}"
    strings = [field.name for field in rows.schema if pa.types.is_string(field.type)]
    records = gzipped(rows) if plan.tfrecords else iter(())
    sink = pa.BufferOutputStream()
    table = pa.Table.from_batches([rows])
    pq.write_table(table, sink, row_group_size=GROUP_ROWS, compression="lz4", use_dictionary=strings)
    if plan.tfrecords:
        write_file_atomically(plan.folder, f"{name}.tfrecord.gz", pa.py_buffer(b"".join(records)))
    write_file_atomically(plan.folder, f"{name}.parquet", sink.getvalue())
    return ExampleShard(split, block.index, FileSystems.join(plan.folder, f"{name}.parquet"), rows.num_rows)


def shards_to_test(trained: object, account: ExamplesAccount) -> list[ExampleShard]:
    """The shards of the test split; `trained` is an input only so that this step waits for training."""
    return account.of("test")


def read_shard(shard: ExampleShard, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The shard's rows, one row group at a time.

    Raises:
        StoreError: the file is gone or altered.
    """
    try:
        if "://" in shard.path:
            with FileSystems.open(shard.path, compression_type="uncompressed") as handle:
                yield from _row_groups(pq.ParquetFile(pa.BufferReader(handle.read())), columns)
        else:
            require_regular(shard.path)
            yield from _row_groups(pq.ParquetFile(shard.path), columns)
    except TABLE_READ_ERRORS as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise StoreError(
            "Examples can be read while they are trained on", f"{shard.path}: {reason}", "Run the same command again"
        ) from None


def _row_groups(file: pq.ParquetFile, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, None if columns is None else list(columns))
        yield from table.combine_chunks().to_batches()


@dataclasses.dataclass(eq=False)  # Beam sets the label
class MakeExamples(beam.PTransform):
    """PCollection[ExampleBlock] → (PCollection[ExamplesAccount], PCollection[RecordBatch] of training examples).

    There is one account per block.

    All examples are written to files.  Those of the training split are also returned, so that encoders are fitted in
    the same pass.
    """

    plan: ExamplePlan

    def expand(self, blocks: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection]:
        made = blocks | "Make" >> beam.ParDo(_Make(self.plan)).with_outputs("train", main="account")
        return made["account"], made["train"]


class _Make(beam.DoFn):
    def __init__(self, plan: ExamplePlan) -> None:
        self.plan = plan.alone

    def process(self, block: ExampleBlock) -> Iterator[ExamplesAccount | beam.pvalue.TaggedOutput]:
        parts, account = make_examples(self.plan, block)
        # Files are written while the steps after this one look at the training examples.
        with ThreadPoolExecutor(1, "examples") as pool:  # one split at a time: each needs memory
            writing = [
                pool.submit(write_shard, self.plan, name, block, rows) for name, rows in parts.items() if rows.num_rows
            ]
            if parts["train"].num_rows:
                yield beam.pvalue.TaggedOutput("train", parts["train"])
            shards = tuple(each.result() for each in writing)
        yield dataclasses.replace(account, shards=shards)


def add_accounts(accounts: Iterable[ExamplesAccount]) -> ExamplesAccount:
    """The sum of accounts, the same in any order of merging."""
    rows, rounded, counts, shards = 0, 0, dict.fromkeys(SPLITS, LabelCounts()), set()
    joins = JoinCounts()
    seen: dict[str, dict[float, int]] = {name: {} for name in SPLITS}
    for each in accounts:
        rows += each.rows
        rounded += each.rounded
        joins = joins + JoinCounts(each.rows, each.missing)
        shards |= set(each.shards)
        for name in each.counts:
            counts[name] = counts[name] + each.counts[name]
            for label, count in each.labels[name].items():
                seen[name][label] = seen[name].get(label, 0) + count
    ordered = tuple(sorted(shards, key=lambda each: (SPLITS.index(each.split), each.index)))
    return ExamplesAccount(rows, counts, seen, ordered, rounded, joins.missing)


def require_usable(account: ExamplesAccount, plan: ExamplePlan) -> ExamplesAccount:
    """Return `account` if every row is accounted for and every split can be used; delete files of earlier attempts.

    Raises:
        DataError: see `labels.check`; a file of the label's source was removed or replaced meanwhile.
    """
    require_unchanged(account, () if plan.listing is None else (plan.listing,))
    labels.check_splits(plan.model.objective, account.counts, account.labels)
    for name, count in account.counts.items():
        written = sum(each.rows for each in account.of(name))
        if (
            count.rows != count.waiting + count.dropped + count.entered
            or written != count.entered
            or account.outside < 0
        ):
            raise DataError(
                "Rows are conserved: every feature row is outside, waiting, dropped or an example",
                f"{name}: {count}, {written} written",
                "The feature table may have changed while it was read: run the same command again",
            )
    keep = {each.path for each in account.shards} | {
        each.path.replace(".parquet", ".tfrecord.gz") for each in account.shards
    }
    if "://" in plan.folder:
        found = [each.path for match in FileSystems.match([f"{plan.folder}/*"]) for each in match.metadata_list]
    else:  # Beam would read brackets in the folder's name as a pattern
        found = [entry.path for entry in os.scandir(plan.folder)] if os.path.isdir(plan.folder) else []
    if stale := [path for path in found if path not in keep]:
        delete_files(stale)
    return account


def delete_files(paths: Sequence[str]) -> None:
    """Delete files, and folders with what is in them, at addresses of any kind."""
    remote = [path for path in paths if "://" in path]
    if remote:
        FileSystems.delete(remote)
    for path in set(paths) - set(remote):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
