"""A file or folder that vanishes while a run reads it: one message that names it, nothing is published, and the same
command does its work once it is back."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import shop
from tests.support.processes import ALL_PIPELINES, Ended, Zygote
from transforms.models.registry import Registry, registry_uri
from transforms.storage.delta_tables import newest_version, open_table
from transforms.storage.paths import predictions_uri

pytestmark = pytest.mark.timeout(900)  # with the fixture, which makes a store and trains on it
# What each command reads, as patterns within the store.
READ = [
    ("features", "sources/sales"),
    ("features", "sources/sales/part.parquet"),
    ("features", "sources/visits/part.parquet"),
    ("training", "features/buying"),
    ("training", "features/buying/*/date=*/*.parquet"),
    ("training", "sources/sales"),
    ("inference", "features/buying"),
    ("inference", "features/buying/*/date=*/*.parquet"),
    ("inference", "registry/artifacts"),
]


@dataclasses.dataclass(frozen=True)
class Base:
    """A store with features and a champion, and how many steps on it each command takes."""

    zygote: Zygote
    store: Path
    steps: dict[str, int]

    def run(self, command: str, store: Path, **how: object) -> Ended:
        return self.zygote.start(*words(command, store), watch=store, **how).wait()  # type: ignore[arg-type]


def words(command: str, store: Path) -> list[str]:
    flags = ["--definition", str(store / "definition.py"), "--store", str(store), "--run_id", "r"]
    return [command, *flags, *(["--full"] if command == "features" else ["--threads=1"])]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    folder = tmp_path_factory.mktemp("vanished")
    store = folder / "base"
    path = shop.write(store, 400)
    with Zygote(tmp_path_factory.mktemp("logs"), ALL_PIPELINES) as zygote:
        flags = ["--definition", str(path), "--store", str(store)]
        for argv in (
            ["features", *flags, "--run_id", "f"],
            ["training", *flags, "--run_id", "t", "--threads=1"],
            ["promote", "1", "--store", str(store), "--why", "to score"],
        ):
            ended = zygote.run(*argv, watch=store)
            assert ended.code in (0, 6), ended.err
        made = Base(zygote, store, {})
        for command in ("features", "training", "inference"):
            undisturbed = Path(shutil.copytree(store, folder / command))
            ended = made.run(command, undisturbed)
            assert ended.code in (0, 6), ended.err
            made.steps[command] = len(ended.steps)
        yield made


def published(store: Path) -> tuple[int | None, ...]:
    tables = [newest_version(str(path.parent)) for path in sorted(store.glob("features/*/*/_delta_log"))]
    uri = predictions_uri(str(store), "buying")
    return (
        *tables,
        newest_version(uri) if open_table(uri) else None,
        len(Registry(registry_uri(str(store))).numbers("buying")),
    )


def vanish(base: Base, folder: Path, command: str, what: str, share: float) -> int:
    """Stops a command at a step, takes away what it reads, and lets it go on; returns its exit code."""
    store = Path(shutil.copytree(base.store, folder / "store"))
    before = published(store)
    process = base.zygote.start(
        *words(command, store), watch=store, step=int(share * (base.steps[command] - 1)), kind=signal.SIGSTOP
    )
    assert process.stopped()
    gone = sorted(store.glob(what))
    assert gone
    for path in gone:
        path.rename(folder / f"{path.name}.gone")
    process.resume()
    ended = process.wait()
    for path in gone:
        shutil.rmtree(path, ignore_errors=True)
        (folder / f"{path.name}.gone").rename(path)
    if ended.code not in (0, 6):  # else it had read everything
        assert ended.code in (3, 4), (ended.code, ended.err)
        assert "Traceback" not in ended.err, ended.err
        assert sum(line.startswith("millrace: ") and " must " in line for line in ended.err.splitlines()) == 1, (
            ended.err
        )
        assert published(store) == before
        assert (again := base.run(command, store)).code in (0, 6), again.err
    shutil.rmtree(store)
    return ended.code


@pytest.mark.parametrize(("command", "what"), READ)
def test_what_vanishes_at_the_start_is_named(base: Base, tmp_path: Path, command: str, what: str) -> None:
    code = vanish(base, tmp_path, command, what, 0.0)
    assert code in (3, 4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("command", "what"), READ)
def test_what_vanishes_at_any_step_is_named(base: Base, tmp_path: Path, command: str, what: str) -> None:
    for number in range(1, 6):
        (tmp_path / str(number)).mkdir()
        vanish(base, tmp_path / str(number), command, what, number / 5)
