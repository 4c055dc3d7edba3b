"""A log that has lost actions is refused: whichever line of whichever entry is gone, no table is read as a smaller
one."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake

from schemas.errors import DataError, StoreError
from tests.support import shop
from tests.support.broken_files import run
from transforms.storage.delta_tables import (
    CommitTarget,
    commit,
    data_files,
    days_between,
    newest_version,
    open_table,
    read_group,
    write_files,
)
from transforms.storage.feature_tables import lost_commit

DAYS = days_between(date(2020, 1, 1), date(2020, 1, 5))
SCHEMA = pa.schema([("n", pa.int64()), ("date", pa.date32())])
WIDER = pa.schema([("n", pa.int64()), ("m", pa.int64()), ("date", pa.date32())])


def put(uri: str, days: tuple[date, ...], run_id: str, first: int, spans: int = 1) -> None:
    rows = pl.DataFrame({"n": range(first, first + len(days)), "date": days}, schema={"n": pl.Int64, "date": pl.Date})
    batch = rows.to_arrow().cast(SCHEMA).to_batches()[0]
    target = CommitTarget(uri, SCHEMA, days, run_id, newest_version(uri), days=spans)
    commit(target, write_files(batch, uri, run_id, None, spans))


def of_dates(uri: str) -> None:
    """Commits that create, add and replace."""
    put(uri, DAYS[:3], "a", 0)
    put(uri, DAYS[2:], "b", 10)
    put(uri, DAYS[:1], "c", 20)


def of_spans(uri: str) -> None:
    put(uri, DAYS[:3], "a", 0, 100)
    put(uri, DAYS[2:], "b", 10, 100)


def of_delta_rs(uri: str) -> None:
    rows = pl.DataFrame({"n": range(6), "date": [*DAYS, *DAYS[:2]]})
    write_deltalake(uri, rows, partition_by=["date"])
    write_deltalake(uri, rows, mode="append")
    write_deltalake(uri, rows.filter(pl.col("date") == DAYS[0]), mode="overwrite", predicate="date = '2020-01-01'")
    DeltaTable(uri).delete("n = 3")


def entries(uri: str) -> list[Path]:
    return sorted(Path(uri, "_delta_log").glob("*.json"))


def damaged(uri: str) -> Iterator[tuple[str, Path, str]]:
    """Each entry without one of its lines, and without all: what is missing, the entry, its text."""
    for path in entries(uri):
        lines = path.read_text().splitlines()
        yield "all", path, ""
        yield "all but a line feed", path, "\n"
        for number, line in enumerate(lines):
            kept = lines[:number] + lines[number + 1 :]
            yield next(iter(json.loads(line))), path, "".join(f"{each}\n" for each in kept)


@pytest.mark.parametrize("make", [of_dates, of_spans, of_delta_rs])
def test_a_table_is_refused_without_any_line_of_its_log(tmp_path: Path, make: Callable[[str], None]) -> None:
    uri = str(tmp_path / "table")
    make(uri)
    assert open_table(uri) is not None
    tried = set()
    for number, (kind, path, text) in enumerate(damaged(uri)):
        # Nothing in the log of delta-rs says that there was one.
        if make is of_delta_rs and kind in ("commitInfo", "txn") and path.name != entries(uri)[-1].name:
            continue
        if make is of_delta_rs and kind == "commitInfo":
            continue
        tried.add(kind)
        copy = tmp_path / f"copy-{number}"
        shutil.copytree(uri, copy)
        (copy / "_delta_log" / path.name).write_text(text)
        with pytest.raises(StoreError, match=r"log|must be readable"):
            open_table(str(copy))
        shutil.rmtree(copy)
    assert {"add", "remove", "protocol", "metaData", "all"} <= tried or make is not of_delta_rs
    assert {"add", "protocol", "metaData", "commitInfo", "txn", "all"} <= tried or make is of_delta_rs


def test_an_older_version_does_without_the_entries_after_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    of_dates(uri)
    entries(uri)[-1].write_text("")
    assert open_table(uri, 1) is not None
    with pytest.raises(StoreError, match=r"version 2 .* the entry is empty"):
        open_table(uri)


def test_an_entry_whose_numbers_of_rows_were_changed_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    of_dates(uri)
    path = entries(uri)[1]
    path.write_text(path.read_text().replace('\\"numRecords\\": 1', '\\"numRecords\\": 2', 1))
    with pytest.raises(StoreError, match="its added files have 3 of 2 rows"):
        open_table(uri)


@pytest.mark.parametrize("spans", [1, 100])
def test_a_file_with_fewer_rows_than_the_log_has_is_refused(tmp_path: Path, spans: int) -> None:
    uri = str(tmp_path / "table")
    put(uri, (DAYS[0], DAYS[0], DAYS[1]), "a", 0, spans)
    table = open_table(uri)
    assert table is not None
    path = data_files(table)[0].path
    rows = pl.read_parquet(path, hive_partitioning=False)
    rows.filter(pl.col("n") != 1).write_parquet(path)
    with pytest.raises(DataError, match="rows that were committed"):
        read_group(data_files(table))


def test_tables_of_other_programs_need_no_counts(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    of_delta_rs(uri)
    for path in entries(uri):  # as writers that leave the optional parts out
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [line for line in lines if "commitInfo" not in line]
        for line in kept:
            if "add" in line:
                line["add"].pop("stats")
        path.write_text("".join(json.dumps(line) + "\n" for line in kept))
    table = open_table(uri)
    assert table is not None
    assert table.version() == 3


@pytest.fixture(scope="module")
def computed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two runs of features, of which the second commits once more, and a champion."""
    store = tmp_path_factory.mktemp("lost") / "store"
    definition = shop.write(store, 400)
    flags = ["--definition", str(definition), "--store", str(store)]
    assert run("features", *flags, "--run_id", "f1", "--end", "2024-02-20").code == 0
    assert run("features", *flags, "--run_id", "f2").code == 0
    assert run("training", *flags, "--run_id", "t1", "--threads=1").code == 0
    return store


def feature_log(store: Path) -> list[Path]:
    (folder,) = (store / "features").glob("*/*/_delta_log")
    return sorted(folder.glob("*.json"))


def test_newest_commits_that_are_missing_are_noticed_and_made_again(computed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(computed, store)
    flags = ["--definition", str(store / "definition.py"), "--store", str(store)]
    uri = str(feature_log(store)[0].parents[1])
    expected = pl.read_delta(uri).sort("row_id")
    assert lost_commit(uri, 1) is None
    feature_log(store)[-1].unlink()
    assert len(pl.read_delta(uri)) < len(expected)
    for command in ("inference", "training"):
        said = run(command, *flags, "--run_id", f"{command}-1", "--threads=1")
        assert said.code == 4, said.text
        assert re.search(r"run f2 committed version 1, but its newest in \S+ is version 0", said.err), said.text
    said = run("features", *flags, "--run_id", "f3")
    assert said.code == 0, said.text
    assert "has lost its newest commits: run f2 committed version 1" in said.err
    assert pl.read_delta(uri).sort("row_id").equals(expected)
    said = run("inference", *flags, "--run_id", "i1", "--threads=1")
    assert said.code == 0, said.text


def test_a_command_that_reads_a_log_without_one_of_its_lines_says_so(computed: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(computed, store)
    flags = ["--definition", str(store / "definition.py"), "--store", str(store)]
    path = feature_log(store)[0]
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in lines[:-1]))
    for command in ("features", "inference", "training", "verify", "trace --key visit=390"):
        said = run(*command.split(), *flags)
        assert said.code == 4, said.text
        assert f"it has {len(lines) - 1} of {len(lines)} actions" in said.err or "added files" in said.err, said.text
    assert os.path.exists(path)
