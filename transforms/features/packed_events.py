"""Rows with indexes per key: how the kernel reads the events of some keys without a query over all rows.

A source's events are in a few `IndexedRows`.  `FoundEvents` are the rows of these that have
the keys of some spine rows, as NumPy columns.  A live shard holds its events this way; a store of events per key that
is read for one request can too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from transforms.records.arrays import Bools, Ints, UInt64s
from transforms.records.columns import select, whole_numbers
from transforms.records.row_hashing import keys_hashes
from transforms.records.times import ALWAYS, FOREVER

# Columns that identify a key.
KeyColumns = tuple[str, ...]
# Up to this many rows are indexed by a dictionary, to which rows can be added.
SMALL = 1000
_NOTHING = np.empty(0, np.int64)


def key_values(frame: pl.DataFrame, columns: KeyColumns) -> list[Any]:
    """The key of each row as a Python object; None if one of its columns is null."""
    values = [_comparable(frame[name]).to_list() for name in columns]
    if len(values) == 1:
        return values[0]
    return [None if None in key else key for key in zip(*values, strict=True)]


def _comparable(series: pl.Series) -> pl.Series:
    return series if series.dtype == pl.String else whole_numbers(series).cast(pl.Int64)


class Keys:
    """The keys of the rows of a frame.

    Args:
        frame: the rows.
        several: the key columns, of which texts are hashed together.
    """

    def __init__(self, frame: pl.DataFrame, several: Iterable[KeyColumns]) -> None:
        self.frame, self.several = frame, list(several)
        self._made: dict[KeyColumns, DistinctKeys] = {}

    @functools.cached_property
    def hashes(self) -> dict[KeyColumns, UInt64s]:
        return keys_hashes(self.frame, self.several)

    def distinct(self, columns: KeyColumns) -> DistinctKeys:
        if columns not in self._made:
            codes: dict[Hashable, int] = {None: -1}
            by_row = [codes.setdefault(key, len(codes) - 1) for key in key_values(self.frame, columns)]
            del codes[None]
            self._made[columns] = DistinctKeys(list(codes), np.array(by_row, np.int64), lambda: self.hashes[columns])
        return self._made[columns]


class DistinctKeys:
    """Distinct keys, each with a code: its position.

    Args:
        keys: the keys.
        codes: of each row; −1 for a key that is null.
        hashes_of_rows: returns the hash of each row.
    """

    def __init__(self, keys: Sequence[Hashable], codes: Ints, hashes_of_rows: Callable[[], UInt64s]) -> None:
        self.keys, self.codes, self._hashes_of_rows = keys, codes, hashes_of_rows

    @functools.cached_property
    def hashes(self) -> UInt64s:
        """The hash of each key."""
        result = np.empty(len(self.keys), np.uint64)
        used = self.codes >= 0
        result[self.codes[used]] = self._hashes_of_rows()[used]
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class _SortedIndex:
    """Rows by hash of their key and time.

    Args:
        hashes: distinct hashes, ascending.
        starts: where the rows of each begin in `order`, and the number of rows.
        order: rows by hash and time.
        distinct: whether rows of one hash have one key.
        keyed: per row of `order` the position of its hash · `span` + its time − `base`; None without a time.
    """

    hashes: UInt64s
    starts: Ints
    order: Ints
    distinct: bool
    keyed: Ints | None
    base: int = 0
    span: int = 1

    @property
    def bytes(self) -> int:
        arrays = (self.hashes, self.starts, self.order, self.keyed)
        return sum(array.nbytes for array in arrays if array is not None)

    def ranges(self, at: Ints, low: int, high: int) -> tuple[Ints, Ints]:
        """Where in `order` the rows of hashes lie, those with times outside `[low, high)` left out if possible."""
        if self.keyed is None:
            return self.starts[at], self.starts[at + 1]
        first = at * self.span
        lo, hi = (first + min(max(bound - self.base, 0), self.span) for bound in (low, high))
        return self.keyed.searchsorted(lo), self.keyed.searchsorted(hi)


class IndexedRows:
    """Some rows of one source, with an index per key, and their columns for NumPy.

    Args:
        frame: the rows; more can be added.
        low: no row is before this time, µs.
        keys: key columns that are indexed together.
    """

    def __init__(self, frame: pl.DataFrame, low: int, keys: Sequence[KeyColumns] = ()) -> None:
        self.low, self.keys = low, keys
        self._frames, self._height = [frame], frame.height
        self._frame_bytes = self._index_bytes = 0
        self._sized = 0
        self._sorted: dict[tuple[KeyColumns, str | None], _SortedIndex] = {}
        self._codes: dict[KeyColumns, tuple[dict[Hashable, int], Ints]] = {}
        self._columns: dict[str, tuple[npt.NDArray[Any], Bools | None]] = {}
        self._masks: dict[str, Bools] = {}
        self._latest: dict[str, int] = {}

    def __len__(self) -> int:
        return self._height

    @property
    def frame(self) -> pl.DataFrame:
        """The rows."""
        if len(self._frames) > 1:
            self._frame_bytes, self._sized = self.bytes - self._other_bytes, 1
            self._frames = [pl.concat(self._frames, rechunk=self._height <= SMALL)]
        return self._frames[0]

    def add(self, later: pl.DataFrame, low: int) -> None:
        """Adds rows.  What is known of few rows is kept up to date; of many it is found again."""
        few = self._height + later.height <= SMALL
        if few:
            for columns, (known, codes) in self._codes.items():
                self._codes[columns] = known, np.concatenate([codes, _coded(known, key_values(later, columns))])
            for name, (values, valid) in self._columns.items():
                self._columns[name] = _appended(values, valid, *_numbers(later[name]))
        else:
            self._codes, self._columns = {}, {}
        self._sorted, self._masks, self._latest, self._index_bytes = {}, {}, {}, 0
        self._frames.append(later)
        self._height += later.height
        self.low = min(low, self.low)

    @property
    def bytes(self) -> int:
        """Size of its rows and indexes."""
        for each in self._frames[self._sized :]:
            self._frame_bytes += int(each.estimated_size())
        self._sized = len(self._frames)
        return self._frame_bytes + self._other_bytes

    @property
    def _other_bytes(self) -> int:
        return self._index_bytes + 8 * self._height * len(self._codes)

    def find(self, columns: KeyColumns, wanted: DistinctKeys, time: str, low: int, high: int) -> tuple[Ints, Ints]:
        """The rows that have one of the keys `wanted`, and the code of each; rows outside `[low, high)` may lack.

        Args:
            columns: of the key.
            wanted: keys, in the order of `columns`.
            time: column of a time.
            low, high: µs.
        """
        if len(self) <= SMALL:
            known, codes = self._coded(columns)
            number = np.full(len(known) + 1, -1, np.int64)
            for code, key in enumerate(wanted.keys):
                number[known.get(key, -1)] = code
            number[-1] = -1  # of keys that are null or not known
            found = number[codes]
            rows = np.flatnonzero(found >= 0)
            return rows, found[rows]
        index = self._index(columns, time)
        at = np.minimum(index.hashes.searchsorted(wanted.hashes), len(index.hashes) - 1)
        hit = np.flatnonzero(index.hashes[at] == wanted.hashes)
        if not index.distinct:
            return self._compared(columns, wanted)
        lo, hi = index.ranges(at[hit], low, high)
        some, numbers, lengths = [], [], []
        firsts = index.order[index.starts[at[hit]]].tolist()
        for code, first, start, end in zip(hit.tolist(), firsts, lo.tolist(), hi.tolist(), strict=True):
            if start < end and self._key(columns, first) == wanted.keys[code]:
                some.append(index.order[start:end])
                numbers.append(code)
                lengths.append(end - start)
        if not some:
            return _NOTHING, _NOTHING
        return np.concatenate(some), np.repeat(np.array(numbers, np.int64), lengths)

    def holds(self, columns: KeyColumns, wanted: DistinctKeys, time: str) -> bool:
        """Whether some row has one of the keys `wanted`; see `find`."""
        if len(self) <= SMALL:
            known, _ = self._coded(columns)
            return any(key in known for key in wanted.keys)
        return bool(len(self.find(columns, wanted, time, ALWAYS, FOREVER)[0]))

    def find_hashes(self, columns: KeyColumns, wanted: UInt64s, time: str | None = None) -> Ints:
        """Positions, ascending, of the rows whose key has one of the hashes `wanted`, which are distinct."""
        index = self._index(columns, time)
        at = np.minimum(index.hashes.searchsorted(wanted), len(index.hashes) - 1)
        at = at[index.hashes[at] == wanted]
        if not len(at):
            return _NOTHING
        lo = index.starts[at]
        lengths = index.starts[at + 1] - lo
        total = int(lengths.sum())
        if total == len(self):
            return np.arange(total)
        starts = np.cumsum(lengths) - lengths
        return np.sort(index.order[np.arange(total) - np.repeat(starts, lengths) + np.repeat(lo, lengths)])

    def numbers(self, name: str) -> tuple[npt.NDArray[Any], Bools | None] | None:
        """A column's values, and which are values (None: all are; of floats, those that are not NaN).

        None for a column that is no number.
        """
        if name not in self._columns:
            if not _is_number(self._frames[0][name].dtype):
                return None
            self._columns[name] = _numbers(self.frame[name])
        return self._columns[name]

    def moments(self, name: str) -> Ints:
        """A column of times without nulls, µs."""
        found = self.numbers(name)
        assert found is not None
        return found[0]

    def latest(self, name: str) -> int:
        """The last time in a column, µs."""
        if name not in self._latest:
            self._latest[name] = int(self.moments(name).max())
        return self._latest[name]

    def mask(self, text: str, condition: pl.Expr) -> Bools:
        """The rows for which a condition holds; `text` identifies it.

        Raises:
            pl.exceptions.PolarsError: it cannot be computed for all rows.
        """
        if text not in self._masks:
            holds = select(self.frame, condition.alias("_"))["_"]
            self._masks[text] = (holds.fill_null(False) if holds.null_count() else holds).to_numpy()
        return self._masks[text]

    def _coded(self, columns: KeyColumns) -> tuple[dict[Hashable, int], Ints]:
        """Codes of the keys, and the code of each row; −1 for null."""
        if columns not in self._codes:
            known: dict[Hashable, int] = {}
            self._codes[columns] = known, _coded(known, key_values(self.frame, columns))
        return self._codes[columns]

    def _key(self, columns: KeyColumns, row: int) -> Hashable:
        found = [_value(self.frame[name], row) for name in columns]
        return found[0] if len(found) == 1 else tuple(found)

    def _index(self, columns: KeyColumns, time: str | None) -> _SortedIndex:
        if (columns, time) not in self._sorted:
            together = {columns, *(self.keys if columns in self.keys else ())}
            for key, hashes in keys_hashes(self.frame, together).items():
                index = self._sorted[key, time] = self._sorted_index(key, hashes, time)
                self._index_bytes += index.bytes
        return self._sorted[columns, time]

    def _sorted_index(self, columns: KeyColumns, hashes: UInt64s, time: str | None) -> _SortedIndex:
        moments = None if time is None else self.moments(time)
        if moments is None or bool((moments[1:] >= moments[:-1]).all()):
            order = np.argsort(hashes, kind="stable")
        else:
            earliest = np.argsort(moments, kind="stable")
            order = earliest[np.argsort(hashes[earliest], kind="stable")]
        ordered = hashes[order]
        new = np.concatenate([np.ones(1, np.bool_), ordered[1:] != ordered[:-1]])
        starts = np.flatnonzero(new)
        distinct = self._one_key_per_hash(columns, order, new)
        first = ordered[starts]
        starts = np.append(starts, len(order))
        if moments is None:
            return _SortedIndex(first, starts, order, distinct, None)
        base = int(moments.min())
        span = int(moments.max()) - base + 2
        if len(first) * span >= 2**62:
            return _SortedIndex(first, starts, order, distinct, None)
        keyed = (np.cumsum(new) - 1) * span + (moments[order] - base)
        return _SortedIndex(first, starts, order, distinct, keyed, base, span)

    def _one_key_per_hash(self, columns: KeyColumns, order: Ints, new: Bools) -> bool:
        """Whether rows with one hash have one key."""
        for name in columns:
            series = _comparable(self.frame[name])[order]
            same = (series[1:].eq_missing(series[:-1])).to_numpy()
            if not (same | new[1:]).all():
                return False
        return True

    def _compared(self, columns: KeyColumns, wanted: DistinctKeys) -> tuple[Ints, Ints]:
        """As `find`, by comparing the keys of all rows."""
        known, codes = self._coded(columns)
        number = {known[key]: code for code, key in enumerate(wanted.keys) if key in known}
        found = np.array([number.get(code, -1) for code in codes.tolist()], np.int64)
        rows = np.flatnonzero(found >= 0)
        return rows, found[rows]


def _is_number(dtype: pl.DataType) -> bool:
    return dtype.is_float() or dtype.is_integer() or dtype.is_temporal() or dtype == pl.Boolean


def _numbers(series: pl.Series) -> tuple[npt.NDArray[Any], Bools | None]:
    """As `IndexedRows.numbers`."""
    if series.dtype.is_float():
        return series.to_numpy(), None
    series = series if series.dtype.is_integer() else series.cast(pl.Int64)
    if series.null_count():
        return series.fill_null(0).to_numpy(), series.is_not_null().to_numpy()
    return series.to_numpy(), None


def _appended(
    values: npt.NDArray[Any], valid: Bools | None, more: npt.NDArray[Any], more_valid: Bools | None
) -> tuple[npt.NDArray[Any], Bools | None]:
    """Two parts of a column as one."""
    if valid is not None or more_valid is not None:
        masks = [
            np.ones(len(some), np.bool_) if mask is None else mask
            for some, mask in ((values, valid), (more, more_valid))
        ]
        valid = np.concatenate(masks)
    return np.concatenate([values, more]), valid


def _value(series: pl.Series, row: int) -> Hashable:
    dtype = series.dtype
    if dtype == pl.String or dtype.is_integer():
        return series[row]
    return _comparable(series[row : row + 1])[0]


def _coded(known: dict[Hashable, int], keys: Sequence[Hashable]) -> Ints:
    """The code of each key, −1 for null.  New keys are added to those known."""
    return np.array([-1 if key is None else known.setdefault(key, len(known)) for key in keys], np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class PackedEvents:
    """A source's events for the kernel: those that windows can reach, and maybe more.

    Args:
        parts: the rows.
        nothing: no rows, with the columns that the view reads.
    """

    parts: Sequence[IndexedRows]
    nothing: pl.DataFrame

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def frame(self, columns: KeyColumns, hashes: UInt64s) -> pl.DataFrame:
        """The rows whose key has one of some hashes, and maybe more."""
        hashes = np.unique(hashes)
        names, found = self.nothing.columns, []
        for part in self.parts:
            rows = part.find_hashes(columns, hashes)
            if len(rows):
                some = part.frame[names]
                found.append(some if len(rows) == len(some) else some[rows])
        return pl.concat(found) if found else self.nothing

    def find(self, columns: KeyColumns, wanted: DistinctKeys, time: str, low: int, high: int) -> FoundEvents:
        """See `IndexedRows.find`."""
        parts, codes = [], []
        for part in self.parts:
            if part.latest(time) < low:
                continue
            rows, some = part.find(columns, wanted, time, low, high)
            if len(rows):
                parts.append((part, rows))
                codes.append(some)
        return FoundEvents(parts, codes[0] if len(codes) == 1 else _joined(codes), self.nothing)


class FoundEvents:
    """Some rows of several parts, as one table.

    Args:
        parts: each part with its rows.
        codes: the code of each row's key.
        nothing: no rows, with the columns that the view reads.
    """

    def __init__(self, parts: Sequence[tuple[IndexedRows, Ints]], codes: Ints, nothing: pl.DataFrame) -> None:
        self.parts, self.codes, self.nothing = parts, codes, nothing
        self._columns: dict[str, tuple[npt.NDArray[Any], Bools | None] | None] = {}

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def columns(self) -> list[str]:
        return self.nothing.columns

    def filtered(self, text: str, condition: pl.Expr) -> FoundEvents:
        """The rows for which a condition holds; `text` identifies it.

        Raises:
            pl.exceptions.PolarsError: it cannot be computed.
        """
        try:
            masks = [part.mask(text, condition)[rows] for part, rows in self.parts]
        except pl.exceptions.PolarsError:  # of these rows alone it may be possible
            masks = [
                select(part.frame[rows], condition.alias("_"))["_"].fill_null(False).to_numpy()
                for part, rows in self.parts
            ]
        parts = [(part, rows[mask]) for (part, rows), mask in zip(self.parts, masks, strict=True)]
        return FoundEvents(parts, self.codes[_joined(masks, np.bool_)], self.nothing)

    def numbers(self, name: str) -> tuple[npt.NDArray[Any], Bools | None] | None:
        """As `IndexedRows.numbers`."""
        if name not in self._columns:
            self._columns[name] = self._numbers(name)
        return self._columns[name]

    def _numbers(self, name: str) -> tuple[npt.NDArray[Any], Bools | None] | None:
        if not self.parts:
            return _NOTHING, None
        values, masks = [], []
        for part, rows in self.parts:
            found = part.numbers(name)
            if found is None:
                return None
            values.append(found[0][rows])
            masks.append(None if found[1] is None else found[1][rows])
        if all(mask is None for mask in masks):
            return _joined(values), None
        whole = [
            np.ones(len(some), np.bool_) if mask is None else mask for some, mask in zip(values, masks, strict=True)
        ]
        return _joined(values), _joined(whole)

    def moments(self, name: str) -> Ints:
        """A column of times without nulls, µs."""
        found = self.numbers(name)
        assert found is not None
        return found[0]

    def frame(self, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of the rows, as a frame."""
        some = [part.frame[list(columns)][rows] for part, rows in self.parts]
        return pl.concat(some) if some else self.nothing[list(columns)]


def _joined(parts: Sequence[npt.NDArray[Any]], dtype: npt.DTypeLike = np.int64) -> npt.NDArray[Any]:
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty(0, dtype)
