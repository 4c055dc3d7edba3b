"""The journal as a DoFn: it checkpoints the journal's state and emits its turns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.userstate import on_timer

from schemas.views import FeatureView
from transforms.records.frame_packets import head_of, pack, unpack
from transforms.records.garbage_collection import freeze_imports
from transforms.records.times import now_us
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.kafka_admin import FirstAvailable
from transforms.streaming.micro_batches import envelopes_of, micro_batches_of
from transforms.streaming.mirrored_state import (
    BAG_SPEC,
    HEAD_SPEC,
    SINGLE_KEY,
    SLOT_SPECS,
    JournalState,
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
from transforms.streaming.recovery import hand_over, restore_journal, start_of
from transforms.streaming.shard_dofns import AssembleDoFn
from transforms.streaming.shards import Shard
from transforms.streaming.wake_ups import clear_wake_up, set_wake_up, wake_timer


class JournalDoFn(beam.DoFn):
    """Envelopes → an envelope per shard concerned, the turn's spine rows, its entry.  Each envelope is a turn, at its
    own time.

    With one shard the shard runs in this DoFn, and the turn's feature rows are emitted instead.
    """

    def __init__(self, view: FeatureView, live: LiveSettings) -> None:
        self.view, self.live = view, live

    def setup(self) -> None:
        freeze_imports()
        self.mirror = Mirror()
        self.assembly = AssembleDoFn(self.view, self.live)
        self.assembly.setup()

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
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        slots = (c0, c1, c2, c3, c4, c5, c6, c7)
        state = read_head(head)
        journal_state = self.held(key, state, bag, slots)
        if "journal" not in state and self.live.begin is not None:
            for turn in hand_over(journal_state.journal, self.live.store, start_of(self.live.begin)):
                yield from self.sent(journal_state, turn)
        bag.add(envelope)
        due = state.setdefault("due", 0)
        journal_state.early[head_of(envelope)["index"]] = envelope
        while due in journal_state.early:  # in order of arrival, in whatever order the runner delivers
            envelope = journal_state.early.pop(due)
            now = head_of(envelope)["arrived"]
            journal_state.inbox += micro_batches_of(envelope)
            yield from self.sent(journal_state, self.turn(journal_state, now))
            due += 1
        state["due"] = due
        self.save(key, state, journal_state, head, bag, slots, journal_state.early.values())

    def held(self, key: bytes, state: Mapping[str, Any], bag: Any, slots: Sequence[Any]) -> JournalState:
        def build() -> JournalState:
            journal = Journal(self.view, self.live.shards, self.live.keep)
            if self.live.kafka is not None:
                journal.next_available = FirstAvailable(self.live.kafka, self.live.prefix)
            if "journal" in state:
                journal.load(state["journal"])
            journal_state = JournalState(journal, Shard(self.view, 0, 1) if self.live.shards == 1 else None)
            journal_state.counts = load_slots(journal_state.stores, slots)
            for envelope in bag.read():
                index = head_of(envelope)["index"]
                if index is None:
                    journal_state.inbox += micro_batches_of(envelope)
                else:
                    journal_state.early[index] = envelope
            return journal_state

        return self.mirror.get(key, state["version"], build)

    def turn(self, journal_state: JournalState, now: int) -> Turn:
        admitted, journal_state.inbox = journal_state.journal.admit(journal_state.inbox, now)
        return journal_state.journal.turn(admitted, now)

    def sent(self, journal_state: JournalState, turn: Turn) -> Iterator[pvalue.TaggedOutput]:
        if journal_state.shard is not None:
            parts = [journal_state.shard.apply(*unpack(envelope)) for envelope in turn.shards.values()]
            if turn.spine_rows is not None:
                answers = self.assembly.compute_features(turn.spine_rows, [part for part in parts if part is not None])
                yield pvalue.TaggedOutput("answers", (SINGLE_KEY, answers))
        else:
            for number, envelope in turn.shards.items():
                yield pvalue.TaggedOutput("shards", (str(number).encode(), envelope))
            if turn.spine_rows is not None:
                yield pvalue.TaggedOutput("spine_rows", (assembler(turn.number), turn.spine_rows))
        yield pvalue.TaggedOutput("entries", (SINGLE_KEY, turn.entry))

    def save(
        self,
        key: bytes,
        state: dict[str, Any],
        journal_state: JournalState,
        head: Any,
        bag: Any,
        slots: Sequence[Any],
        left: Iterable[bytes],
    ) -> None:
        """Write the journal's state; `left` are the envelopes that still wait."""
        bag.clear()
        for envelope in left:
            bag.add(envelope)
        save_slots(journal_state.stores, slots, journal_state.counts)
        state["version"] += 1
        state["journal"] = journal_state.journal.head()
        write_head(head, state)
        self.mirror.put(key, state["version"], journal_state)


WAKE = wake_timer()


class TimedJournalDoFn(JournalDoFn):
    """`JournalDoFn` on the worker's clock: a turn starts when input arrives and `pace` has passed since the last turn
    began.

    Otherwise a timer starts the turn when `pace` has passed.
    """

    def process(  # type: ignore[override]
        self,
        element: KeyedBytes,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        wake: Any = beam.DoFn.TimerParam(WAKE),
        c0: Any = StateParam(SLOT_SPECS[0]),
        c1: Any = StateParam(SLOT_SPECS[1]),
        c2: Any = StateParam(SLOT_SPECS[2]),
        c3: Any = StateParam(SLOT_SPECS[3]),
        c4: Any = StateParam(SLOT_SPECS[4]),
        c5: Any = StateParam(SLOT_SPECS[5]),
        c6: Any = StateParam(SLOT_SPECS[6]),
        c7: Any = StateParam(SLOT_SPECS[7]),
    ) -> Iterator[pvalue.TaggedOutput]:
        key, envelope = element
        state, now = read_head(head), now_us()
        due = state.get("turned", 0) + self.live.pace
        bag.add(envelope)
        if "journal" in state and not now < due <= now + self.live.pace:
            yield from self.taken(key, state, now, head, bag, wake, (c0, c1, c2, c3, c4, c5, c6, c7))
            return
        set_wake_up(state, wake, max(now, due) if due <= now + self.live.pace else now + self.live.pace)
        write_head(head, state)

    @on_timer(WAKE)
    def woken(
        self,
        key: Any = beam.DoFn.KeyParam,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        wake: Any = beam.DoFn.TimerParam(WAKE),
        c0: Any = StateParam(SLOT_SPECS[0]),
        c1: Any = StateParam(SLOT_SPECS[1]),
        c2: Any = StateParam(SLOT_SPECS[2]),
        c3: Any = StateParam(SLOT_SPECS[3]),
        c4: Any = StateParam(SLOT_SPECS[4]),
        c5: Any = StateParam(SLOT_SPECS[5]),
        c6: Any = StateParam(SLOT_SPECS[6]),
        c7: Any = StateParam(SLOT_SPECS[7]),
    ) -> Iterator[pvalue.TaggedOutput]:
        state = read_head(head)
        clear_wake_up(state)
        yield from self.taken(key, state, now_us(), head, bag, wake, (c0, c1, c2, c3, c4, c5, c6, c7))

    def taken(
        self, key: bytes, state: dict[str, Any], now: int, head: Any, bag: Any, wake: Any, slots: Sequence[Any]
    ) -> Iterator[pvalue.TaggedOutput]:
        """Run a turn over the input that has arrived, if there is anything to emit."""
        journal_state = self.held(key, state, _Nothing(), slots)
        envelopes = list(bag.read())
        starts = [each for each in envelopes if head_of(each)["kind"] == "start"]
        if starts and "journal" not in state:
            for turn in restore_journal(
                journal_state.journal, self.live.store, start_of(head_of(starts[0])["start"]), now
            ):
                yield from self.sent(journal_state, turn)
        elif "journal" not in state:  # the state of the tables comes first
            set_wake_up(state, wake, now + self.live.pace)
            write_head(head, state)
            return
        journal_state.inbox = [
            each for envelope in envelopes if envelope not in starts for each in micro_batches_of(envelope)
        ]
        admitted, waiting = journal_state.journal.admit(journal_state.inbox, now)
        over = bool(starts) and journal_state.journal.last  # a job that had ended, and was killed before it reported so
        if admitted or over or journal_state.journal.answerable(now):
            yield from self.sent(journal_state, journal_state.journal.turn(admitted, now))
        else:
            yield pvalue.TaggedOutput("entries", (SINGLE_KEY, pack({"kind": "tick", "turn": 0})))
        left = envelopes_of(waiting)
        state["turned"] = now
        set_wake_up(state, wake, now + (self.live.pace if left else 1_000_000))
        self.save(key, state, journal_state, head, bag, slots, left)


class _Nothing:
    def read(self) -> list[bytes]:
        return []
