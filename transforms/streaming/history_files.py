"""The files of a source as history of a live job: its rows in the order of time, checked and counted as batch does."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from schemas.errors import ContractError
from schemas.live import live_sources, repeats_by
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.block_inputs import concat_reads, distinct_by_key
from transforms.records.times import ALWAYS, day_number, days_in, midnight, now_us
from transforms.sources.contracts import Contract
from transforms.sources.dead_letters import as_message_dead_letters
from transforms.sources.inventory import source_files, spine_contract, survey_files, version_of
from transforms.sources.listing import Listing
from transforms.sources.reader import (
    READ_CHUNK_ROWS,
    ReadOptions,
    RepeatedKeys,
    repeats_of,
    stream_slices,
    without_repeats,
)
from transforms.sources.slices import Slice
from transforms.storage.paths import place_of
from transforms.streaming.beginnings import HISTORY_PARTITION
from transforms.streaming.messages import ABSENT, absent_text


class HistoryPiece(NamedTuple):
    """Rows of some days.

    Args:
        rows: in the order of time, with `__uncompared` and `ABSENT`; for a source with `unique`, with `FATE_COLUMNS`.
        dead_letters: with the columns `MESSAGE_DEAD_LETTERS`.
    """

    rows: pl.DataFrame
    dead_letters: pl.DataFrame


@dataclasses.dataclass(frozen=True, eq=False)
class HistoryFiles:
    """The files of a source.

    Args:
        view: the view.
        source: the source.
        contract: the contract of its rows.
        slices: its row groups.
        version: version of the source: a Delta table's version, or a digest of its files.
        listings: the files as they were listed; empty for a Delta table.
    """

    view: FeatureView
    source: Source
    contract: Contract
    slices: tuple[Slice, ...]
    version: str
    listings: tuple[Listing, ...] = ()

    @classmethod
    def of(cls, view: FeatureView, root: str, name: str) -> HistoryFiles:
        """The files of the source `name` under the folder `root`."""
        source = live_sources(view)[name]
        if source is view.spine:
            contract = spine_contract(view, now_us())
        else:
            contract = Contract(
                source, tuple(view.columns_read(name)), now=now_us(), ordering=view.columns_ordering(name)
            )
        version = version_of(root, source)
        others = tuple(column for column in source.schema if column not in contract.columns)
        try:
            found = survey_files(root, dataclasses.replace(contract, ordering=others), version)
        except ContractError:  # columns that no feature needs may be missing, as in batch
            found = survey_files(root, contract, version)
        text = _version_text(root, source, version, found.slices)
        return cls(view, source, found.contract, found.slices, text, found.listings)

    @property
    def end(self) -> int:
        """The µs after its last plausible time; ALWAYS if there is none."""
        inside = [each.high for each in self.slices if self.contract.earliest <= each.high < self.contract.latest]
        return max(inside) + 1 if inside else ALWAYS

    def pieces(self, low: int, high: int) -> Iterator[HistoryPiece]:
        """The rows that were known in `[low, high)` µs, some days at a time, in order."""
        repeats = repeats_of(self.contract, self.slices) if self.source.unique else None
        for begin, end in self._spans(low, high):
            some = [each for each in self.slices if each.high >= begin and each.low < end]
            own = (ALWAYS if begin == low and low <= self.contract.earliest else begin, end)
            read = concat_reads(stream_slices(self.contract, some, ReadOptions(begin, end, own=own)))
            yield HistoryPiece(self._counted(read.frame, repeats), self._dead_letters(read.dead_letters))

    def _spans(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Parts of `[low, high)` that begin and end between days: of at most `READ_CHUNK_ROWS` rows, or one day."""
        floor = day_number(max(low, self.contract.earliest))
        days = np.zeros(max(days_in(high) - floor, 0) + 1)
        for each in self.slices:  # it is assumed that its rows are spread evenly
            if each.high >= midnight(floor) and each.low < high:
                first, last = day_number(each.low) - floor, day_number(each.high) - floor
                first, last = max(first, 0), min(last + 1, len(days) - 1)
                share = each.rows / (day_number(each.high) - day_number(each.low) + 1)
                days[first] += share
                days[last] -= share
        begin, rows = low, 0.0
        for number, more in enumerate(np.cumsum(days)[:-1].tolist()):
            if rows and rows + more > READ_CHUNK_ROWS:
                yield begin, midnight(floor + number)
                begin, rows = midnight(floor + number), 0.0
            rows += more
        yield begin, high

    def _counted(self, rows: pl.DataFrame, repeats: RepeatedKeys | None) -> pl.DataFrame:
        """Rows in order; for a source with `unique`, whether each counts."""
        source, time = self.source, str(self.source.time)
        absent = [name for name in source.schema if name not in rows.columns]
        rows = rows.with_columns(pl.lit(None, source.schema[name]).alias(name) for name in absent)
        rows = rows.select(
            *source.schema, pl.lit(False).alias("__uncompared"), pl.lit(absent_text(absent), pl.String).alias(ABSENT)
        )
        rows = rows.sort(list(dict.fromkeys([time, *source.tie_order])), maintain_order=True)
        by = repeats_by(self.view, source.name)
        if not by:
            return rows
        numbered = rows.with_row_index("__number")
        if source is self.view.spine:
            kept = distinct_by_key(numbered.select(*source.schema, "__number"), [*by])[0]
        else:
            checked = numbered.select(*self.view.columns_held(source.name), "__number")
            kept = without_repeats(source, checked, None if repeats is None else repeats.first)
        return numbered.with_columns(
            pl.col("__number").is_in(kept["__number"].implode()).alias("__counted"),
            pl.lit(None, pl.Int64).alias("__instead"),
        ).drop("__number")

    def _dead_letters(self, dead_letters: pl.DataFrame) -> pl.DataFrame:
        return as_message_dead_letters(
            dead_letters, HISTORY_PARTITION, (each.path for each in self.slices), self.version
        )


def _version_text(root: str, source: Source, version: int | None, slices: Sequence[Slice]) -> str:
    """A Delta table's version, or a digest of the names and states of the files."""
    if version is not None:
        return f"version {version}"
    stamps = {each.path: each.stamp for each in slices}
    folder = len(place_of(root, source))
    listed = [f"{path[folder:]} {stamps.get(path, '')}" for path in source_files(root, source)]
    return f"files {hashlib.sha256(chr(10).join(listed).encode()).hexdigest()[:16]}"
