"""Digests of a source's rows by day. Equal rows have equal digests, regardless of their order and files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import polars as pl

from transforms.records.row_hashing import combine_hashes, hash_column
from transforms.records.times import day_number
from transforms.sources.contracts import Contract, rows_of_source

# Maps a day (days since 1970) to (number of rows, sum of the rows' hashes mod 2**64).
Digests = dict[int, tuple[int, int]]
_MASK = 2**64 - 1


def day_digests(contract: Contract, frame: pl.DataFrame, low: int = -(2**62), high: int = 2**62) -> Digests:
    """The digest of each day, over the rows (valid or rejected) with a plausible time in `[low, high)` µs."""
    frame = rows_of_source(contract, frame)
    moments = frame[str(contract.source.time)].to_physical()
    low, high = max(low, contract.earliest), min(high, contract.latest)
    inside = (moments >= low) & (moments < high)
    if not inside.all() or moments.null_count():
        frame = frame.filter(inside.fill_null(False))
        moments = frame[str(contract.source.time)].to_physical()
    if not len(frame):
        return {}
    hashes = combine_hashes([hash_column(frame[name]) for name in contract.read])
    days = day_number(moments.to_numpy())
    if (days[1:] < days[:-1]).any():
        order = np.argsort(days, kind="stable")
        days, hashes = days[order], hashes[order]
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(days[1:] != days[:-1]) + 1])
    sums = np.add.reduceat(hashes, starts)
    counts = np.diff(np.append(starts, len(days)))
    return {int(day): (int(count), int(total)) for day, count, total in zip(days[starts], counts, sums, strict=True)}


def add_digests(parts: Iterable[Mapping[int, tuple[int, int]]]) -> Digests:
    """Adds the digests of disjoint sets of rows."""
    result: Digests = {}
    for part in parts:
        for day, (rows, total) in part.items():
            held = result.get(day, (0, 0))
            result[day] = (held[0] + rows, (held[1] + total) & _MASK)
    return result


def subtract(whole: Digests, part: Digests) -> Digests:
    """The digests of the rows of `whole` that are not in `part`, a subset of it."""
    rest = {
        day: (rows - part.get(day, (0, 0))[0], (total - part.get(day, (0, 0))[1]) & _MASK)
        for day, (rows, total) in whole.items()
    }
    return {day: value for day, value in rest.items() if value[0]}
