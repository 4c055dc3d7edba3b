"""The flights case without Millrace: Polars, XGBoost and three Parquet files, written by hand for this case.

Features have the names of those in `examples/flights/definition.py`.  Parameters, rounds and dates are read from there,
so that both sides train the same model.  Rolling windows run over one integer key (group number · span + time), which
Polars does faster than `.over(group)`.
"""

from __future__ import annotations

import glob
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import xgboost as xgb

from benchmarks.measure import Figures, stage
from examples.flights.definition import model

MICROSECONDS = {"h": 3_600_000_000, "d": 86_400_000_000}
CUTOFF = datetime(2014, 1, 2, tzinfo=UTC)  # the day after the last spine row
LATE = pl.col("dep_delay") > 15
ENCODED = ("origin", "carrier")


def main(sources: str, out: str) -> Figures:
    """Features, model and predictions of the year into `out`; the test AUC."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with stage("features"):
        features(Path(sources), folder / "features.parquet")
    with stage("training"):
        auc = train(Path(sources), folder)
    with stage("inference"):
        score(folder)
    (folder / "metrics.json").write_text(json.dumps({"auc": auc}))
    return {"auc": auc}


def features(sources: Path, out: Path) -> None:
    """The feature table as one Parquet file."""
    schedule = _read(sources, "schedule").sort("asked_at", "flight_id")
    departures = _read(sources, "departures").unique("flight_id", keep="first", maintain_order=True)
    arrivals = _read(sources, "arrivals").unique("flight_id", keep="first", maintain_order=True)
    weather = _read(sources, "weather").sort("observed_at", "origin")
    planes = _read(sources, "planes").select("tailnum", planes_year="year", planes_seats="seats")
    delays = _delays(schedule, departures)
    latest = _last_seen(schedule, departures, arrivals, weather)
    frame = pl.concat([schedule, *delays, _spine_rows_before(schedule, ("1h", "2h", "3h")), *latest], how="horizontal")
    joined = frame.lazy().join(planes.lazy(), on="tailnum", how="left", maintain_order="left")
    _derived(joined).collect().write_parquet(out, compression="lz4")


def _delays(schedule: pl.DataFrame, departures: pl.DataFrame) -> list[pl.DataFrame]:
    """Windows over the delays of departures."""
    delay = pl.col("dep_delay").cast(pl.Float64)
    quartiles = ("mean", "median", "q75")
    return [
        _trailing(
            schedule,
            departures,
            "origin",
            delay,
            {"1h": (*quartiles, "count"), "3h": (*quartiles, "count"), "24h": ("mean",)},
        ),
        _trailing(
            schedule,
            departures,
            "carrier",
            delay,
            {"1h": quartiles, "3h": quartiles, "24h": ("mean",)},
        ),
        _trailing(schedule, departures, ("origin", "carrier"), delay, {"3h": ("mean",), "7d": ("mean",)}),
        _trailing(schedule, departures, ("origin", "dest"), delay, {"28d": ("mean",)}),
        _trailing(schedule, departures, ("carrier", "flight"), delay, {"28d": ("mean", "count")}),
        _trailing(schedule, departures.filter(LATE), ("carrier", "flight"), delay, {"28d": ("count",)}, ("late", "")),
    ]


def _last_seen(
    schedule: pl.DataFrame, departures: pl.DataFrame, arrivals: pl.DataFrame, weather: pl.DataFrame
) -> list[pl.DataFrame]:
    """The last known row of the aircraft in each source, and of the weather."""
    return [
        _latest(schedule, (schedule, "asked_at"), "tailnum", ("due_minute", "block"), "23h", "planned_"),
        _latest(
            schedule,
            (departures, "departed_at"),
            "tailnum",
            ("dep_delay", "departed_minute", "block"),
            "21h",
            "left_",
        ),
        _latest(
            schedule,
            (arrivals, "arrived_at"),
            "tailnum",
            ("arr_delay", "arrived_minute", "block"),
            "21h",
            "landed_",
        ),
        _latest(
            schedule,
            (weather, "observed_at"),
            "origin",
            ("humid", "wind_speed", "precip", "pressure", "visib"),
            "6h",
            "weather_",
        ),
    ]


def _derived(frame: pl.LazyFrame) -> pl.LazyFrame:
    """The derived features, and the columns of the table."""
    local = pl.col("due_at").dt.convert_time_zone("America/New_York")
    since = {
        f"{name}_since": (pl.col("due_minute") - pl.col(f"{name}_{column}")) % 1440
        for name, column in (("planned", "due_minute"), ("left", "departed_minute"), ("landed", "arrived_minute"))
    }
    return (
        frame.with_columns(
            minute=local.dt.hour().cast(pl.Int32) * 60 + local.dt.minute(),
            weekday=local.dt.weekday(),
            queue=pl.col("schedule_by_origin_count_3h")
            - pl.col("schedule_by_origin_count_2h")
            - pl.col("departures_by_origin_dep_delay_count_1h"),
            late_share=pl.col("late_by_carrier_flight_count_28d")
            / pl.col("departures_by_carrier_flight_dep_delay_count_28d"),
            plane_age=local.dt.year() - pl.col("planes_year"),
            **since,
        )
        .with_columns(
            planned_slack=pl.col("planned_since") - 2 * pl.col("planned_block"),
            left_slack=pl.col("left_since") - 2 * pl.col("left_block"),
            landed_slack=pl.col("landed_since") - pl.col("landed_block"),
        )
        .with_columns(pl.selectors.float().cast(pl.Float32).fill_nan(None))
        .select("flight_id", "asked_at", *ENCODED, *model.view.feature_names)
    )


def train(sources: Path, folder: Path) -> float:
    """Fits the encodings and the model on the training months, and tests it on the test months."""
    split = model.split.resolve(CUTOFF)
    departures = _read(sources, "departures").select("flight_id", "departed_at", label=LATE)
    rows = pl.read_parquet(folder / "features.parquet").join(departures, on="flight_id", maintain_order="left")
    at, horizon = pl.col("asked_at"), timedelta(days=1)
    rows = rows.filter(pl.col("departed_at").is_between(at, at + horizon, closed="left"))
    parts = {
        "train": rows.filter(at + horizon <= split.train_end),
        "validate": rows.filter(at >= split.validate_start, at + horizon <= split.validate_end),
        "test": rows.filter(at >= split.test_start, at + horizon <= split.cutoff),
    }
    encodings = {
        name: parts["train"][name].value_counts().sort(["count", name], descending=[True, False])[name].to_list()
        for name in ENCODED
    }
    matrices = {name: _matrix(part, encodings) for name, part in parts.items()}
    labels = {name: part["label"].to_numpy() for name, part in parts.items()}
    data = xgb.QuantileDMatrix(matrices["train"], labels["train"])
    watched = xgb.QuantileDMatrix(matrices["validate"], labels["validate"], ref=data)
    booster = xgb.train(
        {"objective": model.objective, "eval_metric": model.metric, "seed": model.seed, **model.params},
        data,
        model.rounds,
        evals=[(watched, "validate")],
        verbose_eval=False,
    )
    booster.save_model(folder / "model.ubj")
    (folder / "encodings.json").write_text(json.dumps(encodings))
    return _auc(booster.inplace_predict(matrices["test"]), labels["test"])


def score(folder: Path) -> None:
    """Score every row of the feature file."""
    booster = xgb.Booster(model_file=folder / "model.ubj")
    encodings = json.loads((folder / "encodings.json").read_text())
    rows = pl.read_parquet(folder / "features.parquet")
    rows.select(
        "flight_id", "asked_at", score=pl.Series(booster.inplace_predict(_matrix(rows, encodings)))
    ).write_parquet(folder / "predictions.parquet", compression="lz4")


def _read(sources: Path, name: str) -> pl.DataFrame:
    return pl.read_parquet(sorted(glob.glob(str(sources / name / "*.parquet"))))


def _trailing(
    spine: pl.DataFrame,
    events: pl.DataFrame,
    by: str | tuple[str, ...],
    value: pl.Expr,
    windows: dict[str, tuple[str, ...]],
    names: tuple[str, str] = ("departures", "dep_delay_"),
) -> pl.DataFrame:
    """Statistics of `value` over each window before each spine row, in the order of `spine`; `names` are the parts of a
    feature's name before and after its keys."""
    keys = (by,) if isinstance(by, str) else by
    both = pl.concat(
        [
            events.select(
                *keys,
                pl.col("departed_at").to_physical().alias("t"),
                value.alias("v"),
                pl.lit(None, pl.UInt32).alias("row"),
            ),
            spine.select(
                *keys,
                pl.col("asked_at").to_physical().alias("t"),
                pl.lit(None, pl.Float64).alias("v"),
                pl.int_range(pl.len(), dtype=pl.UInt32).alias("row"),
            ),
        ]
    )
    group = pl.struct(keys) if len(keys) > 1 else pl.col(keys[0])
    low, high = both["t"].min(), both["t"].max()
    span = high - low + max(map(_length, windows))  # type: ignore[operator]
    both = both.select("row", "v", key=group.rank("dense").cast(pl.Int64) * span + pl.col("t") - low).sort("key")
    prefix = f"{names[0]}_by_{'_'.join(keys)}_{names[1]}"
    statistics = (
        _statistic(stat, window).alias(f"{prefix}{stat}_{window}")
        for window, stats in windows.items()
        for stat in stats
    )
    return both.lazy().select("row", *statistics).drop_nulls("row").sort("row").drop("row").collect()


def _length(window: str) -> int:
    return int(window[:-1]) * MICROSECONDS[window[-1]]


def _statistic(stat: str, window: str) -> pl.Expr:
    value, size = pl.col("v"), f"{_length(window)}i"
    match stat:
        case "mean":
            return value.rolling_mean_by("key", size, closed="left")
        case "median":
            return value.rolling_median_by("key", size, closed="left")
        case "q75":
            return value.rolling_quantile_by("key", size, quantile=0.75, interpolation="linear", closed="left")
        case _:
            counted = value.is_not_null().cast(pl.Int64)
            return counted.rolling_sum_by("key", size, closed="left").fill_null(0)


def _spine_rows_before(spine: pl.DataFrame, windows: tuple[str, ...]) -> pl.DataFrame:
    """Number of spine rows of the same origin in each window before."""
    return spine.select("asked_at", "origin", one=pl.lit(1, pl.Int64)).select(
        pl.col("one")
        .rolling_sum_by("asked_at", window, closed="left")
        .over("origin")
        .fill_null(0)
        .alias(f"schedule_by_origin_count_{window}")
        for window in windows
    )


def _latest(
    spine: pl.DataFrame, timed: tuple[pl.DataFrame, str], by: str, columns: tuple[str, ...], max_age: str, prefix: str
) -> pl.DataFrame:
    """Columns of the last event with the same key strictly before each spine row; `timed` are events and their time
    column."""
    events, time = timed
    events = events.drop_nulls(by).select(
        by, pl.col(time).alias("__t"), *(pl.col(name).alias(prefix + name) for name in columns)
    )
    return (
        spine.select(by, "asked_at")
        .join_asof(
            events,
            left_on="asked_at",
            right_on="__t",
            by=by,
            strategy="backward",
            tolerance=max_age,
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .select(prefix + name for name in columns)
    )


def _matrix(rows: pl.DataFrame, encodings: dict[str, list[str]]) -> npt.NDArray[np.float32]:
    """The model's inputs as float32, missing as NaN: the features in order, origin one-hot, carrier by rank."""

    def rank(name: str) -> pl.Expr:
        known = encodings[name]
        return pl.col(name).replace_strict(known, range(len(known)), default=len(known), return_dtype=pl.Float32)

    origin = rank("origin")
    return rows.select(
        *(pl.col(name).cast(pl.Float32) for name in model.view.feature_names),
        *((origin == i).cast(pl.Float32).alias(f"origin={i}") for i in range(len(encodings["origin"]) + 1)),
        rank("carrier"),
    ).to_numpy()


def _auc(scores: npt.NDArray[np.float32], labels: npt.NDArray[np.bool_]) -> float:
    ranks = pl.Series(scores).rank("average").to_numpy()
    positive = int(labels.sum())
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * (len(labels) - positive)))
