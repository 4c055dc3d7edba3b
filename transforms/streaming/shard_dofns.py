"""The keyed steps after the journal: shards compute features, the features of a turn are assembled, and committed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence

import apache_beam as beam
import polars as pl
from apache_beam import pvalue
from apache_beam.metrics import Metrics
from apache_beam.transforms.userstate import on_timer

from schemas.views import FeatureView
from transforms.records.columns import with_series
from transforms.records.row_hashing import row_ids
from transforms.records.times import now_us
from transforms.streaming.groups import shard_groups
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.live_tables import PendingTurns
from transforms.streaming.mirrored_state import (
    BAG_SPEC,
    HEAD_SPEC,
    SINGLE_KEY,
    BagState,
    KeyedBytes,
    Mirror,
    Slots,
    StateParam,
    ValueState,
    assembler,
    load_slots,
    read_head,
    replace_bag,
    save_slots,
    shard_of_key,
    with_slots,
    write_head,
)
from transforms.streaming.shards import Shard, assemble, versions_text
from transforms.streaming.step_messages import (
    ReadySpineRows,
    ShardFeatures,
    ShardInput,
    TurnEntry,
    TurnFeatures,
    assembly_input_of,
    commit_input_of,
)
from transforms.streaming.time_buckets import StoreSize
from transforms.streaming.wake_ups import Timer, unset_timer


@dataclasses.dataclass(eq=False)
class ShardState:
    """What the step of a shard holds in memory.

    Args:
        shard: the shard.
        counts: number of pieces of each slot.
        early: inputs that arrived before an earlier one, by their number.
    """

    shard: Shard
    counts: list[int]
    early: dict[int, ShardInput]


class ShardDoFn(beam.DoFn):
    """(shard, its input) → (assembler, features).  Inputs are applied in the order of their numbers."""

    def __init__(self, views: Sequence[FeatureView], live: LiveSettings) -> None:
        self.views, self.live = tuple(views), live
        self.rows = Metrics.distribution("millrace.live", "shard_rows")

    def setup(self) -> None:
        self.mirror = Mirror[ShardState]()

    @with_slots
    def process(
        self,
        element: KeyedBytes,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        slots: Slots = (),
    ) -> Iterator[KeyedBytes]:
        key, envelope = element
        state = read_head(head)

        def build() -> ShardState:
            view, number = shard_of_key(key)
            shard = Shard(self.views[view], number, self.live.shards)
            inputs = map(ShardInput.of_envelope, bag.read())
            return ShardState(shard, load_slots(shard.stores, slots), {each.number: each for each in inputs})

        held = self.mirror.get(key, state["version"], build)
        due, given = state.get("due", 0), ShardInput.of_envelope(envelope)
        held.early[given.number] = given
        in_turn = list(held.early) == [due]
        while due in held.early:
            features = held.shard.apply(held.early.pop(due))
            if features is not None:
                yield assembler(features.turn), features.to_envelope()
            due += 1
        held.early = {number: each for number, each in held.early.items() if number >= due}
        if not in_turn:
            replace_bag(bag, (each.to_envelope() for each in held.early.values()))
        save_slots(held.shard.stores, slots, held.counts)
        state.update(version=state["version"] + 1, due=due)
        write_head(head, state)
        self.mirror.put(key, state["version"], held)
        self.rows.update(sum(len(store) for store in held.shard.stores.values()))


@dataclasses.dataclass(eq=False)
class TurnParts:
    """The parts of a turn that have arrived for its assembly: its spine rows, and the features of its shards."""

    spine_rows: ReadySpineRows | None = None
    features: list[ShardFeatures] = dataclasses.field(default_factory=list)

    def add(self, part: ReadySpineRows | ShardFeatures) -> None:
        if isinstance(part, ReadySpineRows):
            self.spine_rows = part
        else:
            self.features.append(part)

    @property
    def complete(self) -> bool:
        return self.spine_rows is not None and len(self.features) == self.spine_rows.shards

    def envelopes(self) -> list[bytes]:
        spine_rows = [] if self.spine_rows is None else [self.spine_rows.to_envelope()]
        return [*spine_rows, *(each.to_envelope() for each in self.features)]


class Assembly:
    """Assembles the feature rows of one view.

    Args:
        view: the view.
        live: the settings.
    """

    def __init__(self, view: FeatureView, live: LiveSettings) -> None:
        self.view, self.groups = view, shard_groups(view)
        self.dimensions = Dimensions(view, live.dimensions, f"{live.store}/dimensions", live.dimension_every)

    def compute_features(self, ready: ReadySpineRows, parts: Sequence[ShardFeatures]) -> TurnFeatures:
        """The feature rows of a turn from what its shards computed."""
        if ready.dimensions is None:
            self.dimensions.refresh()
        else:
            self.dimensions.use(ready.dimensions)
        features = assemble(self.view, self.groups, ready.rows, parts, self.dimensions.packed)
        size, moment = len(features), pl.Series([now_us()], dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
        rows = with_series(
            features,
            [
                row_ids(self.view.name, [features[name] for name in (*self.view.key, self.view.time)]),
                features[self.view.time].cast(pl.Date).alias("date"),
                pl.Series("__cut", [ready.cut]).new_from_index(0, size),
                *(ready.rows[name] for name in ("__late", "__partition", "__offset", "__place", "__cold")),
                moment.new_from_index(0, size).alias("__answered"),
                pl.Series("__dimensions", [versions_text(self.dimensions.versions)]).new_from_index(0, size),
            ],
        )
        state = sum((each.state for each in parts), StoreSize())
        return TurnFeatures(ready.turn, state, rows, self.dimensions.take_dead_letters(), ready.view)


class AssembleDoFn(beam.DoFn):
    """A turn's spine rows and the features of its shards → its feature rows, once all have arrived."""

    def __init__(self, views: Sequence[FeatureView], live: LiveSettings) -> None:
        self.views, self.live = tuple(views), live
        self.pending = Metrics.gauge("millrace.live", "turns_to_assemble")

    def setup(self) -> None:
        self.mirror = Mirror[dict[tuple[int, int], TurnParts]]()
        self.assemblies = [Assembly(view, self.live) for view in self.views]

    def process(
        self, element: KeyedBytes, head: ValueState = StateParam(HEAD_SPEC), bag: BagState = StateParam(BAG_SPEC)
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        state = read_head(head)

        def build() -> dict[tuple[int, int], TurnParts]:
            turns: dict[tuple[int, int], TurnParts] = {}
            for part in map(assembly_input_of, bag.read()):
                turns.setdefault((part.turn, part.view), TurnParts()).add(part)
            return turns

        turns = self.mirror.get(key, state["version"], build)
        part = assembly_input_of(envelope)
        parts = turns.setdefault((part.turn, part.view), TurnParts())
        parts.add(part)
        if parts.spine_rows is not None and parts.complete:
            features = self.assemblies[part.view].compute_features(parts.spine_rows, parts.features)
            yield pvalue.TaggedOutput("features", (SINGLE_KEY, features.to_envelope()))
            del turns[part.turn, part.view]
            replace_bag(bag, (each for some in turns.values() for each in some.envelopes()))
        else:
            bag.add(envelope)
        state["version"] += 1
        write_head(head, state)
        self.mirror.put(key, state["version"], turns)
        self.pending.set(len(turns))


UNSET = unset_timer()


class CommitDoFn(beam.DoFn):
    """Entries and feature rows of turns → commits of turns in order, one commit per interval.  There is one key."""

    def __init__(self, views: Sequence[FeatureView], live: LiveSettings) -> None:
        self.views, self.live = tuple(views), live
        self.committed = Metrics.counter("millrace.live", "rows_committed")

    def setup(self) -> None:
        self.mirror = Mirror[PendingTurns]()
        self.since = time.monotonic_ns() // 1000

    def process(
        self,
        element: KeyedBytes,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        never: Timer = beam.DoFn.TimerParam(UNSET),
    ) -> Iterator[KeyedBytes]:
        key, envelope = element
        state = read_head(head)

        def build() -> PendingTurns:
            live = self.live
            pending = PendingTurns(self.views, live.store, live.run_id, live.table, live.epoch)
            pending.committed = state.get("committed", 0)
            pending.rows.update(state.get("rows", {}))
            for part in map(commit_input_of, bag.read()):
                pending.take(part)
            return pending

        pending, part = self.mirror.get(key, state["version"], build), commit_input_of(envelope)
        if isinstance(part, TurnEntry | TurnFeatures):
            bag.add(envelope)
            pending.take(part)
        turns, now = pending.whole(), time.monotonic_ns() // 1000
        if turns and (now - self.since >= self.live.commit_every or pending.entries[turns[-1]].record.last):
            status = pending.commit(turns)
            self.since = now
            replace_bag(bag, pending.envelopes())
            yield SINGLE_KEY, json.dumps(status.to_json()).encode()
        state.update(version=state["version"] + 1, committed=pending.committed, rows=pending.rows)
        write_head(head, state)
        self.mirror.put(key, state["version"], pending)

    @on_timer(UNSET)
    def on_never(self) -> None:
        """The timer is never set."""
