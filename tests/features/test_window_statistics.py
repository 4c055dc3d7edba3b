"""Every statistic of a window equals the slow, obvious value, and depends on nothing but the window's values."""

import math
import random
import time
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.features import STATISTICS
from tests.support import oracles
from transforms.features.window_statistics import Column, SparseTable, WaveletMatrix, statistic
from transforms.records.window_sums import ExactSum

NUMERIC = (*STATISTICS, "q01", "q05", "q50", "q95", "q99")
EXACT = [stat for stat in NUMERIC if stat not in ("var", "std")]
OF_VALUES = [stat for stat in NUMERIC if stat not in ("first", "last")]
LARGEST = 3.4028234663852886e38

any_size = st.floats(-LARGEST, LARGEST, allow_nan=False)
money = st.integers(-(10**9), 10**9).map(lambda cents: cents / 100)
awkward = st.sampled_from(
    [0.0, -0.0, 5e-324, -5e-324, 1e-310, 1e-30, 0.1, 1.0, -1.0, 2.0**53, 2.0**-53, LARGEST, -LARGEST, 16777217.0]
)
numbers = st.one_of(
    st.lists(st.none() | any_size, max_size=40),
    st.lists(st.none() | money, max_size=40),
    st.lists(st.none() | awkward, max_size=40),
    st.lists(any_size | money | awkward, max_size=40),
    st.lists(st.none() | st.integers(-3, 3).map(float), max_size=40),
    st.builds(lambda value, times: [value] * times, any_size | money, st.integers(0, 40)),
)


@st.composite
def windowed(
    draw: st.DrawFn, values: st.SearchStrategy[list[Any]] = numbers
) -> tuple[list[Any], list[tuple[int, int]]]:
    """A column and windows over it, empty ones among them."""
    column = draw(values)
    bound = st.integers(0, len(column))
    windows = draw(st.lists(st.tuples(bound, bound).map(sorted), min_size=1, max_size=8))
    return column, [(lo, hi) for lo, hi in windows]


def feature_rows(values: list[Any], windows: list[tuple[int, int]], stat: str) -> list[Any]:
    """What `statistic` returns, None where there is no value."""
    valid = np.array([value is not None for value in values], np.bool_)
    column = Column(np.array([0.0 if value is None else value for value in values], np.float64), valid)
    lo, hi = (np.array([window[side] for window in windows], np.int64) for side in (0, 1))
    found, known = statistic(column, stat, lo, hi)
    if stat in ("first", "last"):
        return [values[row] if ok else None for row, ok in zip(found, known, strict=True)]
    return [float(value) if ok else None for value, ok in zip(found, known, strict=True)]


def bits(values: list[Any]) -> list[Any]:
    return [None if value is None else float(value).hex() for value in values]


@pytest.mark.parametrize("stat", EXACT)
@given(case=windowed())
@example(case=([16777216.0, 1.0, 1e-9], [(0, 2), (0, 3)]))
@example(case=([2.0**53, 1.0, 2.0**-60], [(0, 2), (0, 3)]))  # half a unit, and just above
@example(case=([1e38, 1.0, -1e38], [(0, 3)]))
@example(case=([-0.0, 0.0], [(0, 1), (0, 2), (1, 2)]))
@example(case=([2489.26, 1798276.84, 3266269.4], [(0, 3)]))  # a digit that is just half of its unit
@example(case=([0.1, 0.2, 0.003], [(0, 3)]))
def test_a_statistic_is_that_of_its_window_to_the_last_bit(
    stat: str, case: tuple[list[Any], list[tuple[int, int]]]
) -> None:
    values, windows = case
    expected = [oracles.statistic(stat, values[lo:hi]) for lo, hi in windows]
    assert feature_rows(values, windows, stat) == expected


@given(case=windowed())
@example(case=([1e15, 1e15 + 1], [(0, 2)]))
@example(case=([1e15 + 0.125, 1e15, 1e15 + 1], [(0, 3)]))
@example(case=([3e38, 1e-30, -3e38], [(0, 2), (0, 3)]))
@example(case=([0.1, 0.1, 0.1], [(0, 3)]))
def test_variance_is_that_of_exact_arithmetic(case: tuple[list[Any], list[tuple[int, int]]]) -> None:
    values, windows = case
    for (lo, hi), var, std in zip(
        windows, feature_rows(values, windows, "var"), feature_rows(values, windows, "std"), strict=True
    ):
        exact = [Fraction(value) for value in values[lo:hi] if value is not None]
        if len(exact) < 2:
            assert var is None
            assert std is None
            continue
        mean = sum(exact) / len(exact)
        expected = float(sum((value - mean) ** 2 for value in exact) / (len(exact) - 1))
        assert math.isclose(var, expected, rel_tol=1e-12, abs_tol=1e-290)
        assert math.isclose(std, math.sqrt(expected), rel_tol=1e-12, abs_tol=1e-145)


@given(case=windowed())
def test_the_variance_of_equal_values_is_zero(case: tuple[list[Any], list[tuple[int, int]]]) -> None:
    values, windows = case
    for (lo, hi), var in zip(windows, feature_rows(values, windows, "var"), strict=True):
        if len({value for value in values[lo:hi] if value is not None}) == 1 and var is not None:
            assert var == 0.0


@pytest.mark.parametrize("stat", OF_VALUES)
@given(case=windowed(), seed=st.integers(0, 2**32))
def test_the_order_of_arrival_changes_no_bit(
    stat: str, case: tuple[list[Any], list[tuple[int, int]]], seed: int
) -> None:
    values, _ = case
    shuffled = random.Random(seed).sample(values, len(values))
    whole = [(0, len(values))]
    assert bits(feature_rows(shuffled, whole, stat)) == bits(feature_rows(values, whole, stat))


@pytest.mark.parametrize("stat", NUMERIC)
@given(case=windowed(), before=numbers, after=numbers)
@example(case=([2.0**53, 1.0, 2.0**-60], [(0, 3)]), before=[3e38, 1e-300], after=[-3e38])
def test_history_outside_the_window_changes_no_bit(
    stat: str, case: tuple[list[Any], list[tuple[int, int]]], before: list[Any], after: list[Any]
) -> None:
    values, windows = case
    shifted = [(lo + len(before), hi + len(before)) for lo, hi in windows]
    assert bits(feature_rows([*before, *values, *after], shifted, stat)) == bits(feature_rows(values, windows, stat))


@pytest.mark.parametrize("stat", NUMERIC)
@given(case=windowed())
def test_a_window_computed_alone_gives_the_same_bits(stat: str, case: tuple[list[Any], list[tuple[int, int]]]) -> None:
    values, windows = case
    alone = [feature_rows(values[lo:hi], [(0, hi - lo)], stat)[0] for lo, hi in windows]
    assert bits(feature_rows(values, windows, stat)) == bits(alone)


POOLS = {
    "money": lambda random, rows: random.integers(-(10**9), 10**9, rows) / 100,
    "small money": lambda random, rows: random.integers(-500, 500, rows) / 100,
    "halves and specks": lambda random, rows: (
        random.integers(-(2**20), 2**20, rows) / 2 + random.choice([0, 2.0**-62, -(2.0**-62), 2.0**-40], rows)
    ),
    "noise": lambda random, rows: random.normal(size=rows),
    "magnitudes": lambda random, rows: np.ldexp(random.random(rows) - 0.5, random.integers(-120, 120, rows)),
    "around digits": lambda random, rows: (
        random.choice([-1.0, 1.0], rows) * 2.0 ** random.choice([-65, -64, -33, -32, -31, -1, 0, 31, 32, 33], rows)
    ),
}


@pytest.mark.parametrize("pool", POOLS)
def test_twenty_thousand_sums_are_those_of_fsum(pool: str) -> None:
    random = np.random.default_rng(5)
    rows = 20_000
    values = POOLS[pool](random, rows)
    lo = random.integers(0, rows, rows)
    hi = np.minimum(lo + random.integers(0, 30, rows), rows)
    found, _ = statistic(Column(values, None), "sum", lo, hi)
    expected = [math.fsum(values[a:b]) for a, b in zip(lo, hi, strict=True)]
    assert found.tolist() == expected


@given(values=st.lists(money, min_size=1, max_size=30))
def test_a_float32_of_money_is_that_of_the_exact_sum(values: list[float]) -> None:
    exact = float(sum(map(Fraction, values)))
    assert np.float32(feature_rows(values, [(0, len(values))], "sum")[0]) == np.float32(exact)


@given(values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=30))
def test_whole_numbers_of_any_size_are_distinguished(values: list[int]) -> None:
    column = Column(np.array(values, np.int64), None)
    lo, hi = np.array([0]), np.array([len(values)])
    assert statistic(column, "n_unique", lo, hi)[0][0] == len(set(values))


def test_sums_of_more_rows_than_a_digit_has_room_for() -> None:
    rows = 2**23 + 2**10
    total = ExactSum(np.full(rows, 2.0**40 - 1)).total(np.array([0, 1]), np.array([rows, 2]))
    assert total.tolist() == [float(rows * (2**40 - 1)), 2.0**40 - 1]


def test_many_long_constant_windows_cost_no_pass_over_each() -> None:
    """Four times the rows, so sixteen times the rows of all windows, take at most eight times the processor time."""

    def seconds(rows: int) -> float:
        column, hi = Column(np.zeros(rows), None), np.arange(2, rows)
        began = time.process_time()
        assert not column.variance(np.zeros(rows - 2, np.int64), hi).any()
        return time.process_time() - began

    small = min(seconds(50_000) for _ in range(3))
    assert min(seconds(200_000) for _ in range(3)) < 8 * small


@pytest.mark.parametrize("stat", NUMERIC)
@pytest.mark.parametrize("values", [[], [None], [None, None, None]])
def test_a_window_without_values_has_counts_of_zero_and_null_for_the_rest(stat: str, values: list[None]) -> None:
    expected = 0.0 if stat in ("count", "n_unique") else None
    assert feature_rows(list(values), [(0, len(values)), (0, 0)], stat) == [expected, expected]


def brute(values: list[float], windows: list[tuple[int, int]], of: Callable[[list[float]], float]) -> list[float]:
    return [of(values[lo:hi]) for lo, hi in windows]


@given(
    values=st.lists(st.integers(0, 1000).map(float), min_size=1, max_size=70),
    data=st.data(),
    largest=st.booleans(),
)
def test_extremes_of_windows_of_any_length(values: list[float], data: st.DataObject, largest: bool) -> None:
    starts = data.draw(st.lists(st.integers(0, len(values) - 1), min_size=1, max_size=5))
    windows = [(lo, data.draw(st.integers(lo + 1, len(values)))) for lo in starts]
    lo, hi = (np.array([window[side] for window in windows]) for side in (0, 1))
    table = SparseTable(np.array(values), int((hi - lo).max()), largest)
    assert table(lo, hi).tolist() == brute(values, windows, max if largest else min)


@given(codes=st.lists(st.integers(0, 40), min_size=1, max_size=60), data=st.data())
def test_order_statistics_and_ranks_of_any_window(codes: list[int], data: st.DataObject) -> None:
    lo = data.draw(st.integers(0, len(codes) - 1))
    hi = data.draw(st.integers(lo + 1, len(codes)))
    k, bound = data.draw(st.integers(0, hi - lo - 1)), data.draw(st.integers(0, 70))
    matrix = WaveletMatrix(np.array(codes))
    one = [np.array([value]) for value in (lo, hi, k, bound)]
    assert matrix.kth(*one[:3])[0] == sorted(codes[lo:hi])[k]
    assert matrix.below(*one[:2], one[3])[0] == sum(code < bound for code in codes[lo:hi])
