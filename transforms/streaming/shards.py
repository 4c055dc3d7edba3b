"""Shards: each holds the events of some keys and computes the features of their spine rows.

The features that read one source by one key are a group.  The hash of a group's key names the shard of its events and
spine rows.  So a spine row meets all events of its keys in one place, where the kernel of the batch engine computes the
features.  `assemble` joins the features of a spine row's groups.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.errors import DefinitionError
from schemas.expressions import columns_of
from schemas.feature_groups import GroupKey, column_names, group_key, window_lengths
from schemas.features import Derived, Latest, Trailing
from schemas.live import repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.features.kernel import KernelTables, compute, feature_columns, with_derived
from transforms.records.row_hashing import UInt64s
from transforms.records.times import ALWAYS
from transforms.streaming.lifetime_store import Kind, LifetimeStore, by_kind
from transforms.streaming.pane_store import MINUTE, SLOTS, Store, TimeBuckets, key_hashes, size_of
from transforms.streaming.row_origin import RID
from transforms.streaming.step_messages import ShardFeatures, ShardInput

Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The features that read one source by one key.

    Args:
        source: name of the source.
        keys: pairs of a column of the spine and a column of the source.
        features: Trailing and Latest.
        reach: the longest window, µs; lifetime windows, of any `kind` but "none", do not count.
        kind: what is kept of evicted events; if anything is, the features have one condition.
    """

    source: str
    keys: tuple[tuple[str, str], ...]
    features: tuple[Trailing | Latest, ...]
    reach: int
    kind: Kind = "none"

    @property
    def spine_columns(self) -> tuple[str, ...]:
        return tuple(spine for spine, _ in self.keys)

    @property
    def source_columns(self) -> tuple[str, ...]:
        return tuple(column for _, column in self.keys)

    @property
    def names(self) -> list[str]:
        """Names of its features' columns."""
        return [name for feature in self.features for name in column_names(feature)]


def groups_of(view: FeatureView) -> tuple[Group, ...]:
    """The view's groups.

    Raises:
        DefinitionError: a key comes from a source that has to be read first.
    """
    found: dict[tuple[GroupKey, Kind], list[Trailing | Latest]] = {}
    for feature in view.features:
        if isinstance(feature, Trailing | Latest):
            for kind, part in by_kind(feature):
                key = group_key(part)
                # Features of bounded windows share the same stored events, whatever their conditions.
                key = dataclasses.replace(key, where=None) if kind == "none" else key
                found.setdefault((key, kind), []).append(part)
    early = {*view.spine.schema, *(name for name, _ in _early(view))}
    for key, _ in found:
        late = [spine for spine, _ in key.keys if spine not in early]
        if late:
            raise DefinitionError(
                f"View {view.name!r}, live: keys come from the spine's columns, or are Derived from those alone",
                f"{late[0]!r}, by which {key.source!r} is read",
                "Put the column into the spine, or compute this view in batch",
            )
    return tuple(
        Group(key.source, key.keys, tuple(features), max(_lengths(features)), kind)
        for (key, kind), features in found.items()
    )


def held_back(view: FeatureView, source: str) -> int:
    """For how long (µs) before the journal's horizon shards hold the events of a source as they are.

    A compacted event cannot be retracted, so it is held until no repeat of it is looked up any more.
    """
    return view.reach(source) * (2 if source in lifetime_sources(view) and repeats_by(view, source) else 1)


def _lengths(features: Sequence[Trailing | Latest]) -> list[int]:
    return [length or 0 for feature in features for length in window_lengths(feature)]


def _early(view: FeatureView) -> list[tuple[str, Derived]]:
    """Derived columns that only read the spine, in order."""
    known, result = set(view.spine.schema), []
    for feature in view.features:
        if isinstance(feature, Derived):
            ready = {name for name, expr in feature.columns.items() if set(columns_of(expr)) <= known}
            result += [(name, Derived(**{name: feature.columns[name]})) for name in feature.columns if name in ready]
            known |= ready
    return result


def with_group_keys(view: FeatureView, groups: Sequence[Group], spine_rows: pl.DataFrame) -> pl.DataFrame:
    """Spine rows with the derived columns that are keys of groups."""
    wanted = {name for group in groups for name in group.spine_columns} - set(view.spine.schema)
    if not wanted:
        return spine_rows
    for _, feature in _early(view):
        spine_rows = with_derived(view, feature, spine_rows)
    return spine_rows


def shard_of(hashes: UInt64s, shards: int) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(33)).astype(np.int64) % shards


def route_events(groups: Sequence[Group], source: str, rows: pl.DataFrame, shards: int) -> list[Bools]:
    """By shard, which rows of a source it needs: those with a key of its own, in any group."""
    wanted = [np.zeros(len(rows), np.bool_) for _ in range(shards)]
    for keys in {group.source_columns for group in groups if group.source == source}:
        owner = shard_of(key_hashes(rows, keys), shards)
        nulls = rows.select(pl.any_horizontal(pl.col(name).is_null() for name in keys)).to_series().to_numpy()
        owner = np.where(nulls, -1, owner)  # a null key matches nothing
        for number in range(shards):
            wanted[number] |= owner == number
    return wanted


def route_compacted(group: Group, reduced: pl.DataFrame, shards: int) -> list[Bools]:
    """By shard, which compacted events of a group have a key of its own."""
    owner = shard_of(key_hashes(reduced, group.source_columns), shards)
    return [owner == number for number in range(shards)]


def route_spine_rows(groups: Sequence[Group], spine_rows: pl.DataFrame, shards: int) -> list[Bools]:
    """By shard, which spine rows have a key of its own, in any group."""
    wanted = [np.zeros(len(spine_rows), np.bool_) for _ in range(shards)]
    for keys in {group.spine_columns for group in groups}:
        owner = shard_of(key_hashes(spine_rows, keys), shards)
        for number in range(shards):
            wanted[number] |= owner == number
    return wanted


class Shard:
    """The events of one shard's keys, and the features that are computed from them.  Inputs are applied in order.

    Args:
        view: the view.
        number: of the shard.
        shards: how many there are.
    """

    def __init__(self, view: FeatureView, number: int, shards: int) -> None:
        self.view, self.number, self.shards = view, number, shards
        self.groups = groups_of(view)
        self.held_back = {name: held_back(view, name) for name in view.events}
        self.buckets = {
            name: TimeBuckets(str(source.time), max(self.held_back[name] // (SLOTS - 2), MINUTE))
            for name, source in view.events.items()
        }
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
            features = ShardFeatures(given.turn, self.number, size_of(self.stores.values()), columns)
        for name, store in self.buckets.items():
            if left := store.evict(given.horizon - self.held_back[name]):
                self._compact(name, left)
        return features

    def _compact(self, source: str, frames: Sequence[pl.DataFrame]) -> None:
        """Keeps what lifetime windows need of events that the windows of all later spine rows contain."""
        groups = {i: self.groups[i] for i in self.compacted if self.groups[i].source == source}
        if groups:
            rows = pl.concat(frames)
            for i, group in groups.items():
                compacted = self.compacted[i]
                mine = shard_of(key_hashes(rows, group.source_columns), self.shards) == self.number
                compacted.add(compacted.reduced(rows if mine.all() else rows.filter(pl.Series(mine))))

    def compute_features(self, spine_rows: pl.DataFrame) -> dict[int, pl.DataFrame]:
        """By number of a group, its features of the spine rows whose key is this shard's, with their `__position`."""
        hashes = {keys: key_hashes(spine_rows, keys) for keys in {group.spine_columns for group in self.groups}}
        result = {}
        for i, group in enumerate(self.groups):
            mine = shard_of(hashes[group.spine_columns], self.shards) == self.number
            if not mine.any():
                continue
            some = spine_rows if mine.all() else spine_rows.filter(pl.Series(mine))
            moments = some[self.view.time].to_physical()
            low, high = int(moments.min()) - group.reach, int(moments.max())  # type: ignore[arg-type]
            wanted = hashes[group.spine_columns][mine]
            found = self.buckets[group.source].take(
                group.source_columns, wanted, low if group.kind == "none" else ALWAYS, high
            )
            columns = self.view.columns_held(group.source)
            events = pl.concat(found).select(columns) if found else _nothing(self.view, group.source)
            tables = (
                KernelTables({group.source: events})
                if group.kind == "none"
                else self.compacted[i].tables(wanted, events)
            )
            made = feature_columns(self.view, group.features, some, tables)
            result[i] = some.select("__position").with_columns(made)
        return result


def _nothing(view: FeatureView, source: str) -> pl.DataFrame:
    schema = view.sources[source].schema
    return pl.DataFrame(schema={name: schema[name] for name in view.columns_held(source)})


def assemble(
    view: FeatureView,
    groups: Sequence[Group],
    spine_rows: pl.DataFrame,
    parts: Sequence[ShardFeatures],
    dimensions: Mapping[str, pl.DataFrame],
) -> pl.DataFrame:
    """All features of a turn's spine rows from what the shards computed, as `kernel.compute` returns them."""
    by_group: dict[int, list[pl.DataFrame]] = {}
    for part in parts:
        for group, some in part.columns.items():
            by_group.setdefault(group, []).append(some)
    columns: dict[str, pl.Series] = {}
    for frames in by_group.values():
        whole = (pl.concat(frames) if len(frames) > 1 else frames[0]).sort("__position")
        if len(whole) != len(spine_rows):
            raise AssertionError(f"{len(whole)} rows of features for {len(spine_rows)} spine rows")
        columns.update({name: whole[name] for name in whole.columns if name != "__position"})
    return compute(view, spine_rows, KernelTables(dimensions, columns=columns))


def versions_text(versions: Mapping[str, str]) -> str:
    """The versions of dimensions, by name, as JSON."""
    return json.dumps(dict(sorted(versions.items())), separators=(",", ":"))
