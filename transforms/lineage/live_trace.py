"""The origin of a live feature row: its spine row, and the rows of each source that its cut shows."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import date

import polars as pl

from schemas.views import FeatureView, reached_from
from transforms.lineage.visible_rows import seen_of
from transforms.storage.delta_tables import TableRow, open_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.row_origin import cut_of


@dataclasses.dataclass(frozen=True)
class LiveVisibleSource:
    """What a live feature row could see of one source.

    Args:
        table: where its accepted rows are; None if they are not in this store.
        cut: next offset per partition.
        days: (UTC day, number of rows that a feature could reach); empty for the spine unless it is also a source of
            events.
    """

    source: str
    table: str | None
    cut: Mapping[int, int]
    days: tuple[tuple[date, int], ...]


@dataclasses.dataclass(frozen=True)
class DimensionUsed:
    """The version of a dimension that a feature row used, and its file; None if the file is gone."""

    source: str
    version: str
    path: str | None


def visible_to(view: FeatureView, store: str, row: TableRow) -> list[LiveVisibleSource]:
    """What the feature row `row` of the live feature table could see; the spine is first."""
    cut = cut_of(row["__cut"])
    at = int(pl.Series([row[view.time]]).cast(pl.Datetime("us", "UTC")).to_physical()[0])
    result = []
    for name in dict.fromkeys([view.spine.name, *view.events]):
        uri = source_uri(sources_root(store), name)
        table = uri if open_table(uri) is not None else None
        offsets = {partition: offset for (source, partition), offset in sorted(cut.items()) if source == name}
        days: tuple[tuple[date, int], ...] = ()
        if name in view.events and table is not None:
            seen = seen_of(view, store, name, [row["__cut"]], row["date"], row["date"])
            times = seen.at(0, reached_from(view, name, at), at)[str(view.events[name].time)]
            days = tuple(pl.DataFrame({"day": times.dt.date()}).group_by("day").len().sort("day").iter_rows())
        result.append(LiveVisibleSource(name, table, offsets, days))
    return result


def dimensions_used(store: str, row: TableRow) -> list[DimensionUsed]:
    """The dimensions that the feature row used."""
    result = []
    for name, version in json.loads(row["__dimensions"] or "{}").items():
        path = FileSystems.join(store, "dimensions", name, f"{version}.arrow")
        result.append(DimensionUsed(name, version, path if FileSystems.exists(path) else None))
    return result
