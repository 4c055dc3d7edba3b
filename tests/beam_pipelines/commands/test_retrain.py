"""A registered version trained again from what it records; trials in the registry, each once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import cli, features, training
from schemas.errors import MismatchError
from tests.support import shop
from tests.support.training_pipeline_case import account, flags
from transforms.models.registry import Registry, registry_uri
from transforms.training.trial_log import log_trials


def test_a_version_comes_out_the_same_when_trained_again(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = store / "definition.py"
    search = "rounds=12, search=Search(3, {'eta': (0.1, 0.5), 'subsample': (0.5, 1.0)}, method='sobol')"
    path.write_text(shop.DEFINITION.replace("rounds=12", search).replace("encoders.OneHot()", "encoders.Target()"))
    arguments = [each for each in flags(store, "first") if each != "--threads=1"]
    assert training.main([*arguments, "--threads=2"]) == 0
    # Later features and another definition in the place of the first do not matter.
    assert features.main(["--definition", str(path), "--store", str(store), "--run_id", "g", "--full"]) == 0
    path.write_text("nothing = 1")
    assert cli.main(["retrain", "1", "--store", str(store), "--run_id", "again"]) == 0
    found = json.loads((store / "runs/again/run.json").read_text())
    assert found["same_metrics"]
    assert found["same_model"]
    assert found["test_auc"] == account(store, "first")["metrics"]["auc"]
    assert not (store / "examples/buying/again").exists()
    assert Registry(registry_uri(str(store))).champion("buying") == "1"

    registry = Registry(registry_uri(str(store)))
    assert log_trials(registry, "buying", "first", "auc", []) == 0
    with registry.client() as client:
        runs = client.search_runs([client.get_experiment_by_name("buying").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    nested = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert sorted(run.data.tags["millrace.trial"] for run in nested) == ["0", "1", "2"]
    for run in nested:
        reported = account(store, "first")["trials"][int(run.data.tags["millrace.trial"])]
        assert run.data.metrics["best_validate_auc"] == reported["value"]

    # A source without versions whose files have changed is refused.
    pl.read_parquet(store / "sources/sales/part.parquet").head(-1).write_parquet(store / "sources/sales/part.parquet")
    assert cli.main(["retrain", "1", "--store", str(store)]) == MismatchError.exit_code
    assert "holds the files that the version was trained on" in capsys.readouterr().err


def test_a_label_source_rewritten_later_is_read_as_it_was(store: Path) -> None:
    folder = store / "sources/sales"
    rows = pl.read_parquet(folder / "part.parquet")
    shutil.rmtree(folder)
    rows.write_delta(folder)
    assert training.main(flags(store, "first")) == 0
    before = account(store, "first")
    rows.with_columns(amount=-pl.col("amount")).write_delta(
        folder, mode="overwrite"
    )  # nobody bought in the newest version
    assert cli.main(["retrain", "1", "--store", str(store), "--run_id", "again"]) == 0
    found = json.loads((store / "runs/again/run.json").read_text())
    assert found["same_metrics"]
    assert found["same_model"]
    assert found["test_auc"] == before["metrics"]["auc"]


def test_vacuum_with_the_shortest_retention_keeps_what_a_version_was_trained_on(store: Path) -> None:
    """Three loads later every file of the version's own table version is replaced, and nothing but the registry holds
    it."""
    definition = str(store / "definition.py")
    assert training.main(flags(store, "first")) == 0
    path = store / "sources/visits/part.parquet"
    visits = pl.read_parquet(path)
    for number in range(1, 4):
        visits.with_columns(age=pl.col("age") + number).write_parquet(path)
        assert features.main(["--definition", definition, "--store", str(store), "--run_id", f"later-{number}"]) == 0
    (table,) = (store / "features" / "buying").iterdir()
    before = set(table.rglob("date=*/*.parquet"))
    shutil.rmtree(store / "runs")  # the registry's own copy records what it was trained on
    assert cli.main(["vacuum", "--store", str(store), "--older_than", "0s", "--retention", "0s", "--force"]) == 0
    gone = before - set(table.rglob("date=*/*.parquet"))
    assert gone == {path for path in before if path.name.startswith(("later-1-", "later-2-"))}, "the versions between"
    assert cli.main(["retrain", "1", "--store", str(store), "--run_id", "again"]) == 0
    found = json.loads((store / "runs/again/run.json").read_text())
    assert found["same_metrics"]
    assert found["same_model"]


def test_the_same_content_is_accepted_and_neighbours_are_kept_with_the_model(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Files touched and written anew, a neighbour that is gone, and a store that was moved."""
    path, sales = store / "definition.py", store / "sources/sales/part.parquet"
    path.write_text("from rates.fees import DEPTH\n" + shop.DEFINITION.replace('"max_depth": 3', '"max_depth": DEPTH'))
    (store / "rates").mkdir()
    (store / "rates/fees.py").write_text("DEPTH = 2\n")
    assert training.main(flags(store, "first")) == 0
    shutil.rmtree(store / "rates")
    path.unlink()
    content = sales.read_bytes()
    sales.unlink()
    sales.write_bytes(content)
    os.utime(sales, (1, 1))
    moved = Path(shutil.move(store, store.with_name("moved")))
    assert cli.main(["retrain", "1", "--store", str(moved), "--run_id", "again"]) == 0
    found = json.loads((moved / "runs/again/run.json").read_text())
    assert (found["same_metrics"], found["same_model"]) == (True, True)
    assert not store.exists()
    sales = moved / "sources/sales/part.parquet"
    pl.read_parquet(sales).with_columns(amount=pl.col("amount") + 1).write_parquet(sales)
    assert cli.main(["retrain", "1", "--store", str(moved)]) == MismatchError.exit_code
    assert "1 differ, as part.parquet" in capsys.readouterr().err
