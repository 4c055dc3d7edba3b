"""Random expressions over columns of every width, each with what Python computes for a row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import polars as pl
from hypothesis import strategies as st

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
        **row,
        "b": draw(st.none() | st.booleans()),
        "f": draw(st.none() | finite),
        "d": draw(st.none() | st.floats(-1e6, 1e6)),
        "s": draw(st.none() | st.text(max_size=5)),
    }


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


def numbers(a: Expr, b: Expr, op: Callable[[Any, Any], Any]) -> Expr:
    def value(row: Row) -> float | None:
        x, y = a.python(row), b.python(row)
        return None if x is None or y is None else float(op(x, y))

    return Expr(op(a.polars, b.polars), value)


def float_column(name: str) -> Expr:
    return Expr(pl.col(name), lambda row: None if row[name] is None else float(row[name]))


SQUARED = numbers(
    numbers(
        Expr(pl.col("i16"), lambda row: row["i16"]), Expr(pl.col("i16"), lambda row: row["i16"]), lambda a, b: a * b
    ),
    Expr(pl.lit(7), lambda _: 7),
    lambda a, b: a / b,
)


FLOATS = st.recursive(
    st.sampled_from([float_column("f"), float_column("f"), float_column("d"), float_column("i8"), SQUARED]),
    lambda some: st.one_of(
        st.builds(numbers, some, some, st.sampled_from([lambda a, b: a + b, lambda a, b: a - b, lambda a, b: a * b])),
        st.builds(
            numbers,
            some,
            st.sampled_from([0.1, 3, 0.5, 7.25]).map(lambda n: Expr(pl.lit(n), lambda _: n)),
            st.sampled_from([lambda a, b: a * b, lambda a, b: a / b]),
        ),
    ),
    max_leaves=4,
)


KEPT: dict[str, pl.Expr] = {
    "a product of floats": pl.col("f") * 2,
    "a quotient": pl.col("f") / pl.col("f"),
    "a quotient without nan": (pl.col("f") / pl.col("f")).fill_nan(None),
    "minutes of a day": pl.col("t").dt.hour().cast(pl.Int32) * 60 + pl.col("t").dt.minute(),
    "float64": (pl.col("d") - 3) / pl.col("d") * 2,
    "a sum of int64": pl.col("i64") + pl.col("i64") - 60,
    "a quotient of narrow integers": pl.col("i8") / pl.col("i16"),
    "a comparison": pl.col("f") > 0.1,
    "a remainder of a hash": pl.col("s").hash(1) % 100,
    "no arithmetic": pl.col("i8"),
    "a text": pl.col("s") + "x",
    "times": pl.col("t") - pl.col("t") > timedelta(hours=1),
    "a logarithm of float64": pl.col("d").log(),
    "bits": pl.col("i8") & 3,
    "booleans": pl.col("b") + pl.col("b"),
}
CHANGED: dict[str, pl.Expr] = {
    "a product": pl.col("i32") * pl.col("i32"),
    "a difference of lengths": pl.col("s").str.len_bytes() - 10,
    "a hash": pl.col("s").hash(1),
    "a sum": pl.col("i8") + 1,
    "a power": pl.col("i32") ** 2,
    "a sign": -pl.col("i8"),
    "an absolute value": pl.col("i16").abs(),
    "a product of int64": pl.col("i64") * 10,
    "a condition": pl.col("i8") * 2 > 100,
    "a quotient by a constant": pl.col("f") / 3,
    "a quotient cut to an integer": (pl.col("d") / 0.1).floor(),
    "two steps in float32": (pl.col("f") - pl.col("f")) / pl.col("f"),
    "a constant that float32 rounds": pl.col("f") * 0.1,
    "a floor by a constant": pl.col("d") // 0.1,
    "a remainder by a constant": pl.col("d") % 0.1,
    "a logarithm of float32": pl.col("f").log(),
    "a list": pl.concat_list("i32", "i32").list.sum(),
    "columns added": pl.sum_horizontal("i8", "i8"),
    "a day of a month": pl.col("t").dt.day() * pl.col("i8"),
}
WIDE = {**COLUMNS, "t": pl.Datetime("us", "UTC")}
