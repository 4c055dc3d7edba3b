"""How far a live features job is: what its commits record, and where a job continues.

The keys in JSON are those of stored commits, of `status.json` and of checkpoints.  Some are older than the names of the
attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS
from transforms.streaming.beginnings import Beginnings
from transforms.streaming.completeness import SourceCompleteness

# Next offset by source and partition.
Offsets = Mapping[str, Mapping[int, int]]
# Number of rows and messages by source and by what became of them.
Counts = Mapping[str, Mapping[str, int]]
# The entry of a recovery point's versions that is the live feature table's; no source has such a name.
_FEATURES = "?answers"


@dataclasses.dataclass(frozen=True)
class CommitRecord:
    """The state of the job after its last turn, as recorded in a commit.

    Args:
        turn: number of the turn.
        last: whether every partition has reported its end.
        next: next offset by source and partition.
        completeness: by source.
        pending: number of spine rows that wait.
        oldest_pending: time of the oldest of them, µs; None if none waits.
        horizon: no window that is still needed begins before this time (µs) minus its length.
        counts: rows and messages by source and by what became of them.
        beginnings: from when on the store has the rows of each source.
    """

    turn: int = 0
    last: bool = False
    next: Offsets = dataclasses.field(default_factory=dict)
    completeness: Mapping[str, SourceCompleteness] = dataclasses.field(default_factory=dict)
    pending: int = 0
    oldest_pending: int | None = None
    horizon: int = ALWAYS
    counts: Counts = dataclasses.field(default_factory=dict)
    beginnings: Beginnings = dataclasses.field(default_factory=Beginnings)

    def next_of(self, source: str) -> Mapping[int, int]:
        """Next offset by partition of one source."""
        return self.next.get(source, {})

    def counts_of(self, source: str) -> Mapping[str, int]:
        return self.counts.get(source, {})

    def watermark_of(self, source: str) -> int:
        """The completeness watermark of a source, µs; ALWAYS if it is not known."""
        return self.completeness.get(source, SourceCompleteness()).watermark

    def to_json(self) -> Head:
        return {
            "turn": self.turn,
            "last": self.last,
            "next": offsets_to_json(self.next),
            "clock": completeness_to_json(self.completeness),
            "pending": self.pending,
            "oldest_pending": self.oldest_pending,
            "horizon": self.horizon,
            "counts": {name: dict(each) for name, each in self.counts.items()},
            "started": self.beginnings.starts,
            "beginnings": self.beginnings.to_json(),
        }

    @classmethod
    def of_json(cls, value: Head) -> CommitRecord:
        """The record of `to_json`.  An earlier version's record may lack entries."""
        return cls(
            turn=int(value.get("turn", 0)),
            last=bool(value.get("last", False)),
            next=offsets_of_json(value.get("next", {})),
            completeness=completeness_of_json(value.get("clock", {})),
            pending=value.get("pending") or 0,
            oldest_pending=value.get("oldest_pending"),
            horizon=value.get("horizon", ALWAYS),
            counts=value.get("counts", {}),
            beginnings=Beginnings.of_json(value.get("beginnings")),
        )


@dataclasses.dataclass(frozen=True)
class RecoveryPoint:
    """Where a job begins.

    Args:
        turn: the last turn that is in some table.
        next: next offset by source and partition.
        completeness: by source, as its table recorded it.
        counts: by source, as its table recorded them.
        versions: of the tables of sources, by source.
        beginnings: from when on the store has the rows of each source.
        features_version: of the live feature table; None if there is none.
    """

    turn: int
    next: Offsets
    completeness: Mapping[str, SourceCompleteness]
    counts: Counts
    versions: Mapping[str, int]
    beginnings: Beginnings = dataclasses.field(default_factory=Beginnings)
    features_version: int | None = None

    def to_json(self) -> Head:
        features = {} if self.features_version is None else {_FEATURES: self.features_version}
        return {
            "turn": self.turn,
            "next": offsets_to_json(self.next),
            "completeness": completeness_to_json(self.completeness),
            "counts": {name: dict(each) for name, each in self.counts.items()},
            "versions": {**self.versions, **features},
            "beginnings": self.beginnings.to_json(),
        }

    @classmethod
    def of_json(cls, value: Head) -> RecoveryPoint:
        versions = dict(value["versions"])
        features_version = versions.pop(_FEATURES, None)
        return cls(
            value["turn"],
            offsets_of_json(value["next"]),
            completeness_of_json(value["completeness"]),
            value["counts"],
            versions,
            Beginnings.of_json(value.get("beginnings")),
            features_version,
        )


def offsets_to_json(offsets: Offsets) -> dict[str, dict[str, int]]:
    """JSON has only text as keys."""
    return {name: {str(number): offset for number, offset in each.items()} for name, each in offsets.items()}


def offsets_of_json(value: Mapping[str, Mapping[str, int]]) -> dict[str, dict[int, int]]:
    """The offsets of `offsets_to_json`."""
    return {name: {int(number): int(offset) for number, offset in each.items()} for name, each in value.items()}


def completeness_to_json(completeness: Mapping[str, SourceCompleteness]) -> Head:
    return {name: each.to_json() for name, each in completeness.items()}


def completeness_of_json(value: Head) -> dict[str, SourceCompleteness]:
    return {name: SourceCompleteness.of_json(each) for name, each in value.items()}
