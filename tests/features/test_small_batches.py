"""A few spine rows at a time and many at once: the kernel's ways for both give the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import FeatureView
from tests.support import oracles
from tests.support.histories import histories, many_spine_rows, view
from tests.support.kernels_case import same
from transforms.features import kernel, packed_events, window_bounds, window_statistics
from transforms.features.kernel import KernelTables, compute
from transforms.features.packed_events import IndexedRows, Keys, PackedEvents
from transforms.features.window_bounds import codes
from transforms.records.times import ALWAYS


@contextlib.contextmanager
def as_if_many() -> Iterator[None]:
    """However few rows there are, they are computed as many are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_bounds, "FEW", -1)
        patch.setattr(window_bounds, "MANY", 0)
        patch.setattr(window_statistics, "FEW", -1)
        patch.setattr(kernel, "HANDED_OVER", -1)
        yield


@contextlib.contextmanager
def indexed(small: int, by_key: int, collide: bool) -> Iterator[None]:
    """Parts of more than `small` rows are indexed by hash; up to `by_key` spine rows find their events by key.

    With `collide` all keys have one of two hashes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_events, "SMALL", small)
        patch.setattr(kernel, "FOUND_BY_KEY", by_key)
        if collide:
            hashes = packed_events.keys_hashes
            patch.setattr(
                packed_events,
                "keys_hashes",
                lambda *given: {key: some % np.uint64(2) for key, some in hashes(*given).items()},
            )
        yield


def in_parts(of: FeatureView, tables: Mapping[str, pl.DataFrame], random: Random) -> KernelTables:
    """The events of each source in a few parts, which grew by additions, in any order."""
    packed = {}
    for name, source in of.events.items():
        rows, parts = tables[name].sample(fraction=1, shuffle=True, seed=random.randrange(2**30)), []
        while len(rows):
            piece, rows = rows[: (size := random.randint(1, len(rows)))], rows[size:]
            start = random.randrange(len(piece))
            part = IndexedRows(piece[:start] if start else piece, ALWAYS)
            if start:
                if random.random() < 0.5:  # it is indexed before it grows
                    asked = Keys(piece, [(name,) for name in source.columns if not source.schema[name].is_float()])
                    for key in asked.several:
                        part.find(key, asked.distinct(key), str(source.time), -(2**60), 2**60)
                part.add(piece[start:], ALWAYS)
            parts.append(part)
        packed[name] = PackedEvents(parts, tables[name].clear())
    dimensions = {name: tables[name] for name in of.dimensions}
    return KernelTables(dimensions, packed=packed)


@given(
    spine=many_spine_rows,
    tables=histories,
    random=st.randoms(use_true_random=False),
    small=st.sampled_from([0, 5, 1000]),
    by_key=st.sampled_from([0, 256, 256, 256]),
    collide=st.booleans(),
)
def test_packed_events_give_the_features_of_the_oracle(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame], random: Random, small: int, by_key: int, collide: bool
) -> None:
    with indexed(small, by_key, collide):
        got = compute(view, spine, in_parts(view, tables, random))
    same(got, pl.DataFrame(oracles.features(view, spine, tables), schema=got.schema, orient="row"))


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
