"""Columns of small frames: what a Polars query would return, without the fixed cost of a query."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from transforms.records.arrays import Ints

# Up to this many rows, an expression is computed on the calling thread: a thread pool would cost more.
FEW = 20_000


def select(frame: pl.DataFrame, *exprs: pl.Expr) -> pl.DataFrame:
    """`frame.select`, on the calling thread if there are few rows."""
    return frame.select_seq(*exprs) if len(frame) <= FEW else frame.select(*exprs)


def with_columns(frame: pl.DataFrame, *exprs: pl.Expr) -> pl.DataFrame:
    """`frame.with_columns`, on the calling thread if there are few rows."""
    return frame.with_columns_seq(*exprs) if len(frame) <= FEW else frame.with_columns(*exprs)


def whole_numbers(series: pl.Series) -> pl.Series:
    """Dates and times as their integers, as `to_physical` does; other columns as they are."""
    return series.cast(pl.Int64) if series.dtype.is_temporal() else series


def moments_of(frame: pl.DataFrame, time: str) -> Ints:
    """A column of times without nulls, in µs since 1970."""
    return frame[time].cast(pl.Int64).to_numpy()


def with_series(frame: pl.DataFrame, columns: Sequence[pl.Series]) -> pl.DataFrame:
    """`frame` with `columns`, which replace those of the same names.

    >>> with_series(pl.DataFrame({"a": [1], "b": [2]}), [pl.Series("a", [3])]).row(0)
    (3, 2)
    """
    known = frame.columns
    if any(each.name in known for each in columns):
        return frame.with_columns_seq(columns)
    return frame.hstack(list(columns)) if columns else frame
