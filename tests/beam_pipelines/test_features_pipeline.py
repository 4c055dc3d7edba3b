"""The features pipeline by its `main(argv)`, on real files."""

import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support import market, oracles
from tests.support.features_runs import days, dead_letters, feature_rows, run, same, table_of
from transforms.storage.delta_tables import newest_version

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store of spoiled sources after one run over everything."""
    store = market.write(tmp_path_factory.mktemp("whole"), market.spoiled(market.sources()), files=2)
    return store, run(store, "--statistics", "--max_dead_fraction", "1")


def test_features_read_back_are_those_of_the_oracle(whole: tuple[Path, dict[str, Any]]) -> None:
    store, _ = whole
    frames, view = market.sources(), market.load(store)
    tables = {name: frames[name] for name in view.sources}
    got = feature_rows(store)
    names = [*view.context, *view.columns]
    expected = pl.DataFrame(
        oracles.features(view, frames["visits"], tables), schema=got.select(names).schema, orient="row"
    )
    same(got.select(names), expected.sort("asked", "visit"))
    assert (got["date"] == got["asked"].dt.date()).all()
    assert got["row_id"].n_unique() == len(got)


def test_figures_of_a_run_balance_and_stand_in_run_json(whole: tuple[Path, dict[str, Any]]) -> None:
    store, figures = whole
    assert figures["pipeline"] == "features"
    assert figures["rows_out"] == figures["table_rows"] == len(feature_rows(store)) == 120
    assert figures["set_aside"] == len(dead_letters(store)) == sum(market.SET_ASIDE.values())
    assert figures["commit_version"] == newest_version(table_of(store)) == 0
    assert figures["table"] == table_of(store)
    assert (figures["first"], figures["last"]) == (
        "2024-03-01",
        "2024-03-06",
    )  # of the feature rows, whatever the time of a wrong clock
    assert figures["seconds"] > 0
    for name, rows in figures["sources"].items():
        assert rows["read"] == rows["used"] + rows["outside"] + rows["repeated"] + rows["dead"], name
    for name in market.SET_ASIDE:
        assert (figures["sources"][name]["dead"], figures["sources"][name]["repeated"]) == (
            market.SET_ASIDE[name],
            market.REPEATED[name],
        )
    assert figures["rows_in"] == sum(rows["read"] for rows in figures["sources"].values())


def test_dead_letters_say_file_row_field_rule_and_value(whole: tuple[Path, dict[str, Any]]) -> None:
    store, _ = whole
    found = dead_letters(store)
    assert set(found["view"]) == {"demand"}
    for source, file, row, field, value in found.select("source", "file", "row", "field", "value").rows():
        written = pl.from_arrow(pq.read_table(file))[row]
        assert f"/sources/{source}/" in file
        for name, text in zip(field.split(", "), value.split(", "), strict=True):
            shown = written[name].cast(pl.String)[0]
            assert text in (str(shown), "null", f"{written[name][0]}"), (source, field)
    rules = found.group_by("source", "rule").len().sort("source", "rule").rows()
    assert rules == [
        ("sales", "a number is finite", 2),
        ("sales", "a time is at most 1d ahead of the run's clock (ahead)", 1),
        ("shops", "one key has one row (the smallest was kept)", 1),
        ("stock", "nothing is known before it happens: seen ≤ counted", 2),
        ("visits", "a key is present", 1),
        ("visits", "a number is finite", 1),
        ("visits", "a time is not before 1990-01-01 (not_before)", 1),
        ("visits", "a time is present", 1),
        ("visits", "one key asks one question at one time (the smallest row was kept)", 2),
    ]


@pytest.mark.parametrize(("plan", "step"), [("slices", 1), ("slices", 3), ("shuffle", 3)])
def test_interval_by_interval_is_the_whole_to_the_last_bit(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, step: int, plan: str
) -> None:
    market.write(tmp_path, market.spoiled(market.sources()), files=2)
    starts = days()[:-1:step]
    figures = [
        run(
            tmp_path,
            "--start",
            str(day),
            "--end",
            str(day + timedelta(days=step)),
            "--plan",
            plan,
            "--block_rows",
            "100",
        )
        for day in starts
    ]
    same(feature_rows(tmp_path), feature_rows(whole[0]))
    reported, expected = (
        dead_letters(store).filter(pl.col("source") != "shops").drop("file") for store in (tmp_path, whole[0])
    )
    same(reported.sort(reported.columns), expected.sort(reported.columns))
    assert sum(each["rows_out"] for each in figures) == len(feature_rows(tmp_path))


def test_the_same_interval_again_replaces_itself(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(40))
    interval = ("--start", str(days()[1]), "--end", str(days()[3]))
    run(tmp_path, *interval)
    before, reported = feature_rows(tmp_path), len(dead_letters(tmp_path))
    assert run(tmp_path, *interval)["commit_version"] == 1
    same(feature_rows(tmp_path), before)
    assert len(dead_letters(tmp_path)) == reported


def test_the_same_run_again_commits_nothing_twice(tmp_path: Path) -> None:
    market.write(tmp_path, market.spoiled(market.sources(40)))
    interval = ("--start", str(days()[1]), "--end", str(days()[3]))
    run(tmp_path, *interval, run_id="nightly")
    before = feature_rows(tmp_path), dead_letters(tmp_path)
    again = run(tmp_path, *interval, run_id="nightly")
    assert again["commit_version"] == newest_version(table_of(tmp_path)) == 0
    for now, then in zip((feature_rows(tmp_path), dead_letters(tmp_path)), before, strict=True):
        same(now, then)


def test_a_second_run_over_everything_finds_nothing_to_do(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(40))
    run(tmp_path)
    again = run(tmp_path)
    assert (again["rows_out"], again["nothing_to_do"]) == (0, "no date is missing or stale")
    assert newest_version(table_of(tmp_path)) == 0


def test_late_rows_and_new_days_are_taken_up_as_if_everything_ran_again(tmp_path: Path) -> None:
    frames = market.sources(80)
    early = {
        name: frame.filter(pl.col(market.TIMES[name]) < market.at(3)) if name in market.TIMES else frame
        for name, frame in frames.items()
    }
    early["sales"] = early["sales"][::2]  # the others come late
    market.write(tmp_path / "a", early)
    run(tmp_path / "a")
    market.write(tmp_path / "a", frames)
    assert run(tmp_path / "a")["rows_out"] > 0
    market.write(tmp_path / "b", frames)
    run(tmp_path / "b")
    same(feature_rows(tmp_path / "a"), feature_rows(tmp_path / "b"))


def test_days_whose_questions_were_withdrawn_are_emptied(tmp_path: Path) -> None:
    frames = market.sources(60)
    market.write(tmp_path, frames)
    run(tmp_path)
    for plan, day in (("slices", days()[0]), ("shuffle", days()[1])):
        gone = pl.col("asked").dt.date() == day
        assert not feature_rows(tmp_path).filter(gone).is_empty()
        market.write(tmp_path, {**frames, "visits": frames["visits"].filter(~gone)})
        run(tmp_path, "--plan", plan)
        assert feature_rows(tmp_path).filter(gone).is_empty()


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(20))
    command = [
        sys.executable,
        "-m",
        "beam_pipelines.features",
        "--definition",
        str(market.define(tmp_path)),
        "--store",
        str(tmp_path),
        "--run_id",
        "r",
    ]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rows out" in done.stdout
    assert "visits" in done.stdout
    assert "Traceback" not in done.stderr
    assert feature_rows(tmp_path).schema["asked"] == pl.Datetime("us", "UTC")
    assert pa.schema(pq.read_schema(next(Path(table_of(tmp_path)).rglob("*.parquet")))).names[0] == "asked"
