"""Whole views against the oracle, and what must not matter: order, other rows, how far keys and times spread."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.errors import DataError
from tests.support import oracles
from tests.support.histories import T0, at, events, histories, many_spine_rows, placed, shuffled, spine_rows, view
from tests.support.kernels_case import same
from transforms.features import kernel
from transforms.features.kernel import KernelTables, compute
from transforms.features.window_bounds import EventOrder, codes


def spine_at(*moments: datetime, **columns: Any) -> pl.DataFrame:
    """Spine rows of key "a" at these times."""
    row = {"k": "a", "g": 1, "x": 1.0, "on": date(2020, 1, 1), "b": True, **columns}
    rows = [{"t": moment, "id": i, **row} for i, moment in enumerate(moments)]
    return pl.DataFrame(rows, schema=spine_rows.schema, orient="row")


def event_rows(*rows: tuple[datetime, float | None], **columns: Any) -> pl.DataFrame:
    """Events of key "a": (time, v)."""
    row = {"k": "a", "g": 1, "n": 0, "s": "x", "b": True, **columns}
    return pl.DataFrame([{"at": moment, "v": v, **row} for moment, v in rows], schema=events.schema, orient="row")


def one(*features: Any, spine: Source = spine_rows, key: str = "id") -> FeatureView:
    return FeatureView("one", spine=spine, key=key, features=features)


def feature_rows(feature: Any, spine: pl.DataFrame, **tables: pl.DataFrame) -> list[Any]:
    """The only column of a feature."""
    made = one(feature)
    return compute(made, spine, KernelTables(tables))[made.feature_names[0]].to_list()


counted = Trailing(events, by="k", over="10s", stats={"*": "count"})
latest = Latest(events, by="k", columns=("v", "n"), max_age="10s")


@given(spine=many_spine_rows, tables=histories)
def test_features_are_those_of_the_oracle(spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> None:
    got = compute(view, spine, KernelTables(tables))
    expected = pl.DataFrame(oracles.features(view, spine, tables), schema=got.schema, orient="row")
    same(got, expected)


@given(spine=many_spine_rows, tables=histories, seed=st.integers(0, 999))
def test_the_order_of_arrival_changes_no_bit(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame], seed: int
) -> None:
    mixed = {name: shuffled(table, seed + i) for i, (name, table) in enumerate(tables.items())}
    got = compute(view, shuffled(spine, seed), KernelTables(mixed))
    same(got.sort("id"), compute(view, spine, KernelTables(tables)).sort("id"))


@given(spine=many_spine_rows, tables=histories)
def test_a_spine_row_alone_gets_the_same_features(spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> None:
    whole = compute(view, spine, KernelTables(tables))
    for i in range(min(len(spine), 3)):
        same(compute(view, spine[i : i + 1], KernelTables(tables)), whole[i : i + 1])


@given(spine=many_spine_rows, tables=histories)
def test_events_that_no_window_reaches_change_no_bit(spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]) -> None:
    low, high = spine["t"].min(), spine["t"].max()
    near = {
        name: table.filter(pl.col("at").is_between(low - timedelta(minutes=1), high, closed="left"))
        if "at" in table.columns
        else table
        for name, table in tables.items()
    }
    same(compute(view, spine, KernelTables(near)), compute(view, spine, KernelTables(tables)))


@given(spine=many_spine_rows, tables=histories)
@settings(max_examples=20)
def test_few_rows_at_once_on_the_way_of_event_time_change_no_bit(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]
) -> None:
    whole = compute(view, spine, KernelTables(tables))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "EXPANDED_ROWS", 3)
        same(compute(view, spine, KernelTables(tables)), whole)


def test_event_at_the_time_of_the_spine_row_is_not_seen() -> None:
    assert feature_rows(counted, spine_at(at(5)), events=event_rows((at(5), 1.0))) == [0]
    assert feature_rows(latest, spine_at(at(5)), events=event_rows((at(5), 1.0))) == [None]


def test_event_a_microsecond_before_the_spine_row_is_seen() -> None:
    assert feature_rows(counted, spine_at(at(5)), events=event_rows((at(5, -1), 1.0))) == [1]
    assert feature_rows(latest, spine_at(at(5)), events=event_rows((at(5, -1), 1.0))) == [1.0]


def test_event_exactly_one_window_old_is_seen_and_a_microsecond_older_is_not() -> None:
    assert feature_rows(counted, spine_at(at(15)), events=event_rows((at(5), 1.0))) == [1]
    assert feature_rows(counted, spine_at(at(15)), events=event_rows((at(5, -1), 1.0))) == [0]
    assert feature_rows(latest, spine_at(at(15)), events=event_rows((at(5), 1.0))) == [1.0]
    assert feature_rows(latest, spine_at(at(15)), events=event_rows((at(5, -1), 1.0))) == [None]


def test_event_placed_in_the_window_but_known_later_is_not_seen() -> None:
    feature = Trailing(placed, by="k", over="10s", stats={"*": "count"})
    rows = [
        {"happened": at(1), "at": at(5, -1), "k": "a", "v": 1.0, "s": None},
        {"happened": at(2), "at": at(5), "k": "a", "v": 1.0, "s": None},
        {"happened": at(3), "at": at(9), "k": "a", "v": 1.0, "s": None},
    ]
    table = pl.DataFrame(rows, schema=placed.schema, orient="row")
    assert feature_rows(feature, spine_at(at(5), at(5, 1), at(9, 1)), placed=table) == [1, 2, 3]


def test_event_known_in_the_window_but_placed_before_it_is_outside() -> None:
    feature = Trailing(placed, by="k", over="10s", stats={"*": "count"})
    row = {"happened": at(0), "at": at(9), "k": "a", "v": 1.0, "s": None}
    table = pl.DataFrame([row], schema=placed.schema, orient="row")
    assert feature_rows(feature, spine_at(at(10), at(10, 1)), placed=table) == [1, 0]


@pytest.mark.parametrize(
    ("spine_row", "event"),
    [("a", "b"), ("a", None), (None, "a"), (None, None), ("", None), ("", "a"), ("a", "A"), ("é", "e\u0301")],
)
def test_keys_that_differ_or_are_null_match_nothing(spine_row: str | None, event: str | None) -> None:
    table = event_rows((at(1), 1.0), k=event)
    assert feature_rows(counted, spine_at(at(2), k=spine_row), events=table) == [0]
    assert feature_rows(latest, spine_at(at(2), k=spine_row), events=table) == [None]
    dimension = Source("d", columns={"k": pl.String, "w": pl.Int32})
    rows = pl.DataFrame([{"k": event, "w": 1}], schema=dimension.schema, orient="row")
    assert feature_rows(Lookup(dimension, by="k", columns="w"), spine_at(at(2), k=spine_row), d=rows) == [None]


def test_parts_of_a_key_do_not_run_together() -> None:
    source = Source("pairs", time="at", columns={"k": pl.String, "b2": pl.String})
    spine = Source("asked", time="t", columns={"id": pl.Int64, "k": pl.String, "b2": pl.String})
    made = one(Trailing(source, by=("k", "b2"), over="10s", stats={"*": "count"}), spine=spine)
    pairs = [("a", "bc"), ("ab", "c"), ("", "abc"), ("a/b", "c"), ("a", "b/c")]
    table = pl.DataFrame([{"at": at(1), "k": k, "b2": b} for k, b in pairs], schema=source.schema, orient="row")
    rows = pl.DataFrame(
        [{"t": at(2), "id": i, "k": k, "b2": b} for i, (k, b) in enumerate(pairs)], schema=spine.schema, orient="row"
    )
    assert compute(made, rows, KernelTables({"pairs": table}))[made.feature_names[0]].to_list() == [1] * len(pairs)


def test_a_tie_picks_one_whole_row_and_never_a_mixture() -> None:
    table = pl.concat([event_rows((at(1), 1.0), n=9), event_rows((at(1), 2.0), n=None), event_rows((at(1), None), n=5)])
    made = one(latest)
    for seed in range(6):
        row = compute(made, spine_at(at(2)), KernelTables({"events": shuffled(table, seed)})).row(0, named=True)
        assert (row["events_v"], row["events_n"]) == (2.0, None)  # the last by all columns; its null stays null


def test_order_decides_ties_before_the_other_columns() -> None:
    source = Source("o", time="at", order="n", columns={"a": pl.Int64, "k": pl.String, "n": pl.Int64})
    table = pl.DataFrame({"at": [at(1)] * 3, "a": [9, 1, 5], "k": ["a"] * 3, "n": [1, 2, 2]}, schema=source.schema)
    assert feature_rows(Latest(source, by="k", columns="a", max_age="10s"), spine_at(at(2)), o=table) == [5]


def test_no_events_at_all_count_zero_and_say_nothing_else() -> None:
    spine = spine_at(at(1), at(2))
    tables = {name: pl.DataFrame(schema=source.schema) for name, source in view.sources.items()}
    got = compute(view, spine, KernelTables(tables)).row(1, named=True)
    for name, value in got.items():
        if name in view.columns and name not in ("double", "over_zero", "weekday", "known", "pair"):
            assert value == (0 if "_count_" in name or "_n_unique_" in name else None), name


def test_no_spine_rows_give_an_empty_frame_of_the_same_columns() -> None:
    tables = {name: pl.DataFrame(schema=source.schema) for name, source in view.sources.items()}
    got = compute(view, pl.DataFrame(schema=spine_rows.schema), KernelTables(tables))
    assert got.schema == compute(view, spine_at(at(1)), KernelTables(tables)).schema
    assert len(got) == 0


def test_columns_come_in_the_types_that_the_view_declares() -> None:
    tables = {name: pl.DataFrame(schema=source.schema) for name, source in view.sources.items()}
    got = compute(view, spine_at(at(1)), KernelTables(tables))
    assert dict(got.schema) == {**{name: spine_rows.schema[name] for name in view.context}, **view.columns}


def test_what_float32_cannot_hold_is_null() -> None:
    table = event_rows((at(1), 3e38), (at(2), 3e38))
    assert feature_rows(Trailing(events, by="k", over="10s", stats={"v": "sum"}), spine_at(at(3)), events=table) == [
        None
    ]
    assert feature_rows(Trailing(events, by="k", over="10s", stats={"v": "var"}), spine_at(at(3)), events=table) == [
        0.0
    ]
    assert feature_rows(Derived(y=pl.col("x") / 0), spine_at(at(3))) == [None]
    assert feature_rows(Derived(y=(pl.col("x") - 2).log()), spine_at(at(3))) == [None]


def test_a_feature_may_be_the_key_of_one_below_it() -> None:
    dimension = Source("d", columns={"k": pl.String, "owner": pl.String})
    made = one(
        Lookup(dimension, by="k", columns="owner"),
        Trailing(events, by={"d_owner": "s"}, over="10s", stats={"*": "count"}),
        Latest(events, by={"d_owner": "s"}, columns="n", max_age="10s"),
        Trailing(events, by={"events_n": "n"}, over="10s", stats={"v": "sum"}, name="alike"),
    )
    rows = pl.DataFrame([{"k": "a", "owner": "x"}], schema=dimension.schema, orient="row")
    tables = {"d": rows, "events": event_rows((at(1), 1.5), (at(2), 2.5), n=7)}
    assert compute(made, spine_at(at(3)), KernelTables(tables)).select(made.feature_names).row(0) == ("x", 2, 7, 4.0)


@pytest.mark.parametrize("spread", [1, 10**6, 2**39, 2**45, 2**62])
def test_integer_keys_of_any_spread(spread: int) -> None:
    source = Source("e", time="at", columns={"g": pl.Int64})
    keys = [0, spread, -spread, spread - 1, None]
    table = pl.DataFrame({"at": [at(1)] * 5, "g": keys}, schema=source.schema)
    rows = spine_at(*[at(2)] * 7).with_columns(g=pl.Series([*keys, spread + 1, 12345], dtype=pl.Int64))
    feature = Trailing(source, by="g", over="10s", stats={"*": "count"})
    expected = [sum(key is not None and key == other for other in keys) for key in rows["g"]]
    assert feature_rows(feature, rows, e=table) == expected


def test_dates_and_booleans_are_keys() -> None:
    source = Source("e", time="at", columns={"on": pl.Date, "b": pl.Boolean})
    table = pl.DataFrame(
        {"at": [at(1)] * 3, "on": [date(2020, 1, 1), date(1969, 12, 31), None], "b": [True] * 3}, schema=source.schema
    )
    feature = Trailing(source, by=("on", "b"), over="10s", stats={"*": "count"})
    rows = spine_at(at(2), at(2), at(2)).with_columns(
        on=pl.Series([date(2020, 1, 1), date(1969, 12, 31), date(2021, 1, 1)]), b=pl.Series([True, True, True])
    )
    assert feature_rows(feature, rows, e=table) == [1, 1, 0]


def found_positions(
    positions: list[int], groups: list[int], moments: list[int], times: list[int], lengths: list[int], far: bool
) -> list[list[tuple[int, int]]]:
    """Windows per length, in the order of spine rows; with `far`, key and time do not fit into one integer."""
    if far:
        positions, groups = [*positions, 2**58], [*groups, 2**20]
    sorting = EventOrder(*(np.array(values, np.int64) for values in (positions, groups, moments, times)))
    assert (sorting.unique is not None) == far
    result = []
    for length in lengths:
        lo, hi = sorting.bounds(length)
        back = np.argsort(sorting.spine_order, kind="stable")
        rows = [sorted(sorting.order[a:b].tolist()) for a, b in zip(lo[back], hi[back], strict=True)]
        result.append(rows)
    return result


few = st.integers(0, 30)


@given(
    history=st.lists(st.tuples(few, st.integers(0, 3)), max_size=20),
    wanted=st.lists(st.tuples(few, st.integers(-1, 4)), min_size=1, max_size=10),
)
def test_both_ways_of_sorting_find_the_same_windows(
    history: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> None:
    positions, groups = [t for t, _ in history], [g for _, g in history]
    moments, keys = [t for t, _ in wanted], [g for _, g in wanted]
    lengths = [1, 7, 100]
    expected = [
        [
            [i for i, (t, g) in enumerate(history) if g == key and moment - length <= t < moment]
            for moment, key in wanted
        ]
        for length in lengths
    ]
    for far in (False, True):
        assert found_positions(positions, groups, moments, keys, lengths, far) == expected


@given(
    left=st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "ab", ""]), st.sampled_from([None, 0, 1, 2**50])), max_size=12
    ),
    right=st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "ab", ""]), st.sampled_from([None, 0, 1, 2**50])), max_size=12
    ),
)
def test_codes_are_equal_exactly_where_keys_are(left: list[Any], right: list[Any]) -> None:
    schema = {"s": pl.String, "n": pl.Int64}
    spine, table = (pl.DataFrame(rows, schema=schema, orient="row") for rows in (left, right))
    a, b = codes(spine, table, (("s", "s"), ("n", "n")))
    for i, x in enumerate(left):
        for j, y in enumerate(right):
            assert (a[i] == b[j] and a[i] >= 0) == (x == y and None not in x)


def test_many_wide_keys_do_not_overflow_their_product() -> None:
    names = [f"k{i}" for i in range(6)]
    rows = pl.DataFrame({name: np.arange(5000) * (2**39 // 5000) + i for i, name in enumerate(names)})
    a, b = codes(rows.reverse(), rows, [(name, name) for name in names])
    assert (a[::-1] == b).all()
    assert len(set(b.tolist())) == 5000


def test_times_before_1970_and_far_ahead_are_times() -> None:
    times = [
        datetime(1901, 1, 1, tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        T0,
        datetime(2199, 1, 1, tzinfo=UTC),
    ]
    table = event_rows(*[(time - timedelta(microseconds=1), 1.0) for time in times])
    assert feature_rows(counted, spine_at(*times), events=table) == [1] * 4


@pytest.mark.parametrize(
    "feature",
    [
        Derived(n=pl.col("k").cast(pl.Int64)),
        Latest(events, by="k", columns="v", max_age="1s", where=pl.col("s").cast(pl.Int64) > 1, name="odd"),
    ],
)
def test_an_expression_that_fails_on_a_row_is_named(feature: Any) -> None:
    with pytest.raises(DataError, match=r"(Derived\(n\)|where of 'odd') has a value for every row.*strict=False"):
        feature_rows(feature, spine_at(at(1)), events=event_rows((at(0), 1.0)))
