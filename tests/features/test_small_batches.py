"""A few spine rows at a time and many at once: the kernel's ways for both give the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import oracles
from tests.support.histories import histories, many_spine_rows, view
from tests.support.kernels_case import same
from transforms.features import kernel, window_bounds
from transforms.features.kernel import KernelTables, compute
from transforms.features.window_bounds import codes


@contextlib.contextmanager
def as_if_many() -> Iterator[None]:
    """However few rows there are, they are computed as many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_bounds, "FEW", -1)
        patch.setattr(window_bounds, "MANY", 0)
        patch.setattr(kernel, "HANDED_OVER", -1)
        yield


spines = st.lists(many_spine_rows, min_size=1, max_size=6).map(
    lambda some: pl.concat(some).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias("id"))
)


@given(spine=many_spine_rows, tables=histories)
def test_few_rows_computed_as_many_are_those_of_the_oracle(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]
) -> None:
    """`test_kernels` compares them as they are, few."""
    with as_if_many():
        got = compute(view, spine, KernelTables(tables))
    same(got, pl.DataFrame(oracles.features(view, spine, tables), schema=got.schema, orient="row"))


@given(spine=spines, tables=histories, sizes=st.lists(st.integers(1, 16), min_size=1, max_size=5))
@settings(max_examples=60)
def test_many_small_calls_give_what_one_large_call_gives(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame], sizes: list[int]
) -> None:
    with as_if_many():
        whole = compute(view, spine, KernelTables(tables))
    parts, start = [], 0
    while start < len(spine):
        size = sizes[len(parts) % len(sizes)]
        parts.append(compute(view, spine[start : start + size], KernelTables(tables)))
        start += size
    same(pl.concat(parts), whole)


@given(spine=many_spine_rows, tables=histories)
@settings(max_examples=60)
def test_codes_of_few_keys_are_equal_where_keys_are(spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> None:
    events = tables["events"]
    for keys in ([("k", "k")], [("g", "g")], [("k", "k"), ("g", "g")], [("b", "b")], [("k", "s"), ("b", "b")]):
        few = codes(spine, events, keys)
        with as_if_many():
            many = codes(spine, events, keys)
        for row in range(len(spine)):
            assert (few[1] == few[0][row]).tolist() == (many[1] == many[0][row]).tolist() or few[0][row] == -1
            assert (few[0][row] == -1) == (many[0][row] == -1)
