"""Statistics of one window's values, by their definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

# The definition promises 40 good bits of a variance before it is rounded to float32.
_VARIANCE = Fraction(1, 2**40)


def plain_statistic(stat: str, values: list[Any]) -> Any:
    """`stat` of the values, which are in order of time and without nulls; numbers are float64 if the statistic needs
    it."""
    if stat == "count":
        return len(values)
    if stat == "n_unique":
        return len(set(values))
    if not values:
        return None
    if stat in ("first", "last"):
        return values[0 if stat == "first" else -1]
    match stat:
        case "sum":
            return math.fsum(values)
        case "mean":
            return math.fsum(values) / len(values)
        case "min":
            return min(values)
        case "max":
            return max(values)
        case "median":
            ordered = sorted(values)
            return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        case _:
            return quantile(values, int(stat[1:]) / 100)


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between neighbours (type 7), from the nearer of the two, as NumPy rounds it."""
    ordered, at = sorted(values), (len(values) - 1) * q
    below = math.floor(at)
    a, b = ordered[below], ordered[min(below + 1, len(values) - 1)]
    t = at - below
    return a + (b - a) * t if t < 0.5 else b - (b - a) * (1 - t)


def exact_variance(numbers: list[float]) -> Fraction | None:
    """Exact unbiased variance (n − 1); None for fewer than two values."""
    n = len(numbers)
    if n < 2:
        return None
    # Every float64 is an integer over a power of two: with a common denominator, the sums are sums of integers.
    pairs = [number.as_integer_ratio() for number in numbers]
    unit = max(denominator for _, denominator in pairs)
    whole = [numerator * (unit // denominator) for numerator, denominator in pairs]
    return Fraction(n * sum(x * x for x in whole) - sum(whole) ** 2, n * (n - 1) * unit * unit)


def rounded(exact: Fraction, stat: str) -> float:
    """A variance, or its root, as float64."""
    return float(exact) if stat == "var" else math.sqrt(exact)


def variances_allowed(exact: Fraction, stat: str) -> tuple[np.float32, np.float32]:
    """The least and the greatest float32 to which a variance (or its root) with 40 good bits can round; usually they
    are equal."""
    with np.errstate(over="ignore"):
        return (
            np.float32(rounded(exact * (1 - _VARIANCE), stat)),
            np.float32(rounded(exact * (1 + _VARIANCE), stat)),
        )
