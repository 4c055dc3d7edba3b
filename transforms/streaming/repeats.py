"""Repeated events: of the rows of a source that have one `unique` value, the one that was known first counts."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from schemas.live import repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.records.times import ALWAYS, FOREVER
from transforms.streaming.row_origin import RID
from transforms.streaming.time_buckets import MINUTE, SLOTS, TimeBuckets, key_hashes


@dataclasses.dataclass(frozen=True, eq=False)
class Deduplicated:
    """New events of a source, without repeats.

    Args:
        counted: the events that count.
        replaced: identities (`__instead`) of events that counted until an event with the identity `RID` came, which
            repeats them and was known earlier.
        repeated: number of events that do not count, or no longer.
    """

    counted: pl.DataFrame
    replaced: pl.DataFrame
    repeated: int


class Repeats:
    """The counted events of a source with `unique`, for as long as a repeat may replace them.

    Args:
        view: the view.
        name: name of the source.
    """

    def __init__(self, view: FeatureView, name: str) -> None:
        self.source = view.events[name]
        self.unique = list(repeats_by(view, name))
        self.lifetime = name in lifetime_sources(view)
        self.remembered = remembered(view, name)
        reach = max([0, *(view.reach(each) for each in view.events)])
        self.store = TimeBuckets(str(self.source.time), max(2 * reach // (SLOTS - 2), MINUTE))

    def deduplicate(self, rows: pl.DataFrame, horizon: int) -> Deduplicated:
        """Decides which new events count, and stores them.

        Args:
            rows: new events, with `RID`.
            horizon: the journal's (µs).  Earlier events than this, less what is `remembered`, are not looked up: to the
                microsecond, since a shard cannot retract an event that it has compacted.
        """
        time = pl.col(str(self.source.time))
        remembered = pl.lit(True) if horizon == ALWAYS else time.to_physical() >= horizon - self.remembered
        hashes = key_hashes(rows, self.unique)
        known = [each.filter(remembered) for each in self.store.take(tuple(self.unique), hashes, ALWAYS, FOREVER)]
        if not any(map(len, known)) and len(np.unique(hashes)) == len(hashes):
            self.store.add(rows.filter(remembered))
            return Deduplicated(rows, pl.DataFrame(schema={RID: pl.Int64, "__instead": pl.Int64}), 0)
        old = pl.concat(known).join(rows, on=self.unique, how="semi") if known else rows.clear()
        first = self._first(pl.concat([old, rows]))
        counted = rows.filter(pl.col(RID).is_in(first[RID].implode()))
        gone = self._replaced(old, first)
        if len(gone):
            self.store.drop(RID, gone["__instead"].to_numpy())
        self.store.add(counted.filter(remembered))
        replaced = first.join(gone, on=self.unique).select(RID, "__instead")
        return Deduplicated(counted, replaced, len(rows) - len(counted) + len(gone))

    def _first(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The event of each `unique` value that was known first."""
        order = dict.fromkeys([*self.unique, str(self.source.time), *self.source.ties(rows.columns)])
        return rows.sort(list(order), maintain_order=True).unique(self.unique, keep="first", maintain_order=True)

    def _replaced(self, old: pl.DataFrame, first: pl.DataFrame) -> pl.DataFrame:
        """The events among `old` that are replaced: their `unique` value, and their identity as `__instead`."""
        # Several may count, since the job that accepted them remembered less.  A row can name only one.
        gone = self._first(old).filter(~pl.col(RID).is_in(first[RID].implode()))
        if not self.lifetime:  # a restart reads back only this far to find what replaced a row
            time = pl.col(str(self.source.time))
            since = first.select(*self.unique, time.alias("__since"))
            gone = gone.join(since, on=self.unique)
            gone = gone.filter(time <= pl.col("__since").dt.offset_by(f"{self.remembered}us"))
        return gone.select(*self.unique, pl.col(RID).alias("__instead"))


def remembered(view: FeatureView, name: str) -> int:
    """For how long (µs) before the journal's horizon the events of a source are remembered, to find repeats."""
    return 2 * view.reach(name)


def known_columns(view: FeatureView, name: str) -> list[str]:
    """The columns that are stored of a source's events to find repeats: they decide ties."""
    return list(view.spine.schema) if view.events[name] is view.spine else view.columns_held(name)
