"""Rows removed from Parquet files and Delta tables for good: files are written again without them, older ones deleted.

A table keeps its versions' commits. Files that its newest version does not name are deleted, so older versions cannot
be read any more, and its log keeps no statistics of strings. Every step can be repeated after a kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction, CommitProperties

from schemas.errors import StoreError
from transforms.storage.date_spans import (
    days_of,
    kept_segments,
    read_segments,
    require_rows,
    schema_with_segments,
    stats_of,
)
from transforms.storage.delta_log import LOG, path_within, root_of, versions
from transforms.storage.delta_tables import append_commit, commit_attempt, open_table, paths_of
from transforms.storage.log_entries import LogEntry, RemovedFile
from transforms.storage.stored_json import read_regular, understood

# Rows of a row group and the file's path → whether each of them is removed.
Matches = Callable[[pa.Table, str], npt.NDArray[np.bool_]]
FIX = "Grant access and free space, then run the same command again: it completes what was begun"


def matching_rows(file: pq.ParquetFile, path: str, matches: Matches) -> int:
    """Number of rows of a file that match."""
    return sum(int(matches(group, path).sum()) for group in _groups(file))


def _groups(file: pq.ParquetFile) -> Iterable[pa.Table]:
    for number in range(file.num_row_groups):
        yield file.read_row_group(number)


def write_without(
    file: pq.ParquetFile, path: str, matches: Matches, target: str, schema: pa.Schema | None = None
) -> tuple[int, int]:
    """Writes the rows of a file that do not match to `target`, aside and renamed.

    Args:
        schema: the file's, with the metadata that it is to have; None: as it is.

    Returns:
        Rows that stayed and rows that were removed.

    Raises:
        StoreError: the folder cannot be written.
    """
    aside = os.path.join(
        os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}-{uuid.uuid4().int % 10**9}"
    )
    stayed = removed = 0
    codec = file.metadata.row_group(0).column(0).compression if file.num_row_groups else "SNAPPY"
    try:
        with pq.ParquetWriter(aside, schema or file.schema_arrow, compression=codec) as writer:
            for group in _groups(file):
                gone = matches(group, path)
                kept = group.filter(pa.array(~gone))
                stayed, removed = stayed + len(kept), removed + int(gone.sum())
                if len(kept):
                    writer.write_table(kept)
        _flush(aside)
        os.replace(aside, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise StoreError("The files of a source can be written", f"{target}: {error.strerror or error}", FIX) from None
    return stayed, removed


def _flush(path: str) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def rewrite_delta(
    uri: str, matches: Matches, metadata: Mapping[str, str], opened: Callable[[str], pq.ParquetFile] = pq.ParquetFile
) -> int:
    """Commits a version of a table without the rows that match, and returns how many there were.

    Raises:
        StoreError: the table cannot be written, or another program commits to it at the same time.
    """
    table = open_table(uri)
    if table is None:
        return 0
    if days_of(table) > 1:
        return _rewrite_spans(table, matches, metadata, opened)
    root, actions = root_of(table.table_uri), pl.DataFrame(table.get_add_actions(flatten=True))
    rows = actions.to_dicts()
    counts = {row["path"]: matching_rows(opened(p), p, matches) for row in rows for p in [_path(root, row["path"])]}
    if not any(counts.values()):
        return 0
    partitions = list(table.metadata().partition_columns)
    touched = {row["partition.date"] for row in rows if counts[row["path"]]} if "date" in partitions else set()
    adds = []
    for row in rows:
        if touched and row["partition.date"] not in touched:
            continue
        # A commit cannot replace a file by itself, so the files that stay in a touched partition get new names.
        inside = "/".join([*row["path"].split("/")[:-1], f"{metadata['run_id']}-{uuid.uuid4().hex[:16]}.parquet"])
        path, target, number = _path(root, row["path"]), _path(root, inside), int(row["num_records"])
        if counts[row["path"]]:
            number, _ = write_without(opened(path), path, matches, target)
        else:
            os.link(path, target)
        values = {name: _text(row[f"partition.{name}"]) for name in partitions}
        stats = json.dumps({"numRecords": number})
        if number:
            adds.append(AddAction(inside, os.path.getsize(target), values, 0, True, stats))
        else:
            os.remove(target)
    _commit(table, adds, partitions, sorted(map(str, touched)), metadata)
    return sum(counts.values())


def _rewrite_spans(
    table: DeltaTable, matches: Matches, metadata: Mapping[str, str], opened: Callable[[str], pq.ParquetFile]
) -> int:
    """`rewrite_delta` of a table whose files have several dates: files without such rows stay as they are."""
    root, partitions = root_of(table.table_uri), list(table.metadata().partition_columns)
    added: list[AddAction] = []
    removed: list[RemovedFile] = []
    count = 0
    for row in pl.DataFrame(table.get_add_actions(flatten=True)).to_dicts():
        inside = path_within(root, row["path"])
        path = os.path.join(root, inside)
        file = opened(path)
        hits = [matches(group, path) for group in _groups(file)]
        if not any(hit.any() for hit in hits):
            continue
        gone = np.concatenate(hits)
        count += int(gone.sum())
        values = {name: str(row[f"partition.{name}"]) for name in partitions}
        removed.append(RemovedFile(inside, values, row["size_bytes"], row["num_records"], _bounds(row)))
        segments = kept_segments(read_segments(path), gone, inside)
        if not segments:
            continue
        name = os.path.join(os.path.dirname(inside), f"{metadata['run_id']}-{uuid.uuid4().hex[:16]}.parquet")
        target = os.path.join(root, name)
        write_without(file, path, matches, target, schema_with_segments(file.schema_arrow, segments))
        require_rows(target, len(gone) - int(gone.sum()), segments)
        added.append(AddAction(name, os.path.getsize(target), values, 0, True, json.dumps(stats_of(segments))))
    if removed:
        entry = LogEntry(partitions, dict(metadata), (metadata["run_id"], 1), added, removed)
        _append(table, entry)
    return count


def _bounds(row: Mapping[str, date]) -> tuple[date, date]:
    return row["min.date"], row["max.date"]


def _append(table: DeltaTable, entry: LogEntry) -> None:
    with commit_attempt(table.table_uri, table, FIX):
        append_commit(root_of(table.table_uri), table, entry, overwrites=True)


def _commit(
    table: DeltaTable, adds: list[AddAction], partitions: list[str], dates: list[str], metadata: Mapping[str, str]
) -> None:
    with commit_attempt(table.table_uri, table, FIX):
        table.create_write_transaction(
            [*adds],
            "overwrite",
            table.schema(),
            partitions,
            [("date", "in", dates)] if dates else None,
            commit_properties=CommitProperties(custom_metadata=dict(metadata)),
        )


def _path(root: str, inside: str) -> str:
    return os.path.join(root, unquote(inside))


def _text(value: object) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def purge(uri: str) -> int:
    """Deletes the data files that the newest version does not name, and the statistics of rows in the log.

    Returns:
        Number of deleted files.
    """
    table = open_table(uri)
    if table is None:
        return 0
    root, needed, count = root_of(table.table_uri), set(paths_of(table)), 0
    for folder, _, names in os.walk(root):
        inside = os.path.relpath(folder, root).split(os.sep)
        if inside[0] == LOG or (inside[0].startswith("_") and inside[0] != "_change_data"):
            continue
        for name in names:
            path = os.path.join(folder, name)
            if (name.endswith(".parquet") or name.startswith(".")) and path not in needed:
                os.remove(path)
                count += 1
    _scrub(root, table, needed)
    return count


def _scrub(root: str, table: DeltaTable, needed: set[str]) -> None:
    """Removes from the log what it has of rows: statistics, predicates, and files of other partitions than dates.

    Of a table whose files have several dates, it keeps the first and last date of each file, as paths do for other
    tables.
    """
    folder, dates = os.path.join(root, LOG), days_of(table) > 1
    ours = set(table.metadata().partition_columns) <= {"date", "view"}
    for version in versions(root):
        path = os.path.join(folder, f"{version:020}.json")
        with understood("A table's log can be read", path):
            lines = [line for line in read_regular(path).decode().splitlines() if line.strip()]
            scrubbed = [_scrubbed(line, root, None if ours else needed, dates) for line in lines]
        after = [each for each in scrubbed if each is not None]
        if after != lines:
            aside = f"{path}.tmp"
            with open(aside, "w", encoding="utf-8") as handle:
                handle.write("\n".join(after) + "\n")
            _flush(aside)
            os.replace(aside, path)
    checkpoints = [name for name in os.listdir(folder) if ".checkpoint" in name]
    if checkpoints:
        now = DeltaTable(root)
        now.create_checkpoint()
        for name in checkpoints:
            if int(name[:20]) != now.version():
                os.remove(os.path.join(folder, name))


def _scrubbed(line: str, root: str, needed: set[str] | None, dates: bool) -> str | None:
    """A line of the log without what it has of rows; None: it is left out.

    Args:
        needed: files of the newest version; None for a table of Millrace.
        dates: whether bounds of `date` stay.
    """
    action = json.loads(line)
    ((kind, body),) = action.items()
    if needed is not None:
        if kind in ("add", "remove", "cdc") and _path(root, body["path"]) not in needed:
            return None
        if kind == "commitInfo" and body.get("operationParameters", {}).pop("predicate", None) is not None:
            return json.dumps(action, separators=(",", ":"), ensure_ascii=False)
    stats = json.loads(body["stats"]) if kind in ("add", "remove") and body.get("stats") else {}
    kept: dict[str, object] = {"numRecords": stats.get("numRecords")}
    if dates:
        bounds = {name: stats[name]["date"] for name in ("minValues", "maxValues") if "date" in (stats.get(name) or {})}
        kept |= {name: {"date": value} for name, value in bounds.items()}
    if not stats or stats == kept:
        return line
    body["stats"] = json.dumps(kept)
    return json.dumps(action, separators=(",", ":"), ensure_ascii=False)
