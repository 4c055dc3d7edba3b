"""Makes the project's data: some couriers are slow, some customers generous, and rush hours fill the streets.

python -m examples.meals.data --store out/meals
"""

from __future__ import annotations

import argparse
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl

from examples.meals.sources import deliveries, orders

DAYS, ORDERS = 35, 2_500
START = datetime(2024, 3, 1, tzinfo=UTC)


def frames(seed: int = 0) -> dict[str, pl.DataFrame]:
    """Both sources, in order of time."""
    chance = random.Random(seed)
    pace = {f"courier {i}": chance.gauss(0, 6) for i in range(25)}
    generous = {f"customer {i}": chance.random() for i in range(200)}
    placed, done = [], []
    hours = [11, 12, 12, 13, 17, 18, 18, 19, 19, 20, 21]
    seconds = sorted(
        86_400 * chance.randrange(DAYS) + 3_600 * chance.choice(hours) + chance.randrange(3_600) for _ in range(ORDERS)
    )
    for number, second in enumerate(seconds):
        at = START + timedelta(seconds=second)
        customer, courier = chance.choice(list(generous)), chance.choice(list(pace))
        district = chance.choice(["harbour", "hill", "park"])
        who = {"order_id": number, "customer": customer, "courier": courier, "district": district}
        items = chance.randint(1, 6)
        price = round(items * chance.uniform(6, 14), 2)
        rush = 8 if at.hour in (12, 18, 19) else 0
        minutes = max(8.0, 28 + pace[courier] + rush + 2 * (district == "hill") + chance.gauss(0, 6))
        tip = max(0.0, round(generous[customer] * price * 0.2 + chance.gauss(0, 0.5) - (minutes > 40), 2))
        placed.append({"placed_at": at, **who, "items": items, "price": price})
        done.append({"delivered_at": at + timedelta(minutes=minutes), **who, "minutes": minutes, "tip": tip})
    return {
        "orders": pl.DataFrame(placed, schema=orders.schema),
        "deliveries": pl.DataFrame(done, schema=deliveries.schema).sort("delivered_at", "order_id"),
    }


def write(store: str | Path) -> None:
    """One Parquet file per source under `<store>/sources`."""
    for name, frame in frames().items():
        folder = Path(store) / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / "all.parquet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the project's sources.")
    parser.add_argument("--store", required=True, help="folder of the store")
    write(parser.parse_args().store)
