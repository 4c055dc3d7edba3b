"""Slow, obvious answers: one row at a time, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from schemas import Derived, FeatureView, Latest, Lookup, Trailing
from schemas.sources import Source

EPOCH = datetime(1970, 1, 1, tzinfo=None)


def features(view: FeatureView, spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> list[dict[str, Any]]:
    """Every feature of every spine row by scanning every event."""
    rows = []
    for row in spine.iter_rows(named=True):
        known = dict(row)
        for feature in view.features:
            if isinstance(feature, Derived):
                one = pl.DataFrame([known], schema={name: dtype for name, dtype in {**view.spine.schema, **view.columns}.items() if name in known})
                made = {name: one.select(expr).item() for name, expr in feature.columns.items()}
            elif isinstance(feature, Lookup):
                matches = [each for each in tables[feature.source.name].iter_rows(named=True) if _same(known, each, feature.keys)]
                made = {name: matches[0][column] if matches else None for column, name in feature.renamed.items()}
            else:
                made = _windowed(feature, view, known, tables[feature.source.name])
            known.update({name: _stored(value, view.columns[name]) for name, value in made.items()})
        rows.append({name: known[name] for name in (*view.context, *view.columns)})
    return rows


def _windowed(feature: Trailing | Latest, view: FeatureView, row: dict[str, Any], events: pl.DataFrame) -> dict[str, Any]:
    if feature.where is not None:
        events = events.filter(feature.where)
    source, t = feature.source, row[view.time]
    place = source.event_time or source.time
    seen = [each for each in events.iter_rows(named=True) if each[source.time] < t and _same(row, each, feature.keys)]
    seen.sort(key=lambda each: (each[place], *_tie(source, each)))
    if isinstance(feature, Latest):
        inside = [each for each in seen if t - timedelta(microseconds=feature.length) <= each[place] < t]
        return {name: inside[-1][column] if inside else None for column, name in feature.renamed.items()}
    made = {}
    for each in feature.statistics:
        inside = [event for event in seen if t - timedelta(microseconds=each.length) <= event[place] < t]
        made[each.name] = len(inside) if each.column == "*" else statistic(each.stat, [event[each.column] for event in inside])
    return made


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
    return float(np.quantile(numbers, 0.5 if stat == "median" else int(stat[1:]) / 100))


def _same(row: dict[str, Any], event: dict[str, Any], keys: tuple[tuple[str, str], ...]) -> bool:
    return all(row[a] is not None and row[a] == event[b] for a, b in keys)


def _tie(source: Source, event: dict[str, Any]) -> tuple[Any, ...]:
    """Nulls first, then by value, over the order columns and then all."""
    columns = [*(source.order or ()), *(name for name in source.schema if name in event)]
    return tuple((event[name] is not None, "" if event[name] is None else event[name]) if not isinstance(event[name], bool | int | float)
                 else (True, event[name]) for name in columns) if all(True for _ in columns) else ()  # fmt: skip


def _stored(value: Any, dtype: pl.DataType) -> Any:
    if value is None:
        return None
    if dtype == pl.Float32:
        number = np.float32(value)
        return float(number) if np.isfinite(number) else None
    return value
