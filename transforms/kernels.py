"""What a feature is: spine rows and the events before them in, features out.  Knows nothing of Beam, blocks or shards."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.errors import DataError
from schemas.expressions import canonical
from schemas.features import ORDERED, Derived, Latest, Lookup, Statistic, Trailing
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.lifetime import Carried, Summary, is_lifetime, summary_name
from transforms.windows import Bools, Column, Ints, statistic

# Rows that the general path (event_time) may hold at once.
EXPANDED_ROWS = 4_000_000
# numpy and Polars let go of the interpreter while they work, so threads do share the cores.
CORES = ThreadPoolExecutor(os.cpu_count() or 1, "kernel")
Reading = Trailing | Latest | Lookup
Gather = Callable[[FeatureView, Sequence[Reading], pl.DataFrame, Mapping[str, Any]], list[pl.Series]]


def compute(
    view: FeatureView, spine: pl.DataFrame, tables: Mapping[str, Any], gather: Gather | None = None
) -> pl.DataFrame:
    """Features of each spine row, exactly as of its time.

    Args:
        spine: the spine source's columns, any order of rows.
        tables: per source name, rows known within the view's reach of these spine rows (more is harmless, order is
            irrelevant), repeats by `unique` already removed; dimensions with one row per key.
            For windows over all history they hold all of it; or, under `lifetime.summary_name`, the `Summary` of what came
            before the events that they hold.
        gather: stands in for `gathered` where its columns were computed elsewhere (live, each key's in its own shard).

    Returns:
        The spine's context columns and the features, in the spine's order of rows.
    """
    gather = gather or gathered
    frame = spine
    waiting: list[Trailing | Latest | Lookup] = []
    for feature in view.features:
        if isinstance(feature, Derived) or any(column in view.columns for column, _ in feature.keys):
            # It may read what is waiting.
            frame = frame.with_columns(gather(view, waiting, frame, tables))
            waiting = []
        if isinstance(feature, Derived):
            with computing(f"Derived({', '.join(feature.columns)})"):
                frame = frame.with_columns(derived(feature, view.columns))
        else:
            waiting.append(feature)
    frame = frame.with_columns(gather(view, waiting, frame, tables))
    return frame.select(*view.context, *(pl.col(name).cast(dtype) for name, dtype in view.columns.items()))


def gathered(
    view: FeatureView,
    features: Sequence[Trailing | Latest | Lookup],
    frame: pl.DataFrame,
    tables: Mapping[str, Any],
) -> list[pl.Series]:
    """Columns of features that read other tables: those of one source, key and condition share a history, and histories share the cores."""
    groups: dict[tuple[str, object, str | None], list[Trailing | Latest | Lookup]] = {}
    for feature in features:
        where = None if feature.where is None else canonical(feature.where)
        groups.setdefault((feature.source.name, feature.keys, where), []).append(feature)

    def of_group(group: list[Trailing | Latest | Lookup]) -> list[pl.Series]:
        first, table = group[0], tables[group[0].source.name]
        if isinstance(first, Lookup):
            return [series for feature in group for series in looked_up(feature, frame, table)]  # type: ignore[arg-type]
        with computing(f"where of {first.name!r}"):
            events = table if first.where is None else table.filter(first.where)
        lifetime = any(map(is_lifetime, group)) and tables.get(
            summary_name(first.source.name, first.keys, None if first.where is None else canonical(first.where))
        )
        history = History(first.source, first.keys, events, frame, view.time, lifetime or None)
        return [
            series
            for each in group
            for series in (trailing(each, history) if isinstance(each, Trailing) else latest(each, history))
        ]  # type: ignore[arg-type]

    return [series for part in CORES.map(of_group, groups.values()) for series in part]


@contextlib.contextmanager
def computing(what: str) -> Iterator[None]:
    """Turn a failure of the user's expression into one that names it."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{what} has an answer for every row",
            str(error).splitlines()[0],
            "Let what does not fit be null, as in cast(…, strict=False)",
        ) from None


def derived(feature: Derived, types: Mapping[str, pl.DataType]) -> list[pl.Expr]:
    """The feature's expressions in their stored types; what is not finite is not a value."""
    return [stored(expr, types[name]).alias(name) for name, expr in feature.columns.items()]


def stored(expr: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """`expr` as `dtype`; float32 last, and null for what it cannot hold."""
    result = expr.cast(dtype, strict=False)
    return pl.when(result.is_finite()).then(result) if dtype.is_float() else result


def looked_up(feature: Lookup, spine: pl.DataFrame, dimension: pl.DataFrame) -> list[pl.Series]:
    """Columns of the dimension's row of each spine row's key."""
    left, right = codes(spine, dimension, feature.keys)
    rows = np.full(int(max(left.max(initial=-1), right.max(initial=-1))) + 2, -1, np.int64)
    rows[right[right >= 0][::-1]] = np.flatnonzero(right >= 0)[::-1]  # the first row of a key wins
    found = rows[left]
    return _taken(dimension, feature.renamed, found, found >= 0)


def latest(feature: Latest, history: History) -> list[pl.Series]:
    """Columns of the last row in `[t − max_age, t)`."""
    last, found = history.spread(history.windows(feature.length, ordered=True), _last)
    own = _taken(history.events, feature.renamed, last, found)
    if feature.length is not None or history.carried is None:
        return own
    before = history.restored(history.carried.value("latest")).struct.unnest()
    return [
        pl.select(
            pl.when(pl.Series(found))
            .then(series)
            .otherwise(stored(pl.lit(before[column]), series.dtype))
            .alias(series.name)
        ).to_series()
        for column, series in zip(feature.renamed, own, strict=True)
    ]


def _last(rows: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Bools]:
    found = hi > lo
    last = np.zeros(len(lo), np.int64)
    last[found] = rows[hi[found] - 1]
    return last, found


def trailing(feature: Trailing, history: History) -> list[pl.Series]:
    """Every statistic of the feature."""
    return [_statistic(history, each) for each in feature.statistics]


def _statistic(history: History, wanted: Statistic) -> pl.Series:
    carried = history.carried if wanted.length is None else None

    def one(rows: Ints, lo: Ints, hi: Ints) -> tuple[npt.NDArray[Any], Bools]:
        if carried is not None and wanted.stat not in ORDERED:
            return carried.number(wanted, None if wanted.column == "*" else history.column(wanted.column, rows), lo, hi)
        if wanted.column == "*":
            return hi - lo, np.ones(len(lo), np.bool_)
        values, valid = statistic(history.column(wanted.column, rows), wanted.stat, lo, hi)
        return (rows[values] if wanted.stat in ORDERED and len(rows) else values), valid

    values, valid = history.spread(history.windows(wanted.length, wanted.stat in ORDERED), one)
    if wanted.stat in ORDERED:
        (own,) = _taken(history.events, {wanted.column: wanted.name}, values, valid)
        if carried is None:
            return own
        before = stored(pl.lit(history.restored(carried.value(f"{wanted.column} {wanted.stat}"))), own.dtype)
        return pl.select(
            pl.coalesce(*((before, own) if wanted.stat == "first" else (own, before))).alias(wanted.name)
        ).to_series()
    if wanted.stat in ("count", "n_unique"):
        return pl.Series(wanted.name, values, pl.Int64)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    # What is beyond float32 is not a number it can hold.
    numbers[~(valid & np.isfinite(numbers))] = np.nan
    return pl.Series(wanted.name, numbers, nan_to_null=True)


def _taken(table: pl.DataFrame, renamed: Mapping[str, str], rows: Ints, found: Bools) -> list[pl.Series]:
    """`table`'s columns at `rows`, null where not found."""
    if not len(table):
        return [
            pl.Series(name, [None] * len(rows), dtype=_kept(table[column].dtype)) for column, name in renamed.items()
        ]
    at = pl.Series(rows) if found.all() else pl.Series(rows).set(pl.Series(~found), None)
    taken = table.select(list(renamed)).select(pl.all().gather(at))
    return taken.select(
        stored(pl.col(column), _kept(taken[column].dtype)).alias(name) for column, name in renamed.items()
    ).get_columns()


def _kept(dtype: pl.DataType) -> pl.DataType:
    return pl.Int64() if dtype.is_integer() else pl.Float32() if dtype.is_numeric() else dtype


class History:
    """A source's events grouped by key and sorted by position in time, and where each spine row's windows lie in them."""

    def __init__(
        self,
        source: Source,
        keys: Sequence[tuple[str, str]],
        events: pl.DataFrame,
        spine: pl.DataFrame,
        time: str,
        summary: Summary | None = None,
    ) -> None:
        left, right = codes(spine, events, keys)
        if (right < 0).any():
            events, right = events.filter(pl.Series(right >= 0)), right[right >= 0]
        self.source = source
        known = _microseconds(events[str(source.time)])
        positions = known if source.event_time is None else _microseconds(events[source.event_time])
        self.moments = _microseconds(spine[time])
        self.sorting = Sorting(positions, right, self.moments, left)
        self.events = events
        self.known = None if source.event_time is None else known
        self._columns: dict[tuple[str, bool], Column] = {}
        self.until, self.carried = None, None
        if summary is not None:
            mine, theirs = codes(spine, summary.frame, keys)
            row = np.full(int(theirs.max(initial=0)) + 2, -1, np.int64)
            row[theirs] = np.arange(len(theirs))
            self.until, self.carried = (
                summary.until,
                Carried(summary.frame, np.where(mine < 0, -1, row[mine])[self.sorting.spine_order]),
            )

    @functools.cached_property
    def rows(self) -> Ints:
        """Row of `events` per place in sorted order."""
        return self.sorting.order

    @functools.cached_property
    def ordered_rows(self) -> Ints:
        """As `rows`, places of one key and moment put in order by `order`, then by all columns."""
        tied = self.sorting.ties()
        if not len(tied):
            return self.rows
        by = [*(self.source.order or ()), *(name for name in self.source.schema if name in self.events.columns)]
        some = self.events.select(list(dict.fromkeys(by))).select(pl.all().gather(pl.Series(self.rows[tied])))
        some = some.select(pl.Series("__place", self.sorting.sorted_keys[tied]), pl.all())
        rows = self.rows.copy()
        rows[tied] = self.rows[tied][some.select(pl.arg_sort_by(some.columns)).to_series().to_numpy()]
        return rows

    def windows(self, length: int | None, ordered: bool) -> Iterator[tuple[Ints, Ints, Ints]]:
        """(rows of `events`, lo, hi): each window is `rows[lo:hi]`.  Windows come in the order of `sorting.spine_order`."""
        rows = self.ordered_rows if ordered else self.rows
        lo, hi = self.sorting.bounds(length, self.until)
        if self.known is None:
            yield rows, lo, hi
            return
        # Placed in time earlier than known: give every window rows of its own, less those not yet known.
        ends = np.cumsum(hi - lo)
        start = 0
        while start < len(lo):
            stop = max(
                start + 1, int(np.searchsorted(ends, (ends[start - 1] if start else 0) + EXPANDED_ROWS, "right"))
            )
            lengths = hi[start:stop] - lo[start:stop]
            owner = np.repeat(np.arange(len(lengths)), lengths)
            first = np.cumsum(lengths) - lengths
            candidates = rows[np.arange(len(owner)) - first[owner] + lo[start:stop][owner]]
            moments = self.moments[self.sorting.spine_order[start:stop]]
            seen = self.known[candidates] < moments[owner]
            counts = np.bincount(owner[seen], minlength=len(lengths))
            until = np.cumsum(counts)
            yield candidates[seen], until - counts, until
            start = stop
        if not len(lo):
            yield rows[:0], lo, hi

    def column(self, name: str, rows: Ints) -> Column:
        """Values of a column in the order of `rows`."""
        cacheable = self.known is None
        key = (name, rows is self.rows)
        if cacheable and key in self._columns:
            return self._columns[key]
        series = self.events[name].gather(pl.Series(rows))
        if series.dtype == pl.String:
            series = series.cast(pl.Categorical(pl.Categories.random())).to_physical()
        elif series.dtype.is_temporal() or series.dtype == pl.Boolean:
            series = series.to_physical().cast(pl.Int64)
        if series.dtype.is_float():
            series = series.fill_nan(None)
        valid = series.is_not_null().to_numpy() if series.null_count() else None
        result = Column(series.fill_null(0).to_numpy(), valid)
        if cacheable:
            self._columns[key] = result
        return result

    def spread(
        self, windows: Iterable[tuple[Ints, Ints, Ints]], function: Callable[..., tuple[npt.NDArray[Any], Bools]]
    ) -> tuple[npt.NDArray[Any], Bools]:
        """`function` of all windows, in the spine's order of rows."""
        values, valid = [], np.empty(len(self.moments), np.bool_)
        start = 0
        for rows, lo, hi in windows:
            value, known = function(rows, lo, hi)
            values.append(value)
            valid[self.sorting.spine_order[start : start + len(lo)]] = known
            start += len(lo)
        result = np.empty(len(self.moments), values[0].dtype)
        result[self.sorting.spine_order] = values[0] if len(values) == 1 else np.concatenate(values)
        return result, valid

    def restored(self, series: pl.Series) -> pl.Series:
        """A series in the order of windows, in the spine's order of rows."""
        back = np.empty(len(series), np.int64)
        back[self.sorting.spine_order] = np.arange(len(series))
        return series.gather(pl.Series(back))


class Sorting:
    """Events and spine rows under one integer key, code · span + time, so that a window is two binary searches."""

    def __init__(self, positions: Ints, codes: Ints, moments: Ints, spine_codes: Ints) -> None:
        self.base = int(min(positions.min(initial=2**62), moments.min(initial=2**62)))
        last = int(max(positions.max(initial=-(2**62)), moments.max(initial=-(2**62))))
        self.positions, self.codes, self.moments, self.spine_codes = positions, codes, moments, spine_codes
        self.span = max(last - self.base + 2, 2)
        self.unique: Ints | None = None
        groups = int(max(codes.max(initial=0), spine_codes.max(initial=0))) + 1
        if groups * self.span >= 2**62:
            self.unique = np.unique(positions)
            self.span = len(self.unique) + 1
        keys = codes * self.span + self._place(positions)
        self.order = pl.Series(keys).arg_sort().to_numpy().astype(np.int64)
        self.sorted_keys = keys[self.order]
        spine_keys = spine_codes * self.span + self._place(moments)
        self.spine_order = pl.Series(spine_keys).arg_sort().to_numpy().astype(np.int64)
        self.sorted_codes = spine_codes[self.spine_order]
        self.sorted_moments = moments[self.spine_order]
        self.ends = self._search(self.sorted_moments)
        self._starts: dict[int | None, Ints] = {}

    def _place(self, times: Ints) -> Ints:
        """Times as numbers in `[0, span)`; times before the first event are 0."""
        if self.unique is not None:
            return np.searchsorted(self.unique, times, "left").astype(np.int64)
        return np.clip(times - self.base, 0, None)

    def _search(self, times: Ints) -> Ints:
        """Place of the first event of each spine row's key that is not before `times`; 0 for keys without events."""
        found = np.searchsorted(self.sorted_keys, self.sorted_codes * self.span + self._place(times), "left")
        return np.where(self.sorted_codes < 0, 0, found).astype(np.int64)

    def bounds(self, length: int | None, since: int | None = None) -> tuple[Ints, Ints]:
        """`[t − length, t)` per spine row, in `spine_order`; without a length `[since, t)`, or all before t."""
        if length not in self._starts:
            far = np.full(len(self.sorted_moments), -(2**62) if since is None else since, np.int64)
            self._starts[length] = self._search(far if length is None else self.sorted_moments - length)
        return self._starts[length], self.ends

    def ties(self) -> Ints:
        """Places that share key and moment with a neighbour."""
        same = self.sorted_keys[1:] == self.sorted_keys[:-1]
        edge = np.zeros(1, np.bool_)
        return np.flatnonzero(np.concatenate([edge, same]) | np.concatenate([same, edge]))


def codes(spine: pl.DataFrame, table: pl.DataFrame, keys: Sequence[tuple[str, str]]) -> tuple[Ints, Ints]:
    """Equal keys as equal small integers on both sides; −1 for a null key, and for a spine row whose key is not in `table`."""
    left, right = np.zeros(len(spine), np.int64), np.zeros(len(table), np.int64)
    for spine_column, table_column in keys:
        a, b = _column_codes(spine[spine_column], table[table_column])
        size = int(max(a.max(initial=0), b.max(initial=0))) + 1
        if int(max(left.max(initial=0), right.max(initial=0)) + 1) * size >= 2**62:
            left, right = _dense(left, right)
        left = np.where((left < 0) | (a < 0), -1, left * size + a)
        right = np.where((right < 0) | (b < 0), -1, right * size + b)
    return _dense(left, right)


def _column_codes(left: pl.Series, right: pl.Series) -> tuple[Ints, Ints]:
    if left.dtype == pl.String:
        shared = pl.Categorical(pl.Categories.random())
        # Both live until both have codes: Polars forgets the categories with the last column that uses them.
        pair = right.cast(shared), left.cast(shared)
        right, left = (side.to_physical() for side in pair)
    else:
        left, right = left.to_physical().cast(pl.Int64), right.to_physical().cast(pl.Int64)
        lows = [low for low in (left.min(), right.min()) if low is not None]
        highs = [high for high in (left.max(), right.max()) if high is not None]
        if lows and max(highs) - min(lows) < 2**40:  # type: ignore[type-var, operator]
            left, right = left - min(lows), right - min(lows)  # type: ignore[type-var]
        else:
            levels = right.drop_nulls().unique().sort()
            left, right = (_positions(levels, side) for side in (left, right))
    return tuple(side.cast(pl.Int64).fill_null(-1).to_numpy() for side in (left, right))  # type: ignore[return-value]


def _positions(levels: pl.Series, side: pl.Series) -> pl.Series:
    if not len(levels):
        return pl.Series([None] * len(side), dtype=pl.Int64)
    at = levels.search_sorted(side).clip(0, len(levels) - 1).cast(pl.Int64)
    return at.set(~levels.gather(at).eq_missing(side), None)


def _dense(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """The codes that occur on the right renumbered without gaps; others on the left become −1."""
    top = int(max(left.max(initial=-1), right.max(initial=-1))) + 1
    if top <= 8 * (len(left) + len(right)) + 1024:
        used = np.zeros(top + 1, np.bool_)
        used[right[right >= 0]] = True
        number = np.where(used, np.cumsum(used) - 1, -1)
        number[-1] = -1  # where −1 points
        return number[left], number[right]
    levels = np.unique(right[right >= 0])
    at = np.searchsorted(levels, left)
    known = (
        (left >= 0) & (levels[np.minimum(at, len(levels) - 1)] == left)
        if len(levels)
        else np.zeros(len(left), np.bool_)
    )
    return np.where(known, at, -1), np.where(right < 0, -1, np.searchsorted(levels, right))


def _microseconds(series: pl.Series) -> Ints:
    return series.to_physical().to_numpy()
