"""A fuzzer over the files that a live store keeps: `live_view.json`, `status.json`, logs and data of live tables, and
the notes of the crash guard.  Whatever becomes of them, a command does its work or says in one message what is wrong.

The plain suite tries a few, with commands that are quick; `-m slow` tries hundreds, with all of them.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.broken_files import (
    Change,
    at_most,
    changes,
    files_of,
    live_commands,
    made_live_store,
    one_message,
    run,
)
from transforms.streaming.crash_guard import CrashGuard, guard_folder
from transforms.streaming.messages import Message

QUICK = ("tables", "trace", "live features of topics")
EVERY = (*QUICK, "live features", "live features again", "live inference", "live inference again")
EVERY += ("parity", "verify", "compact", "vacuum", "erase")
_numbers = itertools.count()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_live_store(tmp_path_factory.mktemp("stored") / "base")


def try_one(base: Path, folder: Path, name: str, file: str, change: Change) -> None:
    """Breaks a file of a copy of the live store, and runs the command there."""
    store = folder / f"store-{next(_numbers)}"
    shutil.copytree(base, store)
    try:
        change.apply(store / "live" / file)
        one_message(run(*live_commands(store)[name]))
    finally:
        shutil.rmtree(store, ignore_errors=True)


def fuzz(base: Path, folder: Path, names: Sequence[str], count: int) -> int:
    """Tries so many; returns how many were tried."""
    every, tried = [each for each in files_of(base / "live") if not each.startswith("crash_guard/")], 0
    every += [str(each.relative_to(base / "live")) for each in (base / "live" / "sources").rglob("*") if each.is_file()]
    small = [each for each in every if each.endswith(".json") and "_delta_log" not in each]

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(names), st.one_of(st.sampled_from(small), st.sampled_from(every)), changes)
    def each(name: str, file: str, change: Change) -> None:
        nonlocal tried
        tried += 1
        try_one(base, folder, name, file, change)

    each()
    return tried


def test_files_of_a_live_store_of_any_content(base: Path, tmp_path: Path) -> None:
    assert fuzz(base, tmp_path, QUICK, 15) >= 15


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_many_files_of_a_live_store_of_any_content(base: Path, tmp_path: Path) -> None:
    print(fuzz(base, tmp_path, EVERY, 500), "files of live stores were tried")


@given(st.sampled_from(["suspect-1", "verdicts", "note-1", "lock"]), changes)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_notes_of_the_crash_guard_of_any_content(base: Path, tmp_path: Path, name: str, change: Change) -> None:
    """A job starts all the same, and decodes what it is not sure about."""
    folder = Path(guard_folder(str(tmp_path / f"store-{next(_numbers)}"), "buying.features"))
    shutil.copytree(base / "live" / "crash_guard" / "buying.features", folder)
    change.apply(folder / name)
    messages = [Message("visits", 0, offset, 0, None, b"{}") for offset in range(6)]
    with at_most(30):
        guard = CrashGuard(str(folder), len)
        try:
            guard.suspects = []  # each would be tried in a process of its own
            with guard.decoding(messages) as checked:
                assert [each.offset for each in checked] == list(range(6))
                assert not any(each.refused for each in checked)  # the verdict is on another message
        finally:
            guard.close()
        again = CrashGuard(str(folder), len)
        again.close()
