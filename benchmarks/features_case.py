"""The case of `benchmarks/features.py`: a view of 3 keys × 3 windows × mean and max, and its data at any size."""

from __future__ import annotations

import os

import numpy as np
import polars as pl

from schemas import FeatureView, Source, Trailing

KEYS = ("origin", "carrier", "tailnum")
WINDOWS = ("1h", "3h", "24h")
STATS = ("mean", "max")

schedule = Source("schedule", time="asked_at", columns={"flight_id": pl.Int64, **dict.fromkeys(KEYS, pl.String)})
departures = Source(
    "departures", time="departed_at", columns={**dict.fromkeys(KEYS, pl.String), "dep_delay": pl.Float64}
)
view = FeatureView(
    "bench",
    spine=schedule,
    key="flight_id",
    features=[Trailing(departures, by=key, over=WINDOWS, stats={"dep_delay": STATS}) for key in KEYS],
)


def write(store: str, copies: int, heavy: bool = False) -> None:
    """The year of flights `copies` times, keys renamed per copy, noise of two decimals on the values, sorted by time.

    If `heavy`, nine rows in ten have the same key in every column.
    """
    from examples.flights import data

    if os.path.exists(f"{store}/sources/done"):
        return
    data.write(f"{store}/year")
    year = {name: pl.read_parquet(f"{store}/year/sources/{name}/*.parquet") for name in ("schedule", "departures")}
    for number, (name, source) in enumerate((("schedule", schedule), ("departures", departures))):
        random = np.random.default_rng(number)
        renamed = [
            year[name].with_columns(
                *((pl.col(key) + f"_{copy:02d}") for key in KEYS), flight_id=pl.col("flight_id") + copy * 10_000_000
            )
            for copy in range(copies)
        ]
        rows = (
            pl.concat(renamed)
            .sort(source.time, "flight_id")
            .select(list(source.schema) if name == "schedule" else [*source.schema])
        )
        if heavy:
            chosen = pl.Series(random.random(len(rows)) < 0.9)
            rows = rows.with_columns(
                pl.when(chosen).then(pl.lit("heavy")).otherwise(pl.col(key)).alias(key) for key in KEYS
            )
        if name == "departures":
            rows = rows.with_columns(
                dep_delay=pl.col("dep_delay").cast(pl.Float64) + pl.Series(random.normal(0, 1, len(rows)).round(2))
            )
        os.makedirs(f"{store}/sources/{name}", exist_ok=True)
        rows.write_parquet(f"{store}/sources/{name}/part-0.parquet", row_group_size=131_072, compression="lz4")
    with open(f"{store}/sources/done", "w"):
        pass
