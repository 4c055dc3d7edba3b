"""Contracts of files and rows: what is refused whole, what becomes a dead letter, and the position of the row in it."""

import functools
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from schemas import Source
from schemas.errors import ContractError, DataError
from tests.support.slices import slices_of
from transforms.features.column_reuse import keep_rules
from transforms.records.record_batches import batch
from transforms.records.times import ALWAYS, EPOCH, MICROSECOND
from transforms.sources.contracts import YEARS, Contract, check_rows, type_holds
from transforms.sources.reader import ReadOptions, _raw, read_slices, repeats_of, without_repeats
from transforms.storage.delta_tables import CommitTarget, commit, write_files

T0 = datetime(2020, 1, 1, tzinfo=UTC)
NOW = (datetime(2021, 1, 1, tzinfo=UTC) - EPOCH) // MICROSECOND
LARGEST = 3.4028234663852886e38

source = Source("sales", time="at", columns={"id": pl.Int64, "k": pl.String, "v": pl.Float32, "w": pl.Float64})
contract = Contract(source, tuple(source.schema), ("k",), NOW)


def at(seconds: float) -> datetime:
    return T0 + timedelta(seconds=seconds)


def rows(*each: dict[str, Any], of: Source = source) -> pl.DataFrame:
    default = {"at": T0, "id": 1, "k": "a", "v": 1.0, "w": 1.0}
    return pl.DataFrame([{**default, **row} for row in each], schema=of.schema, orient="row", strict=False)


def write(root: Path, frame: pl.DataFrame | pa.Table, file: str = "part-0", group: int = 1000, **options: Any) -> Path:
    path = root / "sales" / f"{file}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = frame.to_arrow() if isinstance(frame, pl.DataFrame) else frame
    pq.write_table(table, path, row_group_size=group, **options)
    return path


def read(root: Path, of: Contract = contract, **options: Any) -> tuple[pl.DataFrame, pl.DataFrame]:
    result = read_slices(of, slices_of(str(root), of), ReadOptions(**options))
    return result.frame, result.dead_letters


def refused(root: Path, of: Contract = contract) -> str:
    with pytest.raises(ContractError) as caught:
        read(root, of)
    return str(caught.value)


def reasons(frame: pl.DataFrame, of: Contract = contract) -> list[tuple[str, str, str]]:
    return check_rows(of, frame)[1].select("field", "rule", "value").rows()


# Whole files


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    frame = rows(*({"at": at(i), "id": i, "v": None if i == 3 else i / 10, "k": 'é/"'} for i in range(10)))
    write(tmp_path, frame, group=4)
    good, dead_letters = read(tmp_path)
    assert_frame_equal(good, frame, check_exact=True)
    assert len(dead_letters) == 0


def test_extra_columns_and_their_order_do_not_matter(tmp_path: Path) -> None:
    write(tmp_path, rows({}).select(pl.lit([1, 2]).alias("extra"), "w", "v", "k", "id", "at"))
    assert_frame_equal(read(tmp_path)[0], rows({}), check_exact=True)


def test_a_missing_column_is_refused_with_its_file_and_the_nearest_name(tmp_path: Path) -> None:
    path = write(tmp_path, rows({}).rename({"id": "idd"}))
    message = refused(tmp_path)
    assert "Source 'sales': every file has the declared column 'id'" in message
    assert str(path) in message
    assert "Did you mean 'idd'?" in message


@pytest.mark.parametrize("column", ["at", "id", "v"])
def test_a_declared_column_that_is_there_twice_is_refused_with_its_file(tmp_path: Path, column: str) -> None:
    table = rows({}).to_arrow()
    write(tmp_path, table, "part-0")
    path = write(tmp_path, table.append_column(column, table[column]), "part-1")
    assert f"2 columns {column!r} in {path}" in refused(tmp_path)


def test_a_column_that_is_not_declared_may_be_there_twice_or_differ_in_case(tmp_path: Path) -> None:
    """Names are compared exactly."""
    table = rows({}).to_arrow()
    for name in ("more", "more", "V", "At"):
        table = table.append_column(name, pa.array(["x"]))
    write(tmp_path, table)
    assert read(tmp_path)[0].rows() == rows({}).rows()


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        ("id", pl.String),
        ("id", pl.Float64),
        ("id", pl.UInt64),
        ("k", pl.Int64),
        ("v", pl.Float64),
        ("v", pl.Int32),
        ("w", pl.Int64),
        ("w", pl.Boolean),
        ("at", pl.Date),
        ("at", pl.Int64),
    ],
)
def test_a_column_of_a_type_that_does_not_fit_is_refused(tmp_path: Path, column: str, dtype: pl.DataType) -> None:
    path = write(tmp_path, rows({"k": "1"}).with_columns(pl.col(column).cast(dtype)))
    message = refused(tmp_path)
    assert f"column {column!r} is {source.schema[column]}" in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("column", "dtype"),
    [("id", pl.Int8), ("id", pl.UInt32), ("v", pl.Int16), ("w", pl.Float32), ("w", pl.Int32), ("k", pl.Categorical)],
)
def test_a_narrower_column_is_read_as_declared(tmp_path: Path, column: str, dtype: pl.DataType) -> None:
    write(tmp_path, rows({}).with_columns(pl.col(column).cast(dtype)))
    assert_frame_equal(read(tmp_path)[0], rows({}), check_exact=True)


def test_a_dictionary_column_of_strings_is_read(tmp_path: Path) -> None:
    table = rows({}, {"k": None, "id": 2}).to_arrow()
    position = table.schema.get_field_index("k")
    write(tmp_path, table.set_column(position, "k", table["k"].cast(pa.string()).dictionary_encode()))
    good, dead_letters = read(tmp_path)
    assert good["k"].to_list() == ["a"]
    assert dead_letters["row"].to_list() == [1]


def test_a_timestamp_without_a_zone_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, rows({}).with_columns(pl.col("at").dt.replace_time_zone(None)))
    message = refused(tmp_path)
    assert "names its time zone" in message
    assert str(path) in message


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("statistics", [True, False])
def test_a_timestamp_of_another_unit_or_zone_is_the_same_moment(tmp_path: Path, unit: Any, statistics: bool) -> None:
    moments = pl.Series("at", [at(1), at(2.5)]).dt.cast_time_unit(unit).dt.convert_time_zone("America/New_York")
    frame = rows({}, {}).with_columns(moments)
    write(tmp_path, frame, write_statistics=statistics, version="2.6")
    (only,) = slices_of(str(tmp_path), contract)
    assert (only.low, only.high) == tuple((moment - EPOCH) // MICROSECOND for moment in (at(1), at(2.5)))
    good, _ = read(tmp_path, low=only.low, high=only.high)
    assert good["at"].to_list() == [at(1)]
    assert good.schema == source.schema


def test_a_fraction_of_a_microsecond_is_read_and_bounded_alike(tmp_path: Path) -> None:
    nanoseconds = [(at(1) - EPOCH) // MICROSECOND * 1000 + 999, (at(2) - EPOCH) // MICROSECOND * 1000 + 1]
    moments = pl.Series("at", nanoseconds, pl.Int64).cast(pl.Datetime("ns", "UTC"))
    write(tmp_path, rows({}, {}).with_columns(moments), version="2.6")
    (only,) = slices_of(str(tmp_path), contract)
    assert read(tmp_path)[0]["at"].to_list() == [at(1), at(2)]
    assert (only.low, only.high) == tuple((moment - EPOCH) // MICROSECOND for moment in (at(1), at(2)))


@pytest.mark.parametrize("keep", [0, 3, 50, 400])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, keep: int) -> None:
    write(tmp_path, rows({}), "part-0")
    path = write(tmp_path, rows({}), "part-1")
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(tmp_path)
    assert "every file is whole Parquet" in message
    assert str(path) in message


def test_bytes_spoiled_inside_a_file_are_refused_by_name(tmp_path: Path) -> None:
    frame = rows(*({"id": i, "k": str(i)} for i in range(2000)))
    path = write(tmp_path, frame, group=5000, compression="zstd", use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[200:4000] = b"\xff" * 3800
    path.write_bytes(content)
    assert str(path) in refused(tmp_path)


def test_a_file_that_is_not_parquet_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "sales" / "part-0.parquet"
    path.parent.mkdir()
    path.write_text("id,k\n1,a\n")
    assert str(path) in refused(tmp_path)


def test_a_source_without_files_is_refused_by_its_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Source 'sales' has Parquet files\. Got none under .*/sales\. Write"):
        slices_of(str(tmp_path), contract)


def test_hidden_and_unfinished_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, rows({}))
    for name in (".aside", "_temporary/part-9", "sub/.part"):
        write(tmp_path, rows({"id": 99}), name)
    write(tmp_path, rows({"id": 2}), "year=2020/part-0")
    assert sorted(read(tmp_path)[0]["id"]) == [1, 2]


def test_one_file_named_as_the_source_is_a_source(tmp_path: Path) -> None:
    write(tmp_path, rows({})).rename(tmp_path / "sales.parquet")
    assert len(read(tmp_path)[0]) == 1


def test_a_file_replaced_while_it_is_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, rows({}))
    slices = slices_of(str(tmp_path), contract)
    path = write(tmp_path, rows({"id": 2}, {"id": 3}))
    with pytest.raises(ContractError, match="was replaced") as caught:
        read_slices(contract, slices)
    assert str(path) in str(caught.value)


def test_zero_rows_are_no_slices_and_no_rows(tmp_path: Path) -> None:
    write(tmp_path, rows({}).clear())
    assert slices_of(str(tmp_path), contract) == []
    good, dead_letters = read(tmp_path)
    assert good.schema == source.schema
    assert len(good) == len(dead_letters) == 0


@given(name=st.sampled_from(["a b", "ä", "50%20off", "a+b", "x=y", "[z]", "q?"]))
def test_folders_of_any_name_are_read(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    root = tmp_path_factory.mktemp("root") / name
    write(root, rows({}))
    assert len(read(root)[0]) == 1


def with_bytes(values: list[bytes | None], kind: pa.DataType) -> pa.Array:
    """A text column of any bytes: what a careless writer makes."""
    large = pa.types.is_large_string(kind)
    raw = pa.array(values, pa.large_binary() if large else pa.binary())
    return pa.Array.from_buffers(kind, len(values), raw.buffers(), raw.null_count)


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_text_that_is_not_utf8_is_a_dead_letter_with_its_bytes(tmp_path: Path, kind: pa.DataType) -> None:
    values = [b"a", b"\xff\xfe", None, "ä".encode(), b"ok\xc3", b""]
    table = rows(*({"id": i} for i in range(6))).to_arrow()
    texts = with_bytes(values, pa.string() if pa.types.is_dictionary(kind) else kind)
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts
    write(tmp_path, table.set_column(table.column_names.index("k"), "k", texts))
    free = Contract(source, tuple(source.schema), (), NOW)
    good, dead_letters = read(tmp_path, free)
    assert good.select("id", "k").rows() == [(0, "a"), (2, None), (3, "ä"), (5, "")]
    assert dead_letters.select("row", "field", "rule", "value").rows() == [
        (1, "k", "a text is UTF-8", "bytes fffe"),
        (4, "k", "a text is UTF-8", "bytes 6f6bc3"),
    ]


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("unit", ["ms", "us"])
@pytest.mark.parametrize(
    "value", [2**62, -(2**62), 2**63 - 1, -(2**63), 253_402_300_800_000_000, -62_135_596_800_000_001]
)
def test_a_time_beyond_the_years_that_python_knows_is_a_dead_letter(
    tmp_path: Path, value: int, unit: str, statistics: bool
) -> None:
    kind = pa.timestamp(unit, "UTC")
    good = (T0 - EPOCH) // MICROSECOND // (1000 if unit == "ms" else 1)
    table = rows({}, {}).to_arrow()
    write(
        tmp_path, table.set_column(0, "at", pa.array([value, good], pa.int64()).cast(kind)), write_statistics=statistics
    )
    frame, dead_letters = read(tmp_path)
    assert frame["at"].to_list() == [T0]
    assert dead_letters["row"].to_list() == [0]
    assert "a time is" in dead_letters["rule"][0]


@pytest.mark.parametrize(("value", "expected"), [(b"ok", True), (b"\xff", False)])
def test_columns_are_not_copied_past_a_text_that_breaks_its_rule(tmp_path: Path, value: bytes, expected: bool) -> None:
    """A view that reads a further column rejects other rows than the view before it."""
    table = rows({}, {}).to_arrow()
    texts = with_bytes([b"a", value], pa.string())
    write(tmp_path, table.set_column(table.column_names.index("k"), "k", texts))
    assert keep_rules(contract, slices_of(str(tmp_path), contract), ["k"]) is expected
    assert keep_rules(contract, slices_of(str(tmp_path), contract), [])


NEAR = [1, 10**3, 10**6, 10**9]
EDGES = [0, 2**31, 2**53, 2**62, 2**63 - 1, *(YEARS[i] // each for i in (0, 1) for each in NEAR)]
stamps = st.one_of(
    st.integers(-(2**63) + 1, 2**63 - 1),
    st.builds(lambda edge, step: edge + step, st.sampled_from(EDGES), st.integers(-2, 2)),
).map(lambda value: max(min(value, 2**63 - 1), -(2**63) + 1))


@given(
    st.lists(stamps, min_size=1, max_size=20),
    st.sampled_from(["s", "ms", "us", "ns"]),
    st.sampled_from(["UTC", "+02:00", "Asia/Tokyo"]),
)
def test_a_time_of_any_unit_is_the_same_moment_or_a_dead_letter(stamps: list[int], unit: str, zone: str) -> None:
    of = Source("sales", time="at", columns={"n": pl.Int64, "due": pl.Datetime("us", "UTC")})
    times = pa.array(stamps, pa.int64()).cast(pa.timestamp(unit, zone))
    known = pa.array([(T0 - EPOCH) // MICROSECOND] * len(stamps), pa.int64()).cast(pa.timestamp("us", "UTC"))
    table = pa.table({"at": known, "n": pa.array(range(len(stamps)), pa.int64()), "due": times})
    used = Contract(of, ("at", "n", "due"), now=NOW)
    good, dead_letters = check_rows(used, used.cast(table, "x"))
    factor = {"s": 10**6, "ms": 10**3, "us": 1}.get(unit)
    exact = [each * factor if factor else each // 1000 for each in stamps]
    expected = {n: each for n, each in enumerate(exact) if YEARS[0] <= each < YEARS[1]}
    assert dict(zip(good["n"], good["due"].to_physical(), strict=True)) == expected
    assert sorted(dead_letters["place"]) == sorted(set(range(len(stamps))) - expected.keys())


def test_a_date_beyond_the_years_that_python_knows_is_a_dead_letter(tmp_path: Path) -> None:
    of = Source("sales", columns={"due": pl.Datetime("us", "UTC"), "day": pl.Date})
    times = [0, 253_402_300_800_000_000, 0, -62_135_596_800_000_000, 253_402_300_799_999_999, None]
    days = [0, 0, 2_932_897, -719_162, 2_932_896, None]
    table = pa.table({"due": pa.array(times, pa.timestamp("us", "UTC")), "day": pa.array(days, pa.date32())})
    write(tmp_path, table)
    good, dead_letters = read(tmp_path, Contract(of, ("due", "day")))
    assert len(good) == 4
    assert dead_letters.select("row", "field").rows() == [(1, "due"), (2, "day")]
    assert set(dead_letters["rule"]) == {"a time is in the years 1 to 9999"}


# Single rows


@pytest.mark.parametrize(
    ("row", "field", "rule"),
    [
        ({"at": None}, "at", "a time is present"),
        ({"at": EPOCH}, "at", "a time is not before 1990-01-01 (not_before)"),
        ({"at": datetime(1989, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)}, "at", "not before 1990-01-01"),
        (
            {"at": datetime(2021, 1, 2, 0, 0, 0, 1, tzinfo=UTC)},
            "at",
            "a time is at most 1d ahead of the run's clock (ahead)",
        ),
        ({"at": datetime(9999, 12, 31, tzinfo=UTC)}, "at", "at most 1d ahead"),
        ({"k": None}, "k", "a key is present"),
        ({"v": float("inf")}, "v", "a number is finite"),
        ({"v": float("-inf")}, "v", "a number is finite"),
        ({"w": float("inf")}, "w", "a number is finite"),
        ({"w": 1e39}, "w", "a number fits float32"),
        ({"w": -1e300}, "w", "a number fits float32"),
    ],
)
def test_a_row_that_breaks_a_rule_becomes_a_letter_with_the_rule(row: dict[str, Any], field: str, rule: str) -> None:
    good, dead_letters = check_rows(contract, rows({}, row, {}))
    assert len(good) == 2
    assert dead_letters["place"].to_list() == [1]
    ((found, why, value),) = dead_letters.select("field", "rule", "value").rows()
    assert found == field
    assert rule in why
    assert value is not None


@pytest.mark.parametrize(
    "row",
    [
        {"at": datetime(1990, 1, 1, tzinfo=UTC)},
        {"at": datetime(2021, 1, 2, tzinfo=UTC)},
        {"v": LARGEST},
        {"w": LARGEST},
        {"w": -LARGEST},
        {"v": 1e-45},
        {"w": 5e-324},
        {"k": ""},
        {"id": None},
        {"v": None, "w": None},
    ],
)
def test_a_row_at_the_edge_of_a_rule_keeps_it(row: dict[str, Any]) -> None:
    assert reasons(rows(row)) == []


def test_nan_is_no_value_and_breaks_nothing() -> None:
    good, dead_letters = check_rows(contract, rows({"v": float("nan"), "w": float("nan")}))
    assert good.select("v", "w").row(0) == (None, None)
    assert len(dead_letters) == 0


def test_minus_zero_is_zero() -> None:
    good, _ = check_rows(contract, rows({"v": -0.0, "w": -0.0}))
    assert [str(value) for value in good.select("v", "w").row(0)] == ["0.0", "0.0"]


def test_the_first_broken_rule_is_the_reason_and_one_letter_is_enough() -> None:
    assert len(reasons(rows({"at": None, "k": None, "v": float("inf")}))) == 1
    assert reasons(rows({"k": None, "v": float("inf")})) == [("k", "a key is present", "null")]


def test_the_value_of_a_letter_is_what_was_found() -> None:
    assert reasons(rows({"v": float("inf")}))[0][2] == "inf"
    assert reasons(rows({"at": EPOCH}))[0][2].startswith("1970-01-01 00:00:00")


def test_a_null_in_a_unique_column_is_a_letter() -> None:
    once = Source("sales", time="at", unique="id", columns=dict(source.columns))
    assert reasons(rows({"id": None}), Contract(once, tuple(once.schema), now=NOW)) == [
        ("id", "a key is present", "null")
    ]


def test_an_event_known_before_it_happens_is_a_letter() -> None:
    placed = Source("p", time="at", event_time="happened", columns={"k": pl.String})
    frame = pl.DataFrame({"at": [T0, T0, T0], "happened": [T0, at(1), None], "k": ["a"] * 3}, schema=placed.schema)
    good, dead_letters = check_rows(Contract(placed, tuple(placed.schema), now=NOW), frame)
    assert len(good) == 1
    assert dead_letters["field"].to_list() == ["happened", "happened"]
    assert "nothing is known before it happens" in dead_letters["rule"][0]
    assert dead_letters["rule"][1] == "a time is present"


def test_a_dimension_without_rules_keeps_every_row() -> None:
    dimension = Source("d", columns={"k": pl.String})
    for size in (0, 1, 2):
        good, dead_letters = check_rows(
            Contract(dimension, ("k",)), pl.DataFrame({"k": ["a"] * size}, schema=dimension.schema)
        )
        assert (len(good), len(dead_letters)) == (size, 0)


@pytest.mark.parametrize(
    ("declared", "found", "expected"),
    [
        (pl.Int64, pa.int64(), True),
        (pl.Int64, pa.uint32(), True),
        (pl.Int64, pa.uint64(), False),
        (pl.Int32, pa.int64(), False),
        (pl.Float64, pa.int32(), True),
        (pl.Float64, pa.int64(), False),
        (pl.Float32, pa.int16(), True),
        (pl.Float32, pa.float64(), False),
        (pl.String, pa.large_string(), True),
        (pl.String, pa.binary(), False),
        (pl.String, pa.dictionary(pa.int32(), pa.string()), True),
        (pl.Boolean, pa.bool_(), True),
        (pl.Boolean, pa.int8(), False),
        (pl.Date, pa.date32(), True),
        (pl.Date, pa.timestamp("us", "UTC"), False),
        (pl.Datetime("us", "UTC"), pa.timestamp("ns", "UTC"), True),
        (pl.Datetime("us", "UTC"), pa.timestamp("us"), False),
        (pl.Int64, pa.null(), False),
    ],
)
def test_a_type_holds_what_fits_into_it_without_loss(declared: Any, found: pa.DataType, expected: bool) -> None:
    dtype = declared() if isinstance(declared, type) else declared
    assert type_holds(dtype, found) is expected


# The position of a row in its dead letter


bad_row = st.sampled_from([{"k": None}, {"v": float("inf")}, {"at": None}, {"at": EPOCH}, {}, {}, {}])


@given(data=st.lists(bad_row, min_size=1, max_size=30), group=st.integers(1, 8), files=st.integers(1, 3))
def test_letters_name_the_file_and_row_they_came_from(
    tmp_path_factory: pytest.TempPathFactory, data: list[dict[str, Any]], group: int, files: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    paths, expected = [], set()
    for number in range(files):
        part = data[number::files]
        frame = rows(*({"at": at(i), "id": i, **row} for i, row in enumerate(part)), of=source)
        path = write(root, frame if part else rows({}).clear(), f"part-{number}", group)
        paths.append(path)
        expected |= {(str(path), i) for i, row in enumerate(part) if row}
    good, dead_letters = read(root)
    assert set(dead_letters.select("file", "row").rows()) == expected
    assert len(good) + len(dead_letters) == len(data)
    # The same when only some row groups are read, in whatever order.
    for each in slices_of(str(root), contract):
        part = read_slices(contract, [each]).dead_letters
        span = range(each.first, each.first + each.rows)
        assert set(part.select("file", "row").rows()) == {(f, i) for f, i in expected if f == each.path and i in span}


def test_letters_from_row_groups_read_out_of_order_are_placed_right(tmp_path: Path) -> None:
    frame = rows(*({"at": at(i), "k": None if i in (1, 6) else "a"} for i in range(9)))
    write(tmp_path, frame, "part-0", 3)
    write(tmp_path, frame, "part-1", 2)
    slices = slices_of(str(tmp_path), contract)
    picked = [slices[i] for i in (6, 2, 0, 3)]
    found = read_slices(contract, picked).dead_letters.select(pl.col("file").str.slice(-9), "row").rows()
    assert sorted(found) == [("0.parquet", 1), ("0.parquet", 6), ("1.parquet", 1), ("1.parquet", 6)]


def test_a_letter_without_a_plausible_time_belongs_to_the_first_plausible_moment_of_its_row_group(
    tmp_path: Path,
) -> None:
    write(tmp_path, rows({"at": None}, {"at": at(5)}, {"at": EPOCH}, {"at": at(1)}))
    dead_letters = read(tmp_path)[1]
    moment = (at(5) - EPOCH) // MICROSECOND
    assert dead_letters["time"].to_list() == [moment, moment]
    assert len(read(tmp_path, own=(moment, moment + 1))[1]) == 2
    assert len(read(tmp_path, own=(moment + 1, 2**62))[1]) == 0


def test_a_letter_of_a_row_group_without_any_plausible_time_is_always(tmp_path: Path) -> None:
    write(tmp_path, rows({"at": None}, {"at": EPOCH}))
    assert read(tmp_path)[1]["time"].to_list() == [ALWAYS, ALWAYS]


def test_numbered_rows_are_those_of_the_file(tmp_path: Path) -> None:
    write(tmp_path, rows(*({"id": i, "k": None if i == 4 else "a"} for i in range(8))), group=3)
    second = slices_of(str(tmp_path), contract)[1]
    assert read_slices(contract, [second], ReadOptions(numbered=True)).frame.select("id", "__row").rows() == [
        (3, 3),
        (5, 5),
    ]


# Repeats

once = Source("sales", time="at", unique="id", columns={"id": pl.Int64, "k": pl.String, "v": pl.Float64})
of_once = Contract(once, tuple(once.schema), now=NOW)


def kept(root: Path, of: Contract = of_once) -> pl.DataFrame:
    slices = slices_of(str(root), of)
    frame = read_slices(of, slices).frame
    return without_repeats(of.source, frame, repeats_of(of, slices).first)


@given(
    data=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.sampled_from(["a", "b", None])), max_size=20),
    files=st.integers(1, 3),
    group=st.integers(1, 5),
)
def test_of_repeated_rows_the_first_known_stays_and_of_one_moment_the_smallest(
    tmp_path_factory: pytest.TempPathFactory, data: list[tuple[int, int, str | None]], files: int, group: int
) -> None:
    root = tmp_path_factory.mktemp("root")
    for number in range(files):
        frame = [{"id": i, "at": at(t), "k": k, "v": 0.5} for i, t, k in data[number::files]]
        write(root, pl.DataFrame(frame, schema=once.schema, orient="row"), f"part-{number}", group)
    first: dict[int, tuple[Any, ...]] = {}
    for i, t, k in data:
        row = (at(t), k is not None, k)
        first[i] = min(first.get(i, row), row, key=lambda each: (each[0], each[1], each[2] or ""))
    got = kept(root).sort("id")
    assert got.select("id", "at", "k").rows() == [(i, t, k) for i, (t, _, k) in sorted(first.items())]


@pytest.mark.parametrize("group", [7, 1000])
def test_repeats_are_the_same_however_many_rows_are_held_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group: int
) -> None:
    """By parts of the values' hashes, and by pieces of files, of row groups too."""
    two = Source("sales", time="at", unique=("id", "k"), columns=dict(once.columns))
    contract_of_two = Contract(two, tuple(two.schema), now=NOW)
    random = np.random.default_rng(4)
    rows = [
        {"id": int(i), "at": at(int(t)), "k": "abc"[k], "v": 0.5}
        for i, t, k in random.integers(0, (40, 60, 3), (200, 3))
    ]
    for number in range(3):
        write(tmp_path, pl.DataFrame(rows[number::3], schema=once.schema, orient="row"), f"part-{number}", group)
    slices = slices_of(str(tmp_path), contract_of_two)
    whole = repeats_of(contract_of_two, slices)
    assert len(whole.first) > 20
    monkeypatch.setattr("transforms.sources.reader.REPEATS_AT_ONCE", 30)
    monkeypatch.setattr("transforms.sources.reader._raw", functools.partial(_raw, chunk=10))
    parts = repeats_of(contract_of_two, slices)
    assert_frame_equal(parts.first.sort("id", "k"), whole.first.sort("id", "k"), check_exact=True)
    assert parts.dropped == whole.dropped


def test_a_repeat_whose_first_row_breaks_the_contract_counts_from_the_first_good_row(tmp_path: Path) -> None:
    frame = [{"id": 1, "at": at(1), "k": "a", "v": float("inf")}, {"id": 1, "at": at(2), "k": "b", "v": 1.0}]
    write(tmp_path, pl.DataFrame(frame, schema=once.schema, orient="row"))
    assert kept(tmp_path)["k"].to_list() == ["b"]


def test_a_repeat_is_dropped_where_its_first_row_is_not_in_sight(tmp_path: Path) -> None:
    frame = [{"id": 1, "at": at(1), "k": "a", "v": 1.0}, {"id": 1, "at": at(99), "k": "b", "v": 1.0}]
    write(tmp_path, pl.DataFrame(frame, schema=once.schema, orient="row"), group=1)
    slices = slices_of(str(tmp_path), of_once)
    late = read_slices(of_once, slices[1:]).frame
    assert len(without_repeats(once, late, repeats_of(of_once, slices).first)) == 0


def test_an_order_decides_which_of_one_moment_stays(tmp_path: Path) -> None:
    by_v = Source("sales", time="at", unique="id", order="v", columns=dict(once.columns))
    frame = [{"id": 1, "at": at(1), "k": "a", "v": 2.0}, {"id": 1, "at": at(1), "k": "b", "v": 1.0}]
    write(tmp_path, pl.DataFrame(frame, schema=once.schema, orient="row"))
    assert kept(tmp_path, Contract(by_v, tuple(by_v.schema), now=NOW))["k"].to_list() == ["b"]


def test_a_source_of_no_rows_has_no_repeats(tmp_path: Path) -> None:
    write(tmp_path, pl.DataFrame(schema=once.schema))
    assert len(kept(tmp_path)) == 0


def test_rows_known_outside_the_asked_span_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, rows(*({"at": at(i), "id": i} for i in range(5))))
    low, high = ((at(i) - EPOCH) // MICROSECOND for i in (1, 3))
    assert read(tmp_path, low=low, high=high)[0]["id"].to_list() == [1, 2]


def test_dates_are_read_as_dates(tmp_path: Path) -> None:
    dated = Source("sales", time="at", columns={"day": pl.Date})
    write(tmp_path, pl.DataFrame({"at": [T0], "day": [date(1969, 12, 31)]}, schema=dated.schema))
    assert read(tmp_path, Contract(dated, tuple(dated.schema), now=NOW))[0]["day"][0] == date(1969, 12, 31)


def test_a_delta_table_is_a_source_as_of_its_newest_version(tmp_path: Path) -> None:
    folder = str(tmp_path / "my sources" / "sales")
    schema = pa.schema(
        [
            ("at", pa.timestamp("us", "UTC")),
            ("id", pa.int64()),
            ("k", pa.string()),
            ("v", pa.float32()),
            ("w", pa.float64()),
            ("date", pa.date32()),
        ]
    )
    for i, frame in enumerate((rows({"id": 1}), rows({"id": 2}, {"id": 3}))):
        dated = batch(frame.with_columns(date=pl.lit(date(2020, 1, 1))), schema)
        target = CommitTarget(folder, schema, None, f"run-{i}", i - 1 if i else None)
        commit(target, write_files(dated, folder, target.run_id))
    assert sorted(read(tmp_path / "my sources")[0]["id"]) == [2, 3]
