"""Commits to the log of a Delta table on a local disk: one entry per version, durable before it is reported.

delta-rs never flushes: after a power cut, the newest entry may be empty or cut short, and it reads an empty entry as a
commit of nothing.  It also cannot replace single files of a table.  So entries are written here, by the Delta
protocol (reader version 1, writer version 2): whole and flushed first, then linked to the name of their version, which
fails if another writer has taken it.  delta-rs reads everything.  At addresses with a scheme, it also commits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from urllib.parse import quote

from deltalake import DeltaTable, Schema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction

from transforms.storage.delta_log import LOG_FOLDER, logged_versions, root_of
from transforms.storage.durable import make_folders, sync_ancestors, sync_folder, write_file
from transforms.storage.stored_json import DAMAGE, parse_object, read_regular

log = logging.getLogger("millrace.storage")

# A reader of the log need not read entries before the last checkpoint.
CHECKPOINT_EVERY = 100
# An entry counts what it has, so that one that has lost actions is not taken for a smaller commit.  The first three
# are those of delta-rs.
ADDED_FILES, REMOVED_FILES, ADDED_ROWS, ACTIONS = (
    "num_added_files",
    "num_removed_files",
    "num_added_rows",
    "num_actions",
)
COUNTS = (ADDED_FILES, REMOVED_FILES, ADDED_ROWS, ACTIONS)
_KEPT = "/=:@!$&'()*+,;~"


@dataclasses.dataclass(frozen=True)
class RemovedFile:
    """A data file that a commit removes: path within the table, partition values, bytes, rows, first and last date.

    `logged` is the path as the log has it.  Other programs percent-encode other characters than `append_entry` does,
    and a file is removed only by exactly the same text.
    """

    path: str
    partition_values: Mapping[str, str | None]
    bytes: int
    rows: int
    dates: tuple[date, date] = (date.min, date.max)
    logged: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class LogEntry:
    """What one commit changes.

    Args:
        schema: the table's schema; needed for a new table, or if the commit adds columns.
        partition_by: the partition columns.
        metadata: stored with the commit.
        application: id and version of the application's transaction.
        configuration: properties of a new table.
        changes_rows: False if the added files have the rows of the removed ones.
    """

    partition_by: Sequence[str]
    metadata: Mapping[str, str]
    application: tuple[str, int]
    added: Sequence[AddAction] = ()
    removed: Sequence[RemovedFile] = ()
    schema: Schema | None = None
    configuration: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes_rows: bool = True


def append_entry(uri: str, table: DeltaTable | None, entry: LogEntry) -> int:
    """Commits `entry` as the version after that of `table` (None: as the first of a new table), and returns the
    version.

    Data files must be durable before.  The commit is durable on return.

    Raises:
        FileExistsError: another writer has committed that version.
        OSError: the log cannot be written; nothing was committed.
    """
    root, version = root_of(uri), 0 if table is None else int(table.version()) + 1
    folder = os.path.join(root, LOG_FOLDER)
    make_folders(folder)
    lines = [json.dumps(action, separators=(",", ":")) for action in _actions(table, entry)]
    write_file(os.path.join(folder, f"{version:020}.json"), ("\n".join(lines) + "\n").encode(), exclusive=True)
    if version == 0:
        sync_ancestors(folder)
    elif version % CHECKPOINT_EVERY == 0:
        with contextlib.suppress(OSError, DeltaError):  # readers are faster with a checkpoint, but do not need it
            write_checkpoint(uri, version)
    return version


def sync_log(uri: str) -> None:
    """Makes the commits in the log durable: a writer may have been killed before it flushed them."""
    if "://" not in root_of(uri):
        sync_folder(os.path.join(root_of(uri), LOG_FOLDER))


def _actions(table: DeltaTable | None, entry: LogEntry) -> Iterator[dict[str, object]]:
    now = time.time_ns() // 1_000_000
    mode = "Overwrite" if entry.removed else "Append"
    actions = 2 + (table is None) + (entry.schema is not None) + len(entry.removed) + len(entry.added)
    yield {
        "commitInfo": {
            "timestamp": now,
            "operation": "CREATE TABLE" if table is None else "WRITE" if entry.changes_rows else "OPTIMIZE",
            "operationParameters": {"mode": mode, "partitionBy": json.dumps(list(entry.partition_by))},
            "operationMetrics": {
                ADDED_FILES: len(entry.added),
                REMOVED_FILES: len(entry.removed),
                ADDED_ROWS: sum(json.loads(action.stats)["numRecords"] for action in entry.added),
                ACTIONS: actions,
            },
            **entry.metadata,
        }
    }
    if table is None:
        yield {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}}
    if entry.schema is not None:
        yield {"metaData": _metadata(table, entry, now)}
    yield {"txn": {"appId": entry.application[0], "version": entry.application[1], "lastUpdated": now}}
    for file in entry.removed:
        yield {
            "remove": {
                "path": file.logged or quote(file.path, safe=_KEPT),
                "deletionTimestamp": now,
                "dataChange": entry.changes_rows,
                "extendedFileMetadata": True,
                "partitionValues": dict(file.partition_values),
                "size": file.bytes,
            }
        }
    for action in entry.added:
        yield {
            "add": {
                "path": quote(action.path, safe=_KEPT),
                "partitionValues": dict(action.partition_values),
                "size": action.size,
                "modificationTime": now,
                "dataChange": entry.changes_rows,
                "stats": action.stats,
            }
        }


def _metadata(table: DeltaTable | None, entry: LogEntry, now: int) -> dict[str, object]:
    assert entry.schema is not None
    known = None if table is None else table.metadata()
    return {
        "id": str(uuid.uuid4()) if known is None else str(known.id),
        "name": None if known is None else known.name,
        "description": None if known is None else known.description,
        "format": {"provider": "parquet", "options": {}},
        "schemaString": entry.schema.to_json(),
        "partitionColumns": list(entry.partition_by) if known is None else known.partition_columns,
        "createdTime": now if known is None else known.created_time,
        "configuration": dict(entry.configuration) if known is None else known.configuration,
    }


def write_checkpoint(uri: str, version: int) -> None:
    """Writes a checkpoint of `version`, durable before the log names it.

    delta-rs makes it in another folder, from links to the log, because it would write the file in its place without
    flushing it.

    Raises:
        OSError, DeltaError: it cannot be made.
    """
    folder = Path(root_of(uri), LOG_FOLDER)
    with tempfile.TemporaryDirectory(prefix="millrace-") as elsewhere:
        links = Path(elsewhere, LOG_FOLDER)
        links.mkdir()
        last = newest_checkpoint(folder)
        for each in logged_versions(uri):
            if last <= each <= version:
                name = f"{each:020}.json"
                (links / name).symlink_to((folder / name).absolute())
        for path in folder.glob(f"{last:020}.checkpoint*.parquet") if last else ():
            (links / path.name).symlink_to(path.absolute())
        if last:
            shutil.copy(folder / "_last_checkpoint", links)
        DeltaTable(elsewhere, version).create_checkpoint()
        for path in sorted(links.glob(f"{version:020}.checkpoint*.parquet")):
            write_file(str(folder / path.name), path.read_bytes())
        write_file(str(folder / "_last_checkpoint"), (links / "_last_checkpoint").read_bytes())


def newest_checkpoint(folder: Path) -> int:
    """The version of the checkpoint that the log names; 0 if there is none."""
    try:
        return int(parse_object(read_regular(str(folder / "_last_checkpoint")))["version"])
    except (OSError, *DAMAGE):
        return 0
