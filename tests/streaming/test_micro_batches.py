"""Micro-batches of a partition in the order of their offsets, and what is done about a gap among them."""

from __future__ import annotations

import polars as pl
import pytest

from transforms.records.times import ALWAYS
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.streaming.micro_batches import AGAIN, GAP_PATIENCE, SKIPPED, MicroBatch, admissible, no_topic


def micro_batch(first: int, after: int, received: int = 0) -> MicroBatch:
    return MicroBatch(
        "s", 0, first, after, after - first, None, pl.DataFrame(), pl.DataFrame(schema=MESSAGE_DEAD_LETTERS), received
    )


class Topic:
    """Returns which record comes first, and keeps the queries."""

    def __init__(self, *records: int) -> None:
        self.records, self.spine_columns = records, list[int]()

    def __call__(self, source: str, partition: int, offset: int) -> int:
        self.spine_columns.append(offset)
        return min((each for each in self.records if each >= offset), default=ALWAYS)


def test_every_hole_of_a_chain_of_transactions_is_passed_over_at_once() -> None:
    counts: list[tuple[str, str, int]] = []
    inbox = [micro_batch(first, first + 2) for first in (3, 6, 9)]  # a marker behind each transaction
    topic = Topic(3, 4, 6, 7, 9, 10)
    admitted, waiting = admissible(inbox, {"s": {0: 0}}, GAP_PATIENCE, lambda *each: counts.append(each), topic)
    assert [each.first for each in admitted] == [3, 6, 9]
    assert not waiting
    assert topic.spine_columns == [0, 5, 8]
    assert counts == [("s", SKIPPED, 3), ("s", SKIPPED, 1), ("s", SKIPPED, 1)]


def test_a_gap_is_looked_up_after_a_tenth_of_a_second_and_not_before() -> None:
    topic = Topic(5)
    admitted, waiting = admissible([micro_batch(5, 6, received=1)], {"s": {0: 3}}, GAP_PATIENCE, lambda *_: None, topic)
    assert (admitted, len(waiting), topic.spine_columns) == ([], 1, [])
    admitted, _ = admissible(waiting, {"s": {0: 3}}, GAP_PATIENCE + 1, lambda *_: None, topic)
    assert [each.first for each in admitted] == [5]
    assert GAP_PATIENCE <= 100_000


@pytest.mark.parametrize("record", [3, 4])
def test_a_record_that_is_on_its_way_is_waited_for_and_looked_up_now_and_then(record: int) -> None:
    topic = Topic(record, 5)
    now, waiting = GAP_PATIENCE, [micro_batch(5, 6)]
    for _ in range(50):
        admitted, waiting = admissible(waiting, {"s": {0: 3}}, now, lambda *_: None, topic)
        assert not admitted
        now += 200_000
    assert len(topic.spine_columns) == 1 + (49 * 200_000) // AGAIN
    admitted, waiting = admissible([*waiting, micro_batch(3, 5)], {"s": {0: 3}}, now, lambda *_: None, topic)
    assert [each.first for each in admitted] == [3, 5]


def test_a_broker_that_does_not_say_lets_nothing_pass() -> None:
    admitted, waiting = admissible([micro_batch(5, 6)], {"s": {0: 3}}, 10**9, lambda *_: None, Topic())
    assert not admitted
    assert len(waiting) == 1


def test_without_a_broker_a_gap_stays_open_longer() -> None:
    for now, passes in ((AGAIN - 1, False), (AGAIN, True)):
        admitted, waiting = admissible([micro_batch(5, 6)], {"s": {0: 3}}, now, lambda *_: None, no_topic)
        assert (len(admitted), len(waiting)) == (int(passes), int(not passes))
