"""The messages between live steps: typed within a process, and as envelopes between processes and in checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest
from polars.testing import assert_frame_equal, assert_series_equal

from schemas.live import live_sources
from tests.support.live_turns import shops, stream, view
from tests.support.state_cells import Cell
from transforms.records.frame_packets import Head, head_of, pack, unpack
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.streaming import step_messages
from transforms.streaming.beginnings import Beginning, Beginnings, LoadedHistory
from transforms.streaming.completeness import Partition, SourceCompleteness
from transforms.streaming.journal import JournalCheckpoint
from transforms.streaming.journal_dofn import JournalDoFn
from transforms.streaming.live_features import decode_messages
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.mirrored_state import SINGLE_KEY
from transforms.streaming.progress import CommitRecord, RecoveryPoint
from transforms.streaming.step_messages import (
    ReadySpineRows,
    ShardFeatures,
    ShardInput,
    ShardTables,
    TurnEntry,
    TurnFeatures,
    assembly_input_of,
    commit_input_of,
    start_envelope,
    start_of,
)
from transforms.streaming.time_buckets import StoreSize

ROWS = pl.DataFrame({"a": [1, 2], "b": ["x", None]})
IDS = pl.Series("__rid", [-1, 2**62])
BEGINNINGS = Beginnings({"sales": Beginning(5, 1, (LoadedHistory("version 2", (0, 7), 1, 5),))}, 3)
# As a version from before these types wrote them.
COMPLETENESS = {"sales": {"settled": 40, "partitions": {"0": [50, 60, False], "1": [40, 61, True]}}}
STORED_BEGINNINGS = {
    "horizon": 3,
    "sources": {
        "sales": {
            "start": 5,
            "since": 1,
            "taken": [{"version": "version 2", "offsets": [0, 7], "from": 1, "until": 5}],
        }
    },
}
RECORD = CommitRecord(
    turn=9,
    last=True,
    next={"sales": {0: 3, 1: 4}},
    completeness={"sales": SourceCompleteness(40, {0: Partition(50, 60), 1: Partition(40, 61, True)})},
    pending=2,
    oldest_pending=33,
    horizon=30,
    counts={"sales": {"rows": 8}},
    beginnings=BEGINNINGS,
)
STORED_RECORD: Head = {
    "turn": 9,
    "last": True,
    "next": {"sales": {"0": 3, "1": 4}},
    "clock": COMPLETENESS,
    "pending": 2,
    "oldest_pending": 33,
    "horizon": 30,
    "counts": {"sales": {"rows": 8}},
    "started": {"sales": 5},
    "beginnings": STORED_BEGINNINGS,
}


def same(one: Any, other: Any) -> None:
    """Both are equal, with every frame."""
    assert type(one) is type(other)
    if isinstance(one, pl.DataFrame):
        assert_frame_equal(one, other)
    elif isinstance(one, pl.Series):
        assert_series_equal(one, other)
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            same(getattr(one, field.name), getattr(other, field.name))
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for name in one:
            same(one[name], other[name])
    else:
        assert one == other


def test_records_have_the_stored_keys() -> None:
    assert RECORD.to_json() == STORED_RECORD
    assert list(RECORD.to_json()) == list(STORED_RECORD)  # as `status.json` shows them
    assert CommitRecord.of_json(STORED_RECORD) == RECORD


def test_a_record_of_an_earlier_version_has_no_beginnings_and_no_horizon() -> None:
    stored = {name: each for name, each in STORED_RECORD.items() if name not in ("horizon", "beginnings", "started")}
    assert CommitRecord.of_json(stored) == dataclasses.replace(
        RECORD, horizon=CommitRecord().horizon, beginnings=Beginnings()
    )


def test_a_checkpoint_of_the_journal_has_the_stored_keys() -> None:
    stored: Head = {
        "turn": 9,
        "began": 4,
        "sent": [3, 5],
        "clock": COMPLETENESS,
        "horizon": 30,
        "counts": {"sales": {"rows": 8}},
        "next": {"sales": {"-1": 7, "0": 3, "1": 4}},
        "beginnings": STORED_BEGINNINGS,
        "first": {"sales": {"0": 12}},
    }
    checkpoint = JournalCheckpoint.of_json(stored)
    assert (checkpoint.next, checkpoint.first) == ({"sales": {-1: 7, 0: 3, 1: 4}}, {"sales": {0: 12}})
    assert checkpoint.to_json() == stored
    several: Head = {**stored, "sent": [[3, 5], [2, 4]], "views": {"a@1": {"sales": {"dead": 1}}}}
    assert JournalCheckpoint.of_json(several).to_json() == several
    earlier = {name: each for name, each in stored.items() if name not in ("beginnings", "first")}
    assert JournalCheckpoint.of_json(earlier) == dataclasses.replace(checkpoint, beginnings=Beginnings(), first={})


@pytest.mark.parametrize("features_version", [None, 4])
def test_the_start_of_a_job_is_the_first_envelope_of_the_journal(features_version: int | None) -> None:
    features = {} if features_version is None else {"a@1": features_version}
    start = RecoveryPoint(9, RECORD.next, RECORD.completeness, RECORD.counts, {"sales": 3}, BEGINNINGS, features)
    head = head_of(start_envelope(start))
    assert head == {
        "kind": "start",
        "index": None,
        "start": {
            "turn": 9,
            "next": {"sales": {"0": 3, "1": 4}},
            "completeness": COMPLETENESS,
            "counts": {"sales": {"rows": 8}},
            "versions": {"sales": 3},
            "features": features,
            "views": {},
            "beginnings": STORED_BEGINNINGS,
        },
    }
    assert start_of(start_envelope(start)) == start
    assert start_of(pack({"kind": "micro", "index": 0})) is None


@pytest.mark.parametrize(
    "tables",
    [
        ShardTables(),
        ShardTables(spine_rows=ROWS),
        ShardTables({"old:x": ROWS}, {"rows": IDS}, {"compacted": ROWS}, {0: ROWS, 11: ROWS.clear()}, ROWS),
    ],
)
def test_the_input_of_a_shard_survives_its_envelope_whatever_sources_are_called(tables: ShardTables) -> None:
    given = ShardInput(9, 3, 30, tables, {"s": 5}, 2)
    same(ShardInput.of_envelope(given.to_envelope()), given)
    assert tables.empty == (not tables.to_frames())


def test_the_names_in_envelopes_of_shards_are_those_of_checkpoints() -> None:
    tables = ShardTables({"s": ROWS}, {"s": IDS}, {"s": ROWS}, {2: ROWS}, ROWS)
    head, frames = unpack(ShardInput(9, 3, 30, tables).to_envelope())
    assert head == {"turn": 9, "number": 3, "horizon": 30}
    assert set(frames) == {"rows:s", "retract:s", "old:s", "compacted:2", "questions"}
    head, frames = unpack(ShardFeatures(9, 1, StoreSize(5, 600), {0: ROWS}).to_envelope())
    assert head == {"turn": 9, "shard": 1, "state": {"rows": 5, "bytes": 600}}
    assert set(frames) == {"0"}


@pytest.mark.parametrize(
    "part",
    [
        ReadySpineRows(9, 2, "sales/0:3", ROWS),
        ReadySpineRows(9, 2, "sales/0:3", ROWS, {"shops": "a"}, 1),
        ShardFeatures(9, 1, StoreSize(5, 600), {0: ROWS, 7: ROWS}),
        ShardFeatures(9, 1, StoreSize(5, 600), {0: ROWS}, 1),
    ],
)
def test_what_is_assembled_survives_its_envelope(part: ReadySpineRows | ShardFeatures) -> None:
    same(assembly_input_of(part.to_envelope()), part)


@pytest.mark.parametrize("dead", [0, 1])
def test_what_is_committed_survives_its_envelope(dead: int) -> None:
    dead_letters = pl.DataFrame([("sales", 0, 1, -1, "", "rule", None, 5)] * dead, MESSAGE_DEAD_LETTERS, orient="row")
    own = {1: dead_letters} if dead else {}
    entry = TurnEntry(RECORD, 4, {0: 2, 1: 3}, StoreSize(5, 600), {"sales": ROWS}, dead_letters, own)
    features = TurnFeatures(9, StoreSize(5, 600), ROWS, dead_letters)
    for part in (entry, features, dataclasses.replace(features, view=1)):
        same(commit_input_of(part.to_envelope()), part)
        assert step_messages.has_dead_letters(part.to_envelope()) == bool(dead)
    head, frames = unpack(entry.to_envelope())
    state = {"rows": 5, "bytes": 600}
    questions = {"0": 2, "1": 3}
    assert head == {**STORED_RECORD, "began": 4, "questions": questions, "letters": 2 * dead, "state": state}
    assert set(frames) == {"rows:sales"} | ({"letters", "letters:1"} if dead else set())
    head, frames = unpack(features.to_envelope())
    assert head == {"kind": "features", "turn": 9, "state": {"rows": 5, "bytes": 600}, "letters": dead}
    assert set(frames) == {"rows"} | ({"letters"} if dead else set())


def test_a_turn_of_an_earlier_version_had_one_view() -> None:
    none = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
    entry = TurnEntry(RECORD, 4, {0: 2}, StoreSize(5, 600), {"sales": ROWS}, none, {})
    head, frames = unpack(entry.to_envelope())
    same(commit_input_of(pack({**head, "questions": 2}, frames)), entry)


def test_a_tick_holds_nothing_to_commit() -> None:
    assert commit_input_of(step_messages.TICK) is None
    assert not step_messages.has_dead_letters(step_messages.TICK)


def test_with_one_shard_only_what_leaves_the_step_is_serialised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of the shard and of the assembly stay objects; an entry and feature rows go on to the commit."""
    packed: list[Head] = []
    monkeypatch.setattr(step_messages, "pack", lambda head, frames=None: packed.append(head) or pack(head, frames))
    monkeypatch.setattr(step_messages, "unpack", lambda envelope: pytest.fail("an envelope was decoded"))
    (tmp_path / "shops").mkdir()
    pl.DataFrame({"k": ["a"], "size": [1], "name": ["x"], "rate": [0.1]}, schema=shops.schema).write_parquet(
        tmp_path / "shops" / "s.parquet"
    )
    step = JournalDoFn([view], LiveSettings(str(tmp_path), "r", str(tmp_path), shards=1, pace=0, keep=30_000_000))
    step.setup()
    head, bag, *slots = (Cell() for _ in range(10))
    tags = []
    for index, messages in enumerate(stream(Random(5), 3)):
        envelope = decode_messages(live_sources(view), messages, index=index)
        tags += [each.tag for each in step.process((SINGLE_KEY, envelope), head, bag, *slots)]
    assert set(tags) == {"features", "entries"}
    assert len(packed) == len(tags)
