"""Protects a command's user from its data, and its data from other users: escaped output, hidden secrets, a umask.

Data can contain escape sequences that rewrite a terminal, forged log lines, or text that runs from right to left.  So
everything that a command prints goes through `printable`.  Its files contain rows, and only its user may read them.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import TextIO, cast

from schemas.permissions import umask

# Control characters except tab and line feed, and characters that change lines or the direction of text.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_CREDENTIALS = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@'\"]*):[^\s@/'\"]+@", re.IGNORECASE)
_secrets: set[str] = set()


def hide(secrets: Iterable[str]) -> None:
    """Makes `printable` hide these texts from now on."""
    _secrets.update(each for each in secrets if each)


def without_secrets(text: str) -> str:
    """Text without secrets: those of `hide`, and passwords in addresses.

    >>> without_secrets("postgresql://ann:word@host/db")
    'postgresql://ann:***@host/db'
    """
    for secret in sorted(_secrets, key=len, reverse=True):
        text = text.replace(secret, "***")
    return _CREDENTIALS.sub(r"\1:***@", text)


def printable(text: str) -> str:
    r"""Text without secrets and with control characters as escapes; lines stay lines.

    >>> print(printable("a\x1b[2Kb\n\u202ec"))
    a\x1b[2Kb
    \u202ec
    """

    def escaped(match: re.Match[str]) -> str:
        return match[0].encode("unicode_escape").decode()

    return _CONTROLS.sub(escaped, without_secrets(text))


class PrintableStream:
    """A text stream whose text is made printable.

    Args:
        stream: the stream to which it is written.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(printable(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)


def terminal_of(stream: TextIO) -> TextIO:
    """The underlying stream, for Millrace's own escape sequences."""
    return stream.stream if isinstance(stream, PrintableStream) else stream


@contextlib.contextmanager
def protected_output() -> Iterator[None]:
    """Applies the umask and makes what is printed printable, until the end.

    Raises:
        DefinitionError: `MILLRACE_UMASK` is not a umask.
    """
    wanted = umask()
    before = None if wanted is None else os.umask(wanted)
    out, error = sys.stdout, sys.stderr
    if not isinstance(out, PrintableStream):
        sys.stdout = cast(TextIO, PrintableStream(out))
    if not isinstance(error, PrintableStream):
        sys.stderr = cast(TextIO, PrintableStream(error))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = out, error
        if before is not None:
            os.umask(before)
