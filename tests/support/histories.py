"""Random spine rows and events for views, small enough to compute by hand."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
from hypothesis import strategies as st

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.features import STATISTICS

T0 = datetime(2020, 1, 1, tzinfo=UTC)
ALL = (*STATISTICS, "q05", "q95")


def at(seconds: float = 0, microseconds: int = 0) -> datetime:
    return T0 + timedelta(seconds=seconds, microseconds=microseconds)


# Whole seconds meet the windows' edges; a microsecond beside them just misses.
moments = st.builds(at, st.integers(0, 70), st.sampled_from([0, 0, 0, 1, -1, 500_000]))
numbers = (
    st.none()
    | st.sampled_from([0.0, 0.1, 1.0, 1e-5, 1e10, 4194304.25, 1.18e-38])
    | st.integers(-(10**8), 10**9).map(lambda cents: cents / 100)
)
words = st.sampled_from(["a", "b", 'é/"', "", "a=b c", None])
codes = st.sampled_from([1, 2, -5, 10**15, None])

spine_rows = Source(
    "questions",
    time="t",
    columns={"id": pl.Int64, "k": pl.String, "g": pl.Int64, "x": pl.Float32, "on": pl.Date, "b": pl.Boolean},
)
events = Source(
    "events",
    time="at",
    columns={"k": pl.String, "g": pl.Int32, "v": pl.Float64, "n": pl.Int64, "s": pl.String, "b": pl.Boolean},
)
placed = Source("placed", time="at", event_time="happened", columns={"k": pl.String, "v": pl.Float64, "s": pl.String})
ordered = Source("ordered", time="at", order="n", columns={"key": pl.String, "n": pl.Int64, "v": pl.Float64})
shops = Source("shops", columns={"k": pl.String, "size": pl.Int32, "name": pl.String, "rate": pl.Float64})

view = FeatureView(
    "everything",
    spine=spine_rows,
    key="id",
    features=[
        Derived(double=pl.col("x") * 2, over_zero=pl.col("x") / 0, weekday=pl.col("t").dt.weekday()),
        Trailing(
            events,
            by="k",
            over=("1s", "10s", "1m"),
            stats={
                "v": ALL,
                "n": ("sum", "mean", "first", "n_unique", "max"),
                "s": ("count", "n_unique", "first", "last"),
                "b": ("mean", "last", "count"),
                "*": "count",
            },
        ),
        Trailing(events, by=("k", "g"), over="30s", where=pl.col("v") > 0, name="positive", stats={"v": ALL}),
        Trailing(events, by="b", over="5s", stats={"v": ("mean", "last"), "*": "count"}),
        Trailing(placed, by="k", over=("10s", "1m"), stats={"v": ALL, "s": ("last", "n_unique"), "*": "count"}),
        Trailing(ordered, by={"k": "key"}, over="20s", stats={"v": ("first", "last"), "n": "last"}),
        Latest(events, by="g", columns=("v", "s", "n", "b"), max_age="20s"),
        Latest(events, by="k", columns="v", max_age="3s", where=pl.col("s") == "x", name="marked"),
        Latest(placed, by="k", columns=("v", "s"), max_age="20s"),
        Lookup(shops, by="k", columns=("size", "name", "rate")),
        Trailing(events, by={"shops_name": "s"}, over="1m", stats={"v": "sum"}, name="namesake"),
        Derived(rated=pl.col("x") * pl.col("shops_rate"), known=pl.col("shops_size").is_not_null()),
        Derived(pair=pl.concat_str("shops_name", pl.col("rated").is_null(), ignore_nulls=True)),
    ],
)


def frames(source: Source, max_size: int = 25, **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[pl.DataFrame]:
    """Frames of a source's rows, some repeated."""
    rows = st.lists(st.fixed_dictionaries(columns), max_size=max_size)
    return rows.map(lambda rows: pl.DataFrame(rows, schema=source.schema, orient="row"))


many_spine_rows = st.lists(
    st.fixed_dictionaries(
        {
            "t": moments,
            "k": words,
            "g": codes,
            "x": st.none() | st.floats(-9, 9, width=32),
            "on": st.just(date(2020, 1, 1)),
            "b": st.sampled_from([True, False, None]),
        }
    ),
    min_size=1,
    max_size=12,
).map(
    lambda rows: pl.DataFrame([{**row, "id": i} for i, row in enumerate(rows)], schema=spine_rows.schema, orient="row")
)
many_events = frames(
    events,
    at=moments,
    k=words,
    g=st.sampled_from([1, 2, -5, None]),
    v=numbers,
    n=st.sampled_from([None, 0, 1, 2**40]),
    s=st.sampled_from(["x", "y", "", "A", None]),
    b=st.sampled_from([True, False, None]),
)
many_placed = st.lists(
    st.tuples(moments, st.sampled_from([0, 0, 1, 1.5, 30]), words, numbers, st.sampled_from(["x", "y", None])),
    max_size=20,
).map(
    lambda rows: pl.DataFrame(
        [
            {"at": happened + timedelta(seconds=later), "happened": happened, "k": k, "v": v, "s": s}
            for happened, later, k, v, s in rows
        ],
        schema=placed.schema,
        orient="row",
    )
)
many_ordered = frames(ordered, 12, at=moments, key=words, n=st.integers(0, 2), v=numbers)
some_shops = st.lists(words, unique=True, max_size=5).map(
    lambda keys: pl.DataFrame(
        [
            {"k": key, "size": None if i == 1 else i, "name": ("x", "y", None, "A", "")[i], "rate": i / 10}
            for i, key in enumerate(keys)
        ],
        schema=shops.schema,
        orient="row",
    )
)
histories = st.fixed_dictionaries(
    {"events": many_events, "placed": many_placed, "ordered": many_ordered, "shops": some_shops}
)


def shuffled(frame: pl.DataFrame, seed: int) -> pl.DataFrame:
    return frame.select(pl.all().gather(random.Random(seed).sample(range(len(frame)), len(frame))))
