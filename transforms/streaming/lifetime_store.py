"""What live state keeps of events that only windows without a beginning still hold: no more than a few rows per key.

- Counts, sums and extremes: one row per key, the summary that batch keeps of a past (`lifetime.summarise`).  Its sums are
  integers and its extremes commute, so a late event enters it as any other, and the order of entering changes no bit.
- `first`, `last` and `Latest`: the events themselves that can be first or last (`middles.firsts_and_lasts`), with all that
  ties are broken by; one that is kept for nothing is harmless.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import polars as pl

from schemas.feature_groups import group_key, without_columns
from schemas.features import ORDERED, Latest, Trailing
from schemas.views import FeatureView
from transforms.features.kernel import KernelTables, computing
from transforms.features.lifetime_summaries import Summary, merge, summarise
from transforms.features.long_windows import firsts_and_lasts
from transforms.records.row_hashing import UInt64s
from transforms.records.times import ALWAYS
from transforms.streaming.pane_store import SLOTS, IndexedRows, Piece

# How events are kept that have left the panes: not at all (bounded windows), as a summary, or those first and last.
Kind = Literal["none", "summary", "rows"]


def by_kind(feature: Trailing | Latest) -> Iterator[tuple[Kind, Trailing | Latest]]:
    """The feature's columns by how the events of their windows are kept."""
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
    """Events of one group (features of one source, key and condition, of one kind) after they left the panes.

    Parts of growing size, merged like the levels of a log-structured tree, so that taking a few rows in touches few others.

    Args:
        view: whose columns of the source are there.
        features: of the group.
        kind: "summary" or "rows".
        cell: in which cell of the state it is written (see `panes.take_changes`), and its number among others there.
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
        self.changes: dict[int, list[Piece] | None] = {}

    def __len__(self) -> int:
        return sum(len(part.frame) for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def reduced(self, events: pl.DataFrame) -> pl.DataFrame:
        """What is kept of some events."""
        events = events.select(self.columns).drop_nulls(self.keys)
        with computing(f"where of {self.name!r}"):
            events = events if self.where is None else events.filter(self.where)
        return summarise(self.features, events) if self.kind == "summary" else firsts_and_lasts(self.features, events)

    def add(self, reduced: pl.DataFrame) -> None:
        """Take in what was kept of events that were not here before."""
        if not len(reduced):
            return
        self._append(reduced)
        if (changes := self.changes.setdefault(self.position % SLOTS, [])) is not None:
            changes.append((self.position, reduced))

    def restore(self, _: int, reduced: pl.DataFrame) -> None:
        """As `add`, of what a cell has."""
        if len(reduced):
            self._append(reduced)

    def slot(self, slot: int) -> list[Piece]:
        """All that cell `slot` holds, with the number it goes by: the largest part as it is, and the others as one."""
        if not self.parts or self.position % SLOTS != slot:
            return []
        return [(self.position, self._joined(some)) for some in (self.parts[:1], self.parts[1:]) if some]

    def whole(self) -> pl.DataFrame:
        return self._joined(self.parts)

    def tables(self, hashes: UInt64s, events: pl.DataFrame) -> KernelTables:
        """A kernel's tables for keys that hash to `hashes`, from here and from their `events` in the panes."""
        wanted = pl.Series(hashes).unique().sort().to_numpy()
        found = [part.frame[rows] for part in self.parts if len(rows := part.find(self.keys, wanted))]
        kept = self._one(found)
        if self.kind == "summary":
            return KernelTables({self.source.name: events}, {self.history: Summary(kept, ALWAYS)})
        return KernelTables({self.source.name: pl.concat([events, kept])})

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
            return merge(pl.concat(frames[:-1], how="diagonal"), frames[-1], self.keys)
        return firsts_and_lasts(self.features, pl.concat(frames))
