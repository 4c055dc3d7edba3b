"""A source: a table or topic, its columns and when its rows became known."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping
from datetime import datetime

import polars as pl

from schemas.durations import instant, microseconds
from schemas.errors import DefinitionError, nearest
from schemas.places import built_at

TIME = pl.Datetime("us", "UTC")
_SIMPLE = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Float32, pl.Float64, pl.String, pl.Boolean, pl.Date)
# Names of columns that Millrace adds to a view's own.
RESERVED = ("date", "row_id")


def names(value: str | Iterable[str], what: str, of: str = "column name") -> tuple[str, ...]:
    """One name or several as a tuple, without repeats."""
    result = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not result or not all(isinstance(name, str) and name for name in result):
        raise DefinitionError(
            f"{what} is a {of} or a tuple of them", repr(value), 'Write "origin" or ("origin", "carrier")'
        )
    if len(set(result)) != len(result):
        raise DefinitionError(f"{what} names each {of.split()[0]} once", repr(value), "Remove the repeat")
    return result


def identifier(value: str, what: str) -> str:
    """Checks a lower-case name that can be used in paths, column names and SQL."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", value):
        raise DefinitionError(
            f"{what} is lower-case letters, digits and underscores", repr(value), 'Write it like "late_departures"'
        )
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Events (with `time`) or a dimension (without), and the contract of its rows.

    `time` is when a row **became known**, not when the thing happened: a departure is known when the aircraft leaves,
    a sale when its record arrives.  A feature at *t* sees rows with `time < t` only, so choosing the later of two
    candidate columns is safe and choosing the earlier leaks the future.

    Args:
        name: names the folder `<store>/sources/<name>` or the topic.
        columns: Polars type by column name, without the time columns.
        time: column of type `Datetime("us", "UTC")`; None for a dimension, which is a table without time.
        event_time: column with an earlier time that decides which windows contain the row.  Never later than `time`.
        lateness: how long after its `time` a row may still arrive live.
        ahead: how far a time may be ahead of the clock of the run; rows further ahead are rejected.
        not_before: rows with an earlier time are rejected (a clock that was never set gives 1970).
        unique: columns whose repeated values count once; the first known row stays.
        idle: after this long without a row, a live partition no longer holds the watermark back.
        order: columns that order rows with the same time; by default all columns, so that no feature depends on the
            order of arrival.
    """

    name: str
    columns: Mapping[str, pl.DataType | type[pl.DataType]]
    time: str | None = None
    event_time: str | None = None
    lateness: str = "0s"
    ahead: str = "1d"
    idle: str | None = None
    not_before: str | datetime = "1990-01-01"
    unique: str | tuple[str, ...] | None = None
    order: str | tuple[str, ...] | None = None
    place: str = dataclasses.field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", built_at())
        identifier(self.name, "The name of a source")
        what = f"Source {self.name!r}"
        if not isinstance(self.columns, Mapping) or not self.columns:
            raise DefinitionError(
                f"{what}: columns maps names to Polars types", repr(self.columns), 'Write {"origin": pl.String}'
            )
        object.__setattr__(
            self, "columns", {name: _dtype(self.name, name, dtype) for name, dtype in self.columns.items()}
        )
        for field in ("time", "event_time"):
            column = getattr(self, field)
            if column is not None:
                _column(self.name, column)
            if column is not None and self.columns.get(column, TIME) != TIME:
                raise DefinitionError(
                    f"{what}: {field} is a Datetime in microseconds and UTC",
                    f"{column!r}: {self.columns[column]}",
                    "Leave it out of columns, it has that type by itself",
                )
        if self.event_time is not None and self.time is None:
            raise DefinitionError(
                f"{what}: event_time places a row of a source that has time",
                "no time",
                "Say when rows became known: time=…",
            )
        if self.event_time is not None and self.event_time == self.time:
            raise DefinitionError(f"{what}: event_time differs from time", repr(self.time), "Leave event_time out")
        microseconds(self.lateness, f"{what}: lateness", zero=True)
        microseconds(self.ahead, f"{what}: ahead", zero=True)
        if self.idle is not None:
            microseconds(self.idle, f"{what}: idle")
        instant(self.not_before, f"{what}: not_before")
        for field in ("unique", "order"):
            value = getattr(self, field)
            if value is None:
                continue
            if self.time is None:
                raise DefinitionError(
                    f"{what}: {field} belongs to events", "a dimension (no time)", f"Drop {field}, or say time=…"
                )
            object.__setattr__(self, field, names(value, f"{what}: {field}"))
            for column in getattr(self, field):
                self.require(column, field)

    @functools.cached_property
    def schema(self) -> dict[str, pl.DataType]:
        """All columns with their types, the time columns first."""
        times = {name: TIME for name in (self.time, self.event_time) if name is not None}
        return {**times, **self.columns}  # type: ignore[dict-item]

    @functools.cached_property
    def tie_order(self) -> tuple[str, ...]:
        """The columns that order rows with the same time: `order`, then all declared columns in their order.

        A null comes first, NaN is null and −0.0 is 0.0; strings are compared by their bytes, false is before true.
        """
        return tuple(dict.fromkeys([*(self.order or ()), *self.schema]))

    def ties(self, columns: Iterable[str]) -> list[str]:
        """The part of `tie_order` that is among `columns`, the columns of a frame."""
        known = set(columns)
        return [name for name in self.tie_order if name in known]

    def require(self, column: str, use: str) -> None:
        """Refuses a `column` that this source does not declare."""
        if column not in self.schema:
            raise DefinitionError(
                f"{use} of source {self.name!r} names a declared column", repr(column), nearest(column, self.schema)
            )


def _column(source: str, column: object) -> None:
    if not isinstance(column, str) or not column:
        raise DefinitionError(f"Source {source!r}: a column has a name", repr(column), 'Write {"origin": pl.String}')
    if column in RESERVED or column.startswith("__"):
        raise DefinitionError(
            f"Source {source!r}: {', '.join(RESERVED)} and names starting with __ are Millrace's own",
            repr(column),
            "Rename the column",
        )


def _dtype(source: str, column: str, dtype: object) -> pl.DataType:
    _column(source, column)
    if dtype in _SIMPLE:
        return dtype() if isinstance(dtype, type) else dtype
    if dtype == TIME or (dtype is pl.Datetime):
        return TIME
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is None:
        raise DefinitionError(
            f"Source {source!r}: a timestamp names its zone",
            f"{column!r}: {dtype}",
            'Write pl.Datetime("us", "UTC") and convert the data',
        )
    raise DefinitionError(
        f'Source {source!r}: a column is a signed integer, float, String, Boolean, Date or Datetime("us", "UTC")',
        f"{column!r}: {dtype}",
        "Cast it where the data is written",
    )
