"""Rows removed from Parquet files and Delta tables for good: files are written again without them, older ones deleted.

A table keeps the commits of its versions. Files that its newest version does not name are deleted, so older versions
cannot be read any more. Its log keeps no statistics of strings. Every step can be repeated after a kill.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable
from deltalake.transaction import AddAction

from schemas.errors import StoreError
from transforms.records.arrays import Bools
from transforms.storage import durable
from transforms.storage.date_spans import (
    days_of,
    kept_segments,
    read_segments,
    require_rows,
    schema_with_segments,
    stats_of,
)
from transforms.storage.delta_log import LOG_FOLDER, logged_versions, path_within, root_of
from transforms.storage.delta_tables import append_commit, commit_attempt, open_table, paths_of
from transforms.storage.log_entries import COUNTS, LogEntry, RemovedFile, write_checkpoint
from transforms.storage.stored_json import explain_damage, read_regular

# (Rows of a row group, path of the file) → for each row, whether it is removed.
Matches = Callable[[pa.Table, str], Bools]
# Rows of a row group that stay → the rows to write in their place; the very same table if they stay as they are.
Revise = Callable[[pa.Table], pa.Table]
FIX = "Grant access and free space, then run the same command again: it completes what was begun"


def _groups(file: pq.ParquetFile) -> Iterable[pa.Table]:
    for number in range(file.num_row_groups):
        yield file.read_row_group(number)


def _as_they_are(rows: pa.Table) -> pa.Table:
    return rows


def write_without(
    file: pq.ParquetFile,
    path: str,
    matches: Matches,
    target: str,
    schema: pa.Schema | None = None,
    revise: Revise = _as_they_are,
) -> tuple[int, int]:
    """Writes the rows of a file that do not match to `target`, first under a hidden name.

    Args:
        schema: the schema of the file, with its new metadata; None: as it is.
        revise: changes rows that stay.

    Returns:
        Rows that stayed and rows that were removed.

    Raises:
        StoreError: the folder cannot be written.
    """
    stayed = removed = 0
    codec = file.metadata.row_group(0).column(0).compression if file.num_row_groups else "SNAPPY"
    with (
        written_aside(target) as aside,
        pq.ParquetWriter(aside, schema or file.schema_arrow, compression=codec) as writer,
    ):
        for group in _groups(file):
            gone = matches(group, path)
            kept = revise(group.filter(pa.array(~gone)))
            stayed, removed = stayed + len(kept), removed + int(gone.sum())
            if len(kept):
                writer.write_table(kept)
    return stayed, removed


@contextlib.contextmanager
def written_aside(target: str) -> Iterator[str]:
    """A path beside `target` to write to; it is renamed to `target` at the end.

    Raises:
        StoreError: the folder cannot be written.
    """
    aside = os.path.join(
        os.path.dirname(target), f".{os.path.basename(target)}.{os.getpid()}-{uuid.uuid4().int % 10**9}"
    )
    try:
        yield aside
        durable.rename(aside, target)
    except OSError as error:
        raise StoreError(
            "It must be possible to write the files of a source", f"{target}: {error.strerror or error}", FIX
        ) from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(aside)


def rewrite_delta(
    uri: str,
    matches: Matches,
    metadata: Mapping[str, str],
    opened: Callable[[str], pq.ParquetFile] = pq.ParquetFile,
    revise: Revise = _as_they_are,
) -> int:
    """Commits a version of a table without the rows that match, and returns how many there were.

    Files without such rows stay as they are, unless `revise` changes some of theirs.

    Raises:
        StoreError: the table cannot be written, another program commits to it at the same time, or the table has
            features of Delta Lake that a commit by hand would break.
    """
    table = open_table(uri)
    if table is None:
        return 0
    root, partitions = root_of(table.table_uri), list(table.metadata().partition_columns)
    spans = days_of(table) > 1
    added: list[AddAction] = []
    removed: list[RemovedFile] = []
    count = 0
    for row in pl.DataFrame(table.get_add_actions(flatten=True)).to_dicts():
        inside = path_within(root, row["path"])
        path = os.path.join(root, inside)
        file = opened(path)
        hits = [matches(group, path) for group in _groups(file)]
        if not any(hit.any() for hit in hits) and all(revise(group) is group for group in _groups(file)):
            continue
        _require_plain(table)
        gone = np.concatenate(hits)
        stayed = len(gone) - int(gone.sum())
        count += int(gone.sum())
        values = {name: _text(row[f"partition.{name}"]) for name in partitions}
        removed.append(RemovedFile(inside, values, row["size_bytes"], len(gone), logged=row["path"]))
        if not stayed:
            continue
        name = os.path.join(os.path.dirname(inside), f"{metadata['run_id']}-{uuid.uuid4().hex[:16]}.parquet")
        target, schema = os.path.join(root, name), file.schema_arrow
        stats: dict[str, object] = {"numRecords": stayed}
        if spans:
            segments = kept_segments(read_segments(path), gone, inside)
            write_without(file, path, matches, target, schema_with_segments(schema, segments), revise)
            require_rows(target, stayed, segments)
            stats = stats_of(segments)
        else:
            write_without(file, path, matches, target, revise=revise)
        added.append(AddAction(name, os.path.getsize(target), values, 0, True, json.dumps(stats)))
    if removed:
        _append(table, LogEntry(partitions, dict(metadata), (metadata["run_id"], 1), added, removed))
    return count


# Of the features that a table may require of its writers, those that a commit which only removes rows satisfies.
_KEPT_FEATURES = {
    "appendOnly",  # refused if it is in use
    "changeDataFeed",  # the change feed reads removed rows from the removed files, and those are deleted
    "checkConstraints",
    "generatedColumns",
    "identityColumns",
    "invariants",
    "timestampNtz",
    "vacuumProtocolCheck",
}


def _require_plain(table: DeltaTable) -> None:
    """Checks that rows may be removed from the table by a commit of plain additions and removals.

    Raises:
        StoreError: see `rewrite_delta`.
    """
    protocol, properties = table.protocol(), table.metadata().configuration
    features = {str(each) for each in protocol.writer_features or ()}
    if properties.get("delta.columnMapping.mode", "none") != "none":
        features.add("columnMapping")
    if properties.get("delta.appendOnly") == "true":
        features.add("delta.appendOnly = true")
    beyond = sorted(features - _KEPT_FEATURES)
    if beyond:
        raise StoreError(
            "A Delta table from which rows are removed must not have features that only its writer can maintain",
            f"{table.table_uri} has {', '.join(beyond)}",
            "Delete the rows with the program that writes the table, vacuum it without retention, then erase the rest "
            "of the store with the same command",
        )


def _append(table: DeltaTable, entry: LogEntry) -> None:
    with commit_attempt(table.table_uri, table, FIX):
        append_commit(root_of(table.table_uri), table, entry, overwrites=True)


def _text(value: object) -> str | None:
    """A partition's value as the log has it."""
    if value is None:
        return None
    if isinstance(value, datetime):
        return value.replace(tzinfo=None).isoformat(" ", "microseconds")
    return str(value).lower() if isinstance(value, bool) else str(value)


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
        if inside[0] == LOG_FOLDER or (inside[0].startswith("_") and inside[0] != "_change_data"):
            continue
        for name in names:
            path = os.path.join(folder, name)
            if (name.endswith(".parquet") or name.startswith(".")) and path not in needed:
                os.remove(path)
                count += 1
    _scrub(root, table, needed)
    return count


def _scrub(root: str, table: DeltaTable, needed: set[str]) -> None:
    """Removes everything from the log that comes from rows: statistics, predicates, and partition values other than
    dates.

    For a table whose files have several dates, it keeps the first and last date of each file, which other tables have
    in their paths.
    """
    folder, dates = os.path.join(root, LOG_FOLDER), days_of(table) > 1
    ours = set(table.metadata().partition_columns) <= {"date", "view"}
    for version in logged_versions(root):
        path = os.path.join(folder, f"{version:020}.json")
        with explain_damage("A table's log must be readable", path):
            lines = [line for line in read_regular(path).decode().splitlines() if line.strip()]
            scrubbed = [_scrubbed(line, root, None if ours else needed, dates) for line in lines]
        after = [each for each in scrubbed if each is not None]
        if after != lines:
            if len(after) < len(lines):  # the entry no longer has all the files that it counts
                after = [_without_counts(line) for line in after]
            durable.write_file(path, ("\n".join(after) + "\n").encode())
    _renew_checkpoints(root, int(table.version()))


def _without_counts(line: str) -> str:
    action = json.loads(line)
    if "commitInfo" in action:
        for name in COUNTS:
            action["commitInfo"].get("operationMetrics", {}).pop(name, None)
    return json.dumps(action, separators=(",", ":"), ensure_ascii=False)


def _renew_checkpoints(root: str, version: int) -> None:
    """Replaces the checkpoints, which repeat what was in the log, by one of the newest version, and removes the
    checksum files of other programs, which repeat it too.
    """
    folder = os.path.join(root, LOG_FOLDER)
    names = os.listdir(folder)
    checkpoints = [name for name in names if ".checkpoint" in name and not name.startswith((".", "_"))]
    for name in names:
        if name.endswith(".crc"):
            os.remove(os.path.join(folder, name))
    if not checkpoints:
        return
    whole = (
        logged_versions(root)[0] == 0
    )  # made from the entries alone; otherwise the last checkpoint replaces missing entries
    if whole:
        for name in [*checkpoints, "_last_checkpoint"]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(folder, name))
    if whole or all(int(name[:20]) != version for name in checkpoints):
        write_checkpoint(root, version)
    for name in checkpoints:
        if not whole and int(name[:20]) != version:
            os.remove(os.path.join(folder, name))


def _scrubbed(line: str, root: str, needed: set[str] | None, dates: bool) -> str | None:
    """A line of the log without anything that comes from rows; None if the line is left out.

    Args:
        needed: files of the newest version; None for a table of Millrace.
        dates: whether to keep bounds of `date`.
    """
    action = json.loads(line)
    ((kind, body),) = action.items()
    if needed is not None:
        if kind in ("add", "remove", "cdc") and os.path.join(root, path_within(root, body["path"])) not in needed:
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
