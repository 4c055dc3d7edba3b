"""Sums and histograms in integers: the order in which parts are merged does not change the result by a bit.

Beam may divide and merge data in any order, and float addition is not associative. So encoders and metrics accumulate
exactly here, and can be reproduced.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np

from transforms.records.arrays import Floats, Ints, UInt64s

Keys = UInt64s

# frexp gives 53-bit integers times 2^(exponent − 53); the least exponent is that of the least subnormal, −1073.
_MANTISSA = 53
_HALF = 27
# `exact_sum` counts in 2^−UNIT, `exact_squares` in 2^−(2 · UNIT).
UNIT = 1073 + _MANTISSA
# bincount adds in doubles: halves of 27 bits stay exact for 2^26 values.
_MOST = 1 << 26


def exact_sum(values: Floats) -> int:
    """Sum of finite doubles without rounding, as an integer number of 2^−1126.

    >>> as_fraction(exact_sum(np.array([1e100, 1.0, -1e100])))
    Fraction(1, 1)
    """
    return group_sums(values, np.zeros(len(values), np.int64), 1)[0]


def group_sums(values: Floats, groups: Ints, size: int) -> list[int]:
    """`exact_sum` of each group 0 … `size` − 1."""
    totals = [0] * size
    for start in range(0, len(values), _MOST):
        mantissa, exponent = np.frexp(values[start : start + _MOST])
        whole = np.ldexp(mantissa, _MANTISSA).astype(np.int64)
        least = int(exponent.min())
        span = int(exponent.max()) - least + 1
        distinct, position = _positions(groups[start : start + _MOST] * span + (exponent - least))
        high = np.bincount(position, weights=whole >> _HALF).astype(np.int64)
        low = np.bincount(position, weights=whole & ((1 << _HALF) - 1)).astype(np.int64)
        for key, upper, lower in zip(distinct.tolist(), high.tolist(), low.tolist(), strict=True):
            group, shift = divmod(key, span)
            totals[group] += ((upper << _HALF) + lower) << (shift + least - _MANTISSA + UNIT)
    return totals


def exact_squares(values: Floats) -> int:
    """Sum of the squares of finite doubles without rounding, as an integer number of 2^−2252.

    >>> Fraction(exact_squares(np.array([1e16 + 2, 0.5])), 1 << 2 * UNIT)
    Fraction(400000000000000160000000000000017, 4)
    """
    total = 0
    for start in range(0, len(values), _MOST):
        mantissa, exponent = np.frexp(values[start : start + _MOST])
        whole = np.ldexp(mantissa, _MANTISSA).astype(np.int64)
        high, low = whole >> _HALF, whole & ((1 << _HALF) - 1)
        least = int(exponent.min())
        distinct, position = _positions((exponent - least).astype(np.int64))
        # (high · 2^27 + low)², each product of at most 54 bits and added in halves.
        for product, shift in ((high * high, 2 * _HALF), (high * low, _HALF + 1), (low * low, 0)):
            for part, up in ((product >> _HALF, _HALF), (product & ((1 << _HALF) - 1), 0)):
                sums = np.bincount(position, weights=part)
                for key, found in zip(distinct.tolist(), sums.astype(np.int64).tolist(), strict=True):
                    total += found << (shift + up + 2 * (key + least - _MANTISSA + UNIT))
    return total


def integer_sums(values: Ints) -> tuple[int, int]:
    """Σx and Σx² of 64-bit integers, without rounding or overflow (fewer than 2^31 values)."""
    high, low = values >> 32, values & 0xFFFFFFFF
    squares = (_total(high * high) << 64) + (_total(high * low) << 33) + _total(low.astype(np.uint64) ** np.uint64(2))
    return _total(values), squares


def _total(values: Ints | Keys) -> int:
    high, low = values >> values.dtype.type(32), values & values.dtype.type(0xFFFFFFFF)
    return (int(high.sum()) << 32) + int(low.sum())


def deviation(count: int, total: int, squares: int) -> float:
    """Population standard deviation from a count, an `exact_sum` and an `exact_squares`."""
    return root(Fraction(count * squares - total * total, (count << UNIT) ** 2)) if count else 0.0


def root(value: Fraction) -> float:
    """Square root of a fraction ≥ 0, to the nearest double, even if the fraction itself does not fit into a double."""
    shift = max(0, 132 - value.numerator.bit_length() + value.denominator.bit_length()) & ~1
    scaled, rest = divmod(value.numerator << shift, value.denominator)
    found = math.isqrt(scaled)
    # The last of some 65 bits is set if there is a remainder, so that rounding to 53 bits rounds the root.
    inexact = bool(rest) or found * found != scaled
    return float(Fraction(found << 1 | inexact, 2 << shift // 2))


def _positions(keys: Ints) -> tuple[Ints, Ints]:
    """Distinct `keys`, and for each row the position of its key among them. Small keys need no sort."""
    if len(keys) and int(keys.max()) > 4 * len(keys) + 4096:
        distinct, position = np.unique(keys, return_inverse=True)
        return distinct, position
    seen = np.bincount(keys) > 0
    return np.flatnonzero(seen), (np.cumsum(seen) - 1)[keys]


def as_fraction(total: int) -> Fraction:
    """What `exact_sum` counted, as a number."""
    return Fraction(total, 1 << UNIT)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Count, exact sum, exact sum of squares (see `exact_sum`, `exact_squares`), least and greatest of known values."""

    count: int = 0
    total: int = 0
    squares: int = 0
    least: float = float("inf")
    greatest: float = float("-inf")

    @classmethod
    def of(cls, values: Floats) -> Moments:
        """The moments of the doubles that are not NaN."""
        known = values[~np.isnan(values)]
        if not len(known):
            return cls()
        # Of 0.0 and −0.0, which are equal, the order of rows would choose the sign: + 0.0 makes both 0.0.
        least, greatest = float(known.min()) + 0.0, float(known.max()) + 0.0
        return cls(len(known), exact_sum(known), exact_squares(known), least, greatest)

    @classmethod
    def of_integers(cls, values: Ints) -> Moments:
        """The moments of 64-bit integers; least and greatest are integers too."""
        if not len(values):
            return cls()
        total, squares = integer_sums(values)
        return cls(len(values), total << UNIT, squares << 2 * UNIT, int(values.min()), int(values.max()))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.total + other.total,
            self.squares + other.squares,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
        )

    @property
    def exact_mean(self) -> Fraction:
        """The exact mean; 0 if there are no values."""
        return as_fraction(self.total) / self.count if self.count else Fraction(0)

    @property
    def mean(self) -> float:
        """The mean, rounded once; 0 if there are no values."""
        return float(self.exact_mean)

    @property
    def deviation(self) -> float:
        """Population standard deviation; 0 where there is no value."""
        return deviation(self.count, self.total, self.squares)


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
    counts: Ints
    shift: int
    limit: int

    @classmethod
    def empty(cls, limit: int, counters: int = 1) -> Bins:
        return cls(np.empty(0, np.uint64), np.empty((0, counters), np.int64), 0, limit)

    @classmethod
    def of_integers(cls, values: Ints, limit: int) -> Bins:
        """Bins of 64-bit integers by their own bits, so that those beyond 2^53 stay apart; see `integer_quantiles`."""
        keys = np.ascontiguousarray(values).view(np.uint64) ^ _SIGN
        return _summed(keys, np.ones((len(keys), 1), np.int64), 0, limit)

    @classmethod
    def of(cls, values: Floats, limit: int, weights: Ints | None = None) -> Bins:
        """Bins of the values that are not NaN; `weights` int64 [rows, counters] counts each row so many times."""
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
        values = self.values
        at = list(at)
        found = [(float(values[low]), float(values[high]), share) for low, high, share in self._between(at)]
        return [_interpolated(*each) for each in found] or [0.0] * len(at)

    def integer_quantiles(self, at: Iterable[float]) -> list[Fraction]:
        """As `quantiles`, exactly, of what `of_integers` counted without dropping bits."""
        values = (self.keys ^ _SIGN).view(np.int64)
        found = [(int(values[low]), int(values[high]), share) for low, high, share in self._between(at)]
        return [first + (second - first) * share for first, second, share in found]

    def _between(self, at: Iterable[float]) -> list[tuple[int, int, Fraction]]:
        """Returns per quantile the two bins around it and its share of the way from the first to the second.

        Returns nothing if there are no values.
        """
        running = np.cumsum(self.counts[:, 0])
        if not len(running) or not running[-1]:
            return []
        last, result = int(running[-1]) - 1, []
        for position in (Fraction(share) * last for share in at):
            low = int(position)
            first, second = (int(np.searchsorted(running, rank, "right")) for rank in (low, min(low + 1, last)))
            result.append((first, second, position - low))
        return result


def _interpolated(first: float, second: float, share: Fraction) -> float:
    """Returns first + (second − first) · share, rounded once.

    Rounding each step loses values near 0, and overflows between opposite extremes.
    """
    if first == second:
        return first
    if not (math.isfinite(first) and math.isfinite(second)):
        return first + (second - first) * float(share)
    return float(Fraction(first) + (Fraction(second) - Fraction(first)) * share)


def merged(parts: Iterable[Bins], limit: int, counters: int = 1) -> Bins:
    """All `parts` in one."""
    total = Bins.empty(limit, counters)
    for part in parts:
        total = total + part
    return total


def _summed(keys: Keys, counts: Ints, shift: int, limit: int) -> Bins:
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


def _distinct(keys: Keys, counts: Ints) -> tuple[Keys, Ints]:
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
