"""JSON and other small files of a store, which somebody may have damaged: whatever they hold, there is one error for
it.

A file that is kept in a store can be cut short, of another encoding, nested beyond Python's stack, or no file at all:
a FIFO in its place would be waited for, and a device would never end.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any

from schemas.errors import MillraceError, StoreError
from transforms.storage.file_systems import FileSystems, open_regular

# What taking damaged JSON for what it should be can raise.
DAMAGE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)
RESTORE = "Restore the file"


def read_regular(path: str) -> bytes:
    """The content of a file.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    if "://" in path:
        with FileSystems.open(path, compression_type="uncompressed") as remote:
            return bytes(remote.read())
    with open_regular(path) as file:
        return file.read()


@contextlib.contextmanager
def understood(rule: str, path: str, fix: str = RESTORE, missing: str | None = None) -> Iterator[None]:
    """Turns whatever reading and interpreting a stored file raises into one error.

    Args:
        rule: what holds for the file.
        path: of the file.
        fix: what to do about it.
        missing: what to do if there is no such file; None: the same.

    Raises:
        StoreError: see above.
    """
    try:
        yield
    except MillraceError:
        raise
    except FileNotFoundError as error:
        raise StoreError(rule, f"{path}: {error.strerror or error}", missing or fix) from None
    except OSError as error:
        raise StoreError(rule, f"{path}: {error.strerror or error}", fix) from None
    except DAMAGE as error:
        raise StoreError(rule, f"{path}: {reason_of(error)}", fix) from None


def reason_of(error: BaseException) -> str:
    """An error of reading a file in a few words, without the file's content."""
    if isinstance(error, UnicodeDecodeError):
        return f"bytes that are not UTF-8 at {error.start}"
    if isinstance(error, RecursionError):
        return "nested too deep"
    if isinstance(error, KeyError):
        return f"{error} is missing"
    kind = "" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: "
    return (kind + " ".join(str(error).split()))[:300]


def parse_object(content: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError, RecursionError: it is none.
    """
    found = json.loads(content.decode() if isinstance(content, bytes) else content)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON object is expected, not {type(found).__name__}")
    return found


def read_object(path: str, rule: str, fix: str = RESTORE) -> dict[str, Any]:
    """The JSON object that a stored file holds.

    Raises:
        StoreError: it cannot be read, or holds something else.
    """
    with understood(rule, path, fix):
        return parse_object(read_regular(path))
