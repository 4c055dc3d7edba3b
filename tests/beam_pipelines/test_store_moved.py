"""A store is a folder: moved together with its sources it works, and nothing is read or written at its old place."""

from __future__ import annotations

import shutil
import sys
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.cli import main
from tests.support.marked_person import LiveStore, with_shops
from tests.support.tables import figures_of

WATCHED: list[str] = []
TOUCHED: list[tuple[str, str]] = []


def watch(event: str, arguments: tuple[object, ...]) -> None:
    """Every file that Python opens, lists, creates or removes below the watched folders."""
    for each in arguments if WATCHED and event.split(".")[0] in ("open", "os", "shutil", "sqlite3") else ():
        if isinstance(each, str | Path) and str(each).startswith(tuple(WATCHED)):
            TOUCHED.append((event, str(each)))


@pytest.fixture
def watching() -> object:
    sys.addaudithook(watch)  # it cannot be removed, and does nothing while no folder is watched
    yield
    WATCHED.clear()
    TOUCHED.clear()


@pytest.fixture
def moved(tmp_path: Path, watching: object) -> LiveStore:
    old, new = tmp_path / "old", tmp_path / "new"
    (old / "batch").mkdir(parents=True)
    store = LiveStore(old)
    for name, frame in with_shops().items():
        store.batch.put(name, frame)
    store.batch.run()
    store.run_live()
    shutil.move(old, new)
    # Whatever reads below a file, in Python or in a library, has an error; whatever creates the folder has one too.
    old.write_text("not a folder")
    WATCHED.append(f"{old}/")
    return LiveStore(new)


def test_every_command_works_where_a_store_has_been_moved(
    moved: LiveStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    batch, live, registry = moved.batch.flags, moved.flags, ["--registry", moved.registry]
    of_batch, of_live = batch[2:], [*live, *registry]
    scored = pl.read_delta(str(moved.batch.store / "predictions" / "vw"))
    answered = pl.read_delta(str(moved.store / "predictions_live" / "vw"))
    replay = ["--sources", moved.sources, "--start", "2024-01-21", "--chunk", "6h"]
    commands = [
        ["plan", *batch],
        ["tables", *of_batch],
        ["models", *of_batch],
        ["trace", *batch, "--prediction", str(scored["prediction_id"][0])],
        ["trace", *of_live, "--prediction", str(answered["prediction_id"][0])],
        ["features", *batch, "--max_dead_fraction", "1", "--run_id", "again"],
        ["verify", *batch, "--rows", "all"],
        ["verify", *live, "--live"],
        ["retrain", "1", *of_batch],
        ["parity", *of_live, "--batch_store", str(moved.batch.store)],
        ["features", "--streaming", *live, *replay, "--run_id", "restarted"],
        ["inference", "--streaming", *of_live],
        ["training", *batch],
        ["inference", *batch],
        ["vacuum", *of_batch],
    ]
    for command in commands:
        capsys.readouterr()
        assert main(command) == 0, command
        printed = capsys.readouterr()
        if "--registry" not in command:  # a live store cannot know where another store is now, and reports where it was
            assert f"{tmp_path}/old" not in printed.out + printed.err, command
        if command[0] == "trace" and "--registry" not in command:
            assert "orders/a.parquet  unchanged" in printed.out
    assert figures_of(moved.batch.store, "again")["rows_out"] == 0, "the files are the same, so no date is stale"
    assert figures_of(moved.store, "restarted")["counts"]["orders"]["rows"] > 0

    # A row is added after the move: an incremental run, and a table that a fresh store would have.
    orders = with_shops()["orders"]
    more = orders[-1:].with_columns(pl.col("at") + timedelta(days=1), k=pl.lit(9000, pl.Int64))
    more.write_parquet(moved.batch.store / "sources" / "orders" / "b.parquet")
    assert main(["features", *batch, "--max_dead_fraction", "1", "--run_id", "more"]) == 0
    assert 0 < figures_of(moved.batch.store, "more")["rows_out"] < len(scored), "not all of it again"
    assert main(["verify", *batch, "--rows", "all"]) == 0
    assert TOUCHED == []
    assert (tmp_path / "old").read_text() == "not a folder"
