"""A fuzzer over flags: whatever a command is given, it does its work or reports in one message what is wrong.

The plain suite tries some dozen in this process and a few in processes of their own; `-m slow` tries hundreds.
"""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.support.broken_files import Said, copied, made_store, one_message, run
from tests.support.odd_flags import LINES, LIVE, Line, lines, places

# They take seconds where all their flags are valid.
LONG = ("training", "retrain", "parity", *LIVE)
QUICK = tuple(name for name in LINES if name not in LONG)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_store(tmp_path_factory.mktemp("flags") / "base")


def in_a_process(*argv: str) -> Said:
    """`millrace ARGV…` as a process of its own, where Python itself could print what nobody caught."""
    entry = "import sys; from beam_pipelines.cli import main; sys.exit(main())"
    command = [sys.executable, "-W", "ignore", "-c", entry, *argv]
    done = subprocess.run(command, capture_output=True, errors="surrogateescape", check=False, timeout=200)
    return Said(argv, done.returncode, done.stdout, done.stderr)


def try_one(base: Path, folder: Path, line: Line, separate: bool = False) -> None:
    here = folder / f"case-{next(_numbers)}"
    here.mkdir()
    try:
        argv = line.argv(places(here, copied(base, here / "store")))
        one_message((in_a_process if separate else run)(*argv))
    finally:
        shutil.rmtree(here, ignore_errors=True)


def fuzz(base: Path, folder: Path, commands: Sequence[str], count: int, separate: bool = False) -> int:
    """Tries so many; returns how many were tried."""
    tried = 0

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(lines(tuple(commands)))
    def each(line: Line) -> None:
        nonlocal tried
        tried += 1
        if not separate or "\0" not in repr(line):
            try_one(base, folder, line, separate)

    each()
    return tried


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command writes to the current folder goes away."""
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["models", "--store", "http://[::1"], 4, "Invalid IPv6 URL"),
        (["models", "--store", "{store}", "--registry", "http://[::1"], 4, "Invalid IPv6 URL"),
        (["plan", "--definition", "sys", "--store", "{store}"], 2, "a module that is no Python file"),
        (["plan", "--definition", "..", "--store", "{store}"], 2, "Name it like examples.flights.definition"),
        (["plan", "--definition", "{fifo}", "--store", "{store}"], 2, "an importable module or a .py file"),
        (["plan", "--schema", "{fifo}"], 0, ""),
        (["features", "--full", "--schema", "{fifo}"], 2, "not a regular file"),
        (["features", "--block_rows", "-5"], 2, "'-5' is not a whole number from 1"),
        (["features", "--broadcast_mb", "nan"], 2, "'nan' is not a number from 0 on"),
        (["training", "--threads", "9" * 30], 2, "is not a whole number from 0 to 1024"),
        (["trace", "--prediction", "9" * 30], 2, "is not a whole number from"),
        (["schema", "check", "--run_id", "x" * 5000], 2, "…"),
    ],
)
def test_what_the_fuzzer_has_found(base: Path, tmp_path: Path, argv: list[str], code: int, words: str) -> None:
    flags = [] if "--store" in argv else ["--definition", "{definition}", "--store", "{store}"]
    known = places(tmp_path / "places", copied(base, tmp_path / "store"))
    printed = run(*(word.format(**known) for word in (*argv, *flags)))
    one_message(printed)
    assert printed.code == code, printed.text
    assert words in printed.err


def test_flags_of_any_value(base: Path, tmp_path: Path) -> None:
    assert fuzz(base, tmp_path, QUICK, 60) >= 60


def test_flags_of_any_value_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    assert fuzz(base, tmp_path, ("plan", "tables", "trace", "new"), 3, separate=True) >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_flags_of_any_value(base: Path, tmp_path: Path) -> None:
    print(fuzz(base, tmp_path, LINES, 2000), "command lines were tried")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_flags_in_processes_of_their_own(base: Path, tmp_path: Path) -> None:
    print(fuzz(base, tmp_path, LINES, 40, separate=True), "command lines were tried")
