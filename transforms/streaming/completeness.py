"""Up to when everything is known: completeness told by the data, not by a runner's watermark.

A partition that has shown a row of time T promises that no row earlier than T − lateness will follow.  A source is
complete to the least promise of its partitions; a question at t may be answered when every source it reads is complete
to t.  Runners keep watermarks too, but with several Kafka partitions some of them let one partition speak for all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from schemas.durations import microseconds
from schemas.sources import Source
from transforms.records.times import ALWAYS, FOREVER


@dataclasses.dataclass
class Partition:
    """What one partition has told.  `promise`: no row before it will follow; `heard`: when it last spoke (both µs).

    `ended`: it says that nothing follows at all.  Rows that do follow (of a second replay, after a restart) take that back.
    """

    promise: int
    heard: int
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class CompletenessRule:
    """How late a source's rows may be, and how long a silent partition is waited for (None: for ever), in µs."""

    lateness: int
    idle: int | None = None

    @classmethod
    def of(cls, source: Source) -> CompletenessRule:
        idle = None if source.idle is None else microseconds(source.idle)
        return cls(microseconds(source.lateness, zero=True), idle)


class Completeness:
    """Completeness per source.  Times are µs since 1970; `now` is whatever clock idleness is measured by.

    >>> completeness = Completeness({"sales": CompletenessRule(lateness=10)})
    >>> completeness.expect("sales", 0, now=0)
    >>> completeness.expect("sales", 1, now=0)
    >>> completeness.observe("sales", 0, greatest=100, now=1)
    >>> completeness.complete("sales", now=1) == ALWAYS  # partition 1 has said nothing yet
    True
    >>> completeness.observe("sales", 1, greatest=50, now=2)
    >>> completeness.complete("sales", now=2)
    40
    """

    def __init__(self, rules: Mapping[str, CompletenessRule]) -> None:
        self.rules = dict(rules)
        self.partitions: dict[str, dict[int, Partition]] = {name: {} for name in rules}
        self._watermarks = dict.fromkeys(rules, ALWAYS)

    def expect(self, source: str, partition: int, now: int) -> None:
        """Wait for a partition from now on."""
        self.partitions[source].setdefault(partition, Partition(ALWAYS, now))

    def observe(self, source: str, partition: int, greatest: int, now: int) -> None:
        """The partition has shown a row of time `greatest`.  Earlier ones do not turn the clock back."""
        self.promise(source, partition, greatest - self.rules[source].lateness, now)

    def promise(self, source: str, partition: int, until: int, now: int) -> None:
        """The partition says itself (by a heartbeat) that no row before `until` follows; FOREVER: none at all."""
        known = self.partitions[source].setdefault(partition, Partition(ALWAYS, now))
        known.ended = until >= FOREVER
        known.promise = known.promise if known.ended else max(known.promise, until)
        known.heard = max(known.heard, now)

    def complete(self, source: str, now: int) -> int:
        """Every row with time before this is known.  FOREVER when all partitions are idle or ended: nothing is waited for."""
        waiting = self._waited_for(source, now)
        if not self.partitions[source]:
            return ALWAYS
        return min(waiting) if waiting else FOREVER

    def watermark(self, source: str, now: int) -> int:
        """As `complete`, but it never goes back, and idleness or the end of all does not move it: what is before is late."""
        waiting = self._waited_for(source, now)
        if waiting:
            self._watermarks[source] = max(self._watermarks[source], min(waiting))
        return self._watermarks[source]

    def known(self, source: str) -> int:
        """What `watermark` gave last."""
        return self._watermarks[source]

    def _waited_for(self, source: str, now: int) -> list[int]:
        idle = self.rules[source].idle
        return [
            each.promise
            for each in self.partitions[source].values()
            if not each.ended and (idle is None or now - each.heard < idle)
        ]

    @property
    def ended(self) -> bool:
        """Whether every partition of every source says that nothing follows."""
        return all(each and all(one.ended for one in each.values()) for each in self.partitions.values())

    def to_json(self) -> dict[str, Any]:
        return {
            name: {
                "settled": self._watermarks[name],
                "partitions": {
                    str(number): [each.promise, each.heard, each.ended] for number, each in partitions.items()
                },
            }
            for name, partitions in self.partitions.items()
        }

    def load(self, value: Mapping[str, Any]) -> None:
        """Take over what `to_json` of a clock gave."""
        for name, state in value.items():
            if name in self.partitions:
                self._watermarks[name] = state["settled"]
                self.partitions[name] = {int(number): Partition(*pair) for number, pair in state["partitions"].items()}
