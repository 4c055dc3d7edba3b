"""Tables whose partitions span several dates: a run replaces its dates and keeps the others bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import struct
import tempfile
from collections.abc import Mapping
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from schemas.errors import ConflictError, DataError, StoreError
from transforms.lineage.trace import commit_of
from transforms.storage import date_spans
from transforms.storage.date_spans import days_for, days_of
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    commit,
    data_files,
    dates_of,
    newest_version,
    open_table,
    read_file,
    read_group,
    write_files,
)
from transforms.storage.rewriting import purge, rewrite_delta

SCHEMA = pa.schema([("n", pa.int64()), ("x", pa.float64()), ("s", pa.string()), ("date", pa.date32())])
FIRST = date(2024, 1, 1)
# Bits that an arithmetic copy would lose: a signalling NaN with a payload, minus zero, a denormal.
ODD = [struct.unpack("<d", struct.pack("<Q", bits))[0] for bits in (0x7FF0_0000_0000_0123, 1 << 63, 1)]


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def rows(counts: Mapping[int, int], seed: int = 0) -> pa.RecordBatch:
    made = [
        {"n": seed * 10_000 + i, "x": ODD[i % 3], "s": None if i % 5 == 0 else f"é{seed}", "date": day(number)}
        for number, count in counts.items()
        for i in range(count)
    ]
    return pa.RecordBatch.from_pylist(made, SCHEMA)


def put(uri: str, batch: pa.RecordBatch, dates: tuple[date, ...] | None, run: str, days: int, **more: Any) -> Committed:
    base = more.pop("base", newest_version(uri))
    target = CommitTarget(uri, more.pop("schema", SCHEMA), dates, run, base, days=days, **more)
    return commit(target, write_files(batch, uri, run, target.extra, days))


def bits(uri: str, version: int | None = None) -> dict[date, list[tuple[int, bytes, str | None]]]:
    """Rows by date, floats as their bits."""
    table = open_table(uri, version)
    assert table is not None
    found: dict[date, list[tuple[int, bytes, str | None]]] = {}
    for file in data_files(table):
        content = read_file(file)
        assert content.num_rows == file.rows
        assert set(content["date"].to_pylist()) == {file.date}
        packed = [struct.pack("<d", x) for x in content["x"].to_pylist()]
        found.setdefault(file.date, []).extend(zip(content["n"].to_pylist(), packed, content["s"].to_pylist()))
    return {each: sorted(found[each], key=lambda row: row[:2]) for each in found}


def expected(counts: Mapping[int, int], seed: int = 0) -> dict[date, list[tuple[int, bytes, str | None]]]:
    found: dict[date, list[tuple[int, bytes, str | None]]] = {}
    for row in rows(counts, seed).to_pylist():
        found.setdefault(row["date"], []).append((row["n"], struct.pack("<d", row["x"]), row["s"]))
    return found


def paths(uri: str) -> set[str]:
    table = open_table(uri)
    assert table is not None
    return {file.path for file in data_files(table)}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "store" / "table")


@pytest.mark.parametrize(
    ("count", "last", "days"),
    [(0, 10, 10_000), (15_000, 364, 122), (1_434, 295, 1033), (365 * 5000, 364, 1), (1, 0, 5000)],
)
def test_spans_are_chosen_by_rows(count: int, last: int, days: int) -> None:
    assert days_for(count, FIRST, day(last)) == days


def test_a_run_of_one_date_rewrites_its_span_and_copies_the_others(uri: str) -> None:
    counts = dict.fromkeys(range(40), 3)
    put(uri, rows(counts), None, "first", 10)
    table = open_table(uri)
    assert table is not None
    assert days_of(table) == 10
    before = paths(uri)
    assert 4 <= len(before) <= 5
    put(uri, rows({17: 5}, 1), (day(17),), "second", 10)
    assert bits(uri) == {**expected(counts), **expected({17: 5}, 1)}
    assert len(paths(uri)) == len(before)
    assert len(paths(uri) - before) == 1, "the other spans keep their files"
    assert bits(uri, 0) == expected(counts)


def test_the_first_span_of_a_table_stays_whatever_later_runs_would_choose(uri: str) -> None:
    put(uri, rows({0: 1, 5: 1}), None, "first", 10)
    put(uri, rows({7: 4, 30: 4}, 1), (day(7), day(30)), "second", 3)
    table = open_table(uri)
    assert table is not None
    assert days_of(table) == 10
    assert bits(uri) == {**expected({0: 1, 5: 1}), **expected({7: 4, 30: 4}, 1)}
    assert "first" not in "".join(os.path.basename(path) for path in paths(uri)) or len(paths(uri)) <= 3


def test_a_table_of_one_partition_a_date_keeps_it(uri: str) -> None:
    put(uri, rows({0: 1, 1: 1}), None, "first", 1)
    put(uri, rows({1: 2, 2: 2}, 1), (day(1), day(2)), "second", 10)
    table = open_table(uri)
    assert table is not None
    assert days_of(table) == 1
    assert table.metadata().partition_columns == ["date"]
    assert bits(uri) == {**expected({0: 1}), **expected({1: 2, 2: 2}, 1)}
    assert len(paths(uri)) == 3


def test_runs_of_single_dates_do_not_add_files_for_ever(uri: str) -> None:
    for number in range(30):
        put(uri, rows({number: 2}, number), (day(number),), f"run-{number}", 1000)
    assert len(paths(uri)) <= date_spans.FEW_FILES + 1
    assert bits(uri) == {each: expected({i: 2}, i)[each] for i in range(30) for each in [day(i)]}
    left = {str(path) for path in Path(uri).rglob("*.parquet") if "_delta_log" not in path.parts}
    table = open_table(uri)
    assert table is not None
    named = {path for version in range(30) for path in open_table(uri, version).file_uris()}  # type: ignore[union-attr]
    assert left == named, "files whose rows a commit has written again are removed at once"


def test_dates_without_rows_are_emptied(uri: str) -> None:
    put(uri, rows(dict.fromkeys(range(5), 2)), None, "first", 100)
    put(uri, rows({}), (day(1), day(3)), "second", 100)
    assert bits(uri) == expected({0: 2, 2: 2, 4: 2})
    put(uri, rows({}), tuple(map(day, range(5))), "third", 100)
    assert bits(uri) == {}
    put(uri, rows({2: 1}), (day(2),), "fourth", 100)
    assert bits(uri) == expected({2: 1})


def test_two_runs_on_different_dates_of_one_span_both_succeed(uri: str) -> None:
    put(uri, rows({0: 1, 1: 1, 2: 1}), None, "first", 100)
    put(uri, rows({0: 2}, 1), (day(0),), "second", 100, base=0)
    put(uri, rows({1: 2}, 2), (day(1),), "third", 100, base=0)
    assert bits(uri) == {**expected({2: 1}), **expected({0: 2}, 1), **expected({1: 2}, 2)}
    with pytest.raises(ConflictError, match=r"2024-01-01 changed since version 0.*run second"):
        put(uri, rows({0: 3}, 3), (day(0),), "fourth", 100, base=0)
    with pytest.raises(ConflictError, match="2024-01-02 changed since version 1"):
        put(uri, rows({1: 3}, 3), (day(1),), "fifth", 100, base=1)


def write_dates(uri: str, number: int, numbers: list[int], gate: Any) -> None:
    base = newest_version(uri)
    gate.wait()
    for each in numbers:
        put(uri, rows({each: 3}, number), (day(each),), f"run-{number}-{each}", 100, base=base)


def test_processes_that_commit_different_dates_of_one_span_all_land(uri: str) -> None:
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(3)
    running = [context.Process(target=write_dates, args=(uri, i, [*range(i, 12, 3)], gate)) for i in range(3)]
    for each in running:
        each.start()
    for each in running:
        each.join(200)
    assert [each.exitcode for each in running] == [0, 0, 0]
    assert bits(uri) == {day(i): expected({i: 3}, i % 3)[day(i)] for i in range(12)}
    assert len(paths(uri)) <= date_spans.FEW_FILES + 1


def test_a_launch_commits_once_and_its_repetition_nothing(uri: str) -> None:
    put(uri, rows({0: 1, 1: 1}), None, "first", 100)
    done = put(uri, rows({1: 2}, 1), (day(1),), "second", 100)
    again = put(uri, rows({1: 2}, 1), (day(1),), "second", 100, base=0)
    assert (again.version, again.fresh) == (done.version, False)
    whole = put(uri, rows({1: 2}, 1), (day(1),), "second", 100)
    assert (whole.version, whole.fresh) == (done.version, False)
    assert newest_version(uri) == 1
    other = put(uri, rows({1: 5}, 2), (day(1),), "second", 100)
    assert (other.version, other.fresh) == (2, True)
    assert bits(uri, 1) == {**expected({0: 1}), **expected({1: 2}, 1)}, (
        "an older version of the same run stays readable"
    )


def test_copied_rows_belong_to_the_run_that_computed_them(uri: str) -> None:
    put(uri, rows({0: 1, 1: 1, 2: 1}), None, "first", 100)
    put(uri, rows({1: 1}, 1), (day(1),), "second", 100)
    put(uri, rows({2: 1}, 1), (day(2),), "third", 100)
    table = open_table(uri)
    assert table is not None
    made = {file.date: commit_of(table, file) for file in data_files(table)}
    assert {each: (entry["run_id"], entry["version"]) for each, entry in made.items()} == {
        day(0): ("first", 0),
        day(1): ("second", 1),
        day(2): ("third", 2),
    }


def test_other_programs_read_it(uri: str) -> None:
    counts = {0: 2, 1: 3, 40: 1}
    put(uri, rows(counts), None, "first", 10)
    put(uri, rows({1: 4}, 1), (day(1),), "second", 10)
    theirs = pl.read_delta(uri)
    assert theirs.columns == SCHEMA.names
    assert theirs.group_by("date").len().sort("date").rows() == [(day(0), 2), (day(1), 4), (day(40), 1)]
    assert len(pl.scan_delta(uri).filter(pl.col("date") == day(1)).collect()) == 4
    assert DeltaTable(uri).history(1)[0]["run_id"] == "second"


def test_a_table_of_many_columns_knows_its_dates(uri: str) -> None:
    """Of a table of more than 32 columns, readers have bounds of the first 32 only, unless configured otherwise."""
    schema = pa.schema([*((f"c{i}", pa.int64()) for i in range(60)), ("date", pa.date32())])

    def wide(number: int) -> pa.RecordBatch:
        return pa.RecordBatch.from_pylist([dict.fromkeys(schema.names, number) | {"date": day(number)}], schema)

    for number in range(12):
        put(uri, wide(number), (day(number),), f"run-{number}", 4, schema=schema)
    table = open_table(uri)
    assert table is not None
    assert [file.date for file in data_files(table, day(2), day(5))] == [day(2), day(3), day(4)]
    assert dates_of(table) == (day(0), day(11))


def test_an_interval_has_the_rows_of_its_dates_only(uri: str) -> None:
    put(uri, rows({number: number + 1 for number in range(20)}), None, "first", 7)
    table = open_table(uri)
    assert table is not None
    some = data_files(table, day(3), day(9))
    assert [(file.date, file.rows) for file in some] == [(day(i), i + 1) for i in range(3, 9)]
    assert read_group(some, ["n"]).num_rows == sum(range(4, 10))
    assert read_group(some).column("date").to_pylist() == [day(i) for i in range(3, 9) for _ in range(i + 1)]  # type: ignore[attr-defined]


def test_a_partition_value_has_spans_of_its_own(uri: str) -> None:
    schema = pa.schema([*SCHEMA, ("view", pa.string())])
    put(uri, rows({0: 1, 1: 1}), None, "first", 100, extra={"view": "a"}, schema=schema)
    put(uri, rows({0: 2, 1: 2}, 1), None, "second", 100, extra={"view": "b"}, schema=schema)
    put(uri, rows({1: 3}, 2), (day(1),), "third", 100, extra={"view": "a"}, schema=schema)
    found = pl.read_delta(uri).group_by("view", "date").len().sort("view", "date").rows()
    assert found == [("a", day(0), 1), ("a", day(1), 3), ("b", day(0), 2), ("b", day(1), 2)]


def test_many_rows_of_a_span_are_cut_between_dates(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(date_spans, "FILE_ROWS", 10)
    counts = {0: 4, 1: 4, 2: 4, 3: 25, 4: 1, 5: 1}
    put(uri, rows(counts), None, "first", 100)
    assert bits(uri) == expected(counts)
    assert 3 <= len(paths(uri)) <= 4
    put(uri, rows({5: 2}, 1), (day(5),), "second", 100)
    assert bits(uri) == {**expected({0: 4, 1: 4, 2: 4, 3: 25, 4: 1}), **expected({5: 2}, 1)}


@pytest.mark.parametrize("how", ["a row less", "another date", "written again with a row less", "gone", "cut"])
def test_a_file_that_lost_rows_is_refused_before_anything_is_replaced(uri: str, how: str) -> None:
    put(uri, rows(dict.fromkeys(range(4), 3)), None, "first", 100)
    (path,) = paths(uri)
    content = pq.read_table(path)
    footer = content.schema.metadata
    if how == "a row less":
        pq.write_table(content.slice(0, content.num_rows - 1).replace_schema_metadata(footer), path)
    elif how == "another date":
        other = pa.array([day(0)] * content.num_rows, pa.date32())
        pq.write_table(content.set_column(3, "date", other).replace_schema_metadata(footer), path)
    elif how == "written again with a row less":
        pq.write_table(content.slice(1).replace_schema_metadata(None), path)
    elif how == "gone":
        os.remove(path)
    else:
        Path(path).write_bytes(Path(path).read_bytes()[:200])
    expect: type[Exception] = StoreError if how in ("gone", "cut") else DataError
    with pytest.raises(expect, match=path.rsplit("/", 1)[-1]) as caught:
        put(uri, rows({1: 1}, 1), (day(1),), "second", 100, base=0)
    assert caught.value.exit_code == (4 if how in ("gone", "cut") else 3)  # type: ignore[attr-defined]
    assert newest_version(uri) == 0
    put(uri, rows({1: 1}, 1), None, "third", 100)
    assert bits(uri) == expected({1: 1}, 1), "everything can be computed again"


def test_a_file_that_another_program_wrote_again_is_read_by_its_dates(uri: str) -> None:
    counts = dict.fromkeys(range(4), 3)
    put(uri, rows(counts), None, "first", 100)
    (path,) = paths(uri)
    pl.read_parquet(path, hive_partitioning=False).write_parquet(path)
    assert bits(uri) == expected(counts)
    put(uri, rows({1: 1}, 1), (day(1),), "second", 100)
    assert bits(uri) == {**expected({0: 3, 2: 3, 3: 3}), **expected({1: 1}, 1)}


def test_rows_that_a_file_has_lost_are_missing_under_their_own_date(uri: str) -> None:
    put(uri, rows(dict.fromkeys(range(4), 3)), None, "first", 100)
    table = open_table(uri)
    assert table is not None
    files = data_files(table)
    content = pq.read_table(files[0].path)
    pq.write_table(content.slice(1), files[0].path)
    assert [read_file(file).num_rows for file in files] == [2, 3, 3, 3]
    assert all(set(read_file(file)["date"].to_pylist()) == {file.date} for file in files)
    assert read_group(files[1:3]).num_rows == 6


def erase(uri: str, run: str, remainder: int, among: date | None = None) -> int:
    """Erases the rows whose number leaves this remainder, divided by three (of one date)."""

    def matches(group: pa.Table, path: str) -> npt.NDArray[np.bool_]:
        found = pl.DataFrame(pl.from_arrow(group))
        hit = found["n"] % 3 == remainder
        if among is not None:
            hit &= found["date"] == among if "date" in found.columns else pl.Series([f"date={among}/" in path])
        return hit.to_numpy()

    count = rewrite_delta(uri, matches, {"pipeline": "erase", "run_id": run})
    purge(uri)
    return count


def test_rows_are_erased_from_files_of_several_dates(uri: str) -> None:
    put(uri, rows({0: 3, 1: 1, 2: 5, 25: 4}), None, "first", 10)
    put(uri, rows({1: 2}, 1), (day(1),), "second", 10)
    before, other = bits(uri), max(paths(uri))
    assert erase(uri, "erase-1", 0, day(2)) == 2
    assert bits(uri) == {**before, day(2): [row for row in before[day(2)] if row[0] % 3 != 0]}
    assert other in paths(uri), "a file without such rows stays as it is"
    assert {str(path) for path in Path(uri).rglob("*.parquet")} == paths(uri)
    table = open_table(uri)
    assert table is not None
    made = {file.date: commit_of(table, file)["run_id"] for file in data_files(table)}
    assert made == {day(0): "first", day(1): "second", day(2): "erase-1", day(25): "first"}
    assert dates_of(table) == (day(0), day(25)), "the log still tells between which dates a file lies"
    reported = [json.loads(line["add"]["stats"]) for line in log(uri) if "add" in line]
    assert {name for each in reported for name in each} <= {"numRecords", "minValues", "maxValues"}
    assert erase(uri, "erase-2", 0, day(2)) == 0
    with pytest.raises(ConflictError, match="2024-01-03 changed since version 0"):
        put(uri, rows({2: 5}), (day(2),), "third", 10, base=0)
    put(uri, rows({2: 5}), (day(2),), "fourth", 10)
    assert bits(uri) == before
    for remainder in range(3):
        erase(uri, f"erase-{remainder + 3}", remainder)
    assert bits(uri) == {}
    assert paths(uri) == set()
    put(uri, rows({0: 3}), (day(0),), "fifth", 10)
    assert bits(uri) == expected({0: 3})


def log(uri: str) -> list[dict[str, Any]]:
    files = sorted(Path(uri, "_delta_log").glob("*.json"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


@pytest.mark.parametrize("first", [date(1970, 1, 2), date(2024, 1, 1)], ids=["same span", "another span"])
@pytest.mark.parametrize("known", [None, 0], ids=["new table", "table"])
def test_a_date_that_every_run_replaces_refuses_none(uri: str, first: date, known: int | None) -> None:
    """Dead letters of rows without a time are dated 1970-01-01, in whatever file and span that date lies."""
    undated, days = date(1970, 1, 1), [first + timedelta(days=number) for number in range(4)]

    def dead_letters(*dates: date, seed: int) -> pa.RecordBatch:
        made = [{"n": seed * 10 + i, "x": 0.0, "s": None, "date": each} for i, each in enumerate(dates)]
        return pa.RecordBatch.from_pylist(made, SCHEMA)

    def run(name: str, dates: tuple[date, ...] | None, seed: int, base: int | None) -> None:
        put(
            uri,
            dead_letters(undated, *(dates or days), seed=seed),
            dates and (undated, *dates),
            name,
            10_000,
            base=base,
            shared=(undated,),
            extra={"view": "a"},
            schema=schema,
        )

    schema = pa.schema([*SCHEMA, ("view", pa.string())])
    if known is not None:
        run("zeroth", None, 0, None)
    run("first", (days[0],), 1, known)
    run("second", (days[1],), 2, known)
    table = open_table(uri)
    assert table is not None
    held = {file.date: read_file(file)["n"].to_pylist() for file in data_files(table, extra={"view": "a"})}
    rest = {} if known is None else {days[2]: [3], days[3]: [4]}
    assert held == {undated: [20], days[0]: [11], days[1]: [21], **rest}
    assert data_files(table, extra={"view": "b"}) == []
    with pytest.raises(ConflictError, match=f"{days[0]} changed since"):
        run("third", (days[0],), 3, known)
    if known is not None:
        with pytest.raises(ConflictError, match=f"{days[0]}, {days[1]} changed since"):
            run("fourth", None, 4, known)
    run("fifth", None, 5, newest_version(uri))
    assert [file.date for file in data_files(open_table(uri))] == [undated, *days]  # type: ignore[arg-type]


@pytest.mark.parametrize("days", [1, 100])
def test_a_date_that_another_run_left_with_the_same_rows_refuses_none_that_compares(uri: str, days: int) -> None:
    put(uri, rows({0: 1, 1: 1}), None, "first", days)
    put(uri, rows({0: 2, 1: 2}, 1), (day(0), day(1)), "second", days, base=0)
    with pytest.raises(ConflictError, match="2024-01-01, 2024-01-02 changed since version 0"):
        put(uri, rows({0: 2, 1: 2}, 1), (day(0), day(1)), "third", days, base=0)
    with pytest.raises(ConflictError, match="2024-01-01, 2024-01-02 changed since version 0"):
        put(uri, rows({0: 2, 1: 3}, 1), (day(0), day(1)), "fourth", days, base=0, compares=True)
    with pytest.raises(ConflictError, match="2024-01-01, 2024-01-02 changed since version 0"):
        put(uri, rows({0: 2}, 1), (day(0), day(1)), "fifth", days, base=0, compares=True)
    put(uri, rows({0: 2, 1: 2, 2: 1}, 1), (day(0), day(1), day(2)), "sixth", days, base=0, compares=True)
    assert bits(uri) == expected({0: 2, 1: 2, 2: 1}, 1)


class Table(RuleBasedStateMachine):
    """Random runs against a dictionary of dates; every version stays what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.uri = f"{self.folder}/table"
        self.model: dict[date, list[tuple[int, bytes, str | None]]] = {}
        self.versions: list[dict[date, list[tuple[int, bytes, str | None]]] | None] = []
        self.runs = 0

    @initialize(
        days=st.integers(1, 12), most=st.integers(3, 30), counts=st.dictionaries(st.integers(0, 25), st.integers(1, 6))
    )
    def first(self, days: int, most: int, counts: dict[int, int]) -> None:
        self.days, self.rows_before = days, date_spans.FILE_ROWS
        date_spans.FILE_ROWS = most
        self.load(counts, None, 1)

    @rule(
        counts=st.dictionaries(st.integers(0, 25), st.integers(1, 6), max_size=4),
        more=st.sets(st.integers(0, 25), max_size=3),
        batches=st.integers(1, 3),
        other=st.integers(1, 12),
    )
    def some_dates(self, counts: dict[int, int], more: set[int], batches: int, other: int) -> None:
        self.load(counts, {*counts, *more}, batches, other)

    @rule(counts=st.dictionaries(st.integers(0, 25), st.integers(1, 6)), batches=st.integers(1, 3))
    def every_date(self, counts: dict[int, int], batches: int) -> None:
        self.load(counts, None, batches)

    @rule(remainder=st.integers(0, 2), number=st.none() | st.integers(0, 25))
    def rows_go(self, remainder: int, number: int | None) -> None:
        """Rows are erased; what older versions had of them is gone."""
        self.runs += 1
        among = None if number is None else day(number)
        kept = {
            each: [row for row in held if row[0] % 3 != remainder or among not in (None, each)]
            for each, held in self.model.items()
        }
        count = erase(self.uri, f"run-{self.runs}", remainder, among)
        assert count == sum(map(len, self.model.values())) - sum(map(len, kept.values()))
        self.model = {each: held for each, held in kept.items() if held}
        if self.versions:
            newest = [self.model] if count else self.versions[-1:]
            self.versions = [*([None] * (len(self.versions) - (not count))), *newest]

    def load(self, counts: dict[int, int], numbers: set[int] | None, batches: int, other: int | None = None) -> None:
        self.runs += 1
        run, batch = f"run-{self.runs}", rows(counts, self.runs)
        dates = None if numbers is None else tuple(map(day, sorted(numbers)))
        if dates == ():
            return
        target = CommitTarget(self.uri, SCHEMA, dates, run, newest_version(self.uri), days=self.days)
        size = -(-batch.num_rows // batches) or 1
        parts = [batch.slice(start, size) for start in range(0, batch.num_rows, size)]
        written = [each for part in parts for each in write_files(part, self.uri, run, None, other or self.days)]
        done = commit(target, written)
        kept = {} if dates is None else {each: self.model[each] for each in self.model if each not in dates}
        self.model = {**kept, **expected(counts, self.runs)}
        if done.fresh:
            self.versions.append(self.model)
        assert done.rows == batch.num_rows

    @invariant()
    def is_as_the_model(self) -> None:
        if self.versions:
            assert bits(self.uri) == self.model
            older = self.runs % len(self.versions)
            if self.versions[older] is not None:
                assert bits(self.uri, older) == self.versions[older]

    def teardown(self) -> None:
        date_spans.FILE_ROWS = self.rows_before
        shutil.rmtree(self.folder)


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=25, stateful_step_count=8, deadline=None)


@given(st.lists(st.integers(0, 60), max_size=80), st.integers(1, 20), st.integers(1, 30))
def test_cuts_hold_every_row_once_within_a_span_and_never_cut_a_date(days: list[int], span: int, most: int) -> None:
    numbers = pl.Series(sorted(days), dtype=pl.Int32).to_numpy()
    found = date_spans.cuts(numbers, span, most)
    assert [i for start, stop in found for i in range(start, stop)] == [*range(len(numbers))]
    for start, stop in found:
        part = numbers[start:stop]
        assert len({int(each) // span for each in part}) == 1
        assert len(part) <= most or len({*part.tolist()}) == 1
        assert start == 0 or numbers[start - 1] != numbers[start]
