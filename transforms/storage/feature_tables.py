"""Feature tables of a view: the one with the definition's fingerprint is read; an error names those with other
fingerprints."""

from __future__ import annotations

import os

from deltalake import DeltaTable

from schemas.errors import MillraceError, MismatchError, StoreError
from transforms.storage.delta_log import LOG_FOLDER, root_of
from transforms.storage.delta_tables import open_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import table_path_in_store
from transforms.storage.stored_json import DAMAGE, parse_object, read_regular


def open_feature_table(
    uri: str,
    command: str,
    version: int | None = None,
    missing: type[MillraceError] = StoreError,
    mismatch: type[MillraceError] = MismatchError,
) -> DeltaTable:
    """The feature table at `uri`, whose last two folders are the view's name and its fingerprint.

    Args:
        uri: the table (see `paths.features_uri` and `paths.features_live_uri`).
        command: the command that computes the features, for the message.
        version: the table's version; None: the newest.
        missing: the error if the view has no feature table.
        mismatch: the error if the view has feature tables of other fingerprints only.

    Raises:
        MillraceError: there is no table at `uri`, or no such version of it.
        StoreError: its newest commits are missing.
    """
    table = open_table(uri, version)
    if table is not None:
        if version is None and (lost := lost_commit(uri, int(table.version()))):
            raise StoreError(
                "The log of a feature table has the commit of the last run of features",
                f"{lost}; its newest in {uri} is version {table.version()}",
                f"Restore {LOG_FOLDER} from a backup, or compute what is missing with: {command}",
            )
        return table
    root, fingerprint = FileSystems.split(uri)
    if others := fingerprints_in(root):
        raise mismatch(
            f"Features are read under the definition's own fingerprint, {fingerprint}",
            f"{', '.join(others)} in {root}",
            f"Run: {command}",
        )
    view = FileSystems.split(root)[1]
    raise missing(f"View {view!r} has a feature table", f"none at {uri}", f"Run: {command}")


def lost_commit(uri: str, newest: int | None) -> str | None:
    """The last commit that a run of features reported, if the log does not have it any more; None if it has.

    A log that has lost its newest entries is that of an older version: nothing in it shows that they were there.  But a
    run leaves its version in `run.json`.

    Args:
        uri: the feature table.
        newest: the newest version in its log; None: there is no table.
    """
    root = root_of(uri)
    if "://" in root:
        return None
    runs = os.path.join(os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(root)))), "runs")
    last: tuple[int, str, int] | None = None
    for run in os.listdir(runs) if os.path.isdir(runs) else ():
        path = os.path.join(runs, run, "run.json")
        try:
            changed, figures = os.stat(path).st_mtime_ns, parse_object(read_regular(path))
        except (OSError, *DAMAGE):
            continue
        version, table = figures.get("commit_version"), figures.get("table")
        if figures.get("pipeline") != "features" or not isinstance(version, int) or not isinstance(table, str):
            continue
        if table_path_in_store(table) == table_path_in_store(root) and (last is None or changed > last[0]):
            last = changed, run, version
    if last is None or (newest is not None and last[2] <= newest):
        return None
    return f"run {last[1]} committed version {last[2]}"


def fingerprints_in(root: str) -> list[str]:
    """The fingerprints of the tables in `root`, the folder of a view, sorted."""
    (match,) = FileSystems.match([FileSystems.join(root, "*", "_delta_log", "*.json")])
    return sorted({each.path.replace("\\", "/").split("/")[-3] for each in match.metadata_list})
