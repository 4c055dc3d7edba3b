"""A store belongs to one live job: the views that it serves are named or dropped, and what does not fit its rows or its
stream is refused before anything is written, also in stores of before."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features, features_streaming
from beam_pipelines.runtime.errors import guard
from schemas import load_definition
from tests.support import market
from tests.support.live_turns import read
from transforms.lineage.feature_parity import check_parity
from transforms.lineage.visible_rows import read_accepted
from transforms.storage.paths import features_live_uri
from transforms.streaming.store_owner import NOTE, JobNote, claim

OTHER = market.DEFINITION.replace('"demand"', '"another"')
# Windows of another length: the same columns are read, and so rows are checked alike.
LONGER = market.DEFINITION.replace('over="1d", where', 'over="2d", where')
# Does not read `sales.price`, so a row without a finite one keeps its contract.
FEWER = market.DEFINITION.replace('"price": ("mean", "std", "q95", "max", "last"), ', "").replace(
    'where=pl.col("price") > 20, stats={"price": "sum"}', 'where=pl.col("city") > 1, stats={"*": "count"}'
)


def argv(folder: Path, store: Path, text: str = market.DEFINITION, name: str = "first") -> list[str]:
    definition = market.define(folder / name, text)
    return [
        "--streaming",
        "--definition",
        str(definition),
        "--store",
        str(store),
        "--sources",
        str(folder / "sources"),
        "--run_id",
        name,
        "--chunk=12h",
    ]


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(Folder with sources, store) after a view's job."""
    folder = tmp_path_factory.mktemp("lived")
    market.write(folder, market.spoiled(market.sources(30)))
    assert features_streaming.main(argv(folder, folder / "store")) == 0
    return folder, folder / "store"


def content(store: Path) -> dict[str, int]:
    return {
        os.path.join(where, name): os.stat(os.path.join(where, name)).st_mtime_ns
        for where, _, names in os.walk(store)
        for name in names
    }


# Its rows have no such column, or one of another type.
MORE = market.DEFINITION.replace('"city": pl.Int32, "price"', '"city": pl.Int32, "colour": pl.String, "price"').replace(
    'where=pl.col("price") > 20', 'where=pl.col("colour") == "red"'
)
NARROW = market.DEFINITION.replace('"price": pl.Float64', '"price": pl.Float32')


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (OTHER, ["'demand'", "--drop demand"]),
        (MORE, ["source 'sales'", "'colour'"]),
        (NARROW, ["source 'sales'", "'price'", "float", "double"]),
    ],
)
def test_another_view_or_other_columns_are_refused_before_anything_is_written(
    lived: tuple[Path, Path], capsys: pytest.CaptureFixture[str], text: str, words: list[str], old: bool
) -> None:
    folder, store = lived
    if old:
        (store / NOTE).rename(folder / "note")
    try:
        before = content(store)
        assert guard(features_streaming.main)(argv(folder, store, text, "second")) == 4
        printed = capsys.readouterr().err
        assert all(word in printed for word in [*words, "another --store", str(store)]), printed
        assert content(store) == before
    finally:
        if old:
            (folder / "note").rename(store / NOTE)


@pytest.mark.parametrize("old", [False, True])
def test_a_definition_that_reads_other_columns_goes_on_with_all_rows_that_keep_its_contract(
    lived: tuple[Path, Path], tmp_path: Path, old: bool
) -> None:
    """What it computes from the rows that the other one accepted is what it computes alone."""
    folder, store = lived
    after, alone = tmp_path / "after", tmp_path / "alone"
    shutil.copytree(store, after)
    if old:
        (after / NOTE).unlink()
    assert features_streaming.main(argv(folder, after, FEWER, "second")) == 0
    assert features_streaming.main(argv(folder, alone, FEWER, "second")) == 0
    first = load_definition(str(market.define(tmp_path / "first"))).view
    second = load_definition(str(market.define(tmp_path / "second", FEWER))).view
    for view in (first, second):
        assert check_parity(view, str(after)).differing == 0
    columns = [*second.key, second.time, *second.columns]
    made, expected = (
        read(features_live_uri(str(each), second.name, second.fingerprint)).select(columns).sort(columns)
        for each in (after, alone)
    )
    assert made.equals(expected)
    endless = read(f"{after}/sources/sales").filter(pl.col("price").is_infinite())
    assert len(endless) == 2  # of the market's bad rows
    keeping = [read_accepted(view, str(after), "sales", ["sale"], None, None) for view in (first, second)]
    assert set(keeping[1]["sale"]) - set(keeping[0]["sale"]) == set(endless["sale"])


@pytest.mark.parametrize("old", [False, True])
def test_the_view_goes_on_and_so_does_one_that_reads_the_same_columns(lived: tuple[Path, Path], old: bool) -> None:
    folder, store = lived
    kept = (store / NOTE).read_text()
    for text in (market.DEFINITION, LONGER):
        (store / NOTE).unlink(missing_ok=True) if old else None
        claim([load_definition(str(market.define(folder / "same", text))).view], str(store))
    assert json.loads((store / NOTE).read_text())["view"] == "demand"
    (store / NOTE).write_text(kept)
    assert features_streaming.main(argv(folder, store, name="again")) == 0


def test_a_model_s_dead_letters_and_a_batch_table_make_no_other_view(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(20))
    definition = market.define(tmp_path, OTHER)
    assert features.main(["--definition", str(definition), "--store", str(tmp_path), "--run_id", "batch"]) == 0
    (tmp_path / "dead_letters" / "live_predictions_model").mkdir(parents=True)
    claim([load_definition(str(market.define(tmp_path / "mine"))).view], str(tmp_path))


@pytest.mark.parametrize(
    "flags",
    [
        ["--start", "2024-03-03"],
        ["--end", "2024-03-04"],
        ["--chunk", "6h"],
        ["--partitions", "3"],
        ["--disorder", "1h"],
    ],
)
def test_another_stream_is_refused_before_anything_is_written(
    lived: tuple[Path, Path], capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """Its messages have the same offsets and hold other rows."""
    folder, store = lived
    before = content(store)
    assert guard(features_streaming.main)([*argv(folder, store, name="other"), *flags]) == 4
    printed = capsys.readouterr().err
    assert all(word in printed for word in [flags[0], "none" if "03-0" in flags[1] else "where", "another --store"]), (
        printed
    )
    assert content(store) == before


def changed_files(folder: Path, change: str) -> None:
    """Changes the rows of the market's sales."""
    path = sorted((folder / "sources" / "sales").glob("*.parquet"))[0]
    rows = pl.read_parquet(path)
    middle = len(rows) // 2
    match change:
        case "value":
            rows = rows.with_columns(price=pl.when(pl.int_range(pl.len()) == middle).then(77.0).otherwise("price"))
        case "removed":
            rows = pl.concat([rows[:middle], rows[middle + 1 :]])
        case "added":
            rows[middle : middle + 1].write_parquet(path.with_name("another.parquet"))
        case "appended":
            rows = pl.concat([rows, rows.sort("sold")[-1:]])
    rows.write_parquet(path)
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change", ["value", "removed", "added", "appended", "nothing"])
def test_a_replay_is_continued_only_over_the_rows_that_it_began_with(
    lived: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    """Else the offsets up to which the store has read would be those of other rows."""
    folder, store = shutil.copytree(lived[0], tmp_path / "copy"), tmp_path / "copy" / "store"
    changed_files(folder, change)
    before = content(store)
    code = guard(features_streaming.main)(argv(folder, store, name="again"))
    said = capsys.readouterr().err
    if change == "nothing":
        assert code == 0, said
        return
    assert code == 4, said
    assert "files of sales that have changed" in said
    assert "another --store" in said
    assert content(store) == before


def test_a_replay_that_has_committed_nothing_may_have_other_rows(lived: tuple[Path, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(lived[0], tmp_path / "copy")
    note = json.loads((folder / "store" / NOTE).read_text())
    assert sorted(note["rows"]) == ["sales", "stock", "visits"]
    shutil.rmtree(folder / "store")
    (folder / "store").mkdir()
    (folder / "store" / NOTE).write_text(json.dumps(note))
    changed_files(folder, "removed")
    assert features_streaming.main(argv(folder, folder / "store", name="again")) == 0
    assert json.loads((folder / "store" / NOTE).read_text())["rows"] != note["rows"]


def test_a_source_that_is_left_out_for_a_while_keeps_its_digests() -> None:
    """Its offsets stay in the store, so its rows are compared when it is read again."""
    stream = {"--source": "replay"}
    first = JobNote({"v": ["1"]}, {}, {}, stream, {"sales": {"price": "a"}, "stock": {"level": "b"}})
    second = JobNote({"v": ["2"]}, {}, {}, stream, {"sales": {"price": "c"}})
    assert second.after(first).rows == {"sales": {"price": "c"}, "stock": {"level": "b"}}
    assert JobNote.of_text(second.after(first).to_text().encode()) == second.after(first)
    kafka = JobNote({"v": ["3"]}, {}, {}, {"--source": "kafka"})
    assert kafka.after(first).rows is None


def test_a_job_that_has_read_nothing_binds_to_no_stream(tmp_path: Path) -> None:
    market.write(tmp_path, market.sources(30))
    view = load_definition(str(market.define(tmp_path))).view
    claim([view], str(tmp_path / "store"), {"--source": "replay", "--chunk": 1})
    claim([view], str(tmp_path / "store"), {"--source": "kafka", "--topic_prefix": ""})
    assert json.loads((tmp_path / "store" / NOTE).read_text())["stream"]["--source"] == "kafka"
    claim([view], str(tmp_path / "store"))
    assert json.loads((tmp_path / "store" / NOTE).read_text())["stream"]["--source"] == "kafka"


def test_views_and_versions_are_added_and_dropped_and_each_has_what_it_has_alone(tmp_path: Path) -> None:
    """Two views, then a new version of one with the old one beside it, then the other view is dropped."""
    market.write(tmp_path, market.spoiled(market.sources(40)))
    store, other = tmp_path / "store", str(market.define(tmp_path / "other", OTHER))
    first, second, third = (
        load_definition(str(market.define(tmp_path / name, text))).view
        for name, text in (("one", market.DEFINITION), ("two", FEWER), ("three", OTHER))
    )
    assert features_streaming.main([*argv(tmp_path, store), "--definition", other]) == 0
    report = json.loads((store / "runs" / "first" / "run.json").read_text())
    assert [each["view"] for each in report["views"]] == ["demand", "another"]
    assert all(each["questions_unaccounted_for"] == 0 < each["rows_out"] for each in report["views"])
    version = f"demand@{first.fingerprint}"
    flags = argv(tmp_path, store, FEWER, "second")
    assert guard(features_streaming.main)([*flags, "--also", version]) == 4  # without the other view
    assert guard(features_streaming.main)([*flags, "--also", "demand@0123", "--drop", "another"]) == 2
    assert features_streaming.main([*flags, "--also", version, "--definition", other]) == 0
    report = json.loads((store / "runs" / "second" / "run.json").read_text())
    names = [(each["view"], each["fingerprint"]) for each in report["views"]]
    assert names == [(each.name, each.fingerprint) for each in (second, third, first)]
    for number, (view, text) in enumerate([(first, market.DEFINITION), (second, FEWER), (third, OTHER)]):
        alone = tmp_path / f"alone{number}"
        assert features_streaming.main(argv(tmp_path, alone, text, f"alone{number}")) == 0
        columns = [*view.key, view.time, *view.columns]
        made, expected = (
            read(features_live_uri(str(each), view.name, view.fingerprint)).select(columns).sort(columns)
            for each in (store, alone)
        )
        assert made.equals(expected)
        assert check_parity(view, str(store)).differing == 0
    assert features_streaming.main([*argv(tmp_path, store, FEWER, "last"), "--drop", "another"]) == 0
    assert guard(features_streaming.main)([*argv(tmp_path, store, FEWER, "more"), "--drop", "another"]) == 4


def test_views_that_contradict_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    market.write(tmp_path, market.sources(20))
    contradicting = str(market.define(tmp_path / "other", OTHER.replace('"price": pl.Float64', '"price": pl.Int64')))
    flags = argv(tmp_path, tmp_path / "store")
    for more, words in (
        (["--definition", contradicting], ["'price'", "Float64", "Int64", "'sales'", "'another'"]),
        (["--definition", flags[2]], ["served once", "demand@"]),
        (["--drop", "another"], ["--drop", "'another'"]),
    ):
        assert guard(features_streaming.main)([*flags, *more]) in (2, 4)
        said = capsys.readouterr().err
        assert all(word in said for word in words), said
    assert not (tmp_path / "store" / "sources").exists()
