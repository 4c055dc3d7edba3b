"""Delta tables: data files written by workers, made visible by one final commit."""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import random
import re
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Field, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, CommitProperties, Transaction, create_table_with_add_actions

from schemas.errors import ConflictError, StoreError
from transforms.records.record_batches import batch
from transforms.records.times import as_date, as_number
from transforms.storage import date_spans, durable
from transforms.storage.date_spans import Segment
from transforms.storage.delta_log import commits_since, conflict, path_within, remaining, version_of_run
from transforms.storage.delta_log import root_of as address_of
from transforms.storage.file_systems import FileSystems, require_regular
from transforms.storage.log_check import require_whole_entries
from transforms.storage.log_entries import LogEntry, RemovedFile, append_entry, sync_log

_TYPES = {
    pa.int8(): "byte",
    pa.int16(): "short",
    pa.int32(): "integer",
    pa.int64(): "long",
    pa.float32(): "float",
    pa.float64(): "double",
    pa.string(): "string",
    pa.bool_(): "boolean",
    pa.date32(): "date",
    pa.timestamp("us", "UTC"): "timestamp",
}
READ_ROWS = 250_000
# By default delta-rs drops versions after 30 days: models name the version that they were trained on.
TABLE_CONFIGURATION = {"delta.enableExpiredLogCleanup": "false"}
# A commit is attempted 20 times if other writers interfere. The waits between the attempts are at most 0.02, 0.04, … 2
# s, and about 15 s in all on average.
COMMIT_ATTEMPTS, FIRST_BACKOFF, LONGEST_BACKOFF = 20, 0.02, 2.0


@functools.cache
def file_pool() -> ThreadPoolExecutor:
    """The threads of this process that read and write Parquet files."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), "parquet")


Day = date  # this name stays visible beside a field called `date`

# A row of a table whose columns a definition declares, as Arrow gives it.
TableRow = Mapping[str, Any]
# What a commit replaces, as delta-rs takes it.
Filters = list[tuple[str, str, str | list[str]]]


@dataclasses.dataclass(frozen=True)
class DataFile:
    """The rows of one date in a Parquet file of a table.

    Args:
        path: of the file.
        rows, bytes: of this date.
        start: number of the first row, in a file with several dates (`date_spans`).
        whole: number of all rows of such a file; 0 if the file has one date, and no `date` column.
        until: the last date, if the rows are those of several dates of the file.
        origin: path within the table of the file in which the rows were first committed, if that is another file.
    """

    path: str
    date: date
    rows: int
    bytes: int
    start: int = 0
    whole: int = 0
    origin: str = ""
    until: Day | None = None


# What `write_files` returns: each date of each file with the values of the file's partition columns.
WrittenFiles = list[tuple[DataFile, dict[str, str]]]
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Committed:
    """What a commit made visible.  `fresh` is False when the run had committed before."""

    version: int
    rows: int
    files: int
    dates: tuple[date, ...]
    fresh: bool


def open_table(uri: str, version: int | None = None) -> DeltaTable | None:
    """The table as of `version` (None: the newest), or None if there is no table.

    Raises:
        StoreError: the version does not exist, or the log cannot be read or has lost actions.
    """
    try:
        table = DeltaTable(uri, version=version)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StoreError(
            f"The table {uri} can be read{'' if version is None else f' at version {version}'}",
            _in_a_line(error),
            "List what there is with: millrace tables",
        ) from None
    require_whole_entries(uri, int(table.version()))
    return table


def newest_version(uri: str) -> int | None:
    """The table's newest version, or None if there is no table."""
    table = open_table(uri)
    return None if table is None else int(table.version())


def table_root(table: DeltaTable) -> str:
    """The table's folder."""
    return address_of(table.table_uri)


def paths_of(table: DeltaTable) -> list[str]:
    """The paths of all files of the table, sorted."""
    root = table_root(table)
    return sorted(FileSystems.join(root, path_within(root, path)) for path in _actions(table)["path"])


def data_files(
    table: DeltaTable,
    start: date | None = None,
    end: date | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[DataFile]:
    """The table's dates in `[start, end)`, file by file, in order of date and path.

    Args:
        extra: wanted values of further partition columns (see `CommitTarget`).

    Raises:
        StoreError: a file's path leaves the table.
        DataError: a file with several dates has other rows than the log says.
    """
    root, actions = table_root(table), _actions(table)
    wanted = [(actions[f"partition.{name}"], value) for name, value in (extra or {}).items()]
    spans = date_spans.days_of(table) > 1
    lows, highs = (actions.get(name, []) for name in (("min.date", "max.date") if spans else ("partition.date",) * 2))
    files: list[DataFile] = []
    for i, (path, low, high, rows, size) in enumerate(
        zip(actions["path"], lows, highs, actions["num_records"], actions["size_bytes"], strict=True)
    ):
        if (start is not None and high < start) or (end is not None and low >= end):
            continue
        if any(values[i] != value for values, value in wanted):
            continue
        path = FileSystems.join(root, path_within(root, path))
        try:
            parts = _dates_in(path, size) if spans else [DataFile(path, low, rows, size)]
        except StoreError:  # reading the file reports it
            parts = [DataFile(path, low, rows, size, whole=rows, until=high)]
        if (count := sum(each.rows for each in parts)) != rows:
            raise date_spans.other_rows(path, f"{count} rows by its footer, and {rows} by the table's log")
        files += [each for each in parts if (start is None or each.date >= start) and (end is None or each.date < end)]
    return sorted(files, key=lambda file: (file.date, file.path, file.start))


def _dates_in(path: str, size: int) -> list[DataFile]:
    """The dates of a file that has several.

    Raises:
        StoreError: the file cannot be read.
    """
    return _parts(path, date_spans.read_segments(path), size)


def _parts(path: str, segments: Sequence[Segment], size: int) -> list[DataFile]:
    whole = sum(each.rows for each in segments)
    starts = itertools.accumulate((each.rows for each in segments), initial=0)
    return [
        DataFile(path, as_date(each.day), each.rows, size * each.rows // max(whole, 1), start, whole, each.origin)
        for each, start in zip(segments, starts, strict=False)
    ]


def dates_of(table: DeltaTable) -> tuple[date, date] | None:
    """The first and the last date of the table, from its log alone; None: it has no files."""
    actions = _actions(table)
    days = [each for name in ("partition.date", "min.date", "max.date") for each in actions.get(name, []) if each]
    return (min(days), max(days)) if days else None


def read_file(file: DataFile, columns: list[str] | None = None, optional: Collection[str] = ()) -> pa.Table:
    """The `columns` (None: all) of a data file's rows, and their `date`. Columns in `optional` may be missing."""
    if file.whole:
        dates = file.date, file.until or file.date
        shared = date_spans.read_dates(file.path, columns, (file.start, file.rows), dates)
        return shared if columns is None else shared.select(columns)
    wanted = None if columns is None else [name for name in columns if name != "date"]
    try:
        if "://" in file.path:
            with FileSystems.open(file.path) as handle:
                content = pq.read_table(handle, columns=wanted)
        else:
            require_regular(file.path)
            content = pq.ParquetFile(file.path).read(wanted, use_threads=False)
    except date_spans.TABLE_READ_ERRORS as error:
        raise date_spans.unreadable(file.path, error) from None
    if file.rows is not None and content.num_rows != file.rows:
        raise date_spans.other_rows(file.path, f"{content.num_rows} rows, and {file.rows} by the table's log")
    # Made by Polars, because `pa.array` and `pa.scalar` import pandas.
    days = pl.repeat(file.date, content.num_rows, dtype=pl.Date, eager=True).to_arrow()
    content = content.append_column("date", days)
    if columns is None:
        return content
    return content.select([name for name in columns if name not in optional or name in content.column_names])


def joined_files(files: Iterable[DataFile]) -> list[DataFile]:
    """`files`, with neighbouring dates of one file joined so that they are read at once, under the first of these
    dates."""
    found: list[DataFile] = []
    for file in files:
        last = found[-1] if found else None
        if last is not None and file.whole and last.path == file.path and last.start + last.rows == file.start:
            rows, size = last.rows + file.rows, last.bytes + file.bytes
            found[-1] = dataclasses.replace(last, rows=rows, bytes=size, until=file.until or file.date)
        else:
            found.append(file)
    return found


def file_groups(files: Iterable[DataFile], rows: int = READ_ROWS) -> Iterator[tuple[DataFile, ...]]:
    """Neighbouring files in groups of about `rows` rows."""
    group: list[DataFile] = []
    for file in files:
        if group and sum(each.rows for each in group) + file.rows > rows:
            yield tuple(group)
            group = []
        group.append(file)
    if group:
        yield tuple(group)


def read_group(files: Iterable[DataFile], columns: list[str] | None = None) -> pa.RecordBatch:
    """The rows of `files` as one batch; a column that a file lacks is null in its rows."""
    parts = list(file_pool().map(lambda file: read_file(file, columns), joined_files(files)))
    whole = pa.concat_tables(with_every_column(parts))
    return batch(whole, whole.schema)


def with_every_column(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """`parts` with the same columns, in the order of the last one; columns that an older version of the table lacks are
    null."""
    types: dict[str, pa.DataType] = {}
    for part in parts:
        types |= {field.name: field.type for field in part.schema}
    names = list(dict.fromkeys([*parts[-1].column_names, *types])) if parts else []

    def completed(part: pa.Table) -> pa.Table:
        there = set(part.column_names)
        return pa.table({name: part[name] if name in there else pa.nulls(len(part), types[name]) for name in names})

    return [part if part.column_names == names else completed(part) for part in parts]


def write_files(
    rows: pa.RecordBatch, uri: str, run_id: str, extra: Mapping[str, str] | None = None, days: int = 1
) -> WrittenFiles:
    """Write the batch as one Parquet file per date under `uri`, or per span of `days`, invisible until committed.

    Names hold the run and a digest of the content: a repeated bundle writes the same name again, another run never
    does. Each file is written under a hidden name, flushed and renamed: no reader sees half a file, and a commit names
    only durable files.

    Returns each date of each file, with the values of the file's partition columns.
    """
    content = pa.Table.from_batches([rows])
    numbers = rows.column(rows.schema.get_field_index("date")).cast(pa.int32()).to_numpy()
    if len(numbers) and (numbers[1:] < numbers[:-1]).any():
        content = content.take(pa.array(np.argsort(numbers, kind="stable")))
        numbers = content["date"].cast(pa.int32()).to_numpy()
    content = content.drop([name for name in (extra or {}) if name in content.schema.names])

    def write(part: tuple[int, int]) -> tuple[WrittenFiles, tuple[str, str] | None]:
        start, stop = part
        segments = date_spans.segments_of_days(numbers[start:stop])
        return _write_file(content.slice(start, stop - start), segments, FilePlace(uri, run_id, extra or {}, days))

    written = list(file_pool().map(write, date_spans.cuts(numbers, days, None if days > 1 else len(numbers))))
    with _writing(uri):
        durable.rename_files([aside for _, aside in written if aside is not None])
    return [each for parts, _ in written for each in parts]


@dataclasses.dataclass(frozen=True)
class FilePlace:
    """Where a data file is written: table, run, values of partition columns besides `date`, and days of a partition."""

    uri: str
    run_id: str
    extra: Mapping[str, str]
    days: int


def _write_file(
    content: pa.Table, segments: Sequence[Segment], place: FilePlace
) -> tuple[WrittenFiles, tuple[str, str] | None]:
    """Writes rows of one date, or of one span, under a hidden name. Returns what the file holds, and (hidden path,
    path)."""
    first = segments[0].day
    if place.days == 1:
        values = {**place.extra, "date": as_date(first).isoformat()}
        content, folders = content.drop(["date"]), [f"{key}={value}" for key, value in values.items()]
    else:
        values = dict(place.extra)
        content = date_spans.with_segments(content, segments)
        folders = [f"{key}={value}" for key, value in values.items()]
        if not folders:  # Polars would take the table's folder names for partition values
            folders.append(date_spans.folder_of(date_spans.span_of(first, place.days), place.days))
    strings = [field.name for field in content.schema if pa.types.is_string(field.type)]
    # Bounds help readers to skip keys and times. Bounds of floats do not help, and cost a tenth of the writing.
    bounded = [field.name for field in content.schema if not pa.types.is_floating(field.type)]
    sink = pa.BufferOutputStream()
    pq.write_table(
        content,
        sink,
        # Floats hardly shrink: there, Snappy is a third faster than LZ4. Small tables are compressed to be small.
        compression="snappy" if place.days == 1 else "zstd",
        use_dictionary=[*strings, "date"] if place.days > 1 else strings,
        write_statistics=bounded,
    )
    buffer = sink.getvalue()
    name = f"{place.run_id}-{hashlib.sha256(buffer).hexdigest()[:16]}.parquet"
    folder = FileSystems.join(place.uri, *folders)
    aside, path = _put_aside(folder, name, buffer), FileSystems.join(folder, name)
    if place.days == 1:
        files = [DataFile(path, as_date(first), content.num_rows, buffer.size)]
    else:
        files = _parts(path, segments, buffer.size)
    return [(file, values) for file in files], None if aside is None else (aside, path)


def write_file_atomically(folder: str, name: str, content: pa.Buffer) -> None:
    """Writes a file that is durable on return; readers see all of it or none.

    Raises:
        StoreError: the store cannot be written.
    """
    aside = _put_aside(folder, name, content)
    path = FileSystems.join(folder, name)
    with _writing(path):
        durable.rename_files([(aside, path)] if aside is not None else [])


def _put_aside(folder: str, name: str, content: pa.Buffer) -> str | None:
    """Writes a file under a hidden name and returns its path; None at an address whose objects appear only when they
    are complete."""
    path = FileSystems.join(folder, name)
    with _writing(path):
        if "://" in folder:
            with FileSystems.create(path, mime_type="application/octet-stream") as handle:
                handle.write(content.to_pybytes())
            return None
        durable.make_folders(folder)
        return durable.write_aside(path, content)


@contextlib.contextmanager
def _writing(path: str) -> Iterator[None]:
    """
    Raises:
        StoreError: the store cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise StoreError(
            "The store can be written",
            f"{path}: {error.strerror or error}",
            "Free space or grant access, then run the same command again: nothing half-written is visible",
        ) from None


@dataclasses.dataclass(frozen=True)
class CommitTarget:
    """What a commit replaces.

    Args:
        uri: the table.
        schema: its Arrow schema, partition columns included.
        dates: every date that this run replaces; rows of another date are refused.  None: all dates, the table is
            replaced.
        run_id: identifies the run in file names and in the log.
        base: version at launch (None: no table then).  If the dates have changed since, the commit is refused.
        extra: fixed values of further partition columns, which come before `date`.
        metadata: stored with the commit.
        days: how many days a partition of the table spans, if it is new.
        shared: dates that every run replaces: the last one to commit wins, and none is refused for them.
        compares: whether the commit is still allowed if another run has replaced dates with exactly the rows of this
            run.
    """

    uri: str
    schema: pa.Schema
    dates: tuple[date, ...] | None
    run_id: str
    base: int | None = None
    extra: Mapping[str, str] | None = None
    metadata: Mapping[str, str] | None = None
    days: int = 1
    shared: tuple[date, ...] = ()
    compares: bool = False

    def in_scope(self, contents: frozenset[tuple[str, date]]) -> frozenset[tuple[str, date]]:
        """The part of the table's contents (see `_contents`) that no other run may change."""
        return frozenset(each for each in contents if each[1] not in self.shared)


class CommittedMeanwhile(Exception):
    """Another writer committed to a table after this writer opened it."""


@contextlib.contextmanager
def commit_attempt(uri: str, table: DeltaTable | None, fix: str) -> Iterator[None]:
    """Translates the errors of one commit to `table`, the table at `uri` as it was opened (None: there was no table).

    Raises:
        CommittedMeanwhile: another writer committed, or created the table, since then.
        StoreError: the store cannot be written. `fix` tells the user what to do.
    """
    try:
        yield
    except (CommitFailedError, FileExistsError):
        raise CommittedMeanwhile(uri) from None
    except (DeltaError, OSError) as error:
        if table is None and open_table(uri) is not None:
            raise CommittedMeanwhile(uri) from None
        raise StoreError("The store can be written", f"{uri}: {_in_a_line(error)}", fix) from None


def retry_commits(uri: str, attempt: Callable[[DeltaTable | None], Result], exhausted: StoreError) -> Result:
    """Calls `attempt` with the newest version of the table (None: there is no table) until no other writer interferes.

    The waits between attempts are random, so that two writers that collided once do not collide again.

    Raises:
        StoreError: `exhausted`, after `COMMIT_ATTEMPTS` attempts.
    """
    for number in range(COMMIT_ATTEMPTS):
        if number:
            time.sleep(random.uniform(0, min(FIRST_BACKOFF * 2**number, LONGEST_BACKOFF)))
        try:
            return attempt(open_table(uri))
        except CommittedMeanwhile:
            continue
    raise exhausted


def append_commit(
    uri: str, table: DeltaTable | None, entry: LogEntry, overwrites: bool = False, filters: Filters | None = None
) -> int:
    """Commits `entry` as the version after that of `table` (None: creates the table), and returns the version.

    It never becomes another version: if another writer commits in between, it fails.

    Args:
        overwrites, filters: whether the added files replace others, and which. Only for a table at an address with a
            scheme, where delta-rs commits.

    Raises:
        FileExistsError, CommitFailedError: another writer has committed since `table` was opened.
        OSError, DeltaError: the store cannot be written.
    """
    if "://" not in address_of(uri):
        entry = dataclasses.replace(entry, configuration={**TABLE_CONFIGURATION, **entry.configuration})
        return append_entry(uri, table, entry)
    properties = CommitProperties(
        custom_metadata=dict(entry.metadata),
        max_commit_retries=0,  # `retry_commits` decides anew, on the version that another writer made
        app_transactions=[Transaction(*entry.application)],
    )
    partition_by, added = list(entry.partition_by), list(entry.added)
    if table is None:
        assert entry.schema is not None
        create_table_with_add_actions(
            uri,
            entry.schema,
            added,
            mode="error",
            partition_by=partition_by,
            configuration=TABLE_CONFIGURATION,
            commit_properties=properties,
        )
        return 0
    schema = table.schema()
    if entry.schema is not None:
        known = {field.name for field in schema.fields}
        table.alter.add_columns([field for field in entry.schema.fields if field.name not in known])
        schema = entry.schema
    version = int(table.version()) + 1
    table.create_write_transaction(
        [*added], "overwrite" if overwrites else "append", schema, partition_by, filters, commit_properties=properties
    )
    return version


def commit(
    target: CommitTarget,
    written: WrittenFiles,
    prepare: Callable[..., dict[str, str]] | None = None,
    side: Sequence[object] = (),
) -> Committed:
    """Replaces the rows of the target's dates with the files `written`, in one atomic commit.

    Raises:
        ConflictError: another run has changed the dates since `target.base`, or too many writers commit at the same
        time.
        StoreError: a row has another date, or the store cannot be written.
    """
    strays = sorted({file.date.isoformat() for file, _ in written} - {day.isoformat() for day in target.dates or ()})
    if strays and target.dates is not None:
        raise StoreError(
            "A run writes rows of its own dates only",
            ", ".join(strays[:5]),
            "This is a defect of Millrace: please report it",
        )
    unique = {file: (file, values) for file, values in written}
    base = None if target.base is None else open_table(target.uri, target.base)
    replacement = _Replacement(target, tuple(unique.values()), _contents(base, target), prepare, tuple(side))
    return retry_commits(
        target.uri,
        replacement.attempt,
        ConflictError(
            f"A commit succeeds within {COMMIT_ATTEMPTS} attempts",
            f"as many commits of other runs to {target.uri} meanwhile",
            "Run the same command again when fewer runs write to this table",
        ),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Replacement:
    """A commit of `files` that replaces the rows of the target's dates, which were `before` (see `_contents`)."""

    target: CommitTarget
    files: tuple[tuple[DataFile, dict[str, str]], ...]
    before: frozenset[tuple[str, date]]
    prepare: Callable[..., dict[str, str]] | None
    side: tuple[object, ...]

    def attempt(self, table: DeltaTable | None) -> Committed:
        """Commits to `table`, the newest version, unless the run has committed before.

        Raises:
            CommittedMeanwhile: another writer committed since `table` was opened.
            ConflictError: another run has changed the dates since `target.base`.
            DataError: rows of other dates cannot be kept, because one of their files has lost rows.
        """
        target = self.target
        with commit_attempt(target.uri, table, "Check access and free space, then run the same command again"):
            entry = self._entry(table)
            if table is not None:
                # A repeated transaction is accepted, so the log of this snapshot is searched before the commit.
                if (made := commits_since(target.uri, target.run_id, target.base, table.version())) is not None:
                    return self._made_before(made)
                before, now = target.in_scope(self.before), target.in_scope(_contents(table, target))
                if now != before and not (target.compares and self._has_same_rows(table, before ^ now)):
                    raise conflict(target.uri, target.base, table.version(), before - now, now - before)
            held, dates = _held(table, target), target.dates
            if "://" in address_of(target.uri) and table is not None:
                days = {path: date.fromisoformat(str(file.partition_values["date"])) for path, file in held.items()}
                added, dates = remaining(target.uri, self._actions(self.files), dates, days)
                nothing, written = not added and (not held or dates == ()), list(self.files)
            else:
                layout = _Layout(target, table, held)
                written = layout.arranged(self.files)
                # A file's name contains its run and a digest of its content: an earlier launch of the same run may have
                # committed it.
                wanted = {action.path: action for action in self._actions(written)}
                added = [action for path, action in wanted.items() if path not in held]
                removed = [held[path] for path in layout.replaced if path not in wanted]
                nothing = table is not None and not added and not removed
                entry = dataclasses.replace(entry, removed=removed, partition_by=layout.partition_by)
            if nothing:  # there is nothing to commit, or this run has committed it
                assert table is not None
                return self._made_before(version_of_run(target.uri, target.run_id, table.version()))
            entry = dataclasses.replace(entry, added=added)
            if table is None:
                entry = dataclasses.replace(
                    entry,
                    schema=delta_schema(target.schema),
                    configuration=date_spans.configuration(target.days),
                )
            version = append_commit(
                target.uri, table, entry, overwrites=table is not None, filters=_filters(target, dates)
            )
            self._remove_rewritten({file.path for file, _ in written}, version)
            return self._committed(version, True, len({file.path for file, _ in written}))

    def _has_same_rows(self, table: DeltaTable, changed: Iterable[tuple[str, date]]) -> bool:
        """Whether the table has the rows of this commit on the dates that have changed."""
        days = {day for _, day in changed}
        theirs = [file for file in data_files(table, extra=self.target.extra) if file.date in days]
        mine = [file for file, _ in self.files if file.date in days]
        left, right = (pl.DataFrame(pl.from_arrow(read_group(each))) if each else None for each in (mine, theirs))
        if left is None or right is None:
            return left is right
        names = sorted(left.columns)
        return names == sorted(right.columns) and left.select(names).sort(names).equals(right.select(names).sort(names))

    def _entry(self, table: DeltaTable | None) -> LogEntry:
        prepared = {} if self.prepare is None else self.prepare(table, *self.side)
        return LogEntry(
            partition_by=[*(self.target.extra or {}), "date"],
            metadata={**(self.target.metadata or {}), **prepared, "run_id": self.target.run_id},
            application=(self.target.run_id, 1),
        )

    def _actions(self, files: Iterable[tuple[DataFile, dict[str, str]]]) -> list[AddAction]:
        return add_actions(self.target.uri, files)

    def _made_before(self, version: int) -> Committed:
        sync_log(self.target.uri)
        return self._committed(version, False, len({file.path for file, _ in self.files}))

    def _remove_rewritten(self, wanted: set[str], version: int) -> None:
        """Removes files whose rows the commit has in other files, unless an older version names them."""
        rewritten = {file.path for file, _ in self.files} - wanted
        if rewritten and commits_since(self.target.uri, self.target.run_id, None, version - 1) is None:
            for path in rewritten:
                with contextlib.suppress(OSError):
                    os.remove(path)

    def _committed(self, version: int, fresh: bool, count: int) -> Committed:
        files = [file for file, _ in self.files]
        dates = tuple(sorted({file.date for file in files}))
        return Committed(version, sum(file.rows for file in files), count, dates, fresh)


class _Layout:
    """How the rows of a commit are divided into files of the table's partitions.

    A file that also holds other dates is written again, and their rows are copied unchanged.  So are small files of the
    same span once the table has many files, since otherwise each run of one date would add one.
    """

    def __init__(self, target: CommitTarget, table: DeltaTable | None, held: Mapping[str, RemovedFile]) -> None:
        self.target, self.held = target, held
        self.days = target.days if table is None else date_spans.days_of(table)
        self.partition_by = [*(target.extra or {}), *(["date"] if self.days == 1 else [])]
        self.replaced: list[str] = [] if self.days > 1 and target.dates is not None else list(held)
        self.place = FilePlace(target.uri, target.run_id, target.extra or {}, self.days)
        rows = sum(file.rows for file in held.values())
        self.crowded = len(held) >= date_spans.FEW_FILES + rows // date_spans.SPAN_ROWS

    def arranged(self, files: Sequence[tuple[DataFile, dict[str, str]]]) -> WrittenFiles:
        """The files to commit for the rows of `files`. Afterwards, `replaced` holds the paths of the files that they
        replace."""
        if self.days == 1:
            fitting = [each for each in files if not each[0].whole]
            rest = [file for file, _ in files if file.whole]
            return [*fitting, *self._write([(file, "") for file in rest])]
        spans: dict[int, list[tuple[DataFile, dict[str, str]]]] = {}
        for each in files:
            spans.setdefault(self._span(each[0].date), []).append(each)
        mine = None if self.target.dates is None else set(self.target.dates)
        held: dict[int, list[str]] = {}
        for path in self.held if mine is not None else ():
            first = self.held[path].dates[0]
            held.setdefault(self._span(first), []).append(path)
        written: WrittenFiles = []
        for span in sorted({*spans, *({self._span(day) for day in mine} & held.keys() if mine is not None else ())}):
            written += self._arranged_span(spans.get(span, []), held.get(span, []), mine or set())
        return written

    def _span(self, day: date) -> int:
        return date_spans.span_of(as_number(day), self.days)

    def _arranged_span(
        self, files: list[tuple[DataFile, dict[str, str]]], paths: list[str], mine: set[date]
    ) -> WrittenFiles:
        parts = {path: self._parts(path) for path in paths}
        small = [path for path in paths if self.held[path].rows < date_spans.FILE_ROWS]
        changed = [path for path in paths if any(part.date in mine for part in parts[path])]
        if not files and not changed:
            return []
        touched = [path for path in paths if path in changed or (self.crowded and path in small)]
        self.replaced += touched
        for path in touched:
            if any(part.date not in mine for part in parts[path]):
                self._require_rows(path)
        kept = [(part, part.origin or path) for path in touched for part in parts[path] if part.date not in mine]
        rows: dict[str, int] = {}
        for file, _ in files:
            rows[file.path] = rows.get(file.path, 0) + file.rows
        # A file that was written for another layout may reach into other spans.
        fitting = {file.path for file, _ in files if file.whole == rows[file.path]}
        alone = len(rows) == 1 and not kept
        as_is = {path for path in fitting if alone or rows[path] >= date_spans.FILE_ROWS // 2}
        rest = [(file, "") for file, _ in files if file.path not in as_is]
        return [*(each for each in files if each[0].path in as_is), *self._write([*rest, *kept])]

    def _parts(self, path: str) -> list[DataFile]:
        return _dates_in(FileSystems.join(address_of(self.target.uri), path), self.held[path].bytes)

    def _require_rows(self, path: str) -> None:
        where = FileSystems.join(address_of(self.target.uri), path)
        date_spans.require_rows(where, self.held[path].rows, date_spans.read_segments(where))

    def _write(self, parts: Sequence[tuple[DataFile, str]]) -> WrittenFiles:
        """Writes rows of files, each with its origin, as files of this layout.

        Raises:
            DataError: rows were lost.
        """
        if not parts:
            return []
        ordered = sorted(parts, key=lambda each: (each[0].date, each[1], each[0].path, each[0].start))
        names = [name for name in self.target.schema.names if name not in (self.target.extra or {})]
        tables = with_every_column([_typed(read_file(file), self.target.schema) for file, _ in ordered])
        content = pa.concat_tables(tables)
        content = content.select([name for name in names if name in content.column_names]).combine_chunks()
        segments: list[Segment] = []
        for file, origin in ordered:
            day = as_number(file.date)
            if segments and (segments[-1].day, segments[-1].origin) == (day, origin):
                segments[-1] = dataclasses.replace(segments[-1], rows=segments[-1].rows + file.rows)
            else:
                segments.append(Segment(day, file.rows, origin))
        date_spans.require_days(self.target.uri, content, segments)
        bounds = [0, *itertools.accumulate(each.rows for each in segments)]
        numbers = content["date"].cast(pa.int32()).to_numpy()
        written: list[tuple[WrittenFiles, tuple[str, str] | None]] = []
        for start, stop in date_spans.cuts(numbers, self.days, None if self.days > 1 else len(numbers)):
            some = segments[bisect.bisect_left(bounds, start) : bisect.bisect_left(bounds, stop)]
            written.append(_write_file(content.slice(start, stop - start), some, self.place))
        for files, aside in written:
            if aside is not None and self.days > 1:
                date_spans.require_rows(
                    aside[0],
                    sum(file.rows for file, _ in files),
                    [Segment(as_number(file.date), file.rows) for file, _ in files],
                )
        with _writing(self.target.uri):
            durable.rename_files([aside for _, aside in written if aside is not None])
        return [each for files, _ in written for each in files]


def _typed(rows: pa.Table, schema: pa.Schema) -> pa.Table:
    """Casts `rows` to the types of `schema`: other programs write other types of strings."""
    for i, name in enumerate(rows.column_names):
        kind = schema.field(name).type if name in schema.names else rows.schema.field(i).type
        if rows.schema.field(i).type != kind:
            rows = rows.set_column(i, name, rows.column(i).cast(kind))
    return rows


def add_actions(uri: str, files: Iterable[tuple[DataFile, dict[str, str]]]) -> list[AddAction]:
    """The log's actions that add written files, each once."""
    found: dict[str, list[tuple[DataFile, dict[str, str]]]] = {}
    for each in files:
        found.setdefault(each[0].path, []).append(each)
    actions = []
    for path, parts in found.items():
        (first, values), rows = parts[0], sum(file.rows for file, _ in parts)
        stats: dict[str, object] = {"numRecords": rows}
        if first.whole:
            stats = date_spans.stats_of([Segment(as_number(file.date), file.rows) for file, _ in parts])
            if rows != first.whole:
                raise StoreError(
                    "A file is committed with all its dates", path, "This is a defect of Millrace: please report it"
                )
        size = os.path.getsize(path) if first.whole else first.bytes
        actions.append(AddAction(path[len(uri.rstrip("/")) + 1 :], size, values, 0, True, json.dumps(stats)))
    return actions


def _filters(target: CommitTarget, dates: Sequence[date] | None) -> Filters | None:
    """What the commit replaces.  Dates are one `in` filter: two `=` filters on one column match nothing, which would
    double the rows."""
    filters: Filters = [(name, "=", value) for name, value in (target.extra or {}).items()]
    if dates is not None:
        filters.append(("date", "in", [day.isoformat() for day in dates]))
    return filters or None


def _held(table: DeltaTable | None, target: CommitTarget) -> dict[str, RemovedFile]:
    """Files by path: those of the target's dates; in a table with spans, all files with its partition values."""
    if table is None:
        return {}
    root, actions, spans = table_root(table), _actions(table), date_spans.days_of(table) > 1
    wanted: dict[str, set[date | str]] = {name: {value} for name, value in (target.extra or {}).items()}
    if target.dates is not None and not spans:
        wanted["date"] = set(target.dates)
    names = [*(target.extra or {}), *([] if spans else ["date"])]
    values = {name: actions[f"partition.{name}"] for name in names}
    lows, highs = (actions.get(name, []) for name in (("min.date", "max.date") if spans else ("partition.date",) * 2))
    return {
        path: RemovedFile(
            path,
            {name: str(each[i]) for name, each in values.items()},
            actions["size_bytes"][i],
            actions["num_records"][i],
            (lows[i], highs[i]),
        )
        for i, path in enumerate(path_within(root, each) for each in actions["path"])
        if all(values[name][i] in some for name, some in wanted.items())
    }


def _contents(table: DeltaTable | None, target: CommitTarget) -> frozenset[tuple[str, date]]:
    """What the table has on the target's dates: each date with the file in which its rows were first committed."""
    held, mine = _held(table, target), None if target.dates is None else set(target.dates)
    if table is None or date_spans.days_of(table) == 1 or (mine is None and not target.shared):
        return frozenset((path, file.dates[0]) for path, file in held.items())
    root, found = address_of(target.uri), set[tuple[str, date]]()
    for path, file in held.items():
        if mine is None or any(file.dates[0] <= day <= file.dates[1] for day in mine):
            try:
                parts = _dates_in(FileSystems.join(root, path), file.bytes)
            except StoreError:  # a missing file is a change; a damaged one is reported by the code that copies its rows
                found.add((path, file.dates[0]))
                continue
            found.update((part.origin or path, part.date) for part in parts if mine is None or part.date in mine)
    return frozenset(found)


def _actions(table: DeltaTable) -> dict[str, list[Any]]:
    """Path, partition, rows and bytes of every file, by delta-rs's names (pyarrow 10 cannot take its tables)."""
    known = pl.DataFrame(table.get_add_actions(flatten=True))
    return known.select("path", "num_records", "size_bytes", pl.col(r"^(partition\..*|(min|max)\.date)$")).to_dict(
        as_series=False
    )


def delta_schema(schema: pa.Schema) -> Schema:
    """`schema` as a Delta schema (pyarrow 10 does not support the interface by which delta-rs reads Arrow schemas)."""
    return Schema([Field(field.name, PrimitiveType(_TYPES[field.type]), nullable=True) for field in schema])


def schema_with_columns(table: DeltaTable | None, schema: Schema) -> Schema:
    """The table's schema, extended by the columns of `schema` that it lacks; older rows have null there."""
    if table is None:
        return schema
    held = table.schema().fields
    known = {field.name for field in held}
    return Schema([*held, *(field for field in schema.fields if field.name not in known)])


def days_between(start: date, end: date) -> tuple[date, ...]:
    """The days of `[start, end)`."""
    return tuple(start + timedelta(days=i) for i in range((end - start).days))


def _in_a_line(error: BaseException) -> str:
    """The error in one line; delta-rs prints causes on separate lines, with arrows and colours."""
    lines = [re.sub(r"\x1b\[\d*m|↳", "", line).strip() for line in str(error).splitlines()]
    return ": ".join(filter(None, lines))[:300] or type(error).__name__
