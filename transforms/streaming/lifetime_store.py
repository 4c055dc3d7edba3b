"""Compacted live state of old events that only lifetime windows still contain: at most a few rows per key.

- Counts, sums and extremes need one row per key, the summary of the batch engine (`lifetime_summaries.summarise`).  Its
  sums are integers and its extremes commute.  So a late event is added like any other, and the order changes no bit.
- `first`, `last` and `Latest` need the events that can be first or last (`long_windows.firsts_and_lasts`), with the
  columns that break ties.  An event that is stored without need changes no value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import polars as pl

from schemas.feature_groups import group_key, without_columns
from schemas.features import ORDERED, Latest, Trailing
from schemas.views import FeatureView
from transforms.features.kernel import KernelTables, computing
from transforms.features.lifetime_summaries import Summary, merge_summaries, summarise
from transforms.features.long_windows import firsts_and_lasts
from transforms.features.packed_events import IndexedRows, PackedEvents
from transforms.records.arrays import UInt64s
from transforms.records.times import ALWAYS
from transforms.streaming.time_buckets import SLOTS, Change, Piece

# How events are stored after their eviction: not at all (bounded windows), as a summary, or the first and last of them.
Kind = Literal["none", "summary", "rows"]


def by_kind(feature: Trailing | Latest) -> Iterator[tuple[Kind, Trailing | Latest]]:
    """The feature's columns by how the events of their windows are stored."""
    if isinstance(feature, Latest):
        yield ("rows" if feature.length is None else "none"), feature
        return
    kinds: dict[str, Kind] = {
        each.name: "none" if each.length is not None else "rows" if each.stat in ORDERED else "summary"
        for each in feature.statistics
    }
    for kind in dict.fromkeys(kinds.values()):
        others = [name for name, of in kinds.items() if of != kind]
        yield from ((kind, part) for part in without_columns([feature], others))  # type: ignore[misc]


class LifetimeStore:
    """Evicted events of one group: of the features of one source, key, condition and kind.

    They are in parts of increasing size, which are merged like the levels of a log-structured merge tree, so that an
    addition rewrites few rows.

    Args:
        view: the view; it decides the columns.
        features: the features of the group.
        kind: "summary" or "rows".
        slot: number of the group; modulo `SLOTS`, the slot of its state.
    """

    def __init__(self, view: FeatureView, features: Sequence[Trailing | Latest], kind: Kind, slot: int) -> None:
        first = features[0]
        self.source, self.where, self.name = first.source, first.condition, first.name
        self.features, self.kind, self.position = features, kind, slot
        self.keys = tuple(column for _, column in first.keys)
        self.columns = view.columns_held(first.source.name)
        self.history = group_key(first).history
        self.nothing = self.reduced(pl.DataFrame(schema={name: self.source.schema[name] for name in self.columns}))
        self.parts: list[IndexedRows] = []
        self._changes: list[Change] = []

    def __len__(self) -> int:
        return sum(len(part.frame) for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def reduced(self, events: pl.DataFrame) -> pl.DataFrame:
        """The compacted form of some events."""
        events = events.select(self.columns).drop_nulls(self.keys)
        with computing(f"where of {self.name!r}"):
            events = events if self.where is None else events.filter(self.where)
        return summarise(self.features, events) if self.kind == "summary" else firsts_and_lasts(self.features, events)

    def add(self, reduced: pl.DataFrame) -> None:
        """Adds the compacted form of new events."""
        if not len(reduced):
            return
        self._append(reduced)
        self._changes.append(Change(self.position, reduced))

    def take_changes(self) -> list[Change]:
        """Returns and clears the changes."""
        changes, self._changes = self._changes, []
        return changes

    def restore(self, _: int, reduced: pl.DataFrame) -> None:
        """Adds rows from a slot."""
        if len(reduced):
            self._append(reduced)

    def slot(self, slot: int) -> list[Piece]:
        """The rows of a slot, with the group's number: the largest part unchanged, and the others as one."""
        if not self.parts or self.position % SLOTS != slot:
            return []
        return [(self.position, self._joined(some)) for some in (self.parts[:1], self.parts[1:]) if some]

    def whole(self) -> pl.DataFrame:
        return self._joined(self.parts)

    def tables(self, hashes: UInt64s, events: PackedEvents) -> KernelTables:
        """The kernel's tables for the keys with `hashes`: the compacted events, and the `events` that are not evicted
        yet."""
        if self.kind == "rows":
            packed = dataclasses.replace(events, parts=[*events.parts, *self.parts])
            return KernelTables({}, packed={self.source.name: packed})
        wanted = np.unique(hashes)
        kept = self._one([part.frame[rows] for part in self.parts if len(rows := part.find_hashes(self.keys, wanted))])
        return KernelTables({}, {self.history: Summary(kept, ALWAYS)}, packed={self.source.name: events})

    def _append(self, reduced: pl.DataFrame) -> None:
        while self.parts and len(self.parts[-1].frame) <= 2 * len(reduced):
            reduced = self._one([self.parts.pop().frame, reduced])
        self.parts.append(IndexedRows(reduced, ALWAYS))

    def _joined(self, parts: Sequence[IndexedRows]) -> pl.DataFrame:
        return self._one([part.frame for part in parts])

    def _one(self, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
        if not frames:
            return self.nothing
        if len(frames) == 1:
            return frames[0]
        if self.kind == "summary":
            return merge_summaries(pl.concat(frames[:-1], how="diagonal"), frames[-1], self.keys)
        return firsts_and_lasts(self.features, pl.concat(frames))
