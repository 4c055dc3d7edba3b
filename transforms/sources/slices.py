"""Parts of a source's files that are read by themselves."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from typing import Any

from transforms.records.pickled_once import PickledOnce


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row group of a Parquet file, or a piece of a text file.

    Args:
        path: the file.
        group: its number.
        first: the number of its first row in the file; in text the number of its line, of which the first is 1.
        rows: number of rows.
        low, high: bounds of its times in µs, both inclusive.
        stamp: of the file; changes with its content.
        offset, size: bytes of a piece of text, before compression.
        lines: number of its lines.
    """

    path: str
    group: int
    first: int
    rows: int
    low: int
    high: int
    stamp: str = ""
    offset: int = 0
    size: int = 0
    lines: int = 0

    @property
    def end(self) -> int:
        """The number after that of its last row."""
        return self.first + (self.lines or self.rows)


class Slices(PickledOnce, tuple[Slice, ...]):
    """Row groups of a source."""

    def overlapping(self, low: int, high: int) -> Slices:
        """Those that may have rows in `[low, high)` µs."""
        found = Slices(each for each in self if each.low < high and each.high >= low)
        return self if len(found) == len(self) else found

    def joined(self, more: Sequence[Slice]) -> Slices:
        """These, and those of `more` that are not among them."""
        return Slices(dict.fromkeys([*self, *more])) if more else self

    def pickled_state(self) -> object:
        return [list(map(operator.attrgetter(name), self)) for name in _FIELDS]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[Any]]) -> Slices:
        return cls(map(Slice, *state))


_FIELDS = tuple(field.name for field in dataclasses.fields(Slice))
