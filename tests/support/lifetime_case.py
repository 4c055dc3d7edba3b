"""Helpers and fixtures for: windows over all history keep one row per key, and give the very bits that all of history
would."""

from __future__ import annotations

import polars as pl
from polars.testing import assert_frame_equal

STATS = '("count", "sum", "mean", "std", "var", "min", "max", "first", "last")'
LIFETIME = f"""
import polars as pl
from schemas import FeatureView, Latest, Source, Trailing

visits = Source("visits", time="asked",
                columns={{"visit": pl.Int64, "shop": pl.String, "city": pl.Int32, "size": pl.Float32}})
sales = Source("sales", time="sold", unique="sale",
               columns={{"sale": pl.Int64, "shop": pl.String, "city": pl.Int32, "price": pl.Float64}})
view = FeatureView("ever", visits, key="visit", features=[
    Trailing(sales, by="shop", over=("1d", "WINDOW"),
             stats={{"price": {STATS}, "city": ("sum", "last"), "*": "count"}}),
    Trailing(sales, by=("shop", "city"), over="WINDOW", where=pl.col("price") > 3e6,
             stats={{"price": ("sum", "std")}}, name="dear"),
    Latest(sales, by="city", columns=("price", "shop"), max_age="AGE"),
    Trailing(visits, by="shop", over="WINDOW", stats={{"size": ("mean", "min"), "*": "count"}}),
])
"""


def definition(window: str, age: str) -> str:
    return LIFETIME.replace("WINDOW", window).replace("AGE", age)


def same(got: pl.DataFrame, expected: pl.DataFrame) -> None:
    """But for the ids, which hold the view's name alone, all columns to the last bit."""
    assert_frame_equal(got, expected, check_exact=True, check_column_order=False)
