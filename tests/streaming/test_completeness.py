"""Completeness against its definition, over random histories of partitions."""

from __future__ import annotations

import json

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from schemas import Source
from transforms.records.times import ALWAYS, FOREVER
from transforms.streaming.completeness import Completeness, CompletenessRule

times = st.integers(-50, 200)
# (what, partition, time, µs passed since the step before)
steps = st.lists(
    st.tuples(st.sampled_from(["observe", "promise", "expect"]), st.integers(0, 2), times, st.integers(0, 40)),
    max_size=40,
)


class Slow:
    """What completeness should be, from everything that was observed."""

    def __init__(self, lateness: int, idle: int | None) -> None:
        self.lateness, self.idle = lateness, idle
        self.reported: dict[int, list[tuple[int, int]]] = {}

    def step(self, what: str, partition: int, time: int, now: int) -> None:
        known = self.reported.setdefault(partition, [(ALWAYS, now)])
        if what != "expect":
            known.append((time - self.lateness if what == "observe" else time, now))

    def complete(self, now: int) -> int:
        waited = {
            p: reported
            for p, reported in self.reported.items()
            if self.idle is None or now - max(heard for _, heard in reported) < self.idle
        }
        if not self.reported:
            return ALWAYS
        return min((max(until for until, _ in reported) for reported in waited.values()), default=FOREVER)


@given(steps, st.integers(0, 20), st.none() | st.integers(1, 60))
def test_complete_is_the_least_promise_of_those_waited_for(
    steps: list[tuple[str, int, int, int]], lateness: int, idle: int | None
) -> None:
    completeness, slow, now, watermark = (
        Completeness({"s": CompletenessRule(lateness, idle)}),
        Slow(lateness, idle),
        0,
        ALWAYS,
    )
    for what, partition, time, passed in steps:
        now += passed
        if what == "expect":
            completeness.expect("s", partition, now)
        else:
            getattr(completeness, what)("s", partition, time, now)
        slow.step(what, partition, time, now)
        assert completeness.complete("s", now) == slow.complete(now)
        if slow.complete(now) < FOREVER:
            watermark = max(watermark, slow.complete(now))
        assert completeness.watermark("s", now) == watermark


@given(steps, st.integers(0, 20))
def test_what_was_promised_holds(steps: list[tuple[str, int, int, int]], lateness: int) -> None:
    """Rows that keep their source's lateness are never before a time that was complete."""
    completeness, now = Completeness({"s": CompletenessRule(lateness)}), 0
    greatest: dict[int, int] = {}
    for partition in range(3):
        completeness.expect("s", partition, 0)
    for _, partition, time, _ in steps:
        row = max(time, greatest.get(partition, ALWAYS) - lateness)  # a row that is not too late
        assert row >= completeness.complete("s", now)
        greatest[partition] = max(greatest.get(partition, ALWAYS), row)
        completeness.observe("s", partition, row, now)


@given(steps, st.none() | st.integers(1, 60))
def test_completeness_survives_being_stored(steps: list[tuple[str, int, int, int]], idle: int | None) -> None:
    completeness, now = Completeness({"s": CompletenessRule(5, idle)}), 0
    for what, partition, time, passed in steps:
        now += passed
        if what == "expect":
            completeness.expect("s", partition, now)
        else:
            getattr(completeness, what)("s", partition, time, now)
        completeness.watermark("s", now)
        other = Completeness({"s": CompletenessRule(5, idle)})
        other.load(json.loads(json.dumps(completeness.to_json())))
        assert (other.complete("s", now), other.watermark("s", now)) == (
            completeness.complete("s", now),
            completeness.watermark("s", now),
        )
        completeness = other


def test_one_partition_ahead_does_not_speak_for_the_others() -> None:
    completeness = Completeness({"s": CompletenessRule(0)})
    completeness.observe("s", 0, 1_000_000, 0)
    completeness.observe("s", 1, 10, 0)
    assert completeness.complete("s", 0) == 10


def test_an_idle_partition_is_waited_for_as_long_as_declared() -> None:
    completeness = Completeness({"s": CompletenessRule.of(Source("s", {"k": pl.Int64}, time="t", idle="10us"))})
    completeness.observe("s", 0, 100, 0)
    completeness.expect("s", 1, 0)
    assert completeness.complete("s", 9) == ALWAYS
    completeness.observe("s", 0, 110, 9)
    assert completeness.complete("s", 10) == 110
    assert completeness.complete("s", 19) == FOREVER
    completeness.observe("s", 1, 50, 20)  # it sends again, and holds the watermark again
    assert completeness.complete("s", 20) == 50
    assert completeness.watermark("s", 20) >= 50
