"""Dead letters of days that a run does not compute.

A block emits the dead letters of the rows that it owns, by day. Other rows belong to no day that a run computes: those
of dimensions, those without a plausible time, and events of days without spine rows. Their dead letters are tracked by
file. Those of unchanged files stay, those of changed files are found again, and those of files that are gone are
dropped. After each run, the table has what the first run of a new store would have written: the dead letters of every
row group that has a row which some window can see, or a row without a plausible time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from datetime import date

import polars as pl
import pyarrow as pa

from schemas.durations import DAY
from schemas.views import FeatureView
from transforms.features.block_inputs import ONE_SPINE_ROW, concat_reads, distinct_by_key, read_dimension
from transforms.features.manifest import Manifest
from transforms.features.plan import FeaturePlan, memory_bytes, within_sight
from transforms.features.routed_dimensions import account
from transforms.features.source_digests import Current
from transforms.records.record_batches import batch
from transforms.records.times import as_date, days_within, midnight
from transforms.sources.dead_letters import DEAD_LETTERS, UNDATED, concat_dead_letters, dated_dead_letters
from transforms.sources.inventory import Inventory
from transforms.sources.reader import ReadOptions, locate_rows, stream_slices
from transforms.sources.slices import Slice
from transforms.storage.delta_tables import data_files, open_table, read_group


@dataclasses.dataclass(frozen=True, eq=False)
class CarriedDeadLetters:
    """Dead letters that a run commits besides those of its own days.

    Args:
        rows: with the columns of `DEAD_LETTERS`.
        dates: dates outside the run's days whose dead letters are replaced.
        version: version of the table of dead letters from which they were taken; None: there is no table.
    """

    rows: pl.DataFrame = dataclasses.field(default_factory=lambda: _table([]))
    dates: tuple[date, ...] = ()
    version: int | None = None

    @property
    def batch(self) -> pa.RecordBatch:
        return batch(self.rows, DEAD_LETTERS)


@dataclasses.dataclass(frozen=True, eq=False)
class Carrying:
    """The state of the sources, of the table (`manifest`) and of the table of dead letters at `uri`."""

    view: FeatureView
    uri: str
    inventory: Inventory
    manifest: Manifest
    current: Current

    def changed_files(self) -> set[str]:
        """Files that are new, changed or gone since the last run. None if no run has digested any."""
        if not self.current.digested:
            return set()
        now, before = self.current.files, self.manifest.files
        return {
            path
            for name in {*now, *before} - {*self.view.dimensions}
            for path in {*now.get(name, {}), *before.get(name, {})}
            if now.get(name, {}).get(path, ("",))[0] != before.get(name, {}).get(path, ("",))[0]
        }

    def visible(self, days: Collection[int]) -> dict[str, set[Slice]]:
        """For each source with times, the row groups that windows of spine rows on `days` see, or that have no
        plausible time."""
        spine, view = self.inventory.slices[self.view.spine.name], self.view
        start, end = (midnight(min(days)), midnight(max(days) + 1)) if days else (0, 0)
        found = {name: {*within_sight(view, self.inventory, name, start, end)} for name in view.events}
        found = {name: {*each, *self.inventory.timeless(name)} for name, each in found.items()}
        return {**found, view.spine.name: {*spine}}


def _dead_letters_of(
    state: Carrying, before: Mapping[str, set[Slice]], after: Mapping[str, set[Slice]], changed: Sequence[str]
) -> list[pl.DataFrame]:
    """Dead letters of row groups of unchanged files that a window can see for the first time."""
    if not state.current.digested:
        return []
    parts, anew = [], {*changed}
    for name, slices in after.items():
        first = [each for each in slices - before[name] if each.path not in anew]
        if first:
            parts += [read.dead_letters for read in stream_slices(state.inventory.contract(name), first)]
    return parts


def _within(dead_letters: pl.DataFrame, view: FeatureView, slices: Mapping[str, set[Slice]]) -> pl.DataFrame:
    """Dead letters of rows in `slices`, and all those of dimensions."""
    bounds = [(each.path, each.first, each.end) for every in slices.values() for each in every]
    groups = pl.DataFrame(bounds, {"file": pl.String, "from": pl.Int64, "to": pl.Int64}, orient="row")
    inside = dead_letters.join(groups, on="file").filter(pl.col("row").is_between("from", "to", closed="left"))
    kept = inside.select("source", "file", "row").unique()
    of_dimensions = dead_letters.filter(pl.col("source").is_in(list(view.dimensions)))
    return _table([dead_letters.join(kept, on=["source", "file", "row"], how="semi"), of_dimensions]).unique(
        maintain_order=True
    )


def carry(
    state: Carrying, ranges: Sequence[tuple[int, int]], dimensions: pl.DataFrame | None = None
) -> CarriedDeadLetters:
    """Decides which dead letters outside the `[start, end)` ranges (µs) stay, are dropped or are new.

    Args:
        dimensions: dead letters of all dimensions; None: the run emits them (if it has ranges), or they are unchanged.
    """
    view = state.view
    table = open_table(state.uri)
    files = [] if table is None else data_files(table, extra={"view": view.name})
    found: pl.DataFrame = pl.from_arrow(read_group(files)) if files else _table([])  # type: ignore[assignment]
    held = _table([found.with_columns(pl.lit(view.name).alias("view"))])
    inside = [as_date(day) for day in days_within(ranges)]
    outside = held.filter(~pl.col("date").is_in(inside))
    days, spine = {*state.manifest.dates, *days_within(ranges)}, state.current.digests.get(view.spine.name, {})
    before = state.visible(state.manifest.dates)
    after = state.visible([day for day in days if day in spine] if state.current.digested else days)
    changed = list(state.changed_files())
    of_dimensions = pl.col("source").is_in(list(view.dimensions))
    emitted = bool(ranges) and bool(view.dimensions)
    stays = ~pl.col("file").is_in(changed) & (~of_dimensions | pl.lit(not emitted and dimensions is None))
    dropped = outside.filter(~stays)
    appeared = _dead_letters_of(state, before, after, changed)
    conflicts = _conflicts(state, dropped, changed)
    fresh = dated_dead_letters(view, [state.current.dead_letters, *appeared, conflicts])
    # Earlier versions dated the dead letters of dimensions by the run, and repeated them for each run.
    kept = outside.filter(stays).with_columns(
        pl.when(of_dimensions).then(pl.lit(UNDATED)).otherwise("date").alias("date")
    )
    wanted = _within(_table([kept, fresh]), view, after)
    wanted = _table([wanted, *([] if dimensions is None else [dimensions])])
    wanted = wanted.filter(~pl.col("date").is_in(inside)).unique(
        ["date", "source", "file", "row"], keep="first", maintain_order=True
    )
    dates = _different_dates(outside, wanted) | ({UNDATED} if emitted else set())
    version = None if table is None else int(table.version())
    return CarriedDeadLetters(wanted.filter(pl.col("date").is_in(list(dates))), tuple(sorted(dates)), version)


def _conflicts(state: Carrying, dropped: pl.DataFrame, changed: Sequence[str]) -> pl.DataFrame:
    """Contradictory spine rows in `changed` files. They are found by reading the days that had some."""
    view, spine = state.view, state.inventory.spine
    slices = state.inventory.slices[view.spine.name]
    parts = []
    for (day,) in dropped.filter(pl.col("rule") == ONE_SPINE_ROW).select("date").unique().iter_rows():
        low, high = midnight(day), midnight(day) + DAY
        near = [each for each in slices if each.low < high and each.high >= low]
        _, conflicts = distinct_by_key(
            concat_reads(stream_slices(spine, near, ReadOptions(low, high))).frame, (view.time, *view.key)
        )
        parts.append(locate_rows(spine, near, conflicts, view.key, ONE_SPINE_ROW))
    return concat_dead_letters(parts).filter(pl.col("file").is_in(list(changed)))


def _different_dates(before: pl.DataFrame, after: pl.DataFrame) -> set[date]:
    """Dates whose dead letters differ."""
    left, right = (each.unique() for each in (before, after))
    changed = [a.join(b, on=a.columns, how="anti", nulls_equal=True) for a, b in ((left, right), (right, left))]
    twice = before.filter(before.select(pl.struct(pl.all()).is_duplicated()).to_series())
    return set(pl.concat([*changed, twice])["date"])


def _table(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Dead letters with the columns of `DEAD_LETTERS`."""
    empty: pl.DataFrame = pl.from_arrow(pa.Table.from_batches([], DEAD_LETTERS))  # type: ignore[assignment]
    return pl.concat([empty, *(part.select(empty.columns) for part in parts)])


def dimensions_changed(view: FeatureView, manifest: Manifest, current: Current) -> bool:
    """Whether a file of a dimension has changed since the last run."""
    return any(current.files.get(name, {}) != manifest.files.get(name, {}) for name in view.dimensions)


def read_dimensions(view: FeatureView, inventory: Inventory, broadcast_bytes: float) -> pl.DataFrame:
    """Dead letters of all dimensions, with the columns of `DEAD_LETTERS`."""
    slices = {name: inventory.slices[name] for name in view.dimensions}
    plan = FeaturePlan((), (), (0, 0), (), slices, {}, inventory.contracts, inventory.spine)
    parts = []
    for name in view.dimensions:
        large = memory_bytes(inventory.contracts[name], slices[name]) > broadcast_bytes
        parts.append((account if large else read_dimension)(view, plan, name).dead_letters)
    return dated_dead_letters(view, parts)
