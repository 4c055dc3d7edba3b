"""Will a flight from New York leave more than 15 minutes late?  Predicted two hours before it is due."""

import polars as pl

from schemas import Derived, FeatureView, Gates, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

LATE = pl.col("dep_delay") > 15
FLIGHT = {"flight_id": pl.Int64, **dict.fromkeys(("origin", "dest", "carrier", "tailnum"), pl.String)}
FLIGHT |= {"flight": pl.Int32, "block": pl.Int32}  # block: scheduled minutes from gate to gate
WEATHER = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")

schedule = Source(
    "schedule",
    time="asked_at",
    columns={**FLIGHT, "due_at": pl.Datetime("us", "UTC"), "distance": pl.Float32, "due_minute": pl.Int32},
)
# A report may come ten minutes after the aircraft moved, and more than once.
departures = Source(
    "departures",
    time="departed_at",
    lateness="10m",
    unique="flight_id",
    order="flight_id",
    columns={**FLIGHT, "dep_delay": pl.Float32, "departed_minute": pl.Int32},
)
arrivals = Source(
    "arrivals",
    time="arrived_at",
    lateness="10m",
    unique="flight_id",
    order="flight_id",
    columns={**FLIGHT, "arr_delay": pl.Float32, "arrived_minute": pl.Int32},
)
weather = Source("weather", time="observed_at", columns={"origin": pl.String, **dict.fromkeys(WEATHER, pl.Float32)})
planes = Source("planes", columns={"tailnum": pl.String, **dict.fromkeys(("year", "seats", "engines"), pl.Int32)})

local = pl.col("due_at").dt.convert_time_zone("America/New_York")


def minutes_since(minute: str) -> pl.Expr:
    """Minutes from a minute of the day (UTC), less than a day before the flight is due, until it is due."""
    return (pl.col("due_minute") - pl.col(minute)) % 1440


view = FeatureView(
    "departure_delay",
    spine=schedule,
    key="flight_id",
    features=[
        Derived(
            minute=local.dt.hour().cast(pl.Int32) * 60 + local.dt.minute(),
            weekday=local.dt.weekday(),
            distance=pl.col("distance"),
            block=pl.col("block"),
        ),
        # Delays at the airport and of the airline: a few long ones move the mean, many short ones the quartiles.
        Trailing(departures, by="origin", over=("1h", "3h"), stats={"dep_delay": ("mean", "median", "q75", "count")}),
        Trailing(departures, by="carrier", over=("1h", "3h"), stats={"dep_delay": ("mean", "median", "q75")}),
        Trailing(departures, by="origin", over="24h", stats={"dep_delay": "mean"}),
        Trailing(departures, by="carrier", over="24h", stats={"dep_delay": "mean"}),
        Trailing(departures, by=("origin", "carrier"), over=("3h", "7d"), stats={"dep_delay": "mean"}),
        Trailing(departures, by=("origin", "dest"), over="28d", stats={"dep_delay": "mean"}),
        # How crowded it is: flights of spine rows 2 to 3 hours ago were due within the last hour; those that have not
        # left queue.
        Trailing(schedule, by="origin", over=("1h", "2h", "3h"), stats={"*": "count"}),
        Derived(
            queue=pl.col("schedule_by_origin_count_3h")
            - pl.col("schedule_by_origin_count_2h")
            - pl.col("departures_by_origin_dep_delay_count_1h")
        ),
        # What is usual for this flight number.  0 of 0 late flights is null, not a number.
        Trailing(departures, by=("carrier", "flight"), over="28d", stats={"dep_delay": ("mean", "count")}),
        Trailing(departures, by=("carrier", "flight"), over="28d", where=LATE, name="late", stats={"*": "count"}),
        Derived(
            late_share=(
                pl.col("late_by_carrier_flight_count_28d") / pl.col("departures_by_carrier_flight_dep_delay_count_28d")
            ).fill_nan(None)
        ),
        # Where the aircraft is: its last planned and actual departure and arrival, and the time left to fly there and
        # back, or back. Under 24 h before the flight is due, as minutes_since needs: 23 h between two plans, 21 h
        # before the prediction.
        Latest(schedule, by="tailnum", columns=("due_minute", "block"), max_age="23h", name="planned"),
        Latest(departures, by="tailnum", columns=("dep_delay", "departed_minute", "block"), max_age="21h", name="left"),
        Latest(arrivals, by="tailnum", columns=("arr_delay", "arrived_minute", "block"), max_age="21h", name="landed"),
        Derived(
            planned_since=minutes_since("planned_due_minute"),
            left_since=minutes_since("left_departed_minute"),
            landed_since=minutes_since("landed_arrived_minute"),
        ),
        Derived(
            planned_slack=pl.col("planned_since") - 2 * pl.col("planned_block"),
            left_slack=pl.col("left_since") - 2 * pl.col("left_block"),
            landed_slack=pl.col("landed_since") - pl.col("landed_block"),
        ),
        Latest(weather, by="origin", columns=("humid", "wind_speed", "precip", "pressure", "visib"), max_age="6h"),
        Lookup(planes, by="tailnum", columns=("year", "seats")),
        Derived(plane_age=local.dt.year() - pl.col("planes_year")),
    ],
)

model = Model(
    view,
    label=Label(departures, on="flight_id", value=LATE, within="1d", absent="drop"),
    objective="binary:logistic",
    metric="auc",
    split=TimeSplit(validate="2013-09-15", test="2013-10-01", embargo="1d"),
    encode={"origin": encoders.OneHot(), "carrier": encoders.Ordinal()},
    params={"max_depth": 6, "eta": 0.05, "min_child_weight": 30, "subsample": 0.8, "colsample_bytree": 0.4},
    rounds=300,
    gates=Gates(at_least={"auc": 0.74}, slices=("origin", "carrier"), max_gap={"auc": 0.10}, min_slice_rows=500),
)
