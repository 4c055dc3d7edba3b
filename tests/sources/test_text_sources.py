"""Runs over CSV and JSON lines: features, verification, staleness and erasure are those of the same rows as Parquet."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.commands import erase
from schemas import load_definition
from tests.support import market
from tests.support.features_runs import dead_letters, feature_rows, run, same
from transforms.records.times import EPOCH, MICROSECOND
from transforms.sources import text_files
from transforms.streaming.history_files import HistoryFiles

TIME = "%Y-%m-%dT%H:%M:%S%.6f%z"
Writer = Callable[[pl.DataFrame, Path], None]


def csv(frame: pl.DataFrame, path: Path) -> None:
    frame.write_csv(path.with_suffix(".csv"), datetime_format=TIME)


def quoted(frame: pl.DataFrame, path: Path) -> None:
    """As Excel in Europe writes it: a byte order mark, semicolons, all values quoted but nulls."""
    text = frame.write_csv(separator=";", quote_style="non_numeric", line_terminator="\r\n", datetime_format=TIME)
    path.with_suffix(".CSV").write_bytes(b"\xef\xbb\xbf" + text.encode())


def zipped(frame: pl.DataFrame, path: Path) -> None:
    with gzip.open(path.with_suffix(".csv.gz"), "wb") as file:
        file.write(frame.write_csv(datetime_format=TIME).encode())


def lines(frame: pl.DataFrame, path: Path) -> None:
    times = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Datetime)]
    frame.with_columns(pl.col(times).dt.strftime(TIME)).write_ndjson(path.with_suffix(".jsonl"))


def parquet(frame: pl.DataFrame, path: Path) -> None:
    frame.write_parquet(path.with_suffix(".parquet"))


def write(store: Path, frames: dict[str, pl.DataFrame], writers: list[Writer]) -> Path:
    """Each source in as many files as there are writers."""
    for name, frame in frames.items():
        folder = store / "sources" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        size = -(-len(frame) // len(writers))
        for number, writer in enumerate(writers):
            writer(frame[number * size : (number + 1) * size], folder / f"part-{number}")
    return store


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_files, "PIECE", 3000)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("expected")
    run(write(store, market.spoiled(market.sources(60)), [parquet]))
    return store


@pytest.mark.parametrize("writers", [[csv], [quoted, zipped], [csv, parquet, zipped]])
def test_features_and_dead_letters_are_those_of_parquet(expected: Path, tmp_path: Path, writers: list[Writer]) -> None:
    figures = run(write(tmp_path, market.spoiled(market.sources(60)), writers), "--verify", "30", "--verify_share", "1")
    same(feature_rows(tmp_path), feature_rows(expected))
    columns = ["source", "field", "rule", "value"]
    same(dead_letters(tmp_path).select(columns).sort(columns), dead_letters(expected).select(columns).sort(columns))
    for name, each in figures["sources"].items():
        assert each["read"] == sum(each[what] for what in ("used", "outside", "repeated", "dead")), name
    assert figures["set_aside"] == sum(market.SET_ASIDE.values())


def test_features_of_json_lines_are_those_of_parquet(tmp_path: Path) -> None:
    frames = market.sources(60)
    run(write(tmp_path / "a", frames, [lines, csv]), "--verify", "30", "--verify_share", "1")
    run(write(tmp_path / "b", frames, [parquet]))
    same(feature_rows(tmp_path / "a"), feature_rows(tmp_path / "b"))
    assert dead_letters(tmp_path / "a").is_empty()


def test_dead_letters_name_the_line_at_which_their_row_begins(tmp_path: Path) -> None:
    frames = market.sources(30)
    write(tmp_path, frames, [csv])
    path = tmp_path / "sources" / "stock" / "part-0.csv"
    header, *rows = path.read_text().splitlines()
    names = header.split(",")
    note = names.index("note")
    several = rows[3].split(",")
    several[note] = '"two\nlines"'
    rows[3] = ",".join(several)
    rows[10] = rows[10] + ",more"
    rows[20] = rows[20].replace("2024-03", "not a time", 1)
    path.write_text("\n".join([header, *rows]) + "\n")
    run(tmp_path, "--max_dead_fraction", "1")
    found = dead_letters(tmp_path).select("row", "field", "rule")
    lines_of = path.read_text().splitlines()
    assert [lines_of[row - 1] for row in found["row"]] == [rows[10], rows[20]]
    assert found["rule"].to_list() == ["a line has 5 values, as the header has", "a time as text is ISO 8601"]


def test_a_run_over_unchanged_text_computes_nothing_and_other_formats_of_the_same_rows_neither(tmp_path: Path) -> None:
    frames = market.sources(60)
    run(write(tmp_path, frames, [csv]))
    assert run(tmp_path)["rows_out"] == 0
    write(tmp_path, frames, [lines])
    assert run(tmp_path)["rows_out"] == 0
    write(tmp_path, {**frames, "sales": frames["sales"].with_columns(price=pl.col("price") + 1)}, [lines])
    assert run(tmp_path)["rows_out"] > 0


@pytest.mark.parametrize("writer", [csv, quoted, zipped, lines])
def test_erasing_removes_the_rows_and_no_other_byte(tmp_path: Path, writer: Writer) -> None:
    frames = market.sources(60)
    run(write(tmp_path, frames, [writer]))
    (path,) = (tmp_path / "sources" / "sales").iterdir()
    unzip = gzip.decompress if path.suffix == ".gz" else bytes
    before = unzip(path.read_bytes())
    flags = [
        "sales",
        "--where",
        "sale >= 10 AND sale < 20",
        "--store",
        str(tmp_path),
        "--definition",
        str(tmp_path / "definition.py"),
    ]
    assert erase.main(flags) == 0
    first = frames["sales"]["sale"].to_list().index(10)
    kept = before.splitlines(keepends=True)
    header = 0 if writer is lines else 1
    del kept[header + first : header + first + 10]
    assert unzip(path.read_bytes()) == b"".join(kept)
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    run(tmp_path)
    run(
        write(
            tmp_path / "fresh",
            {**frames, "sales": frames["sales"].filter(~pl.col("sale").is_between(10, 19))},
            [parquet],
        )
    )
    same(feature_rows(tmp_path), feature_rows(tmp_path / "fresh"))


def test_history_of_a_live_job_is_that_of_parquet(tmp_path: Path) -> None:
    frames = market.sources(60)
    view = load_definition(str(market.define(tmp_path))).view
    write(tmp_path / "a", frames, [csv, lines])
    write(tmp_path / "b", frames, [parquet])
    for name in ("visits", "sales", "stock"):
        span = [(each - EPOCH) // MICROSECOND for each in (market.at(-1), market.at(market.DAYS + 1))]
        found = [HistoryFiles.of([view], str(tmp_path / each / "sources"), name).pieces(*span) for each in "ab"]
        same(*(pl.concat([piece.rows for piece in pieces]) for pieces in found))
