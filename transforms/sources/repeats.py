"""Repeats: rows that satisfy the contract, but follow another row with the same `unique` value.

Rows with the same value are in the order in which they became known: by time, then by the columns that break ties.  A
row is a repeat if another one, itself a repeat or not, became known before it by at most the *memory*.  Batch remembers
everything, so there the first row stays.  Whether a row is a repeat therefore depends on the rows alone and not on the
order in which they are read, and a further row can only turn a row that counts into a repeat.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl

from schemas.sources import Source
from transforms.records.arrays import Ints

NEVER_REPEATED = 2**62
_ROW = "__row"


@dataclasses.dataclass(frozen=True)
class KnownOrder:
    """The order in which the rows with one `unique` value became known.

    Args:
        unique: the columns that identify repeats; they are never null.
        time: the column of the time.
        ties: columns that order rows of one time.
    """

    unique: tuple[str, ...]
    time: str
    ties: tuple[str, ...]

    @classmethod
    def of(
        cls, source: Source, unique: Sequence[str], columns: Sequence[str], places: Sequence[str] = ()
    ) -> KnownOrder:
        """The order of a source's rows.

        Args:
            source: the source.
            unique: the columns that identify repeats.
            columns: the columns of these rows; those that break ties are used in the source's order.
            places: columns that order rows whose `columns` are equal.
        """
        return cls(tuple(unique), str(source.time), (*source.ties(columns), *places))

    def sort(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Sorts `rows` by their `unique` values, and rows with the same value in the order in which they became
        known."""
        return rows.sort(list(dict.fromkeys([*self.unique, self.time, *self.ties])), maintain_order=True)

    def first(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The first row with each `unique` value."""
        return self.sort(rows).unique(list(self.unique), keep="first", maintain_order=True)

    def repeated_from(self, rows: pl.DataFrame, shown: Ints, memory: int = NEVER_REPEATED) -> Ints:
        """For each row, the number from which on it is a repeat.

        Args:
            rows: the rows.
            shown: for each row, the number from which on it is known, such as the position of a cut; `NEVER_REPEATED`:
                it makes no other row a repeat.
            memory: µs.

        Returns:
            For each row, the least number of the rows that make it a repeat; `NEVER_REPEATED` if there are none.
        """
        result = np.full(len(rows), NEVER_REPEATED, np.int64)
        several = np.flatnonzero(rows.select(self.unique).is_duplicated().to_numpy())
        if not len(several):
            return result
        known = self.sort(rows[several].with_columns(pl.Series(_ROW, several)))
        moments = known[self.time].to_physical().to_numpy()
        groups = known.select(pl.struct(self.unique).rle_id()).to_series().to_numpy().astype(np.int64)
        at = known[_ROW].to_numpy()
        result[at] = _least_before(shown[at], _first_within(groups, moments, memory))
        return result


def _first_within(groups: Ints, moments: Ints, memory: int) -> Ints:
    """For each row, in order, the position of the first row of its group that is at most `memory` older."""
    bounds = moments - min(memory, NEVER_REPEATED)  # times are within about ±2^60
    kinds = np.repeat([1, 0], len(groups))  # a bound comes before the rows of its time
    merged = np.lexsort((kinds, np.concatenate([moments, bounds]), np.concatenate([groups, groups])))
    before = np.cumsum(merged < len(groups))
    bound = merged >= len(groups)
    result = np.empty(len(groups), np.int64)
    result[merged[bound] - len(groups)] = before[bound]
    return result


def _least_before(values: Ints, starts: Ints) -> Ints:
    """For each position i, the least of `values[starts[i]:i]`; `NEVER_REPEATED` if it is empty."""
    lengths = np.arange(len(values)) - starts
    result = np.full(len(values), NEVER_REPEATED, np.int64)
    least, width = values, 1  # least[i] is the least of values[i : i + width]
    while (mine := np.flatnonzero((lengths >= width) & (lengths < 2 * width))).size or (lengths >= 2 * width).any():
        result[mine] = np.minimum(least[starts[mine]], least[mine - width])
        least = np.minimum(least[:-width], least[width:])
        width *= 2
    return result
