"""Blocks whose windows reach more events than fit in memory: events are partitioned by the hash of each group's key.

Events are streamed once and written to disk by group (source, key and condition) and by the hash of the key. Then one
partition of one group is read at a time, and the kernel computes the features of the spine rows with its keys. All events of
a key are in one partition, so the result does not change. A key with most of the rows cannot be split by its hash; the
summaries of `long_windows` bound that case.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from schemas.expressions import canonical, columns_of
from schemas.features import ORDERED, Latest, Lookup, Trailing
from schemas.views import FeatureView
from transforms.features.block_inputs import BlockInput, deduplicate_events, label
from transforms.features.kernel import Reading, computing, gathered
from transforms.features.lifetime_summaries import Summary, summary_name
from transforms.features.long_windows import WindowPart, position, split_windows
from transforms.features.plan import Block, FeaturePlan
from transforms.records.disk_partitions import DiskPartitions, partition_of, positions_by_partition
from transforms.sources.dead_letters import SOURCE_DEAD_LETTERS, concat_dead_letters
from transforms.sources.reader import CHUNK_ROWS, Read
from transforms.sources.tallies import SourceTally

log = logging.getLogger("millrace.features")

Identity = tuple[str, tuple[tuple[str, str], ...], str | None]
Events = Trailing | Latest


def identity(feature: Reading) -> Identity:
    """Features of one identity share a history."""
    return feature.source.name, feature.keys, None if feature.where is None else canonical(feature.where)


def event_groups(features: Iterable[object]) -> dict[Identity, list[Events]]:
    """Trailing and Latest features by source, key and condition."""
    groups: dict[Identity, list[Events]] = {}
    for feature in features:
        if isinstance(feature, Trailing | Latest):
            groups.setdefault(identity(feature), []).append(feature)
    return groups


class KeyedEvents:
    """A block's events on local disk, from which `gather` computes features.

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

    def add(self, name: str, read: Read) -> None:
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
        self._settle(name, Read(clear, read.dead_letters, read.digests))

    def settled(self) -> dict[str, BlockInput]:
        """Returns the dead letters and tallies of all added rows. The rows themselves are on disk."""
        for name, suspects in self.suspects.items():
            for part in range(suspects.parts):
                rows = list(suspects.read(part, CHUNK_ROWS))
                if rows:
                    self._settle(name, Read(pl.concat(rows), pl.DataFrame(schema=SOURCE_DEAD_LETTERS)))
        return self.inputs

    def _settle(self, name: str, read: Read) -> None:
        settled, before = deduplicate_events(self.view, self.plan, self.block, name, read), self.inputs[name]
        for (source, *_), group in self.groups.items():
            if source == name:
                group.add(settled.frame)
        dead_letters = (
            concat_dead_letters([before.dead_letters, settled.dead_letters])
            if len(settled.dead_letters)
            else before.dead_letters
        )
        self.inputs[name] = BlockInput(before.frame, dead_letters, before.tally + settled.tally)

    def carry(self, name: str, summary: pl.DataFrame) -> None:
        """Rows of the summary of all that came before the block, of the name by which a kernel looks for it."""
        for group in self.groups.values():
            if group.summary_name == name:
                group.carry(summary)

    def gather(
        self, view: FeatureView, features: Sequence[Reading], frame: pl.DataFrame, tables: Mapping[str, Any]
    ) -> list[pl.Series]:
        """As `kernel.gathered`, one partition of one group at a time."""
        lookups = [feature for feature in features if isinstance(feature, Lookup)]
        columns = gathered(view, lookups, frame, tables)
        for name, group in event_groups(features).items():
            columns += self.groups[name].compute_features(group, frame)
        return columns


class GroupEvents:
    """The events of one group, partitioned by the hash of its key."""

    def __init__(
        self, view: FeatureView, plan: FeaturePlan, block: Block, features: Sequence[Events], folder: str
    ) -> None:
        first, self.view, self.block, self.folder = features[0], view, block, folder
        self.source, self.keys, self.where = first.source, first.keys, first.condition
        self.known, self.asked = tuple(right for _, right in self.keys), tuple(left for left, _ in self.keys)
        self.columns = _columns(features, plan.contracts[self.source.name].read)
        self.name = first.name if self.where is not None else self.source.name
        self.summary_name = summary_name(*identity(first))
        self.parts = block.shards[self.source.name]
        self.spill = DiskPartitions(folder, self.known, self.parts)
        self.summaries: DiskPartitions | None = None
        lengths = [length for feature in features for length in _lengths(feature)]
        self.since = min(block.start - (length or 0) for length in lengths)

    def add(self, events: pl.DataFrame) -> None:
        rows = events.filter(position(self.source) >= self.since)
        if self.where is not None:
            with computing(f"where of {self.name!r}"):
                rows = rows.filter(self.where)
        self.spill.add(rows.select(self.columns).drop_nulls(self.known))

    def carry(self, summary: pl.DataFrame) -> None:
        if self.summaries is None:
            self.summaries = DiskPartitions(self.folder, self.known, self.parts)
            self._empty = summary.clear()
        self.summaries.add(summary)

    def compute_features(self, features: Sequence[Events], frame: pl.DataFrame) -> list[pl.Series]:
        """Columns of `features` in the order of the `frame`'s rows."""
        asked = frame.select(list(dict.fromkeys([*self.asked, self.view.time])))
        moments = asked[self.view.time].to_physical()
        span = (int(moments.min()), int(moments.max()) + 1) if len(frame) else (0, 0)  # type: ignore[arg-type]
        made: dict[str, list[pl.Series]] = {}
        order = []
        for part, positions in enumerate(
            positions_by_partition(partition_of(asked, self.asked, self.parts), self.parts)
        ):
            # A part of its own for no questions would have no types: one is answered in any case.
            if not len(positions) and (len(frame) or part):
                continue
            order.append(positions)
            for column in self._compute_features(features, asked[positions], part, span):
                made.setdefault(column.name, []).append(column)
        back = np.argsort(np.concatenate(order), kind="stable")
        return [pl.concat(columns)[back] if len(order) > 1 else columns[0] for columns in made.values()]

    def _compute_features(
        self, features: Sequence[Events], asked: pl.DataFrame, part: int, span: tuple[int, int]
    ) -> list[pl.Series]:
        columns = []
        for task in split_windows(features, span, self.block.start):
            events, interior = task.events(self._read(part), self._none)
            tables: dict[str, Any] = {self.source.name: events}
            if interior is not None:
                tables[self.summary_name] = interior
            elif self.summaries is not None:
                rows = pl.concat([self._empty, *self.summaries.read(part, CHUNK_ROWS)])
                tables[self.summary_name] = Summary(rows, self.block.start)
            self._tell(task, len(events))
            columns += gathered(self.view, task.features, asked, tables)
        return columns

    @property
    def _none(self) -> pl.DataFrame:
        return pl.DataFrame(schema={name: self.source.schema[name] for name in self.columns})

    def _read(self, part: int) -> Iterable[pl.DataFrame]:
        return self.spill.read(part, CHUNK_ROWS)

    def _tell(self, task: WindowPart, rows: int) -> None:
        if rows > 4 * self.block.part_rows:
            log.warning(
                "%s by %s: %s rows of one key, or a few, are held at once; %s",
                self.name,
                ", ".join(self.known),
                f"{rows:,}",
                "a median, quantile or n_unique over a window longer than a block needs them"
                if task.length is None
                else "a smaller --block_rows holds less",
            )


def _lengths(feature: Events) -> list[int | None]:
    return [each.length for each in feature.statistics] if isinstance(feature, Trailing) else [feature.length]


def _columns(features: Sequence[Events], read: Sequence[str]) -> list[str]:
    """Columns of the events that the features need, in the order in which they are read."""
    first = features[0]
    wanted = {right for _, right in first.keys} | {str(first.source.time), first.source.event_time or ""}
    wanted |= set() if first.where is None else set(columns_of(first.where))
    for feature in features:
        if isinstance(feature, Latest) or any(each.stat in ORDERED for each in feature.statistics):
            return list(read)  # which put rows of one moment in order
        wanted |= {each.column for each in feature.statistics}
    return [name for name in read if name in wanted]


def _identifying(view: FeatureView, plan: FeaturePlan, name: str) -> tuple[str, ...]:
    """Columns that rows have in common of which one is kept."""
    contract = plan.contracts[name]
    return (view.time, *view.key) if contract is plan.spine else tuple(contract.source.unique or ())


def _nothing(plan: FeaturePlan, name: str) -> pl.DataFrame:
    contract = plan.contracts[name]
    return pl.DataFrame(schema={column: contract.source.schema[column] for column in contract.read})
