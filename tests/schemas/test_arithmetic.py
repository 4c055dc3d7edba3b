"""Expressions over columns of every width against Python's integers and floats: nothing wraps, and what kept its
meaning kept its values."""

from __future__ import annotations

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
from tests.support.arithmetic import (
    CHANGED,
    COLUMNS,
    FLOATS,
    KEPT,
    TREES,
    WIDE,
    Expr,
    Row,
    float32,
    rows,
    table,
)
from transforms.features.kernel import KernelTables, compute
from transforms.training.labels import attach

T0 = datetime(2024, 1, 1, tzinfo=UTC)


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


@settings(max_examples=100, deadline=None)
@given(FLOATS, st.lists(rows(), min_size=1, max_size=6))
def test_floats_are_those_of_python_rounded_once(tree: Expr, some: list[Row]) -> None:
    frame = table(some)
    made = in_64_bits(tree.polars, frame.schema, rounded=True)
    wanted = [None if value is None else float32(value) for value in map(tree.python, some)]
    assert frame.select(made.expr.cast(pl.Float32).alias("x"))["x"].to_list() == wanted
    if not made.changed:
        assert frame.select(tree.polars.cast(pl.Float32).alias("x"))["x"].to_list() == wanted


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


def spine_rows() -> pl.DataFrame:
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
    made = compute(view, spine_rows(), KernelTables({"ev": happened()}))
    assert made["total"].to_list() == [9_999_900_000, 6]
    assert made["large"].to_list() == [None, 25]
    assert "Derived 'large': 1 of 2 values are null: int64 cannot hold them" in caplog.text
    assert made["dear_by_k_count_1d"].to_list() == [1, 1]
    assert made["last_qty"].to_list() == [100_000, 100_000]
    assert made["ever_by_k_qty_sum_all"].to_list() == [100_000.0, 100_000.0]
    assert made["more"].to_list() == [19_999_800_000, 12]
    label = Label(ev, on="k", value=pl.col("qty") * pl.col("cents"), within="1d")
    rows = spine_rows().with_columns(at=pl.lit(at(0)).dt.cast_time_unit("us"))
    assert attach(rows, happened(), label, "at")["__label"].to_list() == [9_999_900_000.0] * 2


def test_a_feature_is_bounded_by_the_column_it_comes_from() -> None:
    """Int64 features of narrow columns, and counts, cannot leave int64: what was computed of them keeps its meaning."""
    dim = Source("dim", columns={"k": pl.Int64, "year": pl.Int32})
    view = FeatureView(
        "v",
        q,
        "id",
        [
            Lookup(dim, by="k", columns="year"),
            Trailing(ev, by="k", over=("1h", "1d"), stats={"*": "count"}),
            Derived(
                age=pl.col("at").dt.year() - pl.col("dim_year"),
                queue=pl.col("ev_by_k_count_1d") - pl.col("ev_by_k_count_1h"),
                squared=pl.col("dim_year") * pl.col("dim_year"),
            ),
            Derived(again=pl.col("squared") * pl.col("squared")),
        ],
    )
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
