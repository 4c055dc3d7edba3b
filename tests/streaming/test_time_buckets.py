"""Time buckets against a plain list of rows, and against what is restored from their stored changes."""

from __future__ import annotations

from random import Random

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.state_cells import Cell
from transforms.records.row_hashing import key_hashes
from transforms.streaming import mirrored_state
from transforms.streaming.mirrored_state import load_slots, save_slots
from transforms.streaming.time_buckets import SLOTS, TimeBuckets

SCHEMA = {"t": pl.Int64, "k": pl.String, "n": pl.Int32, "rid": pl.Int64}


def rows(frames: list[pl.DataFrame]) -> list[tuple[object, ...]]:
    return sorted((row for frame in frames for row in frame.rows()), key=str)


def bucket_ends(times: list[int], width: int) -> list[int]:
    """Where the bucket of each row of one batch ends.

    Buckets are as wide as the smallest doubling of `width` of which eight cover the batch, counted in buckets of
    `width`.
    """
    span, wide = (max(times) // width - min(times) // width) * width if times else 0, width
    while span >= 8 * wide:
        wide *= 2
    return [(time // wide + 1) * wide for time in times]


@given(st.integers(0, 2**32))
def test_time_buckets_hold_what_a_list_would_and_their_slots_restore_them(seed: int) -> None:
    random = Random(seed)
    width = random.choice([1, 7, 100])
    buckets, plain, next_id = TimeBuckets("t", width), [], 0
    slots, counts = [Cell() for _ in range(SLOTS)], [0] * SLOTS
    saved = pytest.MonkeyPatch()
    saved.setattr(mirrored_state, "PIECES", random.choice([3, 100]))  # after which a slot is rewritten
    ends: dict[int, int] = {}  # of the bucket of each row, by its id
    for _ in range(random.randrange(25)):
        what = random.choice(["add", "add", "add", "evict", "drop", "before"])
        if what == "add":
            new = [
                (random.randrange(-300, 300), random.choice(["a", "b", None]), random.choice([1, 2, None]), next_id + i)
                for i in range(random.randrange(30))
            ]
            next_id += len(new)
            buckets.add(pl.DataFrame(new, schema=SCHEMA, orient="row"))
            plain += new
            ends |= dict(zip([row[3] for row in new], bucket_ends([row[0] for row in new], width), strict=True))
        elif what == "evict":
            horizon = random.randrange(-300, 300)
            gone = buckets.evict(horizon)
            kept = [row for row in plain if ends[row[3]] > horizon]
            assert rows(gone) == sorted((row for row in plain if row not in kept), key=str)
            assert all(row in kept for row in plain if row[0] >= horizon)
            plain = kept
        elif what == "drop":
            ids = [random.randrange(max(next_id, 1)) for _ in range(3)]
            taken = buckets.drop("rid", np.array(ids))
            assert rows([taken] if taken is not None else []) == sorted(
                (row for row in plain if row[3] in ids), key=str
            )
            plain = [row for row in plain if row[3] not in ids]
        else:
            bound = random.randrange(-300, 300)
            assert rows(buckets.take_before(bound)) == sorted((row for row in plain if row[0] <= bound), key=str)
            plain = [row for row in plain if row[0] > bound]
        if random.random() < 0.7:
            save_slots({"s": buckets}, slots, counts)
        assert len(buckets) == len(plain)
    assert rows(buckets.all()) == sorted(plain, key=str)
    save_slots({"s": buckets}, slots, counts)
    saved.undo()
    for slot in slots:
        random.shuffle(slot.many)  # a bag has no order
    restored = TimeBuckets("t", width)
    assert load_slots({"s": restored}, slots) == counts
    assert rows(restored.all()) == sorted(plain, key=str)
    for key in (("k",), ("k", "n")):
        wanted = pl.DataFrame([("a", 1), (None, 2)], schema={"k": pl.String, "n": pl.Int64}, orient="row")
        found = rows(buckets.take(key, key_hashes(wanted, key), -1000, 1000))
        wanted_keys = [row[: len(key)] for row in wanted.rows()]
        assert found == sorted((row for row in plain if row[1 : 1 + len(key)] in wanted_keys), key=str)


def test_only_time_buckets_that_reach_into_the_span_are_looked_at() -> None:
    buckets = TimeBuckets("t", 10)
    buckets.add(pl.DataFrame({"t": [5, 15, 25, 35], "k": ["a"] * 4, "n": [1] * 4, "rid": [1, 2, 3, 4]}, schema=SCHEMA))
    wanted = key_hashes(pl.DataFrame({"k": ["a"]}), ("k",))
    assert [row[0] for row in rows(buckets.take(("k",), wanted, 12, 30))] == [15, 25]


def test_appending_builds_few_parts() -> None:
    buckets = TimeBuckets("t", 10**9)
    for number in range(1000):
        buckets.add(pl.DataFrame({"t": [number], "k": ["a"], "n": [1], "rid": [number]}, schema=SCHEMA))
    (parts,) = buckets.buckets.values()
    assert len(parts) < 12
    assert len(buckets) == 1000


def test_rows_far_apart_go_to_few_time_buckets_that_end_no_earlier() -> None:
    buckets = TimeBuckets("t", 10)
    times = list(range(0, 100_000, 7))
    buckets.add(pl.DataFrame({"t": times, "k": ["a"] * len(times), "n": [1] * len(times), "rid": times}, schema=SCHEMA))
    assert len(buckets.buckets) <= 9
    assert all(part.frame["t"].max() < (number + 1) * 10 for number, parts in buckets.buckets.items() for part in parts)
    buckets.evict(50_000)
    assert 30_000 < min(row[0] for row in rows(buckets.all())) < 50_000
