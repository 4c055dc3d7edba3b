"""Sources that are Delta tables of another owner: partitioned as he likes, rewritten when he likes, with features of
his writer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas import Source
from schemas.errors import ContractError
from schemas.sources import TIME
from tests.support import market
from tests.support.features_runs import dead_letters, feature_rows, run, same
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey_source
from transforms.sources.reader import _pieces, read_raw, read_slices, stream_slices
from transforms.storage.delta_log import commits

WHOLE: dict[str, list[str]] = {"visits": [], "sales": [], "stock": [], "shops": []}


def as_delta(store: Path, frames: dict[str, pl.DataFrame], partition: dict[str, list[str]]) -> None:
    for name, frame in frames.items():
        extra = (
            frame.with_columns(pl.col(market.TIMES[name]).dt.date().alias("date")) if name in market.TIMES else frame
        )
        extra.write_delta(
            store / "sources" / name,
            mode="overwrite",
            delta_write_options={"partition_by": partition[name]} if partition[name] else {},
        )


@pytest.mark.parametrize(
    "partition",
    [
        {"visits": ["date"], "sales": ["date"], "stock": ["date"], "shops": []},
        {"visits": ["city"], "sales": ["shop", "date"], "stock": ["note"], "shops": ["shop"]},
        {"visits": ["shop", "city"], "sales": ["city"], "stock": ["shop"], "shops": ["area"]},
    ],
)
def test_a_partitioned_delta_source_is_read_as_its_rows_in_files(
    tmp_path: Path, partition: dict[str, list[str]]
) -> None:
    frames = {
        # The protocol reads an empty string among partition values as null.
        name: frame.with_columns(pl.col("shop").replace("", None))
        for name, frame in market.spoiled(market.sources(30)).items()
    }
    run(market.write(tmp_path / "files", frames), "--max_dead_fraction", "1")
    (tmp_path / "tables").mkdir()
    as_delta(tmp_path / "tables", frames, partition)
    run(tmp_path / "tables", "--max_dead_fraction", "1")
    same(feature_rows(tmp_path / "tables"), feature_rows(tmp_path / "files"))
    reported, expected = (dead_letters(tmp_path / where).drop("file", "row", "date") for where in ("tables", "files"))
    order = reported.columns
    same(
        reported.filter(pl.col("source") != "shops").sort(order),
        expected.filter(pl.col("source") != "shops").sort(order),
    )


def test_any_reader_of_a_source_gets_its_partition_columns(tmp_path: Path) -> None:
    """Labels, dimensions and replays survey their sources themselves; one reads the partition column alone."""
    sales = market.sources(30)["sales"]
    as_delta(tmp_path, {"sales": sales}, {"sales": ["city"]})
    source = market.load(tmp_path).sources["sales"]
    for columns in (("sold", "city", "sale"), ("sold", "city"), ("city",)):
        contract, slices = survey_source(str(tmp_path / "sources"), Contract(source, columns))
        found = read_raw(contract, slices)
        same(found.sort(columns), sales.select(columns).sort(columns))


def edited(change: Callable[[dict[str, Any]], None], version: int = 0) -> Callable[[Path], None]:
    def edit(table: Path) -> None:
        path = table / "_delta_log" / f"{version:020}.json"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            change(line)
        path.write_text("\n".join(json.dumps(line, separators=(",", ":")) for line in lines) + "\n")

    return edit


def map_columns(line: dict[str, Any]) -> None:
    if "protocol" in line:
        line["protocol"] = {"minReaderVersion": 2, "minWriterVersion": 5}
    if "metaData" in line:
        line["metaData"]["configuration"] = {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "9"}
        schema = json.loads(line["metaData"]["schemaString"])
        for i, field in enumerate(schema["fields"]):
            field["metadata"] = {"delta.columnMapping.id": i + 1, "delta.columnMapping.physicalName": field["name"]}
        line["metaData"]["schemaString"] = json.dumps(schema)
    if "add" in line:
        line["add"].pop("stats", None)


def allow_deletion_vectors(line: dict[str, Any]) -> None:
    if "protocol" in line:
        features = {"readerFeatures": ["deletionVectors"], "writerFeatures": ["deletionVectors"]}
        line["protocol"] = {"minReaderVersion": 3, "minWriterVersion": 7, **features}


def delete_rows(line: dict[str, Any]) -> None:
    """The example of the Delta protocol's text: six rows deleted, written inline."""
    allow_deletion_vectors(line)
    if "add" in line:
        vector = "^Bg9^0rr910000000000iXQKl0rr91000f55c8Xg0@@D72lkbi5=-{L"
        line["add"]["deletionVector"] = {
            "storageType": "i",
            "pathOrInlineDv": vector,
            "sizeInBytes": 40,
            "cardinality": 6,
        }


@pytest.mark.parametrize(
    ("change", "words"), [(map_columns, "column mapping in"), (delete_rows, "deletion vectors in")]
)
def test_what_files_and_partitions_do_not_tell_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    as_delta(tmp_path, market.sources(40), WHOLE)
    edited(change)(tmp_path / "sources" / "sales")
    with pytest.raises(ContractError, match=words) as caught:
        run(tmp_path)
    assert "Source 'sales'" in str(caught.value)


def test_a_table_that_may_have_deletion_vectors_and_has_none_is_read(tmp_path: Path) -> None:
    frames = market.sources(30)
    as_delta(tmp_path, frames, WHOLE)
    edited(allow_deletion_vectors)(tmp_path / "sources" / "sales")
    assert run(tmp_path)["rows_out"] == 30


def test_a_source_partitioned_by_its_time_is_refused(tmp_path: Path) -> None:
    as_delta(tmp_path, market.sources(5), {**WHOLE, "stock": ["counted"]})
    with pytest.raises(ContractError, match=r"'counted' partitions .*Partition it by the date"):
        run(tmp_path)


def test_rows_that_their_owner_rewrites_make_the_dates_they_reach_stale_and_no_others(tmp_path: Path) -> None:
    """Every event of the source is seen for two days: its own and up to two after it."""
    frames = market.sources(60)
    as_delta(tmp_path, frames, {**{name: ["date"] for name in market.TIMES}, "shops": []})
    run(tmp_path)
    sales = frames["sales"].with_columns(date=pl.col("sold").dt.date())
    day = market.at(1).date()
    restated = sales.with_columns(price=pl.when(pl.col("date") == day).then(pl.col("price") + 1).otherwise("price"))
    restated.filter(pl.col("date") == day).write_delta(
        tmp_path / "sources" / "sales", mode="overwrite", delta_write_options={"predicate": f"date = '{day}'"}
    )
    figures = run(tmp_path)
    assert (figures["first"], figures["last"], figures["dates"]) == ("2024-03-02", "2024-03-04", 3)
    run(market.write(tmp_path / "fresh", {**frames, "sales": restated.drop("date")}))
    same(feature_rows(tmp_path), feature_rows(tmp_path / "fresh"))
    (last, *_) = commits(str(next((tmp_path / "features").glob("*/*"))))
    assert last["version"] == 1


# Columns that came and went

ROWS = [{"at": market.at(0.1), "k": 1, "v": 1.0}, {"at": market.at(0.2), "k": 1, "v": 2.0, "c": "x", "n": 3}]
wide = Source("ev", time="at", columns={"k": pl.Int64, "v": pl.Float64, "c": pl.String, "n": pl.Int64, "day": pl.Date})


def columns_over_time(root: Path, partition: list[str]) -> Path:
    """A table whose second commit adds `c` and `n`."""
    for row in ROWS:
        frame = pl.DataFrame([row]).with_columns(pl.col("at").cast(TIME), day=pl.col("at").dt.date())
        options = {"schema_mode": "merge", **({"partition_by": partition} if partition else {})}
        frame.write_delta(root / "ev", mode="append", delta_write_options=options)
    return root


@pytest.mark.parametrize("partition", [[], ["day"], ["k", "day"]])
@pytest.mark.parametrize("columns", [tuple(wide.schema), ("at", "c"), ("c",), ("n", "c", "k"), ("c", "at", "day")])
def test_a_column_that_was_added_later_is_null_in_older_files(
    tmp_path: Path, partition: list[str], columns: tuple[str, ...]
) -> None:
    contract, slices = survey_source(str(columns_over_time(tmp_path, partition)), Contract(wide, columns))
    expected = pl.DataFrame(ROWS).with_columns(pl.col("at").cast(TIME), day=pl.col("at").dt.date()).select(columns)
    same(read_raw(contract, slices).sort(columns), expected.sort(columns))
    pieces = [rows for each in slices for _, rows in _pieces(contract, each, 1)]
    same(pl.concat(pieces).sort(columns), expected.sort(columns))


def test_a_time_that_was_added_later_makes_dead_letters_of_the_rows_before_it(tmp_path: Path) -> None:
    pl.DataFrame({"k": [1, 2]}).write_delta(tmp_path / "ev")
    added = pl.DataFrame({"k": [3], "at": [market.at(0)]}).with_columns(pl.col("at").cast(TIME))
    added.write_delta(tmp_path / "ev", mode="append", delta_write_options={"schema_mode": "merge"})
    source = Source("ev", time="at", columns={"k": pl.Int64})
    contract, slices = survey_source(str(tmp_path), Contract(source, ("at", "k")))
    for reads in ([read_slices(contract, slices)], list(stream_slices(contract, slices, chunk=1))):
        assert [each.frame["k"].to_list() for each in reads if len(each.frame)] == [[3]]
        assert pl.concat([each.dead_letters for each in reads])["rule"].to_list() == ["a time is present"] * 2


def test_a_column_that_the_newest_version_does_not_have_is_refused(tmp_path: Path) -> None:
    """Its older files may hold it."""
    columns_over_time(tmp_path, [])

    def remove(line: dict[str, Any]) -> None:
        if "metaData" in line:
            schema = json.loads(line["metaData"]["schemaString"])
            schema["fields"] = [field for field in schema["fields"] if field["name"] != "v"]
            line["metaData"]["schemaString"] = json.dumps(schema)

    edited(remove, 1)(tmp_path / "ev")
    with pytest.raises(ContractError, match=r"declared column 'v'.*newest version of its table does not"):
        survey_source(str(tmp_path), Contract(wide, ("at", "v")))
    assert len(survey_source(str(tmp_path), Contract(wide, ("at", "k")))[1]) == 2


def test_a_column_that_no_version_has_is_refused(tmp_path: Path) -> None:
    source = Source("ev", time="at", columns={"k": pl.Int64, "cc": pl.String})
    with pytest.raises(ContractError, match="declared column 'cc'"):
        survey_source(str(columns_over_time(tmp_path, [])), Contract(source, ("at", "cc")))


@pytest.mark.parametrize(
    ("added", "declared"), [("x", pl.Int64), (1.5, pl.Int64), (2**40, pl.Int32), (True, pl.String)]
)
def test_a_column_that_was_added_with_another_type_is_refused(tmp_path: Path, added: Any, declared: Any) -> None:
    for row in ({"k": 1}, {"k": 2, "c": added}):
        pl.DataFrame([row]).write_delta(tmp_path / "ev", mode="append", delta_write_options={"schema_mode": "merge"})
    with pytest.raises(ContractError, match="column 'c'"):
        survey_source(str(tmp_path), Contract(Source("ev", columns={"k": pl.Int64, "c": declared}), ("k", "c")))


def test_a_run_over_a_table_whose_columns_were_added_later_is_verified(tmp_path: Path) -> None:
    """`--verify` reads the sources by a path of its own."""
    frames = market.sources(30)
    as_delta(tmp_path, frames, WHOLE)
    for name, column in (("sales", "price"), ("stock", "note"), ("shops", "rent")):
        folder = tmp_path / "sources" / name
        shutil.rmtree(folder)
        half = len(frames[name]) // 2
        frames[name][:half].drop(column).write_delta(folder)
        frames[name][half:].write_delta(folder, mode="append", delta_write_options={"schema_mode": "merge"})
        kept = pl.when(pl.int_range(pl.len()) >= half).then(pl.col(column))
        frames[name] = frames[name].with_columns(kept)
    figures = run(tmp_path, "--verify", "30", "--verify_share", "1")
    assert "verified" in figures
    run(market.write(tmp_path / "fresh", frames))
    same(feature_rows(tmp_path), feature_rows(tmp_path / "fresh"))
