"""Blocks whose windows reach more events than fit in memory: events are partitioned by the hash of their key.

Events are read once and written to disk by group (source, keys and condition) and by the hash of the key. Then one
partition of one group is read at a time, and the kernel computes the features of the spine rows with its keys. All
events of a key are in one partition, so the values are the same. A key with most of the rows cannot be divided by its
hash: for such keys, the summaries of `long_windows` limit the number of events in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from schemas.expressions import columns_of
from schemas.feature_groups import EventFeature, HistoryKey, SourceFeature, event_groups, group_key, window_lengths
from schemas.features import ORDERED, Latest
from schemas.views import FeatureView
from transforms.features.block_inputs import BlockInput, deduplicate_events, label
from transforms.features.kernel import KernelTables, computing, feature_columns
from transforms.features.lifetime_summaries import Summary
from transforms.features.long_windows import WindowPart, position, split_windows
from transforms.features.plan import Block, FeaturePlan
from transforms.records.disk_partitions import DiskPartitions, partition_of, positions_by_partition
from transforms.sources.dead_letters import SOURCE_DEAD_LETTERS, concat_dead_letters
from transforms.sources.reader import READ_CHUNK_ROWS, SourceRows
from transforms.sources.tallies import SourceTally

log = logging.getLogger("millrace.features")


class KeyedEvents:
    """A block's events on local disk, from which its features are computed.

    Args:
        folder: where rows are written. The caller removes it.
    """

    def __init__(self, view: FeatureView, plan: FeaturePlan, block: Block, folder: str) -> None:
        self.view, self.plan, self.block = view, plan, block
        self.groups = {
            name: GroupEvents(view, plan, block, group, folder) for name, group in event_groups(view.features).items()
        }
        self.inputs = {
            name: BlockInput(_nothing(plan, name), concat_dead_letters([]), SourceTally(label(plan, name)))
            for name in block.events
        }
        self.suspects = {
            name: DiskPartitions(folder, _identifying(view, plan, name), block.shards[name]) for name in block.events
        }

    def add(self, name: str, read: SourceRows) -> None:
        """Adds events read from a source. Those that may be repeats are kept until all have been added."""
        contract, repeats = self.plan.contracts[name], self.plan.repeats.get(name)
        clear = read.frame
        if contract is self.plan.spine:
            self.suspects[name].add(clear)
            clear = clear.clear()
        elif repeats is not None and len(repeats):
            unique = list(contract.source.unique or ())
            again = clear.with_row_index("__place").join(repeats, on=unique, how="semi")["__place"]
            self.suspects[name].add(clear[again.to_numpy()])
            alone = np.ones(len(clear), np.bool_)
            alone[again.to_numpy()] = False
            clear = clear.filter(pl.Series(alone))
        self._keep(name, SourceRows(clear, read.dead_letters, read.digests, read.loaded))

    def finish(self) -> dict[str, BlockInput]:
        """Returns the dead letters and tallies of all added rows. The rows themselves are on disk."""
        for name, suspects in self.suspects.items():
            for part in range(suspects.parts):
                rows = list(suspects.read(part, READ_CHUNK_ROWS))
                if rows:
                    self._keep(name, SourceRows(pl.concat(rows), pl.DataFrame(schema=SOURCE_DEAD_LETTERS)))
        return self.inputs

    def _keep(self, name: str, read: SourceRows) -> None:
        added, before = deduplicate_events(self.view, self.plan, self.block, name, read), self.inputs[name]
        for key, group in self.groups.items():
            if key.source == name:
                group.add(added.frame)
        dead_letters = (
            concat_dead_letters([before.dead_letters, added.dead_letters])
            if len(added.dead_letters)
            else before.dead_letters
        )
        self.inputs[name] = BlockInput(before.frame, dead_letters, before.tally + added.tally)

    def add_summary(self, key: HistoryKey, rows: pl.DataFrame) -> None:
        """Adds rows of the summary of the events before the block."""
        for name, group in self.groups.items():
            if name.history == key:
                group.add_summary(rows)

    def feature_columns(self, features: Iterable[SourceFeature], frame: pl.DataFrame) -> list[pl.Series]:
        """Computes the columns of the Trailing and Latest `features`, one partition of one group at a time.

        The columns are in the order of the rows of `frame`. Lookups are left out.
        """
        return [
            column
            for key, group in event_groups(features).items()
            for column in self.groups[key].feature_columns(group, frame)
        ]


class GroupEvents:
    """The events of one group, partitioned by the hash of its key."""

    def __init__(
        self, view: FeatureView, plan: FeaturePlan, block: Block, features: Sequence[EventFeature], folder: str
    ) -> None:
        first, self.view, self.block, self.folder = features[0], view, block, folder
        self.source, self.keys, self.where = first.source, first.keys, first.condition
        self.source_columns = tuple(right for _, right in self.keys)
        self.spine_columns = tuple(left for left, _ in self.keys)
        self.columns = _columns(features, plan.contracts[self.source.name].read)
        self.name = first.name if self.where is not None else self.source.name
        self.history = group_key(first).history
        self.parts = block.shards[self.source.name]
        self.spill = DiskPartitions(folder, self.source_columns, self.parts)
        self.summaries: DiskPartitions | None = None
        lengths = [length for feature in features for length in window_lengths(feature)]
        self.earliest = min(block.start - (length or 0) for length in lengths)

    def add(self, events: pl.DataFrame) -> None:
        rows = events.filter(position(self.source) >= self.earliest)
        if self.where is not None:
            with computing(f"where of {self.name!r}"):
                rows = rows.filter(self.where)
        self.spill.add(rows.select(self.columns).drop_nulls(self.source_columns))

    def add_summary(self, summary: pl.DataFrame) -> None:
        if self.summaries is None:
            self.summaries = DiskPartitions(self.folder, self.source_columns, self.parts)
            self._empty = summary.clear()
        self.summaries.add(summary)

    def feature_columns(self, features: Sequence[EventFeature], frame: pl.DataFrame) -> list[pl.Series]:
        """Computes the columns of `features`, in the order of the rows of `frame`."""
        spine = frame.select(list(dict.fromkeys([*self.spine_columns, self.view.time])))
        moments = spine[self.view.time].to_physical()
        span = (int(moments.min()), int(moments.max()) + 1) if len(frame) else (0, 0)  # type: ignore[arg-type]
        computed: dict[str, list[pl.Series]] = {}
        order = []
        partitions = positions_by_partition(partition_of(spine, self.spine_columns, self.parts), self.parts)
        for part, positions in enumerate(partitions):
            # Without any spine row, the first partition is still computed, because it gives the columns their types.
            if not len(positions) and (len(frame) or part):
                continue
            order.append(positions)
            for column in self._partition_columns(features, spine[positions], part, span):
                computed.setdefault(column.name, []).append(column)
        back = np.argsort(np.concatenate(order), kind="stable")
        return [pl.concat(columns)[back] if len(order) > 1 else columns[0] for columns in computed.values()]

    def _partition_columns(
        self, features: Sequence[EventFeature], spine: pl.DataFrame, part: int, span: tuple[int, int]
    ) -> list[pl.Series]:
        columns = []
        for task in split_windows(features, span, self.block.start):
            events, interior = task.events(self._read(part), self._none)
            summaries = {}
            if interior is not None:
                summaries[self.history] = interior
            elif self.summaries is not None:
                rows = pl.concat([self._empty, *self.summaries.read(part, READ_CHUNK_ROWS)])
                summaries[self.history] = Summary(rows, self.block.start)
            self._warn_if_large(task, len(events))
            tables = KernelTables({self.source.name: events}, summaries)
            columns += feature_columns(self.view, task.features, spine, tables)
        return columns

    @property
    def _none(self) -> pl.DataFrame:
        return pl.DataFrame(schema={name: self.source.schema[name] for name in self.columns})

    def _read(self, part: int) -> Iterable[pl.DataFrame]:
        return self.spill.read(part, READ_CHUNK_ROWS)

    def _warn_if_large(self, task: WindowPart, rows: int) -> None:
        if rows > 4 * self.block.part_rows:
            log.warning(
                "%s by %s: %s rows of one key, or a few, are in memory at once; %s",
                self.name,
                ", ".join(self.source_columns),
                f"{rows:,}",
                "a median, quantile or n_unique over a window longer than a block needs them"
                if task.length is None
                else "a smaller --block_rows needs less memory",
            )


def _columns(features: Sequence[EventFeature], read: Sequence[str]) -> list[str]:
    """Columns of the events that the features need, in the order in which they are read."""
    first = features[0]
    wanted = {right for _, right in first.keys} | {str(first.source.time), first.source.event_time or ""}
    wanted |= set() if first.where is None else set(columns_of(first.where))
    for feature in features:
        if isinstance(feature, Latest) or any(each.stat in ORDERED for each in feature.statistics):
            return list(read)  # they order rows with the same time
        wanted |= {each.column for each in feature.statistics}
    return [name for name in read if name in wanted]


def _identifying(view: FeatureView, plan: FeaturePlan, name: str) -> tuple[str, ...]:
    """Columns that are equal in rows of which only one is kept."""
    contract = plan.contracts[name]
    return (view.time, *view.key) if contract is plan.spine else tuple(contract.source.unique or ())


def _nothing(plan: FeaturePlan, name: str) -> pl.DataFrame:
    contract = plan.contracts[name]
    return pl.DataFrame(schema={column: contract.source.schema[column] for column in contract.read})
