"""A shard holds the events of its keys and answers the questions about them; the parts of an answer are put together again.

Features that read one source by one key make a group.  Events and questions go to the shard that the hash of their
group's key names, so every question meets all events of its keys in one place, and the kernel of the batch pipeline does
the rest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

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
from transforms.records.frame_packets import Frames, pack, unpack
from transforms.records.row_hashing import UInt64s
from transforms.records.times import ALWAYS
from transforms.streaming.lifetime_store import Kind, LifetimeStore, by_kind
from transforms.streaming.pane_store import SLOTS, Store, TimeBuckets, key_hashes, size_of

Bools = npt.NDArray[np.bool_]
RID = "__rid"
MINUTE = 60_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Features over one source by one key.

    Args:
        source: the source's name.
        keys: (column of the spine, column of the source).
        features: Trailing and Latest.
        reach: longest look-back, µs; of all history for any other `kind` than "none".
        kind: what is kept of events that have left the panes; if anything, the features have one condition.
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
        DefinitionError: a key that is known only once other sources were read.
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
    """How long shards hold each event of a source as it is, µs: until it is so much older than any question that may come.

    An event that is compacted cannot be taken back, so it waits until no repeat of it is looked for any more.
    """
    return view.reach(source) * (2 if source in lifetime_sources(view) and repeats_by(view, source) else 1)


def _lengths(features: Sequence[Trailing | Latest]) -> list[int]:
    return [length or 0 for feature in features for length in window_lengths(feature)]


def _early(view: FeatureView) -> list[tuple[str, Derived]]:
    """Derived columns that need nothing but the spine, in order."""
    known, result = set(view.spine.schema), []
    for feature in view.features:
        if isinstance(feature, Derived):
            ready = {name for name, expr in feature.columns.items() if set(columns_of(expr)) <= known}
            result += [(name, Derived(**{name: feature.columns[name]})) for name in feature.columns if name in ready]
            known |= ready
    return result


def with_group_keys(view: FeatureView, groups: Sequence[Group], spine_rows: pl.DataFrame) -> pl.DataFrame:
    """Questions with those derived columns by which groups are keyed."""
    wanted = {name for group in groups for name in group.spine_columns} - set(view.spine.schema)
    if not wanted:
        return spine_rows
    for _, feature in _early(view):
        spine_rows = with_derived(view, feature, spine_rows)
    return spine_rows


def shard_of(hashes: UInt64s, shards: int) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(33)).astype(np.int64) % shards


def route_events(groups: Sequence[Group], source: str, rows: pl.DataFrame, shards: int) -> list[Bools]:
    """Per shard which of the source's rows it needs: those with a key of its own, in any group."""
    wanted = [np.zeros(len(rows), np.bool_) for _ in range(shards)]
    for keys in {group.source_columns for group in groups if group.source == source}:
        owner = shard_of(key_hashes(rows, keys), shards)
        nulls = rows.select(pl.any_horizontal(pl.col(name).is_null() for name in keys)).to_series().to_numpy()
        owner = np.where(nulls, -1, owner)  # a null key matches nothing
        for number in range(shards):
            wanted[number] |= owner == number
    return wanted


def route_compacted(group: Group, reduced: pl.DataFrame, shards: int) -> list[Bools]:
    """Per shard which rows of what is kept of a group's older events are of its keys."""
    owner = shard_of(key_hashes(reduced, group.source_columns), shards)
    return [owner == number for number in range(shards)]


def route_spine_rows(groups: Sequence[Group], spine_rows: pl.DataFrame, shards: int) -> list[Bools]:
    """Per shard which questions have a group it answers."""
    wanted = [np.zeros(len(spine_rows), np.bool_) for _ in range(shards)]
    for keys in {group.spine_columns for group in groups}:
        owner = shard_of(key_hashes(spine_rows, keys), shards)
        for number in range(shards):
            wanted[number] |= owner == number
    return wanted


class Shard:
    """What one shard knows, and its answers.  Turns are to be applied in order."""

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

    def apply(self, head: Mapping[str, Any], frames: Frames) -> bytes | None:
        """Take a turn's events in, answer its questions, forget what no window can reach any more."""
        for name, store in self.buckets.items():
            if f"retract:{name}" in frames:
                store.drop(RID, frames[f"retract:{name}"][RID].to_numpy())
            if f"rows:{name}" in frames:
                store.add(frames[f"rows:{name}"])
            if f"old:{name}" in frames:
                self._compact(name, [frames[f"old:{name}"]])
        for i, compacted in self.compacted.items():
            if f"compacted:{i}" in frames:
                compacted.add(frames[f"compacted:{i}"])
        envelope = None
        if "questions" in frames:
            parts = self.compute_features(frames["questions"])
            head_out = {"turn": head["turn"], "shard": self.number, "state": size_of(self.stores)}
            envelope = pack(head_out, {str(i): part for i, part in parts.items()})
        for name, store in self.buckets.items():
            if left := store.evict(head["horizon"] - self.held_back[name]):
                self._compact(name, left)
        return envelope

    def _compact(self, source: str, frames: Sequence[pl.DataFrame]) -> None:
        """Keep what windows without a beginning need of events that every question still to come may see."""
        groups = {i: self.groups[i] for i in self.compacted if self.groups[i].source == source}
        if groups:
            rows = pl.concat(frames)
            for i, group in groups.items():
                compacted = self.compacted[i]
                mine = shard_of(key_hashes(rows, group.source_columns), self.shards) == self.number
                compacted.add(compacted.reduced(rows if mine.all() else rows.filter(pl.Series(mine))))

    def compute_features(self, spine_rows: pl.DataFrame) -> dict[int, pl.DataFrame]:
        """Per group, the columns of the questions whose key is this shard's, with their `__position`."""
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
    answers: Sequence[bytes],
    dimensions: Mapping[str, pl.DataFrame],
) -> pl.DataFrame:
    """All features of a turn's questions from the shards' parts: context and features, as `kernels.compute` gives."""
    parts: dict[str, list[pl.DataFrame]] = {}
    for answer in answers:
        for name, part in unpack(answer)[1].items():
            parts.setdefault(name, []).append(part)
    columns: dict[str, pl.Series] = {}
    for some in parts.values():
        whole = (pl.concat(some) if len(some) > 1 else some[0]).sort("__position")
        if len(whole) != len(spine_rows):
            raise AssertionError(f"{len(whole)} answers to {len(spine_rows)} questions")
        columns.update({name: whole[name] for name in whole.columns if name != "__position"})
    return compute(view, spine_rows, KernelTables(dimensions, columns=columns))


def versions_text(versions: Mapping[str, str]) -> str:
    return json.dumps(dict(sorted(versions.items())), separators=(",", ":"))
