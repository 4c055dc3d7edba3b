"""Sums and histograms in integers: whichever way parts are merged, the result is the same to the last bit.

Beam may cut and merge data in any order, and float addition is not associative.  Fitted encoders and metrics that
changed with it could not be reproduced, so both are accumulated here exactly.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Keys = npt.NDArray[np.uint64]

# frexp gives 53-bit integers times 2^(exponent − 53); the least exponent is that of the least subnormal, −1073.
_MANTISSA = 53
_HALF = 27
_UNIT = 1073 + _MANTISSA
# bincount adds in doubles: halves of 27 bits stay exact for 2^26 values.
_MOST = 1 << 26


def exact_sum(values: Floats) -> int:
    """Sum of finite doubles without rounding, as an integer number of 2^−1126.

    >>> ratio(exact_sum(np.array([1e100, 1.0, -1e100])))
    Fraction(1, 1)
    """
    return exact_sums(values, np.zeros(len(values), np.int64), 1)[0]


def exact_sums(values: Floats, groups: Counts, size: int) -> list[int]:
    """`exact_sum` of each group 0 … `size` − 1."""
    totals = [0] * size
    for start in range(0, len(values), _MOST):
        mantissa, exponent = np.frexp(values[start : start + _MOST])
        whole = np.ldexp(mantissa, _MANTISSA).astype(np.int64)
        least = int(exponent.min())
        span = int(exponent.max()) - least + 1
        cells, place = _cells(groups[start : start + _MOST] * span + (exponent - least))
        high = np.bincount(place, weights=whole >> _HALF).astype(np.int64)
        low = np.bincount(place, weights=whole & ((1 << _HALF) - 1)).astype(np.int64)
        for cell, upper, lower in zip(cells.tolist(), high.tolist(), low.tolist(), strict=True):
            group, shift = divmod(cell, span)
            totals[group] += ((upper << _HALF) + lower) << (shift + least - _MANTISSA + _UNIT)
    return totals


def _cells(keys: Counts) -> tuple[Counts, Counts]:
    """Distinct `keys` and the position of each row's, without a sort where they are small."""
    if len(keys) and int(keys.max()) > 4 * len(keys) + 4096:
        cells, place = np.unique(keys, return_inverse=True)
        return cells, place
    seen = np.bincount(keys) > 0
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[keys]


def ratio(total: int) -> Fraction:
    """What `exact_sum` counted, as a number."""
    return Fraction(total, 1 << _UNIT)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, sum, sum of squares, least and greatest of the values that are not NaN."""

    count: int = 0
    total: int = 0
    squares: int = 0
    least: float = float("inf")
    greatest: float = float("-inf")

    @classmethod
    def of(cls, values: Floats) -> Moments:
        known = values[~np.isnan(values)]
        if not len(known):
            return cls()
        return cls(len(known), exact_sum(known), exact_sum(known * known), float(known.min()), float(known.max()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    @property
    def mean(self) -> float:
        """0 where there is no value."""
        return float(ratio(self.total) / self.count) if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Population standard deviation; 0 where there is no value."""
        if not self.count:
            return 0.0
        variance = ratio(self.squares) / self.count - (ratio(self.total) / self.count) ** 2
        # Squares of doubles are rounded each by itself, so a constant may come out a hair below 0.
        return float(max(variance, Fraction(0))) ** 0.5 if self.least < self.greatest else 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class Bins:
    """How often each value occurred, per counter: exact up to `limit` distinct values, then in bins.

    Bins are the values' leading bits: doubles ordered as integers, `shift` low bits dropped.  `shift` is the least that
    leaves at most `limit` bins.  A part never needs a greater shift than the whole, so merging in any order, with any
    cuts, ends at the same shift and the same counts.

    Args:
        keys: bins that occurred, rising, uint64 [bins].
        counts: int64 [bins, counters].
        shift: bits dropped; 0 is exact.
        limit: most bins kept.
    """

    keys: Keys
    counts: Counts
    shift: int
    limit: int

    @classmethod
    def empty(cls, limit: int, counters: int = 1) -> Bins:
        return cls(np.empty(0, np.uint64), np.empty((0, counters), np.int64), 0, limit)

    @classmethod
    def of(cls, values: Floats, limit: int, weights: Counts | None = None) -> Bins:
        """Bins of the values that are not NaN; `weights` int64 [rows, counters] counts each row as often as it says."""
        counters = np.ones((len(values), 1), np.int64) if weights is None else weights
        known = ~np.isnan(values)
        if not known.all():
            values, counters = values[known], counters[known]
        return _summed(_ordered(values), counters, 0, limit)

    def __add__(self, other: Bins) -> Bins:
        if not len(other.keys) or not len(self.keys):
            return self if len(self.keys) else other
        shift = max(self.shift, other.shift)
        keys = [each.keys >> np.uint64(shift - each.shift) for each in (self, other)]
        return _summed(np.concatenate(keys), np.concatenate([self.counts, other.counts]), shift, self.limit)

    @property
    def values(self) -> Floats:
        """The value of each bin; the middle of its bounds where bits were dropped."""
        if not self.shift:
            return _unordered(self.keys)
        low = self.keys << np.uint64(self.shift)
        return _unordered(low + np.uint64(1 << (self.shift - 1)))

    def quantiles(self, at: Iterable[float]) -> list[float]:
        """Linear quantiles (type 7 of Hyndman & Fan 1996) of the first counter; 0 where there is no value."""
        running = np.cumsum(self.counts[:, 0])
        if not len(running) or not running[-1]:
            return [0.0 for _ in at]
        values, last = self.values, int(running[-1]) - 1
        result = []
        for share in at:
            place = Fraction(share) * last
            low = int(place)
            first, second = (
                float(values[np.searchsorted(running, rank, "right")]) for rank in (low, min(low + 1, last))
            )
            result.append(first + (second - first) * float(place - low))
        return result


def merged(parts: Iterable[Bins], limit: int, counters: int = 1) -> Bins:
    """All `parts` in one."""
    total = Bins.empty(limit, counters)
    for part in parts:
        total = total + part
    return total


def _summed(keys: Keys, counts: Counts, shift: int, limit: int) -> Bins:
    order = np.argsort(keys, kind="stable")
    keys, counts = _distinct(keys[order], counts[order])
    if len(keys) > limit:
        # Neighbours stay apart as long as their highest differing bit is kept; two of them `limit` apart decide.
        differing = keys[1:] ^ keys[:-1]
        length = np.frexp((differing & ~(differing >> np.uint64(1))).astype(np.float64))[1]
        drop = int(np.partition(length, len(length) - limit)[len(length) - limit])
        keys, counts = _distinct(keys >> np.uint64(drop), counts)
        shift += drop
    return Bins(keys, counts, shift, limit)


def _distinct(keys: Keys, counts: Counts) -> tuple[Keys, Counts]:
    """Rising `keys` once each, their counts added."""
    if not len(keys):
        return keys, counts
    first = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return (keys, counts) if len(first) == len(keys) else (keys[first], np.add.reduceat(counts, first, axis=0))


_SIGN = np.uint64(1 << 63)


def _ordered(values: Floats) -> Keys:
    """Doubles as integers of the same order; −0 is 0."""
    bits = (np.ascontiguousarray(values, np.float64) + 0.0).view(np.uint64)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _unordered(keys: Keys) -> Floats:
    return np.where(keys & _SIGN, keys ^ _SIGN, ~keys).view(np.float64)
