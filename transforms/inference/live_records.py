"""Typed records that the steps of live inference send each other, and that their state and commits contain.

Each record is serialised in one place, which is here.  The names of the serialised keys are those of stored
state and of `status.json`, so they differ from the attributes in a few places.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

import numpy as np
import polars as pl
import pyarrow as pa

from transforms.records.arrays import Floats
from transforms.records.frame_packets import Head, pack, unpack
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS

# Keys of the metadata of a batch's schema.
_ORIGIN, _SERVING = b"millrace.told", b"millrace.serving"


@dataclasses.dataclass(frozen=True)
class MessageRange:
    """Messages `[first, next)` of one partition of the features topic.

    Args:
        source: the topic's name without the prefix.
        partition: its number.
        first: the first offset.
        next: the offset after the last.
        messages: number of messages.
        heartbeat: the time (µs) of a heartbeat that no message follows, or None.
    """

    source: str
    partition: int
    first: int
    next: int
    messages: int
    heartbeat: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class BatchOrigin:
    """The messages that a batch of feature rows was decoded from.

    Args:
        ranges: the messages, by partition.
        received: when they were decoded, µs since 1970.
        dead_letters: rejected rows and messages, with the columns `MESSAGE_DEAD_LETTERS`.
    """

    ranges: tuple[MessageRange, ...] = ()
    received: int = 0
    dead_letters: pl.DataFrame = dataclasses.field(default_factory=lambda: pl.DataFrame(schema=MESSAGE_DEAD_LETTERS))

    def to_metadata(self) -> dict[bytes, bytes]:
        """Metadata for the schema of the batch."""
        frames = {"letters": self.dead_letters} if len(self.dead_letters) else {}
        head = {"parts": [dataclasses.astuple(each) for each in self.ranges], "came": self.received}
        return {_ORIGIN: pack(head, frames)}

    @classmethod
    def of(cls, rows: pa.RecordBatch) -> BatchOrigin:
        """The origin in a batch's metadata; an empty one if there is none."""
        value = (rows.schema.metadata or {}).get(_ORIGIN)
        if value is None:
            return cls()
        head, frames = unpack(value)
        ranges = tuple(MessageRange(*each) for each in head["parts"])
        dead_letters = frames.get("letters", pl.DataFrame(schema=MESSAGE_DEAD_LETTERS))
        return cls(ranges, head["came"], dead_letters)


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A version that could not serve: when it was refused (µs since 1970), and the error."""

    at: int
    version: str
    rule: str
    value: str
    fix: str

    @property
    def key(self) -> str:
        return f"{self.version} {self.at}"


@dataclasses.dataclass(frozen=True)
class Swap:
    """One version replaced by another in a worker, at a time in µs since 1970."""

    at: int
    before: str
    after: str


@dataclasses.dataclass(frozen=True)
class ServingModel:
    """The model that scored a batch.

    Args:
        worker: the process, as host/pid.
        version: the model's version.
        since: the time from which it serves in that process, µs since 1970.
        refused: the latest refusals in that process.
    """

    worker: str
    version: str
    since: int
    refused: tuple[Refusal, ...] = ()

    def to_json(self) -> dict[str, object]:
        return dataclasses.asdict(self)

    @classmethod
    def of_json(cls, value: Head) -> ServingModel:
        refused = tuple(Refusal(**each) for each in value["refused"])
        return cls(value["worker"], value["version"], value["since"], refused)

    def to_metadata(self) -> dict[bytes, bytes]:
        """Metadata for the schema of the batch of predictions."""
        return {_SERVING: json.dumps(self.to_json()).encode()}

    @classmethod
    def of(cls, predictions: pa.RecordBatch) -> ServingModel | None:
        """The model in a batch's metadata, or None."""
        value = (predictions.schema.metadata or {}).get(_SERVING)
        return None if value is None else cls.of_json(json.loads(value))


@dataclasses.dataclass(frozen=True)
class ServingPeriod:
    """A version that serves in one worker from a certain time on.

    Args:
        worker, version, since: see `ServingModel`.
        first_offsets: offset of the first message that it scored, by partition.
    """

    worker: str
    version: str
    since: int
    first_offsets: Mapping[int, int] = dataclasses.field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.worker} {self.since}"

    def with_message(self, partition: int, offset: int) -> ServingPeriod:
        first = min(self.first_offsets.get(partition, offset), offset)
        return dataclasses.replace(self, first_offsets={**self.first_offsets, partition: first})

    def to_json(self) -> dict[str, object]:
        offsets = _texts(self.first_offsets)
        return {"worker": self.worker, "version": self.version, "since": self.since, "offsets": offsets}

    @classmethod
    def of_json(cls, value: Head) -> ServingPeriod:
        return cls(value["worker"], value["version"], value["since"], _integers(value["offsets"]))


@dataclasses.dataclass(frozen=True)
class ScoringState:
    """The progress of a live inference job: what a commit records, and what is checkpointed between commits.

    Args:
        source: name of the features topic in offsets.
        next: next offset by partition.
        turn: number of the last commit.
        ended: by partition, the offset after the message that marks its end.
        rows: counts of rows by what became of them.
        by_version: counts of predictions by model version.
        periods: which version served where, by `ServingPeriod.key`; not part of a commit.
        refused: refused versions, by `Refusal.key`; not part of a commit.
        committed_at: time of the last commit, µs since 1970; None if this job has made none.  Not part of a commit.
    """

    source: str
    next: Mapping[int, int]
    turn: int = 0
    ended: Mapping[int, int] = dataclasses.field(default_factory=dict)
    rows: Mapping[str, int] = dataclasses.field(default_factory=dict)
    by_version: Mapping[str, int] = dataclasses.field(default_factory=dict)
    periods: Mapping[str, ServingPeriod] = dataclasses.field(default_factory=dict)
    refused: Mapping[str, Refusal] = dataclasses.field(default_factory=dict)
    committed_at: int | None = None

    @property
    def at_end(self) -> bool:
        """Whether every partition has ended, and no message follows any of the ends."""
        return bool(self.next) and all(self.ended.get(number) == offset for number, offset in self.next.items())

    def commit_record(self) -> dict[str, object]:
        """The part that a commit records."""
        return {
            "turn": self.turn,
            "next": {self.source: _texts(self.next)},
            "ended": _texts(self.ended),
            "rows": dict(self.rows),
            "by_version": dict(self.by_version),
        }

    def to_json(self) -> dict[str, object]:
        return {
            **self.commit_record(),
            "reigns": {key: each.to_json() for key, each in self.periods.items()},
            "refused": {key: dataclasses.asdict(each) for key, each in self.refused.items()},
            "since": self.committed_at,
        }

    @classmethod
    def of_json(cls, source: str, value: Head) -> ScoringState:
        """Reads the state from `to_json`, or from a commit's record."""
        return cls(
            source=source,
            next=next_offsets(value, source),
            turn=int(value.get("turn", 0)),
            ended=_integers(value.get("ended", {})),
            rows=value.get("rows", {}),
            by_version=value.get("by_version", {}),
            periods={key: ServingPeriod.of_json(each) for key, each in value.get("reigns", {}).items()},
            refused={key: Refusal(**each) for key, each in value.get("refused", {}).items()},
            committed_at=value.get("since"),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class PredictionsStatus:
    """A commit, for `status.json`.

    Args:
        record: what the commit recorded.
        last: whether every partition has ended.
        at: time of the commit, µs since 1970.
        periods: which version served where, by worker and time.
        refused: refused versions.
        lag: seconds from a message's arrival to its score, for each row.
    """

    record: Mapping[str, object]
    last: bool
    at: int
    periods: tuple[ServingPeriod, ...]
    refused: tuple[Refusal, ...]
    lag: Floats

    def to_json(self) -> dict[str, object]:
        quantiles = np.quantile(self.lag, (0.5, 0.99, 1)).round(4).tolist() if len(self.lag) else []
        return {
            **self.record,
            "last": self.last,
            "at": self.at,
            "swaps": self._swaps(),
            "refused": [dataclasses.asdict(each) for each in self.refused],
            "workers": {each.worker: {"version": each.version, "since": each.since} for each in self.periods},
            "lag_s": {"rows": len(self.lag), **dict(zip(("median", "p99", "max"), quantiles))},
        }

    def _swaps(self) -> list[dict[str, object]]:
        pairs = [
            (before, after) for before, after in zip(self.periods, self.periods[1:]) if before.worker == after.worker
        ]
        return [
            {
                "at": after.since,
                "from": before.version,
                "to": after.version,
                "offsets": _texts(after.first_offsets),
                "worker": after.worker,
            }
            for before, after in sorted(pairs, key=lambda pair: pair[1].since)
        ]


def next_offsets(record: Head, source: str) -> dict[int, int]:
    """Next offset by partition, of a commit's record, a checkpoint or a status."""
    return _integers(record["next"][source])


def _texts(offsets: Mapping[int, int]) -> dict[str, int]:
    return {str(number): offset for number, offset in offsets.items()}


def _integers(offsets: Head) -> dict[int, int]:
    return {int(number): int(offset) for number, offset in offsets.items()}
