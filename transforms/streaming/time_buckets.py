"""Rows of one source in time buckets: they are appended cheaply, found by key, and evicted by bucket.

The rows of a bucket are in a few parts of increasing size, which are merged like the levels of a log-structured merge
tree.  Each part has an index per key, which is built when it is first needed.  So neither an addition nor a lookup
reads all rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import polars as pl

from transforms.records.arrays import Ints, UInt64s
from transforms.records.columns import moments_of
from transforms.records.row_hashing import combine_hashes, hash_columns

# A bucket and some of its rows.
Piece = tuple[int, pl.DataFrame]
# Number of slots of checkpointed state; buckets share them.
SLOTS = 8
# The most buckets that rows added at once are split into.  Rows of more buckets are put into wider ones: otherwise a
# job that catches up would split them into very small parts.
SPREAD = 8
# Small parts of a bucket are merged into parts of up to this many rows, because searching each part costs more.
SMALL = 1000
MINUTE = 60_000_000


def key_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> UInt64s:
    """One hash per row of the key `columns`; integers of different widths have equal hashes."""
    return keys_hashes(frame, [tuple(columns)])[tuple(columns)]


def keys_hashes(frame: pl.DataFrame, keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], UInt64s]:
    """As `key_hashes`, for several keys."""
    keys = list(dict.fromkeys(keys))
    if not len(frame):
        return {key: np.empty(0, np.uint64) for key in keys}
    hashed = hash_columns(frame, [name for key in keys for name in key])
    return {key: combine_hashes([hashed[name] for name in key]) for key in keys}


class IndexedRows:
    """Some rows of a bucket, none before `low` µs, with an index per key; the indexes of `keys` are built together."""

    def __init__(self, frame: pl.DataFrame, low: int, keys: Sequence[tuple[str, ...]] = ()) -> None:
        self.frame, self.low, self.keys = frame, low, keys
        self._index: dict[tuple[str, ...], tuple[UInt64s, Ints]] = {}

    @functools.cached_property
    def _frame_bytes(self) -> int:
        return int(self.frame.estimated_size())

    @property
    def bytes(self) -> int:
        """Bytes of its rows and indexes."""
        return self._frame_bytes + sum(hashes.nbytes + rows.nbytes for hashes, rows in self._index.values())

    def index(self, key: tuple[str, ...]) -> tuple[UInt64s, Ints]:
        """Returns the sorted hashes and the rows that they belong to."""
        if key not in self._index:
            for each, hashes in keys_hashes(self.frame, {key, *(self.keys if key in self.keys else ())}).items():
                order = np.argsort(hashes, kind="stable")
                self._index[each] = hashes[order], order
        return self._index[key]

    def find(self, key: tuple[str, ...], wanted: UInt64s) -> Ints:
        """Positions, ascending, of the rows whose key has one of the hashes `wanted`, which are distinct."""
        hashes, order = self.index(key)
        lo, hi = hashes.searchsorted(wanted, "left"), hashes.searchsorted(wanted, "right")
        lengths = hi - lo
        total = int(lengths.sum())
        if not total:
            return np.empty(0, np.int64)
        if total == len(hashes):
            return np.arange(total)
        starts = np.cumsum(lengths) - lengths
        positions = np.arange(total) - np.repeat(starts, lengths) + np.repeat(lo, lengths)
        return np.sort(order[positions])


class TimeBuckets:
    """A source's rows, for as long as some window can reach them.

    Args:
        time: column of the row's time.
        width: length of a bucket, µs.
        keys: columns by which rows are looked up.

    Bucket n ends at (n + 1) · width, and usually begins where n − 1 ends.  `changes` has the changes of each slot since
    they were last read: (bucket, rows) to append, or None if the slot must be rewritten.
    """

    def __init__(self, time: str, width: int, keys: Iterable[tuple[str, ...]] = ()) -> None:
        self.time, self.width, self.keys = time, max(width, 1), tuple(keys)
        self.buckets: dict[int, list[IndexedRows]] = {}
        self.changes: dict[int, list[Piece] | None] = {}

    def __len__(self) -> int:
        return sum(len(part.frame) for parts in self.buckets.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for parts in self.buckets.values() for part in parts)

    def add(self, frame: pl.DataFrame) -> None:
        """Adds rows, in any order of times."""
        if not len(frame):
            return
        moments = moments_of(frame, self.time)
        numbers = moments // self.width
        low, high = int(numbers.min()), int(numbers.max())
        if low == high:
            self._add(low, frame, int(moments.min()))
            return
        numbers |= (1 << ((high - low) // SPREAD).bit_length()) - 1  # the last of several buckets that are joined
        order = np.argsort(numbers, kind="stable")
        numbers, moments, frame = numbers[order], moments[order], frame[order]
        starts = np.concatenate([[0], np.flatnonzero(numbers[1:] != numbers[:-1]) + 1])
        for start, end, first in zip(
            starts, [*starts[1:], len(numbers)], np.minimum.reduceat(moments, starts), strict=True
        ):
            self._add(int(numbers[start]), frame[int(start) : int(end)], int(first))

    def restore(self, bucket: int, frame: pl.DataFrame) -> None:
        """Adds rows of a bucket from its slot."""
        self._append(bucket, frame, int(moments_of(frame, self.time).min()))

    def _add(self, number: int, frame: pl.DataFrame, low: int) -> None:
        self._append(number, frame, low)
        if (changes := self.changes.setdefault(number % SLOTS, [])) is not None:
            changes.append((number, frame))

    def _append(self, number: int, frame: pl.DataFrame, low: int) -> None:
        parts = self.buckets.setdefault(number, [])
        while parts and len(parts[-1].frame) <= max(2 * len(frame), SMALL - len(frame)):
            before = parts.pop()
            frame, low = pl.concat([before.frame, frame]), min(low, before.low)
        parts.append(IndexedRows(frame.rechunk() if len(frame) <= SMALL else frame, low, self.keys))

    def _rewrite(self, number: int) -> None:
        self.changes[number % SLOTS] = None

    def _parts(self, low: int, high: int) -> Iterator[IndexedRows]:
        """The parts that may have rows with times in `[low, high)`."""
        for number in sorted(self.buckets):
            if (number + 1) * self.width > low:
                yield from (part for part in self.buckets[number] if part.low < high)

    def take(self, key: tuple[str, ...], wanted: UInt64s, low: int, high: int) -> list[pl.DataFrame]:
        """Rows of buckets that overlap `[low, high)`, if their `key` has one of the hashes `wanted`.

        The result may include a few rows outside the interval.
        """
        wanted = np.unique(wanted)
        found = []
        for part in self._parts(low, high):
            rows = part.find(key, wanted)
            if len(rows):
                found.append(part.frame if len(rows) == len(part.frame) else part.frame[rows])
        return found

    def all(self) -> list[pl.DataFrame]:
        return [part.frame for number in sorted(self.buckets) for part in self.buckets[number]]

    def slot(self, slot: int) -> list[Piece]:
        """All rows of a slot, by bucket."""
        numbers = sorted(number for number in self.buckets if number % SLOTS == slot)
        return [(number, pl.concat([part.frame for part in self.buckets[number]])) for number in numbers]

    def evict(self, horizon: int) -> list[pl.DataFrame]:
        """Drops the buckets that end at or before `horizon`.  Returns their rows."""
        dropped = []
        for number in sorted(number for number in self.buckets if (number + 1) * self.width <= horizon):
            dropped += [part.frame for part in self.buckets.pop(number)]
            self._rewrite(number)
        return dropped

    def drop(self, column: str, values: UInt64s | Ints) -> pl.DataFrame | None:
        """Removes the rows whose `column` (an integer) is one of `values`.  Returns them, or None."""
        gone = []
        for number, parts in self.buckets.items():
            for i, part in enumerate(parts):
                hit = np.isin(part.frame[column].to_numpy(), values)
                if hit.any():
                    gone.append(part.frame.filter(pl.Series(hit)))
                    parts[i] = IndexedRows(part.frame.filter(pl.Series(~hit)), part.low, self.keys)
                    self._rewrite(number)
            parts[:] = [part for part in parts if len(part.frame)]
        self.buckets = {number: parts for number, parts in self.buckets.items() if parts}
        return pl.concat(gone) if gone else None

    def take_before(self, bound: int) -> list[pl.DataFrame]:
        """Removes the rows with times at or before `bound`.  Returns them."""
        taken = []
        for number in sorted(self.buckets):
            rest = []
            for part in self.buckets[number]:
                before = moments_of(part.frame, self.time) <= bound if part.low <= bound else np.zeros(0, np.bool_)
                if not before.any():
                    rest.append(part)
                    continue
                self._rewrite(number)
                if before.all():
                    taken.append(part.frame)
                else:
                    hit = pl.Series(before)
                    taken.append(part.frame.filter(hit))
                    rest.append(IndexedRows(part.frame.filter(~hit), part.low, self.keys))
            self.buckets[number] = rest
        self.buckets = {number: parts for number, parts in self.buckets.items() if parts}
        return taken


class Store(Protocol):
    """An object in slots of checkpointed state: its content by slot, and the changes since they were last read."""

    changes: dict[int, list[Piece] | None]

    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def slot(self, slot: int) -> list[Piece]: ...
    def restore(self, bucket: int, frame: pl.DataFrame, /) -> None: ...


def take_changes(stores: Mapping[str, Store]) -> dict[int, list[tuple[str, int, pl.DataFrame]] | None]:
    """Returns and clears the changes by slot: (store, bucket, rows) to append; None: rewrite it (`slot_contents`)."""
    changes: dict[int, list[tuple[str, int, pl.DataFrame]] | None] = {}
    for name, store in stores.items():
        for slot, pieces in store.changes.items():
            if pieces is None or (slot in changes and changes[slot] is None):
                changes[slot] = None
            else:
                known = changes.setdefault(slot, [])
                assert known is not None
                known += [(name, *piece) for piece in pieces]
        store.changes = {}
    return changes


def slot_contents(stores: Mapping[str, Store], slot: int) -> list[tuple[str, int, pl.DataFrame]]:
    """All rows of a slot, as (store, bucket, rows)."""
    return [(name, *piece) for name, store in stores.items() for piece in store.slot(slot)]


@dataclasses.dataclass(frozen=True)
class StoreSize:
    """Number of rows of some stores, and their bytes in memory."""

    rows: int = 0
    bytes: int = 0

    def __add__(self, other: StoreSize) -> StoreSize:
        return StoreSize(self.rows + other.rows, self.bytes + other.bytes)


def size_of(stores: Iterable[Store]) -> StoreSize:
    stores = list(stores)
    return StoreSize(sum(map(len, stores)), sum(store.bytes for store in stores))
