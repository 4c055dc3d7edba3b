"""Ctrl-C in training and batch inference: one line and exit code 130 at any moment, and nothing half-done is
visible."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest

from beam_pipelines import cli
from tests.support import shop
from tests.support.training_pipeline_case import flags

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(900)  # processes of their own, on a machine that others use too
ENTRY = "import sys; from beam_pipelines.cli import main; sys.exit(main())"


def interrupted(words: list[str], until: object) -> tuple[int, str]:
    """Start `millrace WORDS`, send SIGINT after a delay in seconds or once a path exists; returns exit code and
    stderr.  The delay begins once Python handles the signal, which takes a second where the machine is busy."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", ENTRY, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        if isinstance(until, Path):
            while not list(until.parent.glob(until.name)) and process.poll() is None:
                time.sleep(0.01)
        else:
            while process.poll() is None and not handles_interrupts(process.pid):
                time.sleep(0.01)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(float(str(until)))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=200)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err


def handles_interrupts(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return bool(int(caught, 16) >> (signal.SIGINT - 1) & 1)


def last_line(err: str) -> str:
    """The one line; before it there is only progress."""
    *before, last = err.splitlines()
    assert not [line for line in before if "Traceback" in line or "Error" in line or "millrace: stopped" in line]
    return last


@pytest.mark.parametrize(
    "moment",
    [1.0, 3.0, "runs/r/started.json", "examples/buying/r/*.parquet", "runs/r/trial-*", "runs/r/model/manifest.json"],
)
def test_training_stops_with_one_line(store: Path, moment: float | str) -> None:
    until = moment if isinstance(moment, float) else store / moment
    code, err = interrupted(["training", *flags(store, "r")], until)
    assert code == 130
    assert last_line(err).startswith("millrace: stopped; nothing half-done is visible; ")
    if not isinstance(moment, float):
        assert "to resume run r: millrace training" in last_line(err)


COMMANDS = {
    "features": ["runs/r/started.json", "features/*/*/date=*"],
    "training": ["runs/r/trial-*"],
    "inference": ["runs/r/started.json"],
    "retrain": ["runs/r/started.json", "runs/r/trial-*"],
    "replay": ["live/runs/r/started.json", "live/sources/*/_delta_log/*.json"],
}


def words_of(command: str, store: Path) -> list[str]:
    at = ["--store", str(store), "--run_id", "r"]
    both = ["--definition", str(store / "definition.py"), *at]
    return {
        "features": ["features", *both, "--full"],
        "training": ["training", *both, "--threads=1"],
        "inference": ["inference", *both, "--threads=1"],
        "retrain": ["retrain", "1", *at],
        "replay": ["features", "--streaming", *both, "--sources", str(store / "sources"), "--chunk=1d"]
        + ["--store", str(store / "live"), "--commit_every=0s", "--end=2024-01-20"],
    }[command]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with features and a registered model."""
    store = tmp_path_factory.mktemp("interrupted") / "store"
    path = shop.write(store, 600)
    both = ["--definition", str(path), "--store", str(store)]
    assert cli.main(["features", *both, "--run_id", "f"]) == 0
    assert cli.main(["training", *both, "--run_id", "t", "--threads=1"]) in (0, 6)
    assert cli.main(["promote", "1", "--store", str(store), "--why", "to score"]) == 0
    return store


def stopped_and_repeated(trained: Path, folder: Path, command: str, moment: float | str) -> int:
    """Interrupts a command, and then runs it again to its end; returns the code of the first."""
    store = Path(shutil.copytree(trained, folder / "store"))
    words = words_of(command, store)
    code, err = interrupted(words, store / moment if isinstance(moment, str) else moment)
    if code == 0:  # it had ended before
        return code
    assert code == 130, err
    assert last_line(err).startswith("millrace: stopped; nothing half-done is visible; "), err
    assert cli.main(words) == 0
    assert not list(store.rglob("started.json")), "a run that has ended is at work"
    assert not [path for path in store.rglob("*.part") if path.is_file()]
    shutil.rmtree(store)
    return code


@pytest.mark.parametrize(("command", "moment"), [(name, each) for name, some in COMMANDS.items() for each in some])
def test_a_command_that_was_stopped_goes_on(trained: Path, tmp_path: Path, command: str, moment: str) -> None:
    stopped_and_repeated(trained, tmp_path, command, moment)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_stopped_at_random_moments(trained: Path, tmp_path: Path, command: str) -> None:
    """Of the time that it takes undisturbed."""
    random = Random(command)
    store = Path(shutil.copytree(trained, tmp_path / "undisturbed"))
    began = time.monotonic()
    assert interrupted(words_of(command, store), 600.0)[0] == 0
    seconds = time.monotonic() - began
    codes = [
        stopped_and_repeated(trained, tmp_path / str(number), command, random.uniform(0.5, seconds))
        for number in range(8)
    ]
    assert codes.count(130) >= 4, codes


def test_a_command_that_does_not_end_is_ended(tmp_path: Path) -> None:
    """As where the signal is lost in code that swallows it, or a thread still trains."""
    code = (
        "import sys, threading, time; from beam_pipelines.runtime import interrupts\n"
        "interrupts.ENDING = 0.5\n"
        "def main(argv):\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    print('ready', flush=True)\n"
        "    try: time.sleep(60)\n"
        "    except BaseException: print('swallowed', file=sys.stderr)\n"
        "    time.sleep(60)\n"
        "sys.exit(interrupts.as_process(main, []))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (130, 1)
    assert err.startswith("millrace: stopped")


def test_a_signal_after_the_work_is_done_does_not_kill_the_process() -> None:
    """While Python ends, SIGINT has its first meaning again."""
    code = (
        "import atexit, os, signal, sys; from beam_pipelines.runtime.interrupts import as_process\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, me=os.getpid(), what=signal.SIGINT): kill(me, what)\n"
        "last = Last()\n"
        "sys.modules['kept'] = last\n"
        "sys.exit(as_process(lambda argv: 0, []))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("how", ["raised", "turned into another error", "in a finaliser"])
def test_the_signal_counts_wherever_it_is_raised(how: str) -> None:
    bodies = {
        "raised": "signal.raise_signal(signal.SIGINT)",
        "turned into another error": (
            "\n  try: signal.raise_signal(signal.SIGINT)\n  except BaseException: raise RuntimeError('other')"
        ),
        "in a finaliser": "\n  class Last:\n    def __del__(self): signal.raise_signal(signal.SIGINT)\n  Last()",
    }
    code = (
        "import sys, signal; from beam_pipelines.runtime.interrupts import as_process\n"
        "from beam_pipelines.runtime.errors import guard\n"
        f"def main(argv):\n  {bodies[how].lstrip()}\n  return 0\n"
        "sys.exit(as_process(guard(main), []))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (130, 1), done.stderr


def test_inference_stops_with_one_line(store: Path, tmp_path: Path) -> None:
    from beam_pipelines import training

    assert training.main(flags(store, "t")) == 0
    for number, until in enumerate([1.0, store / "runs/r1/started.json", store / "predictions/buying/*"]):
        code, err = interrupted(["inference", *flags(store, f"r{number}")], until)
        assert code == 130, err
        assert last_line(err).startswith("millrace: stopped")
    tables = list((store / "predictions").glob("*/_delta_log/*.json"))
    assert not tables, "a run that was stopped published"
    shutil.rmtree(store)
