"""The kinds of features: derived from a row, trailing over events, the latest event, or looked up in a dimension."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl

from schemas.arithmetic import COUNTED, Arithmetic, Bounds, bounds_of, in_64_bits
from schemas.durations import instant, microseconds
from schemas.errors import DefinitionError, nearest
from schemas.expressions import canonical, columns_of, dtype_of, passes, require_row_local
from schemas.sources import Source, identifier, names

STATISTICS = ("count", "sum", "mean", "std", "var", "min", "max", "median", "first", "last", "n_unique")
QUANTILE = re.compile(r"q(0[1-9]|[1-9]\d)")
# Statistics that can be computed from a compact summary of all history.
COMPACT = ("count", "sum", "mean", "std", "var", "min", "max", "first", "last")
# Statistics that read one row of a window rather than all rows: ties need an order.
ORDERED = ("first", "last")

# Part of a feature's meaning if arithmetic in 32 bits, or in floats, may have given other values.
ARITHMETIC = "64 bits"

By = str | tuple[str, ...] | Mapping[str, str]


def stored_type(dtype: pl.DataType, what: str) -> pl.DataType:
    """The type in which a feature is stored: Int64 for integers, Float32 for other numbers, strings and booleans
    unchanged."""
    if dtype.is_integer():
        return pl.Int64()
    if dtype.is_numeric():
        return pl.Float32()
    if dtype in (pl.String, pl.Boolean):
        return dtype
    raise DefinitionError(
        f"{what} must be a number, a string or a boolean",
        f"it is {dtype}",
        "Turn a time into a number: .dt.hour(), .dt.epoch('s'), …",
    )


def pairs(by: By, what: str) -> tuple[tuple[str, str], ...]:
    """Keys as (column of the spine, column of the source)."""
    if isinstance(by, Mapping):
        return tuple(zip(names(tuple(by), what), names(tuple(by.values()), what), strict=True))
    return tuple((name, name) for name in names(by, what))


@dataclasses.dataclass(frozen=True, eq=False, init=False)
class Derived:
    """Row-local expressions over the spine's columns and the features above.

    >>> list(Derived(hour=pl.col("due_at").dt.hour(), late=pl.col("delay") > 15).columns)
    ['hour', 'late']
    """

    columns: Mapping[str, pl.Expr]

    def __init__(self, **columns: pl.Expr) -> None:
        if not columns:
            raise DefinitionError(
                "Derived must name at least one column",
                "there is none",
                'Write Derived(hour=pl.col("due_at").dt.hour())',
            )
        for name, expr in columns.items():
            require_row_local(expr, f"Derived {name!r}")
        object.__setattr__(self, "columns", dict(columns))

    def outputs(self, known: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
        """The stored type of each feature, given the columns `known` above it."""
        result: dict[str, pl.DataType] = {}
        for name, expr in self.columns.items():
            what = f"Derived {name!r}"
            if name in known and not passes(expr, name):
                raise DefinitionError(
                    "A feature must have a name of its own",
                    f"{what} = {expr} has the name of the column {name!r} above it",
                    "Rename the feature",
                )
            result[name] = stored_type(dtype_of(expr, known, what), what)
        return result

    def computed(
        self, known: Mapping[str, pl.DataType], bounds: Mapping[str, Bounds], kept: Mapping[str, pl.DataType]
    ) -> dict[str, Arithmetic]:
        """Its expressions as they are computed, given the columns `known` above it, and the types in which they are
        stored (`kept`).
        """
        return {
            name: in_64_bits(expr, known, bounds, rounded=kept[name].is_float()) for name, expr in self.columns.items()
        }

    def meaning(self, name: str) -> dict[str, object]:
        """Everything that decides the values of the feature `name`, as JSON."""
        return {"derived": canonical(self.columns[name])}


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One column of a Trailing: `stat` of `column` over a window of `length` µs (None: all history)."""

    name: str
    column: str
    stat: str
    window: str
    length: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Trailing:
    """Statistics of a source's events per key over `[t − W, t)`, exact to the microsecond.

    Nulls and NaN are not values.  An empty window has `count` (and `n_unique`) 0 and null for the rest; `std` and `var`
    use n − 1 (null for one value); quantiles interpolate linearly (type 7 of Hyndman & Fan 1996); a null key matches
    nothing.

    Args:
        source: events; rows with `time < t` count.
        by: key columns that have the same name in spine and source, or `{spine column: source column}`.
        over: window lengths, such as `("1h", "24h")`.
        stats: column to statistic(s): count, sum, mean, std, var, min, max, median, q01…q99, first, last, n_unique;
            `{"*": "count"}` counts rows.
        where: row-local condition on events; needs `name`.
        name: replaces the source's name in `{source}_by_{keys}_{column}_{stat}_{window}`.
    """

    source: Source
    by: By
    over: str | tuple[str, ...]
    stats: Mapping[str, str | tuple[str, ...]]
    where: pl.Expr | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        what = _of_events(self)
        over = names(self.over, f"{what}: over", "length of time", 'Write "7d" or ("1h", "7d")')
        object.__setattr__(self, "over", over)
        for window in over:
            if window == "all":
                _lifetime(self.source, f'{what}: over="all"')
            else:
                microseconds(window, f"{what}: a window")
        if not isinstance(self.stats, Mapping) or not self.stats:
            raise DefinitionError(
                f"{what}: stats must map columns to statistics",
                f"it is {self.stats!r}",
                'Write {"dep_delay": ("mean", "max")}',
            )
        self.source.require((column for column in self.stats if column != "*"), "stats")
        object.__setattr__(
            self, "stats", {column: self._checked(what, column, stats) for column, stats in self.stats.items()}
        )

    def _checked(self, what: str, column: str, stats: str | tuple[str, ...]) -> tuple[str, ...]:
        chosen = names(stats, f"{what}: the statistics of {column!r}", "statistic", 'Write "mean" or ("mean", "max")')
        for stat in chosen:
            if stat not in STATISTICS and not QUANTILE.fullmatch(stat):
                raise DefinitionError(
                    f"{what}: a statistic must be one of {', '.join(STATISTICS)} or q01 … q99",
                    f"it is {stat!r}",
                    nearest(stat, STATISTICS),
                )
        if column == "*":
            if chosen != ("count",):
                raise DefinitionError(
                    f'{what}: the statistic of "*", which stands for rows, must be count',
                    f"it is {chosen!r}",
                    "Name a column for other statistics",
                )
            return chosen
        for stat in chosen:
            if "all" in names(self.over, f"{what}: over") and stat not in COMPACT:
                raise DefinitionError(
                    f"{what}: a statistic over all history must be one of {', '.join(COMPACT)}",
                    f"it is {stat!r}",
                    'Give this statistic a window of its own, such as "365d"',
                )
        dtype = self.source.schema[column]
        for stat in chosen:
            if dtype == pl.String and stat not in ("count", "n_unique", "first", "last"):
                raise DefinitionError(
                    f"{what}: {stat} needs numbers",
                    f"{column!r} is {dtype}",
                    "Strings have count, n_unique, first and last",
                )
            if dtype.is_temporal() and stat not in ("count", "n_unique"):
                raise DefinitionError(
                    f"{what}: {stat} needs numbers", f"{column!r} is {dtype}", "Times have count and n_unique"
                )
        return chosen

    @functools.cached_property
    def condition(self) -> pl.Expr | None:
        """`where` as it is computed."""
        return None if self.where is None else _condition(self).expr

    @functools.cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        return pairs(self.by, "by")

    @functools.cached_property
    def statistics(self) -> tuple[Statistic, ...]:
        """Its columns, in the order of column, statistic and window."""
        prefix = f"{self.name or self.source.name}_by_{'_'.join(spine for spine, _ in self.keys)}"
        return tuple(
            Statistic(
                f"{prefix}_{stat}_{window}" if column == "*" else f"{prefix}_{column}_{stat}_{window}",
                column,
                stat,
                window,
                None if window == "all" else microseconds(window),
            )
            for column, stats in self.stats.items()
            for stat in stats
            for window in self.over
        )

    def outputs(self, known: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
        _fitting_keys(self, known)
        return {each.name: self._dtype(each) for each in self.statistics}

    def _dtype(self, statistic: Statistic) -> pl.DataType:
        if statistic.stat in ("count", "n_unique"):
            return pl.Int64()
        if statistic.stat in ORDERED:
            return stored_type(self.source.schema[statistic.column], statistic.name)
        return pl.Float32()

    def meaning(self, name: str) -> dict[str, object]:
        each = next(each for each in self.statistics if each.name == name)
        used = [] if each.column == "*" else [each.column]
        return {
            "trailing": [each.column, each.stat, each.length],
            **_events_meaning(self, used, each.stat in ORDERED),
        }

    def chooses(self, known: Iterable[str] = ()) -> bool:
        """Whether a value depends on which of several rows with equal `known` columns is taken (see `breaks_ties`)."""
        return any(
            breaks_ties(self, [] if each.column == "*" else [each.column], each.stat in ORDERED, known)
            for each in self.statistics
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Latest:
    """Columns of the last event per key known before *t*, no older than `max_age`.

    All values come from the same row: a null in it stays null, and of rows with the same time one is taken, never a
        mixture.

    Args:
        source: events.
        by: key columns, as in `Trailing`.
        columns: the columns to take.
        max_age: an event older than this is not used; required, so that a source that has stopped does not go
            unnoticed.
        where: row-local condition on events; needs `name`.
        name: replaces the source's name in `{source}_{column}`.
    """

    source: Source
    by: By
    columns: str | tuple[str, ...]
    max_age: str | None = None
    where: pl.Expr | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        what = _of_events(self)
        if self.max_age is None:
            raise DefinitionError(
                f"{what}: max_age must state how old the row may be", "it is missing", 'Write max_age="6h"'
            )
        if self.max_age == "forever":
            _lifetime(self.source, f'{what}: max_age="forever"')
        else:
            microseconds(self.max_age, f"{what}: max_age")
        object.__setattr__(self, "columns", names(self.columns, f"{what}: columns"))
        self.source.require(self.columns, "columns")

    @functools.cached_property
    def condition(self) -> pl.Expr | None:
        """`where` as it is computed."""
        return None if self.where is None else _condition(self).expr

    @functools.cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        return pairs(self.by, "by")

    @functools.cached_property
    def length(self) -> int | None:
        """The greatest age in µs."""
        return None if self.max_age == "forever" else microseconds(self.max_age or "")

    @functools.cached_property
    def renamed(self) -> dict[str, str]:
        """Source column to feature name."""
        return {column: f"{self.name or self.source.name}_{column}" for column in self.columns}

    def outputs(self, known: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
        _fitting_keys(self, known)
        return {name: stored_type(self.source.schema[column], name) for column, name in self.renamed.items()}

    def meaning(self, name: str) -> dict[str, object]:
        column = next(column for column, renamed in self.renamed.items() if renamed == name)
        return {
            "latest": [column, self.length],
            **_events_meaning(self, [column], ordered=True),
        }

    def chooses(self, known: Iterable[str] = ()) -> bool:
        """Whether a value depends on which of several rows with equal `known` columns is taken (see `breaks_ties`)."""
        return any(breaks_ties(self, [column], ordered=True, known=known) for column in self.columns)


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup:
    """Columns of a dimension's row of the same key.  Its version is pinned for a run; a key without a row gives nulls.

    Args:
        source: a dimension (no `time`).
        by: key columns, as in `Trailing`; they identify the dimension's rows.
        columns: the columns to take.
        name: replaces the source's name in `{source}_{column}`.
    """

    source: Source
    by: By
    columns: str | tuple[str, ...]
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.source, Source):
            raise DefinitionError("Lookup must read a Source", f"it is {self.source!r}", "Write Lookup(planes, …)")
        what = f"Lookup in {self.source.name!r}"
        if self.source.time is not None:
            raise DefinitionError(
                f"{what}: its source must be a dimension, without time",
                f"it has time={self.source.time!r}",
                "Use Latest for rows that have a time",
            )
        if self.name is not None:
            identifier(self.name, f"{what}: name")
        self.source.require((column for _, column in pairs(self.by, f"{what}: by")), "by")
        object.__setattr__(self, "columns", names(self.columns, f"{what}: columns"))
        self.source.require(self.columns, "columns")

    where = condition = None

    @functools.cached_property
    def keys(self) -> tuple[tuple[str, str], ...]:
        return pairs(self.by, "by")

    @functools.cached_property
    def renamed(self) -> dict[str, str]:
        return {column: f"{self.name or self.source.name}_{column}" for column in self.columns}

    def outputs(self, known: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
        _fitting_keys(self, known)
        return {name: stored_type(self.source.schema[column], name) for column, name in self.renamed.items()}

    def meaning(self, name: str) -> dict[str, object]:
        column = next(column for column, renamed in self.renamed.items() if renamed == name)
        return {
            "lookup": column,
            "source": self.source.name,
            "keys": self.keys,
            "types": _types(self, [column]),
            **_reading(self.source),
        }

    def chooses(self, known: Iterable[str] = ()) -> bool:
        """Whether a value depends on which of several rows of a key with equal `known` columns is taken."""
        return not set(self.columns) <= {*known, *(key for _, key in self.keys)}


def limits_of(feature: Trailing | Latest | Lookup) -> dict[str, Bounds | None]:
    """The bounds of integer features; None for others."""
    schema = feature.source.schema
    if not isinstance(feature, Trailing):
        return {name: bounds_of(schema[column]) for column, name in feature.renamed.items()}
    return {
        each.name: COUNTED
        if each.stat in ("count", "n_unique")
        else bounds_of(schema[each.column])
        if each.stat in ORDERED
        else None
        for each in feature.statistics
    }


Feature = Derived | Trailing | Latest | Lookup


def _of_events(feature: Trailing | Latest) -> str:
    """The checks that Trailing and Latest have in common; returns the feature's name in errors."""
    kind = type(feature).__name__
    if not isinstance(feature.source, Source):
        raise DefinitionError(f"{kind} must read a Source", f"it is {feature.source!r}", f"Write {kind}(departures, …)")
    what = f"{kind} over {feature.source.name!r}"
    if feature.source.time is None:
        raise DefinitionError(
            f"{what}: its source must have a time", "it is a dimension", "Declare Source(…, time=…), or use Lookup"
        )
    feature.source.require((column for _, column in pairs(feature.by, f"{what}: by")), "by")
    if feature.name is not None:
        identifier(feature.name, f"{what}: name")
    if feature.where is not None:
        if feature.name is None:
            raise DefinitionError(
                f"{what}: a feature with a condition needs a name",
                f"where is {feature.where}",
                'Name what is counted: name="late_departures"',
            )
        require_row_local(feature.where, f"{what}: where")
        if dtype_of(feature.where, feature.source.schema, f"{what}: where") != pl.Boolean:
            raise DefinitionError(
                f"{what}: where must be a condition", f"it is {feature.where}", "Compare with something: pl.col(…) > 15"
            )
    return what


def _condition(feature: Trailing | Latest) -> Arithmetic:
    assert feature.where is not None
    return in_64_bits(feature.where, feature.source.schema)


def _lifetime(source: Source, what: str) -> None:
    if source.event_time is not None:
        raise DefinitionError(
            f"{what} must follow the time at which rows become known",
            f"the source has event_time={source.event_time!r}",
            "Use a window of some length, or a source without event_time",
        )


def _fitting_keys(feature: Trailing | Latest | Lookup, known: Mapping[str, pl.DataType]) -> None:
    """Checks that keys exist above the feature, and have the same kind on both sides."""
    what = f"{type(feature).__name__} over {feature.source.name!r}: by"
    for spine, column in feature.keys:
        if spine not in known:
            raise DefinitionError(
                f"{what} must be a column of the spine or a feature above",
                f"there is no {spine!r}",
                nearest(spine, known),
            )
        left, right = known[spine], feature.source.schema[column]
        if left.is_float() or right.is_float():
            raise DefinitionError(
                f"{what} must not be a float",
                f"{spine!r} is {left}, {column!r} is {right}",
                "Key by integers or strings",
            )
        if left != right and not (left.is_integer() and right.is_integer()):
            raise DefinitionError(
                f"{what} must have the same type on both sides",
                f"{spine!r} is {left}, {column!r} is {right}",
                "Cast one of them",
            )


def _events_meaning(feature: Trailing | Latest, used: list[str], ordered: bool) -> dict[str, object]:
    source = feature.source
    where = None if feature.where is None else canonical(feature.where)
    where_arithmetic = {} if feature.where is None or not _condition(feature).changed else {"arithmetic": ARITHMETIC}
    read = list(source.schema) if ordered and source.order is None else used
    if feature.where is not None:
        read = [*read, *columns_of(feature.where)]
    return {
        "source": source.name,
        "keys": feature.keys,
        "where": where,
        **where_arithmetic,
        "types": _types(feature, read),
        "time": source.time,
        "event_time": source.event_time,
        "not_before": str(instant(source.not_before)),
        "unique": source.unique,
        "order": source.order if ordered else None,
        **_reading(source),
    }


def _reading(source: Source) -> dict[str, object]:
    """How the rows of a source are read, where the definition says so."""
    return {"reading": source.reading} if source.reading else {}


def breaks_ties(feature: Trailing | Latest, used: Sequence[str], ordered: bool, known: Iterable[str] = ()) -> bool:
    """Whether a value of `feature` from columns `used` depends on which of several rows with equal `known` is used.

    Of rows that repeat a `unique` value at the same time, one stays; of rows with the same key and time, `ordered`
    statistics take one. Columns in which these rows are equal do not depend on which row it is.
    """
    source, keys = feature.source, {column for _, column in feature.keys}
    repeats = False
    if source.unique is not None:
        where = set() if feature.where is None else set(columns_of(feature.where))
        placed = {source.event_time} - {None}
        repeats = not {*used, *keys, *where, *placed} <= {*source.unique, source.time, *known}
    common = {*keys, source.event_time or source.time, *(source.order or ())}
    alone = source.unique is not None and set(source.unique) <= common  # no two rows are equal in all of these
    return repeats or (ordered and not alone and not set(used) <= {*common, *known})


def _types(feature: Trailing | Latest | Lookup, columns: list[str]) -> dict[str, str]:
    read = {*columns, *(column for _, column in feature.keys)}
    return {name: str(dtype) for name, dtype in feature.source.schema.items() if name in read}


def iter_sources(features: Iterable[Feature]) -> Iterator[Source]:
    """Every source that `features` read; a source may occur several times."""
    for feature in features:
        if not isinstance(feature, Derived):
            yield feature.source


def is_lifetime(feature: object) -> bool:
    """Whether some window of `feature` is a lifetime window."""
    if isinstance(feature, Trailing):
        return any(each.length is None for each in feature.statistics)
    return isinstance(feature, Latest) and feature.length is None
