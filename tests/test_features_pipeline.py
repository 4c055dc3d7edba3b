"""The features pipeline by its `main(argv)`, on real files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import market
import oracles
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from beam_pipelines import features
from beam_pipelines.features import main
from schemas.durations import DAY
from schemas.errors import ContractError, DataError, DefinitionError, StoreError
from transforms.contracts import EPOCH, MICROSECOND
from transforms.tables import dead_letters_uri, features_uri, newest

ROOT = Path(__file__).parent.parent


def run(store: Path, *flags: str, run_id: str | None = None) -> dict[str, Any]:
    """One run; its `run.json`."""
    path = market.define(store) if not (store / "definition.py").exists() else store / "definition.py"
    name = run_id or f"run-{len(list(store.glob('runs/*')))}"
    assert main(["--definition", str(path), "--store", str(store), "--run_id", name, *flags]) == 0
    return json.loads((store / "runs" / name / "run.json").read_text())  # type: ignore[no-any-return]


def table_of(store: Path) -> str:
    view = features.load_definition(str(store / "definition.py")).view
    return features_uri(str(store), view.name, view.fingerprint)


def answers(store: Path, version: int | None = None) -> pl.DataFrame:
    return pl.read_delta(table_of(store), version=version).sort("asked", "visit")


def letters(store: Path) -> pl.DataFrame:
    return pl.read_delta(dead_letters_uri(str(store), "features")).sort("source", "file", "row")


def same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    assert_frame_equal(a, b, check_exact=True, check_column_order=False)


def days() -> list[date]:
    return [market.at(i).date() for i in range(market.DAYS + 1)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A store of spoiled sources after one run over everything."""
    store = market.write(tmp_path_factory.mktemp("whole"), market.spoiled(market.sources()), files=2)
    return store, run(store)


def test_features_read_back_are_those_of_the_oracle(whole: tuple[Path, dict[str, Any]]) -> None:
    store, _ = whole
    frames, view = market.sources(), market.load(store)
    tables = {name: frames[name] for name in view.sources}
    got = answers(store)
    names = [*view.context, *view.columns]
    expected = pl.DataFrame(oracles.features(view, frames["visits"], tables), schema=got.select(names).schema, orient="row")  # fmt: skip
    same(got.select(names), expected.sort("asked", "visit"))
    assert (got["date"] == got["asked"].dt.date()).all()
    assert got["row_id"].n_unique() == len(got)


def test_figures_of_a_run_balance_and_stand_in_run_json(whole: tuple[Path, dict[str, Any]]) -> None:
    store, figures = whole
    assert figures["pipeline"] == "features"
    assert figures["rows_out"] == figures["table_rows"] == len(answers(store)) == 120
    assert figures["set_aside"] == len(letters(store)) == sum(market.SET_ASIDE.values())
    assert figures["commit_version"] == newest(table_of(store)) == 0
    assert figures["table"] == table_of(store)
    assert (figures["first"], figures["seconds"] > 0) == ("2024-03-01", True)
    for name, rows in figures["sources"].items():
        assert rows["read"] == rows["used"] + rows["outside"] + rows["repeated"] + rows["dead"], name
    for name in market.SET_ASIDE:
        assert (figures["sources"][name]["dead"], figures["sources"][name]["repeated"]) == (market.SET_ASIDE[name], market.REPEATED[name])  # fmt: skip
    assert figures["rows_in"] == sum(rows["read"] for rows in figures["sources"].values())


def test_dead_letters_say_file_row_field_rule_and_value(whole: tuple[Path, dict[str, Any]]) -> None:
    store, _ = whole
    found = letters(store)
    assert set(found["view"]) == {"demand"}
    for source, file, row, field, value in found.select("source", "file", "row", "field", "value").rows():
        written = pl.from_arrow(pq.read_table(file))[row]
        assert f"/sources/{source}/" in file
        for name, text in zip(field.split(", "), value.split(", "), strict=True):
            shown = written[name].cast(pl.String)[0]
            assert text in (str(shown), "null", f"{written[name][0]}"), (source, field)
    rules = found.group_by("source", "rule").len().sort("source", "rule").rows()
    assert rules == [
        ("sales", "a number is finite", 2),
        ("sales", "a time is at most 1d ahead of the run's clock (ahead)", 1),
        ("shops", "one key has one row (the smallest was kept)", 1),
        ("stock", "nothing is known before it happens: seen ≤ counted", 2),
        ("visits", "a key is present", 1),
        ("visits", "a number is finite", 1),
        ("visits", "a time is not before 1990-01-01 (not_before)", 1),
        ("visits", "a time is present", 1),
        ("visits", "one key asks one question at one time (the smallest row was kept)", 2),
    ]


@pytest.mark.parametrize("plan", ["slices", "shuffle"])
@pytest.mark.parametrize("step", [1, 3])
def test_interval_by_interval_is_the_whole_to_the_last_bit(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, step: int, plan: str
) -> None:
    market.write(tmp_path, market.spoiled(market.sources()), files=2)
    starts = days()[:-1:step]
    if step == 1 and plan == "shuffle":
        starts = starts[:2]  # the rest adds nothing but time
    figures = [run(tmp_path, "--start", str(day), "--end", str(day + timedelta(days=step)), "--plan", plan, "--block_rows", "100") for day in starts]  # fmt: skip
    last = starts[-1] + timedelta(days=step)
    same(answers(tmp_path), answers(whole[0]).filter(pl.col("date") < last))
    told = letters(tmp_path).filter(pl.col("source") != "shops").drop("file")
    expected = letters(whole[0]).filter(pl.col("source") != "shops", pl.col("date") < last).drop("file")
    same(told.sort(told.columns), expected.sort(told.columns))
    assert sum(each["rows_out"] for each in figures) == len(answers(tmp_path))


def test_the_same_interval_again_replaces_itself(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(40))
    interval = ("--start", str(days()[1]), "--end", str(days()[3]))
    run(tmp_path, *interval)
    before, told = answers(tmp_path), len(letters(tmp_path))
    assert run(tmp_path, *interval)["commit_version"] == 1
    same(answers(tmp_path), before)
    assert len(letters(tmp_path)) == told


def test_the_same_run_again_commits_nothing_twice(tmp_path: Path) -> None:
    market.write(tmp_path, market.spoiled(market.sources(40)))
    interval = ("--start", str(days()[1]), "--end", str(days()[3]))
    run(tmp_path, *interval, run_id="nightly")
    before = answers(tmp_path), letters(tmp_path)
    again = run(tmp_path, *interval, run_id="nightly")
    assert again["commit_version"] == newest(table_of(tmp_path)) == 0
    for now, then in zip((answers(tmp_path), letters(tmp_path)), before, strict=True):
        same(now, then)


def test_a_second_run_over_everything_finds_nothing_to_do(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(40))
    run(tmp_path)
    again = run(tmp_path)
    assert (again["rows_out"], again["nothing_to_do"]) == (0, "no date is missing or stale")
    assert newest(table_of(tmp_path)) == 0


def test_late_rows_and_new_days_are_taken_up_as_if_everything_ran_again(tmp_path: Path) -> None:
    frames = market.sources(80)
    early = {name: frame.filter(pl.col(market.TIMES[name]) < market.at(3)) if name in market.TIMES else frame for name, frame in frames.items()}  # fmt: skip
    early["sales"] = early["sales"][::2]  # the others come late
    market.write(tmp_path / "a", early)
    run(tmp_path / "a")
    market.write(tmp_path / "a", frames)
    assert run(tmp_path / "a")["rows_out"] > 0
    market.write(tmp_path / "b", frames)
    run(tmp_path / "b")
    same(answers(tmp_path / "a"), answers(tmp_path / "b"))


def test_days_whose_questions_were_withdrawn_are_emptied(tmp_path: Path) -> None:
    frames = market.sources(60)
    market.write(tmp_path, frames)
    run(tmp_path)
    gone = pl.col("asked").dt.date() == days()[0]
    for plan in ("slices", "shuffle"):
        market.write(tmp_path, {**frames, "visits": frames["visits"].filter(~gone)})
        run(tmp_path, "--plan", plan)
        assert answers(tmp_path).filter(gone).is_empty()
        market.write(tmp_path, frames)
        run(tmp_path)
        assert not answers(tmp_path).filter(gone).is_empty()


# Bad input (issue 3)


def with_column(source: str, **columns: pl.Expr) -> Callable[[dict[str, pl.DataFrame]], dict[str, pl.DataFrame]]:
    return lambda frames: {**frames, source: frames[source].with_columns(**columns)}


def appended(source: str, **values: Any) -> Callable[[dict[str, pl.DataFrame]], dict[str, pl.DataFrame]]:
    """One more row like the source's last but for `values`."""

    def spoil(frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
        row = frames[source][-1:].with_columns(**{name: pl.lit(value, frames[source].schema[name]) for name, value in values.items()})  # fmt: skip
        return {**frames, source: pl.concat([frames[source], row])}

    return spoil


SET_ASIDE: dict[str, tuple[Callable[..., Any], tuple[str, str]]] = {
    "null key": (appended("visits", visit=None), ("visit", "a key is present")),
    "null time": (appended("visits", asked=None), ("asked", "a time is present")),
    "infinity in a question": (appended("visits", visit=-1, size=float("inf")), ("size", "a number is finite")),
    "infinity in an event": (appended("sales", sale=-1, price=float("-inf")), ("price", "a number is finite")),
    "beyond float32": (appended("sales", sale=-1, price=1e300), ("price", "fits float32")),
    "1970": (appended("sales", sale=-1, sold=datetime(1970, 1, 1, tzinfo=UTC)), ("sold", "not before 1990-01-01")),
    "far future": (appended("visits", visit=-1, asked=datetime(2500, 1, 1, tzinfo=UTC)), ("asked", "ahead of the run's clock")),
    "contradicting question": (appended("visits", size=1e30), ("visit", "one key asks one question")),
    "contradicting dimension": (appended("shops", area=77), ("shop", "one key has one row")),
    "null in a unique column": (appended("sales", sale=None), ("sale", "a key is present")),
}  # fmt: skip


@pytest.mark.parametrize("case", SET_ASIDE)
def test_a_bad_row_is_a_dead_letter_and_the_rest_is_answered(tmp_path: Path, case: str) -> None:
    spoil, (field, rule) = SET_ASIDE[case]
    frames = market.sources(30)
    figures = run(market.write(tmp_path, spoil(frames), group=1000))
    (letter,) = letters(tmp_path).to_dicts()
    assert letter["field"] == field
    assert rule in letter["rule"]
    assert (figures["set_aside"], figures["rows_out"]) == (1, 30)


@pytest.mark.parametrize("column", ["size", "price"])
def test_nan_is_taken_as_no_value(tmp_path: Path, column: str) -> None:
    frames = market.sources(30)
    source = "visits" if column == "size" else "sales"
    nan = with_column(source, **{column: pl.col(column).fill_null(float("nan"))})(frames)
    run(market.write(tmp_path / "a", nan))
    run(market.write(tmp_path / "b", frames))
    same(answers(tmp_path / "a"), answers(tmp_path / "b"))
    assert letters(tmp_path / "a").is_empty()


def test_extra_columns_are_ignored(tmp_path: Path) -> None:
    frames = with_column("visits", colour=pl.lit("red"), more=pl.lit([1]))(market.sources(30))
    assert run(market.write(tmp_path, frames))["rows_out"] == 30
    assert "colour" not in answers(tmp_path).columns


def test_identical_questions_are_answered_once(tmp_path: Path) -> None:
    frames = market.sources(30)
    figures = run(market.write(tmp_path, {**frames, "visits": pl.concat([frames["visits"]] * 3)}))
    assert (figures["rows_out"], figures["set_aside"], figures["sources"]["visits"]["repeated"]) == (30, 0, 60)


def refused(store: Path, *flags: str) -> tuple[type[Exception], str]:
    with pytest.raises((ContractError, DataError, DefinitionError, StoreError)) as caught:
        run(store, *flags)
    assert newest(table_of(store)) is None
    return caught.type, str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda frames: {**frames, "sales": frames["sales"].drop("price")}, ["'sales'", "declared column 'price'", "part-0.parquet"]),
        (lambda frames: {**frames, "sales": frames["sales"].rename({"price": "prize"})}, ["declared column 'price'", "Did you mean 'prize'?"]),
        (with_column("visits", size=pl.col("size").cast(pl.Float64)), ["'visits'", "column 'size' is Float32", "double", "part-0.parquet"]),
        (with_column("sales", price=pl.col("price").cast(pl.String)), ["'sales'", "column 'price' is Float64", "string"]),
        (with_column("stock", counted=pl.col("counted").dt.replace_time_zone(None)), ["'stock'", "'counted'", "names its time zone"]),
        (with_column("visits", asked=pl.col("asked").dt.replace_time_zone(None)), ["'visits'", "'asked'", "convert_time_zone('UTC')"]),
    ],
)  # fmt: skip
def test_a_file_that_breaks_its_contract_is_refused_by_name(
    tmp_path: Path, spoil: Callable[..., Any], words: list[str]
) -> None:
    kind, message = refused(market.write(tmp_path, spoil(market.sources(30))))
    assert kind is ContractError
    for word in words:
        assert word in message


def test_a_truncated_file_is_refused_by_name(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30), files=2)
    path = tmp_path / "sources" / "sales" / "part-1.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    kind, message = refused(tmp_path)
    assert kind is ContractError
    assert str(path) in message


def test_an_interval_without_questions_is_refused_with_those_there_are(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30))
    kind, message = refused(tmp_path, "--start", "2025-01-01", "--end", "2025-02-01")
    assert kind is DataError
    assert "there are rows from 2024-03-01" in message


def test_an_interval_with_a_day_without_questions_inside_is_answered(tmp_path: Path) -> None:
    frames = market.sources(30)
    hole = frames["visits"].filter(pl.col("asked").dt.date() != days()[2])
    figures = run(market.write(tmp_path, {**frames, "visits": hole}), "--start", str(days()[1]), "--end", str(days()[4]))
    assert figures["rows_out"] == len(answers(tmp_path)) > 0


def test_zero_questions_are_refused(tmp_path: Path) -> None:
    frames = market.sources(30)
    kind, message = refused(market.write(tmp_path, {**frames, "visits": frames["visits"].clear()}))
    assert kind is DataError
    assert "Source 'visits' has rows in the interval" in message


def test_zero_events_and_dimensions_answer_with_nothing(tmp_path: Path) -> None:
    frames = {name: frame if name == "visits" else frame.clear() for name, frame in market.sources(30).items()}
    assert run(market.write(tmp_path, frames))["rows_out"] == 30
    assert answers(tmp_path)["sales_by_shop_count_2d"].sum() == 0


def test_a_source_without_files_is_refused_by_its_folder(tmp_path: Path) -> None:
    frames = market.sources(30)
    del frames["stock"]
    kind, message = refused(market.write(tmp_path, frames))
    assert kind is DataError
    assert f"none under {tmp_path}/sources/stock" in message


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    market.write(tmp_path / "data", market.sources(30))
    path, store = market.define(tmp_path / "data"), tmp_path / "store"
    store.mkdir()
    (store / "features").write_text("a file where a folder should be")
    flags = ["--definition", str(path), "--sources", str(tmp_path / "data" / "sources"), "--run_id", "r"]
    with pytest.raises(StoreError, match=r"can be (written|read)") as caught:
        main([*flags, "--store", str(store)])
    assert str(store) in str(caught.value)
    with pytest.raises(StoreError, match=r"can be (written|read)"):
        main([*flags, "--store", str(store / "features")])


def test_a_stamp_at_the_edge_of_now_is_judged_by_the_runs_clock(tmp_path: Path) -> None:
    frames = market.sources(30)
    now = datetime.now(UTC)
    near = appended("sales", sale=-1, sold=now + timedelta(hours=23))(frames)
    far = appended("sales", sale=-2, sold=now + timedelta(hours=25))(near)
    figures = run(market.write(tmp_path, far))
    assert figures["set_aside"] == 1
    assert letters(tmp_path)["field"].to_list() == ["sold"]
    assert (now - EPOCH) // MICROSECOND % DAY >= 0


def test_an_expression_that_fails_on_a_row_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30))
    market.define(tmp_path, market.DEFINITION.replace('hour=pl.col("asked").dt.hour()', 'hour=pl.col("shop").cast(pl.Int64)'))  # fmt: skip
    kind, message = refused(tmp_path)
    assert kind is DataError
    assert "Derived(hour, size) has an answer for every row" in message
    assert "Compute" in message


def test_integer_time_statistics_of_other_writers_are_understood(tmp_path: Path) -> None:
    """As pandas and Spark write: nanoseconds, or INT96, which has no statistics."""
    frames = market.sources(30)
    run(market.write(tmp_path / "a", frames))
    market.write(tmp_path / "b", frames)
    for name, time in market.TIMES.items():
        folder = tmp_path / "b" / "sources" / name
        nanoseconds = frames[name].with_columns(pl.col(time).dt.cast_time_unit("ns")).to_arrow()
        pq.write_table(nanoseconds, folder / "part-0.parquet", version="2.6")
    run(tmp_path / "b")
    same(answers(tmp_path / "b"), answers(tmp_path / "a"))


MISTAKES = {
    "cycle": ('Derived(density=', 'Derived(a=pl.col("b")), Derived(b=pl.col("a")), Derived(density=', "no cycles", 2),
    "unknown column": ('"price": ("mean"', '"prise": ("mean"', "Did you mean 'price'?", 2),
    "window of zero": ('over=("6h", "2d")', 'over=("0h", "2d")', "longer than zero", 2),
    "looks around": ('pl.col("price") > 20', 'pl.col("price") > pl.col("price").mean()', "row-local", 2),
    "python mistake": ("view = FeatureView", "view = FeatureVeiw", "FeatureVeiw", 2),
    "spelling": ("import Derived", "import Derivd", "Derivd", 2),
}  # fmt: skip

DRIVER = """
import json, sys
from beam_pipelines.features import main
from beam_pipelines.reporting import guard
for argv in json.loads(sys.argv[1]):
    print("--", guard(main)(argv), flush=True)
    print("--", file=sys.stderr, flush=True)
"""


def test_mistakes_end_with_a_message_an_exit_code_and_no_traceback(tmp_path: Path) -> None:
    cases: list[tuple[list[str], str, int]] = []
    for name, (before, after, words, code) in MISTAKES.items():
        path = market.define(tmp_path / name.replace(" ", "_"), market.DEFINITION.replace(before, after, 1))
        cases.append((["--definition", str(path), "--store", str(tmp_path)], words, code))
    good = str(market.define(tmp_path))
    market.write(tmp_path, {**market.sources(20), "sales": market.sources(20)["sales"].drop("price")})
    frames = market.sources(20)
    market.write(tmp_path / "failing", frames)
    failing = market.define(tmp_path / "failing", market.DEFINITION.replace('hour=pl.col("asked").dt.hour()', 'hour=pl.col("shop").cast(pl.Int64)'))  # fmt: skip
    market.write(tmp_path / "blocked", frames)
    (tmp_path / "blocked" / "dead_letters").write_text("in the way")
    cases += [
        (["--definition", good, "--store", str(tmp_path)], "declared column 'price'", 3),
        (["--definition", good, "--store", str(tmp_path / "nowhere")], "has Parquet files", 3),
        (["--definition", str(failing), "--store", str(tmp_path / "failing")], "has an answer for every row", 3),
        (["--definition", good, "--store", str(tmp_path / "blocked")], "can be", 4),
        (["--definition", "no_such_module", "--store", str(tmp_path)], "No module 'no_such_module' here", 2),
        (["--definition", good, "--store", str(tmp_path), "--strat", "2024-03-01"], "did you mean --start?", 2),
        (["--definition", good, "--store", str(tmp_path), "--start", "1st of March"], "is not a day like 2013-01-31", 2),
        (["--definition", good, "--store", str(tmp_path), "--start", "2024-03-02", "--end", "2024-03-02"], "comes before --end", 2),
        (["--definition", good], "--store", 2),
    ]  # fmt: skip
    argvs = json.dumps([argv for argv, _, _ in cases])
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", DRIVER, argvs], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True, text=True, timeout=120)  # fmt: skip
    said = done.stderr.split("--\n")
    codes = [int(line.removeprefix("-- ")) for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert len(codes) == len(cases), done.stderr
    for (argv, words, code), stderr, found in zip(cases, said, codes, strict=False):
        assert words in stderr, argv
        assert "Traceback" not in stderr, stderr
        assert 'File "' not in stderr, stderr
        assert found == code, argv


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(20))
    command = [sys.executable, "-m", "beam_pipelines.features", "--definition", str(market.define(tmp_path)), "--store", str(tmp_path), "--run_id", "r"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "rows out" in done.stdout
    assert "visits" in done.stdout
    assert "Traceback" not in done.stderr
    assert answers(tmp_path).schema["asked"] == pl.Datetime("us", "UTC")
    assert pa.schema(pq.read_schema(next(Path(table_of(tmp_path)).rglob("*.parquet")))).names[0] == "asked"
