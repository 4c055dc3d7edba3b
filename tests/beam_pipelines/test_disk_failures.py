"""Disks that are full, read-only or closed: a message names this, nothing is half-written, and the same command
continues later."""

from __future__ import annotations

import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.disks import disk, needs_root, remount
from tests.support.loads import Case, content, leftovers, prepared, same
from tests.support.processes import Ended, Zygote
from tests.support.tables import figures_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NOBODY = 65534


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory, zygote: Zygote) -> Case:
    return prepared(tmp_path_factory.mktemp("disks"), zygote, second=True)


def refused(ended: Ended, *words: str) -> None:
    """One message of rule, value and fix, the run and the command that resumes it; the exit code of a store."""
    assert ended.code == 4, (ended.code, ended.err)
    assert "Traceback" not in ended.err, ended.err
    for word in ("millrace: ", "in run held of features", "to resume: millrace features --definition ", *words):
        assert word in ended.err, ended.err


def unchanged(case: Case, store: Path) -> None:
    """Readers have what they had; dead letters may be committed already."""
    found, old, new = content(store, case.table), content(case.before, case.table), content(case.after, case.table)
    dead_letters = "dead_letters/features"
    assert same(found[case.table], old[case.table])
    assert same(found[dead_letters], old[dead_letters]) or same(found[dead_letters], new[dead_letters])


def goes_on(case: Case, store: Path) -> None:
    ended = case.load(store, "held")
    assert ended.code == 0, ended.err
    found, new = content(store, case.table), content(case.after, case.table)
    assert all(same(found[name], new[name]) for name in new)


@needs_root
def test_a_full_disk_stops_a_run_at_any_step_and_room_lets_it_go_on(case: Case, tmp_path: Path) -> None:
    """Of 0 kB to what the load needs, in pages: the disk fills up at every kind of file, those of delta-rs among
    them."""
    assert case.before is not None
    positions: set[str] = set()
    fits = False
    for pages in range(0, 60, 5):
        with disk(tmp_path / f"disk-{pages}") as mounted:
            store = mounted / "store"
            shutil.copytree(case.before, store)
            used = int(
                subprocess.run(
                    ["df", "-k", "--output=used", str(mounted)], check=True, capture_output=True, text=True
                ).stdout.split()[1]
            )
            remount(mounted, f"size={used + 4 * pages}k")
            ended = case.load(store, "held")
            fits = ended.code == 0
            if fits:
                break
            committed = same(content(store, case.table)[case.table], content(case.after, case.table)[case.table])
            refused(ended, "The store can be written", "space" if "os error" not in ended.err else "os error 28")
            if not committed:
                unchanged(case, store)
            assert not [path for path in store.rglob(".*") if path.is_file()], "half a file takes up room"
            printed = ended.err.partition("Got ")[2]
            positions |= {
                position
                for position in ("/runs/", "/_summaries/", "/date=", "/_statistics/", "/_manifests/", "dead_letters")
                if position in printed
            }
            remount(mounted, "size=64m")
            goes_on(case, store)
    assert fits
    assert {"/runs/", "/date=", "/_statistics/"} <= positions, positions


@needs_root
def test_a_disk_too_full_for_the_commit_itself_is_a_full_disk(case: Case, tmp_path: Path) -> None:
    """Held right before delta-rs writes its log, with no page left."""
    assert case.before is not None
    steps = case.undisturbed.steps
    last = max(i for i, step in enumerate(steps) if step.startswith("os.rename") and "_manifests" in step)
    with disk(tmp_path / "disk") as mounted:
        store = mounted / "store"
        shutil.copytree(case.before, store)
        process = case.zygote.start(
            "features",
            *case.arguments,
            "--store",
            str(store),
            "--run_id",
            "held",
            watch=store,
            step=last,
            kind=signal.SIGSTOP,
        )
        assert process.stopped()
        used = int(
            subprocess.run(
                ["df", "-k", "--output=used", str(mounted)], check=True, capture_output=True, text=True
            ).stdout.split()[1]
        )
        remount(mounted, f"size={used}k")
        process.resume()
        ended = process.wait()
        refused(ended, "The store can be written", "free space", f"{store}/{case.table}")
        unchanged(case, store)
        remount(mounted, "size=64m")
        goes_on(case, store)
        swept = case.zygote.run("vacuum", "--store", str(store), "--older_than", "0s", "--force", watch=store)
        assert swept.code == 0, swept.err
        assert leftovers(store) == []


@needs_root
def test_a_read_only_store_is_read_and_not_written(case: Case, tmp_path: Path) -> None:
    assert case.before is not None
    with disk(tmp_path / "disk") as mounted:
        store = mounted / "store"
        shutil.copytree(case.before, store)
        remount(mounted, "ro")
        refused(case.load(store, "held"), "The store can be written", "Read-only file system")
        for command in (["tables"], ["vacuum", "--older_than", "0s", "--force"], ["plan", *case.arguments]):
            ended = case.zygote.run(*command, "--store", str(store), watch=store)
            assert ended.code == 0, ended.err
        unchanged(case, store)
        remount(mounted, "rw")
        goes_on(case, store)


@needs_root
@pytest.mark.parametrize("closed", ["runs", "features", "dead_letters", "_delta_log"])
def test_a_folder_that_belongs_to_others_is_named(case: Case, tmp_path: Path, closed: str) -> None:
    """As the user nobody, since nothing stops root."""
    store = open_to_all(case, tmp_path)
    paths = [path for path in (store, *store.rglob("*")) if path.is_dir() and closed in path.parts]
    for path in paths:
        path.chmod(path.stat().st_mode & ~0o222)
    ended = case.load(store, "held", user=NOBODY)
    refused(ended, "can be written", str(store), "denied")
    unchanged(case, store)
    for path in paths:
        path.chmod(path.stat().st_mode | 0o222)
    goes_on(case, store)


@needs_root
@pytest.mark.parametrize("closed", ["_delta_log", "_manifests"])
def test_a_store_that_may_not_be_read_is_named(case: Case, tmp_path: Path, closed: str) -> None:
    store = open_to_all(case, tmp_path)
    (path,) = (path for path in (store / case.table).rglob(closed))
    mode = stat.S_IMODE(path.stat().st_mode)
    path.chmod(0)
    refused(case.load(store, "held", user=NOBODY), "can be read", str(store / case.table), "denied")
    path.chmod(mode)
    unchanged(case, store)


@needs_root
def test_sources_that_may_not_be_read_are_named(case: Case, tmp_path: Path) -> None:
    """A folder that cannot be listed is no folder without files."""
    store = open_to_all(case, tmp_path)
    for path in (case.folder / "sources" / "sales", case.folder / "sources" / "sales" / "part-1.parquet"):
        mode = stat.S_IMODE(path.stat().st_mode)
        path.chmod(0)
        try:
            ended = case.load(store, "held", user=NOBODY)
        finally:
            path.chmod(mode)
        assert ended.code == 3, ended.err
        assert "Permission denied" in ended.err
        assert str(path) in ended.err
        assert "Grant access" in ended.err
        assert "Traceback" not in ended.err
    unchanged(case, store)


def open_to_all(case: Case, tmp_path: Path) -> Path:
    assert case.before is not None
    store = tmp_path / "store"
    shutil.copytree(case.before, store)
    for folder in (*tmp_path.parents, *case.folder.parents, case.folder):
        if str(folder).startswith("/tmp/"):
            folder.chmod(folder.stat().st_mode | 0o755)
    subprocess.run(["chmod", "-R", "a+rwX", str(tmp_path), str(case.folder / "sources")], check=True)
    return store


def test_files_that_may_not_grow_are_a_store_that_cannot_be_written(case: Case, tmp_path: Path) -> None:
    """A quota, by way of a limit on the size of files: of the log of delta-rs too, once everything else fits."""
    assert case.before is not None
    codes = set()
    for limit in (1500, 5000, 9000, 1_000_000):
        store = tmp_path / f"store-{limit}"
        shutil.copytree(case.before, store)
        ended = case.load(store, "held", limit=limit)
        codes.add(ended.code)
        if ended.code:
            refused(ended, "The store can be written")
            unchanged(case, store)
            goes_on(case, store)
    assert codes == {0, 4}
    assert figures_of(store, "held")["rows_out"] > 0
