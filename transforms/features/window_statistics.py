"""Statistics of contiguous windows of a sorted column, vectorised, each a function of the window's multiset alone.

A value must not depend on the history, the block or the arrival order that led to it, to the last bit. So nothing here
slides or accumulates in floating point:

- sums are differences of integer prefix sums over fixed-point digits (a superaccumulator, Kulisch; Neal 2015). They are
  exact and associative, and are rounded once;
- min and max come from a sparse table (Bender & Farach-Colton 2000);
- quantiles and distinct counts from a wavelet matrix (Claude, Navarro & Ordóñez 2015).

Shapes: `values` has n elements, `lo` and `hi` (int64) have one per window, and a window is `values[lo:hi]`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# Exponent of two to one digit per window.
Digits = dict[int, Ints]

# A digit holds 32 bits, which leaves 31 for the sum of a window: 2 billion of the largest digits.
DIGIT = 32
_LOWEST, _HIGHEST = -1088, 992


class Once:
    """Values computed on first use by one thread, while other threads that want the same value wait."""

    def __init__(self) -> None:
        self._made: dict[Any, Any] = {}
        self._locks: dict[Any, threading.Lock] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            with self._locks.setdefault(key, threading.Lock()):
                if key not in self._made:
                    self._made[key] = make()
        return self._made[key]


class lazy:
    """An attribute computed on first use.

    Unlike `functools.cached_property` (before 3.12), each has its own lock, so that threads that work on different
    columns do not wait for each other.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make, self.name = make, make.__name__
        self.__doc__ = make.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Any:
        if owner is None:
            return self
        once = owner.__dict__.setdefault("_once", Once())
        value = owner.__dict__[self.name] = once.get(self.name, lambda: self.make(owner))
        return value


class ExactSum:
    """Prefix sums of `values` as fixed-point digits of 32 bits: any window's sum is exact."""

    def __init__(self, *parts: Floats) -> None:
        self.prefix = {unit: _prefix(digit) for unit, digit in decompose(*parts).items()}

    def digits(self, lo: Ints, hi: Ints) -> Digits:
        """Sum per window as digits, carries not resolved: adding the digits of two windows adds their sums."""
        return {unit: prefix[hi] - prefix[lo] for unit, prefix in self.prefix.items()}

    def total(self, lo: Ints, hi: Ints) -> Floats:
        """Sum per window, float64."""
        return total(self.digits(lo, hi), len(lo))


def _canonical(digits: Digits) -> list[Floats]:
    """Digits with carries resolved, least first, scaled: one representation per exact sum."""
    result: list[tuple[int, Floats]] = []
    carry: Ints | int = 0
    # Every unit between the least and the greatest, so that a carry always has a place.
    units = range(min(digits), max(digits) + 1, DIGIT) if digits else range(0)
    for unit in units:
        total = digits[unit] + carry if unit in digits else np.asarray(carry) + np.zeros_like(digits[units[0]])
        if unit == units[-1]:
            result += _halves(total, unit)
            break
        carry = (total + (1 << (DIGIT - 1))) >> DIGIT
        result.append((unit, (total - (carry << DIGIT)).astype(np.float64)))
    return [_scaled(digit, unit) for unit, digit in result]


def total(digits: Digits, rows: int) -> Floats:
    """Sum per window, correctly rounded to float64, as `math.fsum` rounds it."""
    parts = _canonical(digits)
    if len(parts) <= 2:  # one addition rounds once
        return sum(parts, np.zeros(rows))
    high, low = _paired(parts, rows)
    return high + low


def pair(digits: Digits, rows: int) -> tuple[Floats, Floats]:
    """Sum per window as an unevaluated sum of two float64 (106 bits)."""
    return _two_sum(*_paired(_canonical(digits), rows))


def variance(n: Ints, sums: Digits, squares: Digits, extreme: Callable[[Ints, bool], Floats]) -> Floats:
    """Unbiased variance (n − 1) of windows of `n` ≥ 2 values, from the digits of Σx and Σx².

    `extreme` gives the least (or largest) values of the windows it is asked for.
    """
    count = n.astype(np.float64)
    sum_high, sum_low = pair(sums, len(n))
    square_high, square_low = pair(squares, len(n))
    # n·Σx² − (Σx)², each to 106 bits.
    a, a_error = _two_product(count, square_high)
    a_error += count * square_low
    b, b_error = _two_product(sum_high, sum_high)
    b_error += 2 * sum_high * sum_low
    spread = (a - b) + (a_error - b_error)
    # Where cancellation leaves fewer than 40 good bits the window is constant, or is one of the few done in integers.
    doubtful = np.flatnonzero(spread <= np.ldexp(np.abs(a), -60))
    varied = doubtful[extreme(doubtful, False) < extreme(doubtful, True)]
    spread[doubtful] = 0.0
    for i in varied:
        spread[i] = float(int(n[i]) * _exact(squares, i) - _exact(sums, i) ** 2)
    return spread / count / (count - 1)


def _exact(digits: Digits, i: np.int64) -> Fraction:
    return sum((Fraction(int(digit[i])) * Fraction(2) ** unit for unit, digit in digits.items()), Fraction(0))


def _paired(parts: list[Floats], rows: int) -> tuple[Floats, Floats]:
    """Returns Σ parts (least first) as high + low.

    Low is rounded to odd, so that rounding high + low rounds the sum correctly (Boldo & Melquiond 2008).
    """
    if not parts:
        return np.zeros(rows), np.zeros(rows)
    high, low = parts[-1], None
    for part in reversed(parts[:-1]):
        high, error = _two_sum(high, part)
        if low is None:
            low = error
            continue
        low, lost = _two_sum(low, error)
        even = np.flatnonzero((lost != 0) & (low.view(np.int64) & 1 == 0))
        low[even] = np.nextafter(low[even], np.copysign(np.inf, lost[even]))
    return high, np.zeros(rows) if low is None else low


def _scaled(values: Floats, exponent: int) -> Floats:
    """values · 2**exponent; ldexp is the slower way, for powers that are no float64."""
    return values * 2.0**exponent if abs(exponent) < 1000 else np.ldexp(values, exponent)


def _prefix(digit: Ints) -> Ints:
    result = np.zeros(len(digit) + 1, np.int64)
    np.cumsum(digit, out=result[1:])
    return result


def _halves(total: Ints, unit: int) -> list[tuple[int, Floats]]:
    """A greatest digit, split where it has more bits than a float64."""
    if not len(total) or max(abs(int(total.max())), abs(int(total.min()))) < 2**53:
        return [(unit, total.astype(np.float64))]
    carry = (total + (1 << (DIGIT - 1))) >> DIGIT
    return [(unit, (total - (carry << DIGIT)).astype(np.float64)), (unit + DIGIT, carry.astype(np.float64))]


def decompose(*parts: Floats) -> Digits:
    """Per value the digits of the sum of its `parts`."""
    digits: Digits = {}
    for values in parts:
        for unit, digit in _digits(values):
            digits[unit] = digits[unit] + digit if unit in digits else digit
    return digits


def squared(values: Floats) -> tuple[Floats, Floats]:
    """x² and its rounding error."""
    return _two_product(values, values)


def _digits(values: Floats) -> list[tuple[int, Ints]]:
    """`values` as Σ digit · 2**unit, units multiples of 32, exactly; bits below 2**-1074 do not exist in float64."""
    if not len(values):
        return []
    rest = values
    _, exponents = np.frexp(np.abs(values).max())
    unit = min(_HIGHEST, DIGIT * math.floor((int(exponents) - 1) / DIGIT))
    result = []
    while unit >= _LOWEST:
        digit = np.trunc(_scaled(rest, -unit))
        if digit.any():
            result.append((unit, digit.astype(np.int64)))
            rest = rest - _scaled(digit, unit)
            if not rest.any():
                break
        unit -= DIGIT
    return result


def _two_sum(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """a + b and its rounding error (Knuth)."""
    total = a + b
    virtual = total - a
    return total, (a - (total - virtual)) + (b - virtual)


def _two_product(a: Floats, b: Floats) -> tuple[Floats, Floats]:
    """a · b and its rounding error (Dekker, Veltkamp splitting)."""
    product = a * b
    split = 134217729.0
    a_high = a * split - (a * split - a)
    b_high = b * split - (b * split - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


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
    """A sorted column's values that are values: nulls are taken out and windows mapped accordingly."""

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
        # Adding zero turns −0.0 into 0.0: which of the two a minimum picks would depend on order.
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
        """1 + the index of the same value's previous occurrence, 0 for none."""
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

        return variance(hi - lo, self.sums.digits(lo, hi), self.squares.digits(lo, hi), extreme)


def statistic(column: Column, stat: str, lo: Ints, hi: Ints) -> tuple[npt.NDArray[np.generic], Bools]:
    """`stat` per window and whether it has a value; for `first` and `last` the row that holds it.

    `lo` and `hi` are windows over all rows, nulls included.
    """
    lo, hi = column.bounds(lo, hi)
    length = hi - lo
    if stat == "count":
        return length, np.ones(len(lo), np.bool_)
    if stat == "n_unique":
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
    result[at] = _number(column, stat, some_lo, some_hi)
    return result, valid


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
