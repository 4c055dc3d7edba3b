"""The keyed steps after the journal: shards answer, parts are put together, turns are committed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam import pvalue
from apache_beam.metrics import Metrics
from apache_beam.transforms.userstate import on_timer

from schemas.views import FeatureView
from transforms.records.frame_packets import head_of, pack, unpack
from transforms.records.row_hashing import row_ids
from transforms.records.times import now_us
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.live_tables import PendingTurns
from transforms.streaming.mirrored_state import (
    BAG_SPEC,
    HEAD_SPEC,
    SINGLE_KEY,
    SLOT_SPECS,
    KeyedBytes,
    LiveSettings,
    Mirror,
    StateParam,
    assembler,
    load_slots,
    read_head,
    save_slots,
    write_head,
)
from transforms.streaming.shards import Shard, assemble, groups_of, versions_text
from transforms.streaming.wake_ups import unset_timer


class ShardDoFn(beam.DoFn):
    """(shard, turn's packet) → (assembler, answers).  Packets are applied in the order of their numbers."""

    def __init__(self, view: FeatureView, live: LiveSettings) -> None:
        self.view, self.live = view, live
        self.rows = Metrics.distribution("millrace.live", "shard_rows")

    def setup(self) -> None:
        self.mirror = Mirror()

    def process(
        self,
        element: KeyedBytes,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        c0: Any = StateParam(SLOT_SPECS[0]),
        c1: Any = StateParam(SLOT_SPECS[1]),
        c2: Any = StateParam(SLOT_SPECS[2]),
        c3: Any = StateParam(SLOT_SPECS[3]),
        c4: Any = StateParam(SLOT_SPECS[4]),
        c5: Any = StateParam(SLOT_SPECS[5]),
        c6: Any = StateParam(SLOT_SPECS[6]),
        c7: Any = StateParam(SLOT_SPECS[7]),
    ) -> Iterator[KeyedBytes]:
        key, envelope = element
        slots = (c0, c1, c2, c3, c4, c5, c6, c7)
        state = read_head(head)

        def build() -> tuple[Shard, list[int], dict[int, bytes]]:
            shard = Shard(self.view, int(key), self.live.shards)
            return shard, load_slots(shard.stores, slots), {head_of(each)["number"]: each for each in bag.read()}

        shard, counts, early = self.mirror.get(key, state["version"], build)
        due = state.get("due", 0)
        early[head_of(envelope)["number"]] = envelope
        held_back = len(early) > 1 or due not in early
        while due in early:
            turn, frames = unpack(early.pop(due))
            answer = shard.apply(turn, frames)
            if answer is not None:
                yield assembler(turn["turn"]), answer
            due += 1
        early = {number: each for number, each in early.items() if number >= due}
        if held_back:
            bag.clear()
            for each in early.values():
                bag.add(each)
        save_slots(shard.stores, slots, counts)
        state.update(version=state["version"] + 1, due=due)
        write_head(head, state)
        self.mirror.put(key, state["version"], (shard, counts, early))
        self.rows.update(sum(len(store) for store in shard.stores.values()))


class AssembleDoFn(beam.DoFn):
    """A turn's questions and the shards' parts → its answers, once all are there; also as a packet for the tables."""

    def __init__(self, view: FeatureView, live: LiveSettings) -> None:
        self.view, self.live = view, live
        self.pending = Metrics.gauge("millrace.live", "turns_to_assemble")

    def setup(self) -> None:
        self.mirror = Mirror()
        self.groups = groups_of(self.view)
        kept = f"{self.live.store}/dimensions"
        self.dimensions = Dimensions(self.view, self.live.dimensions, kept, self.live.dimension_every)

    def process(
        self, element: KeyedBytes, head: Any = StateParam(HEAD_SPEC), bag: Any = StateParam(BAG_SPEC)
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        state = read_head(head)

        def build() -> dict[int, list[bytes]]:
            turns: dict[int, list[bytes]] = {}
            for each in bag.read():
                turns.setdefault(head_of(each)["turn"], []).append(each)
            return turns

        turns = self.mirror.get(key, state["version"], build)
        number = head_of(envelope)["turn"]
        parts = turns.setdefault(number, [])
        parts.append(envelope)
        heads = [head_of(each) for each in parts]
        wanted = next((each["parts"] for each in heads if "parts" in each), None)
        if wanted is not None and len(parts) == wanted + 1:
            asked = next(each for each, one in zip(parts, heads, strict=True) if "parts" in one)
            yield pvalue.TaggedOutput(
                "answers", (SINGLE_KEY, self.compute_features(asked, [each for each in parts if each is not asked]))
            )
            del turns[number]
            bag.clear()
            for each in (each for some in turns.values() for each in some):
                bag.add(each)
        else:
            bag.add(envelope)
        state["version"] += 1
        write_head(head, state)
        self.mirror.put(key, state["version"], turns)
        self.pending.set(len(turns))

    def compute_features(self, asked: bytes, parts: Sequence[bytes]) -> bytes:
        head, frames = unpack(asked)
        spine_rows = frames["questions"]
        self.dimensions.refresh()
        features = assemble(self.view, self.groups, spine_rows, parts, self.dimensions.frames)
        moment = pl.lit(now_us(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        rows = features.with_columns(
            row_ids(self.view.name, [features[name] for name in (*self.view.key, self.view.time)]),
            pl.col(self.view.time).dt.date().alias("date"),
            pl.lit(head["cut"]).alias("__cut"),
            *(spine_rows[name] for name in ("__late", "__partition", "__offset", "__place", "__cold")),
            moment.alias("__answered"),
            pl.lit(versions_text(self.dimensions.versions)).alias("__dimensions"),
        )
        shard_states = [head_of(each)["state"] for each in parts]
        state = {name: sum(each[name] for each in shard_states) for name in ("rows", "bytes")}
        dead_letters = self.dimensions.take_dead_letters()
        dimension_frames = {"letters": dead_letters} if len(dead_letters) else {}
        return pack(
            {"kind": "features", "turn": head["turn"], "state": state, "letters": len(dead_letters)},
            {"rows": rows, **dimension_frames},
        )


NEVER = unset_timer()


class CommitDoFn(beam.DoFn):
    """Entries and answers of turns → commits.  One key: turns in order, an interval at a time."""

    def __init__(self, view: FeatureView, live: LiveSettings) -> None:
        self.view, self.live = view, live
        self.committed = Metrics.counter("millrace.live", "rows_committed")

    def setup(self) -> None:
        self.mirror = Mirror()
        self.since = time.monotonic_ns() // 1000

    def process(
        self,
        element: KeyedBytes,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        never: Any = beam.DoFn.TimerParam(NEVER),
    ) -> Iterator[KeyedBytes]:
        key, envelope = element
        state = read_head(head)

        def build() -> PendingTurns:
            ledger = PendingTurns(self.view, self.live.store, self.live.run_id, self.live.table)
            ledger.committed = state.get("committed", 0)
            ledger.rows.update(state.get("rows", {}))
            for each in bag.read():
                ledger.take(each)
            return ledger

        ledger = self.mirror.get(key, state["version"], build)
        if head_of(envelope).get("kind") != "tick":
            bag.add(envelope)
            ledger.take(envelope)
        turns = ledger.whole()
        now = time.monotonic_ns() // 1000
        if turns and (now - self.since >= self.live.commit_every or head_of(ledger.entries[turns[-1]])["last"]):
            summary = ledger.commit(turns)
            self.since = now
            bag.clear()
            for each in (*ledger.entries.values(), *ledger.features.values()):
                bag.add(each)
            yield SINGLE_KEY, json.dumps({**summary, "rows": ledger.rows}).encode()
        state.update(version=state["version"] + 1, committed=ledger.committed, rows=ledger.rows)
        write_head(head, state)
        self.mirror.put(key, state["version"], ledger)

    @on_timer(NEVER)
    def on_never(self) -> None:
        """The timer is never set."""
