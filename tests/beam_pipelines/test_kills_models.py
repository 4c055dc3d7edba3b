"""Kill −9 while a model is trained or scores, and run again: one version, one commit, the content of an undisturbed
run.

Processes are really killed: at random times over their whole length, at steps on the store's file system, and within
the milliseconds in which MLflow writes its database.  MILLRACE_SEED chooses other times.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.support import shop
from tests.support.loads import leftovers, same
from tests.support.processes import PIPELINES, Ended, Zygote
from tests.support.tables import figures_of
from transforms.models.bundle import load_bundle
from transforms.models.registry import RUN, Registry, registry_uri
from transforms.storage.delta_log import commits
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import predictions_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SEED = int(os.environ.get("MILLRACE_SEED", "1"))
SEARCH = "rounds=12, search=Search(2, {'eta': (0.1, 0.5)})"
DEFINITION = shop.DEFINITION.replace("rounds=12", SEARCH)


@dataclasses.dataclass(frozen=True)
class Case:
    """A store with features; `trained` is a copy in which an undisturbed run trained a model and another scored."""

    zygote: Zygote
    features: Path
    trained: Path
    training: Ended
    inference: Ended

    def run(self, pipeline: str, store: Path, run_id: str, *flags: str, **how: Any) -> Ended:
        definition = str(self.features / "definition.py")
        return self.zygote.run(
            pipeline, "--definition", definition, "--store", str(store), "--run_id", run_id, *flags, watch=store, **how
        )

    def train(self, store: Path, run_id: str, **how: Any) -> Ended:
        return self.run("training", store, run_id, "--sources", str(self.features / "sources"), "--threads=1", **how)

    def score(self, store: Path, run_id: str, **how: Any) -> Ended:
        return self.run("inference", store, run_id, "--registry", registry_uri(str(self.trained)), "--threads=1", **how)

    def copy(self, name: str) -> Path:
        return Path(shutil.copytree(self.features / "features", self.features.parent / name / "features")).parent


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("models")
    modules = (*PIPELINES, "beam_pipelines.training", "beam_pipelines.inference", "mlflow", "xgboost")
    with Zygote(tmp_path_factory.mktemp("logs"), modules) as zygote:
        first = Case(zygote, folder / "first", folder / "trained", Ended(0, "", "", (), 0), Ended(0, "", "", (), 0))
        shop.write(first.features, rows=1000, definition=DEFINITION)
        ended = first.run("features", first.features, "features")
        assert ended.code == 0, ended.err
        training = first.train(first.copy("trained"), "undisturbed")
        assert training.code == 0, training.err
        inference = first.score(first.trained, "undisturbed-too")
        assert inference.code == 0, inference.err
        yield dataclasses.replace(first, training=training, inference=inference)


def account(store: Path, run_id: str) -> dict[str, Any]:
    """What a run reports of its model, without what differs between stores and runs."""
    content = json.loads((store / "runs" / run_id / "training.json").read_text())
    for trial in content["trials"]:
        del trial["seconds"]
    return {
        name: value for name, value in content.items() if name not in ("bundle", "report", "model_version", "champion")
    }


def registered(store: Path) -> dict[str, str]:
    """Version per run; every one of them can be loaded, and the champion is one of them or none."""
    registry = Registry(registry_uri(str(store)))
    if not (store / "registry" / "mlflow.db").exists():
        return {}
    versions = registry.versions("buying")
    for each in versions:
        _, folder = registry.resolve("buying", each.version)
        assert load_bundle(folder).manifest["run_id"] == each.run
    assert registry.champion("buying") in {None, *(each.version for each in versions)}
    runs = {each.run: each.version for each in versions}
    assert len(runs) == len(versions), "a run has one version"
    return runs


def mlflow_runs(store: Path) -> dict[str, list[str]]:
    """Status of each of MLflow's runs by our run, trials below it as "RUN trial N"."""
    found: dict[str, list[str]] = {}
    with Registry(registry_uri(str(store))).client() as client:
        for run in client.search_runs([client.get_experiment_by_name("buying").experiment_id], max_results=1000):
            name = run.data.tags.get(RUN) or run.info.run_name
            found.setdefault(name, []).append(run.info.status)
    return found


def trained_again(case: Case, name: str, number: int, **when: object) -> str:
    """One kill of a training run and everything that must hold after it; how far the run had come."""
    store = case.copy(name)
    ended = case.train(store, "victim", **when)
    assert ended.code in (0, -signal.SIGKILL), ended.err
    there = registered(store)
    assert there in ({}, {"victim": "1"})
    champion = Registry(registry_uri(str(store))).champion("buying")
    outcome = (
        "ended" if ended.code == 0 else "champion" if champion else "registered" if there else "nothing registered"
    )

    run_id = "victim" if number % 3 else "another"
    again = case.train(store, run_id)
    assert again.code == 0, (name, when, again.err)
    figures = figures_of(store, run_id)
    expected = {**there, run_id: str(len(there) + (run_id not in there))}
    assert registered(store) == expected
    assert (figures["model_version"], figures["champion"]) == (expected[run_id], expected[run_id]), (name, when)
    assert Registry(registry_uri(str(store))).champion("buying") == expected[run_id]
    assert [each["version"] for each in Registry(registry_uri(str(store))).history("buying")][-1] == expected[run_id]
    reported, reference = account(store, run_id), account(case.trained, "undisturbed")
    if champion and run_id == "another":  # it had a champion to compare with
        for each in (reported, reference):
            del each["rival"], each["gates"], each["data"]
    assert reported == reference, (name, when)
    booster = "model/booster.ubj"
    assert (store / "runs" / run_id / booster).read_bytes() == (
        case.trained / "runs/undisturbed" / booster
    ).read_bytes()
    runs = mlflow_runs(store)
    assert {name: states for name, states in runs.items() if name.startswith(run_id)} == {
        name: ["FINISHED"] for name in (run_id, f"{run_id} trial 0", f"{run_id} trial 1")
    }, "one run and one for each trial"

    swept = case.zygote.run("vacuum", "--store", str(store), "--older_than", "0s", "--force", watch=store)
    assert swept.code == 0, swept.err
    assert leftovers(store) == [], (name, when)
    kept = {path.parent.name for path in (store / "examples" / "buying").glob("*/*")}
    left = {each for each in ("victim", "another") if (store / "runs" / each / "model" / "manifest.json").exists()}
    assert kept == left, "examples of a run that left no model are waste"
    assert registered(store) == expected
    shutil.rmtree(store)
    return outcome


def drawn(case: Case, name: str, length: float, kills: int, **how: Any) -> collections.Counter[str]:
    """Kills at random times of up to `length` seconds, which is less where runs end before they are killed."""
    chance, seen = random.Random(SEED), collections.Counter[str]()
    for i in range(4 * kills):
        outcome = trained_again(case, f"{name}-{i}", i, delay=max(chance.random() * length, 1e-6), **how)
        seen[outcome] += 1
        length *= 0.7 if outcome == "ended" else 1.05
        if sum(seen.values()) - seen["ended"] == kills:
            break
    print(dict(seen))
    assert sum(seen.values()) - seen["ended"] == kills, seen
    return seen


def test_training_killed_at_random_times(case: Case) -> None:
    drawn(case, "time", case.training.seconds, 6)


def test_training_killed_while_it_registers(case: Case) -> None:
    """MLflow's database is no file of Python's: the clock starts at the last step before it, the account of the run."""
    steps = case.training.steps
    pending = next(i for i, step in enumerate(steps) if step.startswith("os.rename") and "registration.json" in step)
    done = max(i for i, step in enumerate(steps) if step.startswith("os.rename") and "training.json" in step)
    drawn(case, "pending", 3.0, 8, step=pending)
    for i, step in enumerate((done, done + 1, len(steps) - 1)):
        assert trained_again(case, f"done-{i}", i, step=step) == "champion"


def predicted(store: Path) -> pl.DataFrame | None:
    """What a reader finds."""
    uri = predictions_uri(str(store), "buying")
    return None if open_table(uri) is None else pl.read_delta(uri).sort("prediction_id")


def scored_again(case: Case, name: str, number: int, **when: object) -> str:
    """One kill of a scoring run; what readers had then."""
    store = case.copy(name)
    ended = case.score(store, "victim", **when)
    assert ended.code in (0, -signal.SIGKILL), ended.err
    expected, found = predicted(case.trained), predicted(store)
    assert found is None or same(found, expected), (name, when)
    outcome = "ended" if ended.code == 0 else "nothing" if found is None else "everything"
    run_id = "victim" if number % 2 else "another"
    again = case.score(store, run_id)
    assert again.code == 0, (name, when, again.err)
    assert same(predicted(store), expected), (name, when)
    uri = predictions_uri(str(store), "buying")
    reported = [entry["run_id"] for entry in commits(uri) if entry.get("pipeline") == "inference"]
    assert sorted(reported) == sorted({*(["victim"] if found is not None else []), run_id}), "one commit a run"
    registry = registry_uri(str(case.trained))
    swept = case.zygote.run(
        "vacuum", "--store", str(store), "--older_than", "0s", "--force", "--registry", registry, watch=store
    )
    assert swept.code == 0, swept.err
    assert leftovers(store) == [], (name, when)
    assert same(predicted(store), expected), (name, when)
    shutil.rmtree(store)
    return outcome


def test_inference_killed_at_random_times_and_at_steps(case: Case) -> None:
    chance, steps = random.Random(SEED), case.inference.steps
    assert predicted(case.trained) is not None
    whens: list[dict[str, Any]] = [{"delay": max(chance.random() * case.inference.seconds, 1e-6)} for _ in range(6)]
    whens += [{"step": step} for step in range(0, len(steps), max(len(steps) // 6, 1))]
    last = max(i for i, step in enumerate(steps) if "date=" in step)
    whens += [{"step": last, "delay": chance.uniform(1e-4, 0.03)} for _ in range(6)]
    seen = collections.Counter(scored_again(case, f"score-{i}", i, **when) for i, when in enumerate(whens))
    print(dict(seen))
    assert seen["nothing"] >= 3, seen
    assert sum(seen.values()) - seen["ended"] >= 8, seen
