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
            f"{what} is a whole number and a unit of us, ms, s, m, h, d, w", repr(text), 'Write it like "10m" or "7d"'
        )
    length = int(match[1]) * MICROSECONDS[match[2]]
    if length == 0 and not zero:
        raise DefinitionError(
            f"{what} is longer than zero", repr(text), "A window of no length sees no event; drop it or lengthen it"
        )
    if length > LONGEST:
        raise DefinitionError(
            f"{what} is at most a century", repr(text), 'For a whole history write "all" (or max_age="forever")'
        )
    return length


def instant(text: str | date | datetime, what: str = "a moment") -> datetime:
    """A date (its UTC midnight) or an ISO time with a zone, as a UTC datetime."""
    try:
        value = datetime.fromisoformat(text) if isinstance(text, str) else text
    except ValueError:
        raise DefinitionError(f"{what} is an ISO date or moment", repr(text), 'Write it like "2013-10-01"') from None
    if not isinstance(value, date):
        raise DefinitionError(f"{what} is an ISO date or moment", repr(text), 'Write it like "2013-10-01"')
    if not isinstance(value, datetime):
        return datetime(value.year, value.month, value.day, tzinfo=UTC)
    if value.tzinfo is None:
        if isinstance(text, str) and len(text) > 10:
            raise DefinitionError(f"{what} names its time zone", repr(text), "Add +00:00 (UTC) or another offset")
        return value.replace(tzinfo=UTC)
    return value.astimezone(UTC)
