"""A registry read straight from its SQLite file is what MLflow's client returns, whatever was done to it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from schemas.errors import StoreError
from tests.support.trained_models import trained
from transforms.models.registry import Registry, RunRecord, registry_uri
from transforms.models.registry_content import SCHEMAS, MlflowContent, RegistryContent, sqlite_content

if TYPE_CHECKING:
    from mlflow import MlflowClient

NAMES = ("delay", "Delay", "other model", "größe")
PROMPT = "mlflow.prompt.is_prompt"
KEYS = ("millrace.run_id", "champion.2020", PROMPT, "a")
VALUE = st.just("true") | st.sampled_from(("x", "größe\n", "1")) | st.text(max_size=5)
METRIC = st.floats(width=64) | st.sampled_from((math.inf, -math.inf, math.nan, 0.1))
NUMBER = st.integers(1, 4)
NAME = st.sampled_from(NAMES)
Step = tuple[str, tuple[object, ...]]
STEPS = st.one_of(
    st.tuples(st.just("model"), st.tuples(NAME)),
    st.tuples(st.just("version"), st.tuples(NAME, st.sampled_from((None, 0, 1, 2)))),
    st.tuples(st.just("version"), st.tuples(NAME, st.sampled_from((None, 0, 1, 2)))),
    st.tuples(st.just("model_tag"), st.tuples(NAME, st.sampled_from(KEYS), VALUE)),
    st.tuples(st.just("version_tag"), st.tuples(NAME, NUMBER, st.sampled_from(KEYS), VALUE)),
    st.tuples(st.just("alias"), st.tuples(NAME, st.sampled_from(("champion", "second")), NUMBER)),
    st.tuples(st.just("stage"), st.tuples(NAME, NUMBER, st.sampled_from(("Staging", "Archived", "None")))),
    st.tuples(st.just("metric"), st.tuples(st.integers(0, 2), st.sampled_from(("test_auc", "b")), METRIC, NUMBER)),
    st.tuples(st.just("rename"), st.tuples(NAME, NAME)),
    st.tuples(st.just("delete_version"), st.tuples(NAME, NUMBER)),
    st.tuples(st.just("delete_model"), st.tuples(NAME)),
    st.tuples(st.just("delete_alias"), st.tuples(NAME, st.sampled_from(("champion", "second")))),
    st.tuples(st.just("delete_run"), st.tuples(st.integers(0, 2))),
)

START: tuple[Step, ...] = (
    ("model", ("delay",)),
    ("version", ("delay", 0)),
    ("version", ("delay", 1)),
    ("model", ("other model",)),
    ("version", ("other model", 0)),
)


class Random:
    """A registry under random operations, those that MLflow refuses included."""

    def __init__(self, client: MlflowClient) -> None:
        self.client = client
        self.runs = [client.create_run("0").info.run_id for _ in range(3)]

    def take(self, step: Step) -> None:
        from mlflow.exceptions import MlflowException

        action, words = step
        with contextlib.suppress(MlflowException):
            getattr(self, action)(*words)

    def model(self, name: str) -> None:
        self.client.create_registered_model(name)

    def version(self, name: str, run: int | None) -> None:
        address = "file:///somewhere" if run is None else f"runs:/{self.runs[run]}/model"
        self.client.create_model_version(name, address, None if run is None else self.runs[run], {"a": "of the start"})

    def model_tag(self, name: str, key: str, value: str) -> None:
        self.client.set_registered_model_tag(name, key, value)

    def version_tag(self, name: str, version: int, key: str, value: str) -> None:
        self.client.set_model_version_tag(name, str(version), key, value)

    def alias(self, name: str, alias: str, version: int) -> None:
        self.client.set_registered_model_alias(name, alias, str(version))

    def stage(self, name: str, version: int, stage: str) -> None:
        self.client.transition_model_version_stage(name, str(version), stage)

    def metric(self, run: int, key: str, value: float, step: int) -> None:
        self.client.log_metric(self.runs[run], key, value, step=step)

    def rename(self, name: str, other: str) -> None:
        self.client.rename_registered_model(name, other)

    def delete_version(self, name: str, version: int) -> None:
        self.client.delete_model_version(name, str(version))

    def delete_model(self, name: str) -> None:
        self.client.delete_registered_model(name)

    def delete_alias(self, name: str, alias: str) -> None:
        self.client.delete_registered_model_alias(name, alias)

    def delete_run(self, run: int) -> None:
        self.client.delete_run(self.runs[run])


def told(content: RegistryContent, runs: list[str]) -> dict[str, object]:
    """All that a reader can be asked."""
    models = {name: content.model(name) for name in (*NAMES, "nobody")}
    versions = {name: content.versions(name) for name in models}
    addresses = {
        (name, each): content.address(name, each) for name, model in models.items() if model for each in versions[name]
    }
    return {
        "names": content.names(),
        "models": models,
        "versions": {name: list(each.items()) for name, each in versions.items()},
        "addresses": addresses,
        # repr makes NaN equal to NaN
        "metrics": {run: {key: repr(value) for key, value in content.metrics(run).items()} for run in runs},
    }


def direct(path: Path, runs: list[str]) -> dict[str, object] | None:
    with sqlite_content(path) as content:
        return None if content is None else told(content, runs)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry in which nothing is registered."""
    folder = tmp_path_factory.mktemp("empty")
    with Registry(registry_uri(str(folder))).client(write=True):
        return folder / "registry/mlflow.db"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store with one registered version, which is champion."""
    registry = Registry(registry_uri(str(tmp_path)))
    registry.register(trained(), "run-1", RunRecord(metrics={"test_auc": 0.75}))
    registry.promote("delay", 1, "first", "ann")
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning")  # MLflow's stages
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, min_size=5, max_size=25))
def test_the_file_holds_what_mlflow_returns(empty: Path, steps: list[Step]) -> None:
    path = empty.with_name(f"{next(NUMBERS)}.db")
    shutil.copy(empty, path)
    with Registry(f"sqlite:///{path}").client(write=True) as client:
        random = Random(client)
        for step in [*START, *steps]:
            random.take(step)
        if (found := direct(path, random.runs)) is not None:
            assert found == told(MlflowContent(client), random.runs)
        else:  # a model that is a prompt by half, which MLflow finds and refuses
            assert any(step[1][-2] == PROMPT and step[1][-1] != "true" for step in steps if len(step[1]) > 2)


NUMBERS = itertools.count()


def test_every_operation_of_the_property_test_can_be_seen(empty: Path) -> None:
    """An operation that MLflow always refuses would be compared with nothing."""
    path = empty.with_name("each.db")
    shutil.copy(empty, path)
    steps: list[Step] = [
        ("model", ("delay",)),
        ("version", ("delay", 0)),
        ("version", ("delay", None)),
        ("metric", (0, "test_auc", math.nan, 1)),
        ("metric", (0, "b", math.inf, 1)),
        ("model_tag", ("delay", "a", "x")),
        ("version_tag", ("delay", 1, "a", "größe\n")),
        ("alias", ("delay", "champion", 2)),
        ("alias", ("delay", "second", 1)),
        ("delete_alias", ("delay", "second")),
        ("delete_version", ("delay", 2)),
        ("rename", ("delay", "other model")),
        ("delete_model", ("other model",)),
        ("model", ("delay",)),
        ("version", ("delay", 1)),
        ("version_tag", ("delay", 1, PROMPT, "true")),
        ("model_tag", ("delay", PROMPT, "true")),
    ]
    with Registry(f"sqlite:///{path}").client(write=True) as client:
        random = Random(client)
        seen = [direct(path, random.runs)]
        for step in steps:
            random.take(step)
            seen.append(direct(path, random.runs))
            assert seen[-1] == told(MlflowContent(client), random.runs)
            assert seen[-1] != seen[-2], step


def test_the_tables_of_the_mlflow_that_is_installed_are_read_directly() -> None:
    from mlflow.store.db.utils import _get_latest_schema_revision

    assert _get_latest_schema_revision() in SCHEMAS


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE alembic_version SET version_num = '1b5f0d9ad7c1'",
        "INSERT INTO alembic_version VALUES ('1b5f0d9ad7c1')",
        "DELETE FROM alembic_version",
        "INSERT INTO registered_models (workspace, name) VALUES ('elsewhere', 'hidden')",
        "INSERT INTO experiments (experiment_id, workspace, name) VALUES (9, 'elsewhere', 'hidden')",
    ],
)
def test_a_registry_of_another_version_is_left_to_mlflow(store: Path, change: str) -> None:
    """Which refuses these, and reads others."""
    path = store / "registry/mlflow.db"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(change)
    with sqlite_content(path) as content:
        assert content is None
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")  # nothing holds the file


def test_an_older_schema_is_refused_as_by_mlflow(store: Path) -> None:
    path = store / "copy.db"  # MLflow keeps one client for a file
    shutil.copy(store / "registry/mlflow.db", path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("UPDATE alembic_version SET version_num = '1b5f0d9ad7c1'")
    with pytest.raises(StoreError, match="out-of-date database schema"):
        Registry(f"sqlite:///{path}").champion("delay")


def test_a_registry_that_the_environment_names_is_asked(
    store: Path, empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", f"sqlite:///{empty}")
    path = store / "copy.db"
    shutil.copy(store / "registry/mlflow.db", path)
    assert Registry(f"sqlite:///{path}").models() == []
    monkeypatch.delenv("MLFLOW_REGISTRY_URI")
    assert Registry(f"sqlite:///{path}").models() == [("delay", "1")]


def test_a_run_that_is_gone_is_named(store: Path) -> None:
    registry = Registry(registry_uri(str(store)))
    with contextlib.closing(sqlite3.connect(store / "registry/mlflow.db", isolation_level=None)) as database:
        database.execute("UPDATE model_versions SET run_id = 'nobody'")
    with pytest.raises(StoreError, match="Run with id=nobody not found"):
        registry.versions("delay")


KILLED = """
import os, signal, sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.executemany("INSERT INTO tags VALUES (?, ?, (SELECT run_uuid FROM runs))",
                     [(f"k{i}", "x" * 500) for i in range(2000)])
database.execute("DELETE FROM registered_model_aliases")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_registry_is_read_and_written_after_a_process_was_killed_while_it_wrote(store: Path) -> None:
    """SQLite undoes what it left; a connection that may only read could not."""
    path, registry = store / "registry/mlflow.db", Registry(registry_uri(str(store)))
    expected = registry.versions("delay")
    subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert path.with_name("mlflow.db-journal").stat().st_size > 0
    assert registry.versions("delay") == expected
    assert registry.promote("delay", 1, "again") == "1"


def test_a_commit_of_another_process_waits_for_no_reader_that_ended(store: Path) -> None:
    path, registry = store / "registry/mlflow.db", Registry(registry_uri(str(store)))
    assert [each.metrics for each in registry.versions("delay")] == [{"test_auc": 0.75}]
    assert registry.locate("delay")[0] == "1"
    with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        database.execute("DELETE FROM registered_model_aliases")
        database.execute("COMMIT")
    assert registry.champion("delay") is None


def test_a_file_that_cannot_be_written_is_read(store: Path) -> None:
    path = store / "registry/mlflow.db"
    path.chmod(0o400)
    path.parent.chmod(0o500)
    try:
        assert dataclasses.asdict(Registry(registry_uri(str(store))).versions("delay")[0])["champion"]
    finally:
        path.parent.chmod(0o700)
