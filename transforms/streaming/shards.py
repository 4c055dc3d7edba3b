"""Shards: each holds the events of some keys and computes the features of their spine rows.

A spine row meets all events of its keys in the shard of these keys, where the kernel of the batch engine computes the
features.  `assemble` joins the features of a spine row's groups.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence

import polars as pl

from schemas.views import FeatureView
from transforms.features.kernel import FOUND_BY_KEY, KernelTables, compute, feature_columns
from transforms.features.packed_events import PackedRows
from transforms.features.window_bounds import is_sorted
from transforms.records.arrays import Bools
from transforms.records.columns import moments_of
from transforms.records.row_hashing import key_hashes, keys_hashes
from transforms.records.times import ALWAYS
from transforms.streaming.fates import WindowReach
from transforms.streaming.groups import Group, shard_groups
from transforms.streaming.lifetime_store import LifetimeStore
from transforms.streaming.routing import shard_of
from transforms.streaming.row_origin import RID
from transforms.streaming.step_messages import ShardFeatures, ShardInput
from transforms.streaming.time_buckets import MINUTE, SLOTS, Store, TimeBuckets, size_of


class Shard:
    """The events of one shard's keys, and the features that are computed from them.  Inputs are applied in order.

    Args:
        view: the view.
        number: number of the shard.
        shards: number of all shards.
    """

    def __init__(self, view: FeatureView, number: int, shards: int) -> None:
        self.view, self.number, self.shards = view, number, shards
        self.groups = shard_groups(view)
        self.buckets = {
            name: TimeBuckets(
                str(source.time),
                max(WindowReach.of([view], name).held_back(2 * view.reach(name)) // (SLOTS - 2), MINUTE),
                {group.source_columns for group in self.groups if group.source == name},
            )
            for name, source in view.events.items()
        }
        self.nothing = {name: _nothing(view, name) for name in view.events}
        # Groups of bounded windows are computed together if the same rows have their keys here.
        self._together = _computed_together(self.groups, shards)
        self.compacted = {
            i: LifetimeStore(view, group.features, group.kind, i)
            for i, group in enumerate(self.groups)
            if group.kind != "none"
        }

    @property
    def stores(self) -> dict[str, Store]:
        return {**self.buckets, **{f"compacted {i}": store for i, store in self.compacted.items()}}

    def apply(self, given: ShardInput) -> ShardFeatures | None:
        """Adds a turn's events, computes the features of its spine rows, and evicts what no window can reach.

        Returns:
            The features; None if the turn has no spine rows for this shard.
        """
        tables, features = given.tables, None
        for name, store in self.buckets.items():
            if name in tables.replaced:
                store.drop(RID, tables.replaced[name].to_numpy())
            if name in tables.rows:
                store.add(tables.rows[name])
            if name in tables.old:
                self._compact(name, [tables.old[name]])
        for i, compacted in self.compacted.items():
            if i in tables.compacted:
                compacted.add(tables.compacted[i])
        if tables.spine_rows is not None:
            columns = self.compute_features(tables.spine_rows)
            features = ShardFeatures(given.turn, self.number, size_of(self.stores.values()), columns, given.view)
        for name, store in self.buckets.items():
            if left := store.evict(given.horizon - given.held[name]):
                self._compact(name, left)
        return features

    def _compact(self, source: str, frames: Sequence[pl.DataFrame]) -> None:
        """Compacts events that the windows of all later spine rows contain, to what lifetime windows need of them."""
        groups = {i: self.groups[i] for i in self.compacted if self.groups[i].source == source}
        if groups:
            rows = pl.concat(frames)
            for i, group in groups.items():
                compacted = self.compacted[i]
                mine = shard_of(key_hashes(rows, group.source_columns), self.shards) == self.number
                compacted.add(compacted.reduced(rows if mine.all() else rows.filter(pl.Series(mine))))

    def compute_features(self, spine_rows: pl.DataFrame) -> dict[int, pl.DataFrame]:
        """For each number of a group, its features of the spine rows with keys of this shard, and their
        `__position`."""
        owners: dict[tuple[str, ...], Bools] = {}
        if self.shards > 1:
            hashes = keys_hashes(spine_rows, (group.spine_columns for group in self.groups))
            owners = {key: shard_of(some, self.shards) == self.number for key, some in hashes.items()}
        result = {}
        for numbers in self._together:
            group = self.groups[numbers[0]]
            mine = owners.get(group.spine_columns)
            if mine is not None and not mine.any():
                continue
            some = spine_rows if mine is None or mine.all() else spine_rows.filter(pl.Series(mine))
            features = [feature for number in numbers for feature in self.groups[number].features]
            made = {each.name: each for each in feature_columns(self.view, features, some, self._tables(numbers, some))}
            for number in numbers:
                columns = [made[name] for name in self.groups[number].names]
                result[number] = pl.DataFrame([some["__position"], *columns])
        return result

    def _tables(self, numbers: Sequence[int], spine_rows: pl.DataFrame) -> KernelTables:
        """The kernel's tables for the features of groups that are computed together."""
        moments = moments_of(spine_rows, self.view.time)
        low, high = int(moments.min()), int(moments.max())
        reach = dict[str, int]()
        for group in map(self.groups.__getitem__, numbers):
            reach[group.source] = max(reach.get(group.source, 0), group.reach if group.kind == "none" else low - ALWAYS)
        packed = {}
        for name, length in reach.items():
            buckets, span = self.buckets[name], (low - length, high)
            parts = buckets.few_parts(*span) if len(spine_rows) <= FOUND_BY_KEY else list(buckets.parts(*span))
            packed[name] = PackedRows(parts, self.nothing[name])
        first = self.groups[numbers[0]]
        if first.kind == "none":
            return KernelTables({}, packed=packed)
        return self.compacted[numbers[0]].tables(key_hashes(spine_rows, first.spine_columns), packed[first.source])


def _computed_together(groups: Sequence[Group], shards: int) -> list[list[int]]:
    """Numbers of groups by what one call of the kernel computes."""
    together: dict[Hashable, list[int]] = {}
    for number, group in enumerate(groups):
        key = number if group.kind != "none" else "all" if shards == 1 else group.spine_columns
        together.setdefault(key, []).append(number)
    return list(together.values())


def _nothing(view: FeatureView, source: str) -> pl.DataFrame:
    schema = view.sources[source].schema
    return pl.DataFrame(schema={name: schema[name] for name in view.columns_held(source)})


def assemble(
    view: FeatureView,
    groups: Sequence[Group],
    spine_rows: pl.DataFrame,
    parts: Sequence[ShardFeatures],
    dimensions: Mapping[str, PackedRows],
) -> pl.DataFrame:
    """All features of a turn's spine rows from what the shards computed, as `kernel.compute` returns them."""
    by_group: dict[int, list[pl.DataFrame]] = {}
    for part in parts:
        for group, some in part.columns.items():
            by_group.setdefault(group, []).append(some)
    columns: dict[str, pl.Series] = {}
    for frames in by_group.values():
        whole = frames[0] if len(frames) == 1 else pl.concat(frames)
        if not is_sorted(whole["__position"].to_numpy()):
            whole = whole.sort("__position")
        if len(whole) != len(spine_rows):
            raise AssertionError(f"{len(whole)} rows of features for {len(spine_rows)} spine rows")
        columns.update({name: whole[name] for name in whole.columns if name != "__position"})
    return compute(view, spine_rows, KernelTables({}, columns=columns, packed=dimensions))


def versions_text(versions: Mapping[str, str]) -> str:
    """The versions of dimensions, by name, as JSON."""
    return json.dumps(dict(sorted(versions.items())), separators=(",", ":"))
