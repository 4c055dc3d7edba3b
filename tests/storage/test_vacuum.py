"""Vacuum removes what nobody can need any more, and nothing else."""

import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from beam_pipelines import cli
from beam_pipelines.commands.vacuum import vacuum
from schemas.errors import DefinitionError, StoreError
from transforms.models.bundle import Bundle
from transforms.models.encoders import Encoding, Fitted
from transforms.models.registry import Registry, registry_uri
from transforms.storage import log_entries
from transforms.storage.delta_tables import (
    CommitTarget,
    commit,
    data_files,
    newest_version,
    open_table,
    write_file_atomically,
    write_files,
)
from transforms.storage.run_markers import remove_marker, running_runs, write_marker

SCHEMA = pa.schema([("value", pa.int64()), ("date", pa.date32())])
DAY = date(2024, 1, 1)
FEATURES = "features/buying/0123456789abcdef"


def table(store: Path, name: str = FEATURES) -> str:
    return str(store / name)


def load(uri: str, run_id: str, value: int, days: Sequence[date] = (DAY,), commits: bool = True) -> list[str]:
    """A run that writes one row a day, its manifest and its statistics, and perhaps commits."""
    base = newest_version(uri)
    files = write_files(pa.record_batch([pa.array([value] * len(days)), pa.array(days)], schema=SCHEMA), uri, run_id)
    manifest = f"{run_id}-{0 if base is None else base + 1}.json"
    write_file_atomically(f"{uri}/_manifests", manifest, pa.py_buffer(b"{}"))
    write_file_atomically(f"{uri}/_statistics", f"{run_id}.pb", pa.py_buffer(b"-"))
    if commits:
        commit(CommitTarget(uri, SCHEMA, tuple(days), run_id, base, None, {"manifest": manifest}), files)
    return [file.path for file, _ in files]


def age(store: Path, days: float) -> None:
    """Make every file and every commit so far that much older."""
    for path in store.rglob("*"):
        if path.is_file():
            if path.parent.name == "_delta_log" and path.suffix == ".json":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                for line in lines:
                    if "commitInfo" in line:
                        line["commitInfo"]["timestamp"] -= int(days * 86_400_000)
                path.write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "\n")
            old = path.stat().st_mtime - days * 86_400
            os.utime(path, (old, old))


def left(store: Path) -> set[str]:
    return {path.name for path in store.rglob("*") if path.is_file() and "_delta_log" not in path.parts}


def values(uri: str, version: int | None = None) -> list[int]:
    opened = open_table(uri, version)
    assert opened is not None
    return sorted(int(pl.read_parquet(file.path)["value"][0]) for file in data_files(opened))


def run(store: Path, *flags: str) -> None:
    assert vacuum(["--store", str(store), *flags]) == 0


def test_what_a_killed_run_left_goes_and_what_was_committed_stays(tmp_path: Path) -> None:
    uri = table(tmp_path)
    load(uri, "good", 1)
    (orphan,) = load(uri, "killed", 2, commits=False)
    aside = Path(uri, "date=2024-01-01", ".killed-0123456789abcdef.parquet.77-88")
    aside.write_bytes(b"half")
    Path(uri, "_delta_log", "00000000000000000001.json#1").write_bytes(b"half")
    (tmp_path / "runs" / "killed").mkdir(parents=True)
    (tmp_path / "runs" / "killed" / ".model.1-2").write_bytes(b"half")
    (tmp_path / "registry").mkdir()
    for name in (".mlflow.db.77-88", ".mlflow.db.77-88-journal"):
        (tmp_path / "registry" / name).write_bytes(b"half")
    before = left(tmp_path)
    age(tmp_path, 3)
    run(tmp_path)
    gone = before - left(tmp_path)
    assert gone == {
        Path(orphan).name,
        aside.name,
        "killed-1.json",
        "killed.pb",
        ".model.1-2",
        ".mlflow.db.77-88",
        ".mlflow.db.77-88-journal",
    }
    assert not Path(uri, "_delta_log", "00000000000000000001.json#1").exists()
    assert values(uri) == [1]


def test_a_table_that_was_never_committed_is_all_orphans(tmp_path: Path) -> None:
    """They stay until the first commit: without a log nothing proves that they never were in one."""
    load(table(tmp_path), "killed", 1, commits=False)
    (tmp_path / "runs" / "killed").mkdir(parents=True)
    write_marker(str(tmp_path / "runs" / "killed"), "features", "killed")
    set_marker(tmp_path / "runs" / "killed", pid=2**22 + 1)
    before = left(tmp_path)
    age(tmp_path, 3)
    set_marker(tmp_path / "runs" / "killed", started="2020-01-01T00:00:00+00:00")
    for path in tmp_path.rglob("started.json"):
        os.utime(path, (0, 0))
    run(tmp_path)
    assert left(tmp_path) == before
    load(table(tmp_path), "good", 2)
    run(tmp_path)
    assert left(tmp_path) == {Path(path).name for path in files_of(table(tmp_path))} | {"good-0.json", "good.pb"}


def set_marker(folder: Path, **changes: object) -> None:
    path = folder / "started.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def files_of(uri: str) -> list[str]:
    opened = open_table(uri)
    assert opened is not None
    return [file.path for file in data_files(opened)]


def spoil(name: str, log: Path) -> None:
    """Lose the log of a table with five versions and a checkpoint of the fourth, or a part of it."""
    newest, checkpoint = log / f"{4:020}.json", log / f"{3:020}.checkpoint.parquet"
    content = newest.read_bytes()
    if name == "deleted":
        shutil.rmtree(log)
    elif name == "emptied":
        for path in log.iterdir():
            path.unlink()
    elif name == "a link to nowhere":
        shutil.rmtree(log)
        log.symlink_to(log.parent / "nowhere")
    elif name == "newest entry empty":
        newest.write_bytes(b"")
    elif name == "newest entry cut":
        newest.write_bytes(content[:-60])
    elif name == "newest entry cut after a line":
        newest.write_bytes(b"".join(content.splitlines(keepends=True)[:-1]))
    elif name == "newest entry is garbage":
        newest.write_bytes(bytes(range(256)))
    elif name == "an entry missing":
        (log / f"{2:020}.json").unlink()
    elif name == "an older entry empty":
        (log / f"{1:020}.json").write_bytes(b"")
    elif name == "checkpoint empty":
        checkpoint.write_bytes(b"")
    elif name == "checkpoint cut":
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    elif name == "checkpoint missing":
        checkpoint.unlink()
    else:
        assert name == "only a cut checkpoint"
        for path in sorted(log.glob("*.json"))[:4]:
            path.unlink()
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])


SPOILS = [
    "deleted",
    "emptied",
    "a link to nowhere",
    "newest entry empty",
    "newest entry cut",
    "newest entry cut after a line",
    "newest entry is garbage",
    "an entry missing",
    "an older entry empty",
    "checkpoint empty",
    "checkpoint cut",
    "checkpoint missing",
    "only a cut checkpoint",
]


@pytest.mark.parametrize("how", SPOILS)
def test_a_table_whose_log_is_lost_or_spoiled_loses_nothing(
    tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_entries, "CHECKPOINT_EVERY", 3)
    uri = table(tmp_path)
    for i in range(5):
        load(uri, f"run{i}", i, days=(DAY, DAY + timedelta(days=1)))
    load(table(tmp_path, "features/sound/0123456789abcdef"), "good", 1)
    age(tmp_path, 30)
    spoil(how, Path(uri, "_delta_log"))
    before = left(tmp_path)
    assert cli.main(["vacuum", "--store", str(tmp_path), "--older_than", "0s", "--force"]) == StoreError.exit_code
    printed = capsys.readouterr().err
    assert printed.count("millrace: ") == 1
    assert uri in printed
    assert "Traceback" not in printed
    assert left(tmp_path) == before


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become a user whom access can be refused")
@pytest.mark.parametrize("closed", ["_delta_log", f"_delta_log/{4:020}.json", "."])
def test_a_log_that_may_not_be_read_keeps_everything(
    tmp_path: Path, closed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = table(tmp_path)
    for i in range(5):
        load(uri, f"run{i}", i)
    age(tmp_path, 30)
    before = left(tmp_path)
    for path in (tmp_path, *tmp_path.rglob("*")):
        os.chown(path, 65534, 65534)
    for folder in tmp_path.parents:
        if folder.stat().st_uid == 0 and str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    Path(uri, closed).chmod(0)
    command = ["vacuum", "--store", str(tmp_path), "--older_than", "0s", "--force"]
    assert cli.main([*command, "--dry_run"]) in (0, StoreError.exit_code)  # imports what nobody may not read
    capsys.readouterr()
    os.seteuid(65534)
    try:
        code = cli.main(command)
    finally:
        os.seteuid(0)
    Path(uri, closed).chmod(0o755)
    assert left(tmp_path) == before
    assert "Traceback" not in capsys.readouterr().err
    assert code == StoreError.exit_code


def test_an_older_log_that_may_have_lost_lines_keeps_the_files_of_its_runs(tmp_path: Path) -> None:
    """Entries of delta-rs do not count their files."""
    uri = table(tmp_path)
    load(uri, "good", 1)
    load(uri, "later", 2, days=(DAY, DAY + timedelta(days=1)))
    entry = Path(uri, "_delta_log", f"{1:020}.json")
    lines = [json.loads(line) for line in entry.read_text().splitlines()]
    del lines[0]["commitInfo"]["operationMetrics"]
    entry.write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines[:-1]))
    (orphan,) = load(uri, "killed", 3, commits=False)
    before = left(tmp_path)
    age(tmp_path, 30)
    run(tmp_path)
    gone = before - left(tmp_path)
    assert Path(orphan).name in gone
    assert not [name for name in gone if name.startswith("later-") and name.endswith(".parquet")]


def test_files_of_a_commit_that_the_log_lost_stay(tmp_path: Path) -> None:
    """The run's report says that it committed; the log ends before."""
    uri = table(tmp_path)
    load(uri, "good", 1)
    (lost,) = load(uri, "lost", 2)
    (tmp_path / "runs" / "lost").mkdir(parents=True)
    (tmp_path / "runs" / "lost" / "run.json").write_text(json.dumps({"commit_version": 1}))
    Path(uri, "_delta_log", f"{1:020}.json").unlink()
    age(tmp_path, 30)
    run(tmp_path)
    assert Path(lost).exists()


def test_young_files_stay_whoever_wrote_them(tmp_path: Path) -> None:
    load(table(tmp_path), "good", 1)
    load(table(tmp_path), "unknown", 2, commits=False)
    age(tmp_path, 1.9)
    before = left(tmp_path)
    run(tmp_path)
    assert left(tmp_path) == before
    run(tmp_path, "--older_than", "1d")
    assert left(tmp_path) < before


def test_files_of_a_run_at_work_stay_however_old(tmp_path: Path) -> None:
    """As when a run is resumed, or its clock or its disk's is wrong."""
    uri = table(tmp_path)
    load(uri, "good", 1)
    (working,) = load(uri, "working", 2, commits=False)
    (killed,) = load(uri, "working2", 3, commits=False)
    age(tmp_path, 3)
    write_marker(str(tmp_path / "runs" / "working"), "features", "working")
    run(tmp_path)
    assert Path(working).exists()
    assert not Path(killed).exists()
    assert {"working-1.json", "working.pb"} <= left(tmp_path)
    remove_marker(str(tmp_path / "runs" / "working"))
    assert running_runs(str(tmp_path)) == []
    run(tmp_path)
    assert not Path(working).exists()


def test_a_killed_runs_mark_expires_unless_its_process_lives(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "killed"
    write_marker(str(folder), "features", "killed")
    entry = json.loads((folder / "started.json").read_text())
    load(table(tmp_path), "good", 1)
    (orphan,) = load(table(tmp_path), "killed", 2, commits=False)
    age(tmp_path, 3)
    old = {**entry, "started": "2020-01-01T00:00:00+00:00"}
    (folder / "started.json").write_text(json.dumps(old))
    run(tmp_path)
    assert Path(orphan).exists(), "this very process launched it"
    (folder / "started.json").write_text(json.dumps({**old, "pid": 2**22 + 1}))
    run(tmp_path)
    assert not Path(orphan).exists()


def test_replaced_files_expire_after_the_retention(tmp_path: Path) -> None:
    uri = table(tmp_path)
    (first,) = load(uri, "first", 1)
    age(tmp_path, 5)
    (second,) = load(uri, "second", 2)
    age(tmp_path, 5)  # the first is ten days old, but was in use until five days ago
    load(uri, "third", 3)
    run(tmp_path)
    assert Path(first).exists()
    assert values(uri, 0) == [1]
    run(tmp_path, "--retention", "4d")
    assert not Path(first).exists(), "replaced five days ago"
    assert Path(second).exists(), "replaced just now"
    assert (values(uri), values(uri, 1)) == ([3], [2])
    assert {"second-1.json", "third-2.json"} <= left(tmp_path)
    assert "first-0.json" not in left(tmp_path)


def register(store: Path, uri: str, version: int) -> None:
    manifest = {
        "model": "buying",
        "objective": "binary:logistic",
        "classes": 1,
        "fingerprint": "0123456789abcdef",
        "view": "buying",
        "key": ["visit"],
        "time": "asked",
        "inputs": {"age": "float"},
        "feature_table": {"uri": f"file://{uri}/", "version": version},
    }
    bundle = Bundle(b"booster", Fitted((Encoding("age", "float"),)), manifest)
    Registry(registry_uri(str(store))).register(bundle, f"training-{version}")


def test_a_version_that_a_registered_model_was_trained_on_stays(tmp_path: Path) -> None:
    uri = table(tmp_path)
    paths = [load(uri, f"run{i}", i, [DAY, DAY + timedelta(days=1)]) for i in range(4)]
    register(tmp_path, uri, 1)
    age(tmp_path, 30)
    load(uri, "last", 9, [DAY, DAY + timedelta(days=1)])
    run(tmp_path, "--retention", "2d")
    assert values(uri, 1) == [1, 1]
    assert "run1-1.json" in left(tmp_path)
    assert not any(Path(path).exists() for path in [*paths[0], *paths[2]])
    assert values(uri, 3) == [3, 3], "it was the newest within the retention"


def test_a_registry_that_cannot_be_read_keeps_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (orphan,) = load(table(tmp_path), "killed", 1, commits=False)
    age(tmp_path, 3)
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "mlflow.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match="registry"):
        run(tmp_path)
    assert cli.main(["vacuum", "--store", str(tmp_path)]) == StoreError.exit_code
    assert "registry" in capsys.readouterr().err
    assert Path(orphan).exists()


def test_a_pinned_version_that_cannot_be_read_stops_it(tmp_path: Path) -> None:
    uri = table(tmp_path)
    for i in range(3):
        load(uri, f"run{i}", i)
    load(uri, "killed", 7, commits=False)
    bundle = tmp_path / "runs" / "t" / "model"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text(json.dumps({"feature_table": {"uri": uri, "version": 0}}))
    age(tmp_path, 30)
    os.remove(Path(uri, "_delta_log", f"{0:020}.json"))
    before = left(tmp_path)
    with pytest.raises(StoreError):
        run(tmp_path)
    assert left(tmp_path) == before


def test_a_model_trained_here_but_registered_nowhere_pins_too(tmp_path: Path) -> None:
    uri = table(tmp_path)
    (first,) = load(uri, "first", 1)
    bundle = tmp_path / "runs" / "t" / "model"
    bundle.mkdir(parents=True)
    moved = f"/elsewhere/{FEATURES}"
    (bundle / "manifest.json").write_text(json.dumps({"feature_table": {"uri": moved, "version": 0}}))
    load(uri, "second", 2)
    age(tmp_path, 30)
    load(uri, "third", 3)
    run(tmp_path, "--retention", "2d")
    assert Path(first).exists()


def test_examples_of_runs_that_left_no_model_go(tmp_path: Path) -> None:
    """A killed training run makes them anew when it is repeated; those of a trained model, and files of others,
    stay."""
    names = ("train-00000-of-00002.parquet", "test-00001-of-00002.tfrecord.gz", "notes.txt")
    for run_id in ("killed", "trained", "ended", "working"):
        folder = tmp_path / "examples" / "buying" / run_id
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_bytes(b"-")
    (tmp_path / "runs" / "trained" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "trained" / "model" / "manifest.json").write_text("{}")
    (tmp_path / "runs" / "ended").mkdir()
    (tmp_path / "runs" / "ended" / "run.json").write_text("{}")
    write_marker(str(tmp_path / "runs" / "working"), "training", "working")
    run(tmp_path)
    examples = tmp_path / "examples" / "buying"
    assert {path.name for path in examples.glob("killed/*")} == set(names), "younger than a run may take"
    age(tmp_path, 3)
    run(tmp_path)
    assert {path.name for path in examples.glob("killed/*")} == {"notes.txt"}
    assert all(
        {path.name for path in (examples / each).iterdir()} == set(names) for each in ("trained", "ended", "working")
    )


def test_dry_run_lists_and_removes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(table(tmp_path), "good", 1)
    (orphan,) = load(table(tmp_path), "killed", 1, commits=False)
    age(tmp_path, 3)
    before = left(tmp_path)
    run(tmp_path, "--dry_run")
    assert left(tmp_path) == before
    assert f"would remove orphan {orphan}" in capsys.readouterr().out


def test_less_than_an_hour_needs_force(tmp_path: Path) -> None:
    load(table(tmp_path), "good", 1)
    (orphan,) = load(table(tmp_path), "killed", 1, commits=False)
    with pytest.raises(DefinitionError, match="at least 1h"):
        run(tmp_path, "--older_than", "59m")
    assert Path(orphan).exists()
    time.sleep(0.01)
    run(tmp_path, "--older_than", "0s", "--force")
    assert not Path(orphan).exists()


def test_a_store_behind_a_link_and_with_spaces(tmp_path: Path) -> None:
    real = tmp_path / "a store"
    uri = table(real)
    load(uri, "good", 1)
    (orphan,) = load(uri, "killed", 2, commits=False)
    age(real, 3)
    (tmp_path / "link").symlink_to(real)
    run(tmp_path / "link")
    assert values(uri) == [1]
    assert not Path(orphan).exists()


def test_of_sources_only_what_millrace_itself_left_goes(tmp_path: Path) -> None:
    uri = table(tmp_path, "sources/sales")
    (first,) = load(uri, "live", 1)
    load(uri, "live2", 2)
    (orphan,) = load(uri, "killed", 3, commits=False)
    theirs = Path(uri, "date=2024-01-01", "part-00000-of-00001.parquet")
    theirs.write_bytes(b"-")
    plain = tmp_path / "sources" / "visits"
    plain.mkdir()
    (plain / "abc-0123456789abcdef.parquet").write_bytes(b"-")
    age(tmp_path, 30)
    load(uri, "live3", 3)
    run(tmp_path, "--retention", "2d")
    assert not Path(orphan).exists()
    assert theirs.exists()
    assert Path(first).exists()
    assert (plain / "abc-0123456789abcdef.parquet").exists()


def test_logs_that_only_a_checkpoint_remembers_are_not_mistaken_for_none(tmp_path: Path) -> None:
    uri = table(tmp_path)
    load(uri, "good", 1)
    opened = open_table(uri)
    assert opened is not None
    opened.create_checkpoint()
    os.remove(Path(uri, "_delta_log", f"{0:020}.json"))
    age(tmp_path, 30)
    run(tmp_path)
    assert values(uri) == [1]


def test_many_versions_of_many_days_keep_exactly_what_kept_versions_read(tmp_path: Path) -> None:
    """Against the plain definition: a version is readable while it is younger than the retention, or pinned."""
    uri = table(tmp_path)
    days = [DAY + timedelta(days=i) for i in range(4)]
    content: Mapping[int, list[int]] = {}
    for i in range(8):
        load(uri, f"run{i}", i, days[i % 3 : i % 3 + 2])
        content = {**content, i: values(uri)}
        age(tmp_path, 1)
    bundle = tmp_path / "runs" / "t" / "model"
    bundle.mkdir(parents=True)
    (bundle / "manifest.json").write_text(json.dumps({"feature_table": {"uri": uri, "version": 1}}))
    run(tmp_path, "--older_than", "1d", "--retention", "84h")
    for version in (1, 4, 5, 6, 7):  # made 7, 4, 3, 2 and 1 days ago; the one of 4 days ago was read until 3 days ago
        assert values(uri, version) == content[version]
    needed = {file.path for version in (1, 4, 5, 6, 7) for file in data_files(open_table(uri, version))}  # type: ignore[arg-type]
    assert {str(path) for path in Path(uri).rglob("*.parquet")} == needed


def test_summaries_that_a_kept_manifest_names_stay(tmp_path: Path) -> None:
    uri = table(tmp_path)
    for run_id in ("first", "second"):
        load(uri, run_id, 1)
        for name in (f"{run_id}-1704067200000000-0.parquet", f"{run_id}-part-0-0.parquet"):
            write_file_atomically(f"{uri}/_summaries", name, pa.py_buffer(b"-"))
    named = {"snapshots": {"1704067200000000": [["second-1704067200000000-0.parquet"], 7]}}
    Path(uri, "_manifests", "second-1.json").write_text(json.dumps(named))
    age(tmp_path, 30)
    run(tmp_path)
    assert [path.name for path in Path(uri, "_summaries").iterdir()] == ["second-1704067200000000-0.parquet"]
