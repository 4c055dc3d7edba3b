"""A source: a table or topic, its columns and when its rows became known."""

from __future__ import annotations

import dataclasses
import functools
import re
import zoneinfo
from collections.abc import Iterable, Mapping
from datetime import datetime

import polars as pl

from schemas.arithmetic import in_64_bits
from schemas.durations import instant, microseconds
from schemas.errors import DefinitionError, listed, nearest
from schemas.expressions import canonical, columns_of, dtype_of, require_row_local
from schemas.places import built_at

TIME = pl.Datetime("us", "UTC")
_SIMPLE = (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.Float32, pl.Float64, pl.String, pl.Boolean, pl.Date)
# Names of columns that Millrace adds to a view's own.
RESERVED = ("date", "row_id")
# Units of times that are numbers: how many µs one of them has, as a fraction.
UNITS = {"s": (1_000_000, 1), "ms": (1_000, 1), "us": (1, 1), "ns": (1, 1_000)}


def names(
    value: str | Iterable[str],
    what: str,
    kind: str = "column name",
    example: str = 'Write "origin" or ("origin", "carrier")',
) -> tuple[str, ...]:
    """One name or several as a tuple, without repeats."""
    result = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else ()
    if not result or not all(isinstance(name, str) and name for name in result):
        raise DefinitionError(f"{what} must be a {kind} or a tuple of them", f"it is {value!r}", example)
    if len(set(result)) != len(result):
        raise DefinitionError(f"{what} must have each {kind} once", f"it is {value!r}", "Remove the repeat")
    return result


def identifier(value: str, what: str) -> str:
    """Checks a lower-case name that can be used in paths, column names and SQL."""
    if not isinstance(value, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", value):
        raise DefinitionError(
            f"{what} must consist of lower-case letters, digits and underscores",
            f"it is {value!r}",
            'Write it like "late_departures"',
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
        path: the folder or file of its rows in batch, absolute or within the folder of the sources; by default its
            name.  Several sources may have one path.
        zone: the time zone of times that do not name one, such as `"Europe/Berlin"`.  Without it they are refused.
        unit: of times that are numbers: `"s"`, `"ms"`, `"us"` or `"ns"` since 1970.  Without it they are refused.
        where: condition on a row; rows for which it is not true are no rows of the source.
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
    path: str | None = None
    zone: str | None = None
    unit: str | None = None
    where: pl.Expr | None = None
    place: str = dataclasses.field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "place", built_at())
        identifier(self.name, "The name of a source")
        what = f"Source {self.name!r}"
        if not isinstance(self.columns, Mapping) or not self.columns:
            raise DefinitionError(
                f"{what}: columns must map names to Polars types",
                f"it is {self.columns!r}",
                'Write {"origin": pl.String}',
            )
        object.__setattr__(self, "columns", _dtypes(self.name, self.columns))
        for field in ("time", "event_time"):
            column = getattr(self, field)
            if column is not None:
                _column(self.name, column)
            if column is not None and self.columns.get(column, TIME) != TIME:
                raise DefinitionError(
                    f"{what}: {field} must be a Datetime in microseconds and UTC",
                    f"{column!r} is {self.columns[column]}",
                    "Leave it out of columns: it has this type anyway",
                )
        if self.event_time is not None and self.time is None:
            raise DefinitionError(
                f"{what}: a source with event_time must have time",
                "it has none",
                "Name the column in which rows became known: time=…",
            )
        if self.event_time is not None and self.event_time == self.time:
            raise DefinitionError(
                f"{what}: event_time must differ from time", f"both are {self.time!r}", "Leave event_time out"
            )
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
                    f"{what}: only events may have {field}",
                    "this is a dimension (it has no time)",
                    f"Remove {field}, or add time=…",
                )
            object.__setattr__(self, field, names(value, f"{what}: {field}"))
            self.require(getattr(self, field), field)
        self._check_reading(what)

    def _check_reading(self, what: str) -> None:
        """Where rows are and how they are read."""
        if self.path is not None and (not isinstance(self.path, str) or not self.path.strip("/") or "\0" in self.path):
            raise DefinitionError(
                f"{what}: path must be a folder or a file",
                f"it is {self.path!r}",
                'Write it like "orders/2024" or "/data/orders.csv"',
            )
        if self.zone is not None and not _is_zone(self.zone):
            raise DefinitionError(
                f"{what}: zone must be a time zone of the IANA database",
                f"it is {self.zone!r}",
                'Write it like "UTC", "Europe/Berlin" or "America/New_York"',
            )
        if self.unit is not None and self.unit not in UNITS:
            raise DefinitionError(
                f"{what}: unit must be one of times as numbers, {', '.join(UNITS)}",
                f"it is {self.unit!r}",
                nearest(str(self.unit), UNITS),
            )
        if self.where is not None:
            require_row_local(self.where, f"{what}: where")
            if dtype_of(self.where, self.schema, f"{what}: where") != pl.Boolean:
                raise DefinitionError(
                    f"{what}: where must be a condition",
                    f"it is {self.where}",
                    'Compare with something: pl.col("kind") == "sale"',
                )

    @functools.cached_property
    def columns_of_where(self) -> tuple[str, ...]:
        """The columns that `where` reads, in declared order."""
        read = set() if self.where is None else {*columns_of(self.where)}
        return tuple(name for name in self.schema if name in read)

    @functools.cached_property
    def condition(self) -> pl.Expr | None:
        """`where` as it is computed: in 64 bits."""
        return None if self.where is None else in_64_bits(self.where, self.schema).expr

    @functools.cached_property
    def reading(self) -> dict[str, object]:
        """What of `where`, `zone` and `unit` is set, as JSON; it decides what the rows of the source are."""
        found: dict[str, object] = {"zone": self.zone, "unit": self.unit}
        if self.where is not None:
            found["where"] = [canonical(self.where), {name: str(self.schema[name]) for name in self.columns_of_where}]
        return {name: value for name, value in found.items() if value is not None}

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

    def require(self, columns: Iterable[str], use: str) -> None:
        """Refuses `columns` that this source does not declare; one error names all of them."""
        unknown = [column for column in columns if column not in self.schema]
        if unknown:
            raise DefinitionError(
                f"{use} of source {self.name!r} must name declared columns",
                f"there is no {', '.join(map(repr, unknown))}",
                " ".join(dict.fromkeys(nearest(column, self.schema) for column in unknown)),
            )


def _is_zone(name: object) -> bool:
    """Whether Polars and the system's database both know the zone, which have to read the same times alike."""
    if not isinstance(name, str):
        return False
    try:
        zoneinfo.ZoneInfo(name)
        pl.Series([0]).cast(pl.Datetime("us")).dt.replace_time_zone(name)
    except (KeyError, OSError, ValueError, pl.exceptions.PolarsError):  # OSError: the name of a folder
        return False
    return True


def _column(source: str, column: object) -> None:
    if not isinstance(column, str) or not column:
        raise DefinitionError(
            f"Source {source!r}: a column must have a name", f"it is {column!r}", 'Write {"origin": pl.String}'
        )
    if column in RESERVED or column.startswith("__"):
        raise DefinitionError(
            f"Source {source!r}: a column must not be named {', '.join(RESERVED)}, nor begin with __, as Millrace's do",
            f"it is {column!r}",
            "Rename the column",
        )


def _dtypes(source: str, columns: Mapping[str, object]) -> dict[str, pl.DataType]:
    """The declared types; one error names all columns that are refused."""
    found, refused = {}, list[DefinitionError]()
    for column, dtype in columns.items():
        try:
            found[column] = _dtype(source, column, dtype)
        except DefinitionError as error:
            refused.append(error)
    if len(refused) > 1:
        fixes = dict.fromkeys(f"{error.rule.partition(': ')[2]} ({error.fix})" for error in refused)
        raise DefinitionError(
            f"Source {source!r}: every column must be one that a source may have",
            listed(str(error.value) for error in refused),
            f"Rules: {'; '.join(fixes)}",
        )
    if refused:
        raise refused[0]
    return found


def _dtype(source: str, column: str, dtype: object) -> pl.DataType:
    _column(source, column)
    if dtype in _SIMPLE:
        return dtype() if isinstance(dtype, type) else dtype
    if dtype == TIME or (dtype is pl.Datetime):
        return TIME
    if isinstance(dtype, pl.Datetime) and dtype.time_zone is None:
        raise DefinitionError(
            f"Source {source!r}: a timestamp must have a time zone",
            f"{column!r} is {dtype}",
            'Write pl.Datetime("us", "UTC") and convert the data',
        )
    raise DefinitionError(
        f'Source {source!r}: a column must be a signed integer, float, String, Boolean, Date or Datetime("us", "UTC")',
        f"{column!r} is {dtype}",
        "Cast it where the data is written",
    )
