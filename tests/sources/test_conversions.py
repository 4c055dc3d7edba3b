"""Values of files in the types that are declared, against Python's own: int, float, Decimal, datetime, zoneinfo."""

from __future__ import annotations

import math
import struct
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Literal
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.sources import TIME
from transforms.sources.conversions import LocalTimes, Reading, Twice, converted, local_times

NO_ZONE = Reading()
BOUNDS = {8: pl.Int8, 16: pl.Int16, 32: pl.Int32, 64: pl.Int64}
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def one(
    value: Any, found: Any, declared: Any, reading: Reading = NO_ZONE, text: bool = False
) -> tuple[Any, str | None]:
    """The value as it is read, and the rule that it breaks."""
    frame = pl.DataFrame({"_": pl.Series([None, value], dtype=found)})
    dtype = declared() if isinstance(declared, type) else declared
    result = converted(frame, {"_": dtype}, reading, {"_"} if text else ())
    assert result.schema["_"] == dtype
    assert result["_"][0] is None
    if "__rule" not in result.columns:
        return result["_"][1], None
    assert result["__rule"][0] is None
    assert result["__field"][1] == "_"
    return result["_"][1], result["__rule"][1]


@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from([8, 16, 32, 64]))
def test_an_integer_is_read_where_it_fits(value: int, bits: int) -> None:
    fits = -(2 ** (bits - 1)) <= value < 2 ** (bits - 1)
    read, rule = one(value, pl.Int64, BOUNDS[bits])
    assert (read, rule is None) == (value if fits else None, fits)


@given(st.one_of(st.integers(0, 2**64 - 1), st.integers(2**63 - 3, 2**63 + 3)))
def test_an_unsigned_integer_is_read_where_int64_holds_it(value: int) -> None:
    read, rule = one(value, pl.UInt64, pl.Int64)
    assert (read, rule is None) == ((value, True) if value < 2**63 else (None, False))


@given(
    st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(2**53 - 5, 2**53 + 5), st.integers(2**24 - 5, 2**24 + 5))
)
def test_an_integer_as_a_float_keeps_all_its_digits_or_is_refused(value: int) -> None:
    assert one(value, pl.Int64, pl.Float64)[1] is None or int(float(value)) != value
    read, rule = one(value, pl.Int64, pl.Float64)
    assert (rule is None) == (int(float(value)) == value)
    assert rule is not None or read == value
    narrow = struct.unpack("f", struct.pack("f", value))[0]
    assert (one(value, pl.Int64, pl.Float32)[1] is None) == (int(narrow) == value)


@given(st.one_of(st.floats(), st.integers(-(2**54), 2**54).map(float)), st.sampled_from([8, 16, 32, 64]))
def test_a_float_is_an_integer_if_it_is_whole(value: float, bits: int) -> None:
    """As pandas writes integers with nulls: doubles, and NaN."""
    read, rule = one(value, pl.Float64, BOUNDS[bits])
    if math.isnan(value):
        assert (read, rule) == (None, None)
        return
    whole = math.isfinite(value) and value.is_integer() and abs(value) <= 2**53
    fits = whole and -(2 ** (bits - 1)) <= int(value) < 2 ** (bits - 1)
    assert (read, rule is None) == (int(value) if fits else None, fits)


@given(st.decimals(-(10**22), 10**22, allow_nan=False, places=12))
@example(Decimal("0.100000000000"))
@example(Decimal("9007199254740993.000000000000"))
def test_a_decimal_keeps_its_digits_or_is_refused(value: Decimal) -> None:
    read, rule = one(value, pl.Decimal(38, 12), pl.Float64)
    kept = Decimal(repr(float(value))) == value
    assert (rule is None) == kept
    assert not kept or read == float(value)
    read, rule = one(value, pl.Decimal(38, 12), pl.Int64)
    whole = value == value.to_integral_value() and -(2**63) <= value < 2**63
    assert (read, rule is None) == (int(value) if whole else None, whole)


# Times

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC", "America/Sao_Paulo")
# Around changes of clocks: some of the day and minute at hand.
near = st.builds(
    lambda day, minutes, micros: day + timedelta(minutes=minutes, microseconds=micros),
    st.sampled_from(
        [
            datetime(2024, 3, 31),
            datetime(2024, 10, 27),
            datetime(2024, 3, 10),
            datetime(2024, 11, 3),
            datetime(2024, 4, 7),
            datetime(2018, 11, 4),
        ]
    ),
    st.integers(-120, 600),
    st.sampled_from([0, 1, 999_999]),
)
naive = st.one_of(near, st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)))


def by_zoneinfo(local: datetime, zone: str) -> list[datetime]:
    """The instants at which clocks show a local time, the earlier one first."""
    both = {local.replace(tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC) for fold in (0, 1)}
    return sorted(each for each in both if each.astimezone(ZoneInfo(zone)).replace(tzinfo=None) == local)


@given(naive, st.sampled_from(ZONES), st.sampled_from(["earliest", "latest", None]), st.sampled_from(["type", "text"]))
def test_a_local_time_is_an_instant_its_later_one_its_earlier_one_or_refused(
    local: datetime, zone: str, twice: Twice, how: Literal["type", "text"]
) -> None:
    instants = by_zoneinfo(local, zone)
    reading = Reading(zone, None, twice)
    if how == "type":
        read, rule = one(local, pl.Datetime("us"), TIME, reading)
    else:
        read, rule = one(local.isoformat(" "), pl.String, TIME, reading)
    if not instants:
        assert rule == f"a local time exists in {zone}"
    elif len(instants) == 2 and twice is None:
        assert rule is not None
        assert "occurs twice" in rule
    else:
        assert (read, rule) == (instants[-1 if twice == "latest" else 0], None)
    assert local_times(pl.Series([None, local], dtype=pl.Datetime("us")), reading) == LocalTimes(
        int(len(instants) == 2), int(not instants)
    )


@given(
    st.datetimes(datetime(1, 1, 3), datetime(9999, 12, 29)),
    st.integers(-23 * 60 - 59, 23 * 60 + 59),
    st.sampled_from(["T", " "]),
    st.sampled_from(["", ":"]),
    st.sampled_from(ZONES),
)
def test_a_text_with_an_offset_is_its_instant_whatever_the_zone(
    local: datetime, offset: int, between: str, colon: str, zone: str
) -> None:
    sign, minutes = "-" if offset < 0 else "+", abs(offset)
    text = f"{local.isoformat(between)}{sign}{minutes // 60:02}{colon}{minutes % 60:02}"
    expected = (local - timedelta(minutes=offset) - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    for reading in (NO_ZONE, Reading(zone)):
        frame = converted(pl.DataFrame({"_": [text]}), {"_": TIME}, reading)
        assert frame["_"].to_physical().to_list() == [expected]
        assert "__rule" not in frame.columns


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2024-01-05T10:11:12Z", datetime(2024, 1, 5, 10, 11, 12, tzinfo=UTC)),
        ("2024-01-05 10:11:12 UTC", datetime(2024, 1, 5, 10, 11, 12, tzinfo=UTC)),
        ("2024-01-05 10:11+02", datetime(2024, 1, 5, 8, 11, tzinfo=UTC)),
        ("2024-01-05T10:11:12,5Z", datetime(2024, 1, 5, 10, 11, 12, 500_000, tzinfo=UTC)),
        ("2024-01-05T10:11:12.123456789Z", datetime(2024, 1, 5, 10, 11, 12, 123_456, tzinfo=UTC)),
        ("2024-01-05", "offset"),
        ("2024-01-05 10:11", "offset"),
        ("2024-02-30T00:00:00Z", "ISO 8601"),
        ("2024-01-05T24:00:00Z", "ISO 8601"),
        ("2024-01-05T10:60:00Z", "ISO 8601"),
        ("2024-01-05T10:11:12+24:00", "ISO 8601"),
        ("05.01.2024 10:11", "ISO 8601"),
        ("2024-1-5T10:11:12Z", "ISO 8601"),
        ("1704448272", "ISO 8601"),
    ],
)
def test_times_as_text(text: str, expected: Any) -> None:
    read, rule = one(text, pl.String, TIME)
    if isinstance(expected, datetime):
        assert (read, rule) == (expected, None)
    else:
        assert rule is not None
        assert expected in rule


@given(st.integers(-(2**62), 2**62), st.sampled_from(["s", "ms", "us", "ns"]), st.booleans())
def test_an_epoch_in_any_unit_is_its_instant(number: int, unit: str, as_text: bool) -> None:
    per = {"s": 10**6, "ms": 10**3, "us": 1, "ns": Decimal("0.001")}[unit]
    micros = int((Decimal(number) * Decimal(per)).to_integral_value("ROUND_FLOOR"))
    inside = 0 <= micros + 62_135_596_800 * 10**6 < 315_537_897_600 * 10**6
    found: Any = pl.String if as_text else pl.Int64
    frame = pl.DataFrame({"_": pl.Series([str(number) if as_text else number], dtype=found)})
    read = converted(frame, {"_": TIME}, Reading(None, unit))["_"].to_physical()[0]
    if inside:
        assert read == micros
    else:  # it stays outside, and does not wrap around
        assert not 0 <= read + 62_135_596_800 * 10**6 < 315_537_897_600 * 10**6


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)))
def test_an_epoch_of_seconds_with_a_fraction_is_its_microsecond(moment: datetime) -> None:
    micros = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    seconds = micros / 10**6
    assert one(seconds, pl.Float64, TIME, Reading(None, "s"))[0] == moment.replace(tzinfo=UTC)


@given(st.dates(date(1, 1, 3), date(9999, 12, 29)), st.sampled_from(ZONES))
def test_a_date_is_its_midnight(day: date, zone: str) -> None:
    instants = by_zoneinfo(datetime(day.year, day.month, day.day), zone)
    for value, found in ((day, pl.Date), (day.isoformat(), pl.String)):
        read, rule = one(value, found, TIME, Reading(zone))
        assert (read, rule is None) == ((instants[-1], True) if instants else (None, False))


# Text, as in CSV


@given(st.one_of(st.integers(-(2**65), 2**65).map(str), st.floats().map(repr), st.text("0123456789.e+-x ", max_size=6)))
def test_a_text_is_an_integer_if_it_says_a_whole_one(text: str) -> None:
    read, rule = one(text, pl.String, pl.Int64, text=True)
    expected = _whole(text.strip())
    if text.strip() in ("", "nan"):
        assert (read, rule) == (None, None)
    else:
        assert (read, rule is None) == (expected, expected is not None)


def _whole(text: str) -> int | None:
    try:
        value = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return None
        if "e" not in text:  # digits before the point, and zeros behind it
            before, _, after = text.partition(".")
            if not before.lstrip("+-") or after.strip("0") or "." not in text:
                return None
            value = int(before)
        elif not number.is_integer() or abs(number) > 2**53:
            return None
        else:
            value = int(number)
    return value if -(2**63) <= value < 2**63 else None


@given(st.floats(allow_nan=False))
def test_a_text_is_the_nearest_float(value: float) -> None:
    assert one(repr(value), pl.String, pl.Float64, text=True) == (value, None)


@pytest.mark.parametrize(
    ("text", "declared", "expected"),
    [
        *((each, pl.Boolean, True) for each in ("true", "True", "TRUE", "t", "1", "yes")),
        *((each, pl.Boolean, False) for each in ("false", "F", "0", "no")),
        *((each, pl.Float64, None) for each in ("", " ", "NA", "N/A", "null", "NULL", "None", "\\N")),
        ("NA", pl.String, "NA"),
        ("", pl.String, ""),
        (" x ", pl.String, " x "),
        ("2024-02-29", pl.Date, date(2024, 2, 29)),
        ("2024-02-29 00:00:00", pl.Date, date(2024, 2, 29)),
        (" 12 ", pl.Int64, 12),
        ("5.0", pl.Int64, 5),
    ],
)
def test_texts_that_are_read(text: str, declared: Any, expected: Any) -> None:
    assert one(text, pl.String, declared, text=True) == (expected, None)


@pytest.mark.parametrize(
    ("text", "declared"),
    [
        ("2", pl.Boolean),
        ("1,5", pl.Float64),
        ("2023-02-29", pl.Date),
        ("2024-02-29 01:00", pl.Date),
        ("0x10", pl.Int64),
    ],
)
def test_texts_that_are_dead_letters(text: str, declared: Any) -> None:
    assert one(text, pl.String, declared, text=True) == (None, f"a value is {declared()}")


def test_the_first_problem_of_a_row_is_that_of_the_weightiest_column() -> None:
    frame = pl.DataFrame({"a": ["x", "1", "x"], "b": ["y", "y", "2"], "c": ["z", "3", "3"]})
    types = {"a": pl.Int64(), "b": pl.Int64(), "c": pl.Int64()}
    found = converted(frame, types, NO_ZONE, types, {"b": 0, "a": 1})
    assert found["__field"].to_list() == ["b", "b", "a"]
    assert found["c"].to_list() == [None, 3, 3]
