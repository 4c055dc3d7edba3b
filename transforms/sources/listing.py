"""The entries under a source's folder: each is read, is skipped and named in a warning, or is refused.

Names that begin with `.` or `_` are passed over, as Spark, Hive and Arrow do: writers keep markers and unfinished files
under such names.  Everything else has to be a folder or a file of rows: Parquet, CSV or JSON lines, by its name.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from schemas.errors import ContractError, DataError
from transforms.records.pickled_once import PickledOnce
from transforms.sources.formats import NAMED, SUFFIXES, format_of
from transforms.storage.file_systems import FileSystems

log = logging.getLogger("millrace")
LOG = "_delta_log"
# What engines leave beside the data, and what holds no rows.
_MARKERS = ("_SUCCESS", "_metadata", "_common_metadata", "_started_", "_committed_", ".DS_Store")
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
_NAMED = 5
_RULE = "Every entry of a source is a folder or a Parquet file, a CSV file or JSON lines"
_FIX = "Move it away, or let its name begin with _; name it .parquet if it is Parquet, .csv or .jsonl if it is text"


@dataclasses.dataclass(frozen=True)
class Listing(PickledOnce):
    """The files of a source that is a folder, as they were at one moment.

    Args:
        source: its name.
        folder: its address.
        files: path → (bytes, time of the last change; in ns since 1970 on a local disk).
        passed_over: entries that are not read, because their names begin with `.` or `_`; markers are left out.
        named: whether the source names its path, which then may be that of a file.
    """

    source: str
    folder: str
    files: Mapping[str, tuple[int, float]]
    passed_over: tuple[str, ...] = ()
    named: bool = False

    def check_unchanged(self) -> tuple[str, ...]:
        """Lists the folder again; returns the files that were added since, sorted.

        Raises:
            DataError: a file was removed or replaced: the rows that were read may be a mixture of old and new ones.
        """
        now = list_files(self.source, self.folder, self.named).files
        gone = sorted(self.files.keys() - now.keys())
        replaced = sorted(path for path, state in self.files.items() if now.get(path, state) != state)
        if gone or replaced:
            parts = ((gone, "gone"), (replaced, "replaced"))
            raise DataError(
                f"Source {self.source!r}: its files must not change while a run reads them",
                "; ".join(f"{first_few(paths)} {what} since the run began" for paths, what in parts if paths),
                "Run the same command again; write new files aside and rename them",
            )
        return tuple(sorted(now.keys() - self.files.keys()))


Passed = TypeVar("Passed")


def require_unchanged(passed: Passed, listings: Sequence[Listing]) -> Passed:
    """Returns `passed` if every source still has the files that a run listed when it began; logs those that were added.

    Raises:
        DataError: see `Listing.check_unchanged`.
    """
    for listing in listings:
        if added := listing.check_unchanged():
            log.warning(
                "source %s: not read, since they were added after the run began: %s; the next run reads them",
                listing.source,
                first_few(added),
            )
    return passed


def first_few(paths: Iterable[str], most: int = _NAMED) -> str:
    """The first few of some names, and how many more there are."""
    names = list(paths)
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def list_files(source: str, folder: str, named: bool = False) -> Listing:
    """The files under `folder`, linked folders included, and `<folder>.parquet`, `<folder>.csv` and so on.

    Args:
        source: the source's name.
        folder: its address.
        named: whether the source names its path, which then may be that of a file.

    Raises:
        DataError: a folder cannot be looked into, or disappears meanwhile.
        ContractError: an entry is neither a folder nor a file of rows, or is there twice by way of a link.
    """
    listing = _list_remote(source, folder, named) if "://" in folder else _Walk(source).listing(folder, named)
    if listing.passed_over:
        _name_passed_over(source, listing.passed_over)
    return listing


@functools.lru_cache(1024)
def _name_passed_over(source: str, names: tuple[str, ...]) -> None:
    """Logs the skipped entries once, however often the source is listed."""
    log.warning("source %s: passed over, since their names begin with . or _: %s", source, first_few(names))


def is_hidden(name: str) -> bool:
    """Whether an entry is skipped. `_year=2024` is the folder of a partition, as in Spark."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _worth_naming(name: str) -> bool:
    return not name.startswith(_MARKERS) and not name.endswith(".crc")


class _Walk:
    """One walk through a local folder; links are followed."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.files: dict[str, tuple[int, float]] = {}
        self.passed_over: list[str] = []
        # (Device, inode) of each folder and file → its path.
        self.seen: dict[tuple[int, int], str] = {}

    def listing(self, folder: str, named: bool) -> Listing:
        for path in (folder, *(folder + suffix for suffix in SUFFIXES)):
            if not os.path.lexists(path):
                continue
            status = self._status(path, os.path.islink(path))
            if stat.S_ISDIR(status.st_mode):
                self._walk(path, status)
            elif path == folder and not named:
                self._refuse(
                    path,
                    "a file" if stat.S_ISREG(status.st_mode) else _kind(status),
                    "Every source must be a folder, or names its file",
                    f"Move it away, give its name a suffix ({NAMED}), or say path=… in the definition",
                )
            else:
                self._file(path, status)
        files = dict(sorted(self.files.items()))
        return Listing(self.source, folder, files, tuple(sorted(self.passed_over)), named)

    def _walk(self, folder: str, status: os.stat_result) -> None:
        pending = [(folder, status)]
        while pending:
            path, status = pending.pop()
            self._once(path, status)
            for entry in self._entries(path):
                if entry.name == LOG:
                    self._refuse(
                        entry.path,
                        "a Delta table inside the source",
                        "A Delta table must be the whole source",
                        "Make it a source of its own, or write its rows as files",
                    )
                if is_hidden(entry.name):
                    if _worth_naming(entry.name):
                        self.passed_over.append(entry.path)
                    continue
                found = self._status(entry.path, entry.is_symlink())
                if stat.S_ISDIR(found.st_mode):
                    pending.append((entry.path, found))
                else:
                    self._file(entry.path, found)

    def _entries(self, folder: str) -> Iterator[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                yield from sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            raise self._changed(folder) from None
        except OSError as error:
            raise DataError(
                "Every folder of a source must be readable", f"{error.filename}: {error.strerror}", "Grant access"
            ) from None

    def _status(self, path: str, linked: bool) -> os.stat_result:
        try:
            path.encode()
        except UnicodeEncodeError:
            self._refuse(path.encode("utf-8", "backslashreplace").decode(), "a name that is not UTF-8", fix="Rename it")
        try:
            return os.stat(path)
        except FileNotFoundError:
            if not linked:
                raise self._changed(path) from None
            self._refuse(
                path, f"a link to {_target(path)}, which is not there", fix="Remove the link, or restore its target"
            )
        except OSError as error:
            why = "a link that leads back to itself" if error.errno == errno.ELOOP else str(error.strerror)
            self._refuse(path, why, fix="Remove the link" if linked else "Grant access")

    def _file(self, path: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            self._refuse(path, _kind(status))
        if format_of(path) is None:
            self._refuse(path, _nameless(status.st_size), fix=_FIX)
        self._once(path, status)
        self.files[path] = (status.st_size, status.st_mtime_ns)

    def _once(self, path: str, status: os.stat_result) -> None:
        """Refuses a file or folder that appears twice because of a link: its rows would count twice."""
        other = self.seen.setdefault((status.st_dev, status.st_ino), path) if status.st_ino else path
        if other != path:
            self._refuse(
                path, f"the same as {other}, by way of a link", "A source must have each file once", "Remove the link"
            )

    def _changed(self, path: str) -> DataError:
        return DataError(
            f"Source {self.source!r}: its files must not change while a run lists them",
            f"{path} disappeared",
            "Run the same command again; write new files aside and rename them",
        )

    def _refuse(
        self,
        path: str,
        what: str,
        rule: str = _RULE,
        fix: str = "Move it away",
    ) -> NoReturn:
        raise ContractError(f"Source {self.source!r}: {rule[0].lower()}{rule[1:]}", f"{path}: {what}", fix)


def _nameless(size: int) -> str:
    return f"{size:,} bytes under a name without any of {NAMED}"


def _kind(status: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(status.st_mode), "neither a file nor a folder")


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "something"


def _list_remote(source: str, folder: str, named: bool) -> Listing:
    """Of an object store. Its links do not exist, and neither do folders."""
    files: dict[str, tuple[int, float]] = {}
    passed_over: set[str] = set()
    patterns = [f"{folder}/**", *(folder + suffix for suffix in SUFFIXES), *([folder] if named else [])]
    for match in FileSystems.match(patterns):
        for each in match.metadata_list:
            parts = each.path[len(folder) :].split("/")[1:]
            hidden = next((i for i, part in enumerate(parts) if is_hidden(part)), None)
            if hidden is not None:
                if _worth_naming(parts[hidden]):
                    passed_over.add("/".join([folder, *parts[: hidden + 1]]))
            elif each.path.endswith("/") and not each.size_in_bytes:
                continue  # consoles write an empty object to show a folder
            elif format_of(each.path) is None:
                rule = f"Source {source!r}: {_RULE[0].lower()}{_RULE[1:]}"
                raise ContractError(rule, f"{each.path}: {_nameless(each.size_in_bytes)}", _FIX)
            else:
                files[each.path] = (each.size_in_bytes, each.last_updated_in_seconds)
    return Listing(source, folder, dict(sorted(files.items())), tuple(sorted(passed_over)), named)
