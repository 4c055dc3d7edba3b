"""Ctrl-C in training and batch inference: one line and exit code 130 at any moment, and nothing half-done is
visible."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.training_pipeline_case import flags

ROOT = Path(__file__).parents[2]
ENTRY = "import sys; from beam_pipelines.cli import main; sys.exit(main())"


def interrupted(words: list[str], until: object) -> tuple[int, str]:
    """Start `millrace WORDS`, send SIGINT after a delay in seconds or once a path exists; returns exit code and
    stderr."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", ENTRY, *words]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    try:
        if isinstance(until, Path):
            while not list(until.parent.glob(until.name)) and process.poll() is None:
                time.sleep(0.01)
        else:
            time.sleep(float(str(until)))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    return process.returncode, err


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
