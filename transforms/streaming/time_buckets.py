"""Rows of one source in time buckets: they are appended cheaply, found by key, and evicted by bucket.

The rows of a bucket are in a few parts of increasing size, which are merged like the levels of a log-structured merge
tree.  Each part has an index per key, which is built when it is first needed.  So neither an addition nor a lookup
reads all rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import polars as pl

from transforms.features.packed_events import SMALL, DistinctKeys, IndexedRows
from transforms.records.arrays import Ints, UInt64s
from transforms.records.columns import moments_of
from transforms.records.times import ALWAYS, FOREVER

# A bucket and some of its rows.
Piece = tuple[int, pl.DataFrame]


class Change(NamedTuple):
    """A change of a store.

    Args:
        bucket: which bucket.
        rows: its new rows, or all its rows.
        whole: whether these are all its rows.
    """

    bucket: int
    rows: pl.DataFrame
    whole: bool = False


# Number of slots of checkpointed state; buckets share them.
SLOTS = 8
# The most buckets that rows added at once are split into.  Rows of more buckets are put into wider ones: otherwise a
# job that catches up would split them into very small parts.
SPREAD = 8
# Parts of all buckets but the last one are joined up to this many rows when few rows are looked up.
JOINED = 100_000
MINUTE = 60_000_000


class TimeBuckets:
    """A source's rows, for as long as some window can reach them.

    Args:
        time: column of the row's time.
        width: length of a bucket, µs.
        keys: columns by which rows are looked up.

    Bucket n ends at (n + 1) · width, and usually begins where n − 1 ends.
    """

    def __init__(self, time: str, width: int, keys: Iterable[tuple[str, ...]] = ()) -> None:
        self.time, self.width, self.keys = time, max(width, 1), tuple(keys)
        self.buckets: dict[int, list[IndexedRows]] = {}
        self._joined: dict[tuple[int, ...], tuple[list[IndexedRows], IndexedRows]] = {}
        self._added: list[Change] = []
        self._rewritten: set[int] = set()
        self._nothing: pl.DataFrame | None = None

    def __len__(self) -> int:
        return sum(len(part) for parts in self.buckets.values() for part in parts)

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
        if not len(frame):
            self._nothing = frame
            return
        self._append(bucket, frame, int(moments_of(frame, self.time).min()))

    def _add(self, number: int, frame: pl.DataFrame, low: int) -> None:
        self._append(number, frame, low)
        self._added.append(Change(number, frame))

    def _append(self, number: int, frame: pl.DataFrame, low: int) -> None:
        parts = self.buckets.setdefault(number, [])
        if self._nothing is None:
            self._nothing = frame.clear()
        while parts and len(parts[-1]) <= max(2 * len(frame), SMALL - len(frame)):
            if len(parts[-1]) + len(frame) <= SMALL:
                parts[-1].add(frame, low)
                return
            before = parts.pop()
            frame, low = pl.concat([before.frame, frame]), min(low, before.low)
        parts.append(IndexedRows(frame, low, self.keys))

    def take_changes(self) -> list[Change]:
        """Returns and clears the changes."""
        changes = [each for each in self._added if each.bucket not in self._rewritten]
        for number in sorted(self._rewritten):
            parts = [part.frame for part in self.buckets.get(number, ())]
            assert self._nothing is not None
            changes.append(Change(number, pl.concat(parts) if parts else self._nothing, whole=True))
        self._added, self._rewritten = [], set()
        return changes

    def parts(self, low: int, high: int) -> Iterator[IndexedRows]:
        """The parts that may have rows with times in `[low, high)`."""
        for number in sorted(self.buckets):
            if (number + 1) * self.width > low:
                yield from (part for part in self.buckets[number] if part.low < high)

    def few_parts(self, low: int, high: int) -> list[IndexedRows]:
        """As `parts`, with those of buckets before the last one joined: to search each would cost more."""
        last = self.buckets[max(self.buckets)] if self.buckets else []
        newest = {id(part) for part in last}
        before = [part for part in self.parts(ALWAYS, FOREVER) if id(part) not in newest]
        large, small = (
            self._joined_parts([part for part in before if (len(part) > SMALL) == wanted], most)
            for wanted, most in ((True, JOINED), (False, SMALL))
        )
        self._joined = {key: self._joined[key] for key in (*large, *small) if key in self._joined}
        return [part for part in [*large.values(), *small.values(), *last] if part.low < high]

    def _joined_parts(self, parts: Sequence[IndexedRows], most: int) -> dict[tuple[int, ...], IndexedRows]:
        """Neighbouring parts joined, each of at most `most` rows, by what identifies them."""
        result = dict[tuple[int, ...], IndexedRows]()
        some, size = list[IndexedRows](), 0
        for part in [*parts, None]:
            if part is not None and (not some or size + len(part) <= most):
                some.append(part)
                size += len(part)
                continue
            if some:
                # The parts are kept beside what was joined, so that their ids stay theirs.
                key = tuple(n for each in some for n in (id(each), len(each)))
                if len(some) > 1 and key not in self._joined:
                    rows = pl.concat([each.frame for each in some], rechunk=True)
                    self._joined[key] = some, IndexedRows(rows, min(each.low for each in some), self.keys)
                result[key] = self._joined[key][1] if len(some) > 1 else some[0]
            if part is not None:
                some, size = [part], len(part)
        return result

    def take(self, key: tuple[str, ...], wanted: UInt64s, low: int, high: int) -> list[pl.DataFrame]:
        """Rows of buckets that overlap `[low, high)`, if their `key` has one of the hashes `wanted`.

        The result may include a few rows outside the interval.
        """
        wanted = np.unique(wanted)
        found = []
        for part in self.parts(low, high):
            rows = part.find_hashes(key, wanted, self.time)
            if len(rows):
                found.append(part.frame if len(rows) == len(part.frame) else part.frame[rows])
        return found

    def holds(self, key: tuple[str, ...], wanted: DistinctKeys) -> bool:
        """Whether some row has one of the keys `wanted`."""
        return any(part.holds(key, wanted, self.time) for part in self.few_parts(ALWAYS, FOREVER))

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
            self._rewritten.add(number)
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
                    self._rewritten.add(number)
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
                self._rewritten.add(number)
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
    """An object in slots of checkpointed state: its content by slot, and the changes since they were last taken."""

    def __len__(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def slot(self, slot: int) -> list[Piece]: ...
    def take_changes(self) -> list[Change]: ...
    def restore(self, bucket: int, frame: pl.DataFrame, /) -> None: ...


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
