"""What is read: orders when they are placed, deliveries when they are done."""

import polars as pl

from schemas import Source

orders = Source(
    "orders",
    time="placed_at",
    columns={
        "order_id": pl.Int64,
        **dict.fromkeys(("customer", "courier", "district"), pl.String),
        "items": pl.Int32,
        "price": pl.Float64,
    },
)
deliveries = Source(
    "deliveries",
    time="delivered_at",
    lateness="5m",
    unique="order_id",
    order="order_id",
    columns={
        "order_id": pl.Int64,
        **dict.fromkeys(("customer", "courier", "district"), pl.String),
        "minutes": pl.Float32,
        "tip": pl.Float32,
    },
)
