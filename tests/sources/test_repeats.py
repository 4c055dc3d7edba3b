"""Which rows repeat others: against a loop over all pairs of rows, against batch, and however many rows are known."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Source
from transforms.sources.reader import without_repeats
from transforms.sources.repeats import NEVER_REPEATED, KnownOrder

SOURCE = Source("once", time="at", unique=("u", "w"), columns={"u": pl.Int64, "w": pl.String, "v": pl.Int64})
ORDER = KnownOrder.of(SOURCE, ("u", "w"), list(SOURCE.schema), ["place"])


class Row(NamedTuple):
    at: int
    u: int
    w: str
    v: int
    place: int
    shown: int

    @property
    def order(self) -> tuple[int, ...]:
        return self.at, self.v, self.place


@st.composite
def some_rows(draw: st.DrawFn) -> list[Row]:
    number = draw(st.integers(0, 24))
    places = draw(st.permutations(range(number)))
    few = st.tuples(st.integers(0, 12), st.integers(0, 1), st.sampled_from("ab"), st.integers(0, 2), st.integers(0, 6))
    return [Row(*values[:4], place, values[4]) for place in places for values in (draw(few),)]


def frame(rows: list[Row]) -> pl.DataFrame:
    made = pl.DataFrame(rows, schema=["at", "u", "w", "v", "place", "shown"], orient="row")
    made = made.with_columns(pl.col("at", "u", "v", "place", "shown").cast(pl.Int64), pl.col("w").cast(pl.String))
    return made.with_columns((pl.col("at") + 10**15).cast(pl.Datetime("us", "UTC")))


def repeated(rows: list[Row], memory: int) -> list[Row]:
    """The rows that repeat another one of `rows`, whatever became of that."""
    return [
        row
        for row in rows
        if any(
            (other.u, other.w) == (row.u, row.w) and other.order < row.order and row.at - other.at <= memory
            for other in rows
        )
    ]


@settings(max_examples=300, deadline=None)
@given(some_rows(), st.sampled_from([0, 1, 2, 5, NEVER_REPEATED]))
def test_a_row_counts_until_one_is_known_that_it_repeats(rows: list[Row], memory: int) -> None:
    gone = ORDER.repeated_from(frame(rows), np.array([row.shown for row in rows], np.int64), memory)
    counted_before = None
    for cut in range(7):  # whatever is known, and in whatever order it came
        known = [row for row in rows if row.shown <= cut]
        no_repeats = {row for row in known if row not in repeated(known, memory)}
        assert {row for row, until in zip(rows, gone, strict=True) if row.shown <= cut < until} == no_repeats
        lost = set() if counted_before is None else counted_before[1] - no_repeats
        assert counted_before is None or not no_repeats & (counted_before[0] - counted_before[1])  # none comes back
        assert all(any((one.u, one.w) == (row.u, row.w) for one in known) for row in lost)
        counted_before = {*known}, no_repeats
    assert all(until == NEVER_REPEATED or until in {row.shown for row in rows} for until in gone)


@settings(max_examples=200, deadline=None)
@given(some_rows())
def test_batch_is_the_same_with_a_memory_without_end(rows: list[Row]) -> None:
    given_rows = frame(rows).select(list(SOURCE.schema))
    numbered = frame(rows)
    first = numbered.group_by("u", "w").agg(pl.col("at").to_physical().min().alias("__known"))
    kept = without_repeats(SOURCE, given_rows, first)
    gone = ORDER.repeated_from(numbered, np.zeros(len(rows), np.int64))
    columns = list(SOURCE.schema)
    assert kept.sort(columns).equals(numbered.filter(pl.Series(gone == NEVER_REPEATED)).select(columns).sort(columns))


def test_a_shown_number_of_never_makes_no_row_a_repeat() -> None:
    rows = frame([Row(0, 1, "a", 0, 0, 0), Row(1, 1, "a", 0, 1, 0), Row(2, 1, "a", 0, 2, 0)])
    assert ORDER.repeated_from(rows, np.array([NEVER_REPEATED, 5, 7], np.int64)).tolist() == [
        NEVER_REPEATED,
        NEVER_REPEATED,
        5,
    ]


def test_many_rows_of_one_value() -> None:
    rng = np.random.default_rng(3)
    at, shown = np.sort(rng.integers(0, 50_000, 3000)), rng.integers(0, 900, 3000)
    rows = frame([Row(int(moment), 1, "a", 0, place, 0) for place, moment in enumerate(at)])
    gone = ORDER.repeated_from(rows, shown, 700)
    for i in rng.integers(0, 3000, 200).tolist():
        before = shown[:i][at[:i] >= at[i] - 700]
        assert gone[i] == (before.min() if len(before) else NEVER_REPEATED)
