"""Bad input (issue 3): each case gets a dead letter with its reason, or an error that names the thing and the fix."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from beam_pipelines import features
from beam_pipelines.features import main
from schemas import load_definition
from schemas.durations import DAY
from schemas.errors import ContractError, DataError, DefinitionError, StoreError
from tests.support import market
from tests.support.features_runs import days, dead_letters, feature_rows, run, same, table_of
from transforms.features.plan import plan_features
from transforms.features.preparation import PreparedRun
from transforms.records.times import EPOCH, MICROSECOND
from transforms.storage.delta_tables import newest_version

ROOT = Path(__file__).parents[2]


def with_column(source: str, **columns: pl.Expr) -> Callable[[dict[str, pl.DataFrame]], dict[str, pl.DataFrame]]:
    return lambda frames: {**frames, source: frames[source].with_columns(**columns)}


def appended(source: str, **values: Any) -> Callable[[dict[str, pl.DataFrame]], dict[str, pl.DataFrame]]:
    """One more row like the source's last but for `values`."""

    def spoil(frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
        row = frames[source][-1:].with_columns(
            **{name: pl.lit(value, frames[source].schema[name]) for name, value in values.items()}
        )
        return {**frames, source: pl.concat([frames[source], row])}

    return spoil


SET_ASIDE: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {
    "null key": (appended("visits", visit=None), ("visit", "a key is present")),
    "null time": (appended("visits", asked=None), ("asked", "a time is present")),
    "infinity in a question": (appended("visits", visit=-1, size=float("inf")), ("size", "a number is finite")),
    "infinity in an event": (appended("sales", sale=-1, price=float("-inf")), ("price", "a number is finite")),
    "beyond float32": (appended("sales", sale=-1, price=1e300), ("price", "fits float32")),
    "1970": (appended("sales", sale=-1, sold=datetime(1970, 1, 1, tzinfo=UTC)), ("sold", "not before 1990-01-01")),
    "far future": (
        appended("visits", visit=-1, asked=datetime(2500, 1, 1, tzinfo=UTC)),
        ("asked", "ahead of the run's clock"),
    ),
    "contradicting question": (appended("visits", size=1e30), ("visit", "one key asks one question")),
    "contradicting dimension": (appended("shops", area=77), ("shop", "one key has one row")),
    "null in a unique column": (appended("sales", sale=None), ("sale", "a key is present")),
}


@pytest.mark.parametrize("case", SET_ASIDE)
def test_a_bad_row_is_a_dead_letter_and_the_rest_is_answered(tmp_path: Path, case: str) -> None:
    spoil, (field, rule) = SET_ASIDE[case]
    frames = market.sources(30)
    figures = run(market.write(tmp_path, spoil(frames), group=1000))
    (dead_letter,) = dead_letters(tmp_path).to_dicts()
    assert dead_letter["field"] == field
    assert rule in dead_letter["rule"]
    assert (figures["set_aside"], figures["rows_out"]) == (1, 30)


@pytest.mark.parametrize("column", ["size", "price"])
def test_nan_is_taken_as_no_value(tmp_path: Path, column: str) -> None:
    frames = market.sources(30)
    source = "visits" if column == "size" else "sales"
    nan = with_column(source, **{column: pl.col(column).fill_null(float("nan"))})(frames)
    run(market.write(tmp_path / "a", nan))
    run(market.write(tmp_path / "b", frames))
    same(feature_rows(tmp_path / "a"), feature_rows(tmp_path / "b"))
    assert dead_letters(tmp_path / "a").is_empty()


def test_extra_columns_are_ignored(tmp_path: Path) -> None:
    frames = with_column("visits", colour=pl.lit("red"), more=pl.lit([1]))(market.sources(30))
    assert run(market.write(tmp_path, frames))["rows_out"] == 30
    assert "colour" not in feature_rows(tmp_path).columns


def test_identical_questions_are_answered_once(tmp_path: Path) -> None:
    frames = market.sources(30)
    figures = run(market.write(tmp_path, {**frames, "visits": pl.concat([frames["visits"]] * 3)}))
    assert (figures["rows_out"], figures["set_aside"], figures["sources"]["visits"]["repeated"]) == (30, 0, 60)


def refused(store: Path, *flags: str) -> tuple[type[Exception], str]:
    with pytest.raises((ContractError, DataError, DefinitionError, StoreError)) as caught:
        run(store, *flags)
    assert newest_version(table_of(store)) is None
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda frames: {**frames, "sales": frames["sales"].drop("price")},
            ["'sales'", "declared column 'price'", "part-0.parquet"],
        ),
        (
            lambda frames: {**frames, "sales": frames["sales"].rename({"price": "prize"})},
            ["declared column 'price'", "Did you mean 'prize'?"],
        ),
        (
            with_column("visits", size=pl.col("size").cast(pl.Float64)),
            ["'visits'", "column 'size' must be Float32", "double", "part-0.parquet"],
        ),
        (
            with_column("sales", price=pl.col("price").cast(pl.String)),
            ["'sales'", "column 'price' must be Float64", "string"],
        ),
        (
            with_column("stock", counted=pl.col("counted").dt.replace_time_zone(None)),
            ["'stock'", "'counted'", "must have a time zone"],
        ),
        (
            with_column("visits", asked=pl.col("asked").dt.replace_time_zone(None)),
            ["'visits'", "'asked'", "convert_time_zone('UTC')"],
        ),
    ],
)
def test_a_file_that_breaks_its_contract_is_refused_by_name(
    tmp_path: Path, spoil: Callable[..., Any], words: list[str]
) -> None:
    kind, message = refused(market.write(tmp_path, spoil(market.sources(30))))
    assert kind is ContractError
    for word in words:
        assert word in message


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30), files=2)
    path = tmp_path / "sources" / "sales" / "part-1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    kind, message = refused(tmp_path)
    assert kind is ContractError
    assert str(path) in message


def retyped(store: Path, source: str, number: int, **columns: pl.Expr) -> Path:
    """One of a source's files with columns of other types."""
    path = store / "sources" / source / f"part-{number}.parquet"
    pl.read_parquet(path).with_columns(**columns).write_parquet(path)
    return path


@pytest.mark.parametrize(
    ("source", "column", "change", "types"),
    [
        ("sales", "price", pl.col("price").cast(pl.String), ("double", "large_string")),
        ("sales", "sale", pl.col("sale").cast(pl.Boolean), ("int64", "bool")),
        ("visits", "asked", pl.col("asked").dt.replace_time_zone(None), ("timestamp[us, tz=UTC]", "timestamp[us]")),
        ("shops", "area", pl.col("area").cast(pl.Int64), ("int32", "int64")),
    ],
)
def test_a_column_whose_type_changes_between_files_is_refused_by_both(
    tmp_path: Path, source: str, column: str, change: pl.Expr, types: tuple[str, str]
) -> None:
    market.write(tmp_path, market.sources(30), files=3)
    other = retyped(tmp_path, source, 1, **{column: change})
    kind, message = refused(tmp_path)
    assert kind is ContractError
    assert f"Source {source!r}: column {column!r} must be " in message
    first = other.with_name("part-0.parquet")
    assert f"{types[0]} in {first}, and {types[1]} in {other}" in message
    assert "in every file" in message
    assert f"Write {other} again with {column!r} as {types[0]}" in message


def test_a_column_that_was_narrower_in_older_files_is_read_as_declared(tmp_path: Path) -> None:
    frames = market.sources(30)
    run(market.write(tmp_path / "a", frames, files=3))
    market.write(tmp_path / "b", frames, files=3)
    retyped(
        tmp_path / "b",
        "sales",
        0,
        sale=pl.col("sale").cast(pl.Int32),
        city=pl.col("city").cast(pl.Int8),
        shop=pl.col("shop").cast(pl.Categorical),
    )
    retyped(
        tmp_path / "b", "visits", 1, asked=pl.col("asked").dt.cast_time_unit("ns").dt.convert_time_zone("Asia/Tokyo")
    )
    run(tmp_path / "b")
    same(feature_rows(tmp_path / "b"), feature_rows(tmp_path / "a"))


def set_back(frame: pl.DataFrame, time: str, pieces: int = 7) -> pl.DataFrame:
    """Rows as a writer leaves them whose clock is set back again and again: each piece in order, each before the
    last."""
    ordered = frame.sort(time, maintain_order=True)
    return pl.concat(
        [ordered[len(ordered) * i // pieces : len(ordered) * (i + 1) // pieces] for i in reversed(range(pieces))]
    )


def test_rows_of_clocks_that_ran_backwards_are_computed_as_if_in_order(tmp_path: Path) -> None:
    """Within row groups, over row groups and over files; blocks read the slices that they need, or rows are sent to
    them."""
    frames = market.spoiled(market.sources(60))
    run(market.write(tmp_path / "ordered", frames))
    for group, files, block_rows, plan in ((1000, 1, 800_000, "auto"), (9, 3, 120, "auto"), (9, 3, 120, "shuffle")):
        store = market.write(tmp_path / f"{group}-{plan}", frames, files=files, group=group)
        for name, time in market.TIMES.items():
            rows = set_back(frames[name], time)
            for i in range(files):
                part = rows[len(rows) * i // files : len(rows) * (i + 1) // files].to_arrow()
                pq.write_table(part, store / "sources" / name / f"part-{i}.parquet", row_group_size=group)
        figures = run(store, "--block_rows", str(block_rows), "--plan", plan)
        same(feature_rows(store), feature_rows(tmp_path / "ordered"))
        assert figures["set_aside"] == sum(market.SET_ASIDE.values())


HOURLY = """
import polars as pl
from schemas import FeatureView, Source, Trailing
visits = Source("visits", time="asked", columns={"visit": pl.Int64, "shop": pl.Int64})
view = FeatureView("hourly", visits, key="visit", features=[
    Trailing(visits, by="shop", over="1h", stats={"*": "count"})
])
"""


def test_rows_in_no_order_at_all_are_sent_to_their_blocks(tmp_path: Path) -> None:
    """Each block would read nearly everything for an hour's rows: the plan is a shuffle without a flag for it."""
    random = np.random.default_rng(5)
    rows = 3000
    hours, more = random.integers(0, 60 * 24, rows), random.integers(0, 3_600_000_000, rows)
    frame = pl.DataFrame({"visit": np.arange(rows), "shop": random.integers(0, 3, rows)}).with_columns(
        asked=pl.lit(market.START, pl.Datetime("us", "UTC"))
        + pl.duration(hours=pl.Series(hours), microseconds=pl.Series(more))
    )
    found = {}
    for name, ordered in (("sorted", frame.sort("asked")), ("shuffled", frame)):
        path = market.define(tmp_path / name, HOURLY)
        (path.parent / "sources" / "visits").mkdir(parents=True)
        pq.write_table(ordered.to_arrow(), path.parent / "sources" / "visits" / "part-0.parquet", row_group_size=50)
        view = load_definition(str(path)).view
        now = (datetime.now(UTC) - EPOCH) // MICROSECOND
        assert plan_features(view, str(path.parent / "sources"), None, None, now, 200).shuffled == (name == "shuffled")
        assert (
            main(["--definition", str(path), "--store", str(path.parent), "--block_rows", "200", "--no-statistics"])
            == 0
        )
        found[name] = pl.read_delta(str(path.parent / "features" / "hourly" / view.fingerprint)).sort("visit")
    same(found["shuffled"], found["sorted"])
    hour = (
        found["sorted"]
        .join(frame, on="shop", suffix="_before")
        .group_by("visit")
        .agg(
            (
                (pl.col("asked_before") < pl.col("asked"))
                & (pl.col("asked_before") >= pl.col("asked").dt.offset_by("-1h"))
            )
            .sum()
            .alias("count"),
            pl.col("visits_by_shop_count_1h").first(),
        )
    )
    assert (hour["count"] == hour["visits_by_shop_count_1h"]).all()
    assert len(hour) == rows


def test_an_interval_without_spine_rows_is_refused_with_those_there_are(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30))
    kind, message = refused(tmp_path, "--start", "2025-01-01", "--end", "2025-02-01")
    assert kind is DataError
    assert "but rows from 2024-03-01" in message


def test_an_interval_with_a_day_without_questions_inside_is_answered(tmp_path: Path) -> None:
    frames = market.sources(30)
    hole = frames["visits"].filter(pl.col("asked").dt.date() != days()[2])
    figures = run(
        market.write(tmp_path, {**frames, "visits": hole}), "--start", str(days()[1]), "--end", str(days()[4])
    )
    assert figures["rows_out"] == len(feature_rows(tmp_path)) > 0


def test_zero_questions_are_refused(tmp_path: Path) -> None:
    frames = market.sources(30)
    kind, message = refused(market.write(tmp_path, {**frames, "visits": frames["visits"].clear()}))
    assert kind is DataError
    assert "Source 'visits' must have rows in the interval" in message


def test_zero_events_and_dimensions_answer_with_nothing(tmp_path: Path) -> None:
    frames = {name: frame if name == "visits" else frame.clear() for name, frame in market.sources(30).items()}
    assert run(market.write(tmp_path, frames))["rows_out"] == 30
    assert feature_rows(tmp_path)["sales_by_shop_count_2d"].sum() == 0


def test_a_source_without_files_is_refused_by_its_folder(tmp_path: Path) -> None:
    frames = market.sources(30)
    del frames["stock"]
    kind, message = refused(market.write(tmp_path, frames))
    assert kind is DataError
    assert f"none under {tmp_path}/sources/stock" in message


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    market.write(tmp_path / "data", market.sources(30))
    path, store = market.define(tmp_path / "data"), tmp_path / "store"
    store.mkdir()
    (store / "features").write_text("a file where a folder should be")
    flags = ["--definition", str(path), "--sources", str(tmp_path / "data" / "sources"), "--run_id", "r"]
    with pytest.raises(StoreError, match=r"must be (writable|readable)") as caught:
        main([*flags, "--store", str(store)])
    assert str(store) in str(caught.value)
    with pytest.raises(StoreError, match=r"must be (writable|readable)"):
        main([*flags, "--store", str(store / "features")])


def test_a_stamp_at_the_edge_of_now_is_judged_by_the_runs_clock(tmp_path: Path) -> None:
    frames = market.sources(30)
    now = datetime.now(UTC)
    near = appended("sales", sale=-1, sold=now + timedelta(hours=23))(frames)
    far = appended("sales", sale=-2, sold=now + timedelta(hours=25))(near)
    figures = run(market.write(tmp_path, far))
    assert figures["set_aside"] == 1
    assert dead_letters(tmp_path)["field"].to_list() == ["sold"]
    assert (now - EPOCH) // MICROSECOND % DAY >= 0


def test_an_expression_that_fails_on_a_row_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30))
    market.define(
        tmp_path, market.DEFINITION.replace('hour=pl.col("asked").dt.hour()', 'hour=pl.col("shop").cast(pl.Int64)')
    )
    kind, message = refused(tmp_path)
    assert kind is DataError
    assert "Derived(hour, size) must be computable for every row" in message
    assert "Compute" in message


def test_integer_time_statistics_of_other_writers_are_understood(tmp_path: Path) -> None:
    """As pandas and Spark write: nanoseconds, or INT96, which has no statistics."""
    frames = market.sources(30)
    run(market.write(tmp_path / "a", frames))
    market.write(tmp_path / "b", frames)
    for name, time in market.TIMES.items():
        folder = tmp_path / "b" / "sources" / name
        nanoseconds = frames[name].with_columns(pl.col(time).dt.cast_time_unit("ns")).to_arrow()
        pq.write_table(nanoseconds, folder / "part-0.parquet", version="2.6")
    run(tmp_path / "b")
    same(feature_rows(tmp_path / "b"), feature_rows(tmp_path / "a"))


def during(change: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `change` happen once the run has listed its sources."""
    prepare = features.prepare

    def then(options: features.FeaturesOptions) -> PreparedRun:
        prepared = prepare(options)
        change()
        return prepared

    monkeypatch.setattr(features, "prepare", then)


@pytest.mark.parametrize("source", ["visits", "sales", "shops"])
@pytest.mark.parametrize("change", ["removed", "replaced", "the folder removed"])
def test_files_that_change_during_a_run_stop_it_even_if_no_block_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, change: str
) -> None:
    market.write(tmp_path, market.sources(30))
    other = tmp_path / "sources" / source / "older" / "none.parquet"
    other.parent.mkdir()
    pl.read_parquet(other.parent.parent / "part-0.parquet").clear().write_parquet(other)
    happens = {
        "removed": other.unlink,
        "replaced": lambda: other.write_bytes(other.read_bytes() + b" "),
        "the folder removed": lambda: shutil.rmtree(other.parent),
    }
    during(happens[change], monkeypatch)
    kind, message = refused(tmp_path)
    assert kind is DataError
    assert f"Source {source!r}: its files must not change while a run reads them" in message
    assert f"{other} {'replaced' if change == 'replaced' else 'gone'} since the run began" in message


def test_files_that_are_added_during_a_run_are_named_and_read_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    frames = market.sources(30)
    market.write(tmp_path, {**frames, "sales": frames["sales"][:-1]})
    new = tmp_path / "sources" / "sales" / "new.parquet"
    with monkeypatch.context() as patch:
        during(lambda: frames["sales"][-1:].write_parquet(new), patch)
        run(tmp_path)
    assert f"source sales: not read, since they were added after the run began: {new}" in capfd.readouterr().err
    run(tmp_path)
    run(market.write(tmp_path / "fresh", frames))
    same(feature_rows(tmp_path), feature_rows(tmp_path / "fresh"))


MISTAKES = {
    "cycle": (
        "Derived(density=",
        'Derived(a=pl.col("b")), Derived(b=pl.col("a")), Derived(density=',
        "must use only features above it",
        2,
    ),
    "unknown column": ('"price": ("mean"', '"prise": ("mean"', "Did you mean 'price'?", 2),
    "window of zero": ('over=("6h", "2d")', 'over=("0h", "2d")', "longer than zero", 2),
    "looks around": ('pl.col("price") > 20', 'pl.col("price") > pl.col("price").mean()', "row-local", 2),
    "python mistake": ("view = FeatureView", "view = FeatureVeiw", "FeatureVeiw", 2),
    "spelling": ("import Derived", "import Derivd", "Derivd", 2),
}

DRIVER = """
import json, sys
from beam_pipelines import features
from beam_pipelines.features import main
from beam_pipelines.runtime.errors import guard
for argv in json.loads(sys.argv[1]):
    print("--", guard(main)(argv), flush=True)
    print("--", file=sys.stderr, flush=True)
"""


def test_mistakes_end_with_a_message_an_exit_code_and_no_traceback(tmp_path: Path) -> None:
    cases: list[tuple[list[str], str, int]] = []
    for name, (before, after, words, code) in MISTAKES.items():
        path = market.define(tmp_path / name.replace(" ", "_"), market.DEFINITION.replace(before, after, 1))
        cases.append((["--definition", str(path), "--store", str(tmp_path)], words, code))
    good = str(market.define(tmp_path))
    market.write(tmp_path, {**market.sources(20), "sales": market.sources(20)["sales"].drop("price")})
    frames = market.sources(20)
    market.write(tmp_path / "failing", frames)
    failing = market.define(
        tmp_path / "failing",
        market.DEFINITION.replace('hour=pl.col("asked").dt.hour()', 'hour=pl.col("shop").cast(pl.Int64)'),
    )
    market.write(tmp_path / "blocked", frames)
    (tmp_path / "blocked" / "dead_letters").write_text("in the way")
    cases += [
        (["--definition", good, "--store", str(tmp_path)], "declared column 'price'", 3),
        (["--definition", good, "--store", str(tmp_path / "nowhere")], "must have files", 3),
        (["--definition", str(failing), "--store", str(tmp_path / "failing")], "must be computable for every row", 3),
        (["--definition", good, "--store", str(tmp_path / "blocked")], "must be writable", 4),
        (["--definition", "no_such_module", "--store", str(tmp_path)], "there is no module 'no_such_module'", 2),
        (["--definition", good, "--store", str(tmp_path), "--strat", "2024-03-01"], "did you mean --start?", 2),
        (
            ["--definition", good, "--store", str(tmp_path), "--start", "1st of March"],
            "is not a day like 2013-01-31",
            2,
        ),
        (
            ["--definition", good, "--store", str(tmp_path), "--start", "2024-03-02", "--end", "2024-03-02"],
            "comes before --end",
            2,
        ),
        (["--definition", good], "--store", 2),
    ]
    argvs = json.dumps([argv for argv, _, _ in cases])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DRIVER, argvs],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    printed = done.stderr.split("--\n")
    codes = [int(line.removeprefix("-- ")) for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert len(codes) == len(cases), done.stderr
    for (argv, words, code), stderr, found in zip(cases, printed, codes, strict=False):
        assert words in stderr, argv
        assert "Traceback" not in stderr, stderr
        assert 'File "' not in stderr, stderr
        assert found == code, argv
