"""A sketch of a column of numbers: counts by leading bits, and exact sums. Parts can be merged in any order with the
same result.

Values are counted in bins: the doubles that round to float32s of equal sign, exponent and 9 leading mantissa bits.
Within a bin only the 14 low bits differ, so a few passes over integers give its count, the sum of the low bits and of
their squares; from these come mean and variance without rounding, and the mean of each bin, which stands for its
values in quantiles.  A quantile has its exact rank and lies within 2⁻⁹ of its value, relatively; values of a bin that
are all equal (integers up to 1 024, repeated values) are exact.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from transforms.records import exact_sums
from transforms.records.arrays import Floats, Ints, UInt64s
from transforms.records.exact_sums import UNIT, as_fraction, exact_squares, exact_sum, integer_sums

Singles = npt.NDArray[np.float32]
Words = npt.NDArray[np.uint32]

LOW = 14
BUCKETS = 1 << (32 - LOW)
_LOW_BITS = np.uint32((1 << LOW) - 1)
_SIGN = BUCKETS >> 1
_PREFIX = 23 - LOW  # leading mantissa bits of a value that identify its bin
_NOT_FINITE = 255 << _PREFIX
_LARGEST = float(np.finfo(np.float32).max)
# Rows that are processed at once.  Their low bits, each with a leading one that counts it, are added as doubles, which
# have 53 bits; so are the squares of low bits, of 28 bits each.
MOST_ROWS = 1 << 19
_ONE = float(MOST_ROWS << LOW)
FEW = BUCKETS // 16
# `exact_sums.exact_sum` counts in 2^−UNIT, `exact_sums.exact_squares` in 2^−(2 · UNIT); a float32 is a multiple of
# 2^−149, its square of 2^−298.
_SUM, _SQUARE = UNIT - 149, 2 * (UNIT - 149)
# Integers up to this one are exact both as float32 and as double.
_WHOLE = 1 << 24


@dataclasses.dataclass(frozen=True, eq=False)
class NumericSketch:
    """The sketch of a column of numbers.

    Args:
        rows: number of rows.
        missing: number of nulls.
        strange: number of NaN and infinities, which are not in any of the fields below.
        zeros: number of values equal to 0.
        least, greatest: ±infinity if there is no value.
        total, squares: Σx in 2^−1126 and Σx² in 2^−2252, exact.
        bins: the bins that occurred, ascending by value [bins].
        counts: values per bin [bins].
        lows: sum of the low bits per bin [bins].
    """

    rows: int = 0
    missing: int = 0
    strange: int = 0
    zeros: int = 0
    least: float = float("inf")
    greatest: float = float("-inf")
    total: int = 0
    squares: int = 0
    bins: Ints = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    counts: Ints = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))
    lows: Ints = dataclasses.field(default_factory=lambda: np.empty(0, np.int64))

    @classmethod
    def of(cls, column: pa.Array) -> NumericSketch:
        """The sketch of an Arrow array of floats, integers or booleans."""
        result = cls()
        for start in range(0, len(column), MOST_ROWS):
            result = result + _numbers(column.slice(start, MOST_ROWS))
        return result

    def __add__(self, other: NumericSketch) -> NumericSketch:
        if not other.rows or not self.rows:
            return self if self.rows else other
        bins, position = np.unique(np.concatenate([self.bins, other.bins]), return_inverse=True)
        counts, lows = np.zeros(len(bins), np.int64), np.zeros(len(bins), np.int64)
        for part, at in ((self, position[: len(self.bins)]), (other, position[len(self.bins) :])):
            counts[at] += part.counts
            lows[at] += part.lows
        return NumericSketch(
            self.rows + other.rows,
            self.missing + other.missing,
            self.strange + other.strange,
            self.zeros + other.zeros,
            min(self.least, other.least),
            max(self.greatest, other.greatest),
            self.total + other.total,
            self.squares + other.squares,
            bins,
            counts,
            lows,
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NumericSketch) and all(
            np.array_equal(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def values(self) -> int:
        """Number of finite values."""
        return self.rows - self.missing - self.strange

    @property
    def mean(self) -> float:
        return float(as_fraction(self.total) / self.values)

    @property
    def deviation(self) -> float:
        """Population standard deviation."""
        return exact_sums.deviation(self.values, self.total, self.squares)

    @property
    def interiors(self) -> Floats:
        """Mean of each bin's values."""
        names = self.bins
        negative = names < 0
        bits = np.where(negative, -names - 1, names)
        exponent, prefix = _parts(bits)
        interior = np.ldexp((prefix << LOW) + self.lows / self.counts, exponent - 149)
        return np.clip(np.where(negative, -interior, interior), self.least, self.greatest)

    def ranked(self, ranks: Ints) -> Floats:
        """The values at these ranks, which are counted from 0."""
        found = self.interiors[np.searchsorted(np.cumsum(self.counts), ranks, "right")]
        return np.where(ranks == 0, self.least, np.where(ranks == self.values - 1, self.greatest, found))

    @property
    def median(self) -> float:
        last = self.values - 1
        return float(self.ranked(np.array([last // 2, last - last // 2])).mean())


def _numbers(column: pa.Array) -> NumericSketch:
    rows, missing = len(column), column.null_count
    if missing == rows:
        return NumericSketch(rows, missing)
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.uint8())
    whole = column.drop_null().to_numpy() if pa.types.is_integer(column.type) else None
    if whole is not None and _lie_close(whole):
        return _counted_integers(rows, whole)
    # Arrow converts nulls to NaN; counting shows how many NaN are not nulls.
    raw = column.to_numpy(zero_copy_only=False)
    single = raw if raw.dtype == np.float32 else _rounded(raw.astype(np.float64))
    words = np.ascontiguousarray(single).view(np.uint32)
    low, names = words & _LOW_BITS, (words >> np.uint32(LOW)).astype(np.int64)
    found, count, low_sums, squared = _by_bin(names, low.astype(np.float64))
    finite = found & (_SIGN - 1) < _NOT_FINITE
    strange = int(count[~finite].sum()) - missing
    if not finite.any():
        return NumericSketch(rows, missing, strange)
    if not finite.all():
        found, count, low_sums, squared = (each[finite] for each in (found, count, low_sums, squared))
    ordered = _named(found)
    if whole is not None and (int(whole.min()) < -_WHOLE or int(whole.max()) > _WHOLE):
        whole = whole.astype(np.int64)
        least, greatest = float(whole.min()), float(whole.max())
        total, squares = integer_sums(whole)
        total, squares = total << UNIT, squares << 2 * UNIT
    elif raw.dtype == np.float32 or np.array_equal(single, raw, equal_nan=True):
        total, squares = _moments(found, count, low_sums, squared)
        least, greatest = (_extreme(names, low, found[at(ordered)], at is np.argmax) for at in (np.argmin, np.argmax))
    else:
        wide = raw[np.isfinite(raw)].astype(np.float64)
        total, squares, least, greatest = exact_sum(wide), exact_squares(wide), float(wide.min()), float(wide.max())
    zeros = int(np.count_nonzero(words << np.uint32(1) == 0)) if np.isin(found, (0, _SIGN)).any() else 0
    order = np.argsort(ordered)
    return NumericSketch(
        rows, missing, strange, zeros, least, greatest, total, squares, ordered[order], count[order], low_sums[order]
    )


def _by_bin(names: Ints, lows: Floats) -> tuple[Ints, Ints, Ints, Ints]:
    """The bins that occurred; for each, its count, the sum of the low bits, and the sum of their squares."""
    # For few rows, an array of all bins would cost more.
    bins, position = (None, names) if len(names) > FEW else np.unique(names, return_inverse=True)
    squares = np.bincount(position, lows * lows)
    lows += _ONE  # so that one pass both adds and counts
    both = np.bincount(position, lows)
    there = np.flatnonzero(both > 0)
    counts = (both[there] / _ONE).astype(np.int64)
    low_sums = (both[there] - counts * _ONE).astype(np.int64)
    return there if bins is None else bins, counts, low_sums, squares[there].astype(np.int64)


def _lie_close(whole: Ints | UInt64s) -> bool:
    """Whether integers are exact as float32 and lie close enough to be counted by value."""
    least, greatest = int(whole.min()), int(whole.max())
    return least >= -_WHOLE and greatest <= _WHOLE and greatest - least <= max(len(whole), FEW)


def _counted_integers(rows: int, whole: Ints | UInt64s) -> NumericSketch:
    """The sketch of integers that lie close: it follows from how often each value occurs."""
    least = int(whole.min())
    times = np.bincount(whole.astype(np.int64) - least)
    distinct = np.flatnonzero(times)
    times, values = times[distinct], distinct + least
    words = values.astype(np.float32).view(np.uint32)
    bins, first = np.unique(_named((words >> np.uint32(LOW)).astype(np.int64)), return_index=True)
    # Values ascend, and so do their bins.
    counts = np.add.reduceat(times, first)
    lows = np.add.reduceat((words & _LOW_BITS).astype(np.int64) * times, first)
    # A square has 49 bits, which times a count may be too many for one sum.
    high, low = values * values >> 24, values * values & _WHOLE - 1
    return NumericSketch(
        rows,
        rows - len(whole),
        0,
        int(times[values == 0].sum()),
        float(values[0]),
        float(values[-1]),
        int((values * times).sum()) << UNIT,
        (int((high * times).sum()) << 24) + int((low * times).sum()) << 2 * UNIT,
        bins,
        counts,
        lows,
    )


def _rounded(wide: Floats) -> Singles:
    """The nearest float32s. Values beyond float32 become its greatest value; infinities stay."""
    return np.where(np.isinf(wide), wide, np.clip(wide, -_LARGEST, _LARGEST)).astype(np.float32)


def _named(found: Ints) -> Ints:
    """Numbers bins so that the numbers ascend with the values: −1 − magnitude for negative ones."""
    return np.where(found & _SIGN, -1 - (found & (_SIGN - 1)), found)


def _parts(bits: Ints) -> tuple[Ints, Ints]:
    """Exponent (in powers above 2^−149) and leading mantissa bits of the bins' magnitudes."""
    field = bits >> _PREFIX
    prefix = bits & ((1 << _PREFIX) - 1)
    return np.maximum(field, 1) - 1, np.where(field > 0, prefix | 1 << _PREFIX, prefix)


def _moments(found: Ints, count: Ints, low_sums: Ints, squared: Ints) -> tuple[int, int]:
    """Σx and Σx² in 2^−1126 from the bins' counts and the sums of their low bits and of those squared."""
    exponent, prefix = _parts(found & (_SIGN - 1))
    sign = np.where(found & _SIGN, -1, 1)
    columns = [sign * ((prefix * count << LOW) + low_sums), prefix * prefix * count, 2 * prefix * low_sums, squared]
    by_exponent = np.zeros((4, 255), np.int64)
    for row, column in zip(by_exponent, columns, strict=True):
        np.add.at(row, exponent, column)
    total = squares = 0
    for power in np.unique(exponent).tolist():
        linear, both, one, none = (int(value) for value in by_exponent[:, power])
        total += linear << power
        squares += ((both << 2 * LOW) + (one << LOW) + none) << 2 * power
    return total << _SUM, squares << _SQUARE


def _extreme(names: Ints, low: Words, name: int, largest: bool) -> float:
    """The least or greatest value among the bins that have values."""
    inside = low[names == name]
    outward = largest != bool(name & _SIGN)
    bits = int(name) << LOW | int(inside.max() if outward else inside.min())
    return float(np.uint32(bits).view(np.float32)) + 0.0
