"""A Delta table's commits as its log tells them.

`DeltaTable.history` numbers commits from the handle's own version downwards, whatever came since: on a handle of an older
version every number is wrong.  So the log is read here, commit by commit, newest first.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from apache_beam.io.filesystems import FileSystems

from schemas.errors import StoreError

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
