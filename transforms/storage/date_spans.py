"""Tables whose data files hold rows of several dates.

A table of few rows a date has one partition per span of days instead of one per date.  The length of its spans is
chosen from its rows when the table is made, and kept in the table's properties; a table without the property has one
partition per date.  Its files have a `date` column, their rows are sorted by it, and the footer lists which rows are of
which date (`Segment`).  For readers each date is a `DataFile` of its own: a part of a file.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from schemas.errors import DataError, StoreError
from transforms.records.arrays import Bools
from transforms.records.record_batches import batch  # noqa: F401 (it imports pyarrow_hotfix)
from transforms.records.times import as_date, as_number
from transforms.storage.delta_log import root_of
from transforms.storage.file_systems import require_regular
from transforms.storage.stored_json import DAMAGE

PROPERTY = "millrace.partitionDays"
# A partition should have at least so many rows; a file with more rows is cut between two dates.
SPAN_ROWS, FILE_ROWS = 5_000, 50_000
# A table may have so many files, and one more per `SPAN_ROWS` rows, before small files of a span are written together.
FEW_FILES = 5
MOST_DAYS = 10_000
# Decoded files that stay in memory, since their dates are read one by one.
FILES_CACHED = 4
# What reading a damaged Parquet file can raise. The RuntimeError comes from pyarrow_hotfix.
TABLE_READ_ERRORS = (OSError, pa.ArrowException, RuntimeError, *DAMAGE)
_FOOTER = b"millrace.segments"


@dataclasses.dataclass(frozen=True)
class Segment:
    """Neighbouring rows of a file with the same date (number of the day) that were computed by the same run.

    Args:
        origin: path within the table of the file in which the rows were first committed; empty: this file.
    """

    day: int
    rows: int
    origin: str = ""


def days_for(rows: int, first: date, last: date) -> int:
    """How many days a partition of a new table spans, given its number of rows and its first and last date."""
    days = as_number(last) - as_number(first) + 1
    return max(1, min(MOST_DAYS, -(-SPAN_ROWS * days // max(rows, 1))))


def days_of(table: DeltaTable) -> int:
    """How many days a partition of the table spans; 1 if it is partitioned by date."""
    return int(table.metadata().configuration.get(PROPERTY, "1"))


def span_of(day: int, days: int) -> int:
    """The number of the span of so many days that the day lies in."""
    return day // days


def folder_of(span: int, days: int) -> str:
    return f"date={as_date(span * days)}_{as_date(span * days + days - 1)}"


def cuts(days: npt.NDArray[np.int32], span: int, most: int | None = None) -> list[tuple[int, int]]:
    """The `[start, stop)` rows of each file to write. `days` are sorted. A file has rows of one span, and is cut
    between two dates at about `most` rows."""
    most = FILE_ROWS if most is None else most
    bounds = [0, *(int(i) + 1 for i in (days[1:] != days[:-1]).nonzero()[0]), len(days)] if len(days) else [0]
    files: list[tuple[int, int]] = []
    for start, stop in itertools.pairwise(bounds):
        first = files[-1][0] if files else 0
        if files and days[first] // span == days[start] // span and stop - first <= most:
            files[-1] = (first, stop)
        else:
            files.append((start, stop))
    return files


def segments_of_days(days: npt.NDArray[np.int32]) -> list[Segment]:
    """Segments of rows that are written for the first time; `days` are the days of the rows, sorted."""
    values, counts = np.unique(days, return_counts=True)
    return [Segment(int(day), int(rows)) for day, rows in zip(values, counts, strict=True)]


def with_segments(content: pa.Table, segments: Sequence[Segment]) -> pa.Table:
    """Adds segments to `content`, for the footer of its file."""
    return content.replace_schema_metadata({_FOOTER: _as_bytes(segments)})


def schema_with_segments(schema: pa.Schema, segments: Sequence[Segment]) -> pa.Schema:
    """Adds the segments of a file to the metadata of `schema`."""
    return schema.with_metadata({**(schema.metadata or {}), _FOOTER: _as_bytes(segments)})


def _as_bytes(segments: Sequence[Segment]) -> bytes:
    return json.dumps([[each.day, each.rows, each.origin] for each in segments], separators=(",", ":")).encode()


def kept_segments(segments: Sequence[Segment], gone: Bools, path: str) -> list[Segment]:
    """The segments of the file at `path` (within its table) after the rows `gone` were removed.

    Segments that lost no row keep their origin; the origin of the others is the new file.

    Raises:
        DataError: the file has other rows.
    """
    if (count := sum(each.rows for each in segments)) != len(gone):
        raise other_rows(path, f"{count} rows by its footer, and {len(gone)} in it")
    found, start = [], 0
    for each in segments:
        lost = int(gone[start : start + each.rows].sum())
        start += each.rows
        if not lost:
            found.append(dataclasses.replace(each, origin=each.origin or path))
        elif lost < each.rows:
            found.append(Segment(each.day, each.rows - lost))
    return found


def read_segments(path: str) -> tuple[Segment, ...]:
    """The segments of a file, from its footer.

    Raises:
        StoreError: the file cannot be read.
    """
    try:
        status = os.stat(path)
        return _segments(path, status.st_mtime_ns, status.st_size)
    except TABLE_READ_ERRORS as error:
        raise unreadable(path, error) from None


@functools.lru_cache(100_000)
def _segments(path: str, _changed: int, _bytes: int) -> tuple[Segment, ...]:
    require_regular(path)
    stored = (pq.read_metadata(path).metadata or {}).get(_FOOTER)
    if stored is None:  # another program has written the file again
        days = _day_numbers(pq.ParquetFile(path).read(["date"], use_threads=False))
        bounds = [0, *(np.flatnonzero(np.diff(days)) + 1), len(days)] if len(days) else []
        return tuple(Segment(int(days[low]), int(high - low)) for low, high in itertools.pairwise(bounds))
    return tuple(Segment(int(day), int(rows), str(origin)) for day, rows, origin in json.loads(stored))


def require_rows(path: str, rows: int, segments: Sequence[Segment]) -> None:
    """Checks that a file has as many rows of each date as the log and its footer record.

    Raises:
        StoreError: the file cannot be read.
        DataError: it has more or fewer rows.
    """
    if (count := sum(each.rows for each in segments)) != rows:
        raise other_rows(path, f"{count} rows by its footer, and {rows} by the table's log")
    try:
        require_regular(path)
        content = pq.ParquetFile(path).read(["date"], use_threads=False)
    except TABLE_READ_ERRORS as error:
        raise unreadable(path, error) from None
    require_days(path, content, segments)


def require_days(path: str, content: pa.Table, segments: Sequence[Segment]) -> None:
    """Checks that the rows of a file have the dates that its footer has.

    Raises:
        DataError: they have other dates.
    """
    expected = np.repeat([each.day for each in segments], [each.rows for each in segments])
    found = _day_numbers(content)
    if len(found) != len(expected) or (found != expected).any():
        counts = f"{len(found)} rows of {len(np.unique(found))} dates"
        raise other_rows(path, f"{counts}, and {len(expected)} of {len(np.unique(expected))} by its footer")


def other_rows(path: str, value: str) -> DataError:
    return DataError(
        "A data file holds the rows that were committed with it",
        f"{path}: {value}",
        "Nothing was changed: restore the file, or compute all dates again with --full",
    )


def unreadable(path: str, error: Exception) -> StoreError:
    text = " ".join(str(error).split())[:300] or type(error).__name__
    return StoreError(
        "A committed data file can be read",
        f"{path}: {text}",
        "Restore the file, or recompute its date with --full",
    )


def read_dates(path: str, columns: Sequence[str] | None, place: tuple[int, int], dates: tuple[date, date]) -> pa.Table:
    """The rows of a file that have these dates (first and last).

    Args:
        columns: the columns to read besides `date`; None: all.
        place: where these rows are in an unchanged file: the number of the first row, and how many rows there are.

    Raises:
        StoreError: the file cannot be read.
        DataError: it has more rows of the dates than it had when it was written.
    """
    try:
        status = os.stat(path)
        wanted = None if columns is None else tuple(columns)
        content, days = _decoded(path, wanted, status.st_mtime_ns, status.st_size)
    except TABLE_READ_ERRORS as error:
        raise unreadable(path, error) from None
    start, rows = place
    first, last = map(as_number, dates)
    stop = start + rows
    before, after = start == 0 or days[start - 1] <= first, stop >= len(days) or days[stop] >= last
    if stop <= len(days) and rows and days[start] == first and days[stop - 1] == last and before and after:
        return content.slice(start, rows)
    found = content.filter(pl.Series((days >= first) & (days <= last)).to_arrow())
    if found.num_rows > rows:
        raise other_rows(path, f"{found.num_rows} rows from {dates[0]} to {dates[1]}, and {rows} by its footer")
    return found


@functools.lru_cache(FILES_CACHED)
def _decoded(
    path: str, columns: tuple[str, ...] | None, _changed: int, _bytes: int
) -> tuple[pa.Table, npt.NDArray[np.int32]]:
    wanted = None if columns is None else list(dict.fromkeys([*columns, "date"]))
    require_regular(path)
    content = pq.ParquetFile(path).read(wanted, use_threads=False).replace_schema_metadata(None)
    return content, _day_numbers(content)


def stats_of(segments: Sequence[Segment]) -> dict[str, object]:
    """The statistics in the log for a file with these segments: rows, and bounds of their dates."""
    days = [each.day for each in segments]
    return {
        "numRecords": sum(each.rows for each in segments),
        "minValues": {"date": as_date(min(days)).isoformat()},
        "maxValues": {"date": as_date(max(days)).isoformat()},
        "nullCount": {"date": 0},
    }


def partition_days(uri: str, table: DeltaTable | None, rows: int, dates: tuple[date, date] | None) -> int:
    """How many days a partition of the table at `uri` spans. For a new table this is chosen from its rows.

    At an address with a scheme, where delta-rs commits, a table is partitioned by date.
    """
    if "://" in root_of(uri):
        return 1
    if table is not None:
        return days_of(table)
    return MOST_DAYS if dates is None else days_for(rows, *dates)


def configuration(days: int) -> Mapping[str, str]:
    """Properties of a new table with such spans: its log keeps bounds of `date`, and of no other column."""
    return {} if days == 1 else {PROPERTY: str(days), "delta.dataSkippingStatsColumns": "date"}


def _day_numbers(content: pa.Table) -> npt.NDArray[np.int32]:
    """Days since 1970 of the rows.  Polars converts them: pyarrow's own conversion imports pandas."""
    dates = pl.from_arrow(content["date"])
    assert isinstance(dates, pl.Series)
    return dates.to_physical().to_numpy()
