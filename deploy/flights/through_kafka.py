"""The month through Kafka and Prism: a producer and both live jobs, each a process of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from deploy.flights.case import DEFINITION, Case, Figures, swapping
from deploy.flights.progress_table import ProgressTable, Sent
from deploy.flights.watch import Watch
from deploy.streaming.expansion import Expansion
from deploy.streaming.kafka import Broker
from deploy.streaming.prism import Prism
from deploy.streaming.processes import Child, running
from schemas.errors import DataError
from schemas.loading import load_definition

ROOT = Path(__file__).resolve().parents[2]
SHARE = "6,3,1,0"  # relative numbers of rows per partition: uneven, and the last partition is idle
DRAIN = 180.0  # seconds within which the last rows must be computed and scored


def through_kafka(case: Case) -> Figures:
    """Runs the month through a broker, with both live pipelines over the Job API."""
    began = time.monotonic()
    broker, expansion, prism = Broker(case.folder), Expansion(case.folder), Prism(case.folder)
    try:
        with running(broker, expansion, prism), swapping(case) as swap, contextlib.ExitStack() as stack:
            features, predictions = _create_topics(case, broker)
            kafka = ["--source=kafka", "--bootstrap", broker.bootstrap, "--expansion_service", expansion.address]
            children = _pipelines(case, ["--streaming", *kafka, *prism.options, "--environment_type=LOOPBACK"])
            for child in reversed(children.values()):
                stack.enter_context(child)
            print(f"started in {time.monotonic() - began:.1f} s; logs in {case.folder}", flush=True)
            children["producer"] = stack.enter_context(_producer(case, broker.bootstrap))
            watch = Watch(case.view, broker.bootstrap, features, predictions)
            stack.callback(watch.close)
            figures = follow(Progress(case, watch, children, swap))
            for name, child in children.items():  # each job ends by itself when its topic ends
                if child.wait(60):
                    raise DataError("The live processes end well", f"{name}: {_tail(case, name)}", f"See {case.folder}")
        return figures
    finally:
        shutil.rmtree(case.folder / "data", ignore_errors=True)  # the broker's


def _create_topics(case: Case, broker: Broker) -> tuple[str, str]:
    """Creates the topics of the sources, and those of features and predictions; returns the names of the latter."""
    model = load_definition(DEFINITION).require_model().name
    features, predictions = f"{case.view.name}.features", f"{model}.predictions"
    broker.create(*case.view.events, partitions=len(SHARE.split(",")))
    broker.create(features, f"{case.view.name}.dead_letters", predictions)
    return features, predictions


def _pipelines(case: Case, flags: Sequence[str]) -> dict[str, Child]:
    """The live jobs before their start: features, and inference if there is a model."""

    def pipeline(name: str, run_id: str, *own: str) -> Child:
        command = [sys.executable, "-m", f"beam_pipelines.{name}", *case.common, "--run_id", run_id, *flags, *own]
        return Child(command, case.folder / f"{run_id}.log", cwd=ROOT, grace=20)

    # Rows of the sources from before the month are the job's history.
    history = ["--sources", str(case.store / "sources"), "--start", case.start]
    children = {"live": pipeline("features", "live", *history, "--commit_every=2s")}
    if case.first:
        children["inference"] = pipeline("inference", "inference", *case.registry, "--poll=1s", "--commit_every=2s")
    return children


def _producer(case: Case, bootstrap: str) -> Child:
    flags = {
        "definition": DEFINITION,
        "sources": case.store / "sources",
        "bootstrap": bootstrap,
        "start": case.start,
        "end": case.end,
        "speed": case.speed,
        "share": SHARE,
        "status": case.folder / "producer.json",
    }
    command = [sys.executable, "-m", "deploy.streaming.producer", *(f"--{name}={of}" for name, of in flags.items())]
    return Child(command, case.folder / "producer.log", cwd=ROOT)


@dataclasses.dataclass
class Progress:
    """The progress of a run: what was sent, what was published, and the lag between them.

    Args:
        case: the run.
        watch: what has been published.
        children: its processes by name.
        swap: makes the second version champion.
    """

    case: Case
    watch: Watch
    children: Mapping[str, Child]
    swap: Callable[[], None]
    sent: Sent = dataclasses.field(default_factory=lambda: Sent(done=False, rows=0, time=0, sent={}))
    lag: float | None = None
    lags: list[float] = dataclasses.field(default_factory=list)
    swapped_at: float | None = None
    done_at: float | None = None

    @property
    def spine_rows(self) -> int:
        """Number of spine rows sent."""
        return sum(self.sent["sent"].get(self.case.view.spine.name, []))

    @property
    def complete(self) -> bool:
        """Whether everything was sent, computed, scored and committed."""
        return (
            self.sent["done"]
            and not self.children["live"].running  # the last commit is in
            and len(self.watch.computed) >= self.spine_rows
            and (not self.case.first or len(self.watch.predicted) >= self.spine_rows)
        )

    @property
    def overdue(self) -> bool:
        return self.done_at is not None and time.monotonic() - self.done_at > DRAIN

    def update(self) -> None:
        """Reads what was sent and published; changes the champion halfway."""
        self.watch.read(0.5)
        with contextlib.suppress(OSError):
            self.sent = json.loads((self.case.folder / "producer.json").read_text())
        done, until = self.sent["done"], self.sent["time"]
        if self.case.first and self.swapped_at is None and until / 1e6 > self.case.halfway:
            self.swap()
            self.swapped_at = time.monotonic()
        self.lag = max(until - self.watch.until, 0) / 1e6 / self.case.speed if self.watch.until else None
        self.lags += [self.lag] if self.lag is not None and not done else []
        self.done_at = self.done_at or (time.monotonic() if done else None)

    def require_running(self) -> None:
        """Checks that no process has ended before everything was sent.

        Raises:
            DataError: a process has ended.
        """
        for name, child in self.children.items():
            if not child.running and not (self.sent["done"] and child.wait() == 0):
                raise DataError(
                    "The live processes run until everything is sent",
                    f"{name} ended: {_tail(self.case, name)}",
                    f"See {self.case.folder}",
                )

    def status(self) -> Figures:
        """The last commit of the features job; empty before the first."""
        try:
            return dict(json.loads((self.case.live / "runs" / "live" / "status.json").read_text()))
        except (OSError, ValueError):
            return {}

    def predictions(self) -> Figures:
        """Figures of the predictions and of the change of champion."""
        seen = self.watch.version_since.get(self.case.second)
        return {
            "predicted": len(self.watch.predicted),
            "predictions": self.watch.rows[self.watch.predictions],
            "by_version": dict(Counter(self.watch.predicted.values())),
            "swap_seen_after_s": round(seen - self.swapped_at, 2) if seen and self.swapped_at else None,
        }


def follow(progress: Progress) -> Figures:
    """Prints the progress until everything that was sent has been published, or `DRAIN` seconds after the last row was
    sent.

    Raises:
        DataError: a process ended too early.
    """
    show, began = ProgressTable(), time.monotonic()
    while not (progress.complete or progress.overdue):
        progress.update()
        progress.require_running()
        show(progress.sent, progress.status(), progress.spine_rows, progress.watch, progress.lag)
    drained = time.monotonic()
    progress.watch.read(2)  # repeats, if there are any
    show(progress.sent, progress.status(), progress.spine_rows, progress.watch, None, True)
    show.end()
    return {
        "mode": "kafka and prism",
        "events": progress.sent["rows"],
        "questions": progress.spine_rows,
        "answered": len(progress.watch.computed),
        **(progress.predictions() if progress.case.first else {}),
        "events_per_second": round(progress.sent["rows"] / progress.case.seconds),
        "lag_s": {"median": _quantile(progress.lags, 0.5), "p99": _quantile(progress.lags, 0.99)},
        "drained_after_s": round(drained - progress.done_at, 2) if progress.done_at else None,
        "seconds": round(drained - began, 1),
    }


def _quantile(values: Sequence[float], share: float) -> float | None:
    return round(sorted(values)[min(int(len(values) * share), len(values) - 1)], 2) if values else None


def _tail(case: Case, name: str) -> str:
    """The last lines of a process's log."""
    log = case.folder / f"{name}.log"
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log.exists() else "no output"
