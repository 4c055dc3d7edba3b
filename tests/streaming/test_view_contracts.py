"""Every readable row is accepted, and each view sorts them by its own contract: the journal, a job that continues and
parity agree with a loop over the messages that were sent, for one view or for several in one job."""

from __future__ import annotations

import contextlib
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import FeatureView
from tests.support.contract_rows import (
    BESIDE,
    PLACE,
    POLLS,
    SECOND,
    SENT,
    START,
    VERSIONS,
    VIEWS,
    audit,
    events,
    made,
    memory_of,
    rejected,
)
from tests.support.live_turns import Killed, dying_after, read
from tests.support.turns import Job, JobOptions, unread
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import sources_root
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.progress import CommitRecord
from transforms.streaming.view_contracts import contract_of, keeps, sort_rows

BEGIN = {name: {0: 0, 1: 0} for name in SENT}


def serve(chance: random.Random, store: Path, count: int, served: list[list[FeatureView]], keep: int) -> Any:
    """Jobs that serve views one after the other on one store, and are killed amid commits.

    Returns:
        The rows that were sent, the views of each job, and the last job.
    """
    chunks, sent = made(chance, count)
    parts = sorted(chance.sample(range(1, len(chunks)), min(len(served) - 1, len(chunks) - 1)))
    bounds = [0, *parts, len(chunks)]
    done: list[list[FeatureView]] = []
    for views, first, end in zip(served, bounds, bounds[1:], strict=False):
        done.append(views)

        def start(views: list[FeatureView] = views, until: int = first) -> Job:
            options = JobOptions(f"r{until}-{chance.random()}", chance.choice([1, 2, 3]), keep * SECOND)
            job = Job(views, store, store, BEGIN, options)
            for chunk in chunks[:until]:
                if again := unread(chunk, job.start):
                    job.take(again)
            return job

        job = start()
        for number in range(first, end):
            if some := unread(chunks[number], job.start):
                job.take(some)
            if chance.random() < 0.3:
                job.commit()
            if chance.random() < 0.1:
                with dying_after(chance.randrange(6)), contextlib.suppress(Killed):
                    job.commit()
                job = start(until=number + 1)
        job.commit()
    return sent, done, job


def allowed(served: list[list[FeatureView]]) -> list[list[FeatureView]]:
    """`POLLS` reads a column that no other view declares, so it is served from the start on, and never again once it
    was dropped (see `store_owner`)."""
    result, polls = [], True
    for views in served:
        polls = polls and POLLS in views
        result.append([view for view in views if view is not POLLS or polls] or [BESIDE])
    return result


several = st.lists(st.sampled_from(VIEWS), min_size=1, max_size=5, unique=True)


@settings(max_examples=12, deadline=None)
@given(
    chance=st.randoms(use_true_random=True),
    count=st.integers(1, 45),
    served=st.lists(several, min_size=1, max_size=3),
    keep=st.sampled_from([1, 30]),
)
def test_each_view_of_a_job_counts_the_rows_that_keep_its_own_contract(
    chance: random.Random, count: int, served: list[list[FeatureView]], keep: int
) -> None:
    """Three views, one of them in three versions, over the same topics, added, replaced and dropped at restarts."""
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        sent, done, job = serve(chance, store, count, allowed(served), keep)
        read_by = {name for views in done for view in views for name in (view.spine.name, *view.events)}
        memory = {name: memory_of(done, name, keep * SECOND) for name in read_by}
        for view in {view for views in done for view in views}:
            audit(view, store, sent, memory, last=view in done[-1])
            places = rejected(view, store)
            assert len(places) == len(set(places))
            mine = {view.spine.name, *view.events}
            broken = {(row.source, *row.origin) for row in sent if row.source in mine and not row.keeps(view)}
            assert set(places) <= broken
            assert set(places) == broken or len(done) > 1
        for name in read_by:
            rows = read(f"{sources_root(folder)}/{name}")
            origins = list(rows.select(PLACE).iter_rows()) if len(rows) else []
            assert len(origins) == len(set(origins))
            expected = {row.origin for row in sent if row.source == name}
            assert set(origins) == expected or name not in job.sources or len(done) > 1
        for part in job.journal.parts:
            assert not len(part.spine_rows)


def test_several_views_in_one_go(tmp_path: Path) -> None:
    """All of them have feature rows, some rows break the contract of one view only, and figures add up for each."""
    chance, views = random.Random(7), [VERSIONS[0], BESIDE, POLLS, VERSIONS[1]]
    sent, done, _ = serve(chance, tmp_path, 120, [views], 30)
    memory = {name: memory_of(done, name, 30 * SECOND) for name in SENT}
    status = CommitRecord.of_json(last_commit_record(open_table(f"{tmp_path}/sources/asked"), application_of("asked")))
    for view in views:
        rows = audit(view, tmp_path, sent, memory)
        assert rows > 10
        counts = status.of_view(view).counts[view.spine.name]
        spine = [row for row in sent if row.source == view.spine.name]
        lost = sum(counts.get(what, 0) for what in ("rejected", "repeated", "conflicting", "too_late"))
        assert len(spine) == rows + lost
        assert counts["rejected"] == sum(not row.keeps(view) for row in spine)
    events = [row for row in sent if row.source == "events"]
    assert len({tuple(row.keeps(view) for view in views) for row in events}) > 8


rows_of_events = st.lists(
    st.fixed_dictionaries(
        {
            "u": st.sampled_from([None, 1, 2]),
            "k": st.sampled_from(["a", None]),
            "v": st.sampled_from([None, 1.0, math.inf, 1e39]),
            "w": st.sampled_from([None, 1.0, -math.inf]),
            "s": st.sampled_from([None, "x"]),
            "absent": st.sets(st.sampled_from(["u", "k", "v", "w", "s"]), max_size=2),
        }
    ),
    max_size=12,
)


@given(rows=rows_of_events, view=st.sampled_from(VERSIONS))
def test_a_row_keeps_the_contract_or_is_one_dead_letter(rows: list[dict[str, Any]], view: FeatureView) -> None:
    frame = pl.DataFrame(
        {
            "at": pl.Series([START] * len(rows), dtype=pl.Int64).cast(pl.Datetime("us", "UTC")),
            **{
                name: pl.Series(
                    [None if name in row["absent"] else row[name] for row in rows], dtype=events.schema[name]
                )
                for name in events.columns
            },
            "__absent": pl.Series(
                [json.dumps(sorted(row["absent"])) if row["absent"] else None for row in rows], dtype=pl.String
            ),
            "__partition": pl.Series([0] * len(rows), dtype=pl.Int32),
            "__offset": pl.Series(range(len(rows)), dtype=pl.Int64),
            "__place": pl.Series([0] * len(rows), dtype=pl.Int32),
            "__arrived": pl.Series([START] * len(rows), dtype=pl.Int64),
        }
    )
    contract = contract_of(view, "events")
    read = set(contract.columns)

    def good(row: dict[str, Any]) -> bool:
        numbers = [row[name] for name in ("v", "w") if name in read and row[name] is not None]
        return not row["absent"] & read and row["u"] is not None and all(abs(each) < 3.5e38 for each in numbers)

    expected = [number for number, row in enumerate(rows) if good(row)]
    kept, broken = sort_rows(contract, frame)
    assert kept["__offset"].to_list() == expected
    assert keeps(contract, frame).nonzero()[0].tolist() == expected
    dead = pl.concat(broken)["offset"].to_list() if broken else []
    assert sorted(dead) == [number for number in range(len(rows)) if number not in expected]
