"""Lifetime windows, live: what has left the time buckets still counts, whatever the order of arrival, stops and
state."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from beam_pipelines import features_streaming
from beam_pipelines.commands import parity
from schemas import FeatureView, Latest, Source, Trailing, load_definition
from tests.support import histories, market
from tests.support.features_runs import feature_rows as batch_feature_rows
from tests.support.features_runs import run as run_batch
from tests.support.lifetime_case import definition, same
from tests.support.live_fixtures import Live
from tests.support.live_histories import killed
from tests.support.live_lifetime_case import SUMMARY, mixed
from tests.support.live_turns import audit, events, placed, run, sales, spine_rows, stream
from tests.support.live_turns import read as rows_of
from tests.support.state_cells import Cell
from tests.support.turns import Job, JobOptions
from transforms.lineage.feature_parity import check_parity
from transforms.storage.paths import features_live_uri
from transforms.streaming import recovery
from transforms.streaming.journal import Turn
from transforms.streaming.messages import Message, to_arrow
from transforms.streaming.mirrored_state import load_slots, save_slots
from transforms.streaming.shards import Shard
from transforms.streaming.time_buckets import SLOTS

# No window bounds what is held back: an event is compacted as soon as no spine row can come before it.
only = FeatureView(
    "only",
    spine_rows,
    key="id",
    features=[
        Trailing(events, by="k", over="all", stats={"v": SUMMARY, "*": "count"}),
        Latest(sales, by="k", columns=("v", "n"), max_age="forever"),
        Trailing(sales, by="k", over="all", stats={"v": ("sum", "max")}),
        Trailing(placed, by="k", over="10s", stats={"v": "sum"}),
    ],
)


class Restored(Job):
    """A job whose shards are, now and then, built anew from what their state says, as on another worker."""

    def __init__(self, view: FeatureView, *places: Any, often: float, seed: int, shards: int) -> None:
        self.random, self.often = Random(seed), often
        self.slots: dict[int, list[Cell]] = {}
        self.counts: dict[int, list[int]] = {}
        *folders, options = places
        super().__init__(view, *folders, dataclasses.replace(options, shards=shards))

    def _pass_on(self, turn: Turn) -> None:
        super()._pass_on(turn)
        for number, shard in enumerate(self.shards):
            slots = self.slots.setdefault(number, [Cell() for _ in range(SLOTS)])
            save_slots(shard.stores, slots, self.counts.setdefault(number, [0] * SLOTS))
            if self.random.random() < self.often:
                self.shards[number] = Shard(self.view, number, len(self.shards))
                for slot in slots:
                    self.random.shuffle(slot.many)  # a bag has no order
                self.counts[number] = load_slots(self.shards[number].stores, slots)


# Shrinking what depends on a seed leads nowhere; the seed itself is small enough.
@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(seed=st.integers(0, 2**32))
def test_every_feature_row_is_batch_over_all_history_that_it_could_see(seed: int) -> None:
    random = Random(seed)
    chunks = stream(random, 2, step=random.choice([1, 20, 60]))
    commits = {random.randrange(len(chunks)) for _ in range(random.randrange(4))}
    kills = {random.randrange(len(chunks)): random.choice([None, 1, 2, 3, 4, 5]) for _ in range(random.randrange(4))}
    make = functools.partial(
        Restored,
        random.choice([mixed, only]),
        shards=random.choice([1, 2, 3]),
        often=random.choice([0, 0.3]),
        seed=seed,
    )
    with tempfile.TemporaryDirectory() as folder:
        job = run(Path(folder), chunks, commits, kills, random.choice([0, 30_000_000, 600_000_000]), make)
        audit(folder, chunks, job)


def read(store: Path, view: FeatureView) -> pl.DataFrame:
    return rows_of(features_live_uri(str(store), view.name, view.fingerprint)).sort("row_id")


@pytest.mark.parametrize("flags", [("--chunk", "3h"), ("--chunk", "1d", "--shards", "3", "--partitions", "1")])
def test_a_replay_gives_the_table_of_the_batch_pipeline(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Batch carries snapshots from day to day; live compacts, while spine rows of up to an hour late are still
    pending."""
    folder = market.write(tmp_path / "batch", market.spoiled(market.sources()))
    path = str(market.define(folder, definition("all", "forever")))
    for day in (2, 4, 6):
        run_batch(folder, "--start", str(market.at(day - 2).date()), "--end", str(market.at(day).date()))
    argv = ["--streaming", "--definition", path, "--store", str(tmp_path / "live"), "--run_id", "r"]
    assert features_streaming.main([*argv, "--sources", str(folder / "sources"), *flags]) == 0
    view = load_definition(path).view
    columns = [name for name in view.output_schema.names if name != "date"]
    same(read(tmp_path / "live", view).select(columns), batch_feature_rows(folder).select(columns).sort("row_id"))
    assert parity.main(["--definition", path, "--store", str(tmp_path / "live"), "--run_id", "p"]) == 0


def test_disorder_changes_feature_rows_but_not_parity(tmp_path: Path) -> None:
    folder = market.write(tmp_path, market.spoiled(market.sources()))
    path = str(market.define(folder, definition("all", "forever")))
    argv = ["--definition", path, "--store", str(tmp_path / "live")]
    flags = ["--disorder", "9h", "--keep", "12h", "--chunk", "2h", "--shards", "2"]
    assert features_streaming.main([*argv, "--streaming", "--sources", str(folder / "sources"), *flags]) == 0
    assert parity.main(argv) == 0
    found = check_parity(load_definition(path).view, str(tmp_path / "live"))
    assert found.by_cut > found.changed_later > 0


reads = Source("reads", time="at", lateness="5s", columns={"k": pl.String, "v": pl.Float64})
ever = FeatureView(
    "ever",
    spine_rows,
    key="id",
    features=[
        Trailing(reads, by="k", over="all", stats={"v": ("sum", "min", "first", "last"), "*": "count"}),
        Latest(reads, by="k", columns="v", max_age="forever"),
    ],
)


once_reads = Source("reads", time="at", unique="n", columns={"k": pl.String, "v": pl.Float64, "n": pl.Int64})
once = FeatureView(
    "once",
    spine_rows,
    key="id",
    features=[
        Trailing(once_reads, by="k", over=("10m", "all"), stats={"v": "sum"}),
        Latest(once_reads, by="k", columns="v", max_age="forever"),
    ],
)


class HandFedJob:
    """A job that gets rows by hand, one message of each source at a time."""

    def __init__(
        self, store: Path, keep: int = 10_000_000, shards: int = 2, run_id: str = "t", view: FeatureView = ever
    ) -> None:
        self.view, self.source = view, view.events["reads"]
        self.job = Job(view, store, store, {"reads": {0: 0}, "questions": {0: 0}}, JobOptions(run_id, shards, keep))
        self.next = {name: each.get(0, 0) for name, each in self.job.start.items()}

    def __call__(self, rows: list[tuple[Any, ...]], pairs: list[tuple[int, float]]) -> None:
        reported = pl.DataFrame(
            [{"at": histories.at(at), **dict(zip(self.source.columns, row, strict=True))} for at, *row in rows],
            schema=self.source.schema,
        )
        spine = [{**dict.fromkeys(spine_rows.schema), "id": i, "t": histories.at(t), "k": "a"} for i, t in pairs]
        frames = {"reads": reported, "questions": pl.DataFrame(spine, schema=spine_rows.schema, orient="row")}
        messages = []
        for name, frame in frames.items():
            if len(frame):
                messages.append(Message(name, 0, self.next[name], 2**51, None, to_arrow(frame)))
                self.next[name] += 1
        self.job.take(messages)

    def feature_rows(self) -> dict[int, dict[str, Any]]:
        self.job.commit()
        found = read(Path(self.job.store), self.view)
        return {row["id"]: {name: row[name] for name in self.view.columns} for row in found.iter_rows(named=True)}


def feature_row(total: float, least: float, first: float, last: float, rows: int) -> dict[str, Any]:
    return {
        "reads_by_k_v_sum_all": total,
        "reads_by_k_v_min_all": least,
        "reads_by_k_v_first_all": first,
        "reads_by_k_v_last_all": last,
        "reads_by_k_count_all": rows,
        "reads_v": last,
    }


def test_an_event_that_is_years_late_counts_from_then_on_and_changes_no_feature_row(tmp_path: Path) -> None:
    send = HandFedJob(tmp_path)
    send([(0, "a", 1.0), (1, "b", 50.0), (2, "a", 2.0)], [(1, 3.0)])
    send([(1000, "a", 4.0)], [(2, 900.0), (3, 990.0)])
    assert sum(len(each) for shard in send.job.shards for each in shard.compacted.values())
    send([(-300_000_000, "a", 0.5), (1500, "a", 8.0)], [(4, 1400.0)])  # nine and a half years
    send([(3000, "b", 0.0)], [(5, 3000.0)])
    send([(3100, "b", 0.0)], [(6, 3050.0)])
    assert send.feature_rows() == {
        1: feature_row(3, 1, 1, 2, 2),
        2: feature_row(3, 1, 1, 2, 2),
        3: feature_row(3, 1, 1, 2, 2),
        4: feature_row(7.5, 0.5, 0.5, 4, 4),
        5: feature_row(15.5, 0.5, 0.5, 8, 5),
        6: feature_row(15.5, 0.5, 0.5, 8, 5),
    }
    assert send.job.journal.counts["reads"] == {"messages": 5, "rows": 8, "late": 1}  # none is beyond
    found = check_parity(ever, str(tmp_path))
    assert (found.differing, found.changed_later) == (0, 3)


def test_a_pending_spine_row_holds_back_what_became_known_after_it(tmp_path: Path) -> None:
    """A spine row stays pending until its source is complete, however far the spine is; later events are not in its
    past."""
    send = HandFedJob(tmp_path, keep=0)
    send([(0, "a", 1.0)], [(1, 100.0)])
    send([], [(2, 5000.0), (3, 9000.0)])
    send([(150, "a", 2.0)], [])
    send([(4000, "a", 3.0)], [])
    send([(9500, "a", 4.0)], [])
    assert send.feature_rows() == {
        1: feature_row(1, 1, 1, 1, 1),
        2: feature_row(6, 1, 1, 3, 3),
        3: feature_row(6, 1, 1, 3, 3),
    }


@pytest.mark.parametrize("stopped", [False, True])
def test_an_event_is_compacted_when_nothing_can_replace_it_any_more(tmp_path: Path, stopped: bool) -> None:
    """No window of ten minutes holds the first row any more when a repeat comes that was known before it."""
    send = HandFedJob(tmp_path, view=once)
    send([(0, "a", 0.5, 0)], [])
    send([(1000, "a", 5.0, 1)], [(1, 1001.0)])
    send([(1720, "a", 1.0, 2)], [(2, 1720.0)])
    send([(990, "b", 7.0, 1)], [])
    send([(2000, "a", 2.0, 3)], [(3, 1900.0)])
    if stopped:
        send.job.commit()
        send = HandFedJob(tmp_path, run_id="again", view=once)
    send([(9000, "a", 2.0, 4)], [(4, 5000.0)])
    totals = {name: row["reads_by_k_v_sum_all"] for name, row in send.feature_rows().items()}
    assert totals == {1: 5.5, 2: 5.5, 3: 1.5, 4: 3.5}
    assert check_parity(once, str(tmp_path)).differing == 0


def test_a_row_that_a_much_older_repeat_replaced_does_not_come_back_with_a_restart(tmp_path: Path) -> None:
    """Without windows over all history; the one that replaced it is beyond what state remembers when the job starts
    again."""
    bounded = FeatureView(
        "b", spine_rows, key="id", features=[Trailing(once_reads, by="k", over="10m", stats={"v": "sum"})]
    )
    send = HandFedJob(tmp_path, view=bounded)
    send([(5000, "a", 5.0, 1)], [(1, 5001.0)])
    send([(3900, "a", 7.0, 1)], [])
    send([(5530, "a", 1.0, 2)], [(2, 5530.0)])
    send.job.commit()
    send = HandFedJob(tmp_path, run_id="again", view=bounded)
    send([(9000, "a", 2.0, 4)], [(3, 5560.0)])
    totals = {name: row["reads_by_k_v_sum_10m"] for name, row in send.feature_rows().items()}
    assert totals == {1: None, 2: None, 3: 1.0}
    assert check_parity(bounded, str(tmp_path)).differing == 0


def test_with_a_longer_keep_no_spine_row_goes_behind_what_is_compacted(tmp_path: Path) -> None:
    send = HandFedJob(tmp_path)
    send([(0, "a", 1.0), (500, "a", 2.0)], [(1, 600.0)])
    send([(5000, "a", 3.0)], [(2, 5000.0)])
    send.job.journal.keep = 3_600_000_000  # a checkpoint taken over by a job that keeps longer
    send([(5010, "a", 3.0)], [(3, 400.0), (4, 5000.0)])
    assert set(send.feature_rows()) == {1, 2, 4}
    assert send.job.journal.counts["questions"]["too_late"] == 1


@pytest.mark.parametrize("shards", [1, 3])
def test_a_restart_without_a_checkpoint_compacts_the_tables_again(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "SEED_ROWS", 7)  # several pieces
    random, reported = Random(shards), []
    send = HandFedJob(tmp_path, shards=shards)
    for day in range(20):
        rows = [(86_400 * day + 600 * i, random.choice("abc"), random.choice([0.1, 12.34, 1e10])) for i in range(20)]
        reported += rows
        send(rows, [(day, 86_400 * day + 5000.0)])
        send.job.commit()
        if day % 6 == 5:
            send = HandFedJob(tmp_path, shards=1 + day % 3, run_id=f"r{day}")
            held = [each for shard in send.job.shards for each in shard.compacted.values()]
            assert sum(map(len, held)) == 3 * (1 + 2)  # of three keys a summary, the first and the last row
    assert len(send.feature_rows()) == 20
    found = check_parity(ever, str(tmp_path))
    assert (found.feature_rows, found.differing, found.changed_later) == (20, 0, 0)


def test_state_is_bounded_by_keys_and_what_is_open(tmp_path: Path) -> None:
    send, held = HandFedJob(tmp_path, shards=1), []
    for minute in range(100):
        rows = [(60 * minute + i, "abcde"[i % 5], 0.1 * i) for i in range(60)]
        send(rows, [(minute, 60.0 * minute + 59)])
        if minute % 10 == 9:
            held.append(send.job.commit()["state"]["shards"])
    # Of five keys a summary, the first and the last row, in parts of growing size; and three minutes of rows.
    assert max(each["rows"] for each in held) <= 5 * 2 * (1 + 2) + 3 * 60
    assert max(each["bytes"] for each in held[5:]) <= 1.5 * max(each["bytes"] for each in held[:5])


WITHOUT_BEGINNING = """
    Trailing(sales, by="shop", over="all", stats={"price": ("mean", "std", "max", "first", "last"), "*": "count"}),
    Latest(sales, by="city", columns=("price", "shop"), max_age="forever"),
    Trailing(visits, by="shop", over="all", stats={"size": ("mean", "last")}),
    Lookup(shops"""


@pytest.mark.live
@pytest.mark.timeout(280)
def test_launcher_and_prism_are_killed_on_a_real_broker(live: Live, tmp_path: Path) -> None:
    killed(live, tmp_path, 2, 3, market.DEFINITION.replace("\n    Lookup(shops", WITHOUT_BEGINNING))
