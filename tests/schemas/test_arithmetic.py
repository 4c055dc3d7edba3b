"""Expressions over columns of every width against Python's integers and floats: nothing wraps, and what kept its meaning kept its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Derived, FeatureView, Label, Latest, Lookup, Source, Trailing
from schemas.arithmetic import in_64_bits
from schemas.features import Feature
from transforms.features.kernel import compute
from transforms.training.labels import attach

T0 = datetime(2024, 1, 1, tzinfo=UTC)
WIDTHS = {"i8": (pl.Int8, 8), "i16": (pl.Int16, 16), "i32": (pl.Int32, 32), "i64": (pl.Int64, 64)}
COLUMNS = {
    **{name: dtype for name, (dtype, _) in WIDTHS.items()},
    "b": pl.Boolean,
    "f": pl.Float32,
    "d": pl.Float64,
    "s": pl.String,
}
Row = dict[str, Any]


def float32(value: float) -> float:
    return float(np.float32(value))


def integers(bits: int) -> st.SearchStrategy[int]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return (
        st.integers(low, high) | st.sampled_from([low, low + 1, -1, 0, 1, 2, 7, high - 1, high]) | st.integers(-20, 20)
    )


@st.composite
def rows(draw: st.DrawFn) -> Row:
    row: Row = {name: draw(st.none() | integers(bits)) for name, (_, bits) in WIDTHS.items()}
    finite = st.floats(-1e6, 1e6, width=32)
    return {
        **row, "b": draw(st.none() | st.booleans()), "f": draw(st.none() | finite), "d": draw(st.none() | st.floats(-1e6, 1e6)),
        "s": draw(st.none() | st.text(max_size=5)),
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Expr:
    """An expression and what it is in Python: an integer, a float, or None."""

    polars: pl.Expr
    python: Callable[[Row], Any]


def held(value: int | None) -> int | None:
    return value if value is not None and -(2**63) <= value < 2**63 else None


def whole(a: Expr, b: Expr, polars: Callable[[Any, Any], pl.Expr], python: Callable[[int, int], int | None]) -> Expr:
    def value(row: Row) -> int | None:
        x, y = a.python(row), b.python(row)
        return None if x is None or y is None else held(python(x, y))

    return Expr(polars(a.polars, b.polars), value)


def one(a: Expr, polars: Callable[[pl.Expr], pl.Expr], python: Callable[[int], int | None]) -> Expr:
    def value(row: Row) -> int | None:
        x = a.python(row)
        return None if x is None else held(python(x))

    return Expr(polars(a.polars), value)


def chosen(a: Expr, b: Expr, c: Expr) -> Expr:
    def value(row: Row) -> int | None:
        x, y = a.python(row), b.python(row)
        return b.python(row) if x is not None and y is not None and x > y else c.python(row)

    return Expr(pl.when(a.polars > b.polars).then(b.polars).otherwise(c.polars), value)


def narrowed(a: Expr, name: str) -> Expr:
    dtype, bits = WIDTHS[name]
    return one(
        a, lambda x: x.cast(dtype, strict=False), lambda x: x if -(2 ** (bits - 1)) <= x < 2 ** (bits - 1) else None
    )


def summed(a: Expr, b: Expr) -> Expr:
    return Expr(
        pl.sum_horizontal(a.polars, b.polars),
        lambda row: held(sum(x for x in (a.python(row), b.python(row)) if x is not None)),
    )


LEAVES = st.one_of(
    st.sampled_from([*WIDTHS]).map(lambda name: Expr(pl.col(name), lambda row: row[name])),
    st.just(Expr(pl.col("s").str.len_bytes(), lambda row: None if row["s"] is None else len(row["s"].encode()))),
    st.just(Expr(pl.col("b").cast(pl.UInt8), lambda row: None if row["b"] is None else int(row["b"]))),
)
LITERALS = st.sampled_from([-1, 1, 2, 3, 10, 60, 1000, 100_000, 2**31, 10**10]).map(
    lambda n: Expr(pl.lit(n), lambda _: n)
)


def deeper(some: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    other = some | LITERALS
    return st.one_of(
        st.builds(whole, some, other, st.just(lambda a, b: a + b), st.just(lambda a, b: a + b)),
        st.builds(whole, some, other, st.just(lambda a, b: a - b), st.just(lambda a, b: a - b)),
        st.builds(whole, other, some, st.just(lambda a, b: a - b), st.just(lambda a, b: a - b)),
        st.builds(whole, some, other, st.just(lambda a, b: a * b), st.just(lambda a, b: a * b)),
        st.builds(whole, some, other, st.just(lambda a, b: a // b), st.just(lambda a, b: a // b if b else None)),
        st.builds(whole, some, other, st.just(lambda a, b: a % b), st.just(lambda a, b: a % b if b else None)),
        st.builds(one, some, st.just(lambda a: 0 - a), st.just(lambda a: -a)),
        st.builds(one, some, st.just(lambda a: a.abs()), st.just(abs)),
        st.builds(one, some, st.just(lambda a: a**2), st.just(lambda a: a**2)),
        st.builds(one, some, st.just(lambda a: a**3), st.just(lambda a: a**3)),
        st.builds(one, some, st.just(lambda a: a.clip(0, 100)), st.just(lambda a: min(max(a, 0), 100))),
        st.builds(chosen, some, some, some),
        st.builds(narrowed, some, st.sampled_from([*WIDTHS])),
        st.builds(summed, some, some),
    )


TREES = st.recursive(LEAVES, deeper, max_leaves=5)


def table(some: list[Row]) -> pl.DataFrame:
    return pl.DataFrame(some, schema=COLUMNS)


def test_the_strategy_builds_what_polars_wraps() -> None:
    """The property below would not pass on Polars alone."""
    frame = table([{**dict.fromkeys(COLUMNS), "i32": 100_000}])
    assert frame.select(pl.col("i32") * pl.col("i32")).item() != 10**10


@settings(max_examples=150, deadline=None)
@given(TREES, st.lists(rows(), min_size=1, max_size=6))
def test_integers_are_those_of_python(tree: Expr, some: list[Row]) -> None:
    frame = table(some)
    made = in_64_bits(tree.polars, frame.schema)
    wanted = [tree.python(row) for row in some]
    assert frame.select(made.expr.cast(pl.Int64, strict=False).alias("x"))["x"].to_list() == wanted
    if made.bounds is not None:
        assert all(value is None or made.bounds[0] <= value <= made.bounds[1] for value in wanted)
    usual = all(row["i64"] is None or abs(row["i64"]) < 2**61 for row in some)
    if not made.changed and usual:  # the fingerprint stays, so the values must
        assert frame.select(tree.polars.cast(pl.Int64, strict=False).alias("x"))["x"].to_list() == wanted


def numbers(a: Expr, b: Expr, op: Callable[[Any, Any], Any]) -> Expr:
    def value(row: Row) -> float | None:
        x, y = a.python(row), b.python(row)
        return None if x is None or y is None else float(op(x, y))

    return Expr(op(a.polars, b.polars), value)


def float_column(name: str) -> Expr:
    return Expr(pl.col(name), lambda row: None if row[name] is None else float(row[name]))


SQUARED = numbers(numbers(Expr(pl.col("i16"), lambda row: row["i16"]), Expr(pl.col("i16"), lambda row: row["i16"]), lambda a, b: a * b),
                  Expr(pl.lit(7), lambda _: 7), lambda a, b: a / b)  # fmt: skip
FLOATS = st.recursive(
    st.sampled_from([float_column("f"), float_column("f"), float_column("d"), float_column("i8"), SQUARED]),
    lambda some: st.one_of(
        st.builds(numbers, some, some, st.sampled_from([lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b])),
        st.builds(numbers, some, st.sampled_from([0.1, 3, 0.5, 7.25]).map(lambda n: Expr(pl.lit(n), lambda _: n)),
                  st.sampled_from([lambda a, b: a * b, lambda a, b: a / b])),
    ),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.lists(rows(), min_size=1, max_size=6))
def test_floats_are_those_of_python_rounded_once(tree: Expr, some: list[Row]) -> None:
    frame = table(some)
    made = in_64_bits(tree.polars, frame.schema, rounded=True)
    wanted = [None if value is None else float32(value) for value in map(tree.python, some)]
    assert frame.select(made.expr.cast(pl.Float32).alias("x"))["x"].to_list() == wanted
    if not made.changed:
        assert frame.select(tree.polars.cast(pl.Float32).alias("x"))["x"].to_list() == wanted


KEPT: dict[str, pl.Expr] = {
    "a product of floats": pl.col("f") * 2, "a quotient": pl.col("f") / pl.col("f"), "a quotient without nan": (pl.col("f") / pl.col("f")).fill_nan(None),
    "minutes of a day": pl.col("t").dt.hour().cast(pl.Int32) * 60 + pl.col("t").dt.minute(), "float64": (pl.col("d") - 3) / pl.col("d") * 2,
    "a sum of int64": pl.col("i64") + pl.col("i64") - 60, "a quotient of narrow integers": pl.col("i8") / pl.col("i16"), "a comparison": pl.col("f") > 0.1,
    "a remainder of a hash": pl.col("s").hash(1) % 100, "no arithmetic": pl.col("i8"), "a text": pl.col("s") + "x", "times": pl.col("t") - pl.col("t") > timedelta(hours=1),
    "a logarithm of float64": pl.col("d").log(), "bits": pl.col("i8") & 3, "booleans": pl.col("b") + pl.col("b"),
}  # fmt: skip
CHANGED: dict[str, pl.Expr] = {
    "a product": pl.col("i32") * pl.col("i32"), "a difference of lengths": pl.col("s").str.len_bytes() - 10, "a hash": pl.col("s").hash(1),
    "a sum": pl.col("i8") + 1, "a power": pl.col("i32") ** 2, "a sign": -pl.col("i8"), "an absolute value": pl.col("i16").abs(), "a product of int64": pl.col("i64") * 10,
    "a condition": pl.col("i8") * 2 > 100, "a quotient by a constant": pl.col("f") / 3, "a quotient cut to an integer": (pl.col("d") / 0.1).floor(), "two steps in float32": (pl.col("f") - pl.col("f")) / pl.col("f"), "a constant that float32 rounds": pl.col("f") * 0.1,
    "a floor by a constant": pl.col("d") // 0.1, "a remainder by a constant": pl.col("d") % 0.1, "a logarithm of float32": pl.col("f").log(), "a list": pl.concat_list("i32", "i32").list.sum(), "columns added": pl.sum_horizontal("i8", "i8"), "a day of a month": pl.col("t").dt.day() * pl.col("i8"),
}  # fmt: skip
WIDE = {**COLUMNS, "t": pl.Datetime("us", "UTC")}


@pytest.mark.parametrize("what", KEPT)
def test_what_cannot_differ_keeps_its_meaning(what: str) -> None:
    made = in_64_bits(KEPT[what], WIDE, rounded=True)  # type: ignore[arg-type]
    assert not made.changed


@pytest.mark.parametrize("what", CHANGED)
def test_what_can_differ_has_another_meaning(what: str) -> None:
    made = in_64_bits(CHANGED[what], WIDE, rounded=True)  # type: ignore[arg-type]
    assert made.changed


def test_lists_hashes_and_powers() -> None:
    frame = pl.DataFrame({"i32": [2**31 - 1], "i64": [2**40], "s": ["b"]}, schema_overrides={"i32": pl.Int32})

    def value(expr: pl.Expr) -> Any:
        return frame.select(in_64_bits(expr, frame.schema).expr.alias("x")).item()

    assert value(pl.concat_list("i32", "i32", "i32").list.sum()) == 3 * (2**31 - 1)
    assert value(pl.concat_list("i64", "i64").list.sum()) == 2**41
    assert value(pl.col("s").hash(1)) == frame["s"].hash(1).item() - 2**64
    assert value(pl.col("i32") ** 9) is None
    assert value(pl.col("i64") ** 200) is None
    square = pl.col("i32") * pl.col("i32")
    assert value(pl.concat_list(square, square).list.sum()) == 2 * (2**31 - 1) ** 2
    assert value(pl.concat_list(square, square, square).list.sum()) is None
    assert value(pl.concat_list(square, pl.lit(1)).list.max()) == (2**31 - 1) ** 2
    assert value(pl.struct(x=square, Year=pl.col("i32")).struct.field("x")) == (2**31 - 1) ** 2
    assert value(pl.struct(Year=pl.col("i32")).struct.field("Year") * 4) == 4 * (2**31 - 1)
    assert value(pl.col("i32").cast(pl.Int8, wrap_numerical=True) - 200) == -201
    assert value((pl.col("i32") * 2).cast(pl.String)) == "4294967294"


q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64, "qty": pl.Int32, "cents": pl.Int32, "big": pl.Int64})
ev = Source("ev", time="at", columns={"k": pl.Int64, "qty": pl.Int32, "cents": pl.Int32})


def at(hour: int) -> datetime:
    return T0 + timedelta(hours=hour)


def asked() -> pl.DataFrame:
    row = {"id": [1, 2], "k": [1, 1], "qty": [100_000, 2], "cents": [99_999, 3], "big": [2**62, 5]}
    return pl.DataFrame({"at": [at(3), at(3)], **row}, schema=q.schema)


def happened() -> pl.DataFrame:
    return pl.DataFrame(
        {"at": [at(1), at(2)], "k": [1, 1], "qty": [100_000, 2], "cents": [99_999, 3]}, schema=ev.schema
    )


def test_derived_conditions_and_labels_do_not_wrap(caplog: pytest.LogCaptureFixture) -> None:
    dear = pl.col("qty") * pl.col("cents") > 2**31
    features: list[Feature] = [
        Derived(total=pl.col("qty") * pl.col("cents"), large=pl.col("big") * pl.col("big")),
        Trailing(ev, by="k", over="1d", where=dear, name="dear", stats={"*": "count"}),
        Latest(ev, by="k", columns="qty", max_age="forever", where=dear, name="last"),
        Trailing(ev, by="k", over="all", where=dear, name="ever", stats={"qty": "sum"}),
        Derived(more=pl.col("total") * 2, hidden=pl.col("last_qty") * pl.col("total")),
    ]
    view = FeatureView("v", q, "id", features)
    made = compute(view, asked(), {"ev": happened()})
    assert made["total"].to_list() == [9_999_900_000, 6]
    assert made["large"].to_list() == [None, 25]
    assert "Derived 'large': 1 of 2 values are null: int64 cannot hold them" in caplog.text
    assert made["dear_by_k_count_1d"].to_list() == [1, 1]
    assert made["last_qty"].to_list() == [100_000, 100_000]
    assert made["ever_by_k_qty_sum_all"].to_list() == [100_000.0, 100_000.0]
    assert made["more"].to_list() == [19_999_800_000, 12]
    label = Label(ev, on="k", value=pl.col("qty") * pl.col("cents"), within="1d")
    rows = asked().with_columns(at=pl.lit(at(0)).dt.cast_time_unit("us"))
    assert attach(rows, happened(), label, "at")["__label"].to_list() == [9_999_900_000.0] * 2


def test_a_feature_is_bounded_by_the_column_it_comes_from() -> None:
    """Int64 features of narrow columns, and counts, cannot leave int64: what was computed of them keeps its meaning."""
    dim = Source("dim", columns={"k": pl.Int64, "year": pl.Int32})
    view = FeatureView("v", q, "id", [
        Lookup(dim, by="k", columns="year"), Trailing(ev, by="k", over=("1h", "1d"), stats={"*": "count"}),
        Derived(age=pl.col("at").dt.year() - pl.col("dim_year"), queue=pl.col("ev_by_k_count_1d") - pl.col("ev_by_k_count_1h"), squared=pl.col("dim_year") * pl.col("dim_year")),
        Derived(again=pl.col("squared") * pl.col("squared")),
    ])  # fmt: skip
    assert {name: each.changed for name, each in view.arithmetic.items()} == {
        "age": False,
        "queue": False,
        "squared": False,
        "again": True,
    }
    assert all(view.arithmetic[name].overflow is None for name in ("age", "queue", "squared"))


@pytest.mark.parametrize("dtype", [pl.Float32, pl.Float64, pl.Int64])
def test_a_quotient_by_a_constant_is_the_same_alone_and_in_company(dtype: Any) -> None:
    """Polars divides one row and multiplies many by the inverse."""
    frame = pl.DataFrame({"x": np.random.default_rng(1).integers(1, 10**6, 500)}).cast(dtype)
    for expr in (
        pl.col("x") / 3,
        (pl.col("x") / 0.1).floor(),
        (1 - pl.col("x") / 49).cast(pl.Float64),
        pl.col("x") / 8,
        pl.col("x") * 0.1 // 0.1,
        pl.col("x") * 0.1 % 0.3,
    ):
        made = in_64_bits(expr, frame.schema, rounded=True).expr
        whole = frame.select(made.cast(pl.Float64).alias("x"))["x"].to_list()
        assert [frame[i : i + 1].select(made.cast(pl.Float64).alias("x")).item() for i in range(500)] == whole
    exact = in_64_bits(pl.col("x") / 3, frame.schema).expr
    assert frame.select(exact.alias("x"))["x"].to_list() == [x / 3 for x in frame["x"]]
