"""Accepted rows of a live store that keep the contract of a view, read from the tables of its sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl

from schemas.live import accepted, live_sources, repeats_by
from schemas.views import FeatureView
from transforms.records.times import ALWAYS, FOREVER, day_of
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import DataFile, data_files, open_table, read_file
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.fates import FATE_COLUMNS, RepeatMemory, known_columns, known_order, repeated_from
from transforms.streaming.messages import ABSENT
from transforms.streaming.row_origin import ORIGIN_COLUMNS, row_identity
from transforms.streaming.view_contracts import contract_of, keeps

# A piece of accepted rows has about so many rows.
SEED_ROWS = 200_000

# Times beyond these (the years 1899 and 9999) have no date in Python.
EARLIEST, LATEST = -(2**51), 253_402_214_400_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class AcceptedRows:
    """The accepted rows of one source that keep the contract of a view, as of a version of its table.

    Args:
        view: the view.
        store: the folder of the tables.
        source: name of the source.
        version: version of its table.
        partition: only the rows of this partition; None: of all.
    """

    view: FeatureView
    store: str
    source: str
    version: int
    partition: int | None = None

    def since(self, low: int) -> pl.DataFrame:
        """All rows that were known at or after `low` µs, with all columns but the date."""
        time = pl.col(str(live_sources(self.view)[self.source].time)).to_physical()
        parts = self.pieces(low)
        empty = pl.DataFrame(pl.from_arrow(accepted(self.view, self.source).empty_table())).drop("date")
        return pl.concat([empty, *(part.filter(time >= low) for part in parts)])

    def pieces(
        self, low: int = ALWAYS, end: int = FOREVER, columns: Sequence[str] | None = None, rows: int = SEED_ROWS
    ) -> Iterator[pl.DataFrame]:
        """Rows of the dates that overlap `[low, end)` µs, by date; they include other rows of these dates.

        Args:
            low, end: see above.
            columns: the columns to read; None: all but the date.
            rows: a piece has about this many rows.  If the source has repeats, a piece has whole dates.
        """
        table = open_table(source_uri(sources_root(self.store), self.source), self.version)
        assert table is not None
        wanted = list(columns or [name for name in accepted(self.view, self.source).names if name != "date"])
        after = None if end > LATEST else day_of(max(end, EARLIEST)) + timedelta(days=1)
        held: list[pl.DataFrame] = []
        last: date | None = None
        for file in data_files(table, first_date(low), after):
            if sum(map(len, held)) >= rows and not (self.repeats and file.date == last):
                yield pl.concat(held)
                held = []
            held.append(self._own(accepted_file(self.view, self.source, file, wanted)))
            last = file.date
        if held:
            yield pl.concat(held)

    def _own(self, rows: pl.DataFrame) -> pl.DataFrame:
        return rows if self.partition is None else rows.filter(pl.col("__partition") == self.partition)

    @property
    def repeats(self) -> bool:
        """Whether some rows repeat others and do not count."""
        return bool(repeats_by(self.view, self.source))

    def replaced(self, low: int, memory: RepeatMemory) -> pl.Series:
        """Identities of rows that an earlier version of Millrace replaced by one known at or after `low` µs."""
        found = [pl.Series("__instead", [], pl.Int64)]
        columns = [*ORIGIN_COLUMNS, "__instead", "__uncompared"]
        for part in dataclasses.replace(self, partition=None).pieces(low, columns=columns):
            found.append(part.filter(pl.Series(memory.span_of(part) == 0))["__instead"].drop_nulls())
        return pl.concat(found)

    def counts(self, rows: pl.DataFrame, memory: RepeatMemory, replaced: pl.Series) -> pl.Series:
        """Whether each row counts, if these are all rows.

        Args:
            rows: rows of the source, with the columns that decide.
            memory: the memory of the source.
            replaced: see above.
        """
        gone = row_identity(rows).is_in(replaced.implode()).to_numpy()
        none = np.zeros(len(rows), np.int64)
        order = known_order(self.view, self.source)
        return pl.Series(repeated_from(order, memory, rows, none, np.where(gone, 0, NEVER_REPEATED)) == NEVER_REPEATED)

    def counted(self, end: int, memory: RepeatMemory, replaced: pl.Series) -> Iterator[pl.DataFrame]:
        """The rows of `pieces` up to `end` µs that count, with the columns that features need.

        Args:
            end: see above.
            memory: the memory of the source; not used if it has no repeats.
            replaced: see above.
        """
        columns = self.view.columns_held(self.source)
        if not self.repeats:
            yield from self.pieces(end=end, columns=[*columns, *ORIGIN_COLUMNS])
            return
        known = dict.fromkeys([*known_columns(self.view, self.source), *columns, *ORIGIN_COLUMNS, *FATE_COLUMNS])
        time, before = pl.col(str(live_sources(self.view)[self.source].time)).to_physical(), pl.DataFrame()
        for rows in self.pieces(end=end, columns=list(known)):
            both = pl.concat([before, rows]) if len(before) else rows
            counts = self.counts(both, memory, replaced)
            yield rows.filter(counts.slice(len(before)))
            before = both.filter(time >= time.max() - memory.length)  # a row of a later date may repeat one of these


def accepted_file(view: FeatureView, name: str, file: DataFile, columns: Sequence[str]) -> pl.DataFrame:
    """Columns of the rows in a file of accepted rows that keep the view's contract.

    A column that the file does not have is null: its version of Millrace did not have it.  A declared one was declared
    later, and no row of the file keeps the contract of a view that reads it.
    """
    contract = contract_of(view, name)
    types = pl.DataFrame(pl.from_arrow(accepted(view, name).empty_table())).schema
    wanted = list(dict.fromkeys([*columns, *contract.columns, ABSENT]))
    rows = pl.DataFrame(pl.from_arrow(read_file(file, wanted, optional=wanted)))
    missing = [name for name in wanted if name not in rows.columns]
    rows = rows.with_columns(pl.lit(None, types[name]).alias(name) for name in missing)
    keeping = pl.Series(keeps(contract, rows) & contract.source.schema.keys().isdisjoint(missing))
    return rows.filter(keeping).select(columns)


def first_date(low: int) -> date | None:
    """The date of the files to read rows from `low` µs on; None: all files."""
    return None if low <= EARLIEST else day_of(min(low, LATEST))
