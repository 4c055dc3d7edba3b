"""What a run reports of itself: its id, rows that it cannot account for, and its dates."""

from __future__ import annotations

from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.cli import main
from beam_pipelines.runtime.run_report import Run
from schemas.errors import DefinitionError
from schemas.loading import load_definition
from tests.support import shop
from tests.support.tables import figures_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_uri

Out = pytest.CaptureFixture[str]


def run(store: Path, pipeline: str, run_id: str, *flags: str) -> int:
    return main(
        [pipeline, "--definition", str(store / "definition.py"), "--store", str(store), "--run_id", run_id, *flags]
    )


def test_a_run_id_that_another_pipeline_has_used_is_refused(tmp_path: Path, capsys: Out) -> None:
    shop.write(tmp_path, rows=200)
    assert run(tmp_path, "features", "monday", "--no-statistics") == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    capsys.readouterr()
    for pipeline in ("training", "inference"):
        assert run(tmp_path, pipeline, "monday") == DefinitionError.exit_code
        printed = capsys.readouterr().err
        assert "A --run_id names one run of one pipeline. Got 'monday', which is a run of features in" in printed
        assert "Choose another" in printed
        assert "Traceback" not in printed
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert run(tmp_path, "features", "monday", "--no-statistics") == 0, "its own pipeline may repeat it"


def test_a_run_id_of_another_pipeline_that_is_at_work_or_was_killed_is_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "runs" / "a")
    with Run("features", "a", folder):
        with pytest.raises(DefinitionError, match="'a', which is a run of features"), Run("training", "a", folder):
            raise AssertionError("it has started")
        assert (tmp_path / "runs" / "a" / "started.json").exists(), "the mark of the run at work stays"


def test_rows_of_no_date_are_reported_by_runs_of_some_dates_and_rejected_by_a_full_one(
    tmp_path: Path, capsys: Out
) -> None:
    """Row groups with no plausible time: of a clock that stood at 1970, or of a writer that left them out."""
    shop.write(tmp_path, rows=200)
    folder = tmp_path / "sources" / "sales"
    rows = pl.read_parquet(folder / "part.parquet").head(7)
    ancient = rows.with_columns(
        visit=-pl.col("visit") - 1, sold=pl.lit(datetime(1970, 1, 1, tzinfo=UTC)).dt.cast_time_unit("us")
    )
    ancient.write_parquet(folder / "ancient.parquet")
    assert run(tmp_path, "features", "some", "--start", "2024-01-05", "--end", "2024-01-20") == 0
    printed = capsys.readouterr().err
    assert (
        f"sales: 7 rows lie in row groups without any plausible time, so in no date ({folder}/ancient.parquet)"
        in printed
    )
    assert "--full sets them aside" in printed
    assert figures_of(tmp_path, "some")["set_aside"] == 0
    assert run(tmp_path, "features", "whole", "--full") == 0
    assert "without any plausible time" not in capsys.readouterr().err
    assert figures_of(tmp_path, "whole")["set_aside"] == 7
    dead_letters = pl.read_delta(str(tmp_path / "dead_letters" / "features"))
    assert (dead_letters["file"] == str(folder / "ancient.parquet")).sum() == 7


def test_a_run_of_two_intervals_accounts_for_both_and_not_for_what_lies_between(tmp_path: Path, capsys: Out) -> None:
    shop.write(tmp_path, rows=600)
    assert run(tmp_path, "features", "first") == 0
    definition = str(tmp_path / "definition.py")
    assert main(["schema", "infer", "--definition", definition, "--store", str(tmp_path)]) == 0
    uri = features_uri(str(tmp_path), "buying", load_definition(definition).view.fingerprint)
    path = tmp_path / "sources" / "visits" / "part.parquet"
    visits = pl.read_parquet(path)
    days = pl.col("asked").dt.date().is_in([date(2024, 1, 10), date(2024, 2, 20)])
    visits.with_columns(pl.when(days).then(pl.lit("east")).otherwise("shop").alias("shop")).write_parquet(path)
    before = pl.read_delta(uri).sort("visit")
    capsys.readouterr()
    assert run(tmp_path, "features", "second") == 7
    printed = capsys.readouterr().err
    assert "[2024-01-10, 2024-01-11), [2024-02-20, 2024-02-21)" in printed, "an anomaly names the dates it was found in"
    assert pl.read_delta(uri).sort("visit").equals(before)
    assert run(tmp_path, "features", "second", "--allow_anomalies") == 0
    capsys.readouterr()
    assert figures_of(tmp_path, "second")["dates"] == 2
    after = pl.read_delta(uri).sort("visit")
    changed = after.filter(pl.col("shop") == "east")["date"].unique().sort().to_list()
    assert [str(day) for day in changed] == ["2024-01-10", "2024-02-20"]
    elsewhere = ~pl.col("date").is_in(changed)
    assert after.filter(elsewhere).equals(before.filter(elsewhere))
    table = open_table(uri)
    assert table is not None
    made = {(str(file.date), Path(file.origin or file.path).name.split("-")[0]) for file in data_files(table)}
    of_second = {day for day, name in made if name == "second"}
    assert of_second == {"2024-01-10", "2024-02-20"}, "rows of other dates stay those of the first run"
    assert len(made) == len(before["date"].unique())
