"""A small made-up case: will a visitor buy within a day?  Its sources, and the definition as a user writes it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Gates, Label, Model, Search, Source, TimeSplit, Trailing, encoders

visits = Source("visits", time="asked", columns={"visit": pl.Int64, "shop": pl.String, "age": pl.Float32})
sales = Source("sales", time="sold", columns={"visit": pl.Int64, "shop": pl.String, "amount": pl.Float64},
               unique="visit", order="visit")
view = FeatureView("buying", visits, key="visit", features=[
    Derived(age=pl.col("age"), hour=pl.col("asked").dt.hour()),
    Trailing(sales, by="shop", over="3d", stats={"amount": ("mean", "count")}),
])
model = Model(
    view, Label(sales, on="visit", value=pl.col("amount") > 0, within="1d", absent=0),
    TimeSplit("12d", "12d", embargo="1d"),
    encode={"shop": encoders.OneHot(), "age": encoders.Impute("median")},
    params={"max_depth": 3, "eta": 0.3}, rounds=12,
    gates=Gates(at_least={"auc": 0.6}, slices=("shop", ("shop", "hour")), max_gap={"auc": 0.5}, min_slice_rows=20),
)
"""
START = datetime(2024, 1, 1, tzinfo=UTC)
DAYS = 60


def write(store: Path, rows: int = 3000, definition: str = DEFINITION) -> Path:
    """Sources under `<store>/sources`; returns the definition's file."""
    random = np.random.default_rng(7)
    seconds = np.sort(random.integers(0, DAYS * 86_400, rows))
    shop = random.choice(np.array(["north", "south", "west"]), rows)
    age = np.where(random.random(rows) < 0.05, np.nan, random.normal(40, 10, rows)).astype(np.float32)
    visits = pl.DataFrame(
        {
            "visit": np.arange(rows),
            "shop": shop,
            "age": age,
            "asked": [START + timedelta(seconds=int(s)) for s in seconds],
        }
    ).with_columns(pl.col("age").fill_nan(None), pl.col("asked").cast(pl.Datetime("us", "UTC")))
    chance = np.where(shop == "north", 0.6, 0.2) + np.nan_to_num((age - 40) / 50)
    bought = random.random(rows) < chance
    sales = (
        visits.filter(pl.Series(bought))
        .select("visit", "shop", pl.lit(1.5).alias("amount"), pl.col("asked").dt.offset_by("2h").alias("sold"))
        .with_columns(amount=pl.Series(random.integers(1, 1000, int(bought.sum())) / 100))
    )
    for name, frame in {"visits": visits, "sales": sales}.items():
        folder = store / "sources" / name
        folder.mkdir(parents=True)
        frame.write_parquet(folder / "part.parquet")
    path = store / "definition.py"
    path.write_text(definition)
    return path
