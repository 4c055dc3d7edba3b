"""Objects in memory mirrored in Beam's state: used while their version is the state's, built anew from it where not.

So a turn writes what it adds and reads nothing, and another worker, a retry or a restored checkpoint finds all of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec

from transforms.records.frame_packets import pack, unpack
from transforms.streaming.journal import Journal
from transforms.streaming.kafka import Broker
from transforms.streaming.micro_batches import MicroBatch
from transforms.streaming.pane_store import SLOTS, Store, slot_contents, take_changes
from transforms.streaming.shards import Shard

# The one key of what must be one.
SINGLE_KEY = b"0"
# Pieces a cell may have before it is written anew as one.
PIECES = 24
KeyedBytes = tuple[bytes, bytes]


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """How a live job works.  Times are µs.

    Args:
        store: where its tables lie.
        run_id: begins the names of its files.
        dimensions: folder of the dimensions.
        shards: parallel shards of keys; one works in the journal's own step, without a way through the runner.
        keep: how long after the spine's clock a late question is still answered.
        pace: least time between turns; 0 takes one per packet, at the packet's own time (replay).
        commit_every: least time between commits.
        dimension_every: how often dimensions are looked at.
        prefix: before the names of topics.
        table: whether answers go to the table.
        kafka: where messages come from; None: a replay.
        begin: of a replay, where it begins (`resume.Start` as JSON); None: with nothing.
    """

    store: str
    run_id: str
    dimensions: str
    shards: int = 1
    keep: int = 3_600_000_000
    pace: int = 200_000
    commit_every: int = 10_000_000
    dimension_every: int = 60_000_000
    prefix: str = ""
    table: bool = True
    kafka: Broker | None = None
    begin: Mapping[str, Any] | None = None


class Mirror:
    """Objects in memory by key, each good for one version of its state."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[int, Any]] = {}

    def get(self, key: bytes, version: int, build: Callable[[], Any]) -> Any:
        """The object, until it is `put` back: one that an error left half changed is not used again."""
        known = self._held.pop(key, None)
        return known[1] if known is not None and known[0] == version else build()

    def put(self, key: bytes, version: int, value: Any) -> None:
        self._held[key] = (version, value)


def load_slots(stores: Mapping[str, Store], slots: Sequence[Any]) -> list[int]:
    """Fill `stores` from their cells; how many pieces each cell has."""
    counts = []
    for slot in slots:
        pieces = list(slot.read())
        counts.append(len(pieces))
        for piece in pieces:
            head, frames = unpack(piece)
            stores[head["store"]].restore(head["pane"], frames["rows"])
    return counts


def save_slots(stores: Mapping[str, Store], slots: Sequence[Any], counts: list[int]) -> None:
    """Write what has changed in `stores`: appended, or a cell anew."""
    for number, pieces in take_changes(stores).items():
        slot = slots[number]
        if pieces is None or counts[number] + len(pieces) > PIECES:
            slot.clear()
            counts[number] = 0
            pieces = slot_contents(stores, number)
        for name, bucket, rows in pieces:
            slot.add(pack({"store": name, "pane": bucket}, {"rows": rows}))
        counts[number] += len(pieces)


def read_head(head: Any) -> dict[str, Any]:
    value = head.read()
    return json.loads(value) if value else {"version": 0}


def write_head(head: Any, value: Mapping[str, Any]) -> None:
    head.write(json.dumps(value, separators=(",", ":")).encode())


@dataclasses.dataclass(eq=False)
class JournalState:
    """The journal, what waits for it, and, where there is but one, the shard."""

    journal: Journal
    shard: Shard | None
    inbox: list[MicroBatch] = dataclasses.field(default_factory=list)
    early: dict[int, bytes] = dataclasses.field(default_factory=dict)
    counts: list[int] = dataclasses.field(default_factory=list)

    @property
    def stores(self) -> dict[str, Store]:
        """All that is kept in cells."""
        shards = {} if self.shard is None else self.shard.stores
        return {**self.journal.stores, **{f"shard {name}": store for name, store in shards.items()}}


HEAD_SPEC, BAG_SPEC = ReadModifyWriteStateSpec("head", BytesCoder()), BagStateSpec("bag", BytesCoder())
SLOT_SPECS = [BagStateSpec(f"cell_{number}", BytesCoder()) for number in range(SLOTS)]
StateParam = beam.DoFn.StateParam


def assembler(turn: int) -> bytes:
    return str(turn % 4).encode()
