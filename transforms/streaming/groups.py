"""Groups: the features of a view that read one source by one key.  A shard computes them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import polars as pl

from schemas.errors import DefinitionError
from schemas.expressions import columns_of
from schemas.feature_groups import GroupKey, column_names, group_key, window_lengths
from schemas.features import Derived, Latest, Trailing
from schemas.live import repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.features.kernel import with_derived
from transforms.streaming.lifetime_store import Kind, by_kind


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The features that read one source by one key.

    Args:
        source: name of the source.
        keys: pairs of a column of the spine and a column of the source.
        features: Trailing and Latest.
        reach: the longest bounded window, µs; 0 for lifetime windows.
        kind: what is kept of evicted events: "none" for bounded windows.  Of any other kind, the features have one
            condition.
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
