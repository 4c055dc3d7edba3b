"""Files as a stream: the messages that producers would have sent, in order of arrival, in one Python process.

It needs no broker and no Java; the steps after the messages are those of a live job.  Rows arrive when they became
known, or after a seeded random delay.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence

import apache_beam as beam
import numpy as np
import polars as pl

from schemas.live import joined_sources
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.arrays import Ints
from transforms.records.row_hashing import combine_hashes, hash_column, hash_columns, mix_bits
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.contracts import Contract
from transforms.sources.conversions import without_problems
from transforms.sources.inventory import survey_files
from transforms.sources.listing import require_unchanged
from transforms.sources.reader import read_raw
from transforms.streaming.messages import Message, heartbeat, to_arrow, to_json
from transforms.streaming.view_contracts import twice_in


@dataclasses.dataclass(frozen=True)
class Replay:
    """How files become messages.

    Args:
        root: the folder of the sources' files.
        start, end: rows that were known in `[start, end)` µs are sent.
        partitions: number of partitions of every topic.
        disorder: rows arrive up to this much (µs) after they became known; the delay is uniform.
        seed: the seed of the delays.
        chunk: messages that arrive within this time (µs) are received together, as from one poll of a broker.
        rows: the most rows of a message.
        format: "arrow" or "json" (one row per message).
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


def chunks(views: Sequence[FeatureView], replay: Replay) -> Iterator[list[Message]]:
    """The messages, chunk by chunk; the last chunk has the heartbeats that end each partition."""
    yield from chunks_of(views, _read(views, replay), replay)


def stream_digests(views: Sequence[FeatureView], replay: Replay) -> dict[str, dict[str, str]]:
    """By source and column, a digest of what the messages of a replay hold: which value comes at which offset."""
    topics = _topics(views, _read(views, replay), replay)
    return {topic.name: {column: topic.digest([column]) for column in topic.frame.columns} for topic in topics}


def _read(views: Sequence[FeatureView], replay: Replay) -> dict[str, pl.DataFrame]:
    """The rows of each source."""
    found = {
        name: survey_files(replay.root, Contract(source, tuple(source.schema), twice=twice_in(views, name)))
        for name, source in joined_sources(views).items()
    }
    # A row that cannot be read from its file cannot be sent either.
    frames = {name: without_problems(read_raw(each.contract, each.slices)) for name, each in found.items()}
    return require_unchanged(frames, [listing for each in found.values() for listing in each.listings])


def _topics(views: Sequence[FeatureView], frames: Mapping[str, pl.DataFrame], replay: Replay) -> list[_Topic]:
    random, sources = np.random.default_rng(replay.seed), joined_sources(views)
    return [_Topic.of(sources[name], frame, replay, random) for name, frame in frames.items()]


def chunks_of(
    views: Sequence[FeatureView], frames: Mapping[str, pl.DataFrame], replay: Replay
) -> Iterator[list[Message]]:
    """As `chunks`, from rows in memory."""
    topics = _topics(views, frames, replay)
    numbers = np.unique(np.concatenate([topic.arrived // replay.chunk for topic in topics]))
    for number in numbers.tolist():
        start = number * replay.chunk
        messages = [message for topic in topics for message in topic.messages(start, start + replay.chunk, replay)]
        messages.sort(key=lambda each: each.timestamp)
        yield messages
    yield [topic.end(partition) for topic in topics for partition in range(replay.partitions)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Topic:
    """The rows of one source in order of arrival.

    Args:
        name: name of the topic, which is that of the source.
        frame: the rows.
        arrived: when each row arrives, µs.
        partition: partition of each row.
        offsets: the next offset by partition.
    """

    name: str
    frame: pl.DataFrame
    arrived: Ints
    partition: Ints
    offsets: dict[int, int] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, frame: pl.DataFrame, replay: Replay, random: np.random.Generator) -> _Topic:
        known = _known(source, frame)
        inside = (known >= replay.start) & (known < replay.end)
        frame, known = frame.filter(pl.Series(inside)), known[inside]
        arrived = known + (random.integers(0, replay.disorder, len(known), endpoint=True) if replay.disorder else 0)
        first = next(iter(source.columns))
        keyed = frame[first] if not frame[first].dtype.is_float() else pl.Series(np.arange(len(frame)))
        partition = (
            (mix_bits(hash_column(keyed)) % np.uint64(replay.partitions)).astype(np.int64) if len(frame) else known
        )
        order = np.argsort(arrived, kind="stable")
        return cls(source.name, frame[order], arrived[order], partition[order])

    def messages(self, start: int, end: int, replay: Replay) -> Iterator[Message]:
        """The messages of rows that arrive in `[start, end)` µs, partition by partition."""
        low, high = np.searchsorted(self.arrived, [start, end])
        for partition in range(replay.partitions) if high > low else ():
            rows = low + np.flatnonzero(self.partition[low:high] == partition)
            yield from self._messages(partition, rows, replay)

    def _messages(self, partition: int, rows: Ints, replay: Replay) -> Iterator[Message]:
        step = 1 if replay.format == "json" else replay.rows
        values = to_json(self.frame[rows]) if replay.format == "json" and len(rows) else []
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            value = values[start] if values else to_arrow(self.frame[some])
            offset = self.offsets.get(partition, 0)
            self.offsets[partition] = offset + 1
            yield Message(self.name, partition, offset, int(self.arrived[some[-1]]), None, value)

    def digest(self, columns: Sequence[str]) -> str:
        """A digest of the time, of some columns and of the partition of each row, in order of arrival."""
        hashes = hash_columns(self.frame, sorted(columns)).values()
        rows = combine_hashes([*hashes, self.arrived.view(np.uint64), self.partition.view(np.uint64)])
        return hashlib.sha256(rows.tobytes() if len(self.arrived) else b"").hexdigest()[:16]

    def end(self, partition: int) -> Message:
        """The heartbeat after which nothing follows on a partition."""
        arrived = int(self.arrived.max(initial=0))
        return Message(self.name, partition, self.offsets.get(partition, 0), arrived, *heartbeat(FOREVER))


def _known(source: Source, frame: pl.DataFrame) -> Ints:
    """When each row became known (µs); a row with an implausible time became known with the row before it."""
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

    def __init__(self, views: Sequence[FeatureView], replay: Replay) -> None:
        self.views, self.replay = tuple(views), replay

    def process(self, _: bytes) -> Iterator[tuple[int, list[Message]]]:
        yield from enumerate(chunks(self.views, self.replay))
