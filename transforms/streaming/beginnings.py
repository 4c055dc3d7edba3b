"""The time from which a live store has the rows of each source, and the rows that were loaded as history.

History is the rows of a source's files from before a job's start.  They are accepted once, before the first turn, into
the source's own table, under partition −1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from schemas.views import FeatureView, lifetime_sources
from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS, FOREVER

# The partition of rows that came from files, before the topic's.
HISTORY_PARTITION = -1
# The name, in counts and dead letters, of rows of a topic that are refused because history may have them too.
BEFORE_START = "before_start"


@dataclasses.dataclass(frozen=True)
class LoadedHistory:
    """Rows that were read from a source's files at one time.

    Args:
        version: version of the source: a Delta table's version, or a digest of its files.
        offsets: the rows have the offsets `[first, next)`, in the order of time.
        since, until: the interval `[since, until)` of times (µs) that was read.
    """

    version: str
    offsets: tuple[int, int]
    since: int
    until: int

    def to_json(self) -> Head:
        return {"version": self.version, "offsets": list(self.offsets), "from": self.since, "until": self.until}

    @classmethod
    def of_json(cls, value: Head) -> LoadedHistory:
        first, after = value["offsets"]
        return cls(value["version"], (int(first), int(after)), value["from"], value["until"])


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The time from which the store has the rows of one source.  Times are µs.

    Args:
        start: earlier rows are read from files, the others from the topic; None: there is no such time.
        since: the time from which the store has every row.  ALWAYS: it has all rows; FOREVER: the time is not known
            yet.
        taken: the loaded history.
    """

    start: int | None = None
    since: int = FOREVER
    taken: tuple[LoadedHistory, ...] = ()

    @property
    def next(self) -> int:
        """The next offset of partition −1."""
        return max((each.offsets[1] for each in self.taken), default=0)

    def to_json(self) -> Head:
        return {"start": self.start, "since": self.since, "taken": [each.to_json() for each in self.taken]}

    @classmethod
    def of_json(cls, value: Head) -> Beginning:
        return cls(value["start"], value["since"], tuple(map(LoadedHistory.of_json, value["taken"])))


@dataclasses.dataclass(frozen=True)
class Beginnings:
    """The times from which a live store has the rows of each of its sources.

    Args:
        sources: the beginnings by name of the source.
        horizon: features are not computed for spine rows before it (µs), since their windows begin before the history
            that was loaded.
    """

    sources: Mapping[str, Beginning] = dataclasses.field(default_factory=dict)
    horizon: int = ALWAYS

    def of(self, source: str) -> Beginning:
        return self.sources.get(source, Beginning())

    def with_source(self, name: str, beginning: Beginning) -> Beginnings:
        return dataclasses.replace(self, sources={**self.sources, name: beginning})

    @property
    def starts(self) -> dict[str, int]:
        return {name: each.start for name, each in self.sources.items() if each.start is not None}

    def filled(self, view: FeatureView) -> int:
        """The time (µs) from which the store has every row of every window of a spine row; FOREVER if there is none."""
        ever, result = lifetime_sources(view), ALWAYS
        for name in view.events:
            since = self.of(name).since
            if since > ALWAYS:
                result = FOREVER if name in ever else max(result, min(since + view.reach(name), FOREVER))
        return result

    def to_json(self) -> Head:
        """The JSON that commits and checkpoints contain."""
        return {"horizon": self.horizon, "sources": {name: each.to_json() for name, each in self.sources.items()}}

    @classmethod
    def of_json(cls, value: Head | None) -> Beginnings:
        """Reads what `to_json` wrote; there are no beginnings if an earlier version did not write them."""
        if not value:
            return cls()
        return cls({name: Beginning.of_json(each) for name, each in value["sources"].items()}, value["horizon"])


def of_topic(partitions: Mapping[int, int] | Mapping[str, int]) -> dict[int, int]:
    """The offsets of a topic's partitions, without those of history.  In JSON, partitions are text."""
    return {int(number): offset for number, offset in partitions.items() if int(number) >= 0}
