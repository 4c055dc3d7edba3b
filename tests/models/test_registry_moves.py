"""A registry that moves with its store, paths with any characters, and moves of the champion that happen at once."""

from __future__ import annotations

import itertools
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pytest
from sqlalchemy.engine import make_url

from schemas.errors import StoreError
from tests.support.trained_models import trained
from transforms.models.bundle import load_bundle
from transforms.models.champion_moves import ChampionMoves
from transforms.models.registry import Registry, RunRecord, registry_uri
from transforms.models.registry_address import relative_address, sqlite_path, without_password

# What a person can make: the registry works there, and nothing is made beside it.
NAMES = [
    "a b",
    "50% off",
    "a%20b",
    "n#1",
    "what?",
    'it\'s "so"',
    "two\nlines",
    "zürich 東京",
    "-rf",
    "file:x",
    "[a]*{b}",
    "back\\slash",
    "a:b@c",
    "a&b=c;d",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store whose registry has versions 1 to 3 of `delay`, of which 1 is champion; tests use copies."""
    store = tmp_path_factory.mktemp("made") / "store"
    registry = Registry(registry_uri(str(store)))
    for seed in range(3):
        registry.register(trained(seed), f"run-{seed}", RunRecord(metrics={"test_auc": 0.5}))
    registry.promote("delay", 1, "first", "ann")
    return store


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "copy"))


def test_a_copied_registry_reads_and_writes_in_its_own_folder(made: Path, store: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in made.rglob("*")}
    registry = Registry(registry_uri(str(store)))
    assert registry.resolve("delay")[1].startswith(str(store))
    shutil.rmtree(Path(registry.resolve("delay", "2")[1]))
    with pytest.raises(StoreError, match="can be read"):  # although the first store still has them
        registry.resolve("delay", "2")
    assert registry.register(trained(9), "run-9") == "4"
    registry.attach("delay", "run-9", "note.txt", "a note")
    folder = Path(registry.resolve("delay", "4")[1])
    assert (folder.is_relative_to(store), (folder.parent / "note.txt").read_text()) == (True, "a note")
    assert {path: path.stat().st_mtime_ns for path in made.rglob("*")} == before
    with sqlite3.connect(store / "registry/mlflow.db") as database:  # so that MLflow's own tools find the files
        texts = [
            text
            for (text,) in database.execute("SELECT artifact_uri FROM runs UNION SELECT source FROM model_versions")
        ]
    assert all(text.startswith(str(store)) for text in texts)


@pytest.mark.parametrize("name", NAMES)
def test_a_registry_works_in_a_folder_of_any_name(made: Path, tmp_path: Path, name: str) -> None:
    homes = tmp_path / "homes"
    store = Path(shutil.copytree(made, homes / name))
    registry = Registry(registry_uri(str(store)))
    assert make_url(registry.uri).database == str(store / "registry/mlflow.db") == str(sqlite_path(registry.uri))
    assert registry.register(trained(7), "run-7") == "4"
    version, folder = registry.resolve("delay", "4")
    assert load_bundle(folder).booster == trained(7).booster
    assert Path(folder).is_relative_to(store)
    assert registry.promote("delay", version, "better") == "1"
    assert registry.champion("delay") == "4"
    assert [path.name for path in homes.iterdir()] == [name]


def test_a_new_registry_is_made_in_a_folder_of_any_name(tmp_path: Path) -> None:
    store = tmp_path / "100%25 #1?\n'é"
    assert Registry(registry_uri(str(store))).register(trained(), "run-1") == "1"
    assert [path.name for path in tmp_path.iterdir()] == [store.name]
    assert sorted(os.listdir(store / "registry")) == ["artifacts", "mlflow.db"]


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("/some/folder", r"sqlite:////some/folder/mlflow.db"),
        ("file:///some/folder", r"sqlite:////some/folder/mlflow.db"),
        ("sqlite://", "four slashes"),
        ("sqlite:///:memory:", "four slashes"),
        ("sqlite:////a?b/mlflow.db", "%3F"),
        ("postgres://u:p@h/x", "MLflow server"),
        ("http:///x", "MLflow server"),
        ("foo://x", "MLflow server"),
    ],
)
def test_an_address_that_names_no_registry_is_refused_before_anything_is_written(uri: str, words: str) -> None:
    with pytest.raises(StoreError, match=words) as caught:
        registry_uri("/nowhere", uri)
    assert ":p@" not in str(caught.value)


def test_an_address_of_a_sqlite_file_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert registry_uri("s", "sqlite:///a b/m.db") == f"sqlite:///{tmp_path}/a b/m.db"
    assert unquote(registry_uri("s", "sqlite:////50%25/m.db?timeout=9")) == "sqlite:////50%/m.db?timeout=9"


@pytest.mark.parametrize("uri", ["postgresql://ann:secret@127.0.0.1:1/x", "mysql://ann:secret@127.0.0.1:1/x"])
def test_a_missing_driver_is_named_without_the_password(uri: str) -> None:
    with pytest.raises(StoreError, match=r"driver of a registry's database.*pip install") as caught:
        Registry(uri).champion("delay")
    assert "secret" not in str(caught.value)
    assert without_password(uri).startswith(uri.partition(":secret")[0])


@pytest.mark.parametrize("kind", ["fifo", "folder", "cut", "foreign"])
def test_a_database_that_is_none_is_refused_at_once(store: Path, kind: str) -> None:
    path = store / "registry/mlflow.db"
    whole = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "cut":
        path.write_bytes(whole[: len(whole) // 3])
    else:
        with sqlite3.connect(path) as database:
            database.execute("CREATE TABLE theirs (x)")
    with pytest.raises(StoreError):
        Registry(registry_uri(str(store))).register(trained(5), "run-5")
    if kind == "foreign":
        with sqlite3.connect(path) as database:
            assert database.execute("SELECT name FROM sqlite_master").fetchall() == [("theirs",)]


@pytest.mark.parametrize(
    ("recorded", "relative"),
    [
        ("/old/registry/artifacts/m/abc/artifacts/model", "artifacts/m/abc/artifacts/model"),
        ("file:///old%20/n%231/artifacts/m/abc/artifacts/model", "artifacts/m/abc/artifacts/model"),
        ("/artifacts/x/artifacts/m/abc/artifacts/model", "artifacts/m/abc/artifacts/model"),
        ("/old/artifacts/m/abc/artifacts/../../../../etc", None),
        ("/old/artifacts/m/other/artifacts/model", None),
        ("s3://bucket/artifacts/m/abc/artifacts/model", None),
        ("mlflow-artifacts:/1/abc/artifacts/model", None),
    ],
)
def test_the_part_of_an_address_that_moves_with_the_store(recorded: str, relative: str | None) -> None:
    assert relative_address(recorded, "abc") == relative


CROWD = """
import os, sys
from transforms.models.registry import Registry, registry_uri, _mlflow
_mlflow()
from mlflow.store.tracking import sqlalchemy_store
from mlflow.store.model_registry import sqlalchemy_store
for i in range(8):
    if os.fork() == 0:
        registry = Registry(registry_uri(sys.argv[1]))
        for turn in range(3):
            registry.promote("delay", 1 + (i + turn) % 3, f"because-{i}-{turn}", f"w{i}")
        os._exit(0)
codes = [os.wait()[1] for i in range(8)]
sys.exit(max(codes))
"""


def test_no_move_of_many_at_once_is_lost_and_each_follows_the_last(store: Path) -> None:
    subprocess.run([sys.executable, "-c", CROWD, str(store)], check=True, timeout=300)
    registry = Registry(registry_uri(str(store)))
    records = registry.records("delay")
    assert {each["why"] for each in records} == {"first"} | {f"because-{i}-{n}" for i in range(8) for n in range(3)}
    assert [each["sequence"] for each in records] == list(range(1, 26))
    for before, after in itertools.pairwise(records):
        assert after["before"] == before["version"]
    assert registry.champion("delay") == records[-1]["version"]


def test_a_rollback_follows_the_order_of_moves_and_not_the_clock(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(registry_uri(str(store)))
    earlier = itertools.count(999_999, -1)  # every move is stamped before the last, and two have one stamp
    monkeypatch.setattr(ChampionMoves, "_new_tag", lambda _: f"champion.2020-01-01T00:00:00.{next(earlier):06d}Z")
    registry.promote("delay", 2, "better")
    registry.promote("delay", 3, "rollback: is what this promotion is about")
    assert [each["version"] for each in registry.history("delay")] == ["1", "2", "3"]
    assert registry.rollback("delay", "worse") == ("3", "2")
    assert registry.rollback("delay", "worse still") == ("2", "1")
    with pytest.raises(StoreError, match="had a champion before"):
        registry.rollback("delay", "no further")


def test_a_move_that_was_cut_short_never_happened(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(registry_uri(str(store)))

    def gone(*_: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as cut:
        cut.setattr("mlflow.MlflowClient.set_registered_model_alias", gone)
        with pytest.raises(StoreError):
            registry.promote("delay", 2, "never happens")
    assert [each["version"] for each in registry.history("delay")] == ["1"]
    registry.promote("delay", 3, "another move")
    assert [each["version"] for each in registry.history("delay")] == ["1", "3"]
    assert registry.rollback("delay", "worse") == ("3", "1")


def test_a_move_whose_last_write_was_cut_short_happened(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(registry_uri(str(store)))
    write, calls = ChampionMoves._record, itertools.count()

    def cut(self: ChampionMoves, *record: object) -> None:
        if next(calls) == 1:
            raise OSError("gone")
        write(self, *record)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ChampionMoves, "_record", cut)
        with pytest.raises(StoreError):
            registry.promote("delay", 2, "happens")
    assert [each["why"] for each in registry.history("delay")] == ["first", "happens"]
    registry.promote("delay", 3, "next")
    assert [each["why"] for each in registry.history("delay")] == ["first", "happens", "next"]


def test_records_of_earlier_versions_of_millrace_are_read(store: Path) -> None:
    registry = Registry(registry_uri(str(store)))
    with registry.client() as client:
        client.set_registered_model_tag(
            "delay",
            "champion.2020-01-01T00:00:00.000001Z",
            '{"version": "2", "before": null, "why": "old", "who": "a"}',
        )
        client.set_registered_model_tag(
            "delay",
            "champion.2020-01-01T00:00:00.000002Z",
            '{"version": "3", "before": "2", "why": "cut short", "who": "a"}',
        )
        client.set_registered_model_tag(
            "delay",
            "champion.2020-01-01T00:00:00.000003Z",
            '{"version": "1", "before": "2", "why": "old, too", "who": "a"}',
        )
        client.set_registered_model_tag("delay", "champion.note", "somebody's note")
    assert [each["why"] for each in registry.history("delay")] == ["old", "old, too", "first"]
    assert registry.promote("delay", 3, "new") == "1"


def test_a_long_reason_is_cut_and_the_history_stays_readable(store: Path) -> None:
    registry = Registry(registry_uri(str(store)))
    registry.promote("delay", 2, "\"'\n\x00" * 5000, "w" * 9000)
    assert registry.history("delay")[-1]["version"] == "2"
    assert registry.history("delay")[-1]["why"].endswith("…")


def test_a_champion_that_another_tool_moved_is_left_by_a_rollback(store: Path) -> None:
    registry = Registry(registry_uri(str(store)))
    with registry.client() as client:
        client.set_registered_model_alias("delay", "champion", "3")
    assert registry.rollback("delay", "not ours") == ("3", "1")


@pytest.mark.parametrize(
    "flavors",
    [
        "python_function: {loader_module: os}",
        "python_function: {loader_module: transforms.serving, code: code}",
        "python_function: {loader_module: transforms.serving, python_model: model.pkl}",
        "python_function: {loader_module: transforms.serving}\n  sklearn: {pickled_model: model.pkl}",
        "python_function: !!python/object/apply:os.system ['touch /tmp/millrace-evil']",
        "[",
    ],
)
def test_an_mlmodel_with_other_code_is_refused_before_anything_is_loaded(store: Path, flavors: str) -> None:
    registry = Registry(registry_uri(str(store)))
    folder = Path(registry.resolve("delay", "2")[1])
    (folder / "MLmodel").write_text(f"flavors:\n  {flavors}\n")
    for reading in (lambda: registry.resolve("delay", "2"), lambda: load_bundle(folder)):
        with pytest.raises(StoreError, match="MLmodel"):
            reading()
    assert not Path("/tmp/millrace-evil").exists()


@pytest.mark.parametrize("name", ["booster.ubj", "encoders.json", "manifest.json", "MLmodel"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "cut"])
def test_a_model_file_that_is_none_is_refused_at_once(store: Path, name: str, kind: str) -> None:
    registry = Registry(registry_uri(str(store)))
    path = Path(registry.resolve("delay", "2")[1]) / name
    whole = path.read_bytes()
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes(whole[:40])
    with pytest.raises(StoreError):
        load_bundle(registry.resolve("delay", "2")[1])
