"""Vectorised statistics of contiguous windows of a sorted column. Each depends only on the multiset of values in a
window.

A value must not depend, to the last bit, on the history, the block or the order of arrival. So nothing here slides or
accumulates in floating point:

- sums are differences of integer prefix sums over fixed-point digits (a superaccumulator, Kulisch; Neal 2015). They are
  exact and associative, and are rounded once;
- min and max come from a sparse table (Bender & Farach-Colton 2000);
- quantiles and distinct counts from a wavelet matrix (Claude, Navarro & Ordóñez 2015).

Shapes: `values` has n elements, `lo` and `hi` (int64) have one per window, and a window is `values[lo:hi]`.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar, cast

import numpy as np
import numpy.typing as npt

from transforms.records.arrays import Bools, Floats, Ints
from transforms.records.window_sums import ExactSum, squared, window_variance

Value = TypeVar("Value")
# Up to this many windows are computed one by one, if together they are at most SHARED times as long as the column.
FEW, SHARED = 256, 2


class Once:
    """Values computed on first use by one thread, while other threads that want the same value wait."""

    def __init__(self) -> None:
        self._made: dict[Hashable, object] = {}
        self._locks: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        if key not in self._made:
            with self._locks.setdefault(key, threading.Lock()):
                if key not in self._made:
                    self._made[key] = make()
        return cast(Value, self._made[key])


class lazy(Generic[Value]):
    """An attribute that is computed on first use.

    Unlike `functools.cached_property` before Python 3.12, it has a lock per object, so that threads that work on
    different columns do not wait for each other.
    """

    def __init__(self, make: Callable[..., Value]) -> None:
        self.make, self.name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, owner: object, kind: type | None = None) -> Value:
        if owner is None:  # accessed on the class
            return cast(Value, self)
        once = owner.__dict__.setdefault("_once", Once())
        value = owner.__dict__[self.name] = once.get(self.name, lambda: self.make(owner))
        return value


class SparseTable:
    """Minimum (or maximum) of any window in two look-ups: level j holds the extreme of 2**j neighbours."""

    def __init__(self, values: Floats, longest: int, largest: bool) -> None:
        self.extreme = np.maximum if largest else np.minimum
        self.rows = len(values)
        levels = np.empty((max(longest, 1).bit_length(), self.rows))
        levels[0] = values
        for level in range(1, len(levels)):
            step = 1 << (level - 1)
            self.extreme(levels[level - 1, :-step], levels[level - 1, step:], out=levels[level, :-step])
            levels[level, self.rows - step :] = levels[level - 1, self.rows - step :]
        self.flat = levels.reshape(-1)

    def __call__(self, lo: Ints, hi: Ints) -> Floats:
        """Extreme per window; windows are not empty."""
        level = np.frexp((hi - lo).astype(np.float64))[1].astype(np.int64) - 1
        offset = level * self.rows
        left = self.flat[offset + lo]
        offset += hi
        offset -= np.left_shift(1, level)
        right = self.flat[offset]
        return self.extreme(left, right, out=left)


class WaveletMatrix:
    """Order statistics of any window of non-negative integers, in one pass per bit."""

    def __init__(self, codes: Ints) -> None:
        self.bits = int(codes.max(initial=0)).bit_length()
        self.zeros: list[Ints] = []
        for bit in reversed(range(self.bits)):
            zero = (codes >> bit & 1) == 0
            self.zeros.append(np.concatenate([np.zeros(1, np.int64), np.cumsum(zero)]))
            codes = np.concatenate([codes[zero], codes[~zero]])

    def kth(self, lo: Ints, hi: Ints, k: Ints) -> Ints:
        """The k-th smallest code (from 0) per window."""
        result = np.zeros(len(lo), np.int64)
        for zeros in self.zeros:
            left, right = zeros[lo], zeros[hi]
            high = k >= right - left
            result = result << 1 | high
            k = np.where(high, k - (right - left), k)
            lo = np.where(high, zeros[-1] + lo - left, left)
            hi = np.where(high, zeros[-1] + hi - right, right)
        return result

    def below(self, lo: Ints, hi: Ints, bound: Ints) -> Ints:
        """How many codes of each window are less than its `bound`."""
        count = np.where(bound >> self.bits > 0, hi - lo, 0)
        inside = bound >> self.bits == 0
        for level, zeros in enumerate(self.zeros):
            left, right = zeros[lo], zeros[hi]
            high = (bound >> (self.bits - 1 - level) & 1) == 1
            count = count + np.where(inside & high, right - left, 0)
            lo = np.where(high, zeros[-1] + lo - left, left)
            hi = np.where(high, zeros[-1] + hi - right, right)
        return count


class Column:
    """The values of a sorted column without nulls; windows are mapped accordingly."""

    def __init__(self, values: npt.NDArray[np.generic], valid: Bools | None) -> None:
        self.kept = None
        if valid is not None and not valid.all():
            self.kept = np.concatenate([np.zeros(1, np.int64), np.cumsum(valid)])
            self.positions = np.flatnonzero(valid)
            values = values[valid]
        self.values = values

    def bounds(self, lo: Ints, hi: Ints) -> tuple[Ints, Ints]:
        """Windows over all rows as windows over values."""
        return (lo, hi) if self.kept is None else (self.kept[lo], self.kept[hi])

    def position(self, index: Ints) -> Ints:
        """Row of the value `index`."""
        return index if self.kept is None else self.positions[index]

    @lazy
    def numbers(self) -> Floats:
        # Adding zero turns −0.0 into 0.0: otherwise the order of rows would decide which of the two a minimum returns.
        return self.values.astype(np.float64) + 0.0

    @lazy
    def sums(self) -> ExactSum:
        return ExactSum(self.numbers)

    @lazy
    def squares(self) -> ExactSum:
        return ExactSum(*squared(self.numbers))

    @lazy
    def distinct(self) -> tuple[Floats, WaveletMatrix]:
        levels, codes = np.unique(self.numbers, return_inverse=True)
        return levels, WaveletMatrix(codes.astype(np.int64))

    @lazy
    def previous(self) -> WaveletMatrix:
        """1 + the index of the previous occurrence of the same value; 0 if there is none."""
        order = np.argsort(self.values, kind="stable")
        same = self.values[order[1:]] == self.values[order[:-1]]
        previous = np.zeros(len(order), np.int64)
        previous[order[1:][same]] = order[:-1][same] + 1
        return WaveletMatrix(previous)

    def extreme(self, lo: Ints, hi: Ints, largest: bool) -> Floats:
        return SparseTable(self.numbers, int((hi - lo).max(initial=1)), largest)(lo, hi)

    def quantile(self, lo: Ints, hi: Ints, q: float) -> Floats:
        """Linear interpolation between order statistics (type 7), rounded as numpy rounds it."""
        levels, wavelet = self.distinct
        at = (hi - lo - 1) * q
        below = np.floor(at).astype(np.int64)
        a = levels[wavelet.kth(lo, hi, below)]
        b = levels[wavelet.kth(lo, hi, np.minimum(below + 1, hi - lo - 1))]
        t = at - below
        return np.where(t < 0.5, a + (b - a) * t, b - (b - a) * (1 - t))

    def variance(self, lo: Ints, hi: Ints) -> Floats:
        """Unbiased variance of windows of at least two values."""

        def extreme(at: Ints, largest: bool) -> Floats:
            return self.extreme(lo[at], hi[at], largest)

        return window_variance(hi - lo, self.sums.digits(lo, hi), self.squares.digits(lo, hi), extreme)


def statistic(column: Column, stat: str, lo: Ints, hi: Ints) -> tuple[npt.NDArray[np.generic], Bools]:
    """`stat` per window, and whether it has a value; for `first` and `last`, the row of the value.

    `lo` and `hi` are windows over all rows, nulls included.
    """
    lo, hi = column.bounds(lo, hi)
    length = hi - lo
    if stat == "count":
        return length, np.ones(len(lo), np.bool_)
    if stat == "n_unique":
        if _one_by_one(column, lo, length):
            distinct = [len(set(column.values[a:b].tolist())) for a, b in zip(lo.tolist(), hi.tolist(), strict=True)]
            return np.array(distinct, np.int64), np.ones(len(lo), np.bool_)
        return column.previous.below(lo, hi, lo + 1), np.ones(len(lo), np.bool_)
    valid = length > (1 if stat in ("std", "var") else 0)
    everywhere = bool(valid.all())
    at = slice(None) if everywhere else np.flatnonzero(valid)
    some_lo, some_hi = lo[at], hi[at]
    if stat in ("first", "last"):
        rows = np.zeros(len(lo), np.int64)
        rows[at] = column.position(some_lo if stat == "first" else some_hi - 1)
        return rows, valid
    result = np.zeros(len(lo))
    if stat in _OF_ONE and _one_by_one(column, lo, length):
        numbers, one = column.numbers, _OF_ONE[stat]
        result[at] = [one(numbers[a:b]) for a, b in zip(some_lo.tolist(), some_hi.tolist(), strict=True)]
    else:
        result[at] = _number(column, stat, some_lo, some_hi)
    return result, valid


def _one_by_one(column: Column, lo: Ints, length: Ints) -> bool:
    """Whether windows are so few that what all windows of a column share would cost more than it saves."""
    return len(lo) <= FEW and int(length.sum()) <= SHARED * (len(column.values) + 1)


def _sum_of_one(values: Floats) -> float:
    """The sum, rounded once."""
    try:
        return math.fsum(values.tolist())
    except OverflowError:  # of a partial sum
        return float(ExactSum(values).total(np.zeros(1, np.int64), np.array([len(values)]))[0])


def _median_of_one(values: Floats) -> float:
    ordered, n = np.sort(values), len(values)
    return float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2)


def _quantile_of_one(values: Floats, q: float) -> float:
    """As `Column.quantile`."""
    ordered, at = np.sort(values), (len(values) - 1) * q
    below = int(at)
    a, b, t = ordered[below], ordered[min(below + 1, len(values) - 1)], at - below
    return float(a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t))


# Statistics of the values of one window that is not empty.
_OF_ONE: Mapping[str, Callable[[Floats], float]] = {
    "sum": _sum_of_one,
    "mean": lambda values: _sum_of_one(values) / len(values),
    "min": lambda values: float(values.min()),
    "max": lambda values: float(values.max()),
    "median": _median_of_one,
    **{f"q{percent:02}": functools.partial(_quantile_of_one, q=percent / 100) for percent in range(1, 100)},
}


def _number(column: Column, stat: str, lo: Ints, hi: Ints) -> Floats:
    match stat:
        case "sum":
            return column.sums.total(lo, hi)
        case "mean":
            return column.sums.total(lo, hi) / (hi - lo)
        case "var" | "std":
            spread = column.variance(lo, hi)
            return spread if stat == "var" else np.sqrt(spread)
        case "min" | "max":
            return column.extreme(lo, hi, stat == "max")
        case "median":
            levels, wavelet = column.distinct
            n = hi - lo
            return (levels[wavelet.kth(lo, hi, (n - 1) // 2)] + levels[wavelet.kth(lo, hi, n // 2)]) / 2
        case _:
            return column.quantile(lo, hi, int(stat[1:]) / 100)
