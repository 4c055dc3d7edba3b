"""Events and spine rows in one order, so that a window is two binary searches; and keys as small integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from transforms.features.window_statistics import Once
from transforms.records.arrays import Bools, Ints
from transforms.records.columns import whole_numbers

# Up to this many positions are searched for one by one; for more, one pass over all keys costs less.
MANY = 20_000
# Up to this many spine rows are compared with all events, key by key; for more, a code for every key costs less.
FEW = 16


class EventOrder:
    """Events and spine rows under one integer key, code · span + time, so that a window is two binary searches."""

    def __init__(self, positions: Ints, codes: Ints, moments: Ints, spine_codes: Ints) -> None:
        self.base = int(min(positions.min(initial=2**62), moments.min(initial=2**62)))
        last = int(max(positions.max(initial=-(2**62)), moments.max(initial=-(2**62))))
        self.positions, self.codes, self.moments, self.spine_codes = positions, codes, moments, spine_codes
        self.span = max(last - self.base + 2, 2)
        self.unique: Ints | None = None
        groups = int(max(codes.max(initial=0), spine_codes.max(initial=0))) + 1
        if groups * self.span >= 2**62:
            self.unique = np.unique(positions)
            self.span = len(self.unique) + 1
        self.order, self.sorted_keys = self._sorted(codes, positions)
        self.spine_order, _ = self._sorted(spine_codes, moments)
        self.sorted_codes = spine_codes[self.spine_order]
        self.sorted_moments = moments[self.spine_order]
        self.ends = self._search(self.sorted_moments)
        self._starts = Once()

    def _sorted(self, codes: Ints, times: Ints) -> tuple[Ints, Ints]:
        """(Rows by code and time, their keys in that order.)"""
        keys = codes * self.span + self._position(times)
        if is_sorted(times):
            order = by_code(codes)
        elif len(keys) < MANY:
            order = np.argsort(keys, kind="stable")
        else:
            order = pl.Series(keys).arg_sort().to_numpy().astype(np.int64)
        return order, keys[order]

    def _position(self, times: Ints) -> Ints:
        """Times as numbers in `[0, span)`; times before the first event are 0."""
        if self.unique is not None:
            return np.searchsorted(self.unique, times, "left").astype(np.int64)
        return np.clip(times - self.base, 0, None)

    def _search(self, times: Ints) -> Ints:
        """Position of the first event of each spine row's key that is not before `times`; 0 for keys without events."""
        wanted = self.sorted_codes * self.span + self._position(times)
        found = positions(self.sorted_keys, wanted)
        return np.where(self.sorted_codes < 0, 0, found)

    def bounds(self, length: int | None, start: int | None = None) -> tuple[Ints, Ints]:
        """`[t − length, t)` per spine row, in `spine_order`; without a length `[start, t)`, or all before t."""

        def search() -> Ints:
            far = np.full(len(self.sorted_moments), -(2**62) if start is None else start, np.int64)
            return self._search(far if length is None else self.sorted_moments - length)

        return self._starts.get(length, search), self.ends

    def ties(self) -> Ints:
        """Positions of events that have the same key and time as a neighbour."""
        same = self.sorted_keys[1:] == self.sorted_keys[:-1]
        edge = np.zeros(1, np.bool_)
        return np.flatnonzero(np.concatenate([edge, same]) | np.concatenate([same, edge]))


def is_sorted(times: Ints) -> bool:
    """Whether the times never decrease."""
    return bool((times[1:] >= times[:-1]).all())


def by_code(codes: Ints) -> Ints:
    """Rows sorted by small codes (−1 first); the sort is stable. NumPy sorts integers of 16 bits by radix."""
    least, most = int(codes.min(initial=0)), int(codes.max(initial=0))
    order: Ints | None = None
    for shift in range(0, max((most - least).bit_length(), 1), 16):
        digit = (codes - least >> shift).astype(np.uint16)
        then = np.argsort(digit if order is None else digit[order], kind="stable")
        order = then if order is None else order[then]
    assert order is not None
    return order


def positions(keys: Ints, wanted: Ints) -> Ints:
    """Returns, for each of the sorted `wanted`, the first position in sorted `keys` whose key is not less.

    If there are many, they are found in one pass over both.
    """
    if len(wanted) < MANY:
        return np.searchsorted(keys, wanted, "left")
    left = pl.DataFrame({"key": pl.Series(wanted).set_sorted()})
    right = pl.DataFrame({"key": pl.Series(keys).set_sorted(), "place": np.arange(len(keys))})
    found = left.join_asof(right, on="key", strategy="forward", check_sortedness=False)["place"]
    return found.fill_null(len(keys)).to_numpy()


def codes(spine: pl.DataFrame, table: pl.DataFrame, keys: Sequence[tuple[str, str]]) -> tuple[Ints, Ints]:
    """Encodes equal keys as equal small integers on both sides.

    A null key is −1, and so is the key of a spine row that is not in `table`.  If there are few spine rows, so is any
    other key.
    """
    if len(spine) <= FEW:
        return _codes_of_few(spine, table, keys)
    left, right = np.zeros(len(spine), np.int64), np.zeros(len(table), np.int64)
    for spine_column, table_column in keys:
        a, b = _column_codes(spine[spine_column], table[table_column])
        size = int(max(a.max(initial=0), b.max(initial=0))) + 1
        if int(max(left.max(initial=0), right.max(initial=0)) + 1) * size >= 2**62:
            left, right = _dense(left, right)
        left = np.where((left < 0) | (a < 0), -1, left * size + a)
        right = np.where((right < 0) | (b < 0), -1, right * size + b)
    return _dense(left, right)


def _codes_of_few(spine: pl.DataFrame, table: pl.DataFrame, keys: Sequence[tuple[str, str]]) -> tuple[Ints, Ints]:
    """`codes` of the keys that some spine row has, by comparing each with all rows of `table`."""
    sides = [(_comparable(spine[ours]).to_list(), _comparable(table[theirs])) for ours, theirs in keys]
    left, right = np.full(len(spine), -1, np.int64), np.full(len(table), -1, np.int64)
    found: dict[tuple[Any, ...], int] = {}
    equal: dict[tuple[int, Any], Bools] = {}
    number = 0
    for row, key in enumerate(zip(*(values for values, _ in sides), strict=True)):
        if key not in found and None not in key:
            same: Bools | None = None
            for column, value in enumerate(key):
                if (column, value) not in equal:
                    mask = sides[column][1] == value
                    equal[column, value] = (mask.fill_null(False) if mask.null_count() else mask).to_numpy()
                same = equal[column, value] if same is None else same & equal[column, value]
            assert same is not None
            found[key] = -1
            if same.any():
                found[key] = number
                right[same] = number
                number += 1
        left[row] = found.get(key, -1)
    return left, right


def _comparable(series: pl.Series) -> pl.Series:
    return series if series.dtype == pl.String else whole_numbers(series).cast(pl.Int64)


def _column_codes(left: pl.Series, right: pl.Series) -> tuple[Ints, Ints]:
    if left.dtype == pl.String:
        shared = pl.Categorical(pl.Categories.random())
        # Both are kept until both have codes: Polars drops the categories with the last column that uses them.
        pair = right.cast(shared), left.cast(shared)
        right, left = (side.to_physical() for side in pair)
    else:
        left, right = left.to_physical().cast(pl.Int64), right.to_physical().cast(pl.Int64)
        lows: list[Any] = [low for low in (left.min(), right.min()) if low is not None]
        highs: list[Any] = [high for high in (left.max(), right.max()) if high is not None]
        if lows and max(highs) - min(lows) < 2**40:
            left, right = left - min(lows), right - min(lows)
        else:
            levels = right.drop_nulls().unique().sort()
            left, right = (_positions(levels, side) for side in (left, right))
    return tuple(side.cast(pl.Int64).fill_null(-1).to_numpy() for side in (left, right))  # type: ignore[return-value]


def _positions(levels: pl.Series, side: pl.Series) -> pl.Series:
    if not len(levels):
        return pl.Series([None] * len(side), dtype=pl.Int64)
    at = levels.search_sorted(side).clip(0, len(levels) - 1).cast(pl.Int64)
    return at.set(~levels.gather(at).eq_missing(side), None)


def _dense(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """Renumbers the codes that occur on the right without gaps; other codes on the left become −1."""
    top = int(max(left.max(initial=-1), right.max(initial=-1))) + 1
    if top <= 8 * (len(left) + len(right)) + 1024:
        used = np.zeros(top + 1, np.bool_)
        used[right[right >= 0]] = True
        number = np.where(used, np.cumsum(used) - 1, -1)
        number[-1] = -1  # the entry that index −1 selects
        return number[left], number[right]
    levels = np.unique(right[right >= 0])
    at = np.searchsorted(levels, left)
    known = (
        (left >= 0) & (levels[np.minimum(at, len(levels) - 1)] == left)
        if len(levels)
        else np.zeros(len(left), np.bool_)
    )
    return np.where(known, at, -1), np.where(right < 0, -1, np.searchsorted(levels, right))
