"""Helpers and fixtures for: live jobs that are killed and frozen, on a real broker and engine: whatever happens, every
message is accounted for once."""

from __future__ import annotations

import contextlib
import itertools
import random
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import psutil

from deploy.streaming.prism import Prism
from deploy.streaming.processes import Child
from tests.support import market
from tests.support.live_fixtures import Live
from tests.support.live_jobs import Stage, await_, end, slots
from transforms.records.times import FOREVER
from transforms.storage.delta_log import COMPACTION
from transforms.storage.delta_log import commits as log_of
from transforms.storage.log_entries import ADDED_FILES

EVENTS = ("visits", "sales", "stock")


def history(rows: int = 120) -> dict[str, pl.DataFrame]:
    """Good rows and bad, without the dimension."""
    frames = market.spoiled(market.sources(rows))
    return {name: frames[name] for name in EVENTS}


def commits(stage: Stage) -> int:
    """Commits of accepted rows that there are: neither those by which a launch takes tables over nor compactions."""
    entries = itertools.chain.from_iterable(log_of(f"{stage.store}/sources/{name}") for name in stage.sources)
    return sum(entry["operationMetrics"][ADDED_FILES] > 0 and COMPACTION not in entry for entry in entries)


class Kills:
    """Ends a part of a running job: the launcher with its workers, the workers of the pool, or Prism."""

    def __init__(self, live: Live, folder: Path) -> None:
        self.live, self.prism = live, Prism(folder)
        self.prism.start()

    def job(self, stage: Stage, run_id: str, what: str) -> Child:
        pool = self.live.workers.options if what == "workers" else ["--environment_type=LOOPBACK"]
        return stage.job(run_id, options=[*self.prism.options, *pool])

    def kill(self, what: str, job: Child) -> None:
        if what == "launcher":
            job.kill()
        elif what == "workers":
            assert self.live.workers.child is not None
            for worker in psutil.Process(self.live.workers.child.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):  # one of an earlier job, gone already
                    if "SdkHarness" in " ".join(worker.cmdline()):
                        worker.kill()
        else:
            self.prism.kill()
            self.prism.start()

    def freeze(self, frozen: bool = True) -> None:
        """Prism stands still, or goes on."""
        assert self.prism.child is not None
        self.prism.child.signal(signal.SIGSTOP if frozen else signal.SIGCONT)


def killed(live: Live, folder: Path, times: int, seed: int, definition: str = market.DEFINITION) -> None:
    """A job that is killed so many times, from while it starts to while it commits, and started by the same command
    again."""
    chance = random.Random(seed)
    stage, kills = Stage(live, folder, definition=definition), Kills(live, folder)
    reported = slots(history(), hours=1)
    shares = [len(reported) * i // (times + 1) for i in range(times + 2)]
    try:
        for number, what in zip(range(times), itertools.cycle(["launcher", "prism", "launcher", "workers"])):
            with kills.job(stage, "same", what) as job:
                stage.send_slots(reported[shares[number] : shares[number + 1]])
                before = commits(stage)
                if what == "workers" or chance.random() < 0.6:  # amid its work
                    await_(lambda before=before: commits(stage) > before, 100, job)
                    time.sleep(chance.random() * 0.8)
                else:
                    if what == "prism":  # before that it would find the next one
                        await_(lambda job=job: "running: " in job.output(), 150, job)
                    time.sleep(chance.random() * (2 if what == "prism" else 8))
                kills.kill(what, job)
                if what == "workers":  # which Prism may not notice
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        job.wait(2)
                    job.signal(signal.SIGINT)
                    job.wait(60)
                    assert "Traceback" not in job.output(), job.output()
                elif what == "prism":
                    assert job.wait(60) != 0
                    assert "Traceback" not in job.output(), job.output()
                    if commits(stage) > before:
                        assert "nothing is lost" in job.output(), job.output()
        stage.send_slots(reported[shares[times] :])
        stage.beat(FOREVER)
        stage.flush()
        with kills.job(stage, "same", "launcher") as job:
            printed = end(job)
        assert "questions unaccounted for  0" in printed
        feature_rows = stage.audit()
        assert len(feature_rows) > 100
        with kills.job(stage, "same", "launcher") as job:  # as if killed before it could say that it has ended
            end(job)
        assert len(stage.audit()) == len(feature_rows)
    finally:
        kills.prism.stop()
