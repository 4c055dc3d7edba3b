"""A message that kills the process that decodes it is skipped after a restart, and no other is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas import FeatureView, Source, Trailing
from tests.support.deadly import DEADLY
from transforms.streaming.crash_guard import CrashGuard, guard_folder
from transforms.streaming.live_features import DecodeBundles
from transforms.streaming.messages import Message
from transforms.streaming.micro_batches import micro_batches_of

ROOT = Path(__file__).parents[2]
WORKER = """
import json, sys, time
from tests.streaming.test_crash_guard import step_of, decode_all
step = step_of(sys.argv[1])
print(json.dumps(decode_all(step, json.load(open(sys.argv[2])))), flush=True)
"""
sales = Source("sales", time="sold", ahead="1h", columns={"id": pl.Int64, "shop": pl.String})
asked = Source("asked", time="at", columns={"id": pl.Int64, "shop": pl.String})
view = FeatureView("v", asked, key="id", features=[Trailing(sales, by="shop", over="1h", stats={"id": "sum"})])


def step_of(folder: str) -> DecodeBundles:
    step = DecodeBundles([view], guard=folder)
    step.setup()
    return step


def decode_all(step: DecodeBundles, texts: list[str]) -> dict[str, list[Any]]:
    """Offsets of the rows and of the dead letters of the messages of one bundle."""
    step.start_bundle()
    for offset, text in enumerate(texts):
        assert not list(step.process(Message("sales", 0, offset, 2**51, None, text.encode())))
    rows, dead = [], []
    for each in step.finish_bundle():
        for micro_batch in micro_batches_of(each.value):
            rows += micro_batch.rows["__offset"].to_list()
            dead += micro_batch.dead_letters.select("offset", "rule").rows()
    return {"rows": rows, "dead": dead}


def texts_with(*odd: str) -> list[str]:
    good = json.dumps({"id": 1, "shop": "a", "sold": "2020-01-01T00:00:00Z"})
    return [good, *odd, good]


class Process:
    """A worker that decodes the messages of one bundle and prints the result."""

    def __init__(self, folder: Path, texts: list[str], deadly: bool = True) -> None:
        hook = folder / "hook"
        hook.mkdir(exist_ok=True)
        (hook / "sitecustomize.py").write_text(DEADLY if deadly else "")
        (folder / "texts.json").write_text(
            json.dumps(texts).replace("DEADLY", "DEAD\\u004cY").replace("SLOW", "SL\\u004fW")
        )
        self.child = subprocess.Popen(
            [sys.executable, "-c", WORKER, str(folder / "guard"), str(folder / "texts.json")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(hook), str(ROOT)])},
        )

    def end(self) -> tuple[int, dict[str, list[Any]]]:
        out, error = self.child.communicate(timeout=200)
        if self.child.returncode > 0:
            raise AssertionError(error)
        return self.child.returncode, json.loads(out) if self.child.returncode == 0 else {}


def test_the_message_that_killed_a_worker_is_skipped_after_a_restart(tmp_path: Path) -> None:
    texts = texts_with('{"DEADLY": 1}')
    code, _ = Process(tmp_path, texts).end()
    assert code == -signal.SIGSEGV
    code, found = Process(tmp_path, texts).end()
    assert (code, found["rows"]) == (0, [0, 2])
    ((offset, rule),) = found["dead"]
    assert offset == 1
    assert "kills the process that does (SIGSEGV)" in rule
    # The verdict is kept until the message has been committed, and needs no further trial.
    began = time.monotonic()
    assert Process(tmp_path, texts).end() == (0, found)
    assert not list((tmp_path / "guard").glob("suspect-*"))
    assert time.monotonic() - began < 100


def test_a_message_at_which_a_worker_was_killed_by_somebody_is_decoded(tmp_path: Path) -> None:
    slow = json.dumps({"id": 7, "shop": "SLOW", "sold": "2020-01-01T00:00:00Z"})
    process = Process(tmp_path, texts_with(slow))
    assert process.child.stdout is not None
    assert process.child.stdout.readline() == "decoding\n"
    process.child.kill()
    process.child.communicate()
    assert process.child.returncode == -signal.SIGKILL
    (note,) = (tmp_path / "guard").glob("note-*")
    assert json.loads(note.read_bytes()[8:].rstrip(b"\0")) == [["sales", 0, 0, 2]]
    code, found = Process(tmp_path, texts_with(slow), deadly=False).end()
    assert (code, found) == (0, {"rows": [0, 1, 2], "dead": []})


def test_a_topic_that_is_made_again_has_other_messages_at_the_same_offsets(tmp_path: Path) -> None:
    texts = texts_with('{"DEADLY": 1}')
    Process(tmp_path, texts).end()
    Process(tmp_path, texts).end()
    assert decode_all(step_of(str(tmp_path / "guard")), texts_with(texts[0])) == {"rows": [0, 1, 2], "dead": []}


def test_notes_of_live_workers_are_left_alone_and_those_of_the_dead_are_read(tmp_path: Path) -> None:
    def ignored(_: Message) -> None: ...

    message = Message("t", 3, 5, 0, None, b"x")
    alive = CrashGuard(str(tmp_path), ignored)
    with alive.decoding([message]):
        other = CrashGuard(str(tmp_path), ignored)
        assert other.suspects == []
        other.close()
    alive.close()
    assert list(tmp_path.glob("note-*")) == []


def test_a_guard_that_cannot_write_does_not_stop_a_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    guard = CrashGuard(str(tmp_path / "file" / "guard"), str)
    with guard.decoding([Message("t", 3, 5, 0, None, b"x")]) as messages:
        assert len(messages) == 1
    assert "no crash guard" in caplog.text


def test_the_guard_of_a_store_elsewhere_is_on_the_machine() -> None:
    assert guard_folder("/store", "v.features") == "/store/crash_guard/v.features"
    assert "://" not in guard_folder("gs://bucket/store", "v.features")


def test_a_note_costs_microseconds(tmp_path: Path) -> None:
    guard = CrashGuard(str(tmp_path), str)
    messages = [Message("topic", number % 4, number, 0, None, b"x" * 100) for number in range(200)]
    seconds = []
    for _ in range(50):
        began = time.perf_counter()
        with guard.decoding(messages):
            pass
        seconds.append(time.perf_counter() - began)
    guard.close()
    assert min(seconds) / len(messages) < 20e-6
    print(f"{min(seconds) / len(messages) * 1e6:.2f} µs a message")
