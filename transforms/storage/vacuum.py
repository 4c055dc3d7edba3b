"""Files that a store no longer needs: files that no commit named, and files that no kept version names.

Nothing is decided from names alone.  A file is deleted only if it is older than any run may last, belongs to no run at
work, and is in no version that readers may still need: the newest, those younger than the retention, and those that a
model was trained on. All of this is known from the log, so nothing is deleted from a table whose log is lost or
damaged.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from schemas.errors import StoreError
from transforms.storage.delta_log import LOG_FOLDER, commit_at, commits, file_actions, logged_versions, merged_files
from transforms.storage.delta_tables import open_table, paths_of, table_root
from transforms.storage.file_systems import FileSystems
from transforms.storage.log_check import DATA_FILE, entry_problem, incomplete
from transforms.storage.log_entries import ADDED_FILES
from transforms.storage.paths import MANIFEST, table_path_in_store, tables_below
from transforms.storage.run_markers import MARKER, RunMarker
from transforms.storage.stored_json import DAMAGE, explain_damage, parse_object, read_regular

MANIFESTS, STATISTICS, SUMMARIES = "_manifests", "_statistics", "_summaries"
# What Millrace or delta-rs writes aside before a rename.
TEMPORARY_FILE = re.compile(r"\..+\.\d+-\d+(-journal)?|.+\.json\.part")
TEMPORARY_LOG_FILE = re.compile(r".*(\.tmp|#\d+)")
EXAMPLE_FILE = re.compile(r"(train|validate|test)-\d+-of-\d+\.(parquet|tfrecord\.gz)")
# A run that trained a model has left at least one of these.
LEFT = (("model", MANIFEST), ("run.json",))


@dataclasses.dataclass(frozen=True)
class StoredFile:
    """A file of a store."""

    path: str
    bytes: int
    changed: datetime


@dataclasses.dataclass(frozen=True)
class Waste:
    """A file that may be deleted, and why: `orphan`, `expired`, `aside` (half-written), `manifest`, `statistics`,
    `summary`, or `mark` (the marker of a run that was killed)."""

    file: StoredFile
    table: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Pin:
    """A version of a feature table that must stay readable, and for whom.  `table`: its path within the store."""

    table: str
    version: int
    reason: str


@dataclasses.dataclass(frozen=True)
class VacuumRules:
    """What is kept: files younger than `orphans` and versions younger than `retention`, both counted back from `now`.

    Args:
        at_work: runs that may still be writing.
        unfinished: these runs, and runs that were killed.
    """

    now: datetime
    orphans: timedelta
    retention: timedelta
    pins: tuple[Pin, ...] = ()
    at_work: tuple[RunMarker, ...] = ()
    unfinished: tuple[RunMarker, ...] = ()

    def owner(self, path: str) -> RunMarker | None:
        """The run at work to which the file may belong: file names begin with the id of their run."""
        return _owner(path, self.at_work)


def _owner(path: str, runs: Iterable[RunMarker]) -> RunMarker | None:
    name = path.rsplit("/", 1)[-1].removeprefix(".")
    return next((run for run in runs if name.startswith((f"{run.run_id}-", f"{run.run_id}."))), None)


def at_work(every: Iterable[RunMarker], now: datetime, longest: timedelta) -> tuple[RunMarker, ...]:
    """Runs that may still be writing: started within `longest`, or launched by a process that still exists."""
    return tuple(each for each in every if now - each.started < longest or each.launcher_lives)


def files_below(folder: str) -> Iterator[StoredFile]:
    """Every file below `folder`, hidden ones too."""
    if "://" in folder:
        for each in FileSystems.match([f"{folder}/**"])[0].metadata_list:
            yield StoredFile(each.path, each.size_in_bytes, datetime.fromtimestamp(each.last_updated_in_seconds, UTC))
        return
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            try:
                status = os.lstat(path)
            except FileNotFoundError:  # renamed or removed by its writer meanwhile
                continue
            yield StoredFile(path, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def waste_of(store: str, table: str, rules: VacuumRules) -> list[Waste]:
    """Files of one table that may be deleted.

    Raises:
        StoreError: the log is lost, or the log or a version that must stay cannot be read; then it is unknown which
            files are needed.
    """
    uri = FileSystems.join(store, *table.split("/"))
    # Files are listed before the log is read: a file that is committed in between is too young to be listed as waste.
    listed = sorted((each for each in files_below(uri) if rules.owner(each.path) is None), key=lambda file: file.path)
    if open_table(uri) is None:
        require_unfinished(uri, listed, rules)
        return []
    unproven = runs_without_counts(uri)
    kept = _retained(uri, table, rules)
    needed, once = _paths(uri, kept)
    theirs = table.startswith("sources/")
    merged = set[str]().union(*(merged_files(uri, version) for version in logged_versions(uri) if theirs))
    manifests, runs = _named(uri, kept)
    summaries = _summaries(uri, manifests)
    newest = max(logged_versions(uri), default=0)
    reported = functools.cache(lambda run: _reported_later(store, run, newest))
    found = []
    for file in listed:
        inside = file.path[len(uri) + 1 :]
        folder, name = inside.split("/")[0], inside.split("/")[-1]
        age = rules.now - file.changed
        if folder == LOG_FOLDER:
            kind = "aside" if TEMPORARY_LOG_FILE.fullmatch(name) or TEMPORARY_FILE.fullmatch(name) else None
        elif TEMPORARY_FILE.fullmatch(name):
            kind = "aside"
        elif folder == MANIFESTS:
            kind = "manifest" if name not in manifests else None
        elif folder == SUMMARIES:
            kind = "summary" if name not in summaries else None
        elif folder == STATISTICS:
            kind = "statistics" if name.rsplit(".", 1)[0] not in runs else None
        elif not name.endswith(".parquet") or inside in needed:
            kind = None
        elif inside in once:
            # The owner of a source may want its removed rows back, so its files stay, except merged ones, whose rows
            # are in other files.
            kind = "expired" if inside in merged or not theirs else None
        else:
            run = name.rsplit("-", 1)[0]
            kind = "orphan" if DATA_FILE.fullmatch(name) and run not in unproven and not reported(run) else None
        if kind == "aside" and rules.at_work:
            kind = None  # its name does not show which run wrote it
        if kind is not None and age >= rules.orphans:
            found.append(Waste(file, table, kind))
    return found


def require_unfinished(uri: str, files: Iterable[StoredFile], rules: VacuumRules) -> None:
    """Checks that a table without a log has none because its first run has not committed yet.

    Raises:
        StoreError: the table has data files of other runs, so its log is lost.
    """
    others = [each for each in _data_files(files) if _owner(each.path, rules.unfinished) is None]
    if others:
        raise StoreError(
            "Files are removed from a table only where its log can be read",
            f"{uri} has no log and {len(others):,} data files, as {others[0].path}",
            f"Restore {LOG_FOLDER} from a backup; if no run ever committed to this table, delete its folder. "
            "Nothing was removed",
        )


def runs_without_counts(uri: str) -> set[str]:
    """Checks that each entry of the log is complete, and returns the runs for which this cannot be known.

    An entry that lost its last lines reads as a smaller commit.  Entries of Millrace count their files; for those that
    delta-rs wrote, a file of the entry's run may be one that it lost.

    Raises:
        StoreError: an entry is missing or truncated.
    """
    runs = set()
    every = logged_versions(uri)
    gaps = [high - 1 for low, high in itertools.pairwise(every) if high != low + 1]
    for version in gaps[:1]:
        raise incomplete(uri, version, "the entry is missing")
    folder = FileSystems.join(uri, LOG_FOLDER)
    for version in every:
        info = commit_at(uri, version)
        if "timestamp" not in info:
            raise incomplete(uri, version, "the entry has no metadata of its commit")
        if "://" not in folder and (problem := entry_problem(folder, version)):
            raise incomplete(uri, version, problem)
        counts = info.get("operationMetrics")
        if not isinstance(counts, dict) or ADDED_FILES not in counts:
            runs.add(str(info.get("run_id")))
    return runs


def _reported_later(store: str, run: str, newest: int) -> bool:
    """Whether the run recorded a commit that the log does not have any more."""
    try:
        version = parse_object(read_regular(FileSystems.join(store, "runs", run, "run.json"))).get("commit_version")
    except (OSError, *DAMAGE):
        return False
    return isinstance(version, int) and version > newest


def _data_files(files: Iterable[StoredFile]) -> Iterator[StoredFile]:
    """The files of a table that hold rows."""
    for each in files:
        *folders, name = each.path.split("/")
        if DATA_FILE.fullmatch(name) and not {LOG_FOLDER, MANIFESTS, STATISTICS, SUMMARIES} & set(folders[-2:]):
            yield each


def _of_first_runs(store: str, rules: VacuumRules) -> set[str]:
    """Runs that were killed and whose files stay because their table has no commit yet."""
    uris = [FileSystems.join(store, *name.split("/")) for name in tables_below(store)]
    owners = (
        _owner(each.path, rules.unfinished) for uri in uris if not logged_versions(uri) for each in files_below(uri)
    )
    return {owner.run_id for owner in owners if owner is not None}


def waste_of_runs(store: str, rules: VacuumRules) -> list[Waste]:
    """Half-written files of runs, examples and the registry, markers of runs that were killed, and examples of runs
    that left no model."""
    found = []
    ended: dict[str, bool] = {}
    first = _of_first_runs(store, rules) if rules.unfinished else set()
    for position in ("runs", "examples", "registry"):
        for file in files_below(FileSystems.join(store, position)):
            name = file.path.rsplit("/", 1)[-1]
            kind = "aside" if TEMPORARY_FILE.fullmatch(name) else None
            if name == MARKER and position == "runs" and file.path.rsplit("/", 2)[-2] not in first:
                kind = "mark"
            if position == "examples" and EXAMPLE_FILE.fullmatch(name):
                run = file.path.rsplit("/", 2)[-2]
                if run not in ended:
                    ended[run] = any(FileSystems.exists(FileSystems.join(store, "runs", run, *path)) for path in LEFT)
                kind = None if ended[run] else "orphan"  # if the run is repeated, it makes them again
            busy = any(f"/{each.run_id}/" in file.path for each in rules.at_work)
            if kind is not None and rules.now - file.changed >= rules.orphans and not busy:
                found.append(Waste(file, position, kind))
    return found


@dataclasses.dataclass(frozen=True)
class _Retained:
    """Versions that stay readable: `young` ones, beginning with the newest at the start of the retention, and older
    `pinned` ones."""

    young: tuple[int, ...]
    pinned: tuple[int, ...]


def _retained(uri: str, table: str, rules: VacuumRules) -> _Retained:
    every = logged_versions(uri)
    young: list[int] = []
    for version in reversed(every):
        young.insert(0, version)
        made = commit_at(uri, version).get("timestamp")
        if made is not None and rules.now - datetime.fromtimestamp(made / 1000, UTC) >= rules.retention:
            break
    # A pin of a version above the newest belongs to an earlier table at this place: its files are gone.
    pinned = {pin.version for pin in rules.pins if pin.table == table and every and pin.version <= every[-1]}
    return _Retained(tuple(young), tuple(sorted(pinned - set(young))))


def _paths(uri: str, kept: _Retained) -> tuple[set[str], set[str]]:
    """(Paths that some kept version names, paths that any commit named), within the table."""
    needed = _paths_at(uri, None)
    if needed is None:
        return set(), set()
    for version in (*kept.young[:1], *kept.pinned):
        needed |= _paths_at(uri, version) or set()
    once = set(needed)
    for version in logged_versions(uri):
        added, removed = file_actions(uri, version)
        once |= added | removed
        needed |= added if version in kept.young else set()
    return needed, once


def _paths_at(uri: str, version: int | None) -> set[str] | None:
    opened = open_table(uri, version)
    if opened is None and version is not None:
        raise StoreError(
            "A version that must stay can be read",
            f"version {version} of {uri}",
            "Restore its log; nothing was removed",
        )
    return None if opened is None else {path[len(table_root(opened)) + 1 :] for path in paths_of(opened)}


def _named(uri: str, kept: _Retained) -> tuple[set[str], set[str]]:
    """(Manifests that kept versions need, runs that committed).  The manifest of a version is the last one that was
    named up to it."""
    manifests: set[str] = set()
    runs: set[str] = set()
    without = {*kept.young, *kept.pinned}
    for entry in commits(uri):
        runs.add(str(entry.get("run_id")))
        served = {version for version in without if version >= entry["version"]} if entry.get("manifest") else set()
        if served:
            manifests.add(str(entry["manifest"]))
            without -= served
    return manifests, runs


def _summaries(uri: str, manifests: Iterable[str]) -> set[str]:
    """Summaries of all history that a kept manifest names for later runs."""
    named: set[str] = set()
    for name in manifests:
        path = FileSystems.join(uri, MANIFESTS, name)
        if "://" not in path and not os.path.lexists(path):
            continue  # it was removed, so no run needs the files that it named
        with explain_damage("A feature table's manifest can be read", path, "Restore it, or recompute with --full"):
            snapshots = parse_object(read_regular(path)).get("snapshots", {})
            named |= {str(file) for files, _ in snapshots.values() for file in files}
    return named


def remove_waste(waste: Iterable[Waste]) -> tuple[int, int]:
    """Deletes the files, and returns how many and how many bytes.  A file that is already gone counts as removed.

    Raises:
        StoreError: a file cannot be deleted.
    """
    count = size = 0
    for each in waste:
        try:
            if "://" in each.file.path:
                FileSystems.delete([each.file.path])
            else:
                os.remove(each.file.path)
        except FileNotFoundError:
            pass
        except Exception as error:  # Beam's file systems raise errors of many types
            raise StoreError(
                "The store can be written",
                f"{each.file.path}: {error}",
                f"{count} files were removed; grant access, then run the same command again",
            ) from None
        count, size = count + 1, size + each.file.bytes
    return count, size


def pins_of(models: Mapping[str, Mapping[str, object]]) -> tuple[Pin, ...]:
    """What must stay for `models`, whose manifests they are by name and version ("buying 3")."""
    return tuple(
        Pin(table_path_in_store(str(table["uri"])), int(str(table["version"])), name)
        for name, manifest in models.items()
        for table in tables_of(manifest)
        if "uri" in table and "version" in table
    )


def tables_of(manifest: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The feature tables that a model was trained on, as its manifest records them; none if it does not say."""
    found = manifest.get("views") or [manifest.get("feature_table")]
    return [each for each in found if each and isinstance(each, Mapping)] if isinstance(found, Sequence) else []
