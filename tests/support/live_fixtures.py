"""What the tests marked `live` run against: one broker, expansion service, Prism and worker pool for the whole session.

Started on first use, all at once, on free ports of loopback; they end with the test run, however it ends.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.streaming.expansion import Expansion
from deploy.streaming.kafka import Broker
from deploy.streaming.prism import Prism
from deploy.streaming.processes import running
from deploy.streaming.workers import WorkerPool


@dataclasses.dataclass(frozen=True)
class Live:
    """Everything a live job needs."""

    broker: Broker
    expansion: Expansion
    prism: Prism
    workers: WorkerPool
    folder: Path

    def options(self, environment: str = "LOOPBACK") -> list[str]:
        """Beam's options to run on Prism, with Python in this process or in the pool's."""
        where = self.workers.options if environment == "EXTERNAL" else ["--environment_type=LOOPBACK"]
        return [*self.prism.options, *where]


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """Broker, expansion service, Prism and pool, all up; nothing of them is left when the session ends."""
    folder = tmp_path_factory.mktemp("live")
    parts = Broker(folder), Expansion(folder), Prism(folder), WorkerPool(folder)
    with running(*parts):
        yield Live(*parts, folder)
        ours = [psutil.Process(part.child.pid) for part in parts if part.running and part.child]
        ours += [worker for process in ours for worker in process.children(recursive=True)]
    left = [process for process in ours if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not left, f"still there: {left}"


@pytest.fixture(scope="session")
def broker(live: Live) -> Broker:
    """The broker of the session; a test that stops it starts it again."""
    if not live.broker.running:
        live.broker.start()
    return live.broker


_numbers = itertools.count(1)


@pytest.fixture
def topic(broker: Broker) -> Callable[..., str]:
    """Makes a topic of its own: `topic("departures", partitions=4)` gives its name."""

    def make(name: str = "topic", partitions: int = 4, config: dict[str, str] | None = None) -> str:
        full = f"{name}-{os.getpid()}-{next(_numbers)}"
        broker.create(full, partitions=partitions, config=config)
        return full

    return make
