"""Beam's file systems, which import Beam only for addresses with a scheme such as `gs://`.

Importing Beam takes more than a second.  A command that looks at a store on a local disk does not need it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from io import BufferedIOBase
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from apache_beam.io import filesystems
    from apache_beam.io.filesystem import MatchResult

# Beam decompresses files with these suffixes by default.
_COMPRESSED = (".bz2", ".deflate", ".gz", ".lzma", ".xz", ".zst", ".zstd")


class FileSystems:
    """The methods of `apache_beam.io.filesystems.FileSystems` that Millrace uses, with the same results and errors.

    >>> FileSystems.join("/store", "features", "taxi")
    '/store/features/taxi'
    """

    @staticmethod
    def join(base: str, *parts: str) -> str:
        return os.path.join(base, *parts) if _is_local(base) else str(_beam().join(base, *parts))

    @staticmethod
    def split(path: str) -> tuple[str, str]:
        """The absolute path of the folder, and the last part of the path."""
        if _is_local(path):
            return os.path.split(os.path.abspath(path))
        head, tail = _beam().split(path)
        return str(head), str(tail)

    @staticmethod
    def exists(path: str) -> bool:
        return os.path.exists(path) if _is_local(path) else bool(_beam().exists(path))

    @staticmethod
    def open(path: str, mime_type: str = "application/octet-stream", compression_type: str = "auto") -> BufferedIOBase:
        """Opens a file for reading.  Files with a suffix such as `.gz` are decompressed by default."""
        if _is_local(path) and (compression_type == "uncompressed" or not path.lower().endswith(_COMPRESSED)):
            return open_regular(path)
        handle: BufferedIOBase = _beam().open(path, mime_type, compression_type)
        return handle

    @staticmethod
    def create(path: str, mime_type: str = "application/octet-stream") -> IO[bytes]:
        """Opens a file for writing.  Its folder is created."""
        handle: IO[bytes] = _beam().create(path, mime_type)
        return handle

    @staticmethod
    def match(patterns: Sequence[str]) -> list[MatchResult]:
        """Beam's `MatchResult` of each pattern: `*` does not match a slash, `**` does."""
        found: list[MatchResult] = _beam().match(list(patterns))
        return found

    @staticmethod
    def copy(sources: Sequence[str], targets: Sequence[str]) -> None:
        _beam().copy(list(sources), list(targets))

    @staticmethod
    def rename(sources: Sequence[str], targets: Sequence[str]) -> None:
        _beam().rename(list(sources), list(targets))

    @staticmethod
    def delete(paths: Sequence[str]) -> None:
        _beam().delete(list(paths))


def require_regular(path: str) -> None:
    """Refuses a path that is not a regular file: reading a FIFO would wait, and some devices never end.  Links are
    followed.

    Raises:
        OSError: the path is not a regular file, or does not exist.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(None, "it is not a regular file")


def open_regular(path: str) -> BufferedIOBase:
    """Opens a file of this machine for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # so that opening a FIFO does not wait
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(None, "it is not a regular file")
    return os.fdopen(handle, "rb")


def _is_local(path: str) -> bool:
    return "://" not in path


def _beam() -> type[filesystems.FileSystems]:
    from apache_beam.io import filesystems

    return filesystems.FileSystems
