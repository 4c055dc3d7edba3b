"""Delta tables: data files written by workers, made visible by one final commit."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from typing import Any, TypeVar

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable, Field, Schema
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from deltalake.transaction import AddAction, CommitProperties, Transaction, create_table_with_add_actions

from schemas.errors import ConflictError, StoreError
from transforms.records.record_batches import batch
from transforms.records.times import as_date
from transforms.storage import durable
from transforms.storage.delta_log import commits_since, conflict, path_within, remaining, version_of_run
from transforms.storage.delta_log import root_of as address_of
from transforms.storage.file_systems import FileSystems
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
# By default delta-rs forgets versions after 30 days: models name the version that they were trained on.
TABLE_CONFIGURATION = {"delta.enableExpiredLogCleanup": "false"}
# A commit is attempted 20 times if other writers interfere. The waits between the attempts are at most 0.02, 0.04, … 2 s, and
# about 15 s in all on average.
COMMIT_ATTEMPTS, FIRST_BACKOFF, LONGEST_BACKOFF = 20, 0.02, 2.0


@functools.cache
def file_pool() -> ThreadPoolExecutor:
    """The threads of this process that read and write Parquet files."""
    return ThreadPoolExecutor(max(2, os.cpu_count() or 2), "parquet")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A Parquet file of a table: full path, its partition values, rows and bytes."""

    path: str
    date: date
    rows: int
    bytes: int


# What `write_files` returns: each file with the values of its partition columns.
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
    """The table as of `version` (None: the newest), or None where there is none.

    Raises:
        StoreError: the version does not exist, or the log cannot be read.
    """
    try:
        return DeltaTable(uri, version=version)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StoreError(
            f"The table {uri} can be read{'' if version is None else f' at version {version}'}",
            _in_a_line(error),
            "List what there is with: millrace tables",
        ) from None


def newest_version(uri: str) -> int | None:
    """The table's version now, None where there is none."""
    table = open_table(uri)
    return None if table is None else int(table.version())


def table_root(table: DeltaTable) -> str:
    """The table's folder."""
    return address_of(table.table_uri)


def paths_of(table: DeltaTable) -> list[str]:
    """Where every file of the table lies, sorted."""
    root = table_root(table)
    return sorted(FileSystems.join(root, path_within(root, path)) for path in _actions(table)["path"])


def data_files(
    table: DeltaTable,
    start: date | None = None,
    end: date | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[DataFile]:
    """The files of the table's dates in `[start, end)`, in order of date and path.

    Args:
        extra: wanted values of further partition columns (see `CommitTarget`).
    """
    root, actions = table_root(table), _actions(table)
    rows = [
        i
        for i in range(len(actions["path"]))
        if all(actions[f"partition.{k}"][i] == v for k, v in (extra or {}).items())
    ]
    actions = {name: [values[i] for i in rows] for name, values in actions.items()}
    files = [
        DataFile(FileSystems.join(root, path_within(root, path)), day, rows, size)
        for path, day, rows, size in zip(
            actions["path"], actions["partition.date"], actions["num_records"], actions["size_bytes"], strict=True
        )
        if (start is None or day >= start) and (end is None or day < end)
    ]
    return sorted(files, key=lambda file: (file.date, file.path))


def read_file(file: DataFile, columns: list[str] | None = None) -> pa.Table:
    """A data file's `columns` (None: all) with its `date`."""
    wanted = None if columns is None else [name for name in columns if name != "date"]
    try:
        if "://" in file.path:
            with FileSystems.open(file.path) as handle:
                content = pq.read_table(handle, columns=wanted)
        else:
            content = pq.ParquetFile(file.path).read(wanted, use_threads=False)
    except (OSError, pa.ArrowInvalid, RuntimeError) as error:  # RuntimeError: of pyarrow_hotfix
        raise StoreError(
            "A committed data file can be read",
            f"{file.path}: {_in_a_line(error)}",
            "Restore the file, or recompute its date with --full",
        ) from None
    # Made by Polars, because `pa.array` and `pa.scalar` import pandas.
    days = pl.repeat(file.date, content.num_rows, dtype=pl.Date, eager=True).to_arrow()
    content = content.append_column("date", days)
    return content if columns is None else content.select(columns)


def groups(files: Iterable[DataFile], rows: int = READ_ROWS) -> Iterator[tuple[DataFile, ...]]:
    """Neighbouring files in groups of about `rows`."""
    group: list[DataFile] = []
    for file in files:
        if group and sum(each.rows for each in group) + file.rows > rows:
            yield tuple(group)
            group = []
        group.append(file)
    if group:
        yield tuple(group)


def read_group(files: Iterable[DataFile], columns: list[str] | None = None) -> pa.RecordBatch:
    """The rows of `files` as one batch; a column that some of the files do not have is null there."""
    parts = list(file_pool().map(lambda file: read_file(file, columns), files))
    whole = pa.concat_tables(with_every_column(parts))
    return batch(whole, whole.schema)


def with_every_column(parts: Sequence[pa.Table]) -> list[pa.Table]:
    """`parts` with the same columns, in the last one's order: nulls where a version that knew less wrote a part."""
    types: dict[str, pa.DataType] = {}
    for part in parts:
        types |= {field.name: field.type for field in part.schema}
    names = list(dict.fromkeys([*parts[-1].column_names, *types])) if parts else []

    def completed(part: pa.Table) -> pa.Table:
        there = set(part.column_names)
        return pa.table({name: part[name] if name in there else pa.nulls(len(part), types[name]) for name in names})

    return [part if part.column_names == names else completed(part) for part in parts]


def write_files(rows: pa.RecordBatch, uri: str, run_id: str, extra: Mapping[str, str] | None = None) -> WrittenFiles:
    """Write the batch as one Parquet file per date under `uri`, invisible until committed.

    Names hold the run and a digest of the content: a repeated bundle writes the same name again, another run never does.
    Each is written aside, flushed and renamed: no reader meets half a file, and a commit names durable files only.
    """
    content = pa.Table.from_batches([rows])
    days = rows.column(rows.schema.get_field_index("date")).cast(pa.int32()).to_numpy()
    if len(days) and (days[1:] < days[:-1]).any():
        content = content.sort_by("date")
        days = content["date"].cast(pa.int32()).to_numpy()
    starts = [0, *(int(i) + 1 for i in (days[1:] != days[:-1]).nonzero()[0])] if len(days) else []
    content = content.drop([name for name in ("date", *(extra or {})) if name in content.schema.names])
    strings = [field.name for field in content.schema if pa.types.is_string(field.type)]
    # Bounds help readers to skip keys and times; of a day's floats they tell nothing and cost a tenth of the writing.
    bounded = [field.name for field in content.schema if not pa.types.is_floating(field.type)]

    def write(start: int, stop: int) -> tuple[tuple[DataFile, dict[str, str]], str | None]:
        day = as_date(int(days[start]))
        values = {**(extra or {}), "date": day.isoformat()}
        sink = pa.BufferOutputStream()
        pq.write_table(
            content.slice(start, stop - start),
            sink,
            compression="snappy",  # on floats, which hardly shrink, a third quicker than LZ4
            use_dictionary=strings,
            write_statistics=bounded,
        )
        buffer = sink.getvalue()
        name = f"{run_id}-{hashlib.sha256(buffer).hexdigest()[:16]}.parquet"
        folder = FileSystems.join(uri, *(f"{key}={value}" for key, value in values.items()))
        aside = _put_aside(folder, name, buffer)
        return (DataFile(FileSystems.join(folder, name), day, stop - start, buffer.size), values), aside

    written = list(file_pool().map(write, starts, [*starts[1:], len(days)])) if starts else []
    with _writing(uri):
        durable.publish([(aside, file.path) for (file, _), aside in written if aside is not None])
    return [each for each, _ in written]


def write_aside(folder: str, name: str, content: pa.Buffer) -> None:
    """Writes a file that is durable when this returns; readers see all of it or none.

    Raises:
        StoreError: the store cannot be written.
    """
    aside = _put_aside(folder, name, content)
    path = FileSystems.join(folder, name)
    with _writing(path):
        durable.publish([(aside, path)] if aside is not None else [])


def _put_aside(folder: str, name: str, content: pa.Buffer) -> str | None:
    """Writes a file under a hidden name and returns its path; None at an address that shows whole objects only."""
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
        dates: every date this run answers for; rows of another date are refused.  None: all dates, the table is replaced.
        run_id: identifies the run in file names and in the log.
        base: version at launch (None: no table then).  If the dates have changed since, the commit is refused.
        extra: fixed values of further partition columns, standing before `date`.
        metadata: kept with the commit.
        shared: dates that every run replaces: the last one to commit wins, and none is refused for them.
    """

    uri: str
    schema: pa.Schema
    dates: tuple[date, ...] | None
    run_id: str
    base: int | None = None
    extra: Mapping[str, str] | None = None
    metadata: Mapping[str, str] | None = None
    shared: tuple[date, ...] = ()

    def judged(self, files: Mapping[str, RemovedFile]) -> set[str]:
        """Of the files of the target's dates, those that no other run may change."""
        shared = {day.isoformat() for day in self.shared}
        return {path for path, file in files.items() if file.partition_values["date"] not in shared}


class CommittedMeanwhile(Exception):
    """Another writer committed to a table after this writer opened it."""


@contextlib.contextmanager
def commit_attempt(uri: str, table: DeltaTable | None, fix: str) -> Iterator[None]:
    """Translates the errors of one commit to `table`, the table at `uri` as it was opened (None: there was no table).

    Raises:
        CommittedMeanwhile: another writer committed, or created the table, since then.
        StoreError: the store cannot be written. `fix` says what the user can do.
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

    The waits between attempts are random, so that two writers that met once do not meet again.

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
    uri: str, table: DeltaTable | None, entry: LogEntry, overwrites: bool = False, filters: Any = None
) -> int:
    """Commits `entry` as the version after that of `table` (None: creates the table), and returns the version.

    It never lands on another version: whoever commits in between makes it fail.

    Args:
        overwrites, filters: for a table at an address with a scheme, where delta-rs commits: whether the added files
            replace others, and which.

    Raises:
        FileExistsError, CommitFailedError: another writer has committed since `table` was opened.
        OSError, DeltaError: the store cannot be written.
    """
    if "://" not in address_of(uri):
        entry = dataclasses.replace(entry, configuration=TABLE_CONFIGURATION)
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
    side: Sequence[Any] = (),
) -> Committed:
    """Replaces the rows of the target's dates with the files `written`, in one atomic commit.

    Raises:
        ConflictError: another run has changed the dates since `target.base`, or too many writers commit at the same time.
        StoreError: a row has another date, or the store cannot be written.
    """
    strays = sorted({file.date.isoformat() for file, _ in written} - {day.isoformat() for day in target.dates or ()})
    if strays and target.dates is not None:
        raise StoreError(
            "A run writes rows of its own dates only",
            ", ".join(strays[:5]),
            "This is a defect of Millrace: please report it",
        )
    unique = {file.path: (file, values) for file, values in written}
    base = None if target.base is None else open_table(target.uri, target.base)
    replacement = _Replacement(target, tuple(unique.values()), _held(base, target), prepare, tuple(side))
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
    """A commit of `files` that replaces the files `before`, by path, of the target's dates."""

    target: CommitTarget
    files: tuple[tuple[DataFile, dict[str, str]], ...]
    before: Mapping[str, RemovedFile]
    prepare: Callable[..., dict[str, str]] | None
    side: tuple[Any, ...]

    def attempt(self, table: DeltaTable | None) -> Committed:
        """Commits to `table`, the newest version, unless the run has committed before.

        Raises:
            CommittedMeanwhile: another writer committed since `table` was opened.
            ConflictError: another run has changed the dates since `target.base`.
        """
        target = self.target
        with commit_attempt(target.uri, table, "Check access and free space, then run the same command again"):
            entry = self._entry(table)
            if table is None:
                entry = dataclasses.replace(entry, schema=delta_schema(target.schema))
                return self._committed(append_commit(target.uri, None, entry), fresh=True)
            # A repeated transaction is accepted, so the log of this snapshot is searched before the commit.
            if (made := commits_since(target.uri, target.run_id, target.base, table.version())) is not None:
                return self._made_before(made)
            now = _held(table, target)
            before, judged = target.judged(self.before), target.judged(now)
            if judged != before:
                gone, new = before - judged, judged - before
                raise conflict(target.uri, target.base, table.version(), gone, new)
            dates = target.dates
            if "://" in address_of(target.uri):
                days = {path: date.fromisoformat(file.partition_values["date"]) for path, file in now.items()}
                added, dates = remaining(target.uri, entry.added, dates, days)
                nothing = not added and (not now or dates == ())
                entry = dataclasses.replace(entry, added=added)
            else:
                # A file's name tells its run and content: an earlier launch of the same run may have committed it.
                wanted = {action.path for action in entry.added}
                entry = dataclasses.replace(
                    entry,
                    added=[action for action in entry.added if action.path not in now],
                    removed=[file for path, file in now.items() if path not in wanted],
                )
                nothing = not entry.added and not entry.removed
            if nothing:  # there is nothing to commit, or this run has committed it
                return self._made_before(version_of_run(target.uri, target.run_id, table.version()))
            version = append_commit(target.uri, table, entry, overwrites=True, filters=_filters(target, dates))
            return self._committed(version, fresh=True)

    def _entry(self, table: DeltaTable | None) -> LogEntry:
        prepared = {} if self.prepare is None else self.prepare(table, *self.side)
        return LogEntry(
            partition_by=[*(self.target.extra or {}), "date"],
            metadata={**(self.target.metadata or {}), **prepared, "run_id": self.target.run_id},
            application=(self.target.run_id, 1),
            added=[add_action(self.target.uri, file, values) for file, values in self.files],
        )

    def _made_before(self, version: int) -> Committed:
        sync_log(self.target.uri)
        return self._committed(version, fresh=False)

    def _committed(self, version: int, fresh: bool) -> Committed:
        files = [file for file, _ in self.files]
        dates = tuple(sorted({file.date for file in files}))
        return Committed(version, sum(file.rows for file in files), len(files), dates, fresh)


def add_action(uri: str, file: DataFile, values: dict[str, str]) -> AddAction:
    stats = json.dumps({"numRecords": file.rows})
    return AddAction(file.path[len(uri.rstrip("/")) + 1 :], file.bytes, values, 0, True, stats)


def _filters(target: CommitTarget, dates: Sequence[date] | None) -> Any:
    """What the commit replaces.  One `in` over dates: two `=` on one column match nothing and would double the rows."""
    filters: list[tuple[str, str, Any]] = [(name, "=", value) for name, value in (target.extra or {}).items()]
    if dates is not None:
        filters.append(("date", "in", [day.isoformat() for day in dates]))
    return filters or None


def _held(table: DeltaTable | None, target: CommitTarget) -> dict[str, RemovedFile]:
    """Files of the target's dates, by path."""
    if table is None:
        return {}
    root, actions = table_root(table), _actions(table)
    wanted: dict[str, set[Any]] = {name: {value} for name, value in (target.extra or {}).items()}
    if target.dates is not None:
        wanted["date"] = set(target.dates)
    values = {name: actions[f"partition.{name}"] for name in [*(target.extra or {}), "date"]}
    return {
        path: RemovedFile(path, {name: str(each[i]) for name, each in values.items()}, actions["size_bytes"][i])
        for i, path in enumerate(path_within(root, each) for each in actions["path"])
        if all(values[name][i] in some for name, some in wanted.items())
    }


def _actions(table: DeltaTable) -> dict[str, list[Any]]:
    """Path, partition, rows and bytes of every file, by delta-rs's names (pyarrow 10 cannot take its tables)."""
    known = pl.DataFrame(table.get_add_actions(flatten=True))
    return known.select("path", "num_records", "size_bytes", pl.col(r"^partition\..*$")).to_dict(as_series=False)


def delta_schema(schema: pa.Schema) -> Schema:
    """`schema` in Delta's own terms (pyarrow 10 has no capsule that delta-rs could read)."""
    return Schema([Field(field.name, PrimitiveType(_TYPES[field.type]), nullable=True) for field in schema])


def with_columns(table: DeltaTable | None, schema: Schema) -> Schema:
    """The table's schema with the columns of `schema` that it lacks: rows that an earlier version wrote get null."""
    if table is None:
        return schema
    held = table.schema().fields
    known = {field.name for field in held}
    return Schema([*held, *(field for field in schema.fields if field.name not in known)])


def days_between(start: date, end: date) -> tuple[date, ...]:
    """The days of `[start, end)`."""
    return tuple(start + timedelta(days=i) for i in range((end - start).days))


def _in_a_line(error: BaseException) -> str:
    """The error in one line; delta-rs tells causes in lines of their own, with arrows and colours."""
    lines = [re.sub(r"\x1b\[\d*m|↳", "", line).strip() for line in str(error).splitlines()]
    return ": ".join(filter(None, lines))[:300] or type(error).__name__
