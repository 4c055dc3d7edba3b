"""The files of a source as history of a live job: its rows in the order of time, checked and counted as batch does."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from schemas.errors import ContractError
from schemas.live import joined_sources, live_sources, repeats_by
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.block_inputs import concat_reads, distinct_by_key
from transforms.records.times import ALWAYS, day_number, days_in, midnight, now_us
from transforms.sources.contracts import Contract
from transforms.sources.dead_letters import as_message_dead_letters
from transforms.sources.inventory import source_files, survey_files, version_of
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
from transforms.streaming.view_contracts import contract_of, keeps, twice_in


class HistoryPiece(NamedTuple):
    """Rows of some days.

    Args:
        rows: in the order of time, with `__uncompared` and `ABSENT`; for a source with `unique`, with `FATE_COLUMNS`.
        dead_letters: by view, if there are any, with the columns `MESSAGE_DEAD_LETTERS`.
    """

    rows: pl.DataFrame
    dead_letters: Mapping[FeatureView, pl.DataFrame]


@dataclasses.dataclass(frozen=True, eq=False)
class HistoryFiles:
    """The files of a source.

    Args:
        source: the source.
        contract: by which rows are read: their time alone.
        contracts: by view that reads the source, its contract; the newest definition first.
        slices: its row groups.
        version: version of the source: a Delta table's version, or a digest of its files.
        listings: the files as they were listed; empty for a Delta table.
    """

    source: Source
    contract: Contract
    contracts: Mapping[FeatureView, Contract]
    slices: tuple[Slice, ...]
    version: str
    listings: tuple[Listing, ...] = ()

    @classmethod
    def of(cls, views: Sequence[FeatureView], root: str, name: str) -> HistoryFiles:
        """The files of the source `name` under the folder `root`."""
        source, now = joined_sources(views)[name], now_us()
        readers = [view for view in views if name in live_sources(view)]
        contracts = {
            view: contract_of(view, name)
            if name == view.spine.name
            else dataclasses.replace(contract_of(view, name), ordering=view.columns_ordering(name))
            for view in readers
        }
        read = {column for each in contracts.values() for column in each.read}
        needed = tuple(column for column in source.schema if column in read)
        version = version_of(root, source)
        twice = twice_in(views, name)
        every = Contract(source, (), now=now, ordering=tuple(source.schema), time_only=True, twice=twice)
        try:
            found = survey_files(root, every, version)
        except ContractError:  # columns that no feature needs may be missing, as in batch
            found = survey_files(root, dataclasses.replace(every, ordering=needed), version)
        text = _version_text(root, source, version, found.slices)
        contracts = {
            view: dataclasses.replace(each, now=now, partitions=found.contract.partitions, twice=twice)
            for view, each in contracts.items()
        }
        return cls(source, found.contract, contracts, found.slices, text, found.listings)

    @property
    def end(self) -> int:
        """The µs after its last plausible time; ALWAYS if there is none."""
        inside = [each.high for each in self.slices if self.contract.earliest <= each.high < self.contract.latest]
        return max(inside) + 1 if inside else ALWAYS

    def pieces(self, low: int, high: int) -> Iterator[HistoryPiece]:
        """The rows that were known in `[low, high)` µs, some days at a time, in order."""
        deciding = next((view for view in self.contracts if repeats_by(view, self.source.name)), None)
        repeats = (
            repeats_of(self.contracts[deciding], self.slices)
            if deciding is not None and self.contracts[deciding].source.unique
            else None
        )
        for begin, end in self._spans(low, high):
            some = [each for each in self.slices if each.high >= begin and each.low < end]
            own = (ALWAYS if begin == low and low <= self.contract.earliest else begin, end)
            options = ReadOptions(begin, end, own=own)
            read = concat_reads(stream_slices(self.contract, some, options))
            rows, dead_letters = self._ordered(read.frame), dict[FeatureView, pl.DataFrame]()
            for view, contract in self.contracts.items():
                if len(read.dead_letters) or not keeps(contract, rows).all():  # read again, for the places of the rows
                    broken = concat_reads(stream_slices(contract, some, options)).dead_letters
                    dead_letters[view] = self._dead_letters(broken)
            if deciding is not None:
                rows = self._with_fates(rows, deciding, repeats)
            yield HistoryPiece(rows, dead_letters)

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

    def _ordered(self, rows: pl.DataFrame) -> pl.DataFrame:
        """Rows in the order of time, with all declared columns."""
        source = self.source
        absent = [name for name in source.schema if name not in rows.columns]
        rows = rows.with_columns(pl.lit(None, source.schema[name]).alias(name) for name in absent)
        rows = rows.select(
            *source.schema, pl.lit(False).alias("__uncompared"), pl.lit(absent_text(absent), pl.String).alias(ABSENT)
        )
        return rows.sort(list(dict.fromkeys([str(source.time), *source.tie_order])), maintain_order=True)

    def _with_fates(self, rows: pl.DataFrame, view: FeatureView, repeats: RepeatedKeys | None) -> pl.DataFrame:
        """Rows with whether each counts, in batch, for a view.  Those that break its contract count."""
        name = self.source.name
        numbered = rows.with_row_index("__number")
        keeping = pl.Series(keeps(self.contracts[view], rows))
        good = numbered.filter(keeping)
        if name == view.spine.name:
            kept = distinct_by_key(good.select(*view.spine.schema, "__number"), [*repeats_by(view, name)])[0]
        else:
            checked = good.select(*view.columns_held(name), "__number")
            kept = without_repeats(view.events[name], checked, None if repeats is None else repeats.first)
        return numbered.with_columns(
            (pl.col("__number").is_in(kept["__number"].implode()) | ~keeping).alias("__counted"),
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
