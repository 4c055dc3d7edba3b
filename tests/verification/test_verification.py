"""A run checks itself: rows computed again plainly, from all rows of the sources, before anything is committed."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_pipelines import cli, features
from beam_pipelines.commands import verify
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing, load_definition
from schemas.arithmetic import in_64_bits
from schemas.errors import ContractError, MismatchError
from tests.support import arithmetic, market, oracles
from tests.support.features_runs import feature_rows, table_of
from tests.support.histories import T0, at, histories, many_spine_rows, view
from tests.support.kernels_case import same
from tests.support.tables import figures_of
from transforms.features import block_features
from transforms.features import kernel as kernels
from transforms.features.block_features import features_batch
from transforms.features.kernel import KernelTables, compute
from transforms.sources.contracts import Contract
from transforms.sources.inventory import take_inventory
from transforms.storage.delta_tables import DataFile, data_files, newest_version, open_table, write_files
from transforms.verification.check import SampleSize, Verification, Verified
from transforms.verification.plain_expressions import as_stored, evaluate
from transforms.verification.plain_features import recompute
from transforms.verification.plain_sources import Files, SourceFrames
from transforms.verification.plain_statistics import exact_variance, plain_statistic, quantile, variances_allowed
from transforms.verification.sample import choose_files, choose_rows, lifetime_feature_names


def in_memory(view: FeatureView, tables: Mapping[str, pl.DataFrame]) -> SourceFrames:
    return SourceFrames({name: Contract(source, tuple(source.schema)) for name, source in view.sources.items()}, tables)


@given(spine=many_spine_rows, tables=histories)
def test_the_plain_path_and_the_kernel_and_the_oracle_agree_to_the_bit(
    spine: pl.DataFrame, tables: Mapping[str, pl.DataFrame]
) -> None:
    kernel = compute(view, spine, KernelTables(tables))
    plain = recompute(view, spine, in_memory(view, tables), kernel)
    same(plain, kernel)
    same(plain, pl.DataFrame(oracles.features(view, spine, tables), schema=plain.schema, orient="row"))


# Sources whose rows repeat: with other keys, at the same moment, before every window.
ask = Source("ask", time="t", columns={"id": pl.Int64, "k": pl.String, "x": pl.Int32})
happen = Source(
    "happen", time="at", event_time="was", unique="e", columns={"e": pl.Int64, "k": pl.String, "v": pl.Float64}
)
sort = Source(
    "sort",
    time="at",
    unique=("e", "k"),
    order="n",
    columns={"e": pl.Int64, "k": pl.String, "n": pl.Int64, "s": pl.String},
)
things = Source("things", columns={"k": pl.String, "a": pl.Int32, "b": pl.String})
repeating = FeatureView(
    "repeating",
    spine=ask,
    key="id",
    features=[
        Trailing(happen, by="k", over=("5s", "40s"), stats={"v": ("sum", "count", "var", "last"), "*": "count"}),
        Trailing(sort, by="k", over=("20s", "all"), stats={"n": ("sum", "last", "std"), "s": "first", "*": "count"}),
        Latest(sort, by="k", columns=("s", "n"), max_age="forever"),
        Trailing(ask, by="k", over="30s", stats={"x": ("sum", "max"), "*": "count"}),
        Lookup(things, by="k", columns=("a", "b")),
        Derived(x=pl.col("x").cast(pl.Float32), marked=pl.col("k") + "!", half=pl.col("x") / 2),
        Trailing(happen, by={"marked": "k"}, over="40s", where=pl.col("v") > 1, stats={"*": "count"}, name="changed"),
    ],
)


def rows_of(source: Source, **columns: st.SearchStrategy[Any]) -> st.SearchStrategy[pl.DataFrame]:
    rows = st.lists(st.fixed_dictionaries(columns), min_size=1, max_size=16)
    return rows.map(lambda rows: pl.DataFrame(rows, schema=source.schema, orient="row"))


some_keys = st.sampled_from(["a", "b", "a!", None])
seconds = st.integers(0, 60).map(at)
repeated_rows = st.fixed_dictionaries(
    {
        "ask": rows_of(ask, t=seconds, id=st.integers(0, 3) | st.none(), k=some_keys, x=st.integers(0, 3)),
        "happen": st.lists(
            st.tuples(
                seconds,
                st.integers(0, 30),
                st.integers(0, 6) | st.none(),
                some_keys,
                st.sampled_from([0.1, 2.5, 1e10, float("inf"), float("nan"), None]),
            ),
            min_size=1,
            max_size=16,
        ).map(
            lambda rows: pl.DataFrame(
                [
                    {"at": moment, "was": moment - timedelta(seconds=back), "e": e, "k": k, "v": v}
                    for moment, back, e, k, v in rows
                ],
                schema=happen.schema,
                orient="row",
            )
        ),
        "sort": rows_of(
            sort, at=seconds, e=st.integers(0, 6), k=some_keys, n=st.integers(0, 2), s=st.sampled_from(["x", "y", None])
        ),
        "things": rows_of(things, k=some_keys, a=st.integers(0, 3), b=st.sampled_from(["x", "y"])),
    }
)


def first_of(rows: list[dict[str, Any]], by: tuple[str, ...], order: list[str]) -> list[dict[str, Any]]:
    """Of rows alike in `by` the least in `order`, nulls first: the slow way."""
    kept: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: [(row[name] is not None, row[name]) for name in order]):
        kept.setdefault(tuple(row[name] for name in by), row)
    return list(kept.values())


def good_and_once(frames: Mapping[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """What the contracts leave of the repeating view's sources."""
    once = {"ask": ("t", "id"), "happen": ("e",), "sort": ("e", "k"), "things": ("k",)}
    result = {}
    for name, frame in frames.items():
        source = {"ask": ask, "happen": happen, "sort": sort, "things": things}[name]
        rows = [
            {column: None if value != value else value for column, value in row.items()}
            for row in frame.rows(named=True)
            if all(row[column] is not None for column in once[name] if name != "things")
            and row.get("v") != float("inf")
        ]
        order = [*([source.time] if source.time else []), *(source.order or ()), *source.schema]
        result[name] = pl.DataFrame(first_of(rows, once[name], order), schema=source.schema, orient="row")
    return result


def written(folder: Path, frames: Mapping[str, pl.DataFrame], group: int = 5) -> Path:
    for name, frame in frames.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        pq.write_table(frame.to_arrow(), folder / name / "a.parquet", row_group_size=group)
    return folder


def verification(
    view: FeatureView, root: Path, amount: SampleSize = SampleSize(None), run_id: str = "some"
) -> Verification:
    inventory = take_inventory(view, str(root), time.time_ns() // 1000)
    return Verification(
        view, {view.spine.name: inventory.spine, **inventory.contracts}, inventory.slices, amount, run_id
    )


def published(view: FeatureView, rows: pl.DataFrame, folder: Path) -> list[DataFile]:
    return [file for file, _ in write_files(features_batch(view, rows), str(folder), "run")]


@given(frames=repeated_rows, most=st.sampled_from([2, 10**6]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_rows_of_files_with_repeats_and_bad_rows_are_the_oracles(
    tmp_path_factory: pytest.TempPathFactory, frames: Mapping[str, pl.DataFrame], most: int
) -> None:
    folder, tables = tmp_path_factory.mktemp("files"), good_and_once(frames)
    if not len(tables["ask"]):
        return
    rows = oracles.features(repeating, tables["ask"], tables)
    schema = {name: {**ask.schema, **repeating.columns}[name] for name in (*repeating.context, *repeating.columns)}
    expected = pl.DataFrame(rows, schema=schema, orient="row")
    check = verification(repeating, written(folder, frames))
    files = published(repeating, expected, folder / "table")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transforms.verification.check.Files", lambda *args: Files(*args, most=most))
        found = check.of_files(files)
    assert found.examples == ()
    assert (found.rows, found.of, found.differing) == (len(expected), len(expected), 0)
    assert found.values == len(expected) * len(repeating.columns)


def test_a_window_holds_more_rows_than_memory_and_is_verified_in_parts(tmp_path: Path) -> None:
    n = 40
    frames = {
        "ask": pl.DataFrame(
            {"t": [at(i) for i in range(n)], "id": range(n), "k": ["a"] * n, "x": [1] * n}, schema=ask.schema
        ),
        "happen": pl.DataFrame(
            {
                "at": [at(i) for i in range(n)],
                "was": [at(i) for i in range(n)],
                "e": range(n),
                "k": ["a"] * n,
                "v": [0.1 * i for i in range(n)],
            },
            schema=happen.schema,
        ),
        "sort": pl.DataFrame(
            {"at": [at(i) for i in range(n)], "e": range(n), "k": ["a"] * n, "n": range(n), "s": ["x"] * n},
            schema=sort.schema,
        ),
        "things": pl.DataFrame({"k": ["a"], "a": [1], "b": ["x"]}, schema=things.schema),
    }
    files = published(repeating, compute(repeating, frames["ask"], KernelTables(frames)), tmp_path / "table")
    check = verification(repeating, written(tmp_path / "sources", frames))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transforms.verification.check.Files", lambda *args: Files(*args, most=10))
        assert (check.of_files(files).rows, check.of_files(files).differing) == (n, 0)
        some = dataclasses.replace(check, amount=SampleSize(20)).of_files(files)
    assert 0 < some.rows < 20, "a sample is made smaller instead"
    assert some.differing == 0


def test_a_column_that_no_feature_needs_may_be_missing_from_a_file(tmp_path: Path) -> None:
    frames = market.sources(30)
    frames["stock"] = frames["stock"].drop("note")
    folder = market.write(tmp_path, frames) / "sources"
    text = (
        market.DEFINITION[: market.DEFINITION.index("view =")]
        + """view = FeatureView("few", visits, key="visit", features=[
        Trailing(stock, by="shop", over="1d", stats={"pieces": ("sum", "count")})])"""
    )
    view = load_definition(str(market.define(tmp_path, text))).view
    rows = compute(view, frames["visits"], KernelTables({"stock": frames["stock"]}))
    found = verification(view, folder).of_files(published(view, rows, tmp_path / "table"))
    assert (found.rows, found.differing) == (30, 0)


def test_a_published_row_that_its_source_does_not_hold_is_found(tmp_path: Path) -> None:
    frames = market.sources(30)
    view = market.load(market.write(tmp_path, frames))
    rows = compute(view, frames["visits"], KernelTables(frames)).with_columns(visit=pl.col("visit") + 7)
    found = verification(view, tmp_path / "sources").of_files(published(view, rows, tmp_path / "table"))
    assert found.differing == 30
    assert found.examples[0].feature == "the spine row"


def test_a_source_that_changes_meanwhile_is_reported_as_that(tmp_path: Path) -> None:
    frames = market.sources(30)
    view = market.load(market.write(tmp_path, frames))
    check = verification(view, tmp_path / "sources")
    files = published(view, compute(view, frames["visits"], KernelTables(frames)), tmp_path / "table")
    market.write(tmp_path, {"sales": frames["sales"].with_columns(price=pl.col("price") * 2)})
    with pytest.raises(ContractError, match="was replaced"):
        check.of_files(files)


# Expressions and statistics.
@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1))
def test_integers_are_computed_in_64_bits_and_null_beyond(a: int, b: int, c: int) -> None:
    frame = pl.DataFrame({"a": [a], "b": [b], "c": [c]}, schema={"a": pl.Int32, "b": pl.Int32, "c": pl.Int64})
    for expr, exact in (
        (pl.col("a") * pl.col("b"), a * b),
        (pl.col("a") + pl.col("b") - 3, a + b - 3),
        (pl.col("c") * pl.col("a"), c * a),
        (pl.col("c") + pl.col("c"), 2 * c),
        (1 - pl.col("c"), 1 - c),
    ):
        assert evaluate(expr, frame)[0] == (exact if -(2**63) <= exact < 2**63 else None)


def test_arithmetic_is_wide_and_all_else_reads_values_as_they_are() -> None:
    frame = pl.DataFrame(
        {"s": ["abc"], "f": [0.1], "n": [-128]}, schema={"s": pl.String, "f": pl.Float32, "n": pl.Int8}
    )
    wide = float(np.float32(0.1))

    def value(expr: pl.Expr) -> Any:
        return evaluate(expr, frame)[0]

    assert value(pl.col("s").str.len_bytes() - 10) == -7
    assert (value(-pl.col("n")), value(pl.col("n").abs()), value(pl.col("n") ** 3)) == (128, 128, -(128**3))
    assert value((pl.col("f") * 3 + 1e-9).alias("x")) == wide * 3 + 1e-9
    assert value(pl.col("f") > 0.1) is False, "a comparison reads the column as it is"
    assert value(pl.col("f") * 1 > 0.1) is True
    assert value(pl.when(pl.col("f") > 0).then(pl.col("s").str.len_bytes()).otherwise(pl.lit(0))) == 3
    assert value(pl.col("s").str.slice(pl.col("n") + 129)) == "bc"
    assert value(pl.col("s").hash(1)) == pl.Series(["abc"]).hash(1).reinterpret(signed=True)[0]
    assert evaluate(pl.lit(2), frame).to_list() == [2]


@settings(max_examples=150, deadline=None)
@given(arithmetic.TREES, st.lists(arithmetic.rows(), min_size=1, max_size=6))
def test_integers_of_expressions_are_those_of_python(tree: arithmetic.Expr, some: list[arithmetic.Row]) -> None:
    frame = arithmetic.table(some)
    assert as_stored(evaluate(tree.polars, frame), pl.Int64()).to_list() == [tree.python(row) for row in some]


@settings(max_examples=100, deadline=None)
@given(arithmetic.FLOATS, st.lists(arithmetic.rows(), min_size=1, max_size=6))
def test_floats_of_expressions_are_those_of_python(tree: arithmetic.Expr, some: list[arithmetic.Row]) -> None:
    wanted = [None if value is None else arithmetic.float32(value) for value in map(tree.python, some)]
    assert evaluate(tree.polars, arithmetic.table(some)).cast(pl.Float32).to_list() == wanted


square = pl.col("i32") * pl.col("i32")
EXPRESSIONS = [
    *arithmetic.KEPT.values(),
    *arithmetic.CHANGED.values(),
    pl.col("d") // 0.1,
    pl.col("d") % 0.1,
    pl.col("f") // 3,
    pl.col("i32") // 7,
    pl.col("i32") % -7,
    pl.col("i32") // pl.col("i8"),
    pl.col("f").round(2),
    (pl.col("f") * 3).round(2),
    pl.col("f").clip(-1, 0.1),
    pl.col("f").fill_null(0.1),
    pl.col("f").sqrt(),
    pl.col("d") ** 2,
    pl.col("f") ** 3,
    pl.col("f") ** 0.5,
    (pl.col("d") / 1e6).exp(),
    pl.coalesce("f", "d"),
    pl.col("i8").is_in([1, 2]),
    pl.col("i32") ** 9,
    (-pl.col("i64")) ** 3,
    pl.sum_horizontal("i32", "i32", "i64"),
    pl.mean_horizontal("i32", "d"),
    pl.max_horizontal("f", "d"),
    pl.concat_list("i32", "i32").list.sum(),
    pl.concat_list(square, square, square).list.sum(),
    pl.concat_list(square, pl.lit(1)).list.max(),
    pl.struct(x=square, Year=pl.col("i32")).struct.field("x"),
    pl.struct(Year=pl.col("i32")).struct.field("Year") * 4,
    pl.col("i32").cast(pl.Int8, wrap_numerical=True) - 200,
    (pl.col("i32") * 2).cast(pl.String),
    pl.col("t").dt.offset_by("1d") - pl.col("t"),
    (pl.col("t") - pl.datetime(2020, 1, 1, time_zone="UTC")).dt.total_days(),
    pl.col("s").str.len_chars().cast(pl.Int8) * 100,
    pl.when(pl.col("b")).then(pl.col("i8") * 100).otherwise(pl.col("f")),
    pl.concat_str("s", square),
    pl.col("i8").abs() - pl.col("b"),
]


@settings(max_examples=25, deadline=None)
@given(some=st.lists(arithmetic.rows(), min_size=1, max_size=6))
@pytest.mark.parametrize("expr", EXPRESSIONS, ids=str)
def test_an_expression_is_what_the_pipelines_make_of_it(expr: pl.Expr, some: list[arithmetic.Row]) -> None:
    frame = arithmetic.table(some).with_columns(
        t=pl.lit(datetime(2024, 1, 9, 7, 31, tzinfo=UTC)).dt.cast_time_unit("us")
    )
    theirs = frame.select(in_64_bits(expr, frame.schema, rounded=True).expr.alias("x")).to_series()
    dtype = pl.Int64() if theirs.dtype.is_integer() else pl.Float32() if theirs.dtype.is_numeric() else theirs.dtype
    assert as_stored(evaluate(expr, frame), dtype).to_list() == as_stored(theirs, dtype).to_list()


@given(st.lists(st.sampled_from([0.0, 0.1, 1e10, -1e-5, 3.25, 1e16]), min_size=1, max_size=9), st.integers(1, 99))
def test_statistics_are_the_oracles(values: list[float], percent: int) -> None:
    for stat in ("sum", "mean", "min", "max", "median", "count", "n_unique", "first", "last", f"q{percent:02}"):
        assert plain_statistic(stat, values) == oracles.statistic(stat, values)
    assert quantile(values, percent / 100) == np.quantile(values, percent / 100)
    exact = exact_variance(values)
    assert (exact is None) == (len(values) < 2)
    if exact is not None:
        low, high = variances_allowed(exact, "var")
        assert low <= np.float32(float(exact)) <= high
        assert high <= np.nextafter(np.nextafter(low, np.float32(np.inf)), np.float32(np.inf))


def test_a_variance_that_floats_cancel_away_is_exact() -> None:
    stamps = [1.6e15 + i for i in range(90)]
    assert exact_variance(stamps) == exact_variance([float(i) for i in range(90)]) == pytest.approx(682.5)


# Which rows.
def a_table(folder: Path, days: list[int], rows: int = 30) -> tuple[FeatureView, list[DataFile]]:
    """The repeating view's table over some days, of empty sources: every tenth row has values."""
    spine = pl.DataFrame(
        [{"t": T0 + timedelta(days=d, minutes=i), "id": i, "k": "a", "x": i} for d in days for i in range(rows)],
        schema=ask.schema,
        orient="row",
    )
    sorts = pl.DataFrame(
        {"at": [T0 - timedelta(days=1)], "e": [1], "k": ["a"], "n": [5], "s": ["x"]}, schema=sort.schema
    )
    tables = {
        "ask": spine,
        "happen": pl.DataFrame(schema=happen.schema),
        "sort": sorts,
        "things": pl.DataFrame(schema=things.schema),
    }
    spine = spine.with_columns(k=pl.when(pl.col("id") % 10 == 0).then(pl.lit("a")))
    return repeating, published(repeating, compute(repeating, spine, KernelTables(tables)), folder)


def test_a_sample_is_decided_by_the_run_and_spread(tmp_path: Path) -> None:
    view, files = a_table(tmp_path, [*range(8), *range(20, 24)])
    chosen, starts = choose_files(files, 5, "one")
    assert {file.date for file in starts} == {T0.date(), T0.date() + timedelta(days=20)}
    assert chosen[:2] == starts
    assert max(files, key=lambda file: file.date) in chosen
    assert len(set(chosen)) == 5
    sample = choose_rows(view, chosen, starts, 40, "one")
    assert len(sample.rows) == sample.rows["row_id"].n_unique() == 40
    assert sample.rows["date"].n_unique() == 5
    assert sample.rows.equals(choose_rows(view, chosen, starts, 40, "one").rows)
    assert not sample.rows.equals(choose_rows(view, chosen, starts, 40, "two").rows)
    first_and_last = sample.rows.group_by("date").agg(pl.col("id").min().alias("low"), pl.col("id").max().alias("high"))
    assert first_and_last.select(pl.col("low").max(), pl.col("high").min()).row(0) == (0, 29)
    assert sample.rows["sort_s"].is_not_null().mean() > 0.2, "rows with values are favoured"


def test_each_lifetime_group_has_a_row_with_history(tmp_path: Path) -> None:
    view, files = a_table(tmp_path, [0, 1])
    assert lifetime_feature_names(view) == [
        [
            "sort_by_k_n_sum_all",
            "sort_by_k_n_last_all",
            "sort_by_k_n_std_all",
            "sort_by_k_s_first_all",
            "sort_by_k_count_all",
            "sort_s",
            "sort_n",
        ]
    ]
    sample = choose_rows(view, *choose_files(files, 1, "one"), 1, "one")
    assert (len(sample.rows), sample.least) == (1, 1)
    assert sample.rows["sort_by_k_count_all"][0] == 1


def test_time_decides_how_many_rows_and_one_is_verified_always(tmp_path: Path) -> None:
    frames = market.sources(200)
    view = market.load(market.write(tmp_path, frames))
    files = published(view, compute(view, frames["visits"], KernelTables(frames)), tmp_path / "table")
    now = time.time_ns() // 1000

    def verified(amount: SampleSize) -> Verified:
        return verification(view, tmp_path / "sources", amount).of_files(files)

    assert verified(SampleSize(100, 0.25, now - 3_600_000_000)).rows == 100
    assert verified(SampleSize(100, 0.25, now + 3_600_000_000)).rows == 1, "no time has passed at all"
    assert verified(SampleSize(100)).rows == 100
    assert verified(SampleSize(0)).rows == 0
    assert verified(SampleSize(None)).rows == 200
    assert all(verified(amount).differing == 0 for amount in (SampleSize(100, 0.01, now - 20_000_000), SampleSize(3)))


# Runs.
def run(store: Path, *flags: str, text: str = market.DEFINITION) -> dict[str, Any]:
    name = f"run-{len(list(store.glob('runs/*')))}"
    argv = ["--definition", str(market.define(store, text)), "--store", str(store), "--run_id", name, "--no-statistics"]
    assert features.main([*argv, "--max_dead_fraction", "1", *flags]) == 0
    return figures_of(store, name)


def test_a_run_reports_what_it_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market.write(tmp_path, market.spoiled(market.sources()), files=2)
    figures = run(tmp_path, "--verify", "all")
    assert figures["verification"] | {"seconds": 0} == {
        "rows": 120,
        "of": 120,
        "values": 120 * len(market.load(tmp_path).columns),
        "differing": 0,
        "seconds": 0,
        "examples": [],
    }
    assert "verified" in capsys.readouterr().out
    assert figures["verified"].startswith("120 rows (of 120), 0 differing, ")
    assert run(tmp_path, "--full")["verification"]["rows"] >= 1, "by default some are"
    assert "verification" not in run(tmp_path, "--full", "--verify", "0")
    assert run(tmp_path, "--full", "--verify", "7")["verification"]["rows"] == 7
    day = market.at(2).date()
    part = run(
        tmp_path, "--start", str(day), "--end", str(day + timedelta(days=1)), "--verify", "all", "--plan", "shuffle"
    )
    assert part["verification"]["rows"] == part["rows_out"] > 0


@pytest.mark.parametrize("flag", ["some", "-1", "1.5", ""])
def test_a_number_of_rows_is_one_or_all(tmp_path: Path, flag: str) -> None:
    argv = ["--definition", str(market.define(tmp_path)), "--store", str(tmp_path), f"--verify={flag}"]
    assert cli.main(["features", *argv]) == 2


def refused(store: Path, *flags: str, text: str = market.DEFINITION) -> str:
    """What a run that verification stops says; nothing is committed."""
    path = market.define(store, text)
    before = newest_version(table_of(store))
    with pytest.raises(MismatchError) as error:
        run(store, *flags, text=text)
    assert newest_version(table_of(store)) == before, "nothing is committed"
    assert error.value.exit_code == 5
    assert load_definition(str(path)).view.name
    return str(error.value)


def test_a_wrong_statistic_is_caught_and_nothing_is_committed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    market.write(tmp_path, market.sources())
    real = kernels.statistic

    def wrong(column: Any, stat: str, lo: Any, hi: Any) -> Any:
        values, valid = real(column, stat, lo, hi)
        # One bit of float32, of means alone.
        return (
            (np.nextafter(values.astype(np.float32), np.float32(np.inf)), valid) if stat == "mean" else (values, valid)
        )

    monkeypatch.setattr(kernels, "statistic", wrong)
    reported = refused(tmp_path)
    assert "'sales_by_shop_price_mean_6h' of visit=" in reported or "_mean_" in reported
    assert "recomputed" in reported
    assert "Nothing was committed" in reported
    argv = ["features", "--definition", str(tmp_path / "definition.py"), "--store", str(tmp_path), "--no-statistics"]
    assert cli.main(argv) == 5
    assert "recomputed" in capsys.readouterr().err
    assert newest_version(table_of(tmp_path)) is None
    assert cli.main([*argv, "--verify", "0"]) == 0


def test_history_lost_from_a_snapshot_is_caught(tmp_path: Path) -> None:
    """Kind of fault 1: a run builds on a wrong summary of what came before it."""
    text = market.DEFINITION.replace('over="1d", where=', 'over="all", where=')
    frames = market.sources()
    early = {
        name: frame.filter(pl.col(market.TIMES[name]) < market.at(3)) if name in market.TIMES else frame
        for name, frame in frames.items()
    }
    market.write(tmp_path, early)
    run(tmp_path, "--verify", "all", text=text)
    summaries = list(Path(table_of(tmp_path)).glob("_summaries/*.parquet"))
    assert summaries
    market.write(tmp_path, frames)
    for path in summaries:
        pq.write_table(pq.read_table(path)[:0], path)
    assert "'dear_by_shop_city_price_sum_all'" in refused(tmp_path, text=text)
    assert run(tmp_path, "--full", "--verify", "all", text=text)["verification"]["differing"] == 0


def test_rows_of_one_moment_taken_as_they_lie_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind of fault 4: which of several rows a feature takes."""
    frames = market.sources()
    again = frames["sales"].with_columns(pl.col("sale") + 10_000, pl.col("price") - 1)
    market.write(tmp_path, {**frames, "sales": pl.concat([again, frames["sales"]])})
    run(tmp_path, "--verify", "all")
    monkeypatch.setattr(kernels.History, "ordered_rows", property(lambda self: self.rows))
    assert "_last_" in refused(tmp_path, "--full", "--verify", "all")


def test_integers_that_wrap_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kind of fault 5: arithmetic in the width of its columns."""
    frames = market.sources()
    text = market.DEFINITION.replace("hour=", 'total=pl.col("city") * 2_000_000_000, hour=')
    market.write(tmp_path, frames)

    real = block_features.compute_stages
    city = pl.col("city").cast(pl.Int64)

    def narrow(*args: Any, **named: Any) -> pl.DataFrame:
        made, spine = real(*args, **named), args[1]
        return made.with_columns(spine.select(total=(city * 2_000_000_000 + 2**31) % 2**32 - 2**31).to_series())

    monkeypatch.setattr(block_features, "compute_stages", narrow)
    reported = refused(tmp_path, "--verify", "all", text=text)
    assert "'total' of visit=" in reported


def test_a_row_that_came_late_is_seen_by_every_later_spine_row(tmp_path: Path) -> None:
    """Days that do not touch, then a late row: whatever the run makes of it, what it publishes is right."""
    text = """
import polars as pl
from schemas import FeatureView, Source, Trailing
ev = Source("ev", time="at", columns={"k": pl.Int64, "v": pl.Float64})
q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
view = FeatureView("vw", spine=q, key="id", features=[
    Trailing(ev, by="k", over="all", stats={"*": "count", "v": ("sum", "last")})
])
"""
    days = [1, 3, 5]

    def put(name: str, file: str, **columns: Any) -> None:
        (tmp_path / "sources" / name).mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame(columns).with_columns(pl.col("at").cast(pl.Datetime("us", "UTC")))
        frame.write_parquet(tmp_path / "sources" / name / file)

    def at_hour(day: int, hour: int) -> datetime:
        return datetime(2024, 1, day, hour, tzinfo=UTC)

    put("q", "a.parquet", at=[at_hour(day, 12) for day in days], id=days, k=[1] * 3)
    put("ev", "a.parquet", at=[at_hour(day, 6) for day in range(1, 7)], k=[1] * 6, v=[10.0**day for day in range(6)])
    run(tmp_path, text=text)
    put("ev", "late.parquet", at=[at_hour(1, 6)], k=[1], v=[0.5])
    try:
        run(tmp_path, text=text)
    except MismatchError:
        run(tmp_path, "--full", text=text)
    got = pl.read_delta(table_of(tmp_path)).sort("id")["ev_by_k_count_all"].to_list()
    assert got == [2, 4, 6]


# The command.
def verified(store: Path, *flags: str) -> int:
    return verify.main(["--definition", str(store / "definition.py"), "--store", str(store), *flags])


def altered(store: Path, name: str) -> None:
    """One value of a committed file changed by one bit."""
    table = open_table(table_of(store))
    assert table is not None
    file = data_files(table)[3].path
    rows = pl.read_parquet(file)
    values = rows[name].to_numpy().copy()
    values[0] = np.nextafter(values[0], np.float32(np.inf)) if np.isfinite(values[0]) else 1.0
    rows = rows.with_columns(pl.Series(name, values, nan_to_null=True))
    pq.write_table(rows.to_arrow(), file)


def test_a_table_that_exists_is_verified_and_one_bit_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    market.write(tmp_path, market.spoiled(market.sources()))
    run(tmp_path)
    assert verified(tmp_path, "--rows", "all") == 0
    assert "120 rows (of 120), 0 differing" in capsys.readouterr().out
    day = market.at(3).date()
    assert verified(tmp_path, "--rows", "5", "--start", str(day), "--json") == 0
    reported = json.loads(capsys.readouterr().out)
    assert reported["rows"] == 5
    assert reported["of"] == feature_rows(tmp_path).filter(pl.col("date") >= day).height
    altered(tmp_path, "sales_by_shop_price_mean_2d")
    with pytest.raises(
        MismatchError, match=r"1 of .* values .*'sales_by_shop_price_mean_2d' of visit=\d+, asked=.* is .*, recomputed"
    ):
        verified(tmp_path, "--rows", "all")


def test_live_feature_rows_are_verified_by_what_they_could_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from beam_pipelines import features_streaming
    from transforms.storage.paths import features_live_uri

    files, store = tmp_path / "files", tmp_path / "store"
    market.write(files, market.spoiled(market.sources()))
    definition = str(market.define(store))
    disorder = (
        "--disorder",
        "9h",
        "--keep",
        "12h",
        "--chunk",
        "2h",
        "--partitions",
        "1",
        "--shards",
        "3",
        "--seed",
        "5",
    )
    argv = ["--streaming", "--definition", definition, "--store", str(store), "--sources", str(files / "sources")]
    assert features_streaming.main([*argv, "--run_id", "live", *disorder]) == 0
    assert verified(store, "--live", "--rows", "all") == 0
    out = capsys.readouterr().out
    assert "120 rows (of 120), 0 differing" in out
    assert verified(store, "--live", "--rows", "10") == 0
    view = load_definition(definition).view
    table = open_table(features_live_uri(str(store), view.name, view.fingerprint))
    assert table is not None
    file = data_files(table)[1].path
    rows = pl.read_parquet(file).with_columns(pl.col("sales_by_shop_count_2d") + 1)
    pq.write_table(rows.to_arrow(), file)
    with pytest.raises(MismatchError, match="'sales_by_shop_count_2d' of visit="):
        verified(store, "--live", "--rows", "all")


def test_dates_of_files_need_not_be_of_a_sample() -> None:
    assert choose_files([], 3, "x") == ([], [])
    file = DataFile("a", date(2024, 1, 1), 3, 10)
    assert choose_files([file, file], 3, "x") == ([file], [file])
