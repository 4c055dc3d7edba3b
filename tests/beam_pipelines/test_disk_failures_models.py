"""A full disk in training, registering, promoting and batch inference: one message and the exit code of a store,
whatever was being written, and the same command goes on once there is room."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from tests.support import shop
from tests.support.disks import disk, needs_root, remount
from tests.support.processes import ALL_PIPELINES, Zygote
from transforms.models.registry import Registry, registry_uri
from transforms.storage.paths import predictions_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_root]
ROOM = (0, 4, 12, 24, 48, 96, 200, 400, 1000, 4000, 30_000)  # kB


def used(folder: Path) -> int:
    """kB that files take up."""
    command = ["df", "-k", "--output=used", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    with Zygote(tmp_path_factory.mktemp("logs"), ALL_PIPELINES) as started:
        yield started


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, models: Zygote) -> Path:
    """A store with features, a champion, and a model that could not be registered."""
    folder = tmp_path_factory.mktemp("full") / "base"
    flags = ["--definition", str(shop.write(folder, 300)), "--store", str(folder)]
    elsewhere = ["--registry", "sqlite:////dev/null/x.db"]
    for argv, codes in (
        (["features", *flags, "--run_id", "f1"], (0,)),
        (["training", *flags, "--run_id", "t1", "--threads=1"], (0, 6)),
        (["training", *flags, "--run_id", "kept", "--threads=1", *elsewhere], (4,)),
        (["promote", "1", "--store", str(folder), "--why", "to score"], (0,)),
    ):
        ended = models.run(*argv, watch=folder)
        assert ended.code in codes, ended.err
    return folder


def words(command: str, store: Path) -> list[str]:
    at = ["--store", str(store)]
    both = ["--definition", str(store / "definition.py"), *at]
    return {
        "features": ["features", *both, "--run_id", "n", "--full"],
        "training": ["training", *both, "--run_id", "n", "--threads=1"],
        "inference": ["inference", *both, "--run_id", "n", "--threads=1"],
        "register": ["register", "kept", *at],
        "promote": ["promote", "1", *at, "--why", "to try"],
    }[command]


@pytest.mark.parametrize("command", ["features", "training", "inference", "register", "promote"])
def test_a_full_disk_is_one_message_and_room_lets_the_command_go_on(
    base: Path, tmp_path: Path, models: Zygote, command: str
) -> None:
    failed = 0
    for number, room in enumerate(ROOM):
        with disk(tmp_path / f"disk-{number}") as mounted:
            store = Path(shutil.copytree(base, mounted / "store"))
            remount(mounted, f"size={used(mounted) + room}k")
            ended = models.run(*words(command, store), watch=store)
            remount(mounted, "size=64m")
            fits = ended.code in (0, 6)
            if not fits:
                failed += 1
                assert ended.code == 4, (ended.code, ended.err)
                assert "Traceback" not in ended.err, ended.err
                reported = [
                    line for line in ended.err.splitlines() if line.startswith("millrace: ") and ". Got " in line
                ]
                assert len(reported) == 1, ended.err
                again = models.run(*words(command, store), watch=store)
                assert again.code in (0, 6), again.err
            if command in ("training", "register"):
                copy = shutil.copytree(store, tmp_path / f"copy-{number}")  # MLflow keeps its database open
                assert len(Registry(registry_uri(str(copy))).numbers("buying")) == 2, "each run is registered once"
            if command == "inference":
                assert len(pl.read_delta(predictions_uri(str(store), "buying"))) == 300
            if fits:
                break
    else:
        pytest.fail("it never fits")
    assert failed
