"""The environment of the streaming benchmark: a broker, KafkaIO, Prism and the live jobs of one measurement, measured
from outside."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import polars as pl
import psutil

from benchmarks.measure import ROOT
from deploy.streaming.expansion import Expansion
from deploy.streaming.kafka import Broker
from deploy.streaming.prism import Prism
from deploy.streaming.processes import Child, Service, running
from transforms.streaming.messages import Message

DEFINITION = "examples.flights.definition"
# Relative numbers of rows per partition of every topic: uneven, and the last partition is idle.
SHARE = "6,3,1,0"
# The broker stamps each record when it appends it: one clock for both ends of every latency.
STAMPED = {"message.timestamp.type": "LogAppendTime"}
SAMPLE = 1.0
# Days between two copies of the year: whole weeks.
YEAR_DAYS = 364


def write_sources(root: Path, years: int) -> dict[str, int]:
    """Writes several copies of the year of flights, one after another, with new flight ids; returns the rows per
    source."""
    from examples.flights import data

    rows: dict[str, int] = {}
    for name, frame in data.sources(data.package()).items():
        (root / name).mkdir(parents=True, exist_ok=True)
        times = [column for column, dtype in frame.schema.items() if isinstance(dtype, pl.Datetime)]
        for year in range(years if times else 1):
            part = frame.with_columns(pl.col(times).dt.offset_by(f"{year * YEAR_DAYS}d"))
            if "flight_id" in part.columns:
                part = part.with_columns(pl.col("flight_id") + year * 10_000_000)
            part.write_parquet(root / name / f"{year}.parquet", compression="lz4")
        rows[name] = len(frame) * (years if times else 1)
    return rows


def champion(store: Path) -> str:
    """A registry with a champion for the year of flights; it is made in `store` if it is missing."""
    from beam_pipelines import features, training
    from examples.flights import data
    from schemas.errors import GateError
    from schemas.loading import load_definition
    from transforms.models.registry import Registry, registry_uri

    uri, name = registry_uri(str(store)), load_definition(DEFINITION).require_model().name
    if not (store / "registry").exists() or Registry(uri).champion(name) is None:
        data.write(str(store))
        features.main(["--definition", DEFINITION, "--store", str(store)])
        with contextlib.suppress(GateError):  # it is registered anyway
            training.main(["--definition", DEFINITION, "--store", str(store)])
        if Registry(uri).champion(name) is None:
            version = next(version for model, version in Registry(uri).models() if model == name)
            Registry(uri).promote(name, version, "benchmarks/streaming.py")
    return uri


class Rig:
    """The services and jobs of one measurement, each in a process of its own.

    with Rig(folder, sources) as rig:
        rig.produce(…)
        rig.live(…)
    """

    def __init__(self, folder: Path, sources: Path, share: str = SHARE) -> None:
        from schemas.loading import load_definition

        self.folder, self.sources, self.share = folder, sources, share
        self.partitions = len(share.split(","))
        definition = load_definition(DEFINITION)
        self.view, self.model = definition.view, definition.require_model().name
        self.names = list(dict.fromkeys([self.view.spine.name, *self.view.events]))
        self.broker, self.expansion, self.prism = Broker(folder), Expansion(folder), Prism(folder)
        self.jobs: dict[str, Child] = {}
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Rig:
        services: Sequence[Service] = (self.broker, self.expansion, self.prism)
        self.stack.enter_context(running(*services))
        self.broker.create(*self.names, partitions=self.partitions, config=STAMPED)
        features = f"{self.view.name}.features"
        self.broker.create(features, f"{self.view.name}.dead_letters", partitions=self.partitions, config=STAMPED)
        return self

    def __exit__(self, *_: object) -> None:
        self.stack.close()

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def live(self, *flags: str, name: str = "live", module: str = "beam_pipelines.features") -> Child:
        """Starts a live job."""
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            module,
            "--streaming",
            "--source=kafka",
            "--definition",
            DEFINITION,
            "--store",
            str(self.store),
            "--run_id",
            name,
            "--bootstrap",
            self.broker.bootstrap,
            "--expansion_service",
            self.expansion.address,
            *self.prism.options,
            "--environment_type=LOOPBACK",
            *flags,
        ]
        return self.start(name, command)

    def produce(self, *flags: str, name: str = "producer") -> Child:
        """Starts the producer."""
        command = [
            sys.executable,
            "-m",
            "deploy.streaming.producer",
            "--definition",
            DEFINITION,
            "--sources",
            str(self.sources),
            "--bootstrap",
            self.broker.bootstrap,
            "--share",
            self.share,
            "--status",
            str(self.folder / f"{name}.json"),
            *flags,
        ]
        return self.start(name, command)

    def start(self, name: str, command: Sequence[str]) -> Child:
        self.jobs[name] = child = Child(command, self.folder / f"{name}.log", cwd=ROOT, grace=20)
        self.stack.callback(child.stop)
        return child

    def processes(self) -> dict[str, psutil.Process]:
        """The running processes, by name."""
        children = {each.name: each.child for each in (self.broker, self.expansion, self.prism)} | self.jobs
        found = {}
        for name, child in children.items():
            with contextlib.suppress(psutil.Error):
                if child is not None and child.running:
                    found[name] = psutil.Process(child.pid)
        return found

    def finished(self, name: str, within: float) -> None:
        """Waits for a job to succeed.

        Raises:
            SystemExit: it failed.
        """
        child, why = self.jobs[name], f"still running after {within:.0f} s"
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = child.wait(within)
            if status == 0:
                return
            why = f"exit status {status}"
        tail = "\n".join(child.output().splitlines()[-15:])
        raise SystemExit(f"{name} {why}; it said:\n{tail}")

    def status(self, name: str = "live") -> Mapping[str, Any]:
        """The job's last commit; empty before the first."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads((self.store / "runs" / name / "status.json").read_text())
        return {}

    def records(self, *topics: str) -> Iterator[Message]:
        """All records that are in the topics now."""
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        settings = {"bootstrap.servers": self.broker.bootstrap, "group.id": "bench", "enable.auto.commit": False}
        consumer = Consumer(settings)
        try:
            ends = {}
            for topic in topics:
                for number in consumer.list_topics(topic, timeout=10).topics[topic].partitions:
                    low, high = consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)
                    if high > low:
                        ends[topic, number] = high
            consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for topic, number in ends])
            while ends:
                for record in consumer.consume(1000, timeout=5):
                    if record.error() is not None:
                        raise SystemExit(f"The broker cannot be read: {record.error()}")
                    topic, number, offset = str(record.topic()), int(record.partition() or 0), int(record.offset() or 0)
                    if (topic, number) in ends:
                        stamp = record.timestamp()[1] * 1000
                        yield Message(topic, number, offset, stamp, record.key(), record.value() or b"")
                        if offset + 1 >= ends[topic, number]:
                            del ends[topic, number]
        finally:
            consumer.close()


class Sample(TypedDict):
    """CPU seconds and memory of each process at one time (s since 1970), including children."""

    at: float
    cpu: dict[str, float]
    rss_mb: dict[str, float]


class Watch(threading.Thread):
    """Samples CPU seconds and memory of the rig's processes, their children included."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(daemon=True)
        self.rig, self.stopped = rig, threading.Event()
        self.samples: list[Sample] = []

    def run(self) -> None:
        while not self.stopped.wait(SAMPLE):
            self.samples.append(self.look())

    def look(self) -> Sample:
        sample: Sample = {"at": time.time(), "cpu": {}, "rss_mb": {}}
        for name, process in self.rig.processes().items():
            cpu = rss = 0.0
            with contextlib.suppress(psutil.Error):
                for each in [process, *process.children(recursive=True)]:
                    used = each.cpu_times()
                    cpu += used.user + used.system
                    rss += each.memory_info().rss
            sample["cpu"][name], sample["rss_mb"][name] = cpu, rss / 1e6
        return sample

    def cores(self, begin: float, end: float) -> dict[str, float]:
        """Cores that each process kept busy between two moments."""
        inside = [each for each in self.samples if begin <= each["at"] <= end]
        if len(inside) < 2:
            return {}
        first, last = inside[0], inside[-1]
        return {
            name: round((last["cpu"][name] - first["cpu"][name]) / (last["at"] - first["at"]), 3)
            for name in last["cpu"]
            if name in first["cpu"]
        }

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.join()


def distribution(values: npt.NDArray[np.float64]) -> dict[str, float]:
    """p50, p90, p99 and max, in seconds."""
    if not len(values):
        return {}
    named = {f"p{share}": float(np.quantile(values, share / 100)) for share in (50, 90, 99)}
    return {name: round(value, 4) for name, value in {**named, "max": float(values.max())}.items()}
