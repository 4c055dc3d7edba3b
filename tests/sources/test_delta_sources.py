"""Sources that are Delta tables of another owner: partitioned as he likes, rewritten when he likes, with features of
his writer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas.errors import ContractError
from tests.support import market
from tests.support.features_runs import answers, dead_letters, run, same
from transforms.sources.contracts import Contract
from transforms.sources.inventory import survey
from transforms.sources.reader import read_raw
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
    same(answers(tmp_path / "tables"), answers(tmp_path / "files"))
    told, expected = (dead_letters(tmp_path / where).drop("file", "row", "date") for where in ("tables", "files"))
    order = told.columns
    same(told.filter(pl.col("source") != "shops").sort(order), expected.filter(pl.col("source") != "shops").sort(order))


def test_any_reader_of_a_source_gets_its_partition_columns(tmp_path: Path) -> None:
    """Labels, dimensions and replays survey their sources themselves; one reads the partition column alone."""
    sales = market.sources(30)["sales"]
    as_delta(tmp_path, {"sales": sales}, {"sales": ["city"]})
    source = market.load(tmp_path).sources["sales"]
    for columns in (("sold", "city", "sale"), ("sold", "city"), ("city",)):
        contract, slices = survey(str(tmp_path / "sources"), Contract(source, columns))
        found = read_raw(contract, slices)
        same(found.sort(columns), sales.select(columns).sort(columns))


def edited(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(table: Path) -> None:
        path = table / "_delta_log" / f"{0:020}.json"
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
    same(answers(tmp_path), answers(tmp_path / "fresh"))
    (last, *_) = commits(str(next((tmp_path / "features").glob("*/*"))))
    assert last["version"] == 1
