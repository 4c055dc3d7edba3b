"""Stores that earlier versions wrote are read, continued, scored and traced by this one, and give what they gave."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from beam_pipelines import cli
from tests.support.stores import ARCHIVES, Stored, restored
from tests.support.tables import rows_of
from transforms.lineage.feature_parity import check_parity
from transforms.models.bundle import load_bundle
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import predictions_uri

Out = pytest.CaptureFixture[str]
SIZE = 1_500_000


@pytest.fixture
def shop(tmp_path: Path) -> Stored:
    return restored("shop", tmp_path)


@pytest.fixture
def live(tmp_path: Path) -> Stored:
    return restored("live", tmp_path)


def same(left: pl.DataFrame, right: pl.DataFrame, *by: str) -> None:
    """Bit for bit, whatever the order of rows and columns."""
    left, right = (frame.select(sorted(frame.columns)).sort(by) for frame in (left, right))
    assert_frame_equal(left, right, check_exact=True)


def test_the_archives_stay_small_and_each_is_explained() -> None:
    archives = sorted(ARCHIVES.glob("*.tar.gz"))
    assert sum(path.stat().st_size for path in ARCHIVES.iterdir()) < SIZE
    reported = (ARCHIVES / "README.md").read_text()
    for path in archives:
        assert f"`{path.name.removesuffix('.tar.gz')}`" in reported
    assert len(archives) == len(list(ARCHIVES.glob("*.json"))) == 6


# -- shop: nothing of what later versions mend concerns it ---------------------------------------------------------


def test_its_fingerprint_stays(shop: Stored) -> None:
    assert {"definition.py": shop.view().fingerprint} == shop.expected["fingerprints"]
    assert len(shop.features("buying", shop.view().fingerprint)) == shop.expected["rows"]


def test_nothing_is_stale_and_a_fresh_run_gives_its_table(shop: Stored, tmp_path: Path) -> None:
    before = shop.features("buying", shop.view().fingerprint)
    shop.millrace("features", "--run_id", "third")
    assert shop.run("third")["nothing_to_do"]
    same(shop.features("buying", shop.view().fingerprint), before, "row_id")
    fresh = Stored("shop", tmp_path / "fresh")
    fresh.folder.mkdir()
    (fresh.folder / "definition.py").write_bytes((shop.folder / "definition.py").read_bytes())
    fresh.millrace("features", "--run_id", "fresh", "--sources", str(shop.store / "sources"))
    same(fresh.features("buying", fresh.view().fingerprint), before, "row_id")


def test_a_changed_day_makes_only_what_can_see_it_stale(shop: Stored) -> None:
    """Its digests are those of this version: a row more on the last day makes that day and none before stale."""
    fingerprint = shop.view().fingerprint
    before = shop.features("buying", fingerprint)
    last = before["asked"].max()
    visits = pl.read_parquet(shop.store / "sources" / "visits" / "part-0.parquet")
    more = visits.filter(pl.col("asked") == last).with_columns(pl.col("visit") + 1_000_000)
    more.write_parquet(shop.store / "sources" / "visits" / "more.parquet", use_pyarrow=True)
    shop.millrace("features", "--run_id", "third")
    figures = shop.run("third")
    assert (figures["first"], figures["last"], figures["dates"]) == (str(last.date()), str(last.date()), 1)  # type: ignore[union-attr]
    after = shop.features("buying", fingerprint)
    assert len(after) == len(before) + len(more) == len(before) + 1
    same(after.filter(pl.col("visit") < 1_000_000), before, "row_id")


def test_its_champion_scores_as_it_did(shop: Stored) -> None:
    version, folder = shop.registry.resolve("buying")
    assert version == shop.expected["version"]
    assert load_bundle(folder).fingerprint == shop.view().fingerprint
    uri = predictions_uri(str(shop.store), "buying")
    before = rows_of(uri)
    shop.millrace("inference", "--run_id", "again")
    after = rows_of(uri)
    assert len(after) == shop.expected["predictions"]
    assert shop.run("again")["rows_out"] == shop.expected["predictions"]
    same(after, before, "prediction_id")


def test_its_rows_and_predictions_are_traced(shop: Stored, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    fingerprint = shop.view().fingerprint
    row = shop.features("buying", fingerprint).sort("asked").row(-1, named=True)
    capsys.readouterr()
    shop.millrace("trace", "--key", f"visit={row['visit']}")
    out = capsys.readouterr().out
    assert f"row_id {row['row_id']}" in out
    assert "by run second" in out
    assert f"fingerprint {fingerprint}" in out
    assert "as when it was computed" in out
    scored = rows_of(predictions_uri(str(shop.store), "buying")).filter(row_id=row["row_id"]).row(0, named=True)
    shop.millrace("trace", "--prediction", str(scored["prediction_id"]))
    out = capsys.readouterr().out
    assert re.search(r"version 1 of buying", out)
    assert "trained by run learn" in out
    assert f"row_id {row['row_id']}" in out


def test_it_is_listed_vacuumed_and_trained_on(shop: Stored, capsys: Out) -> None:
    assert cli.main(["tables", "--store", str(shop.store)]) == 0
    assert shop.view().fingerprint in capsys.readouterr().out
    before = shop.features("buying", shop.view().fingerprint)
    assert cli.main(["vacuum", "--store", str(shop.store)]) == 0
    same(shop.features("buying", shop.view().fingerprint), before, "row_id")
    shop.millrace("training", "--run_id", "learnt-again", "--no-keep_examples", "--threads", "1")
    assert [each.version for each in shop.registry.versions("buying")] == ["1", "2"]


# -- views whose values some version mended: what is stored is as recorded, what is right is right still ----------


def test_a_lifetime_table_that_was_right_is_right_after_another_run(tmp_path: Path) -> None:
    made = restored("lifetime_good", tmp_path)
    made.millrace("features", "--run_id", "third")
    rows = made.features("vw", made.view().fingerprint)
    assert differing(rows, made.expected["right"]) == {}


def differing(rows: pl.DataFrame, expected: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Rows that are not as expected, by id."""
    found = {str(row["id"]): row for row in rows.iter_rows(named=True)}
    assert found.keys() == expected.keys()
    return {key: found[key] for key, want in expected.items() if {name: found[key][name] for name in want} != want}


def test_the_poisoned_lifetime_table_holds_what_was_recorded(tmp_path: Path) -> None:
    made = restored("lifetime_poisoned", tmp_path)
    rows = made.features("vw", made.expected["fingerprints"]["definition.py"])
    assert differing(rows, made.expected["stored"]) == {}
    assert len(differing(rows, made.expected["right"])) == made.expected["wrong_rows"] == len(rows) == 120
    assert made.registry.resolve("vw")[0] == "1"


@pytest.mark.parametrize("name", ["narrow", "ties"])
def test_wrapped_and_tied_tables_hold_what_was_recorded(tmp_path: Path, name: str) -> None:
    made = restored(name, tmp_path)
    for view, stored in made.expected["stored"].items():
        rows = made.features(view, made.expected["fingerprints"][f"{view}.py"])
        assert differing(rows, {str(each["id"]): each for each in stored}) == {}


def test_a_view_beside_wrapped_ones_keeps_fingerprint_and_table(tmp_path: Path) -> None:
    made = restored("narrow", tmp_path)
    fingerprint = made.view("wide.py").fingerprint
    assert fingerprint == made.expected["fingerprints"]["wide.py"]
    made.millrace("features", "--run_id", "third", definition="wide.py")
    assert made.run("third")["nothing_to_do"]
    rows = made.features("wide", fingerprint)
    assert differing(rows, {str(each["id"]): each for each in made.expected["stored"]["wide"]}) == {}


# -- live: stopped in the middle, continued from the tables --------------------------------------------------------


def test_a_live_store_goes_on_from_its_tables(live: Stored) -> None:
    """Every feature row is that of a job which was never stopped."""
    stored = live.feature_rows()
    assert len(stored) == live.expected["answers_stored"]
    whole = pl.read_parquet(live.folder / "answers_whole.parquet")
    live.go_on([*live.messages("before")[-3:], *live.messages("to_come")])
    found = live.feature_rows()
    assert len(found) == live.expected["answers_whole"]
    # Whether a spine row that is pending over a stop is late depends on the completeness at the restart: more are late,
    # none less.
    late = pl.col("__late")
    assert whole.filter(late).join(found.filter(late), on="row_id", how="anti").is_empty()
    newly = found.filter(late).join(whole.filter(late), on="row_id", how="anti")
    assert newly.join(stored, on="row_id", how="semi").is_empty()
    reported = [
        name for name in whole.columns if name not in ("__answered", "__late")
    ]  # later versions may have more keys
    same(found.select(reported), whole.select(reported), "row_id")
    kept = found.join(stored, on="row_id", how="semi").select(stored.columns)
    same(kept, stored, "row_id")
    checked = check_parity(live.view(), str(live.store))
    assert (checked.feature_rows, checked.differing) == (len(found), 0)
    live.millrace("inference", "--streaming", "--run_id", "went-on")
    live.millrace("parity")
    for row in (stored.row(0, named=True), found.join(stored, on="row_id", how="anti").row(0, named=True)):
        live.millrace("trace", "--live", "--key", f"visit={row['visit']}", "--time", row["asked"].isoformat())
    live.millrace("verify", "--live", "--rows", "all")
    live.millrace("verify", "--live", "--rows", "50")


def test_live_predictions_go_on_behind_the_last_one(live: Stored) -> None:
    uri = f"{live.store}/predictions_live/buying"
    before = rows_of(uri)
    assert len(before) == live.expected["predictions_stored"]
    live.millrace("inference", "--streaming", "--run_id", "nothing-new")
    same(rows_of(uri), before, "row_id")
    live.go_on(live.messages("to_come"))
    live.millrace("inference", "--streaming", "--run_id", "went-on")
    after = rows_of(uri)
    assert len(after) == after["prediction_id"].n_unique() == live.expected["answers_whole"]
    same(after.join(before.select("row_id"), on="row_id", how="semi"), before, "row_id")
    assert after["model_version"].unique().to_list() == ["1"]
    assert after["score"].null_count() == 0


def test_a_live_prediction_is_traced(live: Stored, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    row = rows_of(f"{live.store}/predictions_live/buying").sort("asked").row(-1, named=True)
    capsys.readouterr()
    live.millrace("trace", "--live", "--prediction", str(row["prediction_id"]))
    out = capsys.readouterr().out
    assert "trained by run learn" in out
    assert f"row_id {row['row_id']}" in out
    assert "by run began" in out
    assert open_table(f"{live.store}/sources/sales") is not None
