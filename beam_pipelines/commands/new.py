"""new: writes a folder with a use case that runs, as a start for one's own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from beam_pipelines.runtime.arguments import Parser
from beam_pipelines.runtime.errors import guard
from schemas.errors import DefinitionError, StoreError
from schemas.sources import identifier

DEFINITION = '''"""Will a customer pay an order late?  Predicted when the order is placed."""

import polars as pl

from schemas import Derived, FeatureView, Gates, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

# What is read: <store>/sources/<name>, Parquet files or a Delta table.  `time` is when a row became known.
orders = Source(
    "orders",
    time="placed_at",
    columns={"order_id": pl.Int64, "customer": pl.String, "region": pl.String, "amount": pl.Float64},
)
payments = Source(
    "payments",
    time="paid_at",
    lateness="1h",
    unique="order_id",
    order="order_id",
    columns={"order_id": pl.Int64, "customer": pl.String, "days_late": pl.Float32},
)
# Without a time it is a dimension.
customers = Source("customers", columns={"customer": pl.String, "segment": pl.String, "staff": pl.Int32})

LATE = pl.col("days_late") > 0

# One row per order; each feature as of the moment the order was placed.
view = FeatureView(
    "@NAME@",
    spine=orders,
    key="order_id",
    features=[
        Derived(amount=pl.col("amount"), hour=pl.col("placed_at").dt.hour(), weekday=pl.col("placed_at").dt.weekday()),
        Trailing(payments, by="customer", over=("7d", "30d"), stats={"days_late": ("mean", "max", "count")}),
        Trailing(payments, by="customer", over="30d", where=LATE, name="late", stats={"*": "count"}),
        Trailing(orders, by="customer", over="7d", stats={"amount": "mean"}),
        Latest(payments, by="customer", columns="days_late", max_age="60d", name="last"),
        Lookup(customers, by="customer", columns=("segment", "staff")),
        # May use what stands above it.
        Derived(unusual=pl.col("amount") / pl.col("orders_by_customer_amount_mean_7d")),
    ],
)

# What is learned: was it paid late, or not at all within 20 days?  Orders of the last 20 days wait.
model = Model(
    view,
    label=Label(payments, on="order_id", value=LATE, within="20d", absent=1),
    split=TimeSplit(validate="40d", test="40d", embargo="1d"),
    encode={"region": encoders.OneHot(), "customers_segment": encoders.Ordinal()},
    params={"max_depth": 4, "eta": 0.1},
    rounds=60,
    gates=Gates(at_least={"auc": 0.6}, slices=("region",), max_gap={"auc": 0.2}, min_slice_rows=100),
)
'''

DATA = '''"""Writes small made-up sources for the case: replace it with what writes yours.

python @FOLDER@/data.py --store @STORE@
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import polars as pl

DAYS, ORDERS, CUSTOMERS = 150, 5_000, 100


def sources(seed: int = 0) -> dict[str, pl.DataFrame]:
    """Every source as a frame: some customers pay late, and more so when the order is large."""
    random = np.random.default_rng(seed)
    names = np.array([f"customer {i}" for i in range(CUSTOMERS)])
    habit = random.normal(0, 4, CUSTOMERS)
    who = random.integers(0, CUSTOMERS, ORDERS)
    amount = np.round(random.lognormal(4, 1, ORDERS), 2)
    second = np.sort(random.integers(0, DAYS * 86_400, ORDERS))
    late = np.round(habit[who] + amount / 100 + random.normal(0, 2, ORDERS) - 1)
    start = pl.datetime(2024, 1, 1, time_unit="us", time_zone="UTC")
    orders = pl.DataFrame(
        {"order_id": np.arange(ORDERS), "customer": names[who], "amount": amount, "second": second}
    ).select(
        (start + pl.duration(seconds="second")).alias("placed_at"),
        "order_id",
        "customer",
        "amount",
        region=pl.Series(random.choice(np.array(["north", "south", "west"]), ORDERS)),
    )
    payments = orders.select(
        (pl.col("placed_at") + pl.duration(hours=pl.Series(np.maximum(14 + late, 1) * 24))).alias("paid_at"),
        "order_id",
        "customer",
        days_late=pl.Series(late, dtype=pl.Float32),
    ).sort("paid_at", "order_id")
    customers = pl.DataFrame(
        {
            "customer": names,
            "segment": random.choice(np.array(["shop", "office", "school"]), CUSTOMERS),
            "staff": random.integers(1, 500, CUSTOMERS).astype(np.int32),
        }
    )
    return {"orders": orders, "payments": payments, "customers": customers}


def write(store: str) -> None:
    """One Parquet file per source under `<store>/sources`."""
    for name, frame in sources().items():
        folder = Path(store) / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / "all.parquet")
        print(f"{len(frame):,} rows of {name} in {folder}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Writes the case's sources.")
    parser.add_argument("--store", required=True, help="folder of the store")
    write(parser.parse_args().store)
'''


def main(argv: Sequence[str]) -> int:
    """Writes the folder and prints what to run next."""
    parser = Parser("millrace new", description="Write a use case that runs: a definition and made-up data.")
    parser.add_argument("name", help="of the case, and of the folder to make")
    parser.add_argument("--folder", help="where the folder goes (default: here)", default=".")
    flags = parser.parse_args(list(argv))
    name = identifier(flags.name, "The name of a case")
    folder, store = Path(flags.folder) / name, Path(flags.folder) / "out" / name
    write(folder, name, store)
    definition = folder / "definition.py"
    flag = f"--definition {definition} --store {store}"
    print(f"{definition}  the one file to change: sources, features, label, model")
    print(f"{folder / 'data.py'}  writes made-up sources, so that it runs as it is\n\nRun next:\n")
    for command in (
        f"python {folder / 'data.py'} --store {store}",
        *(f"millrace {each} {flag}" for each in ("plan", "features", "training", "inference")),
        f"millrace tables --store {store}",
    ):
        print(f"  {command}")
    return 0


def write(folder: Path, name: str, store: Path) -> None:
    """Writes the files of the case.

    Raises:
        DefinitionError: the folder exists already; nothing is overwritten.
        StoreError: it cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        for file, text in {"definition.py": DEFINITION, "data.py": DATA}.items():
            filled = text.replace("@NAME@", name).replace("@FOLDER@", str(folder)).replace("@STORE@", str(store))
            (folder / file).write_text(filled, encoding="utf-8")
    except FileExistsError:
        raise DefinitionError(
            "A new case goes into a new folder", str(folder), "Choose another name, or --folder"
        ) from None
    except OSError as error:
        raise StoreError(
            "The folder can be written", f"{folder}: {error.strerror}", "Choose another --folder"
        ) from None


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
