"""Accepted rows of a live store, read from the tables of its sources."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import date, timedelta

import polars as pl

from schemas.live import accepted, repeats_by
from schemas.views import FeatureView
from transforms.records.times import ALWAYS, FOREVER, day_of
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.replay import sources_of
from transforms.streaming.row_origin import RID, row_identity

# Times beyond these (the years 1899 and 9999) have no date in Python.
EARLIEST, LATEST = -(2**51), 253_402_214_400_000_000


@dataclasses.dataclass(frozen=True, eq=False)
class AcceptedRows:
    """The accepted rows of one source, as of a version of its table.

    Args:
        view: the view.
        store: the folder of the tables.
        source: name of the source.
        version: of its table.
        partition: only the rows of this partition; None: of all.
    """

    view: FeatureView
    store: str
    source: str
    version: int
    partition: int | None = None

    def since(self, low: int) -> pl.DataFrame:
        """All rows that were known at or after `low` µs, with all columns but the date."""
        time = pl.col(str(sources_of(self.view)[self.source].time)).to_physical()
        parts = self.pieces(low)
        empty = pl.DataFrame(pl.from_arrow(accepted(self.view, self.source).empty_table())).drop("date")
        return pl.concat([empty, *(part.filter(time >= low) for part in parts)])

    def pieces(
        self, low: int = ALWAYS, end: int = FOREVER, columns: Sequence[str] | None = None, rows: int = 200_000
    ) -> Iterator[pl.DataFrame]:
        """Rows of the dates that overlap `[low, end)` µs, by date; other rows of these dates are among them.

        Args:
            low, end: see above.
            columns: the columns to read; None: all but the date.
            rows: a piece has about this many rows.
        """
        table = open_table(source_uri(sources_root(self.store), self.source), self.version)
        assert table is not None
        wanted = list(columns or [name for name in accepted(self.view, self.source).names if name != "date"])
        after = None if end > LATEST else day_of(max(end, EARLIEST)) + timedelta(days=1)
        held: list[pl.DataFrame] = []
        for file in data_files(table, first_date(low), after):
            held.append(self._own(pl.DataFrame(pl.from_arrow(read_file(file, wanted))).select(wanted)))
            if sum(map(len, held)) >= rows:
                yield pl.concat(held)
                held = []
        if held:
            yield pl.concat(held)

    def _own(self, rows: pl.DataFrame) -> pl.DataFrame:
        return rows if self.partition is None else rows.filter(pl.col("__partition") == self.partition)

    def replaced(self, low: int) -> pl.Series:
        """Identities of rows that a repeat known at or after `low` µs has replaced, however late that repeat came."""
        parts = dataclasses.replace(self, partition=None).pieces(low, columns=["__instead"])
        found = [part["__instead"].drop_nulls() for part in parts]
        return pl.concat([pl.Series("__instead", [], pl.Int64), *found])

    @property
    def repeats(self) -> bool:
        """Whether some rows repeat others and do not count."""
        return bool(repeats_by(self.view, self.source))


def still_counted(rows: pl.DataFrame, replaced: pl.Series) -> pl.DataFrame:
    """The rows that counted and were not replaced, with their identity."""
    return rows.with_columns(row_identity(rows)).filter(pl.col("__counted") & ~pl.col(RID).is_in(replaced.implode()))


def first_date(low: int) -> date | None:
    """The date of the files to read rows from `low` µs on; None: all files."""
    return None if low <= EARLIEST else day_of(min(low, LATEST))
