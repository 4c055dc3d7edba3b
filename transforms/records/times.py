"""Times in µs since 1970 in UTC, days since 1970, and conversions between them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, date, datetime, timedelta
from typing import TypeVar, overload

from schemas.durations import DAY
from transforms.records.arrays import Ints

MICROSECOND = timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# Before every time, and after every time.
ALWAYS, FOREVER = -(2**62), 2**62

Numbers = TypeVar("Numbers", int, Ints)


def now_us() -> int:
    """Returns the current time in µs since 1970."""
    return time.time_ns() // 1000


def day_number(microsecond: Numbers) -> Numbers:
    """Returns the number of the UTC day that contains a time, of one time or of an array."""
    return microsecond // DAY


def day_of(microsecond: int) -> date:
    """Returns the UTC date of a time in µs since 1970."""
    return as_date(day_number(microsecond))


def as_date(day: int) -> date:
    """Returns the date of a number of days since 1970."""
    return date(1970, 1, 1) + timedelta(days=day)


def as_number(day: date) -> int:
    """Returns the number of days from 1970 to a date.

    >>> as_number(date(1970, 1, 3))
    2
    """
    return (day - date(1970, 1, 1)).days


@overload
def midnight(day: date | int) -> int: ...
@overload
def midnight(day: Ints) -> Ints: ...
def midnight(day: date | int | Ints) -> int | Ints:
    """Returns the start of a date, or of numbers of days since 1970, in µs since 1970."""
    return (as_number(day) if isinstance(day, date) else day) * DAY


def days_in(length: int) -> int:
    """Returns a length of time in days, rounded up."""
    return -(-length // DAY)


def days_within(ranges: Iterable[tuple[int, int]]) -> list[int]:
    """Returns the numbers of the days that the `[start, end)` ranges of µs touch.

    >>> days_within([(0, DAY + 1)])
    [0, 1]
    """
    return [day for start, end in ranges for day in range(day_number(start), days_in(end))]
