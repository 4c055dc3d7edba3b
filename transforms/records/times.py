"""Times in µs since 1970 in UTC, days since 1970, and the timestamps that mean "always" and "for ever"."""

from __future__ import annotations

import time
from datetime import UTC, date, datetime, timedelta

from schemas.durations import DAY

MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


ALWAYS, FOREVER = -(2**62), 2**62


def now_us() -> int:
    return time.time_ns() // 1000


def day_of(microsecond: int) -> date:
    """The UTC date of a time in µs since 1970."""
    return date(1970, 1, 1) + timedelta(days=microsecond // DAY)


def as_date(day: int) -> date:
    return date(1970, 1, 1) + timedelta(days=day)
