"""JSON and other small files of a store, which may be damaged: whatever they contain, there is one kind of error.

A file of a store can be truncated, have another encoding, be nested beyond Python's stack, or not be a regular file:
reading a FIFO would wait, and a device would never end.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar, cast

from schemas.errors import MillraceError, StoreError
from transforms.storage.file_systems import FileSystems, open_regular

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Record = TypeVar("Record")

# What interpreting damaged JSON can raise.
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
def explain_damage(rule: str, path: str, fix: str = RESTORE, missing: str | None = None) -> Iterator[None]:
    """Turns anything that reading and interpreting a stored file raises into one error.

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
    kind = "" if isinstance(error, json.JSONDecodeError | RecordError) else f"{type(error).__name__}: "
    return (kind + " ".join(str(error).split()))[:300]


def parse_object(content: bytes | str) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ValueError, RecursionError: the text is not a JSON object.
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
    with explain_damage(rule, path, fix):
        return parse_object(read_regular(path))


class RecordError(ValueError):
    """A JSON object that lacks a key, or has a value of another type than the record it should be."""


def parse_record(kind: type[Record], content: bytes | str) -> Record:
    """Parses a JSON object that has the keys and types of `kind`, a TypedDict; further keys are kept.

    >>> from typing_extensions import TypedDict
    >>> Size = TypedDict("Size", {"bytes": int})
    >>> parse_record(Size, '{"bytes": 2, "later": 1}')
    {'bytes': 2, 'later': 1}
    >>> parse_record(Size, '{"later": 1}')
    Traceback (most recent call last):
    transforms.storage.stored_json.RecordError: bytes: Field required

    Raises:
        ValueError, RecursionError: the text is not a JSON object, lacks a key, or has a value of another type.
    """
    from pydantic import ValidationError

    found = parse_object(content)
    try:
        _validator(cast(Hashable, kind)).validate_json(content, strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False, include_context=False)
        key, more = ".".join(map(str, faults[0]["loc"])), f", and {len(faults) - 1} more" if len(faults) > 1 else ""
        raise RecordError(f"{key}: {faults[0]['msg']}{more}") from None
    return cast(Record, found)


@functools.lru_cache(64)
def _validator(kind: Hashable) -> TypeAdapter[object]:
    from pydantic import TypeAdapter

    return TypeAdapter(cast(type[object], kind))
