"""`millrace models`, `promote`, `rollback`, `register`: on a real registry, with real models."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beam_pipelines import cli, features
from schemas.errors import StoreError
from tests.support import shop
from tests.support.trained_models import trained
from transforms.models.registry import Registry, RunRecord, registry_uri


def run(store: Path, *words: str) -> int:
    return cli.main([*words, "--store", str(store)])


def test_versions_are_listed_promoted_and_rolled_back_with_their_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = Registry(registry_uri(str(tmp_path)))
    assert run(tmp_path, "models") == 3
    for seed in range(3):
        registry.register(
            trained(seed), f"run-{seed}", RunRecord(metrics={"test_auc": 0.7}, tags={"millrace.gates": "all 2 hold"})
        )
    assert run(tmp_path, "rollback", "--why", "x") == 4
    assert "had a champion before" in capsys.readouterr().err
    assert run(tmp_path, "promote", "1", "--why", "the first", "--who", "ann") == 0
    assert run(tmp_path, "promote", "2", "--why", "better") == 0
    assert run(tmp_path, "promote", "3", "--why", "best") == 0
    assert run(tmp_path, "promote", "9", "--why", "none such") == 4
    assert run(tmp_path, "promote", "3") == 2
    assert run(tmp_path, "rollback", "--why", "it broke", "--who", "bob") == 0
    assert registry.champion("delay") == "2"
    assert run(tmp_path, "rollback", "--why", "this one, too") == 0
    assert registry.champion("delay") == "1"
    assert run(tmp_path, "rollback", "--why", "and now") == 4
    assert run(tmp_path, "models", "--model", "other") == 3
    capsys.readouterr()
    assert run(tmp_path, "models") == 0
    shown = capsys.readouterr().out
    for words in ("champion", "auc 0.7000", "all 2 hold", "rollback: it broke (bob)", "the first (ann)", "run-2"):
        assert words in shown
    moves = [(each["version"], each["before"]) for each in registry.history("delay")]
    assert moves == [("1", None), ("2", "1"), ("3", "2"), ("2", "3"), ("1", "2")]


def test_a_model_trained_without_a_registry_is_registered_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    path = shop.write(
        store,
        definition=shop.DEFINITION.replace(
            "rounds=12", "rounds=12, search=Search(3, {'max_depth': [2, 3, -4]}, seed=4)"
        ),
    )
    words = ["--definition", str(path), "--store", str(store)]
    assert features.main([*words, "--run_id", "f"]) == 0
    (store / "registry").mkdir()
    (store / "registry" / "mlflow.db").write_text("this is no database, which is as good as a server that is away")
    assert cli.main(["training", *words, "--run_id", "away", "--threads=1"]) == 4
    assert "millrace register away" in capsys.readouterr().err
    kept = json.loads((store / "runs/away/training.json").read_text())
    assert "model_version" not in kept
    assert "Not registered" in (store / "runs/away/report.html").read_text()
    shutil.rmtree(store / "registry")

    booster = store / "runs/away/model/booster.ubj"
    whole = booster.read_bytes()
    booster.write_bytes(whole[:-2] + b"!!")
    assert run(store, "register", "away") == 4
    assert "as they were saved" in capsys.readouterr().err
    booster.write_bytes(whole)
    assert run(store, "register", "away") == 0
    registry = Registry(registry_uri(str(store)))
    assert registry.champion("buying") == "1"
    assert run(store, "register", "away") == 0
    with registry.client() as client:
        (parent,) = [each.run_id for each in client.search_model_versions("name='buying'")]
        experiment = client.get_run(parent).info.experiment_id
        nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
        artifacts = {each.path for each in client.list_artifacts(parent)}
    reported = {str(each["trial"]): each for each in kept["trials"]}
    assert sorted(each.data.tags["millrace.trial"] for each in nested) == sorted(reported)
    for each in nested:
        trial = reported[each.data.tags["millrace.trial"]]
        assert each.info.status == ("FAILED" if trial["error"] else "FINISHED")
        assert each.data.metrics.get("best_validate_auc") == trial["value"]
    assert "report.html" in artifacts
    assert "Not registered" not in (store / "runs/away/report.html").read_text()
    assert [each.version for each in registry.versions("buying")] == ["1"]
    assert run(store, "register", "never") == 4
    with pytest.raises(StoreError):
        registry.rollback("buying", "nothing before")


@pytest.fixture(scope="module")
def waiting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run whose model waits to be registered; tests use copies."""
    store = tmp_path_factory.mktemp("waiting") / "store"
    words = ["--definition", str(shop.write(store)), "--store", str(store)]
    assert features.main([*words, "--run_id", "f"]) == 0
    (store / "registry").mkdir()
    (store / "registry" / "mlflow.db").write_text("no database")
    assert cli.main(["training", *words, "--run_id", "away", "--threads=1"]) == 4
    shutil.rmtree(store / "registry")
    return store


def _names(path: str) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["files"].update({path: "text"})


DAMAGE: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "a path above": ("registration.json", _names("../../../../evil.txt")),
    "an absolute path": ("registration.json", _names("/tmp/millrace-evil.txt")),
    "the model's folder": ("registration.json", _names("model")),
    "another run": ("registration.json", lambda record: record.update(run_id="other")),
    "no digest": ("registration.json", lambda record: record.pop("digest")),
    "files that are no text": ("registration.json", lambda record: record.update(files={"a": 1})),
    "another model's folder": ("training.json", lambda record: record.update(bundle="/etc/model")),
    "no metrics": ("training.json", lambda record: record.pop("metrics")),
    "metrics that are no numbers": ("training.json", lambda record: record.update(metrics={"auc": "high"})),
    "no gates": ("training.json", lambda record: record.update(gates=None)),
    "trials of nothing": ("training.json", lambda record: record.update(trials=[{}])),
    "another name": ("training.json", lambda record: record.update(model="other")),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_record_that_was_altered_is_refused_before_anything_is_registered(
    waiting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    store = Path(shutil.copytree(waiting, tmp_path / "store"))
    name, change = DAMAGE[what]
    path = store / "runs/away" / name
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    assert run(store, "register", "away") == 4
    assert "Traceback" not in capsys.readouterr().err
    assert not (store / "registry").exists()
    assert not Path("/tmp/millrace-evil.txt").exists()


@pytest.mark.parametrize("name", ["training.json", "registration.json", "explanation.json", "model/encoders.json"])
@pytest.mark.parametrize("kind", ["empty", "cut", "bytes", "list", "deep", "fifo", "folder", "gone"])
def test_a_damaged_file_of_a_run_has_one_clear_line(
    waiting: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, kind: str
) -> None:
    store = Path(shutil.copytree(waiting, tmp_path / "store"))
    path = store / "runs/away" / name
    whole = path.read_bytes()
    path.unlink()
    contents = {"empty": b"", "cut": whole[: len(whole) // 2], "bytes": b"\xff\xfe\x00", "list": b"[]"}
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind != "gone":
        path.write_bytes(contents.get(kind, b"[" * 100_000))
    code = run(store, "register", "away")
    err = capsys.readouterr().err
    if (name, kind) == ("explanation.json", "gone"):  # a report without pictures of single rows
        assert code == 0
        return
    assert code == 4
    assert "Traceback" not in err
    assert "json" in err
    assert not (store / "registry").exists()
