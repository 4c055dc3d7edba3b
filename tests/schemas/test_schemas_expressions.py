"""Which expressions are row-local, and that an accepted one has the same value alone and among other rows."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_series_equal

from schemas.errors import DefinitionError
from schemas.expressions import canonical, columns_of, dtype_of, passes, require_row_local

x, y, s, t, b, d, n = (pl.col(name) for name in "xystbdn")
T0 = datetime(2020, 1, 1, tzinfo=UTC)
rows = pl.DataFrame(
    {
        "x": [1.5, None, -2.0, 0.0, 7.25, 1e9],
        "y": [0.5, 2.0, None, -1.0, 3.0, 0.0],
        "n": [5, 0, -3, None, 12, 60],
        "s": ["a-b", "B", "", None, "12", "é"],
        "b": [True, None, False, True, False, True],
        "t": [T0 + timedelta(hours=7 * i) for i in range(6)],
        "d": [date(2020, 1, 1) + timedelta(days=40 * i) for i in range(6)],
    },
    schema_overrides={"y": pl.Float32},
)

ROW_LOCAL: dict[str, pl.Expr] = {
    "arithmetic": x * 2 + y / 3 - 1,
    "power": x**2,
    "modulo": n % 7,
    "floor division": n // 60,
    "negation": -x,
    "bits": n & 3,
    "logic": (x > 15) & (y <= 3) | ~b,
    "xor": b ^ (x > 0),
    "null": x.is_null(),
    "nan": x.is_nan(),
    "finite": x.is_finite(),
    "equal or both null": x.eq_missing(y),
    "fill with a number": x.fill_null(0),
    "fill with a column": x.fill_null(y),
    "fill nan": x.fill_nan(None),
    "cast": x.cast(pl.Int64, strict=False),
    "clip": x.clip(0, 10),
    "clip by a column": x.clip(-1e6, y),
    "absolute": x.abs(),
    "logarithm": x.log(),
    "log1p": x.log1p(),
    "exponential": y.exp(),
    "root": x.sqrt(),
    "sine": x.sin(),
    "round": x.round(2),
    "floor": x.floor(),
    "sign": x.sign(),
    "arctan2": pl.arctan2(x, y),
    "constant": pl.lit(3),
    "alias": (x * 2).alias("foo"),
    "when": pl.when(x > 1).then(y).otherwise(0),
    "chain of whens": pl.when(x > 1).then(1).when(y > 2).then(2).otherwise(None),
    "is in strings": s.is_in(["a", "B"]),
    "is in numbers": n.is_in([1, 5]),
    "is between": x.is_between(0, 2),
    "is between columns": x.is_between(y, y + 1),
    "coalesce": pl.coalesce(x, y, 0),
    "least of columns": pl.min_horizontal(x, y),
    "sum of columns": pl.sum_horizontal(x, y),
    "any of columns": pl.any_horizontal(b, x > 1),
    "mean of columns": pl.mean_horizontal(x, y),
    "upper case": s.str.to_uppercase(),
    "length of text": s.str.len_chars(),
    "contains": s.str.contains("a"),
    "starts with": s.str.starts_with("a"),
    "slice of text": s.str.slice(0, 2),
    "joined text": pl.concat_str(s, n.cast(pl.String), separator="-"),
    "format": pl.format("{}-{}", s, n),
    "replace in text": s.str.replace("a", "b"),
    "strip": s.str.strip_chars(),
    "extract": s.str.extract(r"(\d+)", 1),
    "text to number": s.str.to_integer(strict=False),
    "parts of text": s.str.split("-").list.len(),
    "part of text": s.str.split("-").list.get(0, null_on_oob=True),
    "list of columns": pl.concat_list(x, y).list.max(),
    "sum in a list": pl.concat_list(x, y).list.sum(),
    "sorted list": pl.concat_list(x, y).list.sort().list.first(),
    "json": s.str.json_path_match("$.a"),
    "text with a format": s.str.to_datetime("%Y", strict=False).dt.year(),
    "any of several texts": s.str.contains_any(["a", "b"]),
    "hour": t.dt.hour(),
    "weekday": t.dt.weekday(),
    "epoch": t.dt.epoch("s"),
    "truncated": t.dt.truncate("1h").dt.hour(),
    "local hour": t.dt.convert_time_zone("America/New_York").dt.hour(),
    "day of year": t.dt.ordinal_day(),
    "time between": (t - pl.lit(T0)).dt.total_minutes(),
    "offset": t.dt.offset_by("1d").dt.day(),
    "date": t.dt.date().dt.day(),
    "compare dates": d > pl.lit(date(2020, 3, 1)),
    "duration": (t + pl.duration(hours=n)).dt.hour(),
    "replace values": s.replace({"a": "b"}),
    "replace all values": s.replace_strict({"B": 1}, default=0),
    "categories of an enum": s.cast(pl.Enum(["B", "12"]), strict=False).to_physical(),
    "field of a struct": pl.struct(x, y).struct.field("x"),
    "sql": pl.sql_expr("x + 1"),
}

LOOKS_AROUND: dict[str, tuple[Any, str]] = {
    "mean": (x - x.mean(), "aggregates over all rows"),
    "sum": (x / x.sum(), "aggregates"),
    "count": (x * x.count(), "aggregates"),
    "first": (x - x.first(), "aggregates"),
    "last": (x.last(), "aggregates"),
    "quantile": (x > x.quantile(0.5), "depends on other rows"),
    "any": (b.any(), "depends on other rows"),
    "mode": (x.mode(), "depends on other rows"),
    "implode": (x.implode().list.sum(), "aggregates"),
    "length": (x / pl.len(), "counts the rows"),
    "over": (x.mean().over("s"), "groups of rows"),
    "rank over": (x.rank().over("s"), ""),
    "over in when": (pl.when(b).then(x.mean().over(s)).otherwise(0), "groups of rows"),
    "aggregate in when": (pl.when(x > x.max()).then(1).otherwise(0), "aggregates"),
    "aggregate in then": (pl.when(x > 1).then(y.max()).otherwise(0), "aggregates"),
    "aggregate in otherwise": (pl.when(x > 1).then(1).otherwise(y.min()), "aggregates"),
    "aggregate in a function": (x.clip(0, y.max()), "aggregates"),
    "aggregate in a cast": (x.mean().cast(pl.Int64) + n, "aggregates"),
    "aggregate behind an alias": (x.max().alias("q") + x, "aggregates"),
    "aggregate in a struct": (pl.struct(x.max(), y).struct.field("x"), "aggregates"),
    "aggregate in a list": (pl.concat_list(x, y.sum()).list.max(), "aggregates"),
    "aggregate in text": (pl.concat_str(s, s.first()), "aggregates"),
    "aggregate in sql": (pl.sql_expr("x - max(x)"), "aggregates"),
    "coalesce": (pl.coalesce(x, y.mean()), "aggregates"),
    "is in a column": (n.is_in(n.implode()), "aggregates"),
    "time since the last": (t.max() - t, "aggregates"),
    "shift": (x.shift(1), "depends on other rows"),
    "difference": (x.diff(), "depends on other rows"),
    "change": (x.pct_change(), "depends on other rows"),
    "rank": (x.rank(), "depends on other rows"),
    "cumulative": (x.cum_sum(), "depends on other rows"),
    "forward fill": (x.forward_fill(), "depends on other rows"),
    "fill with the last": (x.fill_null(strategy="forward"), "depends on other rows"),
    "fill with the mean": (x.fill_null(strategy="mean"), "depends on other rows"),
    "interpolate": (x.interpolate(), "depends on other rows"),
    "rolling": (x.rolling_mean(3), "depends on other rows"),
    "rolling by time": (x.rolling_mean_by(t, "1h"), "depends on other rows"),
    "rolling of an aggregate": (x.mean().rolling("t", period="1h"), ""),
    "exponential mean": (x.ewm_mean(alpha=0.5), "depends on other rows"),
    "duplicates": (x.is_duplicated(), "depends on other rows"),
    "first of its kind": (x.is_first_distinct(), "depends on other rows"),
    "run": (x.rle_id(), "depends on other rows"),
    "reverse": (x.reverse(), "depends on other rows"),
    "sort": (x.sort(), "order of rows"),
    "sort by": (x.sort_by(y), "order of rows"),
    "gather": (x.gather([0]), "another row"),
    "get": (x.get(0), "another row"),
    "every other": (x.gather_every(2), ""),
    "filter": (x.filter(y > 0), "drops rows"),
    "slice": (x.slice(0, 2), "drops rows"),
    "head": (x.head(1), "drops rows"),
    "drop nulls": (x.drop_nulls(), "changes the number of rows"),
    "drop nans": (x.drop_nans(), "changes the number of rows"),
    "explode": (s.str.split("-").explode(), "changes the number of rows"),
    "unique": (x.unique(), "depends on other rows"),
    "rows that hold": (pl.arg_where(b), ""),
    "top": (x.top_k(2), ""),
    "repeat": (pl.repeat(1, 3), ""),
    "range": (pl.int_range(pl.len()), ""),
    "sample": (x.sample(1), ""),
    "shuffle": (x.shuffle(1), "draws at random"),
    "sample of a list": (pl.concat_list(x, y).list.sample(1).list.first(), "draws at random"),
    "claimed order": (x.set_sorted(), "claims an order"),
    "python function": (x.map_elements(lambda v: v, return_dtype=pl.Float64), "Python function"),
    "python batch": (x.map_batches(lambda v: v), "Python function"),
    "fold": (pl.fold(pl.lit(0.0), lambda a, c: a + c, [x, y]), ""),
    "categories": (s.cast(pl.Categorical).to_physical(), "numbers categories by their first row"),
    "literal rows": (x + pl.lit(pl.Series([1.0] * 6)), "carries rows of its own"),
    "is in a series": (n.is_in(pl.Series([1, 2])), "carries rows"),
    "element": (pl.element() + 1, "not known to be row-local"),
    "what needs its column's type": (x.lower_bound(), "not known to be row-local"),
    "appended": (x.append(y), ""),
    "guessed format": (s.str.to_datetime(strict=False), "depends on other rows"),
}


@pytest.mark.parametrize("name", ROW_LOCAL)
def test_an_expression_of_its_row_passes_and_gives_the_same_alone(name: str) -> None:
    expr = ROW_LOCAL[name]
    require_row_local(expr, name)
    assert dtype_of(expr, dict(rows.schema), name) == rows.with_columns(expr.alias("e")).schema["e"]
    together = rows.with_columns(expr.alias("e"))["e"]
    assert len(together) == len(rows)
    for i in range(len(rows)):
        alone = rows[i : i + 1].with_columns(expr.alias("e"))["e"]
        assert_series_equal(alone, together[i : i + 1], check_exact=True)


@pytest.mark.parametrize("name", LOOKS_AROUND)
def test_an_expression_that_looks_around_is_refused_with_its_part_and_reason(name: str) -> None:
    expr, reason = LOOKS_AROUND[name]
    with pytest.raises(DefinitionError, match="Derived 'e' is row-local") as caught:
        require_row_local(expr, "Derived 'e'")
    assert reason in str(caught.value.value)
    assert "History belongs in Trailing or Latest" in caught.value.fix


@given(name=st.sampled_from(list(ROW_LOCAL)), bad=st.sampled_from(list(LOOKS_AROUND)))
def test_a_part_that_looks_around_is_found_wherever_it_hides(name: str, bad: str) -> None:
    hidden = pl.struct(ROW_LOCAL[name].alias("a"), LOOKS_AROUND[bad][0].alias("b")).struct.field("a")
    with pytest.raises(DefinitionError, match="row-local"):
        require_row_local(hidden, "it")


@pytest.mark.parametrize("expr", [pl.all(), pl.col("x", "y"), pl.col("^.$"), pl.exclude("x"), pl.first(), pl.nth(0)])
def test_several_columns_at_once_are_refused(expr: pl.Expr) -> None:
    with pytest.raises(DefinitionError, match="it yields one column"):
        require_row_local(expr, "it")


@pytest.mark.parametrize("value", ["x", 5, None, rows["x"], rows])
def test_what_is_no_expression_is_refused(value: Any) -> None:
    with pytest.raises(DefinitionError, match="it is a Polars expression"):
        require_row_local(value, "it")


def test_the_part_at_fault_is_shown() -> None:
    with pytest.raises(DefinitionError, match=r'of which col\("x"\)\.mean\(\) aggregates over all rows of a batch'):
        require_row_local(pl.when(b).then((x - x.mean()).round(1)).otherwise(0), "it")


def test_equal_expressions_are_written_down_alike() -> None:
    assert canonical(x * 2 + y) == canonical(pl.col("x") * 2 + pl.col("y"))
    different = [
        x * 2,
        x * 2.0,
        x * 3,
        2 * x,
        y * 2,
        (x * 2).cast(pl.Float32),
        x.round(2),
        x.round(3),
        s.is_in(["a"]),
        s.is_in(["b"]),
        x > 1,
        x >= 1,
    ]
    assert len({canonical(expr) for expr in different}) == len(different)


def test_columns_and_types_of_an_expression() -> None:
    schema = dict(rows.schema)
    assert columns_of(pl.when(x > 1).then(y).otherwise(x)) == ["x", "y"]
    assert dtype_of(x > 1, schema, "it") == pl.Boolean
    assert dtype_of(y * 2, schema, "it") == pl.Float32
    with pytest.raises(DefinitionError, match=r"it reads columns that exist\. Got 'z'"):
        dtype_of(pl.col("z"), schema, "it")
    with pytest.raises(DefinitionError, match="it fits the types"):
        dtype_of(s.dt.hour(), schema, "it")


def test_a_column_passes_as_itself_if_it_is_at_most_cast() -> None:
    assert passes(x, "x")
    assert passes(x.cast(pl.Int64), "x")
    assert not passes(x, "y")
    assert not passes(x + 0, "x")
