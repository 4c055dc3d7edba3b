"""Exact sums of windows of a column, as fixed-point digits of 32 bits (a superaccumulator, Kulisch; Neal 2015).

`exact_sums` adds whole columns and groups to Python integers. Here a sum per window is needed, so a window's digits are
differences of prefix sums, for all windows at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from transforms.records.arrays import Floats, Ints

# Values of a statistic: int64 or float64, by the statistic.
Numbers = npt.NDArray[Any]
# Exponent of two to one digit per window.
Digits = dict[int, Ints]

# A digit holds 32 bits, which leaves 31 for the sum of a window: 2 billion of the largest digits.
DIGIT = 32
_LOWEST, _HIGHEST = -1088, 992


class ExactSum:
    """Prefix sums of `values` as fixed-point digits of 32 bits: any window's sum is exact."""

    def __init__(self, *parts: Floats) -> None:
        self.prefix = {unit: _prefix(digit) for unit, digit in decompose(*parts).items()}

    def digits(self, lo: Ints, hi: Ints) -> Digits:
        """Sum per window as digits, carries not resolved: adding the digits of two windows adds their sums."""
        return {unit: prefix[hi] - prefix[lo] for unit, prefix in self.prefix.items()}

    def total(self, lo: Ints, hi: Ints) -> Floats:
        """Sum per window, float64."""
        return window_sum(self.digits(lo, hi), len(lo))


def _canonical(digits: Digits) -> list[Floats]:
    """Digits with carries resolved, least significant first, scaled: equal sums have equal digits."""
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


def window_sum(digits: Digits, rows: int) -> Floats:
    """Sum per window, correctly rounded to float64, as `math.fsum` rounds it."""
    parts = _canonical(digits)
    if len(parts) <= 2:  # one addition rounds once
        return sum(parts, np.zeros(rows))
    high, low = _paired(parts, rows)
    return high + low


def pair(digits: Digits, rows: int) -> tuple[Floats, Floats]:
    """Sum per window as an unevaluated sum of two float64 (106 bits)."""
    return _two_sum(*_paired(_canonical(digits), rows))


def window_variance(n: Ints, sums: Digits, squares: Digits, extreme: Callable[[Ints, bool], Floats]) -> Floats:
    """Unbiased variance (n − 1) of windows of `n` ≥ 2 values, from the digits of Σx and Σx².

    `extreme` gives the least (or largest) values of the windows that are passed to it.
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
    # Where cancellation leaves fewer than 40 good bits, the window is constant, or is computed in integers, which is
    # rare.
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
    """values · 2**exponent. `ldexp` is slower; it is used for powers that do not fit into a float64."""
    return values * 2.0**exponent if abs(exponent) < 1000 else np.ldexp(values, exponent)


def _prefix(digit: Ints) -> Ints:
    result = np.zeros(len(digit) + 1, np.int64)
    np.cumsum(digit, out=result[1:])
    return result


def _halves(total: Ints, unit: int) -> list[tuple[int, Floats]]:
    """The most significant digit, split in two where it has more bits than a float64."""
    if not len(total) or max(abs(int(total.max())), abs(int(total.min()))) < 2**53:
        return [(unit, total.astype(np.float64))]
    carry = (total + (1 << (DIGIT - 1))) >> DIGIT
    return [(unit, (total - (carry << DIGIT)).astype(np.float64)), (unit + DIGIT, carry.astype(np.float64))]


def decompose(*parts: Floats) -> Digits:
    """For each value, the digits of the sum of its `parts`."""
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
