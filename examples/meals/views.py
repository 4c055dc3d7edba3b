"""Three views of an order at the moment it is placed: its basket, its courier, and what is usual for its customer."""

import polars as pl

from examples.meals.sources import deliveries, orders
from schemas import Derived, FeatureView, Latest, Trailing

basket = FeatureView(
    "basket",
    spine=orders,
    key="order_id",
    features=[
        Derived(items=pl.col("items"), price=pl.col("price"), hour=pl.col("placed_at").dt.hour()),
        Trailing(orders, by="district", over=("1h", "3h"), stats={"*": "count"}),
        Trailing(deliveries, by="district", over="3h", stats={"minutes": ("mean", "q75")}),
    ],
)
courier = FeatureView(
    "courier",
    spine=orders,
    key="order_id",
    features=[
        Trailing(orders, by="courier", over="1h", stats={"*": "count"}),
        Trailing(deliveries, by="courier", over=("1d", "7d"), stats={"minutes": ("mean", "max", "count")}),
        Trailing(deliveries, by="courier", over="7d", where=pl.col("minutes") > 40, name="slow", stats={"*": "count"}),
        Latest(deliveries, by="courier", columns="minutes", max_age="6h", name="last"),
    ],
)
habits = FeatureView(
    "habits",
    spine=orders,
    key="order_id",
    features=[
        Derived(hour=pl.col("placed_at").dt.hour()),
        Trailing(orders, by="customer", over="14d", stats={"price": ("mean", "max"), "*": "count"}),
        Trailing(deliveries, by="customer", over="14d", stats={"tip": ("mean", "max", "count")}),
        Derived(against_usual=pl.col("price") / pl.col("orders_by_customer_price_mean_14d")),
    ],
)
