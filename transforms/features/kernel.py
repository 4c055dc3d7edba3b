"""Computes features from spine rows and the events before them. Independent of Beam, blocks and shards."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import polars as pl

from schemas.errors import DataError
from schemas.feature_groups import GroupKey, HistoryKey, SourceFeature, column_names, group_key, without_columns
from schemas.features import ORDERED, Derived, Latest, Lookup, Statistic, Trailing
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.lifetime_summaries import LATEST, PriorSummary, Summary
from transforms.features.window_bounds import EventOrder, codes
from transforms.features.window_statistics import Column, Once, lazy, statistic
from transforms.records.arrays import Bools, Ints
from transforms.records.columns import moments_of, with_columns, with_series
from transforms.records.window_sums import Numbers

# Rows that the general path (event_time) may hold at once.
EXPANDED_ROWS = 4_000_000
# Up to this many rows, a group is computed on the calling thread: a thread pool would cost more.
HANDED_OVER = 20_000
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
    """

    rows: Mapping[str, pl.DataFrame]
    summaries: Mapping[HistoryKey, Summary] = dataclasses.field(default_factory=dict)
    columns: Mapping[str, pl.Series] = dataclasses.field(default_factory=dict)

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

    def history_of(key: GroupKey, first: SourceFeature) -> History | None:
        if isinstance(first, Lookup):
            return None
        events = tables.rows[key.source]
        if first.condition is not None:
            with computing(f"where of {first.name!r}"):
                events = events.filter(first.condition)
        return History(first.source, first.keys, events, frame, view.time, tables.summaries.get(key.history))

    def work(feature: SourceFeature, history: History | None, wanted: list[Statistic]) -> list[pl.Series]:
        if isinstance(feature, Lookup):
            return lookup_columns(feature, frame, tables.rows[feature.source.name])
        assert history is not None
        if isinstance(feature, Latest):
            return latest(feature, history)
        return [_statistic(history, each) for each in wanted]

    if len(frame) + max((len(tables.rows[key.source]) for key in groups), default=0) <= HANDED_OVER:
        for key, group in groups.items():
            history = history_of(key, group[0])
            columns += [series for each in group for part in _parts(each) for series in work(each, history, part)]
        return columns
    pool = kernel_pool()
    # The statistics of a group start as soon as its history is sorted, while other histories are still being sorted.
    histories = [(group, pool.submit(history_of, key, group[0])) for key, group in groups.items()]
    tasks = [
        pool.submit(work, feature, history.result(), part)
        for group, history in histories
        for feature in group
        for part in _parts(feature)
    ]
    return [*columns, *(series for task in tasks for series in task.result())]


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
    own = _taken(history.events, feature.renamed, last, found)
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
        (own,) = _taken(history.events, {wanted.column: wanted.name}, values, valid)
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
    """A source's events sorted by key and time, and where each spine row's windows lie in them."""

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
            used = np.flatnonzero(right >= 0)
            events, right = events[used], right[used]
        self.source = source
        known = moments_of(events, str(source.time))
        positions = known if source.event_time is None else moments_of(events, source.event_time)
        self.moments = moments_of(spine, time)
        self.sorting = EventOrder(positions, right, self.moments, left)
        self.events = events
        self.known = None if source.event_time is None else known
        self._columns = Once()
        self.until, self.prior, self.summed = None, None, None if summary is None else summary.length
        if summary is not None:
            spine_codes, summary_codes = codes(spine, summary.frame, keys)
            row = np.full(int(summary_codes.max(initial=0)) + 2, -1, np.int64)
            row[summary_codes] = np.arange(len(summary_codes))
            self.until, self.prior = (
                summary.until,
                PriorSummary(summary.frame, np.where(spine_codes < 0, -1, row[spine_codes])[self.sorting.spine_order]),
            )

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
        by = self.source.ties(self.events.columns)
        some = self.events.select(by).select(pl.all().gather(pl.Series(self.rows[tied])))
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
        series = self.events[name]
        if series.dtype.is_float():  # neither null nor NaN counts as a value
            numbers = series.to_numpy()[rows]
            valid = ~np.isnan(numbers)
            return Column(numbers, None if valid.all() else valid)
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
