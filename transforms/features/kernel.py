"""Computes features from spine rows and the events before them. Independent of Beam, blocks and shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.errors import DataError
from schemas.feature_groups import (
    GroupKey,
    HistoryKey,
    SourceFeature,
    column_names,
    group_key,
    window_lengths,
    without_columns,
)
from schemas.features import ORDERED, Derived, Latest, Lookup, Statistic, Trailing
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.lifetime_summaries import LATEST, PriorSummary, Summary
from transforms.features.packed_events import FoundEvents, Keys, PackedEvents
from transforms.features.window_bounds import EventOrder, codes
from transforms.features.window_statistics import Column, Once, lazy, statistic
from transforms.records.arrays import Bools, Ints
from transforms.records.columns import moments_of, with_columns, with_series
from transforms.records.times import ALWAYS
from transforms.records.window_sums import Numbers

# Rows that the general path (event_time) may hold at once.
EXPANDED_ROWS = 4_000_000
# Up to this many rows, a group is computed on the calling thread: a thread pool would cost more.
HANDED_OVER = 20_000
# Up to this many spine rows, events that are packed are found key by key; more are found by their hashes.
FOUND_BY_KEY = 256
_POOL = Once()
log = logging.getLogger("millrace.features")


def kernel_pool() -> ThreadPoolExecutor:
    """The process's threads for numpy and Polars, which release the GIL while they work. Created on the first call."""
    pool: ThreadPoolExecutor = _POOL.get("pool", lambda: ThreadPoolExecutor(os.cpu_count() or 1, "kernel"))
    return pool


@dataclasses.dataclass(frozen=True, eq=False)
class KernelTables:
    """What the kernel reads in addition to the spine rows.

    Args:
        rows: per source, the rows within the view's reach of the spine rows, in any order. Further rows do not matter.
            Repeats by `unique` have been removed, and a dimension has one row per key. For windows over all history a
            source has all its rows, or those that its summary lacks.
        summaries: summaries of the events before those in `rows`, or of events that all windows of one length contain.
        columns: feature columns that were computed elsewhere, in the order of the spine rows.
        packed: sources whose events are packed instead, with indexes per key.
        histories: histories by group, kept for other views that are computed from the same rows and spine rows.
    """

    rows: Mapping[str, pl.DataFrame]
    summaries: Mapping[HistoryKey, Summary] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, pl.Series] = dataclasses.field(default_factory=dict)
    packed: Mapping[str, PackedEvents] = dataclasses.field(default_factory=dict)
    histories: Once | None = None

    def rows_read(self, source: str, spine_rows: int) -> int:
        """How many rows of a source are read for so many spine rows: none of a key's own if these are few."""
        if source not in self.packed:
            return len(self.rows[source])
        return 0 if spine_rows <= FOUND_BY_KEY else len(self.packed[source])

    def split(self, features: Sequence[SourceFeature]) -> tuple[list[pl.Series], list[SourceFeature]]:
        """Returns the columns of `features` that were computed elsewhere, and features that give the other columns."""
        if not self.columns:
            return [], list(features)
        known = [name for feature in features for name in column_names(feature) if name in self.columns]
        return [self.columns[name] for name in known], list(without_columns(features, known))


@dataclasses.dataclass(frozen=True)
class Stage:
    """Features that can be computed together, and the `Derived` feature that may use them.

    Args:
        reading: features whose keys are known when the stages before this one have been computed.
        derived: computed after them; None if the stage has none.
    """

    reading: tuple[SourceFeature, ...]
    derived: Derived | None = None

    def derive(self, view: FeatureView, frame: pl.DataFrame) -> pl.DataFrame:
        """Returns `frame` with the columns of `derived`."""
        if self.derived is None:
            return frame
        with computing(f"Derived({', '.join(self.derived.columns)})"):
            return with_derived(view, self.derived, frame)


@functools.lru_cache(256)
def stages(view: FeatureView) -> tuple[Stage, ...]:
    """The view's features in the order in which they are computed."""
    return tuple(_stages(view))


def _stages(view: FeatureView) -> Iterator[Stage]:
    waiting: list[SourceFeature] = []
    for feature in view.features:
        if isinstance(feature, Derived):
            yield Stage(tuple(waiting), feature)
            waiting = []
            continue
        if any(
            column in view.columns for column, _ in feature.keys
        ):  # the key may be among the columns that are not computed yet
            yield Stage(tuple(waiting))
            waiting = []
        waiting.append(feature)
    yield Stage(tuple(waiting))


def compute(view: FeatureView, spine: pl.DataFrame, tables: KernelTables) -> pl.DataFrame:
    """Computes the features of each spine row exactly as of its time.

    Args:
        spine: the spine source's columns, with the rows in any order.

    Returns:
        The spine's context columns and the features, in the spine's order of rows.
    """
    frame = spine
    for stage in stages(view):
        frame = stage.derive(view, with_series(frame, feature_columns(view, stage.reading, frame, tables)))
    return output_columns(view, frame)


def output_columns(view: FeatureView, frame: pl.DataFrame) -> pl.DataFrame:
    """Selects the context columns and the features, in their stored types."""
    features = (_cast(frame[name], dtype) for name, dtype in view.columns.items())
    return pl.DataFrame([*(frame[name] for name in view.context), *features])


def _cast(series: pl.Series, dtype: pl.DataType) -> pl.Series:
    return series if series.dtype == dtype else series.cast(dtype)


def feature_columns(
    view: FeatureView, features: Sequence[SourceFeature], frame: pl.DataFrame, tables: KernelTables
) -> list[pl.Series]:
    """Computes the columns of features that read other tables, in the order of the rows of `frame`.

    The features of one group share a history. Groups, and the statistics of one group, are computed in parallel.
    """
    columns, features = tables.split(features)
    groups: dict[GroupKey, list[SourceFeature]] = {}
    for feature in features:
        groups.setdefault(group_key(feature), []).append(feature)

    found_events = _FoundEvents(view, frame, tables, groups)

    def history_of(key: GroupKey, group: Sequence[SourceFeature]) -> History | None:
        if isinstance(group[0], Lookup):
            return None
        if tables.histories is None or any(column in view.columns for column in _spine_columns(key)):
            return made(key, group)
        return tables.histories.get(key, lambda: made(key, group))

    def made(key: GroupKey, group: Sequence[SourceFeature]) -> History:
        first = group[0]
        assert not isinstance(first, Lookup)
        summary = tables.summaries.get(key.history)
        packed = tables.packed.get(key.source)
        if packed is not None and len(frame) <= FOUND_BY_KEY:
            with computing(f"where of {first.name!r}"):
                found = found_events.of(key, first.condition)
            codes, moments = found_events.keys.distinct(_spine_columns(key)).codes, found_events.moments
            return History(first.source, found, found.codes, moments, codes, _prior(first.keys, frame, summary))
        events = (
            tables.rows[key.source]
            if packed is None
            else packed.frame(key.history.columns, found_events.keys.hashes[_spine_columns(key)])
        )
        if first.condition is not None:
            with computing(f"where of {first.name!r}"):
                events = events.filter(first.condition)
        return History.of_frame(first.source, first.keys, events, frame, view.time, summary)

    def work(feature: SourceFeature, history: History | None, wanted: list[Statistic]) -> list[pl.Series]:
        if isinstance(feature, Lookup):
            return lookup_columns(feature, frame, tables.rows[feature.source.name])
        assert history is not None
        if isinstance(feature, Latest):
            return latest(feature, history)
        return [_statistic(history, each) for each in wanted]

    if len(frame) + max((tables.rows_read(key.source, len(frame)) for key in groups), default=0) <= HANDED_OVER:
        for key, group in groups.items():
            history = history_of(key, group)
            columns += [series for each in group for part in _parts(each) for series in work(each, history, part)]
        return columns
    pool = kernel_pool()
    # The statistics of a group start as soon as its history is sorted, while other histories are still being sorted.
    histories = [(group, pool.submit(history_of, key, group)) for key, group in groups.items()]
    tasks = [
        pool.submit(work, feature, history.result(), part)
        for group, history in histories
        for feature in group
        for part in _parts(feature)
    ]
    return [*columns, *(series for task in tasks for series in task.result())]


def _spine_columns(key: GroupKey) -> tuple[str, ...]:
    return tuple(column for column, _ in key.keys)


class _FoundEvents:
    """The packed events that windows of the spine rows of `frame` can reach."""

    def __init__(
        self,
        view: FeatureView,
        frame: pl.DataFrame,
        tables: KernelTables,
        groups: Mapping[GroupKey, Sequence[SourceFeature]],
    ) -> None:
        self.view, self.frame, self.packed = view, frame, tables.packed
        self.keys = Keys(frame, [_spine_columns(key) for key in groups if key.source in tables.packed])
        self.reach: dict[GroupKey, int | None] = {}
        for key, group in groups.items():
            if key.source in self.packed:
                alike = dataclasses.replace(key, where=None)
                lengths = [self.reach.get(alike, 0), *map(_reach, group)]
                self.reach[alike] = None if None in lengths else max(length or 0 for length in lengths)
        self._found: dict[GroupKey, FoundEvents] = {}

    @functools.cached_property
    def moments(self) -> Ints:
        return moments_of(self.frame, self.view.time)

    def of(self, key: GroupKey, condition: pl.Expr | None) -> FoundEvents:
        """Those of a group, which it shares with groups that differ in their conditions only."""
        alike = dataclasses.replace(key, where=None)
        if alike not in self._found:
            reach, source = self.reach[alike], self.view.sources[key.source]
            low = ALWAYS if reach is None else int(self.moments.min(initial=0)) - reach
            wanted = self.keys.distinct(_spine_columns(key))
            self._found[alike] = self.packed[key.source].find(
                key.history.columns,
                wanted,
                str(source.event_time or source.time),
                low,
                int(self.moments.max(initial=0)),
            )
        found = self._found[alike]
        return found if condition is None or key.where is None else found.filtered(key.where, condition)


@functools.lru_cache(4096)
def _reach(feature: SourceFeature) -> int | None:
    """The length of the longest window, µs; None without a limit."""
    lengths = [] if isinstance(feature, Lookup) else window_lengths(feature)
    return None if None in lengths else max((length or 0 for length in lengths), default=0)


@functools.lru_cache(4096)
def _parts(feature: SourceFeature) -> list[list[Statistic]]:
    """The statistics of a Trailing feature by column and kind, which share work.

    Other features have one empty part.
    """
    if not isinstance(feature, Trailing):
        return [[]]
    parts: dict[tuple[str, str], list[Statistic]] = {}
    for each in feature.statistics:
        parts.setdefault((each.column, each.stat), []).append(each)
    return list(parts.values())


@contextlib.contextmanager
def computing(what: str) -> Iterator[None]:
    """Turns a failure of a user's expression into an error that names the expression."""
    try:
        yield
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"{what} has a value for every row",
            str(error).splitlines()[0],
            "Let what does not fit be null, as in cast(…, strict=False)",
        ) from None


def with_derived(view: FeatureView, feature: Derived, frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` with the feature's columns in their stored types; values that are not finite, or beyond int64, become
    null."""
    result = with_columns(frame, *_derived(view, feature))
    for name in feature.columns:
        each = view.arithmetic[name]
        if each.overflow is not None and result[name].null_count():
            lost = int((frame.select(each.overflow.alias("_"))["_"] & result[name].is_null()).sum())
            if lost:
                log.warning(
                    "Derived %r: %s of %s values are null: int64 cannot hold them", name, f"{lost:,}", f"{len(frame):,}"
                )
    return result


@functools.lru_cache(1024)
def _derived(view: FeatureView, feature: Derived) -> tuple[pl.Expr, ...]:
    """The feature's columns as they are computed and stored."""
    return tuple(cast_stored(view.arithmetic[name].expr, view.columns[name]).alias(name) for name in feature.columns)


def cast_stored(expr: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """`expr` as `dtype`, with float32 as the last conversion, and null for values that it cannot hold."""
    result = expr.cast(dtype, strict=False)
    return pl.when(result.is_finite()).then(result) if dtype.is_float() else result


def lookup_columns(feature: Lookup, spine: pl.DataFrame, dimension: pl.DataFrame) -> list[pl.Series]:
    """Looks up the columns of the dimension row that has the key of each spine row."""
    left, right = codes(spine, dimension, feature.keys)
    rows = np.full(int(max(left.max(initial=-1), right.max(initial=-1))) + 2, -1, np.int64)
    rows[right[right >= 0][::-1]] = np.flatnonzero(right >= 0)[::-1]  # the first row of a key is used
    found = rows[left]
    return _taken(dimension, feature.renamed, found, found >= 0)


def latest(feature: Latest, history: History) -> list[pl.Series]:
    """Columns of the last row in `[t − max_age, t)`."""
    last, found = history.spread(history.windows(feature.length, ordered=True), _last)
    own = history.taken(feature.renamed, last, found)
    if feature.length is not None or history.prior is None:
        return own
    before = history.restored(history.prior.value(LATEST)).struct.unnest()
    return [
        pl.select(
            pl.when(pl.Series(found))
            .then(series)
            .otherwise(cast_stored(pl.lit(before[column]), series.dtype))
            .alias(series.name)
        ).to_series()
        for column, series in zip(feature.renamed, own, strict=True)
    ]


def _last(rows: Ints, lo: Ints, hi: Ints) -> tuple[Ints, Bools]:
    found = hi > lo
    last = np.zeros(len(lo), np.int64)
    last[found] = rows[hi[found] - 1]
    return last, found


def _statistic(history: History, wanted: Statistic) -> pl.Series:
    prior = history.prior if wanted.length == history.summed else None

    def one(rows: Ints, lo: Ints, hi: Ints) -> tuple[Numbers, Bools]:
        if prior is not None and wanted.stat not in ORDERED:
            return prior.number(wanted, None if wanted.column == "*" else history.column(wanted.column, rows), lo, hi)
        if wanted.column == "*":
            return hi - lo, np.ones(len(lo), np.bool_)
        values, valid = statistic(history.column(wanted.column, rows), wanted.stat, lo, hi)
        return (rows[values] if wanted.stat in ORDERED and len(rows) else values), valid

    values, valid = history.spread(history.windows(wanted.length, wanted.stat in ORDERED), one)
    if wanted.stat in ORDERED:
        (own,) = history.taken({wanted.column: wanted.name}, values, valid)
        if prior is None:
            return own
        before = cast_stored(pl.lit(history.restored(prior.value(f"{wanted.column} {wanted.stat}"))), own.dtype)
        return pl.select(
            pl.coalesce(*((before, own) if wanted.stat == "first" else (own, before))).alias(wanted.name)
        ).to_series()
    if wanted.stat in ("count", "n_unique"):
        return pl.Series(wanted.name, values, pl.Int64)
    with np.errstate(over="ignore"):
        numbers = values.astype(np.float32)
    # Values beyond float32 become null.
    numbers[~(valid & np.isfinite(numbers))] = np.nan
    return pl.Series(wanted.name, numbers, nan_to_null=True)


def _taken(table: pl.DataFrame, renamed: Mapping[str, str], rows: Ints, found: Bools) -> list[pl.Series]:
    """`table`'s columns at `rows`, null where not found."""
    if not len(table):
        return [
            pl.Series(name, [None] * len(rows), dtype=_kept(table[column].dtype)) for column, name in renamed.items()
        ]
    if not found.all():  # a null in place of the rows that were not found
        known = np.flatnonzero(found)
        taken = table[list(renamed)][rows[known]].extend(table[list(renamed)].clear(1))
        place = np.full(len(rows), len(known))
        place[known] = np.arange(len(known))
        taken = taken[place]
    else:
        taken = table[list(renamed)][rows]
    return [_stored(taken[column], name) for column, name in renamed.items()]


def _stored(series: pl.Series, name: str) -> pl.Series:
    """As `cast_stored`."""
    result = series.cast(_kept(series.dtype), strict=False).alias(name)
    if not result.dtype.is_float() or np.isfinite(result.to_numpy()[result.is_not_null().to_numpy()]).all():
        return result
    return result.set(~result.is_finite(), None)


def _kept(dtype: pl.DataType) -> pl.DataType:
    return pl.Int64() if dtype.is_integer() else pl.Float32() if dtype.is_numeric() else dtype


class History:
    """A source's events sorted by key and time, and where each spine row's windows lie in them.

    Args:
        source: the source.
        events: its events.
        codes: of each event's key; none is negative.
        moments: of the spine rows, µs.
        spine_codes: of each spine row's key; negative if it has no events.
        prior: the summary of earlier events, and the row of it that each spine row's key has (−1: none).
    """

    def __init__(
        self,
        source: Source,
        events: pl.DataFrame | FoundEvents,
        codes: Ints,
        moments: Ints,
        spine_codes: Ints,
        prior: tuple[Summary, Ints] | None = None,
    ) -> None:
        self.source, self.events, self.moments = source, events, moments
        known = _moments(events, str(source.time))
        positions = known if source.event_time is None else _moments(events, source.event_time)
        self.sorting = EventOrder(positions, codes, moments, spine_codes)
        self.known = None if source.event_time is None else known
        self._columns = Once()
        self.until, self.prior, self.summed = None, None, None
        if prior is not None:
            summary, rows = prior
            self.until, self.summed = summary.until, summary.length
            self.prior = PriorSummary(summary.frame, rows[self.sorting.spine_order])

    @classmethod
    def of_frame(
        cls,
        source: Source,
        keys: Sequence[tuple[str, str]],
        events: pl.DataFrame,
        spine: pl.DataFrame,
        time: str,
        summary: Summary | None = None,
    ) -> History:
        """The history of all rows of a frame that have a key of the spine rows."""
        left, right = codes(spine, events, keys)
        if (right < 0).any():
            used = np.flatnonzero(right >= 0)
            events, right = events[used], right[used]
        return cls(source, events, right, moments_of(spine, time), left, _prior(keys, spine, summary))

    @lazy
    def rows(self) -> Ints:
        """The row of `events` at each position in sorted order."""
        return self.sorting.order

    @lazy
    def ordered_rows(self) -> Ints:
        """As `rows`, with events of the same key and time in the order that breaks ties in their source."""
        tied = self.sorting.ties()
        if not len(tied):
            return self.rows
        events = self.frame(self.source.ties(self.events.columns))
        some = events.select(pl.all().gather(pl.Series(self.rows[tied])))
        some = some.select(pl.Series("__place", self.sorting.sorted_keys[tied]), pl.all())
        rows = self.rows.copy()
        rows[tied] = self.rows[tied][some.select(pl.arg_sort_by(some.columns)).to_series().to_numpy()]
        return rows

    def windows(self, length: int | None, ordered: bool) -> Iterator[tuple[Ints, Ints, Ints]]:
        """Yields (rows of `events`, lo, hi): each window is `rows[lo:hi]`.

        Windows are in the order of `window_bounds.spine_order`.
        """
        rows = self.ordered_rows if ordered else self.rows
        lo, hi = self.sorting.bounds(length, self.until)
        if self.known is None:
            yield rows, lo, hi
            return
        # If events may be placed earlier than they became known, every window gets its own rows, without those that
        # were not yet known.
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
        if self.known is not None:  # the rows belong to a few windows
            return self._column(name, rows)
        made: Column = self._columns.get((name, rows is self.rows), lambda: self._column(name, rows))
        return made

    def _column(self, name: str, rows: Ints) -> Column:
        if isinstance(self.events, FoundEvents):
            found = self.events.numbers(name)
            if found is not None:
                return _column_of(found[0][rows], None if found[1] is None else found[1][rows])
        return _column_of_series(self.frame([name])[name], rows)

    def frame(self, columns: Sequence[str]) -> pl.DataFrame:
        """Columns of the events, in the order of `rows`' numbers."""
        return self.events[list(columns)] if isinstance(self.events, pl.DataFrame) else self.events.frame(columns)

    def taken(self, renamed: Mapping[str, str], rows: Ints, found: Bools) -> list[pl.Series]:
        """Columns of the events at `rows`, null where not found."""
        if isinstance(self.events, pl.DataFrame):
            return _taken(self.events, renamed, rows, found)
        taken = {}
        for column, name in renamed.items():
            dtype = self.events.nothing[column].dtype
            numbers = self.events.numbers(column) if dtype.is_numeric() and dtype != pl.UInt64 else None
            if numbers is not None:
                taken[column] = _taken_numbers(name, dtype, *numbers, rows, found)
        others = {column: name for column, name in renamed.items() if column not in taken}
        if others:
            made = _taken(self.events.frame(list(others)), others, rows, found)
            taken |= dict(zip(others, made, strict=True))
        return [taken[column] for column in renamed]

    def spread(
        self, windows: Iterable[tuple[Ints, Ints, Ints]], function: Callable[..., tuple[Numbers, Bools]]
    ) -> tuple[Numbers, Bools]:
        """The results of `function` for all windows, in the spine's order of rows."""
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
        """Puts a series that is in the order of windows into the spine's order of rows."""
        back = np.empty(len(series), np.int64)
        back[self.sorting.spine_order] = np.arange(len(series))
        return series.gather(pl.Series(back))


def _moments(events: pl.DataFrame | FoundEvents, time: str) -> Ints:
    return moments_of(events, time) if isinstance(events, pl.DataFrame) else events.moments(time)


def _prior(
    keys: Sequence[tuple[str, str]], spine: pl.DataFrame, summary: Summary | None
) -> tuple[Summary, Ints] | None:
    """A summary, and the row of it that each spine row's key has."""
    if summary is None:
        return None
    spine_codes, summary_codes = codes(spine, summary.frame, keys)
    row = np.full(int(summary_codes.max(initial=0)) + 2, -1, np.int64)
    row[summary_codes] = np.arange(len(summary_codes))
    return summary, np.where(spine_codes < 0, -1, row[spine_codes])


def _column_of(values: npt.NDArray[Any], valid: Bools | None) -> Column:
    """A column of numbers; null and NaN are both no value."""
    if values.dtype.kind == "f":
        valid = ~np.isnan(values)
    return Column(values, valid)


def _column_of_series(series: pl.Series, rows: Ints) -> Column:
    """A column in the order of `rows`."""
    if series.dtype.is_float():
        return _column_of(series.to_numpy()[rows], None)
    if series.dtype.is_integer() and not series.null_count():
        return Column(series.to_numpy()[rows], None)
    series = series[rows]
    if series.dtype == pl.String:
        series = series.cast(pl.Categorical(pl.Categories.random())).to_physical()
    elif series.dtype.is_temporal() or series.dtype == pl.Boolean:
        series = series.cast(pl.Int64)
    if not series.null_count():
        return Column(series.to_numpy(), None)
    return Column(series.fill_null(0).to_numpy(), series.is_not_null().to_numpy())


def _taken_numbers(
    name: str, dtype: pl.DataType, values: npt.NDArray[Any], valid: Bools | None, rows: Ints, found: Bools
) -> pl.Series:
    """As `_taken`, of one column of numbers."""
    at = np.flatnonzero(found)
    if valid is not None:
        at = at[valid[rows[at]]]
    some = values[rows[at]]
    if dtype.is_float():
        numbers = np.full(len(rows), np.nan, np.float32)
        with np.errstate(over="ignore"):
            numbers[at] = some
        numbers[~np.isfinite(numbers)] = np.nan
        return pl.Series(name, numbers, nan_to_null=True)
    result: list[int | None] = [None] * len(rows)
    for row, value in zip(at.tolist(), some.tolist(), strict=True):
        result[row] = value
    return pl.Series(name, result, pl.Int64)
