"""The journal as a DoFn: it checkpoints the journal's state and emits its turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.userstate import on_timer

from schemas.views import FeatureView
from transforms.records.frame_packets import Head, head_of
from transforms.records.garbage_collection import freeze_imports
from transforms.records.times import now_us
from transforms.streaming.journal import Journal, JournalCheckpoint, Turn
from transforms.streaming.kafka_admin import FirstAvailable
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.micro_batches import MicroBatch, envelopes_of, micro_batches_of
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
    shard_key,
    with_slots,
    write_head,
)
from transforms.streaming.recovery import hand_over, restore_journal
from transforms.streaming.shard_dofns import Assembly
from transforms.streaming.shards import Shard
from transforms.streaming.step_messages import TICK, ShardFeatures, start_of
from transforms.streaming.time_buckets import Store
from transforms.streaming.wake_ups import Timer, clear_wake_up, set_wake_up, wake_timer


@dataclasses.dataclass(frozen=True, eq=False)
class KeyState:
    """The state of the journal's key, as Beam passes it.

    Args:
        head: the journal's checkpoint, and the time of the next turn.
        bag: envelopes that wait.
        slots: the rows of the journal's stores, and of the shard's if it runs in the same step.
    """

    head: ValueState
    bag: BagState
    slots: Slots


@dataclasses.dataclass(eq=False)
class JournalState:
    """What the step holds in memory.

    Args:
        journal: the journal.
        shards: by number of a view its shard, if it has only one; else empty.
        inbox: micro-batches that are not admitted yet.
        early: in a replay, envelopes that arrived before an earlier one, by their index.
        counts: number of pieces of each slot.
    """

    journal: Journal
    shards: list[Shard]
    inbox: list[MicroBatch] = dataclasses.field(default_factory=list)
    early: dict[int, bytes] = dataclasses.field(default_factory=dict)
    counts: list[int] = dataclasses.field(default_factory=list)

    @property
    def stores(self) -> dict[str, Store]:
        """Everything that is kept in slots."""
        inside = {
            f"shard {name}" if len(self.shards) == 1 else f"shard {view} {name}": store
            for view, shard in enumerate(self.shards)
            for name, store in shard.stores.items()
        }
        return {**self.journal.stores, **inside}


class JournalDoFn(beam.DoFn):
    """Envelopes → the inputs of the shards, the spine rows to assemble, and the entry of each turn.

    Each envelope is a turn, at its own time.  With one shard the shard and the assembly run in this step: their inputs
    are not serialised, and the turn's feature rows are emitted instead.
    """

    def __init__(self, views: Sequence[FeatureView], live: LiveSettings) -> None:
        self.views, self.live = tuple(views), live

    def setup(self) -> None:
        freeze_imports()
        self.mirror = Mirror[JournalState]()
        self.assemblies = [Assembly(view, self.live) for view in self.views]

    @with_slots
    def process(
        self,
        element: KeyedBytes,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        slots: Slots = (),
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        stored, state = KeyState(head, bag, slots), read_head(head)
        held = self.held(key, state, stored)
        if "journal" not in state and self.live.begin is not None:
            for turn in hand_over(held.journal, self.live.store, self.live.begin):
                yield from self.outputs(held, turn)
        bag.add(envelope)
        due = state.setdefault("due", 0)
        held.early[head_of(envelope)["index"]] = envelope
        while due in held.early:  # in order of arrival, in whatever order the runner delivers
            envelope = held.early.pop(due)
            held.inbox += micro_batches_of(envelope)
            now = head_of(envelope)["arrived"]
            admitted, held.inbox = held.journal.admit(held.inbox, now)
            yield from self.outputs(held, held.journal.turn(admitted, now))
            due += 1
        state["due"] = due
        self.save(key, state, held, stored, held.early.values())

    def held(self, key: bytes, state: Head, stored: KeyState, waiting: bool = True) -> JournalState:
        """The state in memory, or else the checkpoint.

        Args:
            key: the key.
            state: the head of its state.
            stored: its state, as Beam passes it.
            waiting: whether envelopes that wait are read from the bag.
        """

        def build() -> JournalState:
            journal = Journal(self.views, self.live.shards, self.live.keep)
            for part, assembly in zip(journal.parts, self.assemblies, strict=True):
                if part.keys.dimensions:
                    part.dimensions = assembly.dimensions
            if self.live.kafka is not None:
                journal.next_available = FirstAvailable(self.live.kafka, self.live.prefix)
            if "journal" in state:
                journal.load(JournalCheckpoint.of_json(state["journal"]))
            held = JournalState(journal, [Shard(view, 0, 1) for view in self.views] if self.live.shards == 1 else [])
            held.counts = load_slots(held.stores, stored.slots)
            for envelope in stored.bag.read() if waiting else ():
                index = head_of(envelope)["index"]
                if index is None:
                    held.inbox += micro_batches_of(envelope)
                else:
                    held.early[index] = envelope
            return held

        return self.mirror.get(key, state["version"], build)

    def outputs(self, held: JournalState, turn: Turn) -> Iterator[pvalue.TaggedOutput]:
        """The outputs of a turn, as envelopes with their keys."""
        for given in turn.views:
            ready = given.spine_rows
            if held.shards:
                computed = [held.shards[given.view].apply(each) for each in given.shards.values()]
                if ready is not None:
                    parts = [each for each in computed if isinstance(each, ShardFeatures)]
                    features = self.assemblies[given.view].compute_features(ready, parts)
                    yield pvalue.TaggedOutput("features", (SINGLE_KEY, features.to_envelope()))
                continue
            for number, each in given.shards.items():
                yield pvalue.TaggedOutput("shards", (shard_key(given.view, number), each.to_envelope()))
            if ready is not None:
                yield pvalue.TaggedOutput("spine_rows", (assembler(turn.number), ready.to_envelope()))
        yield pvalue.TaggedOutput("entries", (SINGLE_KEY, turn.entry.to_envelope()))

    def save(self, key: bytes, state: Head, held: JournalState, stored: KeyState, left: Iterable[bytes]) -> None:
        """Writes the state; `left` are the envelopes that still wait."""
        replace_bag(stored.bag, left)
        save_slots(held.stores, stored.slots, held.counts)
        state["version"] += 1
        state["journal"] = held.journal.checkpoint().to_json()
        write_head(stored.head, state)
        self.mirror.put(key, state["version"], held)


WAKE = wake_timer()


class TimedJournalDoFn(JournalDoFn):
    """`JournalDoFn` on the worker's clock: a turn starts when input arrives and `pace` has passed since the last turn
    began.

    Otherwise a timer starts the turn when `pace` has passed.
    """

    @with_slots
    def process(
        self,
        element: KeyedBytes,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        wake: Timer = beam.DoFn.TimerParam(WAKE),
        slots: Slots = (),
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        state, now = read_head(head), now_us()
        due = state.get("turned", 0) + self.live.pace
        bag.add(envelope)
        if "journal" in state and not now < due <= now + self.live.pace:
            yield from self.take_turn(key, state, now, KeyState(head, bag, slots), wake)
            return
        set_wake_up(state, wake, max(now, due) if due <= now + self.live.pace else now + self.live.pace)
        write_head(head, state)

    @on_timer(WAKE)
    @with_slots
    def woken(
        self,
        key: bytes = beam.DoFn.KeyParam,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        wake: Timer = beam.DoFn.TimerParam(WAKE),
        slots: Slots = (),
    ) -> Iterator[pvalue.TaggedOutput]:
        state = read_head(head)
        clear_wake_up(state)
        yield from self.take_turn(key, state, now_us(), KeyState(head, bag, slots), wake)

    def take_turn(
        self, key: bytes, state: Head, now: int, stored: KeyState, wake: Timer
    ) -> Iterator[pvalue.TaggedOutput]:
        """Runs a turn over the input that has arrived, if there is anything to emit."""
        held = self.held(key, state, stored, waiting=False)
        starts, held.inbox = [], list[MicroBatch]()
        for envelope in stored.bag.read():
            start = start_of(envelope)
            if start is None:
                held.inbox += micro_batches_of(envelope)
            else:
                starts.append(start)
        if starts and "journal" not in state:
            for turn in restore_journal(held.journal, self.live.store, starts[0], now):
                yield from self.outputs(held, turn)
        elif "journal" not in state:  # the state of the tables comes first
            set_wake_up(state, wake, now + self.live.pace)
            write_head(stored.head, state)
            return
        admitted, waiting = held.journal.admit(held.inbox, now)
        over = bool(starts) and held.journal.last  # the job had ended, but was killed before it reported this
        if admitted or over or held.journal.answerable(now):
            yield from self.outputs(held, held.journal.turn(admitted, now))
        else:
            yield pvalue.TaggedOutput("entries", (SINGLE_KEY, TICK))
        state["turned"] = now
        set_wake_up(state, wake, now + (self.live.pace if waiting else 1_000_000))
        self.save(key, state, held, stored, envelopes_of(waiting))
