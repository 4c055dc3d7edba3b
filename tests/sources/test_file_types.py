"""Types, zones, paths and conditions of sources, through real files."""

from __future__ import annotations

import gzip
import json
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas import Derived, FeatureView, Source, Trailing
from schemas.errors import ContractError, DefinitionError
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey_files, take_inventory
from transforms.sources.reader import ReadOptions, SourceRows, read_slices

NOW = 1_800_000_000_000_000
AT = datetime(2024, 5, 1, 12, tzinfo=UTC)


def read(root: Path, source: Source, **options: Any) -> SourceRows:
    found = survey_files(str(root), Contract(source, tuple(source.schema), now=NOW, **options))
    return read_slices(found.contract, found.slices, ReadOptions())


def refused(root: Path, source: Source) -> str:
    with pytest.raises(ContractError) as caught:
        survey_files(str(root), Contract(source, tuple(source.schema), now=NOW))
    return str(caught.value)


def put(path: Path, table: pa.Table | str | bytes, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(table, pa.Table):
        pq.write_table(table, path, **options)
    else:
        path.write_bytes(table.encode() if isinstance(table, str) else table)
    return path


# Types


@pytest.mark.parametrize(
    ("declared", "array", "expected"),
    [
        (pl.Int64, pa.array([1, None], pa.int8()), 1),
        (pl.Int64, pa.array([2**63 - 1, None], pa.uint64()), 2**63 - 1),
        (pl.Int64, pa.array([7.0, None]), 7),
        (pl.Int64, pa.array([7.0, float("nan")]), 7),
        (pl.Int64, pa.array([Decimal("12.00"), None]), 12),
        (pl.Int32, pa.array([7.0, None], pa.float32()), 7),
        (pl.Float64, pa.array([2**40, None]), 2.0**40),
        (pl.Float64, pa.array([1.5, None], pa.float32()), 1.5),
        (pl.Float64, pa.array([Decimal("0.10"), None]), 0.1),
        (pl.Float32, pa.array([3, None]), 3.0),
        (pl.String, pa.array(["a", None], pa.large_string()), "a"),
        (pl.String, pa.array(["a", None]).dictionary_encode(), "a"),
        (pl.Date, pa.array(["2024-05-01", None]), date(2024, 5, 1)),
        (pl.Datetime("us", "UTC"), pa.array(["2024-05-01T12:00:00Z", None]), AT),
        *((kind, pa.nulls(2), None) for kind in (pl.Int64, pl.String, pl.Boolean, pl.Date, pl.Datetime("us", "UTC"))),
    ],
)
def test_a_safe_widening_is_read(tmp_path: Path, declared: Any, array: pa.Array, expected: object) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": declared})
    put(tmp_path / "s" / "a.parquet", pa.table({"n": [1, 2], "v": array}))
    found = read(tmp_path, source)
    assert found.frame.sort("n")["v"].to_list() == [expected, None]
    assert found.frame.schema == source.schema
    assert found.dead_letters.is_empty()


@pytest.mark.parametrize(
    ("declared", "array", "rule"),
    [
        (pl.Int64, pa.array([2**63, 1], pa.uint64()), "a value is Int64"),
        (pl.Int64, pa.array([1.5, 1.0]), "whole number"),
        (pl.Int64, pa.array([2.0**60, 1.0]), "whole number"),
        (pl.Int8, pa.array([300.0, 1.0]), "whole number"),
        (pl.Float64, pa.array([2**53 + 1, 1]), "keeps all its digits"),
        (pl.Float64, pa.array([Decimal("9007199254740993"), Decimal(1)]), "keeps all its digits"),
        (pl.Int64, pa.array([Decimal("1.5"), Decimal("1.0")]), "whole number"),
    ],
)
def test_a_value_that_would_change_is_a_dead_letter(tmp_path: Path, declared: Any, array: pa.Array, rule: str) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": declared})
    put(tmp_path / "s" / "a.parquet", pa.table({"n": [1, 2], "v": array}))
    found = read(tmp_path, source)
    assert found.frame.rows() == [(2, 1)]
    assert found.dead_letters.select("row", "field").rows() == [(0, "v")]
    assert rule in found.dead_letters["rule"][0]


def test_a_column_that_only_breaks_ties_rejects_no_row(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": pl.Int64})
    put(tmp_path / "s" / "a.csv", "n,v\n1,x\n2,3\n")
    contract = Contract(source, ("n",), now=NOW, ordering=("v",))
    found = survey_files(str(tmp_path), contract)
    assert read_slices(found.contract, found.slices).frame.rows() == [(1, None), (2, 3)]


def test_int96_is_an_instant_of_any_year(tmp_path: Path) -> None:
    moments = [datetime(2024, 5, 1, 12), datetime(9999, 12, 31, 23, 59, 59), datetime(1, 1, 1), datetime(1815, 6, 18)]
    source = Source("s", columns={"n": pl.Int64, "v": pl.Datetime("us", "UTC")})
    table = pa.table({"n": range(4), "v": pa.array(moments, pa.timestamp("us"))})
    put(tmp_path / "s" / "a.parquet", table, use_deprecated_int96_timestamps=True)
    assert read(tmp_path, source).frame["v"].dt.replace_time_zone(None).to_list() == moments
    timed = Source("s", time="v", columns={"n": pl.Int64})
    found = read(tmp_path, timed)
    assert found.frame["v"].to_list() == [AT]
    assert len(found.dead_letters) == 3


def test_mixed_types_and_formats_over_files_are_read_if_each_is(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": pl.Float64})
    folder = tmp_path / "s"
    put(folder / "a.parquet", pa.table({"n": pa.array([1], pa.int8()), "v": [1.5]}))
    put(folder / "b.parquet", pa.table({"n": pa.array([2.0, None]), "v": pa.array([2, 3])}))
    put(folder / "c.csv", "v,n\n4.5,4\n")
    put(folder / "d.tsv", "n\tv\tmore\n5\t5.5\tx\n")
    put(folder / "e.ndjson", '{"n": 6, "v": 6.5}\n{"n": 7}\n')
    put(folder / "f.jsonl.gz", gzip.compress(b'{"n": 8, "v": 8}\n'))
    found = read(tmp_path, source)
    assert found.frame.rows() == [(1, 1.5), (2, 2.0), (None, 3.0), (4, 4.5), (5, 5.5), (6, 6.5), (7, None), (8, 8.0)]
    assert found.dead_letters.is_empty()


def test_empty_files_and_headers_without_rows_have_no_rows(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64})
    put(tmp_path / "s" / "a.csv", "")
    put(tmp_path / "s" / "b.csv", "n")
    put(tmp_path / "s" / "c.csv", "\ufeffn\r\n\r\n")
    put(tmp_path / "s" / "d.jsonl", "\n\n")
    put(tmp_path / "s" / "e.csv", "n\n1\n")
    assert read(tmp_path, source).frame.rows() == [(1,)]
    (tmp_path / "s" / "f.csv").write_text("m\n")
    assert "declared column 'n'" in refused(tmp_path, source)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "n,v\n1,2\n".encode("utf-16"), "UTF-16"),
        ("a.json", '[{"n": 1}]', "JSON array"),
        ("a.csv.gz", gzip.compress(b"n,v\n" + b"1,2\n" * 100_000)[:-20], "complete CSV"),
        ("a.jsonl.gz", b"not gzip", "complete JSON lines"),
        ("a.csv", "n,n,v\n1,2,3\n", "2 columns 'n'"),
        ("a.jsonl", '{"m": 1, "v": 2}\n', "declared column 'n'"),
        ("a.csv", "n;m\n1;2\n", "declared column 'v'"),
    ],
)
def test_files_that_are_refused_as_a_whole(tmp_path: Path, name: str, content: str | bytes, words: str) -> None:
    path = put(tmp_path / "s" / name, content)
    message = refused(tmp_path, Source("s", columns={"n": pl.Int64, "v": pl.Int64}))
    assert words in message
    assert str(path) in message


def test_lines_of_json_that_cannot_be_read_are_dead_letters(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": pl.String, "ok": pl.Boolean})
    bad = [
        ("{", ""),
        ("[1]", ""),
        ('{"n": 1} {"n": 2}', ""),
        ('{"n": "1"}', "n"),
        ('{"n": 1.5}', "n"),
        ('{"n": 9223372036854775808}', "n"),
        ('{"n": true}', "n"),
        ('{"v": 1}', "v"),
        ('{"v": {"a": 1}}', "v"),
        ('{"ok": 1}', "ok"),
        ('{"n": ' + "[" * 100_000 + "]" * 100_000 + "}", ""),
        ('{"v": "\\ud800"}', "v"),
    ]
    good = ['{"n": 1, "v": "a", "ok": true}', '{"n": 2.0, "v": null}', '{"other": [1, {"n": 3}], "n": 4}']
    text = "\n".join([good[0], *(line for line, _ in bad), *good[1:]])
    put(tmp_path / "s" / "a.jsonl", text)
    found = read(tmp_path, source)
    assert found.frame.rows() == [(1, "a", True), (2, None, None), (4, None, None)]
    assert found.dead_letters.select("row", "field").rows() == [(2 + i, field) for i, (_, field) in enumerate(bad)]


# Times


def test_local_times_are_counted_by_file_and_depend_on_the_use(tmp_path: Path) -> None:
    times = ["2024-10-27 02:30:00", "2024-03-31 02:30:00", "2024-10-27 02:30:00+01:00", "2024-07-01 00:00:00"]
    spine = Source("asked", time="at", zone="Europe/Berlin", columns={"k": pl.Int64})
    events = Source("events", time="at", zone="Europe/Berlin", columns={"k": pl.Int64})
    for name in ("asked", "events"):
        put(tmp_path / name / "a.csv", "k,at\n" + "".join(f"{i},{each}\n" for i, each in enumerate(times)))
    naive = pa.table({"k": [9], "at": pa.array([datetime(2024, 10, 27, 2, 30)], pa.timestamp("ns"))})
    put(tmp_path / "events" / "b.parquet", naive)
    two = FeatureView("two", spine, "k", [Trailing(events, by="k", over="1d", stats={"*": "count"})])
    one = FeatureView("one", spine, "k", [Trailing(spine, by="k", over="1d", stats={"*": "count"})])
    late, early = datetime(2024, 10, 27, 1, 30, tzinfo=UTC), datetime(2024, 10, 27, 0, 30, tzinfo=UTC)
    rest = [late, datetime(2024, 6, 30, 22, tzinfo=UTC)]

    def found(view: FeatureView, name: str) -> tuple[list[datetime], list[str]]:
        inventory = take_inventory(view, str(tmp_path), NOW)
        rows = read_slices(inventory.contract(name), inventory.slices[name])
        return rows.frame["at"].to_list(), rows.dead_letters["rule"].to_list()

    absent = "a local time exists in Europe/Berlin"
    assert found(two, "asked") == ([early, *rest], [absent])
    assert found(two, "events") == ([late, *rest, late], [absent])
    instants, rules = found(one, "asked")
    assert instants == rest
    assert [rule[:17] for rule in rules] == ["a local time that", "a local time exis"]
    notes = take_inventory(two, str(tmp_path), NOW).notes
    assert [note.split(" (")[0] for note in notes] == [
        "asked: 1 local times occur twice in Europe/Berlin",
        "asked: 1 local times do not exist in Europe/Berlin",
        "events: 1 local times occur twice in Europe/Berlin",
        "events: 1 local times do not exist in Europe/Berlin",
        "events: 1 local times occur twice in Europe/Berlin",
    ]


@pytest.mark.parametrize(
    ("source", "times"),
    [
        (Source("s", time="at", zone="UTC", columns={"n": pl.Int64}), ["2024-05-01T12:00:00", "2024-05-01 12:00"]),
        (Source("s", time="at", unit="s", columns={"n": pl.Int64}), [1714564800, 1714564800.0, "1714564800"]),
        (Source("s", time="at", unit="ms", columns={"n": pl.Int64}), [1714564800000, "2024-05-01T12:00:00Z"]),
        (Source("s", time="at", zone="Asia/Tokyo", columns={"n": pl.Int64}), ["2024-05-01T21:00", "2024-05-01T12:00Z"]),
    ],
)
def test_times_as_text_and_numbers_in_every_format(tmp_path: Path, source: Source, times: list[Any]) -> None:
    put(tmp_path / "s" / "a.csv", "at,n\n" + "".join(f"{each},{i}\n" for i, each in enumerate(times)))
    put(tmp_path / "s" / "b.jsonl", "".join(json.dumps({"at": each, "n": i}) + "\n" for i, each in enumerate(times)))
    for i, each in enumerate(times):
        put(tmp_path / "s" / f"c{i}.parquet", pa.table({"at": [each], "n": [i]}))
    found = read(tmp_path, source)
    assert found.dead_letters.is_empty()
    assert found.frame["at"].to_list() == [AT] * (3 * len(times))
    slices = survey_files(str(tmp_path), Contract(source, ("at",), now=NOW)).slices
    assert {(each.low, each.high) for each in slices} == {(int(AT.timestamp()) * 10**6,) * 2}


# Where files are


def test_several_sources_over_one_file_take_the_rows_of_their_conditions(tmp_path: Path) -> None:
    path = put(
        tmp_path / "data" / "all.csv", "kind,n,at\na,1,2024-05-01\nb,x,2024-05-01\nc,y,2024-05-01\na,z,2024-05-01\n"
    )
    (tmp_path / "sources").mkdir()

    def of(kind: str, where: str) -> Source:
        columns = {"n": pl.Int64, "kind": pl.String}
        return Source(kind, time="at", zone="UTC", columns=columns, path=where, where=pl.col("kind") == kind)

    for where in (str(path), "../data/all.csv", "../data", "../data/all"):
        a, b = (read(tmp_path / "sources", of(kind, where)) for kind in "ab")
        assert a.frame["n"].to_list() == [1]
        assert a.dead_letters.select("row", "value").rows() == [(5, "z")]
        assert b.frame.is_empty()
        assert b.dead_letters.select("row", "value").rows() == [(3, "x")]


def test_a_row_of_which_it_cannot_be_told_whether_it_is_the_sources_is_a_dead_letter(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64, "v": pl.Int64}, where=pl.col("n") > 1)
    put(tmp_path / "s" / "a.csv", "n,v\n1,x\nx,1\n2,2\n3,x\n,1\nonly\n")
    found = read(tmp_path, source)
    assert found.frame.rows() == [(2, 2)]
    assert found.dead_letters.select("row", "field").rows() == [(3, "n"), (5, "v"), (7, "")]


def test_folders_stand_for_columns(tmp_path: Path) -> None:
    source = Source("s", columns={"n": pl.Int64, "year": pl.Int32, "land": pl.String})
    put(tmp_path / "s" / "year=2024" / "land=D%2FE" / "a.parquet", pa.table({"n": [1]}))
    put(tmp_path / "s" / "year=2025" / "land=__HIVE_DEFAULT_PARTITION__" / "b.csv", "n\n2\n")
    put(
        tmp_path / "s" / "year=0" / "land=no" / "c.parquet",
        pa.table({"n": [3], "year": pa.array([2026], pa.int32()), "land": ["yes"]}),
    )
    assert read(tmp_path, source).frame.sort("n").rows() == [(1, 2024, "D/E"), (2, 2025, None), (3, 2026, "yes")]
    put(tmp_path / "s" / "year=x" / "land=y" / "d.parquet", pa.table({"n": [4]}))
    assert "'x' in its path" in refused(tmp_path, source)


def test_a_folder_may_stand_for_the_time(tmp_path: Path) -> None:
    source = Source("s", time="day", zone="UTC", columns={"n": pl.Int64})
    put(tmp_path / "s" / "day=2024-05-01" / "a.parquet", pa.table({"n": [1]}))
    put(tmp_path / "s" / "day=2024-05-02" / "a.csv", "n\n2\n")
    assert read(tmp_path, source).frame.select("n", pl.col("day").dt.date()).rows() == [
        (1, date(2024, 5, 1)),
        (2, date(2024, 5, 2)),
    ]


# Mistakes


def test_all_mismatches_of_all_sources_are_named_at_once_with_what_to_write(tmp_path: Path) -> None:
    spine = Source("asked", time="at", columns={"k": pl.Int64, "price": pl.Int64, "lost": pl.String})
    events = Source("events", time="ts", columns={"k": pl.Int64, "v": pl.Float64})
    view = FeatureView(
        "v", spine, "k", [Derived(p=pl.col("price")), Trailing(events, by="k", over="1d", stats={"v": "sum"})]
    )
    put(
        tmp_path / "asked" / "a.parquet",
        pa.table({"k": [1], "price": ["x"], "at": pa.array([AT.replace(tzinfo=None)])}),
    )
    put(
        tmp_path / "asked" / "b.parquet",
        pa.table({"k": [1], "price": ["x"], "at": pa.array([AT.replace(tzinfo=None)])}),
    )
    put(tmp_path / "events" / "a.parquet", pa.table({"k": [True], "v": [1.0], "ts": [1]}))
    put(tmp_path / "events" / "b.csv", "k,v,ts\nx,1,5\ny,2,6\n")
    with pytest.raises(ContractError) as caught:
        take_inventory(view, str(tmp_path), NOW)
    message = str(caught.value)
    for word in (
        "asked.price is declared Int64: string",
        "asked.lost is missing",
        "asked.at has no time zone: timestamp[us]",
        "and 1 more files",
        "events.k is declared Int64: bool",
        "events.ts has no unit",
        "in Source('asked', …): zone=",
        '"price": pl.String',
        'unit="s"',
    ):
        assert word in message, word


def test_text_of_which_no_value_is_read_is_a_wrong_declaration(tmp_path: Path) -> None:
    put(tmp_path / "s" / "a.csv", "n,at,v\nx,2024-01-01 10:00,1.5\ny,2024-01-01 10:00,2.5\n")
    message = refused(tmp_path, Source("s", time="at", columns={"n": pl.Int64, "v": pl.Int64}))
    for word in ('"n": pl.String', '"v": pl.Float64', "zone=", "text such as 'x'"):
        assert word in message
    put(tmp_path / "s" / "b.csv", "n,at,v\n1,2024-01-01T10:00Z,1\n")
    assert len(read(tmp_path, Source("s", time="at", columns={"n": pl.Int64, "v": pl.Int64})).dead_letters) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": ""},
        {"path": "/"},
        {"path": 3},
        {"zone": "Berlin"},
        {"zone": "../etc/passwd"},
        {"zone": "Europe"},
        {"unit": "sec"},
        {"where": pl.col("n")},
        {"where": pl.col("m") > 1},
        {"where": pl.col("n") > pl.col("n").mean()},
        {"where": "n > 1"},
    ],
)
def test_arguments_that_mean_nothing_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match=r"Source 's'|where of|'m'"):
        Source("s", columns={"n": pl.Int64}, **arguments)


def test_what_decides_the_rows_is_in_the_fingerprint_and_the_path_is_not() -> None:
    def fingerprint(role: str, **arguments: Any) -> tuple[str, list[str]]:
        spine = Source("asked", time="at", columns={"k": pl.Int64}, **(arguments if role == "spine" else {}))
        events = Source("e", time="at", columns={"k": pl.Int64}, **(arguments if role == "events" else {}))
        view = FeatureView(
            "v", spine, "k", [Derived(p=pl.col("k") + 1), Trailing(events, by="k", over="1d", stats={"*": "count"})]
        )
        return view.fingerprint, list(view.meanings.values())

    plain = fingerprint("none")
    for role in ("spine", "events"):
        assert fingerprint(role, path="elsewhere") == plain
        for arguments in ({"zone": "UTC"}, {"unit": "s"}, {"where": pl.col("k") > 1}, {"where": pl.col("k") > 2}):
            print_of, meanings = fingerprint(role, **arguments)
            assert print_of != plain[0]
            assert (meanings[0] == plain[1][0]) == (role == "events")
            assert meanings[1] != plain[1][1]
