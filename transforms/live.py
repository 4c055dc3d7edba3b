"""Live features: messages → journal → shards → assembled answers → tables.  One graph for every runner.

Each stateful step is a plain object (`Journal`, `Shard`, `Ledger`) with its state mirrored in Beam's: an object in memory is
used as long as its version is the state's, and built anew from the state where it is not (another worker, a retry, a
restored checkpoint).  So a turn writes what it adds and reads nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam import pvalue, typehints
from apache_beam.coders import BytesCoder
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec, TimerSpec, on_timer
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from schemas.live import live_schema
from schemas.views import FeatureView
from transforms.batches import batch
from transforms.contracts import Contract
from transforms.dimensions import Dimensions
from transforms.ids import row_ids
from transforms.journal import Journal, Micro, Turn, micro_packet, micros
from transforms.live_tables import Ledger
from transforms.messages import Decoded, Message, by_partition, decode
from transforms.packets import head_of, pack, unpack
from transforms.panes import CELLS, Panes, cell_of, take_changes
from transforms.resume import resume, start_of
from transforms.shards import Shard, assemble, groups_of, versions_text

ONE = b"0"
# Pieces a cell may have before it is written anew as one.
PIECES = 24
Keyed = tuple[bytes, bytes]


@dataclasses.dataclass(frozen=True)
class Live:
    """How a live job works.  Times are µs.

    Args:
        store: where its tables lie.
        run_id: begins the names of its files.
        dimensions: folder of the dimensions.
        shards: parallel shards of keys.
        keep: how long after the spine's clock a late question is still answered.
        pace: least time between turns; 0 takes one per packet, at the packet's own time (replay).
        commit_every: least time between commits.
        dimension_every: how often dimensions are looked at.
        prefix: before the names of topics.
        table: whether answers go to the table.
    """

    store: str
    run_id: str
    dimensions: str
    shards: int = 2
    keep: int = 3_600_000_000
    pace: int = 200_000
    commit_every: int = 10_000_000
    dimension_every: int = 60_000_000
    prefix: str = ""
    table: bool = True


@dataclasses.dataclass(eq=False)  # Beam sets the label
class LiveFeatures(beam.PTransform):  # type: ignore[misc]
    """PCollection of packets (bytes, see `Decode…`) → tagged PCollections: `features` (RecordBatch of `live_schema(view)`, one per turn),
    `commits` (what the tables were told as JSON, one per commit) and `letters` (packets of dead letters); the latter two keyed.

    Args:
        view: what to compute.
        live: how.
    """

    view: FeatureView
    live: Live

    def expand(self, packets: beam.PCollection) -> dict[str, beam.PCollection]:
        view, live = self.view, self.live
        step = JournalStep if not live.pace else TimedJournalStep
        journal = (
            packets
            | "ToJournal" >> beam.Map(_keyed).with_output_types(Keyed)
            | "Journal" >> _keyed_step(step(view, live), "shards", "questions", "entries", "letters")
        )
        answers = _pairs(journal.shards) | "Shard" >> _keyed_step(ShardStep(view, live))
        asked = (_pairs(journal.questions), answers) | "Parts" >> beam.Flatten()
        assembled = asked | "Assemble" >> _keyed_step(AssembleStep(view, live), "answers")
        features = _pairs(assembled.answers) | "Features" >> beam.Map(_features, live_schema(view)).with_output_types(pa.RecordBatch)
        ledger = (_pairs(journal.entries), _pairs(assembled.answers)) | "Turns" >> beam.Flatten()
        commits = ledger | "Commit" >> _keyed_step(CommitStep(view, live))
        return {"features": features, "commits": commits, "letters": _pairs(journal.letters)}


def _pairs(pairs: beam.PCollection) -> beam.PCollection:
    pairs.element_type = typehints.Tuple[bytes, bytes]
    return pairs


def _keyed(packet: bytes) -> Keyed:
    return ONE, packet


def _features(pair: Keyed, schema: pa.Schema) -> pa.RecordBatch:
    return batch(unpack(pair[1])[1]["rows"], schema)


def _keyed_step(step: beam.DoFn, *tags: str) -> Any:
    done = beam.ParDo(step).with_output_types(Keyed)
    return done.with_outputs(*tags) if tags else done


# -- messages → packets --------------------------------------------------------------------------------------------


def contracts_of(view: FeatureView) -> dict[str, Contract]:
    """What rows of each topic are judged by: the columns that features read, all of a spine's."""
    spine = Contract(view.spine, tuple(view.spine.schema), tuple(view.key))
    return {
        view.spine.name: spine,
        **{name: Contract(source, tuple(view.columns_read(name))) for name, source in view.events.items() if source is not view.spine},
    }


def decoded(contracts: Mapping[str, Contract], messages: Iterable[Message], prefix: str = "", index: int | None = None, came: int = 0) -> bytes:
    """Messages of any topics and partitions as one packet for the journal."""
    parts, arrived = [], 0
    for (topic, partition), some in by_partition(messages).items():
        source = topic.removeprefix(prefix)
        held = decode(contracts[source], some)
        parts.append((source, partition, some[0].offset, some[-1].offset + 1, len(some), held))
        arrived = max(arrived, *(each.timestamp for each in some), 0)
    return micro_packet(parts, arrived, index, came)


class DecodeChunks(beam.DoFn):  # type: ignore[misc]
    """(number, messages) of a replay → packet."""

    def __init__(self, view: FeatureView, prefix: str = "") -> None:
        self.view, self.prefix = view, prefix

    def setup(self) -> None:
        self.contracts = contracts_of(self.view)

    def process(self, chunk: tuple[int, list[Message]]) -> Iterator[bytes]:
        yield decoded(self.contracts, chunk[1], self.prefix, chunk[0])


class DecodeBundles(beam.DoFn):  # type: ignore[misc]
    """Message → packets, one for all messages of a bundle."""

    def __init__(self, view: FeatureView, prefix: str = "") -> None:
        self.view, self.prefix = view, prefix

    def setup(self) -> None:
        self.contracts = contracts_of(self.view)

    def start_bundle(self) -> None:
        self.messages: list[Message] = []

    def process(self, message: Message) -> Iterable[bytes]:
        self.messages.append(message)
        return ()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.messages:
            packet = decoded(self.contracts, self.messages, self.prefix, came=_now())
            self.messages = []
            yield WindowedValue(packet, MIN_TIMESTAMP, [GlobalWindow()])


# -- stateful steps ------------------------------------------------------------------------------------------------


class Mirror:
    """Objects in memory by key, each good for one version of its state."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[int, Any]] = {}

    def get(self, key: bytes, version: int, build: Callable[[], Any]) -> Any:
        known = self._held.get(key)
        if known is None or known[0] != version:
            known = (version, build())
            self._held[key] = known
        return known[1]

    def put(self, key: bytes, version: int, value: Any) -> None:
        self._held[key] = (version, value)


def load_cells(stores: Mapping[str, Panes], cells: Sequence[Any]) -> list[int]:
    """Fill `stores` from their cells; how many pieces each cell has."""
    counts = []
    for cell in cells:
        pieces = list(cell.read())
        counts.append(len(pieces))
        for piece in pieces:
            head, frames = unpack(piece)
            stores[head["store"]].add(frames["rows"], record=False)
    return counts


def save_cells(stores: Mapping[str, Panes], cells: Sequence[Any], counts: list[int]) -> None:
    """Write what has changed in `stores`: appended, or a cell anew."""
    for number, frames in take_changes(stores).items():
        cell = cells[number]
        if frames is None or counts[number] + len(frames) > PIECES:
            cell.clear()
            counts[number] = 0
            frames = cell_of(stores, number)
        for name, frame in frames:
            cell.add(pack({"store": name}, {"rows": frame}))
        counts[number] += len(frames)


def _read(head: Any) -> dict[str, Any]:
    value = head.read()
    return json.loads(value) if value else {"version": 0}


def _write(head: Any, value: Mapping[str, Any]) -> None:
    head.write(json.dumps(value, separators=(",", ":")).encode())


@dataclasses.dataclass(eq=False)
class HeldJournal:
    journal: Journal
    inbox: list[Micro]
    early: dict[int, bytes]
    counts: list[int]


HEAD, BAG = ReadModifyWriteStateSpec("head", BytesCoder()), BagStateSpec("bag", BytesCoder())
CELL = [BagStateSpec(f"cell_{number}", BytesCoder()) for number in range(CELLS)]
StateParam = beam.DoFn.StateParam


class JournalStep(beam.DoFn):  # type: ignore[misc]
    """Packets → a packet per shard concerned, the turn's questions, its entry.  A turn per packet, at the packet's own time."""

    def __init__(self, view: FeatureView, live: Live) -> None:
        self.view, self.live = view, live

    def setup(self) -> None:
        self.mirror = Mirror()

    def process(
        self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[pvalue.TaggedOutput]:  # fmt: skip
        key, packet = element
        cells = (c0, c1, c2, c3, c4, c5, c6, c7)
        told = _read(head)
        held = self.held(key, told, bag, cells)
        bag.add(packet)
        due = told.setdefault("due", 0)
        held.early[head_of(packet)["index"]] = packet
        while due in held.early:  # in order of arrival, whatever the runner's
            packet = held.early.pop(due)
            now = head_of(packet)["arrived"]
            held.inbox += micros(packet)
            yield from self.sent(self.turn(held, now))
            due += 1
        told["due"] = due
        self.save(key, told, held, head, bag, cells, held.early.values())

    def held(self, key: bytes, told: Mapping[str, Any], bag: Any, cells: Sequence[Any]) -> HeldJournal:
        def build() -> HeldJournal:
            journal = Journal(self.view, self.live.shards, self.live.keep)
            if "journal" in told:
                journal.load(told["journal"])
            held = HeldJournal(journal, [], {}, load_cells(journal.stores, cells))
            for packet in bag.read():
                index = head_of(packet)["index"]
                if index is None:
                    held.inbox += micros(packet)
                else:
                    held.early[index] = packet
            return held

        return self.mirror.get(key, told["version"], build)  # type: ignore[no-any-return]

    def turn(self, held: HeldJournal, now: int) -> Turn:
        admitted, held.inbox = held.journal.admit(held.inbox, now)
        return held.journal.turn(admitted, now)

    def sent(self, turn: Turn) -> Iterator[pvalue.TaggedOutput]:
        for number, packet in turn.shards.items():
            yield pvalue.TaggedOutput("shards", (str(number).encode(), packet))
        if turn.questions is not None:
            yield pvalue.TaggedOutput("questions", (_assembler(turn.number), turn.questions))
        yield pvalue.TaggedOutput("entries", (ONE, turn.entry))
        if turn.letters is not None:
            yield pvalue.TaggedOutput("letters", (ONE, turn.letters))

    def save(self, key: bytes, told: dict[str, Any], held: HeldJournal, head: Any, bag: Any, cells: Sequence[Any], left: Iterable[bytes]) -> None:
        """Write the journal down; `left` are the packets that still wait."""
        bag.clear()
        for packet in left:
            bag.add(packet)
        save_cells(held.journal.stores, cells, held.counts)
        told["version"] += 1
        told["journal"] = held.journal.head()
        _write(head, told)
        self.mirror.put(key, told["version"], held)


WAKE = TimerSpec("wake", TimeDomain.REAL_TIME)


class TimedJournalStep(JournalStep):
    """As `JournalStep`, with at most one turn per `pace`, at the worker's time; the timer only wakes it up."""

    def process(  # type: ignore[override]
        self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG), wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> None:  # fmt: skip
        told = _read(head)
        bag.add(element[1])
        now = _now()
        told["arrivals"] = told.get("arrivals", 0) + 1
        at = now + self.live.pace
        if not now - 5_000_000 < told.get("wake", 0) <= at:
            told["wake"] = at
            wake.set(at / 1e6)
        _write(head, told)

    @on_timer(WAKE)
    def woken(
        self, key: Any = beam.DoFn.KeyParam, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG), wake: Any = beam.DoFn.TimerParam(WAKE),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[pvalue.TaggedOutput]:  # fmt: skip
        cells = (c0, c1, c2, c3, c4, c5, c6, c7)
        told, now = _read(head), _now()
        held = self.held(key, told, _Nothing(), cells)
        packets = list(bag.read())
        starts = [each for each in packets if head_of(each)["kind"] == "start"]
        if starts and "journal" not in told:
            for turn in resume(held.journal, self.live.store, start_of(head_of(starts[0])["start"]), now):
                yield from self.sent(turn)
        elif "journal" not in told:  # what the tables say comes first
            told["wake"] = now + self.live.pace
            wake.set(told["wake"] / 1e6)
            _write(head, told)
            return
        held.inbox = [each for packet in packets if packet not in starts for each in micros(packet)]
        admitted, waiting = held.journal.admit(held.inbox, now)
        if admitted or held.journal.answerable(now):
            yield from self.sent(held.journal.turn(admitted, now))
        else:
            yield pvalue.TaggedOutput("entries", (ONE, pack({"kind": "tick", "turn": 0})))
        left = packets_of(waiting)
        told["wake"] = now + (self.live.pace if left else 1_000_000)
        wake.set(told["wake"] / 1e6)
        self.save(key, told, held, head, bag, cells, left)


class _Nothing:
    def read(self) -> list[bytes]:
        return []


def packets_of(waiting: Sequence[Micro]) -> list[bytes]:
    """Each micro-batch as a packet of its own again."""
    return [
        micro_packet(
            [(each.source, each.partition, each.first, each.next, each.messages, Decoded(each.rows, each.letters, each.heartbeat))],
            0, came=each.came,
        )
        for each in waiting
    ]  # fmt: skip


class ShardStep(beam.DoFn):  # type: ignore[misc]
    """(shard, turn's packet) → (assembler, answers).  Packets are applied in the order of their numbers."""

    def __init__(self, view: FeatureView, live: Live) -> None:
        self.view, self.live = view, live
        self.rows = Metrics.distribution("millrace.live", "shard_rows")

    def setup(self) -> None:
        self.mirror = Mirror()

    def process(
        self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG),
        c0: Any = StateParam(CELL[0]), c1: Any = StateParam(CELL[1]), c2: Any = StateParam(CELL[2]), c3: Any = StateParam(CELL[3]),
        c4: Any = StateParam(CELL[4]), c5: Any = StateParam(CELL[5]), c6: Any = StateParam(CELL[6]), c7: Any = StateParam(CELL[7]),
    ) -> Iterator[Keyed]:  # fmt: skip
        key, packet = element
        cells = (c0, c1, c2, c3, c4, c5, c6, c7)
        told = _read(head)

        def build() -> tuple[Shard, list[int], dict[int, bytes]]:
            shard = Shard(self.view, int(key), self.live.shards)
            return shard, load_cells(shard.stores, cells), {head_of(each)["number"]: each for each in bag.read()}

        shard, counts, early = self.mirror.get(key, told["version"], build)
        due = told.get("due", 0)
        early[head_of(packet)["number"]] = packet
        held_back = len(early) > 1 or due not in early
        while due in early:
            turn, frames = unpack(early.pop(due))
            answer = shard.apply(turn, frames)
            if answer is not None:
                yield _assembler(turn["turn"]), answer
            due += 1
        early = {number: each for number, each in early.items() if number >= due}
        if held_back:
            bag.clear()
            for each in early.values():
                bag.add(each)
        save_cells(shard.stores, cells, counts)
        told.update(version=told["version"] + 1, due=due)
        _write(head, told)
        self.mirror.put(key, told["version"], (shard, counts, early))
        self.rows.update(sum(len(store) for store in shard.stores.values()))


def _assembler(turn: int) -> bytes:
    return str(turn % 4).encode()


class AssembleStep(beam.DoFn):  # type: ignore[misc]
    """A turn's questions and the shards' parts → its answers, once all are there; also as a packet for the tables."""

    def __init__(self, view: FeatureView, live: Live) -> None:
        self.view, self.live = view, live
        self.pending = Metrics.gauge("millrace.live", "turns_to_assemble")

    def setup(self) -> None:
        self.mirror = Mirror()
        self.groups = groups_of(self.view)
        kept = f"{self.live.store}/dimensions"
        self.dimensions = Dimensions(self.view, self.live.dimensions, kept, self.live.dimension_every)

    def process(self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG)) -> Iterator[pvalue.TaggedOutput]:
        key, packet = element
        told = _read(head)

        def build() -> dict[int, list[bytes]]:
            turns: dict[int, list[bytes]] = {}
            for each in bag.read():
                turns.setdefault(head_of(each)["turn"], []).append(each)
            return turns

        turns = self.mirror.get(key, told["version"], build)
        number = head_of(packet)["turn"]
        parts = turns.setdefault(number, [])
        parts.append(packet)
        heads = [head_of(each) for each in parts]
        wanted = next((each["parts"] for each in heads if "parts" in each), None)
        if wanted is not None and len(parts) == wanted + 1:
            asked = next(each for each, one in zip(parts, heads, strict=True) if "parts" in one)
            yield pvalue.TaggedOutput("answers", (ONE, self.answer(asked, [each for each in parts if each is not asked])))
            del turns[number]
            bag.clear()
            for each in (each for some in turns.values() for each in some):
                bag.add(each)
        else:
            bag.add(packet)
        told["version"] += 1
        _write(head, told)
        self.mirror.put(key, told["version"], turns)
        self.pending.set(len(turns))

    def answer(self, asked: bytes, parts: Sequence[bytes]) -> bytes:
        head, frames = unpack(asked)
        questions = frames["questions"]
        self.dimensions.refresh()
        features = assemble(self.view, self.groups, questions, parts, self.dimensions.frames)
        moment = pl.lit(_now(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        rows = features.with_columns(
            row_ids(self.view.name, [features[name] for name in (*self.view.key, self.view.time)]),
            pl.col(self.view.time).dt.date().alias("date"), pl.lit(head["cut"]).alias("__cut"),
            *(questions[name] for name in ("__late", "__partition", "__offset", "__place")),
            moment.alias("__answered"), pl.lit(versions_text(self.dimensions.versions)).alias("__dimensions"),
        )  # fmt: skip
        return pack({"kind": "features", "turn": head["turn"]}, {"rows": rows})


class CommitStep(beam.DoFn):  # type: ignore[misc]
    """Entries and answers of turns → commits.  One key: turns in order, an interval at a time."""

    def __init__(self, view: FeatureView, live: Live) -> None:
        self.view, self.live = view, live
        self.committed = Metrics.counter("millrace.live", "rows_committed")

    def setup(self) -> None:
        self.mirror = Mirror()
        self.since = time.monotonic_ns() // 1000

    def process(self, element: Keyed, head: Any = StateParam(HEAD), bag: Any = StateParam(BAG)) -> Iterator[Keyed]:
        key, packet = element
        told = _read(head)

        def build() -> Ledger:
            ledger = Ledger(self.view, self.live.store, self.live.run_id, self.live.table)
            ledger.committed = told.get("committed", 0)
            ledger.rows.update(told.get("rows", {}))
            for each in bag.read():
                ledger.take(each)
            return ledger

        ledger = self.mirror.get(key, told["version"], build)
        if head_of(packet).get("kind") != "tick":
            bag.add(packet)
            ledger.take(packet)
        turns = ledger.whole()
        now = time.monotonic_ns() // 1000
        if turns and (now - self.since >= self.live.commit_every or head_of(ledger.entries[turns[-1]])["last"]):
            summary = ledger.commit(turns)
            self.since = now
            bag.clear()
            for each in (*ledger.entries.values(), *ledger.answers.values()):
                bag.add(each)
            yield ONE, json.dumps({**summary, "rows": ledger.rows}).encode()
        told.update(version=told["version"] + 1, committed=ledger.committed, rows=ledger.rows)
        _write(head, told)
        self.mirror.put(key, told["version"], ledger)


def _now() -> int:
    return time.time_ns() // 1000
