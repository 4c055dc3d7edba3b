"""Compaction merges files and changes no row, whatever other writers do in between."""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines import cli
from schemas.errors import DefinitionError, StoreError
from tests.support.tables import rows_of
from transforms.records.record_batches import batch
from transforms.storage.compaction import MOST_FILES, compact_table
from transforms.storage.delta_log import commits, merged_files
from transforms.storage.delta_tables import CommitTarget, commit, data_files, newest_version, open_table
from transforms.streaming.live_tables import NewRows, TableWriter, application_of

SCHEMA = pa.schema([("id", pa.int64()), ("name", pa.string()), ("value", pa.float64()), ("date", pa.date32())])
DAY = date(2024, 1, 1)


class All(NewRows):
    def __call__(self, table: object, frame: pl.DataFrame) -> pl.DataFrame:
        return frame


def rows(numbers: range, days: int = 1) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "id": numbers,
            "name": [None if number % 5 == 0 else f"é{number}" for number in numbers],
            "value": [number / 3 for number in numbers],
            "date": [DAY + timedelta(days=number % days) for number in numbers],
        },
        schema={"id": pl.Int64, "name": pl.String, "value": pl.Float64, "date": pl.Date},
    )


def append(uri: str, frame: pl.DataFrame, turn: int) -> None:
    """One commit of a live job."""
    TableWriter(uri, SCHEMA, application_of("orders"), "live-1").append(frame, turn, {"turn": turn}, All(), always=True)


def content(uri: str) -> list[tuple[object, ...]]:
    return sorted(rows_of(uri).select(SCHEMA.names).rows())


def files_by_date(uri: str) -> Counter[date]:
    table = open_table(uri)
    assert table is not None
    return Counter(file.date for file in data_files(table))


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 6), st.integers(1, 3)),
            st.tuples(st.just("compact"), st.integers(1, 6), st.just(0)),
            st.tuples(st.just("replace"), st.integers(0, 2), st.just(0)),
        ),
        min_size=5,
        max_size=30,
    )
)
def test_rows_stay_whatever_is_done_in_between(steps: list[tuple[str, int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uri, expected, count = f"{folder}/t", [], 0
        append(uri, rows(range(0)), 1)
        at_version: dict[int, list[tuple[object, ...]]] = {}
        for turn, (step, number, days) in enumerate(steps, 2):
            if step == "append":
                frame = rows(range(count, count + number), days)
                append(uri, frame, turn)
                expected, count = expected + frame.rows(), count + number
            elif step == "compact":
                done = compact_table(uri, f"compact-{turn}", number)
                assert done.after == sum(files_by_date(uri).values())
                assert all(files <= max(number, 1) for files in files_by_date(uri).values())
            else:
                day = DAY + timedelta(days=number)
                target = CommitTarget(uri, SCHEMA, (day,), f"run-{turn}", newest_version(uri))
                commit(target, [])
                expected = [row for row in expected if row[-1] != day]
            assert content(uri) == sorted(expected)
            at_version[newest_version(uri) or 0] = sorted(expected)
        for version, before in at_version.items():  # until vacuum, older versions stay readable
            table = open_table(uri, version)
            assert table is not None
            read = [pl.read_parquet(file.path).with_columns(date=file.date) for file in data_files(table)]
            found = pl.concat([each.select(SCHEMA.names) for each in read]).rows() if read else []
            assert sorted(found) == before


def test_a_row_is_written_again_a_logarithmic_number_of_times(tmp_path: Path) -> None:
    uri, written, most = str(tmp_path / "t"), 0, 0
    for turn in range(1, 121):
        append(uri, rows(range(turn, turn + 1)), turn)
        if turn % 6 == 0:
            written += compact_table(uri, f"compact-{turn}").rows
        most = max(most, *files_by_date(uri).values())
    assert most <= MOST_FILES + 6
    assert written <= 120 * 7  # log2(120) = 6.9


def _append_many(uri: str, first: int, count: int) -> None:
    for number in range(first, first + count):
        TableWriter(uri, SCHEMA, application_of(f"orders-{first}"), f"live-{first}").append(
            rows(range(number, number + 1)), number, {"turn": number}, All()
        )


def test_writers_and_compactions_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    uri, each = str(tmp_path / "t"), 25
    append(uri, rows(range(0)), 1)
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=_append_many, args=(uri, 1000 * number, each)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    compactions = 0
    while any(writer.is_alive() for writer in writers):
        done = compact_table(uri, f"compact-{compactions}", 3)
        compactions += done.after < done.before
        time.sleep(0.01)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert compactions
    assert sorted(rows_of(uri)["id"]) == [*range(1000, 1000 + each), *range(2000, 2000 + each)]


def test_a_compaction_says_in_the_log_that_it_changes_no_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for turn in range(1, 6):
        append(uri, rows(range(turn, turn + 1)), turn)
    before = {Path(file.path).name for file in data_files(open_table(uri))}  # type: ignore[arg-type]
    compact_table(uri, "compact-1", 2)
    version = newest_version(uri) or 0
    lines = [json.loads(line) for line in Path(uri, "_delta_log", f"{version:020}.json").read_text().splitlines()]
    changes = [body["dataChange"] for line in lines for kind, body in line.items() if kind in ("add", "remove")]
    assert changes
    assert not any(changes)
    assert {Path(path).name for path in merged_files(uri, version)} <= before
    assert merged_files(uri, version - 1) == set()
    assert next(commits(uri))["operation"] == "OPTIMIZE"


def test_a_file_that_lost_rows_is_not_merged(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for turn in range(1, 6):
        append(uri, rows(range(turn, turn + 2)), turn)
    table = open_table(uri)
    assert table is not None
    spoiled = data_files(table)[0].path
    pq.write_table(pq.ParquetFile(spoiled).read().slice(0, 1), spoiled)
    version = newest_version(uri)
    with pytest.raises(StoreError, match="have the rows that its log counts"):
        compact_table(uri, "compact-1", 1)
    assert newest_version(uri) == version


def test_a_new_column_is_null_in_the_rows_of_older_files(tmp_path: Path) -> None:
    uri = str(tmp_path / "t")
    for turn in range(1, 4):
        append(uri, rows(range(turn, turn + 1)), turn)
    wider = pa.schema([*list(SCHEMA)[:3], ("extra", pa.int64()), ("date", pa.date32())])
    frame = rows(range(9, 10)).with_columns(extra=pl.lit(7))
    TableWriter(uri, wider, application_of("orders"), "live-1").append(frame.select(wider.names), 4, {"turn": 4}, All())
    before = rows_of(uri).select(wider.names).sort("id").rows()
    compact_table(uri, "compact-1", 1)
    assert sum(files_by_date(uri).values()) == 1
    assert rows_of(uri).select(wider.names).sort("id").rows() == before == [*before[:3], (9, "é9", 3.0, 7, DAY)]


def live_store(store: Path, commits_made: int = 30) -> str:
    uri = str(store / "sources" / "orders")
    for turn in range(1, commits_made + 1):
        append(uri, rows(range(turn, turn + 1)), turn)
    return uri


def test_the_command_merges_and_vacuum_then_deletes_the_merged_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = live_store(tmp_path)
    others = pl.DataFrame({"x": [1]})  # a source that somebody else writes
    for _ in range(20):
        others.write_delta(str(tmp_path / "sources" / "theirs"), mode="append")
    before = content(uri)
    assert cli.main(["compact", "--store", str(tmp_path)]) == 0
    assert "sources/orders" in (printed := capsys.readouterr().out)
    assert "theirs" not in printed
    assert sum(files_by_date(uri).values()) <= MOST_FILES
    assert content(uri) == before
    assert not list(tmp_path.glob("runs/*"))
    assert len(list(Path(uri).glob("date=*/*.parquet"))) > 30
    command = ["vacuum", "--store", str(tmp_path), "--older_than", "0s", "--retention", "0s", "--force"]
    assert cli.main(command) == 0
    assert len(list(Path(uri).glob("date=*/*.parquet"))) == sum(files_by_date(uri).values())
    assert content(uri) == before
    theirs = open_table(str(tmp_path / "sources" / "theirs"))
    assert theirs is not None
    assert len(data_paths := theirs.file_uris()) == 20
    assert all(Path(path).exists() for path in data_paths)
    assert cli.main(["compact", "sources/orders", "--store", str(tmp_path)]) == 0
    assert "1 of 1 tables had nothing to merge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (["sources/nothing"], DefinitionError.exit_code, "millrace tables"),
        (["--most_files", "0"], DefinitionError.exit_code, "at least 1"),
        (["--most_files", "many"], 2, "many"),
    ],
)
def test_bad_flags_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, text: str
) -> None:
    live_store(tmp_path, 1)
    assert cli.main(["compact", *flags, "--store", str(tmp_path)]) == code
    assert text in capsys.readouterr().err


def test_a_log_entry_of_a_compaction_survives_with_the_job_of_the_table(tmp_path: Path) -> None:
    """The live job's own transaction stays the newest: it goes on where it stopped."""
    uri = live_store(tmp_path, 20)
    assert cli.main(["compact", "--store", str(tmp_path)]) == 0
    table = open_table(uri)
    assert table is not None
    assert table.transaction_version(application_of("orders")) == 20
    append(uri, rows(range(21, 22)), 21)
    assert len(content(uri)) == 21
    assert batch(rows_of(uri).select(SCHEMA.names), SCHEMA).num_rows == 21
