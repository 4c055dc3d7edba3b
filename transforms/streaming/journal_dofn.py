"""The journal as a step of a pipeline: its state kept, its turns sent on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam import pvalue
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import TimerSpec, on_timer

from schemas.views import FeatureView
from transforms.records.frame_packets import head_of, pack, unpack
from transforms.records.garbage_collection import spare_imports
from transforms.records.times import now_us
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.kafka_admin import FirstThere
from transforms.streaming.micro_batches import micros, packets_of
from transforms.streaming.mirrored_state import (
    BAG,
    CELL,
    HEAD,
    ONE,
    HeldJournal,
    Keyed,
    Live,
    Mirror,
    StateParam,
    assembler,
    load_cells,
    read_head,
    save_cells,
    write_head,
)
from transforms.streaming.recovery import resume, start_of
from transforms.streaming.shard_dofns import AssembleStep
from transforms.streaming.shards import Shard


class JournalStep(beam.DoFn):
    """Packets → a packet per shard concerned, the turn's questions, its entry.  A turn per packet, at the packet's own time.

    A single shard works here, and the turn's answers are sent on instead.
    """

    def __init__(self, view: FeatureView, live: Live) -> None:
        self.view, self.live = view, live

    def setup(self) -> None:
        spare_imports()
        self.mirror = Mirror()
        self.assembly = AssembleStep(self.view, self.live)
        self.assembly.setup()

    def process(
        self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[pvalue.TaggedOutput]:  # fmt: skip
        key, packet = element
        cells = (c0, c1, c2, c3, c4, c5, c6, c7)
        told = read_head(head)
        held = self.held(key, told, bag, cells)
        bag.add(packet)
        due = told.setdefault("due", 0)
        held.early[head_of(packet)["index"]] = packet
        while due in held.early:  # in order of arrival, whatever the runner's
            packet = held.early.pop(due)
            now = head_of(packet)["arrived"]
            held.inbox += micros(packet)
            yield from self.sent(held, self.turn(held, now))
            due += 1
        told["due"] = due
        self.save(key, told, held, head, bag, cells, held.early.values())

    def held(self, key: bytes, told: Mapping[str, Any], bag: Any, cells: Sequence[Any]) -> HeldJournal:
        def build() -> HeldJournal:
            journal = Journal(self.view, self.live.shards, self.live.keep)
            if self.live.kafka is not None:
                journal.next_there = FirstThere(self.live.kafka, self.live.prefix)
            if "journal" in told:
                journal.load(told["journal"])
            held = HeldJournal(journal, Shard(self.view, 0, 1) if self.live.shards == 1 else None)
            held.counts = load_cells(held.stores, cells)
            for packet in bag.read():
                index = head_of(packet)["index"]
                if index is None:
                    held.inbox += micros(packet)
                else:
                    held.early[index] = packet
            return held

        return self.mirror.get(key, told["version"], build)

    def turn(self, held: HeldJournal, now: int) -> Turn:
        admitted, held.inbox = held.journal.admit(held.inbox, now)
        return held.journal.turn(admitted, now)

    def sent(self, held: HeldJournal, turn: Turn) -> Iterator[pvalue.TaggedOutput]:
        if held.shard is not None:
            parts = [held.shard.apply(*unpack(packet)) for packet in turn.shards.values()]
            if turn.questions is not None:
                answers = self.assembly.answer(turn.questions, [part for part in parts if part is not None])
                yield pvalue.TaggedOutput("answers", (ONE, answers))
        else:
            for number, packet in turn.shards.items():
                yield pvalue.TaggedOutput("shards", (str(number).encode(), packet))
            if turn.questions is not None:
                yield pvalue.TaggedOutput("questions", (assembler(turn.number), turn.questions))
        yield pvalue.TaggedOutput("entries", (ONE, turn.entry))

    def save(
        self,
        key: bytes,
        told: dict[str, Any],
        held: HeldJournal,
        head: Any,
        bag: Any,
        cells: Sequence[Any],
        left: Iterable[bytes],
    ) -> None:
        """Write the journal down; `left` are the packets that still wait."""
        bag.clear()
        for packet in left:
            bag.add(packet)
        save_cells(held.stores, cells, held.counts)
        told["version"] += 1
        told["journal"] = held.journal.head()
        write_head(head, told)
        self.mirror.put(key, told["version"], held)


WAKE = TimerSpec("wake", TimeDomain.REAL_TIME)


class TimedJournalStep(JournalStep):
    """As `JournalStep`, at the worker's time: a turn as soon as something comes, if the one before began `pace` ago or longer;
    else a timer wakes it up then."""

    def process(  # type: ignore[override]
        self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG), wake: Any = beam.DoFn.TimerParam(WAKE),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[pvalue.TaggedOutput]:  # fmt: skip
        key, packet = element
        told, now = read_head(head), now_us()
        due = told.get("turned", 0) + self.live.pace
        bag.add(packet)
        if "journal" in told and not now < due <= now + self.live.pace:
            yield from self.taken(key, told, now, head, bag, wake, (c0, c1, c2, c3, c4, c5, c6, c7))
            return
        self.arm(told, wake, max(now, due) if due <= now + self.live.pace else now + self.live.pace)
        write_head(head, told)

    @on_timer(WAKE)
    def woken(
        self, key: Any = beam.DoFn.KeyParam, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG), wake: Any = beam.DoFn.TimerParam(WAKE),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[pvalue.TaggedOutput]:  # fmt: skip
        told = read_head(head)
        told["wake"] = 0
        yield from self.taken(key, told, now_us(), head, bag, wake, (c0, c1, c2, c3, c4, c5, c6, c7))

    def arm(self, told: dict[str, Any], wake: Any, at: int) -> None:
        """Wake up at `at`, unless that is to happen before."""
        if not now_us() - 5_000_000 < told.get("wake", 0) <= at:
            told["wake"] = at
            wake.set(at / 1e6)

    def taken(
        self, key: bytes, told: dict[str, Any], now: int, head: Any, bag: Any, wake: Any, cells: Sequence[Any]
    ) -> Iterator[pvalue.TaggedOutput]:
        """Take in what has come, as a turn if there is anything to tell."""
        held = self.held(key, told, _Nothing(), cells)
        packets = list(bag.read())
        starts = [each for each in packets if head_of(each)["kind"] == "start"]
        if starts and "journal" not in told:
            for turn in resume(held.journal, self.live.store, start_of(head_of(starts[0])["start"]), now):
                yield from self.sent(held, turn)
        elif "journal" not in told:  # what the tables say comes first
            self.arm(told, wake, now + self.live.pace)
            write_head(head, told)
            return
        held.inbox = [each for packet in packets if packet not in starts for each in micros(packet)]
        admitted, waiting = held.journal.admit(held.inbox, now)
        over = bool(starts) and held.journal.last  # a job that had ended, and was killed before it said so
        if admitted or over or held.journal.answerable(now):
            yield from self.sent(held, held.journal.turn(admitted, now))
        else:
            yield pvalue.TaggedOutput("entries", (ONE, pack({"kind": "tick", "turn": 0})))
        left = packets_of(waiting)
        told["turned"] = now
        self.arm(told, wake, now + (self.live.pace if left else 1_000_000))
        self.save(key, told, held, head, bag, cells, left)


class _Nothing:
    def read(self) -> list[bytes]:
        return []
