"""Rows of one source in time panes: appended cheaply, found by key, dropped pane by pane.

Within a pane rows lie in a few parts of growing size (merged like the levels of a log-structured tree), each with an
index per key that is built when first asked for, so that neither appending nor looking up touches all rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from transforms.ids import UInt64s, combine, hash_column

Ints = npt.NDArray[np.int64]
# Cells that hold a state's panes; more panes than cells share them.
CELLS = 8


def key_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> UInt64s:
    """One hash per row of the key `columns`; integers of any width agree."""
    if not len(frame):
        return np.empty(0, np.uint64)
    return combine([hash_column(frame[name]) for name in columns])


class Part:
    """Some rows of a pane, with an index per key."""

    def __init__(self, frame: pl.DataFrame) -> None:
        self.frame = frame
        self._index: dict[tuple[str, ...], tuple[UInt64s, Ints]] = {}

    def index(self, key: tuple[str, ...]) -> tuple[UInt64s, Ints]:
        """(sorted hashes, their rows)."""
        if key not in self._index:
            hashes = key_hashes(self.frame, key)
            order = np.argsort(hashes, kind="stable")
            self._index[key] = hashes[order], order
        return self._index[key]

    def find(self, key: tuple[str, ...], wanted: UInt64s) -> Ints:
        """Rows whose key hashes to one of `wanted` (distinct), in their order."""
        hashes, order = self.index(key)
        lo, hi = np.searchsorted(hashes, wanted, "left"), np.searchsorted(hashes, wanted, "right")
        lengths = hi - lo
        total = int(lengths.sum())
        if total == len(hashes):
            return np.arange(total)
        starts = np.cumsum(lengths) - lengths
        places = np.arange(total) - np.repeat(starts, lengths) + np.repeat(lo, lengths)
        return np.sort(order[places])


class Panes:
    """A source's rows, for as long as some window can reach them.

    Args:
        time: column of the row's time, by which panes are cut.
        width: length of a pane in µs.

    `changes` lists what happened to each cell since it was last taken: rows to append, or None for "write it anew".
    """

    def __init__(self, time: str, width: int) -> None:
        self.time, self.width = time, max(width, 1)
        self.panes: dict[int, list[Part]] = {}
        self.changes: dict[int, list[pl.DataFrame] | None] = {}
        self.pieces: dict[int, int] = {}

    def __len__(self) -> int:
        return sum(len(part.frame) for parts in self.panes.values() for part in parts)

    @property
    def bytes(self) -> int:
        return sum(int(part.frame.estimated_size()) for parts in self.panes.values() for part in parts)

    def add(self, frame: pl.DataFrame, record: bool = True) -> None:
        """Take rows in, any order of times."""
        if not len(frame):
            return
        numbers = _moments(frame, self.time) // self.width
        low, high = int(numbers.min()), int(numbers.max())
        for number in [low] if low == high else np.unique(numbers).tolist():
            part = frame if low == high else frame.filter(pl.Series(numbers == number))
            self._append(self.panes.setdefault(number, []), part)
            if record:
                self._note(number, part)

    def _append(self, parts: list[Part], frame: pl.DataFrame) -> None:
        while parts and len(parts[-1].frame) <= 2 * len(frame):
            frame = pl.concat([parts.pop().frame, frame])
        parts.append(Part(frame))

    def _note(self, number: int, part: pl.DataFrame | None) -> None:
        cell = number % CELLS
        if part is None:
            self.changes[cell] = None
        elif (changes := self.changes.setdefault(cell, [])) is not None:
            changes.append(part)

    def _parts(self, low: int, high: int) -> Iterator[Part]:
        """Parts of panes that have times in `[low, high)`."""
        first, last = low // self.width, (high - 1) // self.width
        for number in sorted(self.panes):
            if first <= number <= last:
                yield from self.panes[number]

    def take(self, key: tuple[str, ...], wanted: UInt64s, low: int, high: int) -> list[pl.DataFrame]:
        """Rows of panes that reach into `[low, high)` whose `key` hashes to one of `wanted`; a few others may be among them."""
        wanted = np.unique(wanted)
        found = []
        for part in self._parts(low, high):
            rows = part.find(key, wanted)
            if len(rows):
                found.append(part.frame if len(rows) == len(part.frame) else part.frame[rows])
        return found

    def all(self) -> list[pl.DataFrame]:
        return [part.frame for number in sorted(self.panes) for part in self.panes[number]]

    def cell(self, cell: int) -> list[pl.DataFrame]:
        """All rows that cell `cell` holds, a frame per pane."""
        numbers = sorted(number for number in self.panes if number % CELLS == cell)
        return [pl.concat([part.frame for part in self.panes[number]]) for number in numbers]

    def evict(self, horizon: int) -> int:
        """Drop panes that end at or before `horizon`; how many rows went."""
        dropped = 0
        for number in [number for number in self.panes if (number + 1) * self.width <= horizon]:
            dropped += sum(len(part.frame) for part in self.panes.pop(number))
            self._note(number, None)
        return dropped

    def drop(self, column: str, values: UInt64s | Ints) -> pl.DataFrame | None:
        """Take out the rows whose `column` (an integer) is one of `values`; the rows taken."""
        gone = []
        for number, parts in self.panes.items():
            for i, part in enumerate(parts):
                hit = np.isin(part.frame[column].to_numpy(), values)
                if hit.any():
                    gone.append(part.frame.filter(pl.Series(hit)))
                    parts[i] = Part(part.frame.filter(pl.Series(~hit)))
                    self._note(number, None)
            parts[:] = [part for part in parts if len(part.frame)]
        self.panes = {number: parts for number, parts in self.panes.items() if parts}
        return pl.concat(gone) if gone else None

    def take_before(self, bound: int) -> list[pl.DataFrame]:
        """Take out the rows with time at or before `bound`."""
        taken = []
        for number in sorted(self.panes):
            if number * self.width > bound:
                break
            rest = []
            for part in self.panes[number]:
                before = _moments(part.frame, self.time) <= bound
                if before.any():
                    taken.append(part.frame if before.all() else part.frame.filter(pl.Series(before)))
                    self._note(number, None)
                if not before.all():
                    rest.append(Part(part.frame.filter(pl.Series(~before))) if before.any() else part)
            self.panes[number] = rest
        self.panes = {number: parts for number, parts in self.panes.items() if parts}
        return taken


def _moments(frame: pl.DataFrame, time: str) -> Ints:
    return frame[time].to_physical().to_numpy()


def take_changes(stores: Mapping[str, Panes]) -> dict[int, list[tuple[str, pl.DataFrame]] | None]:
    """What to do to each cell: frames to append with their store's name, or None to write it anew from `cell_of`."""
    changes: dict[int, list[tuple[str, pl.DataFrame]] | None] = {}
    for name, store in stores.items():
        for cell, frames in store.changes.items():
            if frames is None or (cell in changes and changes[cell] is None):
                changes[cell] = None
            else:
                known = changes.setdefault(cell, [])
                assert known is not None
                known += [(name, frame) for frame in frames]
        store.changes = {}
    return changes


def cell_of(stores: Mapping[str, Panes], cell: int) -> list[tuple[str, pl.DataFrame]]:
    """Everything a cell holds."""
    return [(name, frame) for name, store in stores.items() for frame in store.cell(cell)]
