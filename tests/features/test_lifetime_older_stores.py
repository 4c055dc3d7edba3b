"""A store whose lifetime windows an older version computed incorrectly is noticed and recomputed, and no other."""

from __future__ import annotations

import json
import logging
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from beam_pipelines import features
from beam_pipelines.commands.plan import main as plan
from beam_pipelines.commands.trace import trace
from tests.support.tables import figures_of
from transforms.features.manifest import MANIFEST_VERSION, OUTDATED
from transforms.features.manifest_store import read_manifest, warn_of_outdated
from transforms.storage.delta_tables import open_table

HERE = Path(__file__).parents[1] / "data" / "stores" / "lifetime"
DAYS = [0, 1, 2, 3, 4, 5, 7, 9]
RIGHT = [(2 ** (day + 1) - 1, day + 1) for day in DAYS]  # the sum and the number of the events until each day
Out = pytest.CaptureFixture[str]


@pytest.fixture
def old(tmp_path: Path) -> Path:
    shutil.copytree(HERE / "store", tmp_path / "store")
    return tmp_path / "store"


def run(old: Path, *flags: str, view: str = "ever") -> dict[str, Any]:
    name = f"run-{len(list(old.glob('runs/*')))}"
    words = ["--definition", str(old / f"{view}.py"), "--store", str(old), "--run_id", name, "--no-statistics"]
    words += ["--view", view]  # the files name both
    assert features.main([*words, *flags]) == 0
    return figures_of(old, name)


def uri(old: Path, view: str = "ever") -> str:
    return features.parse(["--definition", str(old / f"{view}.py"), "--store", str(old)]).table


def ever(old: Path) -> list[tuple[int, int]]:
    return pl.read_delta(uri(old)).sort("at").select("ever_by_k_v_sum_all", "ever_by_k_count_all").rows()


def train(old: Path, view: str, run_id: str, version: int) -> None:
    """What a run leaves that trained a model on a version of the table."""
    folder = old / "runs" / run_id / "model"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"feature_table": {"uri": uri(old, view), "version": version}}))


def test_the_store_is_what_its_name_says(old: Path) -> None:
    wrong = [ours != theirs for ours, theirs in zip(ever(old), RIGHT, strict=True)]
    assert wrong == [False] * 6 + [True] * 2
    assert read_manifest(open_table(uri(old))).version == 1


def test_all_is_computed_again_and_models_that_were_trained_on_it_are_named(
    old: Path, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    train(old, "ever", "learned", 1)
    train(old, "plain", "unconcerned", 1)
    flags = ["--definition", str(old / "ever.py"), "--store", str(old)]
    assert plan(flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(r"2024-01-01–2024-01-06 6 \d+ written before manifests of version 2, when .*: recomputed", out)
    figures = run(old)
    printed = capsys.readouterr().err
    assert "rows of 8 days written before manifests of version 2" in printed
    assert "recomputed" in printed
    assert "train it again: run learned (table version 1)" in printed
    assert "unconcerned" not in printed
    assert figures["models_trained_on_outdated_days"] == ["run learned (table version 1)"]
    assert (figures["outdated_days"], figures["dates"]) == (8, 8)
    assert ever(old) == RIGHT
    after = run(old)
    assert after["nothing_to_do"] == "no date is missing or stale"
    assert "models_trained_on_outdated_days" not in after


@pytest.mark.parametrize("registry", ["none", "broken"])
def test_without_a_registry_it_is_computed_all_the_same(old: Path, registry: str, capsys: Out) -> None:
    train(old, "ever", "learned", 1)
    train(old, "ever", "spoiled", 1)
    (old / "runs" / "spoiled" / "model" / "manifest.json").write_text("{")
    if registry == "broken":
        (old / "registry").mkdir()
        (old / "registry" / "mlflow.db").write_text("no database")
    assert run(old)["models_trained_on_outdated_days"] == ["run learned (table version 1)"]
    assert ever(old) == RIGHT
    printed = capsys.readouterr().err
    assert "the model of run spoiled cannot be read" in printed
    assert ("the model registry cannot be read" in printed) == (registry == "broken")


def test_a_run_of_some_days_leaves_the_others_to_be_computed(old: Path, capsys: Out) -> None:
    run(old, "--start", "2024-01-08", "--end", "2024-01-09")
    printed = capsys.readouterr().err
    assert "rows of 1 day written before" in printed
    assert "rows of 7 more days, from 2024-01-01 to 2024-01-10, were written before that" in printed
    wrong = [ours != theirs for ours, theirs in zip(ever(old), RIGHT, strict=True)]
    assert wrong == [False] * 7 + [True]
    manifest = read_manifest(open_table(uri(old)))
    assert manifest.version == MANIFEST_VERSION
    assert sum(digest == OUTDATED for digest in manifest.dates.values()) == 7
    figures = run(old)
    assert figures["outdated_days"] == figures["dates"] == 7
    assert ever(old) == RIGHT
    assert "nothing_to_do" in run(old)


@pytest.mark.parametrize("flags", [("--full",), ("--full", "--start", "2024-01-01", "--end", "2024-01-11")])
def test_full_computes_all_of_it(old: Path, flags: tuple[str, ...], capsys: Out) -> None:
    train(old, "ever", "learned", 0)
    figures = run(old, *flags)
    assert figures["models_trained_on_outdated_days"] == ["run learned (table version 0)"]
    assert "rows of 8 days written before" in capsys.readouterr().err
    assert ever(old) == RIGHT
    assert "nothing_to_do" in run(old)


def test_a_view_without_such_windows_goes_on_where_it_was(old: Path, capsys: Out) -> None:
    before = pl.read_delta(uri(old, "plain")).sort("at")
    figures = run(old, view="plain")
    assert (figures["nothing_to_do"], figures["commit_version"]) == ("no date is missing or stale", 1)
    assert "outdated_days" not in figures
    late = {"at": [datetime(2024, 1, 2, 7, tzinfo=UTC)], "k": [1], "v": [0.5]}
    pl.DataFrame(late, schema_overrides={"at": pl.Datetime("us", "UTC")}).write_parquet(
        old / "sources" / "events" / "late.parquet"
    )
    figures = run(old, view="plain")
    assert (figures["first"], figures["last"], figures["dates"]) == ("2024-01-02", "2024-01-04", 3)
    assert "written before" not in capsys.readouterr().err
    after = pl.read_delta(uri(old, "plain")).sort("at")
    assert (after["recent_by_k_v_sum_2d"] - before["recent_by_k_v_sum_2d"]).to_list() == [0, 0.5, 0.5, 0, 0, 0, 0, 0]


def test_a_changed_view_copies_no_such_columns_from_it(old: Path) -> None:
    text = (old / "ever.py").read_text()
    (old / "ever.py").write_text(
        text.replace(
            "[ever, recent]", '[ever, recent, Trailing(events, by="k", over="3d", stats={"v": "min"}, name="more")]'
        )
    )
    work = features.prepare(features.parse(["--definition", str(old / "ever.py"), "--store", str(old)]))
    assert work.copies is not None
    assert {*work.copies.columns.values()} == {("recent_by_k_v_sum_2d",)}
    run(old)
    assert ever(old) == RIGHT


def test_a_row_of_it_is_traced_with_a_warning(old: Path, capsys: Out) -> None:
    words = ["--definition", str(old / "ever.py"), "--store", str(old), "--key", "id=7"]
    assert trace(words) == 0
    assert "its windows over all history may be wrong" in " ".join(capsys.readouterr().out.split())
    run(old)
    capsys.readouterr()
    assert trace(words) == 0
    assert "may be wrong" not in " ".join(capsys.readouterr().out.split())
    assert trace([*words[:1], str(old / "plain.py"), *words[2:]]) == 0
    assert "may be wrong" not in " ".join(capsys.readouterr().out.split())


def test_readers_of_it_are_warned(old: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As training and inference are, before they read."""
    monkey = logging.getLogger("millrace")
    propagates, monkey.propagate = monkey.propagate, True
    try:
        for view, warned in (("ever", True), ("plain", False)):
            caplog.clear()
            options = features.parse(["--definition", str(old / f"{view}.py"), "--store", str(old)])
            table = open_table(options.table)
            assert table is not None
            warn_of_outdated(options.definition.view, table)
            assert ("8 days of" in caplog.text) == warned
    finally:
        monkey.propagate = propagates
