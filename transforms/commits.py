"""A Delta table's commits as its log tells them.

`DeltaTable.history` numbers commits from the handle's own version downwards, whatever came since: on a handle of an older
version every number is wrong.  So the log is read here, commit by commit, newest first.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from apache_beam.io.filesystems import FileSystems

from schemas.errors import ConflictError, StoreError

LOG = "_delta_log"


def root_of(uri: str) -> str:
    """A table's address as Beam's file systems take it; delta-rs writes a folder's as URIs are, with %20 for a space."""
    uri = uri.rstrip("/")
    return unquote(uri.removeprefix("file://")) if uri.startswith("file://") else uri


def versions(uri: str) -> list[int]:
    """Versions whose commits are still in the log, oldest first."""
    folder = FileSystems.join(root_of(uri), LOG)
    if "://" not in folder:
        names = os.listdir(folder) if os.path.isdir(folder) else []
    else:
        names = [each.path.rsplit("/", 1)[-1] for each in FileSystems.match([f"{folder}/*.json"])[0].metadata_list]
    return sorted(
        int(name[:20]) for name in names if len(name) == 25 and name.endswith(".json") and name[:20].isdigit()
    )


def commits(uri: str, version: int | None = None) -> Iterator[dict[str, Any]]:
    """What each commit up to `version` (None: the newest) says of itself, with its `version`; newest first.

    Raises:
        StoreError: the log cannot be read.
    """
    for each in reversed(versions(uri)):
        if version is None or each <= version:
            yield commit_at(uri, each)


def commit_at(uri: str, version: int) -> dict[str, Any]:
    """What the commit says of itself."""
    info = next(_actions(uri, version, "commitInfo"), {})
    return {**info, "version": version}


def version_of_run(uri: str, run_id: str, version: int) -> int:
    """The version that the run made, as of `version`; that one itself where it is not among the last 200."""
    last = itertools.islice(commits(uri, version), 200)
    return next((int(each["version"]) for each in last if each.get("run_id") == run_id), version)


def conflict(uri: str, run_id: str, base: int | None, version: int, changed: set[str]) -> ConflictError:
    """The refusal of a run whose dates others changed since `base`: files `changed`, whose names tell dates and runs."""
    names = {path.rsplit("/", 1)[-1].rsplit("-", 1)[0] for path in changed}
    days = {part.removeprefix("date=") for path in changed for part in path.split("/") if part.startswith("date=")}
    since = "there was no table" if base is None else f"version {base}"
    return ConflictError(
        f"Nobody else changes the dates of a run while it works on {uri}",
        f"{_some(sorted(days))} changed since {since}; it has version {version} now, files of run {_some(sorted(names - {run_id}))}",
        "Another run won: run the same command again to build on its result",
    )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def file_actions(uri: str, version: int) -> tuple[set[str], set[str]]:
    """(Paths that the commit added, paths that it removed), relative to the table."""
    added, removed = ({unquote(each["path"]) for each in _actions(uri, version, kind)} for kind in ("add", "remove"))
    return added, removed


def _actions(uri: str, version: int, kind: str) -> Iterator[dict[str, Any]]:
    path = FileSystems.join(root_of(uri), LOG, f"{version:020}.json")
    try:
        if "://" not in path:
            with open(path, encoding="utf-8") as file:
                text = file.read()
        else:
            with FileSystems.open(path, "application/octet-stream") as file:
                text = file.read().decode()
        # A line is an object of one member.
        yield from (json.loads(line)[kind] for line in text.splitlines() if line.startswith(f'{{"{kind}":'))
    except (OSError, ValueError) as error:
        raise StoreError("A table's log can be read", f"{path}: {error}", "Restore the file") from None
