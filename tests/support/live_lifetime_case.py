"""Helpers and fixtures for: windows without a beginning, live: what has left the panes still counts, whatever the order
of arrival, stops and state."""

from __future__ import annotations

import polars as pl

from schemas import Derived, FeatureView, Latest, Trailing
from tests.support.live_turns import events, placed, sales, spine_rows

SUMMARY = ("count", "sum", "mean", "std", "var", "min", "max", "first", "last")
mixed = FeatureView(
    "mixed",
    spine_rows,
    key="id",
    features=[
        Trailing(
            events,
            by="k",
            over=("1m", "all"),
            stats={"v": SUMMARY, "s": ("count", "first", "last"), "b": ("mean", "last"), "*": "count"},
        ),
        Trailing(
            events,
            by=("k", "g"),
            over="all",
            where=pl.col("v") > 0,
            name="positive",
            stats={"v": ("sum", "var", "first")},
        ),
        Trailing(events, by=("k", "g"), over="10s", stats={"v": ("median", "n_unique")}),
        Latest(events, by="g", columns=("v", "s"), max_age="forever"),
        Latest(events, by="k", columns="v", max_age="forever", where=pl.col("s") == "x", name="marked"),
        Trailing(
            sales, by="k", over=("30s", "all"), stats={"v": ("sum", "mean", "first", "min"), "n": "max", "*": "count"}
        ),
        Latest(sales, by="k", columns=("v", "n"), max_age="forever"),
        Derived(near=pl.col("g") // 2),
        Trailing(
            events,
            by={"near": "g", "b": "b"},
            over="all",
            stats={"n": ("sum", "max", "std"), "*": "count"},
            name="near",
        ),
        Trailing(placed, by="k", over="10s", stats={"v": "sum"}),
        Trailing(spine_rows, by="k", over="all", stats={"x": ("mean", "last", "min"), "*": "count"}, name="crowd"),
    ],
)
