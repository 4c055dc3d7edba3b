"""The commits of a Delta table, read from its log.

`DeltaTable.history` counts downwards from the handle's own version, even if newer commits exist: on a handle of an
older version, every number is wrong.  So the log is read here, commit by commit, newest first.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date
from typing import Any
from urllib.parse import unquote

from deltalake import DeltaTable
from deltalake.transaction import AddAction

from schemas.errors import ConflictError, StoreError
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import read_regular

LOG_FOLDER = "_delta_log"
# An action of the log, such as the metadata of a commit: keys of the protocol, and ours.
CommitInfo = dict[str, Any]


def root_of(uri: str) -> str:
    """A table's address in the form that Beam's file systems take; delta-rs percent-encodes the path of a folder."""
    uri = uri.rstrip("/")
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def path_within(root: str, logged: str) -> str:
    """A data file's path within its table, from the path that the log has for it, which is percent-encoded.

    Raises:
        StoreError: the path leaves the table.  Otherwise, a crafted log could make Millrace read any file of the
            machine, and make `vacuum` delete it.
    """
    path = unquote(logged)
    parts = re.split(r"[/\\]", path)
    elsewhere = path.startswith(("/", "\\")) or re.match(r"[A-Za-z][\w+.-]*:[/\\]", path)
    if not path or elsewhere or ".." in parts or "\0" in path:
        raise StoreError(
            "The files of a Delta table lie in its folder",
            f"{logged!r} in the log of {root}",
            "Write the table again with its files below it; shallow clones, whose files lie elsewhere, are not read",
        )
    return path


def logged_versions(uri: str) -> list[int]:
    """Versions whose commits are still in the log, oldest first.

    Raises:
        StoreError: the log cannot be listed.
    """
    folder = FileSystems.join(root_of(uri), LOG_FOLDER)
    if "://" not in folder:
        try:
            names = os.listdir(folder)
        except (FileNotFoundError, NotADirectoryError):
            names = []
        except OSError as error:
            raise StoreError(
                "A table's log can be read", f"{folder}: {error.strerror}", "Grant access, then try again"
            ) from None
    else:
        names = [each.path.rsplit("/", 1)[-1] for each in FileSystems.match([f"{folder}/*.json"])[0].metadata_list]
    return sorted(
        int(name[:20]) for name in names if len(name) == 25 and name.endswith(".json") and name[:20].isdigit()
    )


def commits(uri: str, version: int | None = None) -> Iterator[CommitInfo]:
    """The metadata of each commit up to `version` (None: the newest), with its `version`; newest first.

    Raises:
        StoreError: the log cannot be read.
    """
    for each in reversed(logged_versions(uri)):
        if version is None or each <= version:
            yield commit_at(uri, each)


def commit_at(uri: str, version: int) -> CommitInfo:
    """The metadata of the commit."""
    info = next(_actions(uri, version, "commitInfo"), {})
    return {**info, "version": version}


def version_of_run(uri: str, run_id: str, version: int) -> int:
    """The version that the run committed, among the last 200 up to `version`; `version` itself if it is not among
    them."""
    last = itertools.islice(commits(uri, version), 200)
    return next((int(each["version"]) for each in last if each.get("run_id") == run_id), version)


def commits_since(uri: str, run_id: str, base: int | None, version: int) -> int | None:
    """The version that the run committed after `base` and up to `version`; None if it committed none."""
    last = itertools.takewhile(lambda each: base is None or each["version"] > base, commits(uri, version))
    return next((int(each["version"]) for each in last if each.get("run_id") == run_id), None)


def metadata_of(table: DeltaTable, name: str) -> str | None:
    """The value last committed under `name` in a commit's metadata, as of the handle's version."""
    found = (entry[name] for entry in commits(table.table_uri, table.version()) if entry.get(name) is not None)
    return next(map(str, found), None)


def remaining(
    uri: str, actions: Sequence[AddAction], dates: tuple[date, ...] | None, now: Mapping[str, date]
) -> tuple[list[AddAction], tuple[date, ...] | None]:
    """The part of a commit of `actions` over `dates` that remains to be done; `now` are the table's files of these
    dates.

    A file's name contains its run and a digest of its content, so an earlier launch of the same run may have committed
    some of these files.  Dates that are complete are left alone.  If only some files of a date are there, they are
    added as copies, since a commit cannot replace a file by itself.
    """
    if not any(action.path in now for action in actions):
        return list(actions), dates
    wanted, held = (_by_date(each) for each in ({action.path: _date_of(action) for action in actions}, now))
    rest = tuple(sorted(day for day in {*wanted, *held} if wanted.get(day) != held.get(day)))
    todo = [action for action in actions if _date_of(action) in rest]
    return [_copied(uri, action) if action.path in now else action for action in todo], rest


def _date_of(action: AddAction) -> date:
    return date.fromisoformat(str(action.partition_values["date"]))


def _by_date(paths: Mapping[str, date]) -> dict[date, set[str]]:
    days: dict[date, set[str]] = {}
    for path, day in paths.items():
        days.setdefault(day, set()).add(path)
    return days


def _copied(uri: str, action: AddAction) -> AddAction:
    path = f"{action.path.rsplit('-', 1)[0]}-{uuid.uuid4().hex[:16]}.parquet"
    FileSystems.copy([FileSystems.join(root_of(uri), action.path)], [FileSystems.join(root_of(uri), path)])
    return dataclasses.replace(action, path=path)


def conflict(
    uri: str, base: int | None, version: int, gone: Iterable[tuple[str, date]], new: Iterable[tuple[str, date]]
) -> ConflictError:
    """The error for a run whose dates other runs have changed since `base`. `gone` and `new` are pairs (file, date);
    the name of a file contains its run."""
    gone, new = list(gone), list(new)
    names = {path.rsplit("/", 1)[-1].rsplit("-", 1)[0] for path, _ in new}
    names = names or {str(each.get("run_id")) for each in commits(uri, version) if each["version"] > (base or 0)}
    days = {day.isoformat() for _, day in (*gone, *new)}
    since = "there was no table" if base is None else f"version {base}"
    return ConflictError(
        f"Nobody else changes the dates of a run while it works on {uri}",
        f"{_some(sorted(days))} changed since {since}; it has version {version} now, written by run "
        f"{_some(sorted(names))}",
        "Another run won: run the same command again to build on its result",
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def file_actions(uri: str, version: int) -> tuple[set[str], set[str]]:
    """(Paths that the commit added, paths that it removed), relative to the table."""
    root = root_of(uri)
    added, removed = (
        {path_within(root, each["path"]) for each in _actions(uri, version, kind)} for kind in ("add", "remove")
    )
    return added, removed


# In a commit's metadata: it only merged files, and Millrace did it.
COMPACTION = "compaction"


def merged_files(uri: str, version: int) -> set[str]:
    """Paths, relative to the table, of the files that the commit merged into others; none if it is not a compaction."""
    if COMPACTION not in commit_at(uri, version):
        return set()
    return file_actions(uri, version)[1]


def _actions(uri: str, version: int, kind: str) -> Iterator[CommitInfo]:
    path = FileSystems.join(root_of(uri), LOG_FOLDER, f"{version:020}.json")
    try:
        text = read_regular(path).decode()
        # Each line is an object with one member.
        yield from (json.loads(line)[kind] for line in text.splitlines() if line.startswith(f'{{"{kind}":'))
    except (OSError, ValueError) as error:
        raise StoreError("A table's log can be read", f"{path}: {error}", "Restore the file") from None
