"""Which accepted rows count: the journal as rows come, recovery and parity from the rows alone, and a loop over all
pairs of rows agree, whatever the order of arrival, and across restarts that remember longer."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import FeatureView, Source, Trailing
from transforms.records.times import ALWAYS
from transforms.sources.repeats import NEVER_REPEATED
from transforms.streaming.beginnings import HISTORY_PARTITION
from transforms.streaming.fates import (
    RepeatMemory,
    WindowReach,
    known_order,
    repeated_from,
)
from transforms.streaming.repeats import RepeatFinder
from transforms.streaming.row_origin import RID, row_identity

SECOND = 1_000_000
START = 10**15
asked = Source("asked", time="t", columns={"id": pl.Int64})
once = Source("once", time="at", unique="u", columns={"u": pl.Int64, "id": pl.Int64, "v": pl.Float64})


def view_of(*windows: str) -> FeatureView:
    return FeatureView("view", asked, "id", [Trailing(once, by="id", over=windows, stats={"v": "sum"})])


BOUNDED, LIFETIME = view_of("2s"), view_of("2s", "all")


@dataclasses.dataclass
class Row:
    """A row: its time in seconds, its value, its origin, and what the job stores of it."""

    at: int
    u: int
    v: float
    partition: int
    offset: int
    shown: int
    span: int
    counted: bool = True
    alone: bool = False

    @property
    def order(self) -> tuple[float, ...]:
        return self.at, self.u, self.v, self.partition, self.offset


def frame(rows: list[Row]) -> pl.DataFrame:
    columns = {
        "at": pl.Series([START + row.at * SECOND for row in rows], dtype=pl.Int64).cast(pl.Datetime("us", "UTC")),
        "u": pl.Series([row.u for row in rows], dtype=pl.Int64),
        "id": pl.Series([0 for _ in rows], dtype=pl.Int64),
        "v": pl.Series([row.v for row in rows], dtype=pl.Float64),
        "__partition": pl.Series([row.partition for row in rows], dtype=pl.Int32),
        "__offset": pl.Series([row.offset for row in rows], dtype=pl.Int64),
        "__place": pl.Series([0 for _ in rows], dtype=pl.Int32),
        "__counted": pl.Series([row.counted for row in rows], dtype=pl.Boolean),
        "__uncompared": pl.Series([row.alone for row in rows], dtype=pl.Boolean),
    }
    made = pl.DataFrame(columns)
    return made.with_columns(row_identity(made))


def counting(rows: list[Row], lengths: list[int]) -> set[tuple[int, int]]:
    """The rows that count if there are no others, by comparing all pairs."""

    def repeats(row: Row, other: Row) -> bool:
        if other is row or other.u != row.u or other.order > row.order or row.alone or other.alone:
            return False
        if row.partition == other.partition == HISTORY_PARTITION:
            return False
        return (row.at - other.at) * SECOND <= lengths[max(row.span, other.span)]

    return {
        (row.partition, row.offset)
        for row in rows
        if (row.counted or row.partition != HISTORY_PARTITION) and not any(repeats(row, other) for other in rows)
    }


class Job:
    """The part of a journal that decides about repeats, with a horizon that follows the rows."""

    def __init__(self, view: FeatureView, keep: int) -> None:
        self.view, self.keep, self.horizon = view, keep, ALWAYS
        self.rows: list[Row] = []
        self.next = {0: 0, 1: 0}
        self.memory = RepeatMemory()
        self.lengths: list[int] = []
        self.counted: set[int] = set()
        self.start(WindowReach.of([view], "once").least_memory(keep))

    def start(self, length: int) -> None:
        """A job that begins, and remembers so long at least."""
        self.memory = self.memory.grown(length, self.next)
        self.lengths = [each for each, _ in self.memory.spans]
        self.repeats = RepeatFinder(self.view, "once", self.memory.length, WindowReach.of([self.view], "once"))
        if not self.rows:
            return
        rows = frame(self.rows)
        none, never = np.zeros(len(rows), np.int64), np.full(len(rows), NEVER_REPEATED, np.int64)
        counts = repeated_from(known_order(self.view, "once"), self.memory, rows, none, never) == NEVER_REPEATED
        low = (
            self.horizon - WindowReach.of([self.view], "once").remembered(self.memory.length)
            if self.horizon > ALWAYS
            else ALWAYS
        )
        kept = (rows["at"].to_physical() >= low) & ~rows["__uncompared"]
        self.repeats.restore(rows.filter(kept), pl.Series(counts).filter(kept))
        self.counted = set(rows[RID].filter(pl.Series(counts)).to_list())

    def take(self, values: list[tuple[int, int, int, int]], turn: int) -> None:
        new = []
        for at, u, v, partition in values:
            new.append(Row(at, u, v / 2, partition, self.next[partition], turn, len(self.lengths) - 1))
            self.next[partition] += 1
        rows = frame(new)
        distinct = self.repeats.deduplicate(rows.drop("__counted", "__uncompared"), self.horizon)
        mine, alone = set(distinct.counted[RID].to_list()), set(distinct.uncompared.to_list())
        gone = set(distinct.replaced["__instead"].to_list())
        assert gone <= self.counted
        assert distinct.repeated == len(new) - len(mine) + len(gone)
        for row, rid in zip(new, rows[RID].to_list(), strict=True):
            row.counted, row.alone = rid in mine, rid in alone
        self.counted = self.counted - gone | mine
        self.rows += new

    def advance(self, to: int) -> None:
        self.horizon = max(self.horizon, START + to * SECOND - self.keep)
        self.repeats.store.evict(self.horizon - WindowReach.of([self.view], "once").remembered(self.repeats.memory))

    def check(self, turn: int) -> None:
        rows = frame(self.rows)
        shown = np.array([row.shown for row in self.rows], np.int64)
        never = np.full(len(rows), NEVER_REPEATED, np.int64)
        gone = repeated_from(known_order(self.view, "once"), self.memory, rows, shown, never)
        for cut in range(turn + 1):
            known = [row for row in self.rows if row.shown <= cut]
            expected = counting(known, self.lengths)
            by_function = {
                (row.partition, row.offset)
                for row, until in zip(self.rows, gone, strict=True)
                if row.shown <= cut < until
            }
            assert by_function == expected
        # No bounded window of a later spine row reaches further back; a lifetime window reaches all rows.
        low = ALWAYS if self.view is LIFETIME else self.horizon - self.view.reach("once")
        reached = [START + row.at * SECOND >= low for row in self.rows]
        live = {
            (row.partition, row.offset)
            for row, rid, near in zip(self.rows, rows[RID].to_list(), reached, strict=True)
            if near and rid in self.counted
        }
        assert live == expected & {
            (row.partition, row.offset) for row, near in zip(self.rows, reached, strict=True) if near
        }


row_values = st.tuples(st.integers(0, 20), st.integers(0, 2), st.integers(0, 2), st.integers(0, 1))
turns = st.lists(
    st.tuples(
        st.lists(row_values, min_size=1, max_size=6),
        st.one_of(st.none(), st.integers(0, 24)),  # the watermark moves to this time
        st.one_of(st.none(), st.sampled_from([0, 3, 9])),  # a restart, that remembers at least so many seconds
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=250, deadline=None)
@given(
    view=st.sampled_from([BOUNDED, LIFETIME]),
    keep=st.sampled_from([0, 1, 4]),
    history=st.lists(st.tuples(st.integers(-9, 4), st.integers(0, 2), st.booleans()), max_size=5),
    turns=turns,
)
def test_the_journal_recovery_and_parity_agree(
    view: FeatureView,
    keep: int,
    history: list[tuple[int, int, bool]],
    turns: list[tuple[list[tuple[int, int, int, int]], int | None, int | None]],
) -> None:
    job = Job(view, keep * SECOND)
    job.rows = [Row(at, u, 0.5, HISTORY_PARTITION, n, 0, 0, counted) for n, (at, u, counted) in enumerate(history)]
    job.next[HISTORY_PARTITION] = len(history)
    job.start(0)
    for turn, (rows, watermark, restart) in enumerate(turns, 1):
        job.take(rows, turn)
        job.check(turn)
        if watermark is not None:
            job.advance(watermark)
        if restart is not None:
            job.start(restart * SECOND)
            job.check(turn)


def test_a_row_that_is_older_than_what_is_compared_counts_and_replaces_none() -> None:
    job = Job(LIFETIME, 0)
    job.take([(10, 1, 1, 0)], 0)
    job.advance(16)
    bound = 16 - WindowReach.of([LIFETIME], "once").comparison_span(job.memory.length) // SECOND
    assert bound == 10
    job.take([(9, 1, 1, 0), (10, 1, 0, 0)], 1)
    assert [(row.at, row.counted, row.alone) for row in job.rows] == [
        (10, True, False),
        (9, True, True),
        (10, True, False),
    ]
    assert len(job.counted) == 2  # the smaller of the two at 10, and the old one
    job.check(1)


@pytest.mark.parametrize(("view", "seconds"), [(BOUNDED, 6), (LIFETIME, 10)])
def test_how_far_back_repeats_are_remembered(view: FeatureView, seconds: int) -> None:
    assert WindowReach.of([view], "once").least_memory(SECOND) == 4 * SECOND
    assert WindowReach.of([view], "once").remembered(4 * SECOND) == seconds * SECOND
    assert WindowReach.of([view_of("all")], "once").least_memory(SECOND) == SECOND


def test_memory_survives_json_and_only_grows() -> None:
    memory = RepeatMemory().grown(5, {0: 9}).grown(4, {0: 11}).grown(7, {0: 20, HISTORY_PARTITION: 3})
    assert memory.spans == ((5, {}), (7, {0: 20, HISTORY_PARTITION: 3}))
    assert RepeatMemory.of_json(memory.to_json()) == memory  # type: ignore[arg-type]
    rows = frame([Row(0, 0, 0, 0, 19, 0, 0), Row(0, 0, 0, 0, 20, 0, 0), Row(0, 0, 0, HISTORY_PARTITION, 2, 0, 0)])
    assert memory.span_of(rows).tolist() == [1, 2, 1]
    before = rows.with_columns(pl.lit(None, pl.Boolean).alias("__uncompared"))
    assert memory.span_of(before).tolist() == [0, 0, 0]
