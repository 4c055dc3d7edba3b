"""A full disk in training, registering and batch inference: one message and the exit code of a store, whatever was
being written, and the same command goes on once there is room."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest

from tests.support import shop
from tests.support.broken_files import DEFINITION, one_message, run
from tests.support.disks import disk, needs_root, remount
from transforms.models.registry import Registry, registry_uri
from transforms.storage.paths import predictions_uri

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), needs_root]


def used(folder: Path) -> int:
    """kB that files take up."""
    command = ["df", "-k", "--output=used", str(folder)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with features and one registered model."""
    folder = tmp_path_factory.mktemp("full") / "base"
    definition = shop.write(folder, 300, definition=DEFINITION)
    flags = ["--definition", str(definition), "--store", str(folder)]
    for argv in (["features", *flags, "--run_id", "f1"], ["training", *flags, "--run_id", "t1", "--threads=1"]):
        said = run(*argv)
        assert said.code in (0, 6), said.text
    return folder


def versions(store: Path) -> int:
    return len(Registry(registry_uri(str(store))).numbers("buying"))


def predictions(store: Path) -> pl.DataFrame:
    return pl.read_delta(predictions_uri(str(store), "buying"))


@pytest.mark.parametrize("command", ["features", "training", "inference", "register", "promote"])
def test_a_full_disk_is_one_message_and_room_lets_the_command_go_on(base: Path, tmp_path: Path, command: str) -> None:
    places: set[str] = set()
    for number, room in enumerate((0, 4, 12, 24, 48, 96, 200, 400, 1000, 4000, 60_000)):
        with disk(tmp_path / f"disk-{number}") as mounted:
            store = mounted / "store"
            shutil.copytree(base, store)
            at = ["--store", str(store)]
            both = ["--definition", str(store / "definition.py"), *at]
            argv = {
                "features": ["features", *both, "--run_id", "n", "--full"],
                "training": ["training", *both, "--run_id", "n", "--threads=1"],
                "inference": ["inference", *both, "--run_id", "n", "--threads=1"],
                "register": ["register", "n", *at],
                "promote": ["promote", "1", *at, "--why", "to try"],
            }[command]
            if command == "register":
                elsewhere = ["--registry", "sqlite:////dev/null/x.db"]
                assert run("training", *both, "--run_id", "n", "--threads=1", *elsewhere).code == 4
            remount(mounted, f"size={used(mounted) + room}k")
            said = run(*argv)
            one_message(said)
            remount(mounted, "size=64m")
            if said.code not in (0, 6):
                assert said.code == 4, said.text
                places.add(said.err.partition("Got ")[2][:200])
                again = run(*argv)
                assert again.code in (0, 6), again.text
            if command in ("training", "register"):
                assert versions(store) == 2, "each run is registered once"
            if command == "inference":
                assert len(predictions(store)) == 300
            if said.code in (0, 6):
                break
    else:
        pytest.fail("it never fits")
    assert places or command == "promote"
