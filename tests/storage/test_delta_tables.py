"""Delta tables: nothing is visible before its commit, nothing is committed twice, nobody's dates are touched but one's
own."""

import multiprocessing
import os
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConflictError, StoreError
from transforms.storage.delta_log import metadata_of
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    commit,
    data_files,
    days_between,
    file_groups,
    newest_version,
    open_table,
    read_file,
    read_group,
    write_files,
)

SCHEMA = pa.schema([("n", pa.int64()), ("s", pa.string()), ("at", pa.timestamp("us", "UTC")), ("date", pa.date32())])
EXTRA = pa.schema([*SCHEMA, ("view", pa.string())])
DAYS = days_between(date(2020, 1, 1), date(2020, 1, 4))


def rows(*days: date, of: int = 0) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(
        [
            {"n": of + i, "s": f'é/"{i}', "at": datetime(2020, 1, 1, tzinfo=UTC), "date": day}
            for i, day in enumerate(days)
        ],
        SCHEMA,
    )


def put(uri: str, batch: pa.RecordBatch, dates: tuple[date, ...] | None, run_id: str, **other: Any) -> Committed:
    base = other.pop("base", newest_version(uri))
    target = CommitTarget(uri, EXTRA if "extra" in other else SCHEMA, dates, run_id, base, **other)
    return commit(target, write_files(batch, uri, run_id, target.extra))


def read(uri: str, version: int | None = None) -> list[tuple[date, int]]:
    table = open_table(uri, version)
    assert table is not None
    content = [read_file(file) for file in data_files(table)]
    return sorted((row["date"], row["n"]) for part in content for row in part.to_pylist())


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "store" / "table")


def test_rows_are_read_back_by_us_and_by_polars(uri: str) -> None:
    batch = rows(DAYS[1], DAYS[0], DAYS[1], DAYS[2])
    done = put(uri, batch, DAYS, "run-1")
    assert done == Committed(0, 4, 3, DAYS, fresh=True)
    ours = pa.concat_tables(read_file(file) for file in data_files(open_table(uri))).select(SCHEMA.names)
    assert ours.schema == SCHEMA
    expected = pa.Table.from_batches([batch]).sort_by("n")
    assert ours.sort_by("n").equals(expected)
    theirs = pl.read_delta(uri).sort("n")
    assert theirs.select(SCHEMA.names).rows() == pl.from_arrow(expected).rows()
    assert theirs["at"].dtype == pl.Datetime("us", "UTC")


def test_nothing_is_visible_before_the_commit(uri: str) -> None:
    write_files(rows(*DAYS), uri, "run-1")
    assert open_table(uri) is None
    assert newest_version(uri) is None
    put(uri, rows(DAYS[0]), DAYS, "run-2")
    write_files(rows(*DAYS, of=50), uri, "run-3")
    assert read(uri) == [(DAYS[0], 0)]


def test_each_date_has_its_folder_and_no_half_file_stays(uri: str) -> None:
    put(uri, rows(*DAYS, DAYS[0]), DAYS, "run-1")
    folders = sorted(name for name in os.listdir(uri) if not name.startswith("_"))
    assert folders == [f"date={day}" for day in DAYS]
    names = [name for _, _, files in os.walk(uri) for name in files if name.endswith(".parquet") or "run-1" in name]
    assert len(names) == 3
    assert all(name.startswith("run-1-") and name.endswith(".parquet") for name in names)


def test_a_repeated_bundle_writes_the_same_file_and_its_rows_once(uri: str) -> None:
    first, again = (write_files(rows(*DAYS), uri, "run-1") for _ in range(2))
    assert first == again
    done = commit(CommitTarget(uri, SCHEMA, DAYS, "run-1"), [*first, *again])
    assert done.rows == 3
    assert len(read(uri)) == 3


def test_a_launch_commits_once_however_often_its_last_step_is_repeated(uri: str) -> None:
    first = put(uri, rows(*DAYS), DAYS, "run-1")
    put(uri, rows(DAYS[0], of=10), DAYS[:1], "run-2")
    again = put(uri, rows(*DAYS), DAYS, "run-1", base=None)
    assert (again.version, again.fresh) == (first.version, False)
    assert newest_version(uri) == 1
    assert read(uri) == [(DAYS[0], 10), (DAYS[1], 1), (DAYS[2], 2)]


def test_a_run_that_is_repeated_whole_commits_nothing_twice(uri: str) -> None:
    first = put(uri, rows(*DAYS), DAYS, "run-1")
    again = put(uri, rows(*DAYS), DAYS, "run-1")
    assert (again.version, again.rows, again.fresh) == (first.version, 3, False)
    assert newest_version(uri) == 0


def test_other_work_under_the_same_run_id_is_not_lost(uri: str) -> None:
    """Some of its dates are as before, one is new, one is gone, and one has one more file."""
    put(uri, rows(*DAYS), DAYS, "nightly")
    later = days_between(date(2020, 1, 1), date(2020, 1, 6))
    again = rows(*DAYS)
    batches = [again.slice(0, 1), again.slice(1, 1), rows(later[1], of=50), rows(later[3], of=3)]
    files = [file for batch in batches for file in write_files(batch, uri, "nightly")]
    assert {file.path for file, _ in files} & {file.path for file in data_files(open_table(uri))}
    done = commit(CommitTarget(uri, SCHEMA, later, "nightly", newest_version(uri)), files)
    assert (done.version, done.rows, done.fresh) == (1, 4, True)
    expected = [(later[0], 0), (later[1], 1), (later[1], 50), (later[3], 3)]
    assert read(uri) == expected
    assert len(pl.read_delta(uri)) == 4
    assert len(read(uri, 0)) == 3, "and the version before stays what it was"
    put(uri, rows(), later, "nightly")
    assert read(uri) == []


def test_a_commit_replaces_its_dates_and_no_others(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1")
    put(uri, rows(DAYS[1], DAYS[1], of=10), DAYS[1:2], "run-2")
    assert read(uri) == [(DAYS[0], 0), (DAYS[1], 10), (DAYS[1], 11), (DAYS[2], 2)]


def test_dates_without_rows_are_emptied(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1")
    done = put(uri, rows(), DAYS[:2], "run-2")
    assert (done.rows, done.fresh) == (0, True)
    assert read(uri) == [(DAYS[2], 2)]


def test_without_dates_the_whole_table_is_replaced(uri: str) -> None:
    put(uri, rows(*DAYS), None, "run-1")
    put(uri, rows(date(1970, 1, 1), of=5), None, "run-2")
    assert read(uri) == [(date(1970, 1, 1), 5)]


def test_no_rows_at_all_make_an_empty_table(uri: str) -> None:
    assert put(uri, rows(), None, "run-1").version == 0
    assert read(uri) == []
    assert len(pl.read_delta(uri)) == 0
    again = put(uri, rows(), DAYS, "run-2")
    assert (again.version, again.fresh) == (0, False)  # nothing to say


def test_a_row_outside_the_dates_of_a_run_is_refused(uri: str) -> None:
    with pytest.raises(StoreError, match=r"writes rows of its own dates only\. Got 2020-01-03"):
        put(uri, rows(*DAYS), DAYS[:2], "run-1")
    assert open_table(uri) is None


def test_dates_that_changed_since_the_launch_are_refused(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1")
    put(uri, rows(DAYS[0], of=10), DAYS[:1], "run-2", base=0)
    with pytest.raises(
        ConflictError,
        match=r"Nobody else changes the dates.*2020-01-01 changed since version 0.*written by run run-2.*"
        r"run the same command again",
    ):
        put(uri, rows(*DAYS, of=20), DAYS, "run-3", base=0)
    assert read(uri)[0] == (DAYS[0], 10)


def test_a_table_that_appeared_since_the_launch_is_refused_where_dates_overlap(uri: str) -> None:
    put(uri, rows(DAYS[0]), DAYS[:1], "run-1")
    with pytest.raises(ConflictError, match="Nobody else changes the dates"):
        put(uri, rows(DAYS[0], of=5), DAYS[:1], "run-2", base=None)
    put(uri, rows(DAYS[1], of=5), DAYS[1:2], "run-3", base=None)
    assert read(uri) == [(DAYS[0], 0), (DAYS[1], 5)]


def test_other_dates_may_change_meanwhile(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1")
    put(uri, rows(DAYS[0], of=10), DAYS[:1], "run-2", base=0)
    put(uri, rows(DAYS[1], of=20), DAYS[1:2], "run-3", base=0)
    assert read(uri) == [(DAYS[0], 10), (DAYS[1], 20), (DAYS[2], 2)]


def test_further_partitions_are_their_own_worlds(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1", extra={"view": "a"})
    put(uri, rows(*DAYS, of=10), DAYS, "run-2", extra={"view": "b"}, base=0)
    put(uri, rows(DAYS[0], of=20), None, "run-3", extra={"view": "a"}, base=1)
    found = pl.read_delta(uri).select("view", "date", "n").sort("view", "date")
    assert found.rows() == [("a", DAYS[0], 20), *(("b", day, 10 + i) for i, day in enumerate(DAYS))]


def test_older_versions_stay_readable(uri: str) -> None:
    put(uri, rows(*DAYS), DAYS, "run-1", metadata={"view": "v", "note": "first"})
    put(uri, rows(DAYS[0], of=10), DAYS, "run-2", metadata={"view": "v"})
    assert read(uri, 0) == [(day, i) for i, day in enumerate(DAYS)]
    assert read(uri, 1) == [(DAYS[0], 10)]
    table = open_table(uri)
    assert table is not None
    assert metadata_of(table, "run_id") == "run-2"
    assert metadata_of(table, "note") == "first"
    assert metadata_of(table, "nothing") is None
    with pytest.raises(StoreError, match=r"can be read at version 7.*millrace tables"):
        open_table(uri, 7)


def test_files_of_an_interval_come_in_order(uri: str) -> None:
    put(uri, rows(*DAYS, *DAYS), DAYS, "run-1")
    table = open_table(uri)
    assert table is not None
    assert [file.date for file in data_files(table)] == list(DAYS)
    assert [file.date for file in data_files(table, DAYS[1], DAYS[2])] == [DAYS[1]]
    assert [file.rows for file in data_files(table, DAYS[1])] == [2, 2]
    assert data_files(table, date(2021, 1, 1)) == []


def test_a_file_is_read_with_the_requested_columns(uri: str) -> None:
    put(uri, rows(DAYS[0]), DAYS, "run-1")
    (file,) = data_files(open_table(uri))
    assert read_file(file, ["date", "n"]).to_pylist() == [{"date": DAYS[0], "n": 0}]
    assert read_group([file, file], ["n"]).to_pydict() == {"n": [0, 0]}
    assert read_file(file, ["date"]).num_rows == 1


def test_a_committed_file_that_is_gone_or_spoiled_is_named(uri: str) -> None:
    put(uri, rows(DAYS[0]), DAYS, "run-1")
    (file,) = data_files(open_table(uri))
    Path(file.path).write_bytes(b"PAR1")
    with pytest.raises(StoreError, match=file.path):
        read_file(file)
    os.remove(file.path)
    with pytest.raises(StoreError, match=file.path):
        read_file(file)


@given(sizes=st.lists(st.integers(1, 50), max_size=20), limit=st.integers(1, 60))
def test_groups_hold_every_file_once_in_order_and_do_not_grow(sizes: list[int], limit: int) -> None:
    class File:
        def __init__(self, rows: int) -> None:
            self.rows = rows

    files: list[Any] = [File(size) for size in sizes]
    made = list(file_groups(files, limit))
    assert [file for group in made for file in group] == files
    assert all(len(group) == 1 or sum(file.rows for file in group) <= limit for group in made)


@pytest.mark.parametrize("folder", ["my store", "ä", "50%", "a+b", "x=y", "#1"])
def test_a_store_of_any_name_is_written_and_read(tmp_path: Path, folder: str) -> None:
    uri = str(tmp_path / folder / "table")
    put(uri, rows(*DAYS), DAYS, "run-1")
    put(uri, rows(DAYS[0], of=10), DAYS[:1], "run-2")
    assert read(uri) == [(DAYS[0], 10), (DAYS[1], 1), (DAYS[2], 2)]


@pytest.mark.parametrize("column", ["a b", "a.b", "é", "a,b", "a=b", 'a"b', "A", "a/b"])
def test_a_column_of_any_name_is_written_and_read(uri: str, column: str) -> None:
    schema = (
        pa.schema([(column, pa.int64()), ("a", pa.int64()), ("date", pa.date32())])
        if column != "A"
        else pa.schema([("A", pa.int64()), ("date", pa.date32())])
    )
    batch = pa.RecordBatch.from_pylist(
        [{name: 5 for name in schema.names if name != "date"} | {"date": DAYS[0]}], schema
    )
    commit(CommitTarget(uri, schema, DAYS, "run-1"), write_files(batch, uri, "run-1"))
    (file,) = data_files(open_table(uri))
    assert read_file(file).to_pylist() == batch.to_pylist()


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"The store can be written.*nothing half-written is visible") as caught:
        put(str(tmp_path / "store" / "table"), rows(DAYS[0]), DAYS, "run-1", base=None)
    assert str(tmp_path / "store") in str(caught.value)


def test_a_spoiled_log_is_named(uri: str) -> None:
    put(uri, rows(DAYS[0]), DAYS, "run-1")
    for name in os.listdir(Path(uri, "_delta_log")):
        Path(uri, "_delta_log", name).write_text("{not json")
    with pytest.raises(StoreError, match="can be read") as caught:
        open_table(uri)
    assert uri in str(caught.value)


def writer(uri: str, number: int, days: tuple[date, ...], gate: Any) -> None:
    """One of several processes that commit their own dates, one by one, on the table as each first saw it."""
    base = newest_version(uri)
    gate.wait()
    for day in days:
        target = CommitTarget(uri, SCHEMA, (day,), f"run-{number}-{day}", base)
        commit(target, write_files(rows(day, day, of=number * 100), uri, target.run_id))


def test_processes_that_commit_different_dates_all_land(uri: str) -> None:
    every = days_between(date(2020, 1, 1), date(2020, 1, 13))
    context = multiprocessing.get_context("spawn")  # delta-rs does not survive a fork
    gate = context.Barrier(3)
    running = [context.Process(target=writer, args=(uri, i, every[i::3], gate)) for i in range(3)]
    for each in running:
        each.start()
    for each in running:
        each.join(120)
    assert [each.exitcode for each in running] == [0, 0, 0]
    assert read(uri) == [(day, 100 * (i % 3) + n) for i, day in enumerate(every) for n in range(2)]
    assert newest_version(uri) == len(every) - 1


def test_statistics_of_the_log_count_the_rows(uri: str) -> None:
    put(uri, rows(*DAYS, *DAYS), DAYS, "run-1")
    table = open_table(uri)
    assert table is not None
    for file in data_files(table):
        assert file.rows == pq.ParquetFile(file.path).metadata.num_rows
        assert file.bytes == os.path.getsize(file.path)


def test_the_writer_asks_for_metadata_on_the_snapshot_it_builds_on(uri: str) -> None:
    put(uri, rows(DAYS[0]), DAYS[:1], "run-1")
    seen: list[int] = []

    def note(table: Any, *side: Any) -> Mapping[str, str]:
        seen.append(table.version())
        return {"made_from": f"{table.version()} {side}"}

    target = CommitTarget(uri, SCHEMA, DAYS[1:2], "run-2", 0)
    commit(target, write_files(rows(DAYS[1]), uri, "run-2"), note, ["x"])
    table = open_table(uri)
    assert table is not None
    assert seen == [0]
    assert metadata_of(table, "made_from") == "0 ('x',)"
