"""How far a live features job is: what its commits record, and where a job continues.

The keys in JSON are those of stored commits, of `status.json` and of checkpoints.  Some are older than the names of the
attributes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from schemas.views import FeatureView
from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS
from transforms.streaming.beginnings import Beginnings
from transforms.streaming.completeness import SourceCompleteness
from transforms.streaming.fates import RepeatMemory

# Next offset by source and partition.
Offsets = Mapping[str, Mapping[int, int]]
# Number of rows and messages by source and by what became of them.
CountsBySource = Mapping[str, Mapping[str, int]]


@dataclasses.dataclass(frozen=True)
class Epoch:
    """The place of a launch of a live job among those of its store.

    Args:
        number: greater than the number of every earlier launch; 0: the commit is from before there were epochs.
        launch: distinguishes launches that have the same number because they began with a store without tables.
    """

    number: int = 0
    launch: str = ""

    def to_json(self) -> Head:
        """An entry for a commit's record; empty if there are no epochs."""
        return {"epoch": [self.number, self.launch]} if self.number else {}

    @classmethod
    def of_record(cls, value: Head) -> Epoch:
        """The epoch in a commit's record."""
        number, launch = value.get("epoch", (0, ""))
        return cls(int(number), str(launch))


# The epoch of jobs from before there were epochs.
NO_EPOCH = Epoch()


def version_name(view: FeatureView) -> str:
    """The name of a version of a view in records: `view@fingerprint`."""
    return f"{view.name}@{view.fingerprint}"


@dataclasses.dataclass(frozen=True)
class ViewRecord:
    """What a commit records of one view.

    Args:
        pending: number of pending spine rows.
        oldest_pending: time of the oldest of them, µs; None if none is pending.
        counts: number of rows by source and by what became of them for this view.
    """

    pending: int = 0
    oldest_pending: int | None = None
    counts: CountsBySource = dataclasses.field(default_factory=dict)

    def to_json(self) -> Head:
        counts = {name: dict(each) for name, each in self.counts.items()}
        return {"pending": self.pending, "oldest_pending": self.oldest_pending, "counts": counts}

    @classmethod
    def of_json(cls, value: Head) -> ViewRecord:
        return cls(value["pending"], value["oldest_pending"], value["counts"])


@dataclasses.dataclass(frozen=True)
class CommitRecord:
    """The state of the job after its last turn, as recorded in a commit.

    Args:
        turn: number of the turn.
        last: whether every partition has reported its end.
        next: next offset by source and partition.
        completeness: the state of completeness, by source.
        pending: number of pending spine rows.
        oldest_pending: time of the oldest of them, µs; None if none is pending.
        horizon: no window that is still needed begins before this time (µs) minus its length.
        counts: number of rows and messages by source and by what became of them.
        beginnings: the times from which the store has the rows of each source.
        memory: for how long repeats are recognised, by source with `unique`.
        epoch: epoch of the launch.
        views: what is recorded of each view, by `version_name`; empty in the records of earlier versions.
    """

    turn: int = 0
    last: bool = False
    next: Offsets = dataclasses.field(default_factory=dict)
    completeness: Mapping[str, SourceCompleteness] = dataclasses.field(default_factory=dict)
    pending: int = 0
    oldest_pending: int | None = None
    horizon: int = ALWAYS
    counts: CountsBySource = dataclasses.field(default_factory=dict)
    beginnings: Beginnings = dataclasses.field(default_factory=Beginnings)
    memory: Mapping[str, RepeatMemory] = dataclasses.field(default_factory=dict)
    epoch: Epoch = NO_EPOCH
    views: Mapping[str, ViewRecord] = dataclasses.field(default_factory=dict)

    def of_view(self, view: FeatureView) -> ViewRecord:
        """What is recorded of a view; an earlier version recorded it of its only one."""
        if self.views:
            return self.views.get(version_name(view), ViewRecord())
        return ViewRecord(self.pending, self.oldest_pending, self.counts)

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
            **({"views": {name: each.to_json() for name, each in self.views.items()}} if self.views else {}),
            **memory_to_json(self.memory),
            **self.epoch.to_json(),
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
            memory=memory_of_json(value.get("memory", {})),
            epoch=Epoch.of_record(value),
            views={name: ViewRecord.of_json(each) for name, each in value.get("views", {}).items()},
        )


@dataclasses.dataclass(frozen=True)
class RecoveryPoint:
    """Where a job begins.

    Args:
        turn: the last turn that is in some table.
        next: next offset by source and partition.
        completeness: the state of completeness by source, as its table recorded it.
        counts: counts by source, as its table recorded them.
        versions: versions of the tables of sources, by source.
        beginnings: the times from which the store has the rows of each source.
        features: versions of the live feature tables, by `version_name` of their views.
        memory: for how long repeats are recognised, by source, as its table recorded it.
        views: counts by source of each view, as the source's table recorded them, by `version_name`.
    """

    turn: int
    next: Offsets
    completeness: Mapping[str, SourceCompleteness]
    counts: CountsBySource
    versions: Mapping[str, int]
    beginnings: Beginnings = dataclasses.field(default_factory=Beginnings)
    features: Mapping[str, int] = dataclasses.field(default_factory=dict)
    memory: Mapping[str, RepeatMemory] = dataclasses.field(default_factory=dict)
    views: Mapping[str, CountsBySource] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Head:
        return {
            "turn": self.turn,
            "next": offsets_to_json(self.next),
            "completeness": completeness_to_json(self.completeness),
            "counts": {name: dict(each) for name, each in self.counts.items()},
            "versions": dict(self.versions),
            "features": dict(self.features),
            "views": {name: {source: dict(each) for source, each in of.items()} for name, of in self.views.items()},
            "beginnings": self.beginnings.to_json(),
            **memory_to_json(self.memory),
        }

    @classmethod
    def of_json(cls, value: Head) -> RecoveryPoint:
        return cls(
            value["turn"],
            offsets_of_json(value["next"]),
            completeness_of_json(value["completeness"]),
            value["counts"],
            value["versions"],
            Beginnings.of_json(value.get("beginnings")),
            value.get("features", {}),
            memory_of_json(value.get("memory", {})),
            value.get("views", {}),
        )


def offsets_to_json(offsets: Offsets) -> dict[str, dict[str, int]]:
    """The offsets as JSON, whose keys are text."""
    return {name: {str(number): offset for number, offset in each.items()} for name, each in offsets.items()}


def offsets_of_json(value: Mapping[str, Mapping[str, int]]) -> dict[str, dict[int, int]]:
    """The offsets of `offsets_to_json`."""
    return {name: {int(number): int(offset) for number, offset in each.items()} for name, each in value.items()}


def completeness_to_json(completeness: Mapping[str, SourceCompleteness]) -> Head:
    return {name: each.to_json() for name, each in completeness.items()}


def completeness_of_json(value: Head) -> dict[str, SourceCompleteness]:
    return {name: SourceCompleteness.of_json(each) for name, each in value.items()}


def memory_to_json(memory: Mapping[str, RepeatMemory]) -> Head:
    """An entry with the memory of sources; empty if no source has `unique`."""
    return {"memory": {name: each.to_json() for name, each in memory.items()}} if memory else {}


def memory_of_json(value: Head) -> dict[str, RepeatMemory]:
    return {name: RepeatMemory.of_json(each) for name, each in value.items()}
