"""Lengths of time as people write them: `"10m"`, `"24h"`, `"7d"`."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

from schemas.errors import DefinitionError

MICROSECONDS = {
    "us": 1,
    "ms": 1_000,
    "s": 1_000_000,
    "m": 60_000_000,
    "h": 3_600_000_000,
    "d": 86_400_000_000,
    "w": 7 * 86_400_000_000,
}
DAY = MICROSECONDS["d"]
LONGEST = 100 * 366 * DAY


def microseconds(text: str, what: str = "a duration", zero: bool = False) -> int:
    """The length of `text` in microseconds.

    >>> microseconds("10m")
    600000000

    Raises:
        DefinitionError: the text is not `<whole number><unit>`, is zero (unless `zero`), or is over a century.
    """
    match = re.fullmatch(r"(\d+)(us|ms|s|m|h|d|w)", text) if isinstance(text, str) else None
    if match is None:
        raise DefinitionError(
            f"{what} must be a whole number and a unit: us, ms, s, m, h, d or w",
            f"it is {text!r}",
            'Write it like "10m" or "7d"',
        )
    length = int(match[1]) * MICROSECONDS[match[2]]
    if length == 0 and not zero:
        raise DefinitionError(f"{what} must be longer than zero", f"it is {text!r}", "Remove it or lengthen it")
    if length > LONGEST:
        raise DefinitionError(
            f"{what} must be at most a century",
            f"it is {text!r}",
            'For a whole history write "all" (or max_age="forever")',
        )
    return length


def instant(text: str | date | datetime, what: str = "a moment") -> datetime:
    """A date (its UTC midnight) or an ISO time with a zone, as a UTC datetime."""
    try:
        value = datetime.fromisoformat(text) if isinstance(text, str) else text
    except ValueError:
        raise DefinitionError(
            f"{what} must be an ISO date or time", f"it is {text!r}", 'Write it like "2013-10-01"'
        ) from None
    if not isinstance(value, date):
        raise DefinitionError(f"{what} must be an ISO date or time", f"it is {text!r}", 'Write it like "2013-10-01"')
    if not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if value.tzinfo is None:
        if isinstance(text, str) and len(text) > 10:
            raise DefinitionError(
                f"{what} must have a time zone", f"it is {text!r}", "Add +00:00 (UTC) or another offset"
            )
        return value.replace(tzinfo=UTC)
    return value.astimezone(UTC)
