"""Objects in memory that mirror Beam's state of a key.

A step uses the object in memory if its version is the version in the state, and builds it from the state otherwise.  So
a turn writes what it adds and reads nothing, and another worker, a retry or a restored checkpoint finds everything.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec

from transforms.records.frame_packets import Head, pack, unpack
from transforms.streaming.time_buckets import SLOTS, Change, Store

Held = TypeVar("Held")
Output = TypeVar("Output")
KeyedBytes = tuple[bytes, bytes]
# The key of a step that has only one key.
SINGLE_KEY = b"0"
# The most pieces of a slot; a slot with more is rewritten as one piece.
PIECES = 100


class ValueState(Protocol):
    """State that holds one value, as Beam passes it to a DoFn."""

    def read(self) -> bytes | None: ...
    def write(self, value: bytes) -> None: ...


class BagState(Protocol):
    """State that holds a bag of values, as Beam passes it to a DoFn."""

    def read(self) -> Iterable[bytes]: ...
    def add(self, value: bytes) -> None: ...
    def clear(self) -> None: ...


HEAD_SPEC, BAG_SPEC = ReadModifyWriteStateSpec("head", BytesCoder()), BagStateSpec("bag", BytesCoder())
SLOT_SPECS = [BagStateSpec(f"cell_{number}", BytesCoder()) for number in range(SLOTS)]
StateParam = beam.DoFn.StateParam
# The slots of a key.
Slots = Sequence[BagState]


def with_slots(method: Callable[..., Output]) -> Callable[..., Output]:
    """Passes the slots of a key to a DoFn's method as one sequence, its last parameter.

    Beam passes each state as a separate parameter, and finds them by the method's signature.
    """
    signature = inspect.signature(method)
    *others, _ = signature.parameters.values()
    slots = [
        inspect.Parameter(f"slot_{number}", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=StateParam(spec))
        for number, spec in enumerate(SLOT_SPECS)
    ]
    seen_by_beam = signature.replace(parameters=[*others, *slots])

    @functools.wraps(method)
    def call(*args: object, **kwargs: object) -> Output:
        values = list(seen_by_beam.bind(*args, **kwargs).arguments.values())
        return method(*values[:-SLOTS], values[-SLOTS:])

    call.__signature__ = seen_by_beam  # type: ignore[attr-defined]
    return call


class Mirror(Generic[Held]):
    """Objects in memory by key, each valid for one version of its state."""

    def __init__(self) -> None:
        self._held: dict[bytes, tuple[int, Held]] = {}

    def get(self, key: bytes, version: int, build: Callable[[], Held]) -> Held:
        """The object of a key, or a new one.  It must be `put` back; after an error it is not, because it may be half
        changed."""
        known = self._held.pop(key, None)
        return known[1] if known is not None and known[0] == version else build()

    def put(self, key: bytes, version: int, value: Held) -> None:
        self._held[key] = (version, value)


def load_slots(stores: Mapping[str, Store], slots: Slots) -> list[int]:
    """Fills `stores` from their slots.  Returns the number of pieces of each slot."""
    counts = []
    for slot in slots:
        pieces = [unpack(piece) for piece in slot.read()]
        counts.append(len(pieces))
        pieces.sort(key=lambda piece: piece[0].get("at", 0))  # a bag has no order
        whole = {(head["store"], head["pane"]): n for n, (head, _) in enumerate(pieces) if head.get("whole")}
        for n, (head, frames) in enumerate(pieces):
            if n >= whole.get((head["store"], head["pane"]), 0):
                stores[head["store"]].restore(head["pane"], frames["rows"])
    return counts


def save_slots(stores: Mapping[str, Store], slots: Slots, counts: list[int]) -> None:
    """Writes the changes of `stores`: they are appended to a slot, or it is rewritten.  Updates `counts`."""
    changes: dict[int, list[tuple[str, Change]]] = {}
    for name, store in stores.items():
        for change in store.take_changes():
            changes.setdefault(change.bucket % SLOTS, []).append((name, change))
    for number, pieces in changes.items():
        slot = slots[number]
        if counts[number] + len(pieces) > PIECES:
            slot.clear()
            counts[number] = 0
            pieces = [(name, Change(*piece)) for name, store in stores.items() for piece in store.slot(number)]
        for at, (name, change) in enumerate(pieces, counts[number]):
            head = {"store": name, "pane": change.bucket, "at": at}
            slot.add(pack({**head, "whole": True} if change.whole else head, {"rows": change.rows}))
        counts[number] += len(pieces)


def read_head(head: ValueState) -> Head:
    """The head of a key's state: a JSON object with at least its version."""
    value = head.read()
    return json.loads(value) if value else {"version": 0}


def write_head(head: ValueState, value: Head) -> None:
    head.write(json.dumps(value, separators=(",", ":")).encode())


def replace_bag(bag: BagState, values: Iterable[bytes]) -> None:
    """Writes a bag anew."""
    values = list(values)
    bag.clear()
    for value in values:
        bag.add(value)


def shard_key(view: int, shard: int) -> bytes:
    """The key of a view's shard."""
    return f"{view}:{shard}".encode()


def shard_of_key(key: bytes) -> tuple[int, int]:
    """The numbers of the view and of its shard.

    >>> shard_of_key(shard_key(1, 7))
    (1, 7)
    """
    view, shard = key.split(b":")
    return int(view), int(shard)


def assembler(turn: int) -> bytes:
    """The key of the assembly of a turn: a few turns are assembled in parallel."""
    return str(turn % 4).encode()
