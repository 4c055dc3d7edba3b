"""The identity of a feature group: features of one source, one key and one condition read the same events."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator

from schemas.expressions import canonical
from schemas.features import Feature, Latest, Lookup, Trailing

# Features that read a history of events, and all features that read a source other than their own row.
EventFeature = Trailing | Latest
SourceFeature = Trailing | Latest | Lookup


@dataclasses.dataclass(frozen=True)
class HistoryKey:
    """Identifies a set of events and how it is keyed: the source, its key columns and the condition as text."""

    source: str
    columns: tuple[str, ...]
    where: str | None


@dataclasses.dataclass(frozen=True)
class GroupKey:
    """Identifies a feature group: the source, pairs of (spine column, source column), and the condition as text."""

    source: str
    keys: tuple[tuple[str, str], ...]
    where: str | None

    @property
    def history(self) -> HistoryKey:
        """The events of the group. Groups that differ only in their spine columns share them."""
        return HistoryKey(self.source, tuple(column for _, column in self.keys), self.where)


@functools.lru_cache(4096)  # a condition is serialised
def group_key(feature: SourceFeature) -> GroupKey:
    where = None if feature.where is None else canonical(feature.where)
    return GroupKey(feature.source.name, tuple(feature.keys), where)


def event_groups(features: Iterable[Feature]) -> dict[GroupKey, list[EventFeature]]:
    """The Trailing and Latest features by group, in the order of each group's first feature."""
    groups: dict[GroupKey, list[EventFeature]] = {}
    for feature in features:
        if isinstance(feature, Trailing | Latest):
            groups.setdefault(group_key(feature), []).append(feature)
    return groups


def column_names(feature: SourceFeature) -> list[str]:
    """The names of the feature's columns."""
    return (
        [each.name for each in feature.statistics] if isinstance(feature, Trailing) else list(feature.renamed.values())
    )


def window_lengths(feature: EventFeature) -> list[int | None]:
    """The lengths of the feature's windows in µs; None for a window over all history."""
    return [each.length for each in feature.statistics] if isinstance(feature, Trailing) else [feature.length]


def without_columns(features: Iterable[SourceFeature], names: Collection[str]) -> Iterator[SourceFeature]:
    """Features that give the columns of `features` except those in `names`."""
    for feature in features:
        if not any(name in names for name in column_names(feature)):
            yield feature
        elif isinstance(feature, Latest | Lookup):
            left = tuple(column for column, name in feature.renamed.items() if name not in names)
            if left:
                yield dataclasses.replace(feature, columns=left)
        else:
            by_window: dict[str, dict[str, tuple[str, ...]]] = {}
            for each in feature.statistics:
                if each.name not in names:
                    stats = by_window.setdefault(each.window, {})
                    stats[each.column] = (*stats.get(each.column, ()), each.stat)
            yield from (dataclasses.replace(feature, over=window, stats=stats) for window, stats in by_window.items())
