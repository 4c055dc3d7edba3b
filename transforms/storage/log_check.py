"""Entries of a table's log that have lost actions.

delta-rs reads what an entry holds: one that lost a line, or all of them, is a smaller commit to it.  But an entry of
Millrace counts its actions, files and rows; entries that delta-rs writes count their files too.  What
these do not show: an entry whose counts were changed together with its files, entries that are missing at the end of
the log (`lost_commit`), what a checkpoint holds, and other programs' entries without counts.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from schemas.errors import IncompleteLogError
from transforms.storage.delta_log import LOG_FOLDER, root_of
from transforms.storage.log_entries import ACTIONS, ADDED_FILES, ADDED_ROWS, REMOVED_FILES, newest_checkpoint
from transforms.storage.stored_json import DAMAGE, parse_object, read_regular, reason_of

# Data files as Millrace names them: `<run>-<digest>.parquet`.
DATA_FILE = re.compile(r"[\w-]+-[0-9a-f]{16}\.parquet")
_KIND = re.compile(r'\s*\{\s*"(\w+)"\s*:')
_PATH = re.compile(r'"path"\s*:\s*"([^"]*)"')
_ROWS = re.compile(r'\\"numRecords\\"\s*:\s*(\d+)')
# Entries that are remembered as whole, by path, time of change and size.
_ENTRIES = 20_000


def require_whole_entries(uri: str, version: int) -> None:
    """Checks the entries of a log on a local disk of which the table is made as of `version`: those behind the last
    checkpoint.

    Raises:
        IncompleteLogError: an entry has lost something.
    """
    if "://" in root_of(uri):
        return  # an object is written whole or not at all
    folder = os.path.join(root_of(uri), LOG_FOLDER)
    first = newest_checkpoint(Path(folder))
    if not 0 < first <= version:  # no hint, or an older version
        first = max((each for each in _checkpoints(folder) if each <= version), default=-1)
    ours = _is_of_millrace(folder)
    for each in range(first + 1, version + 1):
        if problem := entry_problem(folder, each, ours):
            raise incomplete(uri, each, problem)


def incomplete(uri: str, version: int, problem: str) -> IncompleteLogError:
    """The refusal of a log."""
    return IncompleteLogError(
        "A table's log is as it was written",
        f"version {version} of {uri}: {problem}",
        f"Restore {LOG_FOLDER} from a backup; nothing was changed or removed",
    )


def entry_problem(folder: str, version: int, ours: bool = False) -> str | None:
    """What an entry has lost; None: nothing, as far as it shows.

    Args:
        folder: of the log.
        ours: whether Millrace made the table, so that each entry has the metadata of its commit.
    """
    path = os.path.join(folder, f"{version:020}.json")
    try:
        status = os.stat(path)
        found, metadata = _problem(path, status.st_mtime_ns, status.st_size)
    except OSError as error:
        return f"the entry cannot be read: {error.strerror or error}"
    return found or (None if metadata or not ours else "the entry has no metadata of its commit")


@functools.lru_cache(_ENTRIES)
def _problem(path: str, _changed: int, _bytes: int) -> tuple[str | None, bool]:
    """What the entry has lost, and whether it has metadata of its commit."""
    try:
        lines = [line for line in read_regular(path).decode().splitlines() if line.strip()]
        kinds = [match[1] if (match := _KIND.match(line)) else "" for line in lines]
        infos = [
            parse_object(line)["commitInfo"] for line, kind in zip(lines, kinds, strict=True) if kind == "commitInfo"
        ]
        info = infos[0] if infos else {}
        return _lost(list(zip(kinds, lines, strict=True)), info), "timestamp" in info
    except OSError:
        raise
    except DAMAGE as error:
        return f"the entry cannot be read: {reason_of(error)}", False


def _lost(lines: list[tuple[str, str]], info: Mapping[str, object]) -> str | None:
    if not any(kind for kind, _ in lines):
        return "the entry is empty"
    added, removed = (sum(kind == each for kind, _ in lines) for each in ("add", "remove"))
    if "timestamp" not in info and any(DATA_FILE.fullmatch(name) for name in _added_names(lines)):
        return "the entry has no metadata of its commit"
    counts = info.get("operationMetrics")
    if not isinstance(counts, dict):
        return None
    for name, what, number in ((ADDED_FILES, "added", added), (REMOVED_FILES, "removed", removed)):
        if name in counts and int(counts[name]) != number:
            return f"it has {number} of {counts[name]} {what} files"
    if ADDED_ROWS in counts and (rows := [_ROWS.search(line) for kind, line in lines if kind == "add"]):
        known = [int(match[1]) for match in rows if match]
        if len(known) < len(rows) and "run_id" in info:  # other programs need not count the rows of a file
            return f"{len(rows) - len(known)} added files have no number of rows"
        if len(known) == len(rows) and sum(known) != int(counts[ADDED_ROWS]):
            return f"its added files have {sum(known)} of {counts[ADDED_ROWS]} rows"
    if ACTIONS in counts and int(counts[ACTIONS]) != len(lines):
        return f"it has {len(lines)} of {counts[ACTIONS]} actions"
    if "run_id" in info and ADDED_FILES in counts and sum(kind == "txn" for kind, _ in lines) != 1:
        return "it has lost the transaction of its run"
    return None


def _added_names(lines: list[tuple[str, str]]) -> Iterator[str]:
    for kind, line in lines:
        if kind == "add" and (match := _PATH.search(line)):
            yield match[1].rsplit("/", 1)[-1]


def _checkpoints(folder: str) -> list[int]:
    names = os.listdir(folder)
    return [int(name[:20]) for name in names if name[:20].isdigit() and name[20:].startswith(".checkpoint.")]


def _is_of_millrace(folder: str) -> bool:
    """Whether Millrace made the table: its first commit names a run."""
    path = os.path.join(folder, f"{0:020}.json")
    try:
        status = os.stat(path)
        return _names_run(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return False


@functools.lru_cache(_ENTRIES)
def _names_run(path: str, _changed: int, _bytes: int) -> bool:
    try:
        for line in read_regular(path).decode().splitlines():
            if (match := _KIND.match(line)) and match[1] == "commitInfo":
                return "run_id" in json.loads(line)["commitInfo"]
    except DAMAGE:
        pass
    return False
