"""Files as a stream: the messages that producers would have sent, in order of arrival, in one Python process.

No broker, no Java: the same messages, the same steps after them.  Rows arrive when they became known, or later by a
seeded random delay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.row_hashing import hash_column, mix
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey
from transforms.sources.reader import read_raw
from transforms.streaming.messages import Message, heartbeat, to_arrow, to_json

Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class Replay:
    """How files become messages.

    Args:
        root: folder of the sources' files.
        start, end: rows known in `[start, end)` µs are sent.
        partitions: of every topic.
        disorder: rows arrive up to this much after they became known (µs, uniform, `seed`ed).
        chunk: messages that arrive within this long (µs) come together, as a poll of a broker would give them.
        rows: most rows a message holds.
        format: "arrow" or "json" (one row a message).
    """

    root: str
    start: int = ALWAYS
    end: int = FOREVER
    partitions: int = 2
    disorder: int = 0
    seed: int = 0
    chunk: int = 3_600_000_000
    rows: int = 1000
    format: str = "arrow"


def sources_of(view: FeatureView) -> dict[str, Source]:
    """Everything a live view listens to: the spine and its events."""
    return {view.spine.name: view.spine, **view.events}


def chunks(view: FeatureView, replay: Replay) -> Iterator[list[Message]]:
    """The messages, chunk by chunk; at last each partition says that it has told everything."""
    frames = {}
    for name, source in sources_of(view).items():
        contract = Contract(source, tuple(source.schema))
        frames[name] = read_raw(*survey(replay.root, contract))
    yield from chunks_of(view, frames, replay)


def chunks_of(view: FeatureView, frames: Mapping[str, pl.DataFrame], replay: Replay) -> Iterator[list[Message]]:
    """As `chunks`, from rows in memory."""
    random = np.random.default_rng(replay.seed)
    streams = []
    for name, frame in frames.items():
        source = sources_of(view)[name]
        known = _known(source, frame)
        inside = (known >= replay.start) & (known < replay.end)
        frame, known = frame.filter(pl.Series(inside)), known[inside]
        arrived = known + (random.integers(0, replay.disorder, len(known), endpoint=True) if replay.disorder else 0)
        first = next(iter(source.columns))
        keyed = frame[first] if not frame[first].dtype.is_float() else pl.Series(np.arange(len(frame)))
        partition = (mix(hash_column(keyed)) % np.uint64(replay.partitions)).astype(np.int64) if len(frame) else known
        order = np.argsort(arrived, kind="stable")
        streams.append((name, frame[order], arrived[order], partition[order]))
    offsets: dict[tuple[str, int], int] = {}
    numbers = np.unique(np.concatenate([arrived // replay.chunk for _, _, arrived, _ in streams]))
    for number in numbers.tolist():
        messages: list[Message] = []
        for name, frame, arrived, partition in streams:
            lo, hi = np.searchsorted(arrived, [number * replay.chunk, (number + 1) * replay.chunk])
            for each in range(replay.partitions) if hi > lo else ():
                rows = lo + np.flatnonzero(partition[lo:hi] == each)
                messages += _messages(name, each, frame, arrived, rows, offsets, replay)
        messages.sort(key=lambda each: each.timestamp)
        yield messages
    yield [
        Message(name, each, offsets.get((name, each), 0), int(arrived.max(initial=0)), *heartbeat(FOREVER))
        for name, _, arrived, _ in streams
        for each in range(replay.partitions)
    ]


def _messages(
    topic: str,
    partition: int,
    frame: pl.DataFrame,
    arrived: Ints,
    rows: Ints,
    offsets: dict[tuple[str, int], int],
    replay: Replay,
) -> Iterator[Message]:
    step = 1 if replay.format == "json" else replay.rows
    values = to_json(frame[rows]) if replay.format == "json" and len(rows) else []
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        value = values[start] if values else to_arrow(frame[some])
        offset = offsets.get((topic, partition), 0)
        offsets[topic, partition] = offset + 1
        yield Message(topic, partition, offset, int(arrived[some[-1]]), None, value)


def _known(source: Source, frame: pl.DataFrame) -> Ints:
    """When each row became known; of rows whose stamp is not plausible, when the row before them did."""
    limits = Contract(source, ())
    moment = frame[str(source.time)].to_physical()
    plausible = moment.is_not_null() & (moment >= limits.earliest) & (moment < 2**52)
    return (
        moment.set(~plausible.fill_null(False), None)
        .fill_null(strategy="forward")
        .fill_null(limits.earliest)
        .to_numpy()
    )


class SendChunks(beam.DoFn):
    """Impulse → (number, messages) per chunk."""

    def __init__(self, view: FeatureView, replay: Replay) -> None:
        self.view, self.replay = view, replay

    def process(self, _: bytes) -> Iterator[tuple[int, list[Message]]]:
        yield from enumerate(chunks(self.view, self.replay))
