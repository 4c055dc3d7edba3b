"""Repeated events: of the rows of a source with the same `unique` value, those that follow another one do not count."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl

from schemas.live import repeats_by
from schemas.views import FeatureView
from transforms.features.packed_events import Keys
from transforms.records.columns import moments_of
from transforms.records.row_hashing import key_hashes
from transforms.records.times import ALWAYS, FOREVER
from transforms.streaming.fates import WindowReach, known_columns, known_order
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID
from transforms.streaming.time_buckets import MINUTE, SLOTS, TimeBuckets

_COUNTS, _NEW = "__counts", "__new"
_NONE_UNCOMPARED = pl.Series(RID, [], pl.Int64)
_NONE_REPLACED = pl.DataFrame(schema={RID: pl.Int64, "__instead": pl.Int64})
# Up to this many new events are looked up key by key.
FEW = 256


@dataclasses.dataclass(frozen=True, eq=False)
class Deduplicated:
    """New events of a source, without repeats.

    Args:
        counted: the events that count.
        replaced: identities (`__instead`) of events that counted until an event with the identity `RID` came, which
            they repeat.
        repeated: number of events that do not count, or no longer count.
        uncompared: identities of events that are too old to be compared.  They count.
    """

    counted: pl.DataFrame
    replaced: pl.DataFrame
    repeated: int
    uncompared: pl.Series = dataclasses.field(default_factory=lambda: _NONE_UNCOMPARED)


class RepeatFinder:
    """Keeps the events of a source with `unique` for as long as a later event may repeat them.

    Args:
        view: the view.
        name: name of the source.
        memory: for how long (µs) repeats are recognised.
        reach: how far the windows of all views of the job reach back over the source.
    """

    def __init__(self, view: FeatureView, name: str, memory: int, reach: WindowReach) -> None:
        self.view, self.name, self.memory, self.reach = view, name, memory, reach
        self.unique = list(repeats_by(view, name))
        self.order = known_order(view, name)
        longest = max([0, *(view.reach(each) for each in view.events)])
        self.store = TimeBuckets(self.order.time, max(2 * longest // (SLOTS - 2), MINUTE))

    def restore(self, rows: pl.DataFrame, counts: pl.Series) -> None:
        """Adds accepted events, and whether they count."""
        self.store.add(self._known(rows, counts))

    def deduplicate(self, rows: pl.DataFrame, horizon: int) -> Deduplicated:
        """Decides which new events count, and stores them.

        Args:
            rows: new events, with their origin and `RID`.
            horizon: the journal's horizon (µs).  Events that are older than this by more than `comparison_span` are not
                compared. This is exact to the microsecond, because a shard cannot retract an event that it has
                compacted.
        """
        whole, uncompared = rows, _NONE_UNCOMPARED
        if horizon > ALWAYS:
            bound = horizon - self.reach.comparison_span(self.memory)
            old = moments_of(rows, self.order.time) < bound
            if old.any():
                uncompared, rows = rows[RID].filter(pl.Series(old)), rows.filter(pl.Series(~old))
        counts = pl.Series(np.ones(len(rows), np.bool_))
        if len(rows) <= FEW and self._alone(rows):
            self.restore(rows, counts)
            return Deduplicated(whole, _NONE_REPLACED, 0, uncompared)
        hashes = key_hashes(rows, self.unique)
        found = self.store.take(tuple(self.unique), hashes, ALWAYS, FOREVER)
        if not found and len(np.unique(hashes)) == len(hashes):
            self.restore(rows, counts)
            return Deduplicated(whole, _NONE_REPLACED, 0, uncompared)
        new = self._known(rows, counts)
        known = [each.join(rows, on=self.unique, how="semi").with_columns(pl.lit(False).alias(_NEW)) for each in found]
        both = pl.concat([*known, new.with_columns(pl.lit(True).alias(_NEW))])
        decided = self._decided(both.filter(pl.struct(self.unique).is_duplicated()))
        repeats = decided.filter(_NEW, pl.col("__repeat"))[RID]
        replaced = decided.filter(~pl.col(_NEW) & pl.col("__replaced") & pl.col(_COUNTS))
        if len(replaced):
            gone = self.store.drop(RID, replaced[RID].to_numpy())
            assert gone is not None
            self.store.add(gone.with_columns(pl.lit(False).alias(_COUNTS)))
        again = rows[RID].is_in(repeats.implode())
        self.restore(rows, ~again)
        return Deduplicated(
            whole.filter(~pl.col(RID).is_in(repeats.implode())),
            replaced.select(pl.col("__by").alias(RID), pl.col(RID).alias("__instead")),
            len(repeats) + len(replaced),
            uncompared,
        )

    def _alone(self, rows: pl.DataFrame) -> bool:
        """Whether no row has the `unique` value of another one, new or known."""
        unique = tuple(self.unique)
        if any(rows[name].dtype.is_float() for name in unique):
            return False
        keys = Keys(rows, [unique]).distinct(unique)
        return len(keys.keys) == len(rows) and not self.store.holds(unique, keys)

    def _decided(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The events in order, with whether they repeat another one, and the new one (`__by`) that a known one repeats.

        A new event is compared with all others, a known one only with the new ones: known ones have been compared
            already, maybe by a job with a shorter memory.
        """
        time = pl.col(self.order.time).to_physical()
        new_time, new_id = pl.when(_NEW).then(time), pl.when(_NEW).then(RID)
        return (
            self.order.sort(rows)
            .with_columns(
                (time - time.shift(1)).over(self.unique).alias("__gap"),
                (time - new_time.forward_fill().shift(1)).over(self.unique).alias("__new_gap"),
                new_id.forward_fill().shift(1).over(self.unique).alias("__by"),
            )
            .with_columns(
                (pl.col("__gap") <= self.memory).fill_null(False).alias("__repeat"),
                (pl.col("__new_gap") <= self.memory).fill_null(False).alias("__replaced"),
            )
        )

    def _known(self, rows: pl.DataFrame, counts: pl.Series) -> pl.DataFrame:
        columns = list(dict.fromkeys([*known_columns(self.view, self.name), *ORIGIN_COLUMNS, RID]))
        return rows[columns].hstack([counts.alias(_COUNTS)])
