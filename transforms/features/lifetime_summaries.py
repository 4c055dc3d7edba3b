"""Windows over all history: the events before a block are reduced to a summary with one row per key.

A summary has counts, exact sums (the digits of `window_sums.ExactSum`), extremes, and first and last values. A
summary and the block's own events together give the same bits as all events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from schemas.features import ORDERED, Latest, Statistic, Trailing
from schemas.sources import Source
from transforms.features.window_statistics import Column
from transforms.records.arrays import Bools, Floats, Ints
from transforms.records.window_sums import Digits, Numbers, decompose, squared, window_sum, window_variance

# The column of a summary that has the last row; no key may have this name.
LATEST = " latest"
SUMMED, SQUARED = ("sum", "mean", "std", "var"), ("std", "var")


@dataclasses.dataclass(frozen=True, eq=False)
class Summary:
    """A summary (see `summarise`) of events before `until` µs, one row per key.

    Args:
        length: length in µs of the windows that all contain these events; None: lifetime windows.
    """

    frame: pl.DataFrame
    until: int
    length: int | None = None


def summarise(features: Sequence[Trailing | Latest], events: pl.DataFrame) -> pl.DataFrame:
    """Summarises `events` for the lifetime windows of `features` (of one source, key and condition), one row per key.

    Columns: the keys, `#` (number of rows), and for each column c those that its statistics need: `c n`, `c s<unit>`,
    `c q<unit>`, `c min`, `c max`, `c first`, `c last`; `LATEST`: the last row as a struct.
    """
    first = features[0]
    if first.condition is not None:
        events = events.filter(first.condition)
    source, keys = first.source, [column for _, column in first.keys]
    events = events.drop_nulls(keys)
    taken = sorted({column for feature in features if isinstance(feature, Latest) for column in feature.columns})
    if taken or any(set(ORDERED) & stats for stats in statistics_needed(features).values()):
        events = events.sort(order(source, events), maintain_order=False)
    made: list[pl.Expr] = [pl.len().cast(pl.Int64).alias("#")]
    digits: list[pl.Series] = []
    for column, stats in statistics_needed(features).items():
        value = pl.col(column)
        made.append(value.drop_nulls().len().cast(pl.Int64).alias(f"{column} n"))
        if {"first"} & stats:
            made.append(value.drop_nulls().first().alias(f"{column} first"))
        if {"last"} & stats:
            made.append(value.drop_nulls().last().alias(f"{column} last"))
        if stats & {"min", "max", *SQUARED}:
            number = value.cast(pl.Float64) + 0.0
            made += [number.min().alias(f"{column} min"), number.max().alias(f"{column} max")]
        if stats & set(SUMMED):
            numbers = events[column].cast(pl.Float64).fill_null(0.0).to_numpy() + 0.0
            digits += _digit_columns(f"{column} s", decompose(numbers))
            if stats & set(SQUARED):
                digits += _digit_columns(f"{column} q", decompose(*squared(numbers)))
    if taken:
        made.append(pl.struct(taken).last().alias(LATEST))
    made += [pl.col(each.name).sum() for each in digits]
    return events.with_columns(digits).group_by(keys, maintain_order=True).agg(made)


def merge_summaries(earlier: pl.DataFrame | None, later: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Merges the summaries of two spans of time, the earlier first. Associative."""
    if earlier is None:
        return later
    both = pl.concat([earlier, later], how="diagonal")
    made = []
    for name in both.columns:
        if name in keys:
            continue
        kind = name.rsplit(" ", 1)[-1]
        column = pl.col(name)
        if kind in ("min", "max"):
            made.append(getattr(column, kind)())
        elif kind in ("first", "last", "latest"):
            made.append(getattr(column.drop_nulls(), "first" if kind == "first" else "last")().alias(name))
        else:
            made.append(column.sum())
    return both.group_by(keys, maintain_order=True).agg(made)


def order(source: Source, events: pl.DataFrame) -> list[str]:
    """The columns that order the events of a key: time, then the tie-breakers."""
    return list(dict.fromkeys([str(source.time), *source.ties(events.columns)]))


def statistics_needed(features: Sequence[Trailing | Latest]) -> dict[str, set[str]]:
    """Statistics of lifetime windows per column."""
    result: dict[str, set[str]] = {}
    for feature in features:
        if isinstance(feature, Trailing):
            for each in feature.statistics:
                if each.length is None and each.column != "*":
                    result.setdefault(each.column, set()).add(each.stat)
    return result


def _digit_columns(prefix: str, digits: Digits) -> list[pl.Series]:
    return [pl.Series(f"{prefix}{unit}", digit) for unit, digit in digits.items()]


class PriorSummary:
    """A group's summary, joined to the windows: the values for the key of each window; zero or null for new keys."""

    def __init__(self, summary: pl.DataFrame, rows: Ints) -> None:
        """`rows`: per window the row of `summary`, −1 for none."""
        self.summary, self.rows, self.known = summary, rows, rows >= 0
        self.at = np.where(self.known, rows, 0)

    def numbers(self, name: str, missing: float | int = 0) -> Numbers:
        column = self.summary[name] if name in self.summary.columns else None
        if column is None or not len(self.summary):
            return np.full(len(self.rows), missing)
        return np.where(self.known, column.fill_null(missing).to_numpy()[self.at], missing)

    def digits(self, prefix: str) -> Digits:
        units = [
            name
            for name in self.summary.columns
            if name.startswith(prefix) and name[len(prefix) :].lstrip("-").isdigit()
        ]
        return {int(name[len(prefix) :]): self.numbers(name).astype(np.int64) for name in units}

    def number(self, each: Statistic, own: Column | None, lo: Ints, hi: Ints) -> tuple[Numbers, Bools]:
        """Computes a statistic of the summary and the windows `[lo, hi)` of the column `own` together.

        `first` and `last` are not computed here.
        """
        if each.column == "*":
            return self.numbers("#").astype(np.int64) + (hi - lo), np.ones(len(lo), np.bool_)
        assert own is not None
        lo, hi = own.bounds(lo, hi)
        before = self.numbers(f"{each.column} n").astype(np.int64)
        n = before + (hi - lo)
        if each.stat == "count":
            return n, np.ones(len(lo), np.bool_)
        valid = n > (1 if each.stat in SQUARED else 0)
        if each.stat in ("min", "max"):
            return self._extreme(each.column, own, lo, hi, each.stat == "max"), valid
        sums = _added(self.digits(f"{each.column} s"), own.sums.digits(lo, hi))
        if each.stat in ("sum", "mean"):
            whole = window_sum(sums, len(lo))
            return (whole if each.stat == "sum" else whole / np.maximum(n, 1)), valid
        squares = _added(self.digits(f"{each.column} q"), own.squares.digits(lo, hi))
        at = np.flatnonzero(valid)

        def extreme(some: Ints, largest: bool) -> Floats:
            return self._extreme(each.column, own, lo, hi, largest)[at[some]]

        result = np.zeros(len(lo))
        result[at] = window_variance(n[at], _only(sums, at), _only(squares, at), extreme)
        return (result if each.stat == "var" else np.sqrt(result)), valid

    def _extreme(self, column: str, own: Column, lo: Ints, hi: Ints, largest: bool) -> Floats:
        nothing = -np.inf if largest else np.inf
        result = self.numbers(f"{column} {'max' if largest else 'min'}", nothing).astype(np.float64)
        some = np.flatnonzero(hi > lo)
        result[some] = (np.maximum if largest else np.minimum)(result[some], own.extreme(lo[some], hi[some], largest))
        return result

    def value(self, name: str) -> pl.Series:
        """A summary column, by window; null for keys without a summary."""
        at = (
            pl.Series(self.rows).set(pl.Series(~self.known), None)
            if len(self.summary)
            else pl.Series([None] * len(self.rows), dtype=pl.Int64)
        )
        return self.summary[name].gather(at)


def _added(a: Digits, b: Digits) -> Digits:
    return {unit: a.get(unit, 0) + b.get(unit, 0) for unit in {*a, *b}}  # type: ignore[misc]


def _only(digits: Digits, at: Ints) -> Digits:
    return {unit: digit[at] for unit, digit in digits.items()}
