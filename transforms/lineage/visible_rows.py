"""Rows that a live job accepted and that keep a view's contract, and which of them a feature row could see by its
cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl

from schemas.live import accepted, repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.records.arrays import Ints
from transforms.records.times import days_in
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.accepted_rows import accepted_file
from transforms.streaming.fates import FATE_COLUMNS, RepeatMemory, known_columns, known_order, repeated_from
from transforms.streaming.live_tables import source_record
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, cut_of, row_identity


@dataclasses.dataclass(frozen=True, eq=False)
class VisibleRows:
    """A source's rows, and for each row the positions of two cuts: the first that shows it, and the first that no
    longer does."""

    rows: pl.DataFrame
    moments: Ints
    shown: Ints
    gone: Ints

    def at(self, cut: int, low: int, high: int) -> pl.DataFrame:
        """The rows with times in `[low, high)` that count as of `cut`."""
        return self.rows.filter(
            pl.Series((self.shown <= cut) & (self.gone > cut) & (self.moments >= low) & (self.moments < high))
        )

    @property
    def latest(self) -> Ints:
        """The last cut at which each row began or ceased to count."""
        return np.maximum(self.shown, np.where(self.gone < NEVER_REPEATED, self.gone, 0))


def seen_of(view: FeatureView, store: str, name: str, cuts: Sequence[str], first: date, last: date) -> VisibleRows:
    """The rows of a source that spine rows of `[first, last]` can reach, each with the cuts that show it."""
    source, columns = view.events[name], view.columns_held(name)
    back = None if name in lifetime_sources(view) else first - timedelta(days=days_in(view.reach(name)) + 1)
    if not repeats_by(view, name):
        rows = read_accepted(view, store, name, [*columns, *ORIGIN_COLUMNS], back, last + timedelta(days=1))
        shown, gone = shown_at(name, rows, cuts), np.full(len(rows), NEVER_REPEATED, np.int64)
    else:
        memory = memory_of(store, name)
        back = back and back - timedelta(days=days_in(memory.length) + 1)
        known = dict.fromkeys([*known_columns(view, name), *columns, *ORIGIN_COLUMNS, *FATE_COLUMNS])
        rows = read_accepted(view, store, name, list(known), back, last + timedelta(days=1))
        shown = shown_at(name, rows, cuts)
        gone = gone_at(view, store, name, rows, shown, cuts)
        counts = shown < gone
        rows, shown, gone = rows.filter(pl.Series(counts)), shown[counts], gone[counts]
    moments = rows[str(source.time)].to_physical().to_numpy()
    return VisibleRows(rows.select(columns), moments, shown, gone)


def memory_of(store: str, name: str) -> RepeatMemory:
    """For how long the jobs of a store recognised repeats of a source."""
    record = source_record(store, name)
    return RepeatMemory() if record is None else record.memory.get(name, RepeatMemory())


def gone_at(view: FeatureView, store: str, name: str, rows: pl.DataFrame, shown: Ints, cuts: Sequence[str]) -> Ints:
    """The first cut at which each row of a source with repeats no longer counts; `NEVER_REPEATED` if there is none.

    Args:
        view: the view.
        store: the folder of the tables.
        name: name of the source.
        rows: accepted rows, with the columns that decide which of them count.
        shown: the first cut that shows each.
        cuts: the cuts, in order.
    """
    memory, replaced = memory_of(store, name), np.full(len(rows), NEVER_REPEATED, np.int64)
    if (memory.span_of(rows) == 0).any():  # rows for which an earlier version of Millrace has decided
        columns = [*ORIGIN_COLUMNS, "__instead", "__uncompared"]
        before = read_accepted(view, store, name, columns, None, None)
        before = before.filter(pl.col("__instead").is_not_null() & pl.Series(memory.span_of(before) == 0))
        replaced = replaced_at(rows, before["__instead"], shown_at(name, before, cuts))
    return repeated_from(known_order(view, name), memory, rows, shown, replaced)


def shown_at(source: str, rows: pl.DataFrame, cuts: Sequence[str]) -> Ints:
    """Position of the first cut that shows each row; `len(cuts)` for rows that arrived after the last cut."""
    result = np.zeros(len(rows), np.int64)
    parsed = [cut_of(text) for text in cuts]
    partitions, offsets = rows["__partition"].to_numpy(), rows["__offset"].to_numpy()
    for partition in np.unique(partitions).tolist():
        until = np.array([cut.get((source, partition), 0) for cut in parsed], np.int64)
        mine = partitions == partition
        result[mine] = np.searchsorted(until, offsets[mine], "right")
    return result


def read_accepted(
    view: FeatureView, store: str, name: str, columns: Sequence[str], start: date | None, end: date | None
) -> pl.DataFrame:
    """Columns of a source's accepted rows of the dates `[start, end)` that keep the view's contract."""
    table = open_table(source_uri(sources_root(store), name))
    files = [] if table is None else data_files(table, start, end)
    schema = accepted(view, name)
    empty = pl.DataFrame(pl.from_arrow(schema.empty_table()))
    return pl.concat([empty.select(columns), *(accepted_file(view, name, file, columns) for file in files)])


def replaced_at(rows: pl.DataFrame, replaced: pl.Series, shown: Ints) -> Ints:
    """The first cut at which each row no longer counts, because a row that repeats it does; else `NEVER_REPEATED`.

    Args:
        replaced: identities of rows that other rows replace; null for a row that replaces none.
        shown: the first cut that shows each of those other rows.
    """
    at = pl.DataFrame({RID: replaced, "gone": shown}).drop_nulls(RID).group_by(RID).agg(pl.col("gone").min())
    found = rows.select(row_identity(rows)).join(at, on=RID, how="left", maintain_order="left")["gone"]
    return found.fill_null(NEVER_REPEATED).to_numpy()
