"""Files of a local disk that survive a power cut: written aside, flushed, renamed, and the folder flushed too.

A rename alone makes a file visible at once but not durable: after a power cut the name may be missing, or may belong to
an empty file.  So each file is flushed (fsync) before it gets its name, and the folder afterwards.  Only then is the
file reported, or named in another file.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

# Some file systems, such as network file systems, cannot flush a folder: they make a name durable with the file.
_NO_FOLDERS = {errno.EINVAL, errno.ENOTSUP, errno.EBADF}
# A disk flushes many files faster at once than one after another.
FLUSHES = 16


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(FLUSHES, "flush")


def write_file(path: str, content: bytes | pa.Buffer, exclusive: bool = False) -> None:
    """Writes a whole file that is durable on return; readers see all of it or none.

    Args:
        path: a path on a local disk; missing folders are created.
        content: bytes, or any object with a buffer of bytes.
        exclusive: refuse to replace a file.

    Raises:
        FileExistsError: the file exists, and `exclusive` is true.
        OSError: it cannot be written; no part of it is left.
    """
    folder = os.path.dirname(path) or "."
    make_folders(folder)
    aside = write_aside(path, content)
    try:
        sync_file(aside)
        if exclusive:
            os.link(aside, path)
            os.remove(aside)
        else:
            os.replace(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(aside)
        raise
    sync_folder(folder)


def write_aside(path: str, content: bytes | pa.Buffer) -> str:
    """Writes `content` under a hidden name beside `path`, and returns the hidden path; `rename_files` renames it.

    Raises:
        OSError: it cannot be written; no part of it is left.
    """
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.{os.getpid()}-{threading.get_ident()}")
    try:
        with open(aside, "wb") as handle:
            handle.write(content)
    except OSError:
        with contextlib.suppress(OSError):  # on a full disk, half a file only takes space
            os.remove(aside)
        raise
    return aside


def rename_files(files: Sequence[tuple[str, str]]) -> None:
    """Renames files, given as (hidden path, path); they are durable on return.  Each file and each folder is flushed
    once.

    Raises:
        OSError: a file cannot be flushed or renamed; the hidden files are removed.
    """
    try:
        list(_pool().map(sync_file, [aside for aside, _ in files]))
        for aside, path in files:
            os.replace(aside, path)
    except OSError:
        for aside, _ in files:
            with contextlib.suppress(OSError):
                os.remove(aside)
        raise
    sync_folders(os.path.dirname(path) or "." for _, path in files)


def rename(source: str, target: str) -> None:
    """Renames a file; its content and new name are durable on return.

    Raises:
        OSError: it cannot be renamed.
    """
    sync_file(source)
    os.replace(source, target)
    sync_folders(os.path.dirname(each) or "." for each in (source, target))


def make_folders(folder: str) -> None:
    """Creates the folder and missing folders above it, and flushes the folders that name them.

    Raises:
        OSError: a folder cannot be created.
    """
    missing = []
    path = Path(folder)
    while not path.is_dir() and path != path.parent:
        missing.append(path)
        path = path.parent
    if missing:
        os.makedirs(folder, exist_ok=True)
        sync_folders(str(each.parent) for each in missing)


def sync_file(path: str) -> None:
    """Flushes a file's content to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: str) -> None:
    """Flushes the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDERS:
            raise
    finally:
        os.close(handle)


def sync_folders(folders: Iterable[str]) -> None:
    """Flushes each folder once."""
    list(_pool().map(sync_folder, dict.fromkeys(folders)))


def sync_ancestors(folder: str) -> None:
    """Flushes all folders above the folder, as far as this process may read them.

    If two writers create a folder at the same time, one of them finds it there already, and cannot rely on the other to
    flush it.
    """
    for each in Path(os.path.abspath(folder)).parents:
        with contextlib.suppress(PermissionError):
            sync_folder(str(each))
