"""Routing: which rows of a turn each shard gets.

The hash of a group's key decides the shard of the group's events and spine rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from schemas.views import FeatureView
from transforms.records.arrays import Bools, Ints, UInt64s
from transforms.records.row_hashing import key_hashes, keys_hashes
from transforms.streaming.groups import Group
from transforms.streaming.step_messages import ShardTables


class TurnRouting:
    """The rows of one turn, by shard.

    Args:
        view: the view.
        groups: its groups.
        shards: number of shards.
    """

    def __init__(self, view: FeatureView, groups: Sequence[Group], shards: int) -> None:
        self.view, self.groups = view, groups
        self.tables = [ShardTables() for _ in range(shards)]

    def add_events(self, source: str, rows: pl.DataFrame) -> None:
        """Adds new events."""
        for tables, mine in self._events_by_shard(source, rows):
            tables.rows[source] = mine

    def add_old_events(self, source: str, rows: pl.DataFrame) -> None:
        """Adds events that a shard keeps only in compacted form."""
        for tables, mine in self._events_by_shard(source, rows):
            tables.old[source] = mine

    def add_replaced(self, source: str, identities: pl.Series) -> None:
        """Adds identities of events that no longer count.  Every shard gets them, because it is not known which shard
        has the events."""
        for tables in self.tables:
            tables.replaced[source] = identities

    def add_compacted(self, number: int, events: pl.DataFrame) -> None:
        """Adds compacted events of a group."""
        owner = shard_of(key_hashes(events, self.groups[number].source_columns), len(self.tables))
        for shard, tables in enumerate(self.tables):
            mine = owner == shard
            if mine.any():
                tables.compacted[number] = events.filter(pl.Series(mine))

    def add_spine_rows(self, rows: pl.DataFrame) -> int:
        """Adds spine rows whose features are to be computed, with the keys of the groups (see `GroupKeys`).

        Returns:
            Number of shards that compute some of them.
        """
        owners = self._shards_of(rows, [each.spine_columns for each in self.groups])
        columns = dict.fromkeys([self.view.time, *(name for group in self.groups for name in group.spine_columns)])
        sent = pl.DataFrame([pl.Series("__position", np.arange(len(rows))), *(rows[name] for name in columns)])
        shards = 0
        for shard, tables in enumerate(self.tables):
            mine = np.any([owner == shard for owner in owners.values()], axis=0)
            if mine.any():
                tables.spine_rows = sent if mine.all() else sent.filter(pl.Series(mine))
                shards += 1
        return shards

    def _events_by_shard(self, source: str, rows: pl.DataFrame) -> Iterator[tuple[ShardTables, pl.DataFrame]]:
        """The tables of each shard that needs some of the rows, and these rows."""
        for tables, mine in zip(self.tables, self._owners(source, rows), strict=True):
            if mine.any():
                yield tables, rows if mine.all() else rows.filter(pl.Series(mine))

    def _owners(self, source: str, rows: pl.DataFrame) -> list[Bools]:
        """For each shard, which events of a source it needs: those with one of its keys, in any group."""
        wanted = [np.zeros(len(rows), np.bool_) for _ in self.tables]
        of_source = [group.source_columns for group in self.groups if group.source == source]
        for keys, owner in self._shards_of(rows, of_source).items():
            for name in keys:
                if rows[name].null_count():
                    owner = np.where(rows[name].is_null().to_numpy(), -1, owner)  # a null key matches nothing
            for shard, mine in enumerate(wanted):
                mine |= owner == shard
        return wanted

    def _shards_of(self, rows: pl.DataFrame, keys: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], Ints]:
        """The shard of each row, by its key."""
        if len(self.tables) == 1:
            return {key: np.zeros(len(rows), np.int64) for key in keys}
        return {key: shard_of(hashes, len(self.tables)) for key, hashes in keys_hashes(rows, keys).items()}


def shard_of(hashes: UInt64s, shards: int) -> Ints:
    """The number of the shard of each key hash."""
    return (hashes >> np.uint64(33)).astype(np.int64) % shards
