"""The sides of the streaming benchmark; each starts its own rig and returns its figures."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.measure import say
from benchmarks.streaming_lag import completed, computed
from benchmarks.streaming_rig import SHARE, STAMPED, Rig, Watch, distribution
from deploy.streaming.processes import Child
from transforms.streaming.groups import shard_groups
from transforms.streaming.kafka import Broker, end_offsets

# Events of the year of flights per second of its own time.
PER_SECOND = 1_018_758 / (365 * 86_400)
# A catch-up is measured between these shares of the feature rows: without its start, and without the wait for the last
# heartbeat.
UNDER_WAY = (0.05, 0.98)
# The processes in which the job's own steps and KafkaIO run.
WORKERS = ("live", "expansion")
# The figures of a side: the main one is a number, the others are any JSON values.
Seen = dict[str, object]


def catchup(folder: Path, sources: Path, first: str, last: str, rows: int, flags: list[str]) -> Seen:
    """A backlog of whole months exists before the job starts; how fast is it processed?"""
    with Rig(folder, sources) as rig, Watch(rig) as watch:
        rig.produce("--start", first, "--end", last, "--rows", str(rows), "--step", "12h")
        rig.finished("producer", 300)
        launched = time.time()
        child = rig.live("--sources", str(sources), "--without_history", *flags)
        running = _launched(child)
        rig.finished("live", 600)
        ended = time.time()
        spine_rows, counts = completed(rig)
        found = computed(rig, f"{rig.view.name}.features")
        store_rows = rig.status().get("rows", {})
    twice = found.filter(pl.col("times") > 1)
    if len(found) != len(spine_rows) or len(twice):
        raise SystemExit(f"{len(spine_rows)} spine rows, {len(found)} computed, {len(twice)} of them more than once")
    stamps = np.sort(found["computed"].to_numpy())
    begin, end = (float(stamps[int(len(stamps) * share)]) for share in UNDER_WAY)
    inside = float(((stamps > begin) & (stamps <= end)).mean())
    return {
        "events_per_second": counts["rows"] / (float(stamps[-1]) - running),
        "under_way_per_second": counts["rows"] * inside / (end - begin),
        "running_s": running - launched,
        "events": counts["rows"],
        "questions": len(spine_rows),
        "rows_per_message": counts["rows"] / counts["messages"],
        "first_answer_s": float(stamps[0]) - launched,
        "last_answer_s": float(stamps[-1]) - launched,
        "seconds": ended - launched,
        "under_way_s": end - begin,
        "cores": watch.cores(begin, end),
        "rss_mb": watch.samples[-1]["rss_mb"],
        "committed": store_rows,
        "progress": [round(float(stamps[int((len(stamps) - 1) * share / 20)]) - launched, 2) for share in range(21)],
    }


@dataclass(frozen=True)
class Load:
    """Events at a steady rate.

    Args:
        first: the first simulated day.
        offered: rows per second of all topics.
        seconds: how long it is measured.
        warm_up: seconds before that.
        share: share of the rows, per partition of every topic.
    """

    first: str
    offered: float
    seconds: float
    warm_up: float
    share: str = SHARE


def lag(folder: Path, sources: Path, load: Load, flags: list[str], registry: str | None = None) -> Seen:
    """Events at a steady rate while the job runs; how long after the record that completes it is a spine row computed?

    With a `registry`, its champion scores the feature rows on the same machine; how long after its features does a
    prediction arrive?
    """
    first, offered, warm_up, share = load.first, load.offered, load.warm_up, load.share
    seconds = load.seconds
    speed = offered / PER_SECOND
    days = int(np.ceil((seconds + warm_up) * speed / 86_400))
    last = str(np.datetime64(first) + np.timedelta64(days, "D"))
    with Rig(folder, sources, share) as rig, Watch(rig) as watch:
        predictions = f"{rig.model}.predictions"
        rig.live("--sources", str(sources), "--without_history", *flags)
        if registry is not None:
            rig.broker.create(predictions, f"{predictions}.dead_letters", partitions=rig.partitions, config=STAMPED)
            rig.live("--registry", registry, name="inference", module="beam_pipelines.inference")
        for name in list(rig.jobs):
            _await_running(rig, name)
        rig.produce("--start", first, "--end", last, "--speed", str(speed))
        began = time.time()
        rig.finished("producer", seconds + warm_up + 120)
        sent = time.time()
        rig.finished("live", 120)
        spine_rows, counts = completed(rig)
        found = computed(rig, f"{rig.view.name}.features")
        scored = None
        if registry is not None:
            rig.finished("inference", 120)
            scored = computed(rig, predictions)
    both = spine_rows.join(found, on="row_id")
    if len(both) != len(spine_rows):
        raise SystemExit(f"{len(spine_rows)} spine rows, {len(both)} computed")
    both = both.with_columns((pl.col("computed") - pl.col("complete")).alias("lag"))
    steady = both.filter((pl.col("complete") > began + warm_up) & (pl.col("complete") < sent - 1))
    further: Seen = {}
    if scored is not None:
        if len(scored) != len(found):
            raise SystemExit(f"{len(found)} computed, {len(scored)} predicted")
        after = steady.join(scored.select("row_id", pl.col("computed").alias("scored")), on="row_id")
        waits = (after["scored"] - after["computed"]).to_numpy()
        further = {"predictions_lag_p99_s": distribution(waits).get("p99"), "predictions_lag": distribution(waits)}
    return further | {
        "features_lag_p99_s": distribution(steady["lag"].to_numpy()).get("p99"),
        "features_lag": distribution(steady["lag"].to_numpy()),
        "offered_per_second": counts["rows"] / (sent - began),
        "speed": speed,
        "share": share,
        "events": counts["rows"],
        "questions": len(spine_rows),
        "measured": len(steady),
        "rows_per_message": counts["rows"] / counts["messages"],
        "cores": watch.cores(began + warm_up, sent),
        "rss_mb": watch.samples[-1]["rss_mb"],
        "until_made": distribution((steady["made"] - steady["complete"]).to_numpy()),
        "made_to_append": distribution((steady["computed"] - steady["made"]).to_numpy()),
        "p99_by_5s": _by_time(steady, began),
    }


def _by_time(lags: pl.DataFrame, began: float) -> dict[str, float]:
    parts = (
        lags.group_by(((pl.col("complete") - began) // 5 * 5).cast(pl.Int64).alias("at"))
        .agg(pl.col("lag").quantile(0.99))
        .sort("at")
    )
    return {str(at): round(value, 3) for at, value in parts.rows()}


def soak(folder: Path, sources: Path, first: str, offered: float, minutes: float, flags: list[str]) -> Seen:
    """Events at a steady rate for a long time; by how much does the memory of the job's workers grow after a third of
    the time?"""
    speed = offered / PER_SECOND
    last = str(np.datetime64(first) + np.timedelta64(int(np.ceil(minutes * 60 * speed / 86_400)), "D"))
    states: list[Seen] = []
    with Rig(folder, sources) as rig, Watch(rig) as watch:
        rig.live("--sources", str(sources), "--without_history", *flags)
        _await_running(rig, "live")
        producer = rig.produce("--start", first, "--end", last, "--speed", str(speed))
        began = time.time()
        while producer.running and time.time() - began < minutes * 60 + 300:
            time.sleep(5)
            if told := rig.status():
                states.append({"at": time.time() - began, "pending": told["pending"], **told["state"]})
        rig.finished("producer", 10)
        sent = time.time()
        rig.finished("live", 300)
        rows = rig.status()["rows"]
    inside = [each for each in watch.samples if began <= each["at"] <= sent]
    later = inside[len(inside) // 3 :]
    return {
        "soak_memory_growth": _growth([sum(each["rss_mb"][name] for name in WORKERS) for each in later]),
        "growth": {name: _growth([each["rss_mb"][name] for each in later]) for name in later[-1]["rss_mb"]},
        "rss_mb": [
            {name: round(value) for name, value in inside[int((len(inside) - 1) * i / 15)]["rss_mb"].items()}
            for i in range(16)
        ],
        "minutes": (sent - began) / 60,
        "offered_per_second": rows["events"] / (sent - began),
        "rows": rows,
        "cores": watch.cores(began, sent),
        "state": [states[int((len(states) - 1) * i / 15)] for i in range(16)],
    }


def per_element(folder: Path, sources: Path, first: str, days: int, rows: int) -> Seen:
    """A backlog of some days through a DoFn with one element per row; how fast is it processed?"""
    last = str(np.datetime64(first) + np.timedelta64(days, "D"))
    with Rig(folder, sources) as rig, Watch(rig) as watch:
        topic, parts = "elements", len(shard_groups(rig.view))
        rig.broker.create(topic, partitions=rig.partitions, config=STAMPED)
        rig.produce("--start", first, "--end", last, "--rows", str(rows), "--step", "12h")
        rig.finished("producer", 300)
        spine_rows, counts = completed(rig)
        broker, wanted = Broker(rig.broker.bootstrap), len(spine_rows) * parts
        flags = ["--bootstrap", rig.broker.bootstrap, "--expansion_service", rig.expansion.address, "--topic", topic]
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.streaming_element", *flags, *rig.prism.options]
        launched, child = time.time(), rig.start("element", [*command, "--environment_type=LOOPBACK"])
        running = _launched(child)
        while (found := sum(end_offsets(broker, [topic])[topic].values())) < wanted:
            if not child.running or time.time() - launched > 300:
                raise SystemExit(f"{found} of {wanted} feature rows per element; its output:\n{child.output()[-3000:]}")
            time.sleep(0.5)
        stamps = np.sort([record.timestamp / 1e6 for record in rig.records(topic)])
    begin, end = (float(stamps[int(len(stamps) * share)]) for share in UNDER_WAY)
    inside = float(((stamps > begin) & (stamps <= end)).mean())
    return {
        "events_per_second": counts["rows"] / (float(stamps[-1]) - running),
        "under_way_per_second": counts["rows"] * inside / (end - begin),
        "running_s": running - launched,
        "events": counts["rows"],
        "questions": len(spine_rows),
        "answers": len(stamps),
        "first_answer_s": float(stamps[0]) - launched,
        "under_way_s": end - begin,
        "cores": watch.cores(begin, end),
    }


def _launched(child: Child) -> float:
    """The time at which a job reports that it has been launched, or ends."""
    while "running: " not in child.output() and child.running:
        time.sleep(0.1)
    return time.time()


def _growth(values: Sequence[float]) -> float:
    """The median of the last fifth divided by that of the first, minus one."""
    fifth = max(len(values) // 5, 1)
    return round(float(np.median(values[-fifth:]) / np.median(values[:fifth])) - 1, 4)


def _await_running(rig: Rig, name: str) -> None:
    """Waits until the job reports that it has been launched."""
    child, deadline = rig.jobs[name], time.monotonic() + 120
    while "running: " not in child.output():
        if not child.running or time.monotonic() > deadline:
            raise SystemExit(f"the live job {name} does not start:\n{child.output()[-3000:]}")
        time.sleep(0.2)
    time.sleep(5)  # readers are assigned, and the workers' JVM is warm
    say(f"the live job {name} is up")
