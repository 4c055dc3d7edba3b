"""Checks sources by their contract: files by their schema, single rows by rules.  Bad rows become dead letters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Mapping

import polars as pl
import pyarrow as pa

from schemas.durations import instant, microseconds
from schemas.errors import ContractError, nearest
from schemas.sources import Source
from transforms.records.columns import select, with_columns
from transforms.records.times import EPOCH, MICROSECOND
from transforms.sources.dead_letters import ROW_DEAD_LETTERS

# Polars prints times to the year 262 143.
_PRINTED = 2**62
# Begins the text that replaces bytes that are not UTF-8.  Unicode reserves this character, so no other text has it.
_NOT_UTF8 = "\U0010ffff"
# The years 1 to 9999, which Delta tables and Python's datetime can hold, `[from, to)` in µs and in days since 1970.
YEARS = (-62_135_596_800_000_000, 253_402_300_800_000_000)
_YEARS_DAYS = tuple(each // 86_400_000_000 for each in YEARS)
IN_YEARS = "a time is in the years 1 to 9999"
_WIDTHS = {pl.Int8: 8, pl.Int16: 16, pl.Int32: 32, pl.Int64: 64}


# What Arrow raises when it reads a file that is not Parquet, or whose footer is wrong.
READ_ERRORS = (OSError, pa.ArrowException, OverflowError, UnicodeDecodeError)


def not_whole(source: Source, path: str, error: BaseException) -> ContractError:
    """The error for a file that cannot be read."""
    reason = (str(error).splitlines() or ["unreadable"])[0]
    return ContractError(
        f"Source {source.name!r}: every file is whole Parquet",
        f"{path}: {reason}",
        "Write the file again (aside, then rename), or remove it",
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Partitions:
    """Columns of a Delta table that its log declares, but that a file may lack.

    Args:
        types: types of the partition columns.
        values: values of the partition columns, by file.
        columns: types of the table's other columns.  Older files lack a column that was added later; it is null there.
    """

    types: Mapping[str, pa.DataType]
    values: Mapping[str, Mapping[str, object]]
    columns: Mapping[str, pa.DataType] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Contract:
    """A source's rules for one use of it.

    Args:
        source: the source.
        columns: the columns by which rows are checked.
        required: columns besides the time that must not be null: a spine's key.
        now: µs since 1970; times that are later by more than `source.ahead` are implausible.
        partitions: columns of a Delta table that its files may lack (see `inventory.survey`).
        ordering: further columns that are read only to put rows in order (see `FeatureView.columns_ordering`).
        time_only: whether rows are checked by their time alone, and not by what views need of them.
    """

    source: Source
    columns: tuple[str, ...]
    required: tuple[str, ...] = ()
    now: int = 2**62
    partitions: Partitions | None = None
    ordering: tuple[str, ...] = ()
    time_only: bool = False

    @functools.cached_property
    def read(self) -> tuple[str, ...]:
        """All columns that are read: in the order of `columns` if there is no `ordering`, otherwise as declared."""
        if not self.ordering:
            return self.columns
        wanted = {*self.columns, *self.ordering}
        return tuple(name for name in self.source.schema if name in wanted)

    @functools.cached_property
    def latest(self) -> int:
        """Times from this one on are implausible, µs."""
        return min(self.now, 2**62) + microseconds(self.source.ahead, zero=True) + 1

    @functools.cached_property
    def earliest(self) -> int:
        """Times before this are implausible, µs."""
        return (instant(self.source.not_before) - EPOCH) // MICROSECOND

    @functools.cached_property
    def rules(self) -> list[tuple[str, str, pl.Expr]]:
        """(field, rule, condition under which a row breaks it). The first broken rule is the reason for a rejection."""
        source = self.source
        rules: list[tuple[str, str, pl.Expr]] = []
        for name in (source.time, None if self.time_only else source.event_time):
            if name is None:
                continue
            moment = pl.col(name).dt.epoch("us")
            rules.append((name, "a time is present", pl.col(name).is_null()))
            rules.append(
                (
                    name,
                    f"a time is not before {instant(source.not_before):%Y-%m-%d} (not_before)",
                    moment < self.earliest,
                )
            )
            rules.append(
                (name, f"a time is at most {source.ahead} ahead of the run's clock (ahead)", moment >= self.latest)
            )
        if self.time_only:
            return rules
        if source.time is not None and source.event_time is not None:
            rules.append(
                (
                    source.event_time,
                    f"nothing is known before it happens: {source.event_time} ≤ {source.time}",
                    pl.col(source.event_time) > pl.col(source.time),
                )
            )
        for name in (*self.required, *(source.unique or ())):
            rules.append((name, "a key is present", pl.col(name).is_null()))
        for name in self.columns:
            dtype = source.schema[name]
            if dtype == pl.String:
                rules.append((name, "a text is UTF-8", pl.col(name).str.starts_with(_NOT_UTF8)))
            if dtype.is_temporal() and name not in (source.time, source.event_time):
                rules.append((name, IN_YEARS, outside_years(pl.col(name), dtype)))
            if dtype.is_float():
                rules.append((name, "a number is finite", pl.col(name).is_infinite()))
            if dtype == pl.Float64:
                rules.append(
                    (name, "a number fits float32 (|x| < 3.4e38)", pl.col(name).cast(pl.Float32).is_infinite())
                )
        return rules

    @functools.cached_property
    def breaks(self) -> pl.Expr:
        """Whether a row breaks some rule, as the column `_`."""
        conditions = [condition.fill_null(False) for _, _, condition in self.rules]
        return pl.any_horizontal(conditions or [pl.lit(False)]).alias("_")

    def cast(self, table: pa.Table, file: str) -> pl.DataFrame:
        """The declared columns of a file's `table` in their declared types.

        Raises:
            ContractError: a column is missing or of a type that does not hold the declared one.
        """
        self.check(table.schema, file)
        given = {} if self.partitions is None else self.partitions.values.get(file, {})
        inside = [name for name in self.read if name not in given and name in table.schema.names]
        try:
            frame = readable(as_frame(table.select(inside)))
            if len(inside) < len(self.read):
                types = {name: self.source.schema[name] for name in self.read if name not in inside}
                values = pl.DataFrame({name: [given.get(name)] for name in types}).cast(types)  # type: ignore[arg-type]
                frame = pl.DataFrame(
                    {
                        name: frame[name] if name in inside else values[name].new_from_index(0, table.num_rows)
                        for name in self.read
                    }
                )
            return frame.cast({name: self.source.schema[name] for name in self.read})
        except (*READ_ERRORS, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise not_whole(self.source, file, error) from None

    def check(self, schema: pa.Schema, file: str) -> None:
        """Refuses a file whose columns do not have the declared types; columns that are not declared are ignored."""
        what = f"Source {self.source.name!r}"
        given = {} if self.partitions is None else self.partitions.types
        added = {} if self.partitions is None else self.partitions.columns
        for name in self.read:
            count = 0 if name in given else schema.names.count(name)
            if count > 1:
                raise ContractError(
                    f"{what}: a file has each declared column once",
                    f"{count} columns {name!r} in {file}",
                    "Write the file again, each column under a name of its own",
                )
            if name in given:
                found = given[name]
            elif count and (self.partitions is None or name in added):
                found = schema.field(name).type
            elif name in added:
                found = added[name]
            else:
                where = f"{file} with {', '.join(schema.names)}"
                if count:
                    where = f"{file} has it, but the newest version of its table does not"
                raise ContractError(
                    f"{what}: every file has the declared column {name!r}", where, nearest(name, schema.names)
                )
            declared = self.source.schema[name]
            if pa.types.is_timestamp(found) and found.tz is None and declared.is_temporal():
                raise ContractError(
                    f"{what}: a timestamp names its time zone",
                    f"{name!r}: {found} in {file}",
                    "Write it with a zone: .dt.replace_time_zone(…) and .dt.convert_time_zone('UTC') in Polars",
                )
            if not type_holds(declared, found):
                raise ContractError(
                    f"{what}: column {name!r} is {declared}",
                    f"{found} in {file}",
                    "Correct the file, or the declaration if it was wrong",
                )


def as_frame(table: pa.Table) -> pl.DataFrame:
    """Columns of a file for Polars: without the writer's metadata, and with times of any zone as UTC, which is how
    Arrow stores them."""
    columns: dict[str, pa.ChunkedArray] = {}
    for name, column in zip(table.column_names, _with_valid_text(table).columns, strict=True):
        zoned = pa.types.is_timestamp(column.type) and column.type.tz not in (None, "UTC")  # a cast imports pandas
        column = column.cast(pa.timestamp(column.type.unit, "UTC")) if zoned else column
        seconds = pa.types.is_timestamp(column.type) and column.type.unit == "s"
        columns[name] = _of_seconds(column) if seconds else column
    if not columns:
        return pl.DataFrame()
    return pl.DataFrame(pl.from_arrow(pa.table(columns)))


def _of_seconds(times: pa.ChunkedArray) -> pa.Array:
    """Times of seconds in µs, those beyond as the furthest there is: Polars would let them wrap around."""
    numbers = pl.Series(pl.from_arrow(times.cast(pa.int64())))
    most = (2**63 - 1) // 1_000_000
    return (numbers.clip(-most, most) * 1_000_000).to_arrow().cast(pa.timestamp("us", times.type.tz))


def _with_valid_text(table: pa.Table) -> pa.Table:
    """`table`, with bytes that are not UTF-8 replaced by `_NOT_UTF8` and the bytes in hexadecimal.

    Arrow does not check the text of a Parquet file or a message when it reads it, and Polars relies on it.
    """
    for i, field in enumerate(table.schema):
        text = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_string(text) or pa.types.is_large_string(text):
            try:
                table.column(i).validate(full=True)
            except pa.ArrowInvalid:
                chunks = [_valid_text(chunk) for chunk in table.column(i).chunks]
                table = table.set_column(i, field.name, pa.chunked_array(chunks, pa.large_string()))
    return table


def _valid_text(texts: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(texts.type):
        return _valid_text(texts.dictionary).take(texts.indices)
    with contextlib.suppress(pa.ArrowInvalid):
        texts.validate(full=True)
        return texts.cast(pa.large_string())
    wide = pa.types.is_large_string(texts.type)
    kind = pa.large_binary() if wide else pa.binary()
    raw = pa.Array.from_buffers(kind, len(texts), texts.buffers(), texts.null_count, texts.offset)
    # Value by value: only arrays with such bytes get here, and Polars refuses to cast any of their values.
    return pa.array([_text_of(value) for value in raw.to_pylist()], pa.large_string())


def _text_of(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return f"{_NOT_UTF8}bytes {value.hex()}" if value is not None else None


def readable(frame: pl.DataFrame) -> pl.DataFrame:
    """`frame` with times in ms converted to µs; times that do not fit become the first or last that does. A cast by
    Polars would panic."""
    wide = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Datetime) and dtype.time_unit == "ms"]
    most = (2**63 - 1) // 1000
    return frame.with_columns(
        (pl.col(name).to_physical().clip(-most, most) * 1000).cast(pl.Datetime("us", frame.schema[name].time_zone))  # type: ignore[attr-defined]
        for name in wide
    )


def fits(declared: pl.DataType, found: pa.DataType) -> bool:
    """Whether a file's column of Arrow type `found` is accepted for a column declared as Polars type `declared`."""
    return type_holds(declared, found) and not (pa.types.is_timestamp(found) and found.tz is None)


def type_holds(declared: pl.DataType, found: pa.DataType) -> bool:
    """Whether every value of Arrow type `found` is also a value of Polars type `declared`."""
    if pa.types.is_dictionary(found):
        return type_holds(declared, found.value_type)
    if declared == pl.String:
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if declared == pl.Boolean:
        return pa.types.is_boolean(found)
    if declared == pl.Date:
        return pa.types.is_date(found)
    if declared.is_temporal():
        return pa.types.is_timestamp(found) and found.tz is not None
    if declared.is_integer():
        widest = next(bits for dtype, bits in _WIDTHS.items() if declared == dtype)
        return pa.types.is_integer(found) and (
            found.bit_width < widest or (found.bit_width == widest and pa.types.is_signed_integer(found))
        )
    exact = 53 if declared == pl.Float64 else 24
    if pa.types.is_integer(found):
        return found.bit_width <= exact
    return pa.types.is_floating(found) and found.bit_width <= (64 if declared == pl.Float64 else 32)


def check_rows(contract: Contract, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Splits rows into those that satisfy the contract (NaN becomes null, and −0.0 becomes 0.0) and dead letters with
    the first rule that is broken.

    Returns:
        (rows that satisfy it, dead letters of schema `ROW_DEAD_LETTERS`: position in `frame`, field, rule, value,
        plausible time in µs or null).
    """
    floats = [name for name in frame.columns if frame[name].dtype.is_float()]
    broken = select(frame, contract.breaks)["_"]
    if len(broken) != len(frame):
        broken = pl.Series([False]).new_from_index(0, len(frame))
    dead_letters = pl.DataFrame(schema=ROW_DEAD_LETTERS)
    if broken.any():
        dead_letters = _dead_letters(contract, frame.with_row_index("place").filter(broken), contract.rules)
        frame = frame.filter(~broken)
    if floats:
        frame = with_columns(frame, pl.col(floats).fill_nan(None) + 0.0)
    return frame, dead_letters


def _dead_letters(contract: Contract, bad: pl.DataFrame, rules: list[tuple[str, str, pl.Expr]]) -> pl.DataFrame:
    def first(what: list[pl.Expr]) -> pl.Expr:
        return pl.coalesce(
            [pl.when(condition).then(value) for (_, _, condition), value in zip(rules, what, strict=True)]
        )

    time = pl.lit(None, pl.Int64)
    if contract.source.time is not None:
        moment = pl.col(contract.source.time).dt.epoch("us")
        time = pl.when((moment >= contract.earliest) & (moment < contract.latest)).then(moment)
    return bad.select(
        pl.col("place").cast(pl.Int64),
        first([pl.lit(field) for field, _, _ in rules]).alias("field"),
        first([pl.lit(rule) for _, rule, _ in rules]).alias("rule"),
        first([_shown(field, bad.schema[field]).fill_null("null") for field, _, _ in rules]).alias("value"),
        time.alias("time"),
    ).cast(ROW_DEAD_LETTERS)  # type: ignore[arg-type]


def _shown(name: str, dtype: pl.DataType) -> pl.Expr:
    """A column's values as text; times beyond those that Polars can print become the last that it can print."""
    if isinstance(dtype, pl.Datetime):
        return pl.col(name).to_physical().clip(-_PRINTED, _PRINTED).cast(dtype).cast(pl.String)
    if dtype == pl.Date:
        return pl.col(name).to_physical().clip(*_YEARS_DAYS).cast(pl.Date).cast(pl.String)
    if dtype == pl.String:
        return pl.col(name).str.strip_prefix(_NOT_UTF8)
    return pl.col(name).cast(pl.String)


def outside_years(times: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Whether each date or time (µs) is outside the years 1 to 9999; null where it is null."""
    first, end = _YEARS_DAYS if dtype == pl.Date else YEARS
    return ~times.to_physical().is_between(first, end, closed="left")
