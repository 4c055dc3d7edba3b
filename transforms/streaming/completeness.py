"""The completeness watermark: the time up to which every row of a source is known, derived from the data instead of the
runner.

A partition that has sent a row of time T promises that no row earlier than T − lateness will follow.  A source is
complete up to the least promise of its partitions.  The features of a spine row at t are computed once every source
that they read is complete up to t.  Runners have watermarks too, but with several Kafka partitions some runners advance
them by one partition alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from schemas.durations import microseconds
from schemas.sources import Source
from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS, FOREVER


@dataclasses.dataclass
class Partition:
    """The state of one partition.

    Args:
        promise: no row before this time (µs) will follow.
        heard: arrival time of its last message, µs.
        ended: whether no row follows.  Rows that follow anyway, such as those of a second replay, reset it.
    """

    promise: int
    heard: int
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class SourceCompleteness:
    """A source's watermark (µs), and the state of its partitions."""

    watermark: int = ALWAYS
    partitions: Mapping[int, Partition] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Head:
        """As commits and checkpoints hold it."""
        partitions = {str(number): [each.promise, each.heard, each.ended] for number, each in self.partitions.items()}
        return {"settled": self.watermark, "partitions": partitions}

    @classmethod
    def of_json(cls, value: Head) -> SourceCompleteness:
        """The state of `to_json`."""
        partitions = {int(number): Partition(*each) for number, each in value["partitions"].items()}
        return cls(value["settled"], partitions)


@dataclasses.dataclass(frozen=True)
class CompletenessRule:
    """The lateness of a source's rows, and the time after which a silent partition is idle (None: never), in µs."""

    lateness: int
    idle: int | None = None

    @classmethod
    def of(cls, source: Source) -> CompletenessRule:
        idle = None if source.idle is None else microseconds(source.idle)
        return cls(microseconds(source.lateness, zero=True), idle)


class Completeness:
    """Completeness by source.  Times are µs since 1970; idleness is measured by the clock that supplies `now`.

    >>> completeness = Completeness({"sales": CompletenessRule(lateness=10)})
    >>> completeness.expect("sales", 0, now=0)
    >>> completeness.expect("sales", 1, now=0)
    >>> completeness.observe("sales", 0, greatest=100, now=1)
    >>> completeness.complete("sales", now=1) == ALWAYS  # partition 1 has not sent anything yet
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
        """From now on, the source is complete only up to the promise of this partition."""
        self.partitions[source].setdefault(partition, Partition(ALWAYS, now))

    def observe(self, source: str, partition: int, greatest: int, now: int) -> None:
        """The partition has sent a row of time `greatest`.  A promise never goes back."""
        self.promise(source, partition, greatest - self.rules[source].lateness, now)

    def promise(self, source: str, partition: int, until: int, now: int) -> None:
        """The partition has promised, by a heartbeat, that no row before `until` follows; FOREVER: no row at all."""
        known = self.partitions[source].setdefault(partition, Partition(ALWAYS, now))
        known.ended = until >= FOREVER
        known.promise = known.promise if known.ended else max(known.promise, until)
        known.heard = max(known.heard, now)

    def complete(self, source: str, now: int) -> int:
        """The time before which every row is known; FOREVER if all partitions are idle or have ended."""
        waiting = self._waited_for(source, now)
        if not self.partitions[source]:
            return ALWAYS
        return min(waiting) if waiting else FOREVER

    def watermark(self, source: str, now: int) -> int:
        """The time before which a row is late.

        It is like `complete`, but it never goes back, and it stays where it is when all partitions are idle or ended.
        """
        waiting = self._waited_for(source, now)
        if waiting:
            self._watermarks[source] = max(self._watermarks[source], min(waiting))
        return self._watermarks[source]

    def known(self, source: str) -> int:
        """The last result of `watermark`."""
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
        """Whether every partition of every source has ended."""
        return all(each and all(one.ended for one in each.values()) for each in self.partitions.values())

    def state(self) -> dict[str, SourceCompleteness]:
        """A copy of the state, by source."""
        return {
            name: SourceCompleteness(
                self._watermarks[name], {number: dataclasses.replace(each) for number, each in partitions.items()}
            )
            for name, partitions in self.partitions.items()
        }

    def restore(self, state: Mapping[str, SourceCompleteness]) -> None:
        """Restores a state; sources that it does not name stay unchanged."""
        for name, each in state.items():
            if name in self.partitions:
                self._watermarks[name] = each.watermark
                self.partitions[name] = {number: dataclasses.replace(one) for number, one in each.partitions.items()}

    def to_json(self) -> Head:
        return {name: each.to_json() for name, each in self.state().items()}

    def load(self, value: Head) -> None:
        """Restores the state that `to_json` returned."""
        self.restore({name: SourceCompleteness.of_json(each) for name, each in value.items()})
