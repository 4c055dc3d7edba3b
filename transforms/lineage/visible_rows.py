"""Rows that a live job accepted, and which of them a feature row could see by its cut."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.live import accepted, repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.records.times import days_in
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, cut_of, row_identity

Ints = npt.NDArray[np.int64]


Bools = npt.NDArray[np.bool_]


NEVER = 2**62


@dataclasses.dataclass(frozen=True, eq=False)
class VisibleRows:
    """A source's rows, and by the order of cuts: the first that shows each, and the first that no longer does."""

    rows: pl.DataFrame
    moments: Ints
    shown: Ints
    gone: Ints

    def at(self, cut: int, low: int, high: int) -> pl.DataFrame:
        """Rows of time `[low, high)` that count as of `cut`."""
        return self.rows.filter(
            pl.Series((self.shown <= cut) & (self.gone > cut) & (self.moments >= low) & (self.moments < high))
        )

    @property
    def latest(self) -> Ints:
        """The last cut at which each row's standing changed."""
        return np.maximum(self.shown, np.where(self.gone < NEVER, self.gone, 0))


def seen_of(view: FeatureView, store: str, name: str, cuts: Sequence[str], first: date, last: date) -> VisibleRows:
    """The rows of a source that spine rows of `[first, last]` can reach, each with the cuts that show it."""
    source = view.events[name]
    back = None if name in lifetime_sources(view) else first - timedelta(days=days_in(view.reach(name)) + 1)
    extra = ["__counted", "__instead"] if repeats_by(view, name) else []
    rows = read_accepted(
        view, store, name, [*view.columns_held(name), *ORIGIN_COLUMNS, *extra], back, last + timedelta(days=1)
    )
    shown = shown_at(name, rows, cuts)
    gone = np.full(len(rows), NEVER, np.int64)
    if repeats_by(view, name):
        replacing = read_accepted(view, store, name, [*ORIGIN_COLUMNS, "__instead"], None, None).filter(
            pl.col("__instead").is_not_null()
        )
        gone = replaced_at(rows, replacing["__instead"], shown_at(name, replacing, cuts))
        counted = rows["__counted"].to_numpy()
        rows, shown, gone = rows.filter(pl.Series(counted)), shown[counted], gone[counted]
    moments = rows[str(source.time)].to_physical().to_numpy()
    return VisibleRows(rows.select(view.columns_held(name)), moments, shown, gone)


def shown_at(source: str, rows: pl.DataFrame, cuts: Sequence[str]) -> Ints:
    """Place of the first cut that shows each row; `len(cuts)` for those that came after the last."""
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
    """Columns of a source's accepted rows of the dates `[start, end)`."""
    table = open_table(source_uri(sources_root(store), name))
    files = [] if table is None else data_files(table, start, end)
    schema = accepted(view, name)
    empty = pl.DataFrame(pl.from_arrow(schema.empty_table()))
    return pl.concat(
        [empty.select(columns), *(pl.DataFrame(pl.from_arrow(read_file(file, list(columns)))) for file in files)]
    )


def replaced_at(rows: pl.DataFrame, replaced: pl.Series, shown: Ints) -> Ints:
    """The first cut at which each row no longer counts, since a row that repeats it does; `NEVER` if there is none.

    Args:
        replaced: identities of rows that other rows replace; null for a row that replaces none.
        shown: the first cut that shows each of those other rows.
    """
    at = pl.DataFrame({RID: replaced, "gone": shown}).drop_nulls(RID).group_by(RID).agg(pl.col("gone").min())
    found = rows.select(row_identity(rows)).join(at, on=RID, how="left", maintain_order="left")["gone"]
    return found.fill_null(NEVER).to_numpy()
