"""Where a live store's rows begin: source by source, from what time on it has every row, and what of them was handed over as history.

History is what a source's files hold of the time before a job's start.  Its rows are accepted once, before the first turn,
into the source's own table, under partition −1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from schemas.views import FeatureView, lifetime_sources
from transforms.records.times import ALWAYS, FOREVER

# The partition of rows that came from files, before the topic's.
HISTORY = -1
BEFORE_START = "before_start"


@dataclasses.dataclass(frozen=True)
class Beginning:
    """Where a source's rows begin.  Times are µs.

    Args:
        start: files supply the rows before it, the topic the rest; None: nothing tells the two apart.
        since: from here on the store has every row: ALWAYS, of all time; FOREVER, it is not known yet.
        taken: of each time that files were read: their `version`, the `offsets` `[first, next)` of their rows in the order
            of time, and the times `[from, until)` µs that were taken.
    """

    start: int | None = None
    since: int = FOREVER
    taken: tuple[Mapping[str, Any], ...] = ()

    @property
    def next(self) -> int:
        """The next offset of partition −1."""
        return max((int(each["offsets"][1]) for each in self.taken), default=0)


@dataclasses.dataclass(frozen=True)
class Beginnings:
    """Of all sources of a live store.

    Args:
        sources: by name.
        horizon: no question before it is answered, since the windows of earlier ones reach behind what was handed over.
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
        """The time from which on every window of a question has been there from its beginning on: FOREVER where one never will be."""
        ever, result = lifetime_sources(view), ALWAYS
        for name in view.events:
            since = self.of(name).since
            if since > ALWAYS:
                result = FOREVER if name in ever else max(result, min(since + view.reach(name), FOREVER))
        return result

    def to_json(self) -> dict[str, Any]:
        return {
            "horizon": self.horizon,
            "sources": {name: dataclasses.asdict(each) for name, each in self.sources.items()},
        }

    @classmethod
    def of_json(cls, value: Mapping[str, Any] | None) -> Beginnings:
        if not value:
            return cls()
        sources = {
            name: Beginning(each["start"], each["since"], tuple(each["taken"]))
            for name, each in value["sources"].items()
        }
        return cls(sources, value["horizon"])


def of_topic(partitions: Mapping[Any, int]) -> dict[int, int]:
    """Offsets of a topic's partitions alone."""
    return {int(number): int(offset) for number, offset in partitions.items() if int(number) >= 0}
