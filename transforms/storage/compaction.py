"""Compaction: small files of one date become one file, in a commit of its own, while other writers go on committing.

Rows stay as they are.  Readers of older versions still find the files that were merged, until vacuum deletes them.
Source: tiered log-structured merge trees (O'Neil et al. 1996).  A merge makes a file at least twice as large as each
file that goes into it, so a row is written again at most log2(rows of the date) times.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from datetime import date

import polars as pl
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from schemas.errors import DataError, StoreError
from transforms.storage.date_spans import days_of
from transforms.storage.delta_log import COMPACTION, path_within, root_of
from transforms.storage.delta_tables import (
    COMMIT_ATTEMPTS,
    DataFile,
    add_actions,
    append_commit,
    commit_attempt,
    read_group,
    retry_commits,
    write_files,
)
from transforms.storage.log_entries import LogEntry, RemovedFile

# A date with more files than this is compacted.  A live job adds some more between two compactions.
MOST_FILES = 14
# Files of this size are not merged with others.
LARGE_FILE = 128 << 20
FIX = "Grant access and free space, then run the same command again"


@dataclasses.dataclass(frozen=True)
class Compaction:
    """What was done to a table: its number of files before and after, rows and bytes that were written again."""

    before: int = 0
    after: int = 0
    rows: int = 0
    bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _File:
    """A data file: path within the table, its date, rows, bytes, and when it was committed (ms since 1970)."""

    path: str
    day: date
    rows: int
    bytes: int
    committed: int


@dataclasses.dataclass(frozen=True)
class _Merged:
    """Files of one date that were merged, and the file that has their rows."""

    files: tuple[_File, ...]
    action: AddAction


def can_compact(table: DeltaTable) -> bool:
    """Whether each file of the table has rows of one date, and no other column partitions it."""
    return days_of(table) == 1 and list(table.metadata().partition_columns) == ["date"]


def compact_table(uri: str, run_id: str, most_files: int = MOST_FILES) -> Compaction:
    """Merges the smallest files of each date that has more than `most_files`.

    Returns:
        What was done; nothing if there is no table, or if it is not partitioned by date alone.

    Raises:
        StoreError: a file cannot be read, the store cannot be written, or other writers keep committing.
    """
    merged: list[_Merged] | None = None

    def attempt(table: DeltaTable | None) -> Compaction:
        nonlocal merged
        if table is None or not can_compact(table):
            return Compaction()
        files = _files(table)
        if merged is None:
            merged = [_merge(uri, group, run_id) for group in _groups(files, most_files)]
        there = set(files)
        # If another writer has replaced the rows of a date meanwhile, its merged file is left to vacuum.
        merged = [each for each in merged if there.issuperset(each.files)]
        if not merged:
            return Compaction(len(files), len(files))
        gone = [file for each in merged for file in each.files]
        entry = LogEntry(
            partition_by=["date"],
            metadata={"run_id": run_id, COMPACTION: "true"},
            application=(run_id, 1),
            added=[each.action for each in merged],
            removed=[_removed(file) for file in gone],
            changes_rows=False,
        )
        with commit_attempt(uri, table, FIX):
            append_commit(uri, table, entry)
        return Compaction(
            len(files),
            len(files) - len(gone) + len(merged),
            sum(file.rows for file in gone),
            sum(each.action.size for each in merged),
        )

    rule = f"A commit succeeds within {COMMIT_ATTEMPTS} attempts"
    fix = "Run the same command again when fewer runs write to this table"
    return retry_commits(uri, attempt, StoreError(rule, uri, fix))


def _files(table: DeltaTable) -> list[_File]:
    root = root_of(table.table_uri)
    known = pl.DataFrame(table.get_add_actions(flatten=True))
    columns = known.select(
        "path", "partition.date", "num_records", "size_bytes", pl.col("modification_time").cast(pl.Int64)
    )
    return [_File(path_within(root, path), *rest) for path, *rest in columns.iter_rows()]


def _groups(files: Sequence[_File], most: int) -> list[tuple[_File, ...]]:
    """The files to merge; each group becomes one file."""
    by_day: dict[date, list[_File]] = {}
    for file in files:
        by_day.setdefault(file.day, []).append(file)
    groups = []
    for _, some in sorted(by_day.items()):
        if len(some) <= most:
            continue
        group: list[_File] = []
        # In the order in which they were committed, so that the bounds of row groups stay narrow.
        for file in sorted(smallest(some, most), key=lambda file: (file.committed, file.path)):
            if group and sum(each.bytes for each in group) + file.bytes > LARGE_FILE:
                groups.append(tuple(group))
                group = []
            group.append(file)
        groups.append(tuple(group))
    return [group for group in groups if len(group) > 1]


def smallest(files: Sequence[_File], most: int) -> list[_File]:
    """The files to merge: as many of the smallest ones as leave at most `most`, and more as long as the merged file is
    at least twice as large as each of them."""
    small = sorted((file for file in files if file.bytes < LARGE_FILE), key=lambda file: (file.rows, file.path))
    count = total = 0
    for i, file in enumerate(small):
        if i and file.rows <= total:
            count = i + 1
        total += file.rows
    return small[: max(count, len(files) - most + 1)]


def _merge(uri: str, files: tuple[_File, ...], run_id: str) -> _Merged:
    """Writes the rows of `files` to a file that no reader sees until it is committed.

    Raises:
        StoreError: a file cannot be read, or the new one cannot be written.
    """
    root = root_of(uri)
    try:
        rows = read_group(DataFile(os.path.join(root, file.path), file.day, file.rows, file.bytes) for file in files)
    except DataError as error:
        raise StoreError(
            "The files of a table have the rows that its log counts",
            error.value,
            "Nothing was changed. Restore the files from a backup",
        ) from None
    (action,) = add_actions(root, write_files(rows, root, run_id))
    return _Merged(files, action)


def _removed(file: _File) -> RemovedFile:
    return RemovedFile(file.path, {"date": file.day.isoformat()}, file.bytes, file.rows, (file.day, file.day))
