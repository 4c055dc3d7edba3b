"""Groups: the features of a view that read one source by one key.  A shard computes them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence, Set

import polars as pl

from schemas.errors import DefinitionError
from schemas.expressions import columns_of, dtype_of
from schemas.feature_groups import GroupKey, column_names, group_key, window_lengths
from schemas.features import Derived, Latest, Lookup, Trailing
from schemas.views import FeatureView
from transforms.features.kernel import lookup_columns, with_derived
from transforms.features.packed_events import PackedRows
from transforms.streaming.lifetime_store import Kind, by_kind


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """The features that read one source by one key.

    Args:
        source: name of the source.
        keys: pairs of a column of the spine and a column of the source.
        features: Trailing and Latest.
        reach: the longest bounded window, µs; 0 for lifetime windows.
        kind: what is kept of evicted events: "none" for bounded windows.  The features of a group of another kind have
            the same condition.
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


def shard_groups(view: FeatureView) -> tuple[Group, ...]:
    """The view's groups.

    Raises:
        DefinitionError: a key needs events.
    """
    found: dict[tuple[GroupKey, Kind], list[Trailing | Latest]] = {}
    for feature in view.features:
        if isinstance(feature, Trailing | Latest):
            for kind, part in by_kind(feature):
                key = group_key(part)
                # Features of bounded windows share the same stored events, whatever their conditions.
                key = dataclasses.replace(key, where=None) if kind == "none" else key
                found.setdefault((key, kind), []).append(part)
    GroupKeys.of(view)
    return tuple(
        Group(key.source, key.keys, tuple(features), max(_lengths(features)), kind)
        for (key, kind), features in found.items()
    )


def _lengths(features: Sequence[Trailing | Latest]) -> list[int]:
    return [length or 0 for feature in features for length in window_lengths(feature)]


@dataclasses.dataclass(frozen=True, eq=False)
class GroupKeys:
    """How the keys of a view's groups are computed from its spine rows.

    Args:
        view: the view.
        steps: the features that compute keys, or columns from which keys are computed, in order.  A Derived has only
            these columns.
    """

    view: FeatureView
    steps: tuple[Derived | Lookup, ...]

    @classmethod
    def of(cls, view: FeatureView) -> GroupKeys:
        """
        Raises:
            DefinitionError: a key needs events.
        """
        read: dict[str, Sequence[str]] = dict.fromkeys(view.spine.schema, ())
        known, wanted = set(read), list[str]()
        for feature in view.features:
            if isinstance(feature, Trailing | Latest):
                for name, _ in feature.keys:
                    if name not in known:
                        raise DefinitionError(
                            f"View {view.name!r}, live: keys must be columns of the spine, of a Lookup, or Derived "
                            "from those alone",
                            f"{name!r}, by which {feature.source.name!r} is read, is not",
                            "Put the column into the spine, under a name of its own, or compute this view in batch",
                        )
                    wanted.append(name)
                continue
            made = _read_by(feature)
            hidden = {name for name in made if name in read and not _same_values(view, feature, name)}
            known = (known | {name for name, some in made.items() if known.issuperset(some)}) - hidden
            read = {**made, **read}
        needed = set[str]()
        while wanted:
            name = wanted.pop()
            if name not in needed:
                needed.add(name)
                wanted += read[name]
        return cls(view, tuple(_steps(view, needed - view.spine.schema.keys())))

    @property
    def dimensions(self) -> tuple[str, ...]:
        """The dimensions that contain keys: a spine row is looked up in them before it is routed."""
        return tuple(dict.fromkeys(each.source.name for each in self.steps if isinstance(each, Lookup)))

    def added_to(self, spine_rows: pl.DataFrame, dimensions: Mapping[str, PackedRows]) -> pl.DataFrame:
        """Spine rows with the columns that are keys.

        Args:
            spine_rows: the spine's columns.
            dimensions: by name; at least `self.dimensions`.
        """
        for step in self.steps:
            if isinstance(step, Derived):
                spine_rows = with_derived(self.view, step, spine_rows)
            else:
                spine_rows = spine_rows.with_columns(lookup_columns(step, spine_rows, dimensions[step.source.name]))
        return spine_rows


def _read_by(feature: Derived | Lookup) -> dict[str, Sequence[str]]:
    """The columns of a feature, each with the columns from which it is computed."""
    if isinstance(feature, Derived):
        return {name: columns_of(expr) for name, expr in feature.columns.items()}
    keys = tuple(spine for spine, _ in feature.keys)
    return dict.fromkeys(column_names(feature), keys)


def _same_values(view: FeatureView, feature: Derived | Lookup, name: str) -> bool:
    """Whether a Derived column that hides a column of the spine from the features below it has the same values."""
    assert isinstance(feature, Derived)
    before, after = view.spine.schema[name], dtype_of(feature.columns[name], view.spine.schema, name)
    if before.is_integer():
        return before != pl.UInt64 and after in (before, pl.Int64)
    return before == after == view.columns[name]


def _steps(view: FeatureView, names: Set[str]) -> Iterator[Derived | Lookup]:
    """The features that compute these columns, in order; a Derived is reduced to these columns."""
    for feature in view.features:
        if isinstance(feature, Derived):
            if some := {name: expr for name, expr in feature.columns.items() if name in names}:
                yield Derived(**some)
        elif isinstance(feature, Lookup) and not names.isdisjoint(column_names(feature)):
            yield feature
