"""Slow, obvious answers: one row at a time, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl

from schemas import Derived, FeatureView, Latest, Lookup, Trailing
from schemas.sources import Source

Rows = list[dict[str, Any]]


def features(view: FeatureView, spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Every feature of every spine row by scanning every event."""
    types = {**view.spine.schema, **view.columns}
    rows = []
    for row in spine.iter_rows(named=True):
        known = dict(row)
        for feature in view.features:
            if isinstance(feature, Derived):
                one = pl.DataFrame([known], schema={name: types[name] for name in known})
                made = {name: one.select(expr).item() for name, expr in feature.columns.items()}
            elif isinstance(feature, Lookup):
                matches = [each for each in _rows(feature, tables) if _same(known, each, feature.keys)]
                made = {name: matches[0][column] if matches else None for column, name in feature.renamed.items()}
            else:
                made = _windowed(feature, view, known, _rows(feature, tables))
            known.update({name: _stored(value, view.columns[name]) for name, value in made.items()})
        rows.append({name: known[name] for name in (*view.context, *view.columns)})
    return rows


def _windowed(feature: Trailing | Latest, view: FeatureView, row: dict[str, Any], events: Rows) -> dict[str, Any]:
    source, t = feature.source, row[view.time]
    position = source.event_time or source.time
    seen = [event for event in events if event[source.time] < t and _same(row, event, feature.keys)]
    seen.sort(key=lambda event: (event[position], *_tie(source, event)))

    def inside(length: int | None) -> Rows:
        start = None if length is None else t - timedelta(microseconds=length)
        return [event for event in seen if (start is None or start <= event[position]) and event[position] < t]

    if isinstance(feature, Latest):
        last = inside(feature.length)[-1:]
        return {name: last[0][column] if last else None for column, name in feature.renamed.items()}
    return {
        each.name: len(inside(each.length))
        if each.column == "*"
        else statistic(each.stat, [event[each.column] for event in inside(each.length)])
        for each in feature.statistics
    }


def statistic(stat: str, values: list[Any]) -> Any:
    """One statistic of a list; None and NaN are not values."""
    values = [value for value in values if value is not None and not (isinstance(value, float) and math.isnan(value))]
    if stat == "count":
        return len(values)
    if stat == "n_unique":
        return len(set(values))
    if not values:
        return None
    if stat in ("first", "last"):
        return values[0 if stat == "first" else -1]
    numbers = [float(value) for value in values]
    if stat == "sum":
        return math.fsum(numbers)
    if stat == "mean":
        return math.fsum(numbers) / len(numbers)
    if stat in ("var", "std"):
        if len(numbers) < 2:
            return None
        mean = math.fsum(numbers) / len(numbers)
        variance = math.fsum((x - mean) ** 2 for x in numbers) / (len(numbers) - 1)
        return variance if stat == "var" else math.sqrt(variance)
    if stat in ("min", "max"):
        return min(numbers) if stat == "min" else max(numbers)
    if stat == "median":
        interior = sorted(numbers)[(len(numbers) - 1) // 2 : len(numbers) // 2 + 1]
        return (interior[0] + interior[-1]) / 2
    return float(np.quantile(numbers, int(stat[1:]) / 100))


def _same(row: dict[str, Any], event: dict[str, Any], keys: tuple[tuple[str, str], ...]) -> bool:
    return all(row[a] is not None and row[a] == event[b] for a, b in keys)


def _tie(source: Source, event: dict[str, Any]) -> tuple[Any, ...]:
    """Nulls first, then by value, over the order columns and then all."""
    columns = [*(source.order or ()), *(name for name in source.schema if name in event)]
    return tuple((event[name] is not None, event[name]) for name in columns)


def _rows(feature: Trailing | Latest | Lookup, tables: Mapping[str, pl.DataFrame]) -> Rows:
    table = tables[feature.source.name]
    return (table if feature.where is None else table.filter(feature.where)).rows(named=True)


def _stored(value: Any, dtype: pl.DataType) -> Any:
    if value is None:
        return None
    if dtype == pl.Float32:
        number = np.float32(value)
        return float(number) if np.isfinite(number) else None
    return value
