"""Columns as files have them, converted to the types that a source declares.  A value that would change is a problem.

A type that holds every value of a file's column needs no check.  Other types are taken as well where most values fit:
whole numbers written as floats, decimals, unsigned integers, times without a zone or as text.  There each value is
checked, and the row of one that does not fit becomes a dead letter.
"""

from __future__ import annotations

import calendar
import dataclasses
from collections.abc import Collection, Mapping
from datetime import date
from decimal import Decimal
from typing import Literal

import polars as pl
import pyarrow as pa

from schemas.sources import TIME, UNITS

# Columns beside those of a source, where a value has a problem: the field, the rule that it breaks, and its text.
PROBLEM = {"__field": pl.String, "__rule": pl.String, "__value": pl.String}
_WIDTHS = {pl.Int8: 8, pl.Int16: 16, pl.Int32: 32, pl.Int64: 64}
_DAY = 86_400_000_000
# Times are kept within these bounds, µs: beyond the years 1 to 9999, and far from where they would wrap around.
_LEAST, _MOST = -62_135_596_800_000_000 - 4 * _DAY, 253_402_300_800_000_000 + 4 * _DAY
# From the year 2100 on Polars knows no changes of clocks, µs.  They are as in the last years before that begin on the
# same day of the week: twice the number of that day, and one more in a leap year → the first day.
_UNKNOWN = 4_102_444_800_000_000
_LIKE = {
    date(year, 1, 1).isoweekday() * 2 + calendar.isleap(year): (date(year, 1, 1) - date(1970, 1, 1)).days
    for year in range(2072, 2100)
}
# Whole numbers up to here have one float of their own.
_EXACT = 2**53
# What stands for no value in text, where the column is no text itself.  An empty value always does.
NULLS = ("", "NA", "N/A", "NULL", "null", "None", "\\N")
TRUE, FALSE = ("true", "t", "yes", "1", "1.0"), ("false", "f", "no", "0", "0.0")
# A date, and perhaps a time of day with a fraction and an offset, as ISO 8601 and programs write them.
_ISO = (
    r"^(\d{4}-\d{2}-\d{2})"
    r"(?:[T ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d{1,6})\d*)?)?(?: ?(Z|z|UTC|[+-]\d{2}(?::?\d{2})?))?)?$"
)

_DATE = r"^(\d{4}-\d{2}-\d{2})(?:[T ]00:00(?::00(?:[.,]0+)?)?)?$"

# Which instant a local time is that a clock shows twice; None: neither, its row is a dead letter.
Twice = Literal["earliest", "latest"] | None


@dataclasses.dataclass(frozen=True)
class Reading:
    """How times are read.

    Args:
        zone: of times that do not name one; None: they are refused.
        unit: of times that are numbers; None: they are refused.
        twice: the instant of a local time that occurs twice.
    """

    zone: str | None = None
    unit: str | None = None
    twice: Twice = "latest"


def type_holds(declared: pl.DataType, found: pa.DataType) -> bool:
    """Whether every value of Arrow type `found` is one of Polars type `declared`, so that none needs a check."""
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
        widest = _width(declared)
        return pa.types.is_integer(found) and (
            found.bit_width < widest or (found.bit_width == widest and pa.types.is_signed_integer(found))
        )
    exact = 53 if declared == pl.Float64 else 24
    if pa.types.is_integer(found):
        return found.bit_width <= exact
    return pa.types.is_floating(found) and found.bit_width <= (64 if declared == pl.Float64 else 32)


def _width(declared: pl.DataType) -> int:
    return next(bits for dtype, bits in _WIDTHS.items() if declared == dtype)


def refusal(declared: pl.DataType, found: pa.DataType, reading: Reading) -> str | None:
    """Why a file's column of Arrow type `found` is not read as `declared`; None if it is.

    Returns:
        `"type"`, or what the source has to say for it to be read: `"zone"` or `"unit"`.
    """
    if pa.types.is_dictionary(found):
        return refusal(declared, found.value_type, reading)
    if pa.types.is_null(found):
        return None
    if declared.is_temporal():
        if pa.types.is_string(found) or pa.types.is_large_string(found):
            return None
        if declared == pl.Date:
            return None if pa.types.is_date(found) else "type"
        if (pa.types.is_timestamp(found) and found.tz is None) or pa.types.is_date(found):
            return None if reading.zone else "zone"
        if pa.types.is_integer(found) or pa.types.is_floating(found):
            return None if reading.unit else "unit"
    if type_holds(declared, found):
        return None
    if declared.is_integer():
        same = pa.types.is_integer(found) and found.bit_width == _width(declared)
        return None if same or pa.types.is_floating(found) or pa.types.is_decimal128(found) else "type"
    if declared.is_float():
        return None if pa.types.is_integer(found) or pa.types.is_decimal128(found) else "type"
    return "type"


# A column in its declared type, and per rule which of its values break it.
_Conversion = tuple[pl.Series, list[tuple[str, pl.Series]]]


def converted(
    frame: pl.DataFrame,
    declared: Mapping[str, pl.DataType],
    reading: Reading,
    text: Collection[str] = (),
    weights: Mapping[str, int] | None = None,
) -> pl.DataFrame:
    """`frame` in its declared types; with the columns `PROBLEM` if some value does not fit.

    Args:
        frame: the declared columns, and perhaps `PROBLEM` of rows that had one before.
        declared: the types.
        reading: how times are read.
        text: columns of text that stand for values of other types, as in CSV.
        weights: columns by whose values rows are judged: of a row's problems that of the least number is named.  A
            value of another column that does not fit is null.
    """
    columns: dict[str, pl.Series] = {}
    problems: list[pl.DataFrame] = []
    judged = weights if weights is not None else {name: place for place, name in enumerate(declared)}
    for name in sorted(declared, key=lambda name: judged.get(name, len(judged))):
        series, broken = _converted(frame[name], declared[name], reading, name in text)
        columns[name] = series.alias(name)
        problems += [
            pl.DataFrame(
                {
                    "__at": (at := which.arg_true()),
                    "__field": pl.Series([name], dtype=pl.String).new_from_index(0, len(at)),
                    "__rule": pl.Series([rule], dtype=pl.String).new_from_index(0, len(at)),
                    "__value": _as_text(frame[name].gather(at)),
                }
            )
            for rule, which in broken
            if name in judged and which.any()
        ]
    before = [frame[name] for name in PROBLEM if name in frame.columns]
    if before:
        known = before[0].is_in(["", *judged])
        before = [each.set(~known, None) for each in before]
    result = pl.DataFrame([*(columns[name] for name in declared), *before])
    if not problems:
        return result
    first = pl.concat(problems).unique("__at", keep="first", maintain_order=True)
    reasons = pl.DataFrame({"__at": pl.int_range(len(frame), dtype=pl.get_index_type(), eager=True)}).join(
        first, on="__at", how="left", maintain_order="left"
    )
    if not before:
        return result.with_columns(reasons[name] for name in PROBLEM)
    earlier = result["__rule"].is_not_null()
    return result.with_columns(result[name].zip_with(earlier, reasons[name]).alias(name) for name in PROBLEM)


def problem_free(frame: pl.DataFrame) -> bool:
    """Whether no row of a frame from `converted` has a problem."""
    return "__rule" not in frame.columns or frame["__rule"].null_count() == len(frame)


def with_problems(frames: list[pl.DataFrame]) -> list[pl.DataFrame]:
    """Frames of which some have the columns `PROBLEM`, so that all have them if any does."""
    if len({"__rule" in each.columns for each in frames}) < 2:
        return frames
    nothing = [pl.lit(None, pl.String).alias(name) for name in PROBLEM]
    return [each if "__rule" in each.columns else each.with_columns(nothing) for each in frames]


def without_problems(frame: pl.DataFrame) -> pl.DataFrame:
    """The rows of a frame from `converted` that have none."""
    return frame.filter(pl.col("__rule").is_null()).drop(PROBLEM) if "__rule" in frame.columns else frame


def _as_text(values: pl.Series) -> pl.Series:
    if isinstance(values.dtype, pl.Datetime):
        values = values.to_physical().clip(-(2**62), 2**62).cast(values.dtype)
    return values.cast(pl.String, strict=False).str.slice(0, 300)


def _converted(series: pl.Series, declared: pl.DataType, reading: Reading, text: bool) -> _Conversion:
    found = series.dtype
    if isinstance(found, pl.Categorical | pl.Enum):
        series, found = series.cast(pl.String), pl.String()
    if found == declared or found == pl.Null:
        return series.cast(declared), []
    if found == pl.String and (text or declared.is_temporal()):
        return _of_text(series, declared, reading)
    if declared == TIME:
        return _time(series, reading)
    if isinstance(found, pl.Decimal):
        return _of_decimal(series, declared)
    if declared.is_integer():
        return _whole(series, declared) if found.is_float() else _fitting(series, declared)
    if declared.is_float() and found.is_integer():
        value = series.cast(declared)
        lost = (value.cast(found, strict=False) != series).fill_null(True) & series.is_not_null()
        return value, [(f"a whole number keeps all its digits as {declared}", lost)]
    return series.cast(declared), []


def _fitting(series: pl.Series, declared: pl.DataType) -> _Conversion:
    value = series.cast(declared, strict=False)
    return value, [(f"a value is {declared}", value.is_null() & series.is_not_null())]


def _whole(series: pl.Series, declared: pl.DataType) -> _Conversion:
    """Floats that stand for integers.  NaN is null, as pandas writes it."""
    wide = series.cast(pl.Float64).fill_nan(None)
    whole = (wide == wide.floor()) & (wide.abs() <= _EXACT)
    value = wide.set(~whole, None).cast(pl.Int64).cast(declared, strict=False)
    return value, [
        (f"a float is a whole number that {declared} and 53 bits hold", value.is_null() & wide.is_not_null())
    ]


def _of_decimal(series: pl.Series, declared: pl.DataType) -> _Conversion:
    digits = series.cast(pl.String)
    if declared.is_integer():
        value = digits.str.replace(r"\.0*$", "").cast(declared, strict=False)
        return value, [(f"a decimal is a whole number that {declared} holds", value.is_null() & series.is_not_null())]
    value = digits.cast(pl.Float64).cast(declared)
    few = 15 if declared == pl.Float64 else 6  # so many digits come back from every float
    significant = digits.str.strip_prefix("-").str.replace(".", "", literal=True).str.strip_chars("0")
    lost = pl.Series([False]).new_from_index(0, len(series))
    many = (significant.str.len_bytes() > few).fill_null(False).arg_true()
    if len(many):  # one by one: no column of floats has room for such digits
        shortest = value.gather(many).cast(pl.String).to_list()
        lost = lost.scatter(
            many,
            [Decimal(was) != Decimal(now) for was, now in zip(digits.gather(many).to_list(), shortest, strict=True)],
        )
    return value, [(f"a decimal keeps all its digits as {declared}", lost)]


# Times


def _time(series: pl.Series, reading: Reading) -> _Conversion:
    found = series.dtype
    if isinstance(found, pl.Datetime) and found.time_zone is not None:
        return series.cast(TIME), []
    if isinstance(found, pl.Datetime) or found == pl.Date:
        return _in_zone(series.cast(pl.Datetime("us")), reading)
    return _micros(series, reading.unit).cast(TIME), []


def _micros(numbers: pl.Series, unit: str | None) -> pl.Series:
    """µs since 1970; what is beyond the years 1 to 9999 stays beyond them."""
    times, parts = UNITS[str(unit)]
    if not numbers.dtype.is_integer():
        wide = numbers.cast(pl.Float64).fill_nan(None)
        return (wide * times / parts).clip(float(_LEAST), float(_MOST)).round().cast(pl.Int64)
    if numbers.dtype == pl.UInt64:
        numbers = numbers.clip(0, 2**63 - 1)
    wide = numbers.cast(pl.Int64)
    return wide // parts if parts > 1 else wide.clip(_LEAST // times, _MOST // times) * times


def _in_zone(local: pl.Series, reading: Reading) -> _Conversion:
    """Local times as instants."""
    zone = str(reading.zone)
    early, late = _instants(local, zone)
    problems = [(f"a local time exists in {zone}", early.is_null() & local.is_not_null())]
    if reading.twice is None:
        rule = f"a local time that occurs twice in {zone} has an offset, where its row is a spine row and an event"
        problems.append((rule, (early != late).fill_null(False)))
    return late if reading.twice == "latest" else early, problems


def _instants(local: pl.Series, zone: str) -> tuple[pl.Series, pl.Series]:
    """The first and the last instant of each local time; null where there is none."""
    micros = local.to_physical().clip(_LEAST, _MOST)
    far = (micros >= _UNKNOWN).fill_null(False)
    shift = _to_a_like_year(micros.set(~far, None)).fill_null(0) if far.any() else None
    inside = (micros if shift is None else micros - shift).cast(pl.Datetime("us"))

    def instants(twice: Literal["earliest", "latest"]) -> pl.Series:
        found = inside.dt.replace_time_zone(zone, ambiguous=twice, non_existent="null").dt.convert_time_zone("UTC")
        return found if shift is None else (found.to_physical() + shift).cast(TIME)

    return instants("earliest"), instants("latest")


def _to_a_like_year(micros: pl.Series) -> pl.Series:
    """How much later local times are than in a year that begins on the same day of the week and is as long."""
    first = micros.cast(pl.Datetime("us")).dt.truncate("1y").cast(pl.Date)
    kind = first.dt.weekday() * 2 + first.dt.is_leap_year().cast(pl.Int8)
    return (first.to_physical() - kind.replace_strict(_LIKE, default=None, return_dtype=pl.Int32)).cast(pl.Int64) * _DAY


@dataclasses.dataclass(frozen=True)
class LocalTimes:
    """Number of local times that occur twice, and of those that do not exist."""

    twice: int = 0
    absent: int = 0

    def __add__(self, other: LocalTimes) -> LocalTimes:
        return LocalTimes(self.twice + other.twice, self.absent + other.absent)


def local_times(series: pl.Series, reading: Reading) -> LocalTimes:
    """Counts local times of a column that is declared as a time."""
    if reading.zone is None:
        return LocalTimes()
    if series.dtype == pl.String:
        parts = _parts(series.str.strip_chars())
        local = parts["local"].set(parts["offset"].is_not_null(), None)
    elif series.dtype == pl.Date or (isinstance(series.dtype, pl.Datetime) and series.dtype.time_zone is None):
        local = series.cast(pl.Datetime("us")).to_physical()
    else:
        return LocalTimes()
    local = local.cast(pl.Datetime("us"))
    early, late = _instants(local, reading.zone)
    return LocalTimes(int((early != late).sum()), early.null_count() - local.null_count())


# Text


def _of_text(series: pl.Series, declared: pl.DataType, reading: Reading) -> _Conversion:
    if declared == pl.String:
        return series, []
    stripped = series.str.strip_chars()
    text = stripped.set(stripped.is_in(NULLS), None)
    if declared == TIME:
        return _time_of_text(text, reading)
    if declared == pl.Date:
        value = text.str.extract(_DATE).str.to_date("%Y-%m-%d", strict=False)
    elif declared == pl.Boolean:
        small = text.str.to_lowercase()
        value = small.is_in(TRUE).set(~small.is_in([*TRUE, *FALSE]), None)
    elif declared.is_float():
        value = text.cast(pl.Float64, strict=False).cast(declared)
    else:
        value = _whole_of_text(text, declared)
    missing = value.is_null() & text.is_not_null()
    if missing.any() and declared.is_integer():
        missing &= text.cast(pl.Float64, strict=False).is_nan().not_().fill_null(True)
    return value, [(f"a value is {declared}", missing)]


def _whole_of_text(text: pl.Series, declared: pl.DataType) -> pl.Series:
    """Integers, also such as `5.0`, which pandas writes where a column has nulls, and `1e3`."""
    value = text.cast(declared, strict=False)
    rest = (value.is_null() & text.is_not_null()).arg_true()
    if not len(rest):
        return value
    some = text.gather(rest)
    dotted = some.str.extract(r"^([+-]?\d+)\.0*$").cast(declared, strict=False)
    scientific = some.str.contains("[eE]")
    floats, _ = _whole(some.cast(pl.Float64, strict=False).set(~scientific, None), declared)
    return value.scatter(rest, dotted.zip_with(dotted.is_not_null(), floats))


def _parts(text: pl.Series) -> pl.DataFrame:
    """`local`: µs since 1970 that text shows, null where it is no time; `offset`: that it names, in µs, else null."""
    parts = text.str.extract_groups(_ISO).struct.unnest()
    day, hour, minute, second, fraction, offset = (parts[name] for name in parts.columns)
    hour, minute, second = (each.cast(pl.Int64).fill_null(0) for each in (hour, minute, second))
    days = day.str.to_date("%Y-%m-%d", strict=False).to_physical().cast(pl.Int64)
    micros = fraction.str.pad_end(6, "0").cast(pl.Int64).fill_null(0)
    local = days * _DAY + ((hour * 60 + minute) * 60 + second) * 1_000_000 + micros
    digits = offset.str.replace_all("[:Zz UTC]", "")
    sign = 1 - 2 * digits.str.starts_with("-").cast(pl.Int64)
    hours, minutes = (digits.str.slice(at, 2).cast(pl.Int64, strict=False).fill_null(0) for at in (1, 3))
    beyond = (hour > 23) | (minute > 59) | (second > 59)
    beyond |= offset.is_not_null() & ((hours > 23) | (minutes > 59))
    offsets = (sign * (hours * 60 + minutes) * 60_000_000).set(offset.is_null(), None)
    return pl.DataFrame({"local": local.set(beyond, None), "offset": offsets})


def _time_of_text(text: pl.Series, reading: Reading) -> _Conversion:
    parts = _parts(text)
    local, offset = parts["local"], parts["offset"]
    instants = (local - offset).cast(TIME)  # null without an offset
    problems: list[tuple[str, pl.Series]] = []
    naive = local.is_not_null() & offset.is_null()
    if naive.any():
        if reading.zone is None:
            problems.append(("a time as text names its offset, or its source the zone=", naive))
        else:
            placed, problems = _in_zone(local.set(~naive, None).cast(pl.Datetime("us")), reading)
            instants = instants.zip_with(~naive, placed)
    other = local.is_null() & text.is_not_null()
    if other.any() and reading.unit is not None:
        numbers = text.set(~other, None)
        whole = numbers.cast(pl.Int64, strict=False)
        fractions = numbers.set(whole.is_not_null(), None).cast(pl.Float64, strict=False)
        fractions = fractions.set(~fractions.is_finite(), None)
        found = _micros(whole, reading.unit).zip_with(whole.is_not_null(), _micros(fractions, reading.unit))
        instants = instants.zip_with(~other, found.cast(TIME))
        other &= found.is_null()
    rule = "a time as text is ISO 8601" + (", or a number" if reading.unit else "")
    return instants, [(rule, other), *problems]
