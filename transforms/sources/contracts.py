"""Checks sources by their contract: files by their schema, single rows by rules.  Bad rows become dead letters."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from urllib.parse import unquote

import polars as pl
import pyarrow as pa

from schemas.durations import instant, microseconds
from schemas.errors import ContractError, nearest
from schemas.sources import TIME, Source
from transforms.records.columns import select, whole_numbers, with_columns
from transforms.records.times import EPOCH, MICROSECOND
from transforms.sources.conversions import (
    PROBLEM,
    LocalTimes,
    Reading,
    Twice,
    converted,
    local_times,
    problem_free,
    refusal,
)
from transforms.sources.dead_letters import ROW_DEAD_LETTERS
from transforms.sources.formats import CSV, JSON, format_of

# Polars prints times to the year 262 143.
_PRINTED = 2**62
# Begins the text that replaces bytes that are not UTF-8.  Unicode reserves this character, so no other text has it.
_NOT_UTF8 = "\U0010ffff"
# The years 1 to 9999, which Delta tables and Python's datetime can hold, `[from, to)` in µs and in days since 1970.
YEARS = (-62_135_596_800_000_000, 253_402_300_800_000_000)
_YEARS_DAYS = tuple(each // 86_400_000_000 for each in YEARS)
IN_YEARS = "a time is in the years 1 to 9999"


# What Arrow raises when it reads a file that is not Parquet, or whose footer is wrong.
READ_ERRORS = (OSError, pa.ArrowException, OverflowError, UnicodeDecodeError)


def not_whole(source: Source, path: str, error: BaseException) -> ContractError:
    """The error for a file that cannot be read."""
    reason = (str(error).splitlines() or ["unreadable"])[0]
    kind = {CSV: "CSV", JSON: "JSON lines"}.get(str(format_of(path)), "Parquet")
    return ContractError(
        f"Source {source.name!r}: every file must be complete {kind}",
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
        twice: which instant a local time is that occurs twice.  The later one for events, which are then not known too
            early, and the earlier one for spine rows, which then see no more than they may.
    """

    source: Source
    columns: tuple[str, ...]
    required: tuple[str, ...] = ()
    now: int = 2**62
    partitions: Partitions | None = None
    ordering: tuple[str, ...] = ()
    time_only: bool = False
    twice: Twice = "latest"

    @functools.cached_property
    def read(self) -> tuple[str, ...]:
        """All columns that are read, in the order of `columns` if there are no others, else as declared."""
        wanted = {*self.columns, *self.ordering, *self.source.columns_of_where}
        if len(wanted) == len(self.columns):
            return self.columns
        return tuple(name for name in self.source.schema if name in wanted)

    @functools.cached_property
    def by_weight(self) -> tuple[str, ...]:
        """`read`, first the columns that decide whether a row is the source's, then those by which it is checked."""
        return tuple(dict.fromkeys([*self.source.columns_of_where, *self.columns, *self.read]))

    @property
    def reading(self) -> Reading:
        """How times are read."""
        return Reading(self.source.zone, self.source.unit, self.twice)

    def reads_times_as(self, other: Contract) -> bool:
        """Whether it reads every time of the source as `other` does: local times that occur twice among them."""
        return self.source.zone is None or self.twice == other.twice

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
        """The columns that are read of a file's `table` in their declared types, and `PROBLEM` if a value has one.

        Raises:
            ContractError: a column is missing or of a type that is not read as the declared one.
        """
        self.check(table.schema, file)
        given = self.given(file)
        delta = {} if self.partitions is None else given  # elsewhere a file's own column counts
        inside = [name for name in self.read if name not in delta and name in table.schema.names]
        others = [name for name in self.read if name not in inside]
        try:
            columns = [*inside, *(name for name in PROBLEM if name in table.schema.names)]
            frame = readable(as_frame(table.select(columns)))
            values = [pl.Series(name, [given.get(name)]).new_from_index(0, table.num_rows) for name in others]
            text = {*(inside if is_text(table.schema) else ()), *(others if self.partitions is None else ())}
            return self.convert(pl.DataFrame([*frame.get_columns(), *values]), text)
        except (*READ_ERRORS, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
            raise not_whole(self.source, file, error) from None

    def convert(self, frame: pl.DataFrame, text: Collection[str] = ()) -> pl.DataFrame:
        """Columns as a file or message has them in their declared types, and `PROBLEM` if a value has one.

        Args:
            frame: all columns that are read, and perhaps `PROBLEM`.
            text: columns of text that stand for values of other types, as in CSV.
        """
        return self.declared(frame, {name: self.source.schema[name] for name in self.read}, text)

    def declared(
        self, frame: pl.DataFrame, types: Mapping[str, pl.DataType], text: Collection[str] = ()
    ) -> pl.DataFrame:
        """`convert`, of the columns of `types` alone."""
        weighty = {name: place for place, name in enumerate(self.by_weight) if name not in self.ordering}
        weighty |= dict.fromkeys(self.source.columns_of_where, 0)
        return converted(frame, types, self.reading, text, weighty)

    def times(self, table: pa.Table, file: str) -> tuple[pl.Series, LocalTimes]:
        """The times of a file's rows in µs and UTC, of `table` or as its path says, and a count of local ones."""
        name = str(self.source.time)
        if name in table.schema.names:
            frame = readable(as_frame(table.select([name])))
        else:
            frame = pl.DataFrame([pl.Series(name, [self.given(file).get(name)]).new_from_index(0, table.num_rows)])
        text = {name} if is_text(table.schema) or self.partitions is None else set[str]()
        local = local_times(frame[name], self.reading)
        return converted(frame, {name: TIME}, self.reading, text)[name], local

    def given(self, file: str) -> Mapping[str, object]:
        """Values of columns that a file's path stands for: partitions of a Delta table, or as Hive names folders."""
        if self.partitions is not None:
            return self.partitions.values.get(file, {})
        found = hive_values(file)
        return {name: found[name] for name in self.read if name in found} if found else {}

    def check(self, schema: pa.Schema, file: str) -> None:
        """Refuses a file whose columns are not read as declared; columns not declared are ignored.

        Raises:
            ContractError: the first of its `mismatches`.
        """
        found = self.mismatches(schema, file)
        if found:
            raise found[0].error

    def mismatches(self, schema: pa.Schema, file: str) -> list[Mismatch]:
        """The declared columns that a file does not have, or in a type that is not read as the declared one."""
        return [each for each in (self._mismatch(name, schema, file) for name in self.read) if each is not None]

    def _mismatch(self, name: str, schema: pa.Schema, file: str) -> Mismatch | None:
        declared = self.source.schema[name]
        mismatch = functools.partial(Mismatch, self.source, name, file)
        delta = self.partitions
        count = schema.names.count(name)
        if delta is not None and name in delta.types:
            found = delta.types[name]
        elif count > 1:
            return mismatch("twice", f"{count} columns {name!r}")
        elif count and (delta is None or name in delta.columns):
            found = schema.field(name).type
        elif delta is not None and name in delta.columns:
            found = delta.columns[name]
        elif delta is None and name in self.given(file):
            return self._mismatch_of_path(name, file)
        elif count:
            return mismatch(
                "missing", "has it, but the newest version of its table does not", nearest(name, schema.names)
            )
        else:
            return mismatch("missing", f"with {', '.join(schema.names)}", nearest(name, schema.names))
        if count and is_text(schema):
            return None
        reason = refusal(declared, found, self.reading)
        return None if reason is None else mismatch(reason, str(found), declaration(found))

    def _mismatch_of_path(self, name: str, file: str) -> Mismatch | None:
        value = pl.DataFrame({name: [self.given(file)[name]]}, schema={name: pl.String})
        declared = {name: self.source.schema[name]}
        if problem_free(converted(value, declared, self.reading, declared)):
            return None
        return Mismatch(self.source, name, file, "type", f"{value.item()!r} in its path", "pl.String")


@dataclasses.dataclass(frozen=True, eq=False)
class Mismatch:
    """A declared column that a file does not have as declared.

    Args:
        source: the source.
        column: its name.
        file: the file.
        kind: `"missing"`, `"twice"`, `"type"`, or what the source has to say for it to be read: `"zone"`, `"unit"`.
        found: what the file has.
        hint: the type to declare, or a name that is near.
        other: a file that has the column in a type that is read, and the type.
    """

    source: Source
    column: str
    file: str
    kind: str
    found: str
    hint: str = ""
    other: tuple[str, str] | None = None

    def beside(self, path: str, found: str) -> Mismatch:
        """The mismatch of a file, where another one has the column in a type that is read."""
        return dataclasses.replace(self, other=(path, found))

    @property
    def line(self) -> str:
        """What to write in the definition; empty if that is not known."""
        if self.kind == "zone":
            return 'zone="UTC" (or the zone that the times are in)'
        if self.kind == "unit":
            return 'unit="s" (or "ms", "us", "ns")'
        return f'"{self.column}": {self.hint}' if self.kind == "type" and self.hint else ""

    @property
    def error(self) -> ContractError:
        what, declared = f"Source {self.source.name!r}", self.source.schema[self.column]
        if self.kind == "missing":
            where = f"{self.file} {self.found}"
            return ContractError(f"{what}: every file must have the declared column {self.column!r}", where, self.hint)
        if self.kind == "twice":
            return ContractError(
                f"{what}: a file must have each declared column once",
                f"{self.file} has {self.found}",
                "Write the file again, each column under a name of its own",
            )
        if self.other is not None:
            path, right = self.other
            return ContractError(
                f"{what}: column {self.column!r} must have one type in every file, declared {declared}",
                f"{right} in {path}, and {self.found} in {self.file}",
                f"Write {self.file} again with {self.column!r} as {right}, or move it away",
            )
        if self.kind == "zone":
            rule = f"column {self.column!r} must be {declared}, and a date has no zone"
            if not self.found.startswith("date"):
                rule = "a timestamp must have a time zone, or its source must name one"
            return ContractError(
                f"{what}: {rule}",
                f"{self.column!r}: {self.found} in {self.file}",
                f"Write Source({self.source.name!r}, …, {self.line}), or write the file with a zone: "
                ".dt.replace_time_zone(…) and .dt.convert_time_zone('UTC') in Polars",
            )
        fix = "Correct the file"
        if self.line:
            fix = f"Correct the file, or write {self.line} in Source({self.source.name!r}, …)"
        return ContractError(f"{what}: column {self.column!r} must be {declared}", f"{self.found} in {self.file}", fix)

    @property
    def brief(self) -> str:
        """The mismatch among others."""
        wanted = {"missing": "is missing", "twice": "is there twice", "zone": "has no time zone", "unit": "has no unit"}
        declared = self.source.schema[self.column]
        return f"{self.source.name}.{self.column} {wanted.get(self.kind, f'is declared {declared}')}: {self.found}"


def refused(found: Sequence[Mismatch | ContractError]) -> ContractError:
    """One error for everything that is wrong with the files of some sources."""
    mismatches = [each for each in found if isinstance(each, Mismatch)]
    groups: dict[tuple[str, str, str, str], list[Mismatch]] = {}
    for each in mismatches:
        found_text = "" if each.kind == "missing" else each.found
        groups.setdefault((each.source.name, each.column, each.kind, found_text), []).append(each)
    others = [each for each in found if isinstance(each, ContractError)]
    if len(groups) + len(others) == 1:
        return others[0] if others else mismatches[0].error
    texts, lines = [], dict[str, dict[str, None]]()
    for (source, *_), group in groups.items():
        more = f" and {len(group) - 1:,} more files" if len(group) > 1 else ""
        texts.append(f"{group[0].brief} in {group[0].file}{more}")
        if group[0].line:
            lines.setdefault(source, {})[group[0].line] = None
    texts += [f"{each.value}" for each in others]
    write = "; ".join(f"in Source({name!r}, …): {', '.join(some)}" for name, some in lines.items())
    return ContractError(
        f"Every file must hold what its source declares; {len(texts)} things differ",
        "; ".join(f"({number}) {text}" for number, text in enumerate(texts, 1)),
        f"Correct the files, or write {write}" if write else "Correct the files",
    )


_DECLARATIONS = (
    (pa.types.is_boolean, "pl.Boolean"),
    (pa.types.is_integer, "pl.Int64"),
    (pa.types.is_floating, "pl.Float64"),
    (pa.types.is_decimal, "pl.Float64"),
    (pa.types.is_string, "pl.String"),
    (pa.types.is_large_string, "pl.String"),
    (pa.types.is_date, "pl.Date"),
    (pa.types.is_timestamp, 'pl.Datetime("us", "UTC")'),
)


def declaration(found: pa.DataType) -> str:
    """The type to declare for a file's column; empty if there is none."""
    kind = found.value_type if pa.types.is_dictionary(found) else found
    return next((text for applies, text in _DECLARATIONS if applies(kind)), "")


# In the metadata of a schema: its columns were read for what is declared, and text stands for values of any type.
TEXT = {b"millrace": b"text"}


def is_text(schema: pa.Schema) -> bool:
    return (schema.metadata or {}).get(b"millrace") == b"text"


@functools.lru_cache(4096)
def hive_values(path: str) -> Mapping[str, str | None]:
    """Columns that folders of a path stand for, as in `country=DE/part-0.parquet`."""
    if "=" not in path:
        return {}
    found: dict[str, str | None] = {}
    for part in path.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals and name:
            found[unquote(name)] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return found


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


def check_rows(contract: Contract, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Splits rows into those that satisfy the contract (NaN becomes null, and −0.0 becomes 0.0) and dead letters with
    the first rule that is broken.

    Returns:
        (rows that satisfy it, dead letters of schema `ROW_DEAD_LETTERS`: position in `frame`, field, rule, value,
        plausible time in µs or null).
    """
    if contract.source.condition is None and "__rule" not in frame.columns:
        return _check_values(contract, frame)
    numbered, problems = _with_problems(contract, rows_of_source(contract, frame.with_row_index("__at")))
    at = numbered["__at"]
    rows, dead_letters = _check_values(contract, numbered.drop("__at"))
    places = at.gather(dead_letters["place"]).cast(pl.Int64).alias("place")
    return rows, pl.concat([problems, dead_letters.with_columns(places)]).sort("place")


def rows_of_source(contract: Contract, frame: pl.DataFrame) -> pl.DataFrame:
    """The rows that are rows of the source, by its `where`, and those of which that cannot be told."""
    condition = contract.source.condition
    if condition is None:
        return frame
    mine = select(frame, condition.fill_null(False).alias("_"))["_"]
    if len(mine) != len(frame):  # it names no column
        mine = mine.new_from_index(0, len(frame))
    if "__rule" in frame.columns:
        # The value of a column of `where` has a problem, or the whole line has.
        mine |= frame["__field"].is_in(["", *contract.source.columns_of_where]).fill_null(False)
    return frame.filter(mine)


def _with_problems(contract: Contract, numbered: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows without a problem, and dead letters of those with one."""
    if "__rule" not in numbered.columns:
        return numbered, pl.DataFrame(schema=ROW_DEAD_LETTERS)
    bad = numbered["__rule"].is_not_null()
    dead_letters = numbered.filter(bad).select(
        pl.col("__at").cast(pl.Int64).alias("place"),
        pl.col("__field").alias("field"),
        pl.col("__rule").alias("rule"),
        pl.col("__value").fill_null("null").alias("value"),
        _plausible_time(contract).alias("time"),
    )
    return numbered.filter(~bad).drop(PROBLEM), dead_letters.cast(ROW_DEAD_LETTERS)  # type: ignore[arg-type]


def _plausible_time(contract: Contract) -> pl.Expr:
    """A row's time in µs; null if there is none that is plausible."""
    if contract.source.time is None:
        return pl.lit(None, pl.Int64)
    moment = pl.col(contract.source.time).dt.epoch("us")
    return pl.when((moment >= contract.earliest) & (moment < contract.latest)).then(moment)


def _check_values(contract: Contract, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """`check_rows` of rows that `where` has let through."""
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

    return bad.select(
        pl.col("place").cast(pl.Int64),
        first([pl.lit(field) for field, _, _ in rules]).alias("field"),
        first([pl.lit(rule) for _, rule, _ in rules]).alias("rule"),
        first([_shown(field, bad.schema[field]).fill_null("null") for field, _, _ in rules]).alias("value"),
        _plausible_time(contract).alias("time"),
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


def all_in_years(times: pl.Series) -> bool:
    """Whether each date or time (µs) that is not null is in the years 1 to 9999."""
    numbers = whole_numbers(times)
    first, end = _YEARS_DAYS if times.dtype == pl.Date else YEARS
    known = numbers.drop_nulls().to_numpy() if numbers.null_count() else numbers.to_numpy()
    return not len(known) or bool(first <= known.min() and known.max() < end)


def outside_years(times: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Whether each date or time (µs) is outside the years 1 to 9999; null where it is null."""
    first, end = _YEARS_DAYS if dtype == pl.Date else YEARS
    return ~times.to_physical().is_between(first, end, closed="left")
