"""Four models over the three views: two read one view, two join several."""

import polars as pl

from examples.meals.sources import deliveries
from examples.meals.views import basket, courier, habits
from schemas import Gates, Label, Model, TimeSplit, encoders

SLOW = Label(deliveries, on="order_id", value=pl.col("minutes") > 40, within="3h")
SPLIT = TimeSplit(validate="7d", test="7d", embargo="3h")
SMALL = {"max_depth": 3, "eta": 0.2}

# Will it take more than 40 minutes?  Once with all that is known, once with the courier alone.
slow = Model(
    [basket, courier],
    label=SLOW,
    split=SPLIT,
    name="slow_delivery",
    encode={"district": encoders.OneHot()},
    params=SMALL,
    rounds=40,
    gates=Gates(at_least={"auc": 0.6}, slices=("district",)),
)
slow_courier = Model(courier, SLOW, SPLIT, name="slow_courier", params=SMALL, rounds=40)
# How long will it take?
minutes = Model(
    basket,
    label=Label(deliveries, on="order_id", value=pl.col("minutes"), within="3h"),
    split=SPLIT,
    objective="reg:squarederror",
    metric="rmse",
    name="minutes",
    params=SMALL,
    rounds=40,
)
# How much will the customer tip?
tip = Model(
    [habits, basket],
    label=Label(deliveries, on="order_id", value=pl.col("tip"), within="3h"),
    split=SPLIT,
    objective="reg:squarederror",
    metric="rmse",
    name="tip",
    features=["habits.*", "price", "items"],
    params=SMALL,
    rounds=40,
)
