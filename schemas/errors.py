"""Errors a person can act on: the rule, the value that broke it, the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST_WORD = 1000


def in_one_line(text: str) -> str:
    r"""Text whose line feeds are escapes: a value from data must not begin a line of its own.

    >>> print(in_one_line("a\nb"))
    a\nb
    """
    return text.replace("\r", "\\r").replace("\n", "\\n")


def without_long_words(text: str) -> str:
    """Text in which words that nobody would read to their end are cut.

    >>> len(without_long_words("x" * 100_000))
    1000
    """
    half = _LONGEST_WORD // 2
    return re.sub(rf"\S{{{_LONGEST_WORD + 1},}}", lambda found: f"{found[0][: half - 1]}…{found[0][-half:]}", text)


class MillraceError(Exception):
    """A user's mistake or a refused state.  Printed without a traceback by the command line.

    Args:
        rule: what holds, in one sentence.
        value: what was found instead.
        fix: what to do about it.
    """

    exit_code = 1

    def __init__(self, rule: str, value: object = None, fix: str = "") -> None:
        self.rule, self.value, self.fix = rule, value, fix
        parts = [rule.rstrip(".") + "."]
        if value is not None:
            parts.append(f"Got {value}.")
        if fix:
            parts.append(fix if fix.endswith("?") else fix.rstrip(".") + ".")
        super().__init__(without_long_words(in_one_line(" ".join(parts))))

    def __reduce__(self) -> tuple[type, tuple[str, object, str]]:
        return type(self), (self.rule, self.value, self.fix)


class DefinitionError(MillraceError, ValueError):
    """A definition that cannot mean anything, refused when it is built."""

    exit_code = 2


class ContractError(MillraceError):
    """A file that breaks its source's contract as a whole: a column missing or of another type, unreadable bytes."""

    exit_code = 3


class DataError(MillraceError):
    """Data from which no result follows: an empty interval, no rows, one class only."""

    exit_code = 3


class StoreError(MillraceError):
    """A table, a file or a registry that cannot be read or written."""

    exit_code = 4


class IncompleteLogError(StoreError):
    """An entry of a table's log that has lost something."""


class ConflictError(StoreError):
    """Another run committed the same dates first; nothing of this one is visible."""

    exit_code = 8


class MismatchError(MillraceError):
    """Two parts that were not made for each other: fingerprints or schemas differ."""

    exit_code = 5


class GateError(MillraceError):
    """A model that was registered but did not pass its gates."""

    exit_code = 6


class AnomalyError(MillraceError):
    """Data that breaks its reviewed schema; nothing was published."""

    exit_code = 7


def nearest(name: str, options: Iterable[str]) -> str:
    """A hint naming the option nearest to `name`, or all of them when none is near.

    >>> nearest("orgin", ["origin", "dest"])
    "Did you mean 'origin'?"
    """
    known = sorted(options)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known names: {', '.join(known) or 'none'}."
