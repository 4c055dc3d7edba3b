"""Sends a view's sources from Parquet files to Kafka as they became known, at a chosen speed.

    python -m deploy.streaming.producer --definition examples.flights.definition --sources out/store/sources \\
        --bootstrap 127.0.0.1:9092 --start 2013-03-01 --end 2013-04-01 --speed 30000

Each source has a topic, which is created if it is missing.  A message is an Arrow IPC stream of the rows that became
known since the one before, and its timestamp is the simulated time.  Rows with the same value in the first column go to
the same partition; `--share 6,3,1,0` makes four uneven partitions, the last without rows.  Twice a second each
partition gets a heartbeat, the time up to which everything has been sent.  Progress is written to the file `--status`,
as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from schemas.durations import microseconds
from schemas.errors import DataError, MillraceError, StoreError
from schemas.loading import load_definition
from schemas.sources import Source

Ints = npt.NDArray[np.int64]
HEARTBEAT = b"__heartbeat"
FOREVER = 2**62  # the last heartbeat of a partition: nothing follows
# Wall seconds between two steps, and between two heartbeats of a partition.
TICK, BEAT = 0.05, 0.5


@dataclasses.dataclass(eq=False)
class Stream:
    """The rows of one topic: for each partition, the rows in order, and when each became known."""

    source: Source
    topic: str
    frames: list[pl.DataFrame]
    known: list[Ints]
    sent: list[int]
    beat: list[int]

    @property
    def rows(self) -> int:
        return sum(map(len, self.known))


def read(source: Source, root: Path, topic: str, start: int, end: int, share: Sequence[int]) -> Stream:
    """The source's rows that became known in `[start, end)` µs, divided among partitions by `share`.

    Raises:
        DataError: there is no such source.
    """
    folder = root / source.name
    if not any(folder.rglob("*.parquet")):
        raise DataError(f"Source {source.name!r} has files", f"none in {folder}", "Write it first, as for a batch run")
    moment = pl.col(str(source.time)).dt.timestamp("us")
    rows = (
        pl.scan_parquet(folder / "**/*.parquet", hive_partitioning=False)
        .select(pl.col(name).cast(dtype) for name, dtype in source.schema.items())
        .filter((moment >= start) & (moment < end))
    )
    frame = rows.sort(str(source.time), maintain_order=True).collect()
    bounds = np.cumsum(share)
    first = frame[next(iter(source.columns))]
    place = np.searchsorted(bounds, first.hash(seed=1).to_numpy() % np.uint64(bounds[-1]), side="right")
    frames = [frame.filter(pl.Series(place == number)) for number in range(len(share))]
    known = [each[str(source.time)].to_physical().to_numpy() for each in frames]
    return Stream(source, topic, frames, known, [0] * len(share), [0] * len(share))


def news(stream: Stream, partition: int, until: int, most: int) -> Iterator[tuple[bytes, int]]:
    """(value, time in µs) of the messages with the rows that became known before `until`."""
    frame, known = stream.frames[partition], stream.known[partition]
    end = int(np.searchsorted(known, until, side="left"))
    while (begin := stream.sent[partition]) < end:
        stop = min(begin + most, end)
        stream.sent[partition] = stop
        yield to_arrow(frame[begin:stop]), int(known[stop - 1])


def to_arrow(frame: pl.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.write_ipc_stream(sink, compression="lz4", compat_level=pl.CompatLevel.oldest())
    return sink.getvalue()


class Sender:
    """Delivers messages in order, or raises an error."""

    def __init__(self, bootstrap: str) -> None:
        settings = {
            "bootstrap.servers": bootstrap,
            "enable.idempotence": True,
            "linger.ms": 5,
            "delivery.timeout.ms": 120_000,
            "log_level": 0,
        }
        self.producer = Producer(settings)  # without idempotence, a retry may change the order
        self.failed: KafkaError | None = None

    def send(self, topic: str, partition: int, value: bytes, moment: int, key: bytes | None = None) -> None:
        while True:
            try:
                self.producer.produce(
                    topic, value, key, partition, on_delivery=self._delivered, timestamp=max(moment // 1000, 1)
                )
                break
            except BufferError:
                self.producer.poll(0.1)
        self.producer.poll(0)
        self._check()

    def flush(self) -> None:
        while self.producer.flush(1):
            self._check()
        self._check()

    def _delivered(self, error: KafkaError | None, _: object) -> None:
        self.failed = self.failed or error

    def _check(self) -> None:
        if self.failed is not None:
            raise StoreError("The broker takes what is sent", self.failed.str(), "See the broker's log")


def create(bootstrap: str, topics: Sequence[str], partitions: int) -> None:
    """Creates missing topics."""
    admin = AdminClient({"bootstrap.servers": bootstrap, "log_level": 0})
    made = admin.create_topics([NewTopic(topic, partitions, 1) for topic in topics], operation_timeout=30)
    for future in made.values():
        error = future.exception()
        if error is not None and error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
            raise StoreError("The broker makes topics", str(error.args[0]), f"Is it at {bootstrap}?")


@dataclasses.dataclass(frozen=True)
class Pace:
    """How simulated time passes while rows are sent.

    Args:
        start: simulated time of the first row, in µs.
        end: simulated time after the last row, in µs.
        speed: simulated seconds per second; 0 sends as fast as possible.
        step: simulated µs between two messages of a partition when `speed` is 0.
        most: the most rows in one message.
    """

    start: int
    end: int
    speed: float
    step: int
    most: int

    def after(self, passed: float, now: int) -> int:
        """The simulated time, in µs, `passed` seconds after it was `now`."""
        return min(self.start + int(passed * self.speed * 1e6) if self.speed else now + self.step, self.end)

    @property
    def beat(self) -> int:
        """Simulated µs between two heartbeats of a partition."""
        return int(BEAT * self.speed * 1e6) if self.speed else self.step


def replay(streams: Sequence[Stream], sender: Sender, pace: Pace, status: Path | None) -> None:
    """Sends every row and heartbeat at the given pace, and writes progress to the file `status`."""
    began = reported = time.monotonic()
    now = pace.start
    while now < pace.end:
        now = pace.after(time.monotonic() - began, now)
        for stream in streams:
            send_until(stream, sender, now, pace)
        if status is not None and time.monotonic() - reported > 0.5:
            reported = time.monotonic()
            report(streams, now, False, status)
        if pace.speed and now < pace.end:
            time.sleep(TICK)
    for stream in streams:
        for partition in range(len(stream.frames)):
            sender.send(stream.topic, partition, str(FOREVER).encode(), pace.end, HEARTBEAT)
    sender.flush()
    if status is not None:
        report(streams, now, True, status)


def send_until(stream: Stream, sender: Sender, now: int, pace: Pace) -> None:
    """Sends the rows that became known by `now`, and heartbeats that are due."""
    for partition in range(len(stream.frames)):
        for value, moment in news(stream, partition, now, pace.most):
            sender.send(stream.topic, partition, value, moment)
        if now - stream.beat[partition] >= pace.beat:
            stream.beat[partition] = now
            sender.send(stream.topic, partition, str(now).encode(), now, HEARTBEAT)


def report(streams: Sequence[Stream], now: int, done: bool, status: Path) -> None:
    sent = {stream.source.name: stream.sent for stream in streams}
    progress: dict[str, Any] = {
        "time": now,
        "done": done,
        "rows": sum(map(sum, sent.values())),
        "of": sum(stream.rows for stream in streams),
        "sent": sent,
    }
    part = status.with_suffix(".part")
    part.write_text(json.dumps(progress))
    os.replace(part, status)


def sources(definition: str) -> Mapping[str, Source]:
    """Spine and events of the definition's view: the sources that a live job reads from topics."""
    view = load_definition(definition).view
    return {view.spine.name: view.spine, **view.events}


def _midnight(day: str) -> int:
    """The start of a UTC day, µs since 1970."""
    return int(datetime.combine(date.fromisoformat(day), datetime.min.time(), UTC).timestamp()) * 1_000_000


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.streaming.producer", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--definition", required=True, help="module or .py file that names `view`")
    parser.add_argument("--sources", required=True, type=Path, help="folder of the sources' Parquet files")
    parser.add_argument("--bootstrap", required=True, help="HOST:PORT of a broker")
    parser.add_argument("--topic_prefix", default="", help="before the name of every topic")
    parser.add_argument("--start", required=True, type=_midnight, help="first UTC day")
    parser.add_argument("--end", required=True, type=_midnight, help="the UTC day after the last")
    parser.add_argument(
        "--speed", type=float, default=0, help="simulated seconds per second (default 0: as fast as it goes)"
    )
    parser.add_argument(
        "--share", default="6,3,1,0", help="of the rows, per partition (default 6,3,1,0: uneven, the last one idle)"
    )
    parser.add_argument("--rows", type=int, default=500, help="most rows a message holds (default 500)")
    parser.add_argument(
        "--step", default="1h", help="flat out: simulated time from one message of a partition to its next (default 1h)"
    )
    parser.add_argument("--status", type=Path, help="file for the progress")
    flags = parser.parse_args(argv)
    share = [int(part) for part in flags.share.split(",")]
    try:
        step = microseconds(flags.step, "--step")
        streams = [
            read(source, flags.sources, flags.topic_prefix + name, flags.start, flags.end, share)
            for name, source in sources(flags.definition).items()
        ]
        create(flags.bootstrap, [stream.topic for stream in streams], len(share))
        pace = Pace(flags.start, flags.end, flags.speed, step, flags.rows)
        replay(streams, Sender(flags.bootstrap), pace, flags.status)
    except MillraceError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
