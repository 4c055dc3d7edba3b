"""A small market with every kind of feature and every kind of bad row: its sources, and the definition as a user writes
it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from schemas import FeatureView, load_definition

DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing

visits = Source("visits", time="asked",
                columns={"visit": pl.Int64, "shop": pl.String, "city": pl.Int32, "size": pl.Float32})
sales = Source("sales", time="sold", unique="sale",
               columns={"sale": pl.Int64, "shop": pl.String, "city": pl.Int32, "price": pl.Float64})
stock = Source("stock", time="counted", event_time="seen",
               columns={"shop": pl.String, "pieces": pl.Int64, "note": pl.String})
shops = Source("shops", columns={"shop": pl.String, "area": pl.Int32, "rent": pl.Float64})
view = FeatureView("demand", visits, key="visit", features=[
    Derived(hour=pl.col("asked").dt.hour(), size=pl.col("size")),
    Trailing(sales, by="shop", over=("6h", "2d"), stats={"price": ("mean", "std", "q95", "max", "last"), "*": "count"}),
    Trailing(sales, by=("shop", "city"), over="1d", where=pl.col("price") > 20, stats={"price": "sum"}, name="dear"),
    Trailing(visits, by="shop", over="1d", stats={"size": ("mean", "n_unique"), "*": "count"}),
    Trailing(stock, by="shop", over="1d", stats={"pieces": "sum"}),
    Latest(stock, by="shop", columns=("pieces", "note"), max_age="3d"),
    Lookup(shops, by="shop", columns=("area", "rent")),
    Derived(density=pl.col("sales_by_shop_count_2d") / pl.col("shops_area")),
])
"""
START = datetime(2024, 3, 1, tzinfo=UTC)
DAYS = 6
TIMES = {"visits": "asked", "sales": "sold", "stock": "counted"}


def at(days: float) -> datetime:
    return START + timedelta(days=days)


def define(store: Path, text: str = DEFINITION) -> Path:
    store.mkdir(parents=True, exist_ok=True)
    path = store / "definition.py"
    path.write_text(text)
    return path


def load(store: Path) -> FeatureView:
    return load_definition(str(define(store))).view


def sources(rows: int = 120, seed: int = 3) -> dict[str, pl.DataFrame]:
    """Good rows only: money, nulls, ties, keys with awkward letters, keys that no dimension knows."""
    random = np.random.default_rng(seed)
    moment = pl.Datetime("us", "UTC")

    def times(n: int) -> list[datetime]:
        return [
            at(float(t))
            for t in np.sort(np.round(random.random(n) * (DAYS * 24 - 1)) / 24 + 1e-6 * random.integers(0, 2, n))
        ]

    def shop(n: int) -> list[str | None]:
        return [(None, 'a/"', "é", "", "c=d e")[i] for i in random.integers(0, 5, n)]

    def maybe(values: list[Any]) -> list[Any]:
        return [None if gone else value for value, gone in zip(values, random.random(len(values)) < 0.1, strict=True)]

    seen = times(rows)
    later = [timedelta(hours=int(h)) for h in random.integers(0, 30, rows)]
    stock = {
        "counted": [moment + more for moment, more in zip(seen, later, strict=True)],
        "seen": seen,
        "shop": shop(rows),
        "pieces": maybe(random.integers(0, 50, rows).tolist()),
        "note": maybe(list("abcde" * rows)[:rows]),
    }
    return {
        "visits": pl.DataFrame(
            {
                "asked": times(rows),
                "visit": np.arange(rows),
                "shop": shop(rows),
                "city": maybe(random.integers(1, 3, rows).tolist()),
                "size": maybe(random.normal(1, 1, rows).tolist()),
            },
            schema={"asked": moment, "visit": pl.Int64, "shop": pl.String, "city": pl.Int32, "size": pl.Float32},
        ),
        "sales": pl.DataFrame(
            {
                "sold": times(3 * rows),
                "sale": np.arange(3 * rows),
                "shop": shop(3 * rows),
                "city": maybe(random.integers(1, 3, 3 * rows).tolist()),
                "price": maybe((random.integers(1, 10**9, 3 * rows) / 100).tolist()),
            },
            schema={"sold": moment, "sale": pl.Int64, "shop": pl.String, "city": pl.Int32, "price": pl.Float64},
        ),
        "stock": pl.DataFrame(
            stock, schema={"counted": moment, "seen": moment, "shop": pl.String, "pieces": pl.Int64, "note": pl.String}
        ).sort("counted"),
        "shops": pl.DataFrame(
            {"shop": ['a/"', "é", "nobody"], "area": [10, 0, 5], "rent": [0.1, None, 2.5]},
            schema_overrides={"area": pl.Int32},
        ),
    }


def spoiled(frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """The same with rows that break their contract, repeats, and questions asked twice; the good rows stay good."""
    visits, sales, stock, shops = (frames[name] for name in ("visits", "sales", "stock", "shops"))
    twice = visits[5:8]
    conflict = visits[5:7].with_columns(size=pl.lit(1e9, pl.Float32))  # larger, so it loses
    keyless = visits[9:10].with_columns(visit=pl.lit(None, pl.Int64))
    infinite = visits[10:11].with_columns(size=pl.lit(float("inf"), pl.Float32), visit=pl.lit(-1, pl.Int64))
    ancient = visits[11:12].with_columns(asked=pl.lit(datetime(1970, 1, 1, tzinfo=UTC)), visit=pl.lit(-2, pl.Int64))
    timeless = visits[12:13].with_columns(asked=pl.lit(None, pl.Datetime("us", "UTC")), visit=pl.lit(-3, pl.Int64))
    again = sales[20:30].with_columns(pl.col("sold").dt.offset_by("20h"), price=pl.lit(1e6))
    future = sales[3:4].with_columns(sold=pl.lit(datetime(2199, 1, 1, tzinfo=UTC)), sale=pl.lit(-1, pl.Int64))
    endless = sales[4:6].with_columns(price=pl.lit(float("-inf")), sale=pl.col("sale") - 100_000)
    early = stock[7:9].with_columns(seen=pl.col("counted").dt.offset_by("1s"))
    other = shops[0:1].with_columns(area=pl.lit(99, pl.Int32))
    return {
        "visits": pl.concat([visits, twice, conflict, keyless, infinite, ancient, timeless]),
        "sales": pl.concat([sales, again, future, endless]),
        "stock": pl.concat([stock, early]),
        "shops": pl.concat([shops, shops[1:2], other]),
    }


# Of `spoiled`: rows set aside per source, and rows that only repeat others.
SET_ASIDE = {"visits": 2 + 4, "sales": 3, "stock": 2, "shops": 1}
REPEATED = {"visits": 3, "sales": 10, "stock": 0, "shops": 1}


def write(
    store: Path,
    frames: dict[str, pl.DataFrame],
    files: int = 1,
    group: int = 40,
    shuffle: int | None = None,
    statistics: bool = True,
) -> Path:
    """Sources under `<store>/sources`, each row group sorted by time unless `shuffle` seeds another order."""
    for name, frame in frames.items():
        folder = store / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("*.parquet"):
            old.unlink()
        if shuffle is not None:
            frame = frame.sample(fraction=1, shuffle=True, seed=shuffle)
        elif name in TIMES:
            frame = frame.sort(TIMES[name], maintain_order=True)
        for i in range(files):
            part = frame[len(frame) * i // files : len(frame) * (i + 1) // files]
            pq.write_table(
                part.to_arrow(), folder / f"part-{i}.parquet", row_group_size=group, write_statistics=statistics
            )
    return store
