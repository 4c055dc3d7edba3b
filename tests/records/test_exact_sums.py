"""Exact sums and order-free histograms, against fractions and NumPy."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from transforms.records.exact_sums import Bins, Moments, as_fraction, exact_sum, group_sums

doubles = st.floats(allow_nan=False, allow_infinity=False)
singles = st.floats(allow_nan=False, allow_infinity=False, width=32)


@given(st.lists(doubles, max_size=40))
def test_a_sum_is_exact(values: list[float]) -> None:
    assert as_fraction(exact_sum(np.array(values, np.float64))) == sum(map(Fraction, values))


@given(st.lists(st.tuples(doubles, st.integers(0, 5000)), max_size=40))
def test_sums_of_groups_are_exact(rows: list[tuple[float, int]]) -> None:
    values, groups = np.array([v for v, _ in rows], np.float64), np.array([g for _, g in rows], np.int64)
    found = group_sums(values, groups, 5001)
    for group in {g for _, g in rows} | {7}:
        assert as_fraction(found[group]) == sum(Fraction(v) for v, g in rows if g == group)


def test_sums_over_more_rows_than_fit_a_double(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.records.exact_sums._MOST", 3)
    values = np.random.default_rng(0).normal(size=20)
    assert as_fraction(exact_sum(values)) == sum(map(Fraction, values.tolist()))


@given(st.lists(singles | st.just(math.nan), max_size=40), st.integers(0, 40))
def test_moments_are_those_of_the_values_that_are_known(values: list[float], cut: int) -> None:
    array = np.array(values, np.float64)
    parts = Moments.of(array[:cut]) + Moments.of(array[cut:])
    assert parts == Moments.of(array) == Moments.of(array[cut:]) + Moments.of(array[:cut])
    known = [Fraction(v) for v in values if not math.isnan(v)]
    if known:
        mean = sum(known) / len(known)
        assert parts.mean == float(mean)
        variance = float(sum((v - mean) ** 2 for v in known) / len(known))
        assert parts.deviation == pytest.approx(math.sqrt(variance), rel=1e-9)
        assert (parts.least, parts.greatest) == (min(known), max(known))


def bins(values: list[float], limit: int) -> Bins:
    return Bins.of(np.array(values, np.float64), limit)


def same(one: Bins, other: Bins) -> bool:
    return (
        one.shift == other.shift and np.array_equal(one.keys, other.keys) and np.array_equal(one.counts, other.counts)
    )


@given(st.lists(st.lists(singles, max_size=12), min_size=1, max_size=4), st.integers(1, 9), st.randoms())
def test_bins_do_not_depend_on_cuts_or_order(parts: list[list[float]], limit: int, random: object) -> None:
    whole = bins(list(itertools.chain(*parts)), limit)
    shuffled = list(parts)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    total = Bins.empty(limit)
    for part in shuffled:
        total = total + bins(part, limit)
    left = Bins.empty(limit)
    for part in reversed(parts):
        left = bins(part, limit) + left
    assert same(whole, total)
    assert same(whole, left)
    assert len(whole.keys) <= max(limit, 1) or whole.shift == 63
    assert int(whole.counts.sum()) == sum(map(len, parts))


@given(st.lists(singles, min_size=1, max_size=60), st.lists(st.floats(0, 1), min_size=1, max_size=4))
# The double 1/3 is less than a third, so the quantile is less than 0. NumPy rounds the rank to 2 and returns 0.
@example([0.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0], [1 / 3])
def test_quantiles_of_few_distinct_values_are_exact(values: list[float], at: list[float]) -> None:
    expected = []
    for share in at:
        rank = Fraction(share) * (len(values) - 1)
        low, high = (Fraction(sorted(values)[i]) for i in (math.floor(rank), math.ceil(rank)))
        expected.append(float(low + (high - low) * (rank - math.floor(rank))))
    assert bins(values, 100).quantiles(at) == expected


def test_quantiles_beyond_the_limit_are_near() -> None:
    values = np.random.default_rng(1).lognormal(size=200_000).astype(np.float32).astype(np.float64)
    found = Bins.of(values, 1 << 12)
    assert found.shift > 0
    assert found.quantiles((0.1, 0.5, 0.9)) == pytest.approx(np.quantile(values, (0.1, 0.5, 0.9)), rel=0.005)


@given(st.lists(doubles, max_size=30))
def test_bins_give_their_values_back(values: list[float]) -> None:
    assert bins(values, 1000).values.tolist() == sorted({v + 0.0 for v in values})


def test_weights_are_counted_and_nan_is_not() -> None:
    found = Bins.of(np.array([1.0, math.nan, 1.0, 0.5]), 10, np.array([[1, 0], [1, 1], [1, 1], [1, 0]]))
    assert found.values.tolist() == [0.5, 1.0]
    assert found.counts.tolist() == [[1, 0], [2, 1]]
