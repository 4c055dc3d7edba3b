"""Features of a few spine rows, each by its definition: filter the events, compute the statistic."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from schemas.features import ORDERED, Derived, Latest, Lookup, Statistic, Trailing
from schemas.views import FeatureView
from transforms.records.arrays import Ints
from transforms.verification.plain_expressions import as_stored, evaluate, where_true
from transforms.verification.plain_sources import Tables, Wanted, dimension_row_of_each, events
from transforms.verification.plain_statistics import exact_variance, plain_statistic, rounded, variances_allowed

ReadingFeature = Trailing | Latest | Lookup
Waiting = list[tuple[ReadingFeature, pl.DataFrame]]


def recompute(view: FeatureView, spine: pl.DataFrame, tables: Tables, published: pl.DataFrame) -> pl.DataFrame:
    """The features of the spine rows, in their order.

    Args:
        spine: the spine source's columns.
        published: the published features of the same rows.  A published variance is returned if the promised bits allow
            it (see `plain_statistics`).
    """
    frame, moments = spine, spine[view.time].to_physical().to_numpy()
    waiting: Waiting = []
    derived: list[Derived] = []
    to_come: set[str] = set()  # names of columns that `waiting` and `derived` compute

    def computed(frame: pl.DataFrame) -> pl.DataFrame:
        frame = frame.with_columns(_gathered(view, waiting, moments, tables, published))
        for feature in derived:
            made = [
                as_stored(evaluate(expr, frame), view.columns[name]).alias(name)
                for name, expr in feature.columns.items()
            ]
            frame = frame.with_columns(made)
        for each in (waiting, derived, to_come):
            each.clear()
        return frame

    # A source is read once for all features that can be computed together, which are those whose keys are known.
    for feature in view.features:
        if isinstance(feature, Derived):
            derived.append(feature)
            to_come |= set(feature.columns)
            continue
        if to_come & {column for column, _ in feature.keys}:
            frame = computed(frame)
        waiting.append((feature, _values(feature, frame)))
        to_come |= set(feature.outputs({**view.spine.schema, **view.columns}))
    return computed(frame).select(*view.context, *view.columns)


def _values(feature: ReadingFeature, frame: pl.DataFrame) -> pl.DataFrame:
    """The keys of the spine rows, with the names and types of the source's keys; a key that does not fit this type is
    null."""
    types = feature.source.schema
    return pl.DataFrame([frame[left].cast(types[right], strict=False).alias(right) for left, right in feature.keys])


def _gathered(
    view: FeatureView, waiting: Waiting, moments: Ints, tables: Tables, published: pl.DataFrame
) -> list[pl.Series]:
    made: list[pl.Series] = []
    for name in dict.fromkeys(feature.source.name for feature, _ in waiting):
        some = [(feature, values) for feature, values in waiting if feature.source.name == name]
        if some[0][0].source.time is None:
            for feature, values in some:
                assert isinstance(feature, Lookup)
                made += _looked_up(view, feature, values, tables)
            continue
        wanted = [
            Wanted(tuple(values.columns), values, moments, _length(feature))
            for feature, values in some
            if not isinstance(feature, Lookup)
        ]
        tied = any(isinstance(feature, Latest) or _ordered(feature) for feature, _ in some)
        seen = events(view, tables, name, wanted, tied)
        for feature, values in some:
            assert not isinstance(feature, Lookup)
            windows = _Windows.of(feature, values, moments, seen)
            if isinstance(feature, Latest):
                made += _latest(view, feature, windows)
            else:
                made += _trailing(view, feature, windows, published)
    return made


def _ordered(feature: ReadingFeature) -> bool:
    return isinstance(feature, Trailing) and any(each.stat in ORDERED for each in feature.statistics)


def _length(feature: Trailing | Latest) -> int | None:
    """How far back the longest window reaches."""
    lengths = [each.length for each in feature.statistics] if isinstance(feature, Trailing) else [feature.length]
    return None if None in lengths else max(length for length in lengths if length is not None)


def _looked_up(view: FeatureView, feature: Lookup, values: pl.DataFrame, tables: Tables) -> list[pl.Series]:
    keys = values.columns
    rows = dimension_row_of_each(tables, feature.source.name, keys, values)
    rows = rows.select(*keys, *(pl.col(column).alias(f"__{column}") for column in feature.columns))
    found = values.join(rows, on=keys, how="left", maintain_order="left")
    return [as_stored(found[f"__{column}"], view.columns[name]).alias(name) for column, name in feature.renamed.items()]


@dataclasses.dataclass(frozen=True, eq=False)
class _Windows:
    """The windows of some spine rows over the events that they could see.

    Args:
        events: the events with the key of some spine row, sorted by key, then by `placed`.
        key: number of each event's key.
        placed: the time that decides which windows contain an event, µs.
        known: time when each event became known, µs.
        of_row: number of each spine row's key; −1 if no event has it.
        moments: time of each spine row, µs.
    """

    events: pl.DataFrame
    key: Ints
    placed: Ints
    known: Ints
    of_row: Ints
    moments: Ints

    @classmethod
    def of(cls, feature: Trailing | Latest, values: pl.DataFrame, moments: Ints, seen: pl.DataFrame) -> _Windows:
        """The windows of one feature over the events in order of `placed` (see `plain_sources.events`)."""
        source, keys = feature.source, list(values.columns)
        if feature.where is not None:
            seen = seen.filter(where_true(feature.where, seen))
        groups = values.drop_nulls().unique().with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("__key"))
        seen = seen.join(groups, on=keys, how="inner", maintain_order="left").sort("__key", maintain_order=True)
        of_row = values.join(groups, on=keys, how="left", maintain_order="left")["__key"].fill_null(-1).to_numpy()
        placed = seen[source.event_time or str(source.time)].to_physical().to_numpy()
        known = seen[str(source.time)].to_physical().to_numpy()
        return cls(seen, seen["__key"].to_numpy(), placed, known, of_row, moments)

    def positions(self, length: int | None) -> list[Ints]:
        """For each spine row, the events in `[t − length, t)` that were known before t."""
        return [self._positions(row, length) for row in range(len(self.moments))]

    def _positions(self, row: int, length: int | None) -> Ints:
        t, key = self.moments[row], self.of_row[row]
        first, last = np.searchsorted(self.key, key, "left"), np.searchsorted(self.key, key, "right")
        placed = self.placed[first:last]
        low = 0 if length is None else np.searchsorted(placed, t - length, "left")
        high = np.searchsorted(placed, t, "left")
        inside = np.arange(first + low, max(first + high, first + low))
        return inside[self.known[inside] < t]


def _latest(view: FeatureView, feature: Latest, windows: _Windows) -> list[pl.Series]:
    """The columns of a `Latest`: those of the last event of each window."""
    found = windows.positions(feature.length)
    last = pl.Series([int(positions[-1]) if len(positions) else None for positions in found], dtype=pl.Int64)
    return [
        as_stored(windows.events[column].gather(last), view.columns[name]).alias(name)
        for column, name in feature.renamed.items()
    ]


def _trailing(view: FeatureView, feature: Trailing, windows: _Windows, published: pl.DataFrame) -> list[pl.Series]:
    """The columns of a `Trailing`, one for each statistic."""
    inside = {length: windows.positions(length) for length in {each.length for each in feature.statistics}}
    return [_statistic(view, each, windows.events, inside[each.length], published) for each in feature.statistics]


def _statistic(
    view: FeatureView, each: Statistic, events: pl.DataFrame, inside: Sequence[Ints], published: pl.DataFrame
) -> pl.Series:
    """One statistic of the events in each window."""
    if each.column == "*":
        return pl.Series(each.name, [len(positions) for positions in inside], pl.Int64)
    parts = _parts(events[each.column], each.stat, inside)
    if each.stat in ("var", "std"):
        return _variances(each.name, each.stat, parts, published[each.name])
    dtype: pl.DataType = pl.Float64()
    if each.stat in ORDERED:
        dtype = events[each.column].dtype
    elif each.stat in ("count", "n_unique"):
        dtype = pl.Int64()
    results = pl.Series(each.name, [plain_statistic(each.stat, part) for part in parts], dtype)
    return as_stored(results, view.columns[each.name]).alias(each.name)


def _parts(column: pl.Series, stat: str, inside: Sequence[Ints]) -> list[list[Any]]:
    """The values of each window, in order."""
    if stat in ("n_unique", *ORDERED) or not (column.dtype.is_numeric() or column.dtype == pl.Boolean):
        return [column.gather(pl.Series(positions)).drop_nulls().to_list() for positions in inside]
    numbers = column.cast(pl.Float64).to_numpy()  # none of them is NaN, which was read as null
    return [values[~np.isnan(values)].tolist() for values in (numbers[positions] for positions in inside)]


def _variances(name: str, stat: str, parts: Sequence[list[float]], published: pl.Series) -> pl.Series:
    results: list[float | None] = []
    for part, given in zip(parts, published.to_list(), strict=True):
        exact = exact_variance(part)
        if exact is None:
            results.append(None)
            continue
        low, high = variances_allowed(exact, stat)
        number = float(given if given is not None and low <= given <= high else np.float32(rounded(exact, stat)))
        results.append(number if np.isfinite(number) else None)
    return pl.Series(name, results, pl.Float32)
