"""Every shared PTransform of the features side, run by Beam on real files."""

from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pytest
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that, equal_to
from polars.testing import assert_frame_equal

from schemas import FeatureView
from schemas.errors import DataError, StoreError
from tests.support import market
from transforms.features.block_features import features_batch
from transforms.features.block_inputs import read_dimension
from transforms.features.plan import FeaturePlan, PlanOptions, plan_blocks, resolve_interval
from transforms.features.trailing_features import TrailingFeatures, compute_block
from transforms.records.times import EPOCH, MICROSECOND
from transforms.sources.dead_letters import DEAD_LETTERS
from transforms.sources.inventory import take_inventory
from transforms.sources.reader import repeats_of
from transforms.sources.tallies import SourceTally, add_tallies, require_conserved
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    DataFile,
    data_files,
    days_between,
    open_table,
    read_group,
)
from transforms.storage.table_transforms import CommitFiles, ReadTable, WriteFiles, WriteTable

NOW = (datetime(2024, 6, 1, tzinfo=UTC) - EPOCH) // MICROSECOND
SCHEMA = pa.schema([("n", pa.int64()), ("date", pa.date32())])
DAYS = days_between(date(2020, 1, 1), date(2020, 1, 4))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("store")
    return market.write(root, market.spoiled(market.sources()), files=2, shuffle=1, group=30)


@pytest.fixture(scope="module")
def view(store: Path) -> FeatureView:
    return market.load(store)


def plan_of(view: FeatureView, store: Path, shuffled: bool, block_rows: int = 150) -> FeaturePlan:
    inventory = take_inventory(view, str(store / "sources"), NOW)
    repeats = {"sales": repeats_of(inventory.contracts["sales"], inventory.slices["sales"]).first}
    ranges = [resolve_interval(view, inventory, None, None)]
    options = PlanOptions(everything=True, block_rows=block_rows, shuffled=shuffled)
    return plan_blocks(view, inventory, ranges, repeats, options)


@pytest.fixture(scope="module")
def whole(view: FeatureView, store: Path) -> pl.DataFrame:
    """Features of one block without Beam."""
    plan = plan_of(view, store, shuffled=False, block_rows=10**6)
    (block,) = plan.blocks
    dimensions = {name: read_dimension(view, plan, name) for name in plan.dimensions}
    return pl.from_arrow(compute_block(view, plan, block, dimensions)[0])  # type: ignore[return-value]


@pytest.mark.parametrize("shuffled", [False, True])
def test_trailing_features_computes_every_spine_row_once_whatever_the_plan(
    view: FeatureView, store: Path, whole: pl.DataFrame, shuffled: bool
) -> None:
    plan = plan_of(view, store, shuffled)
    assert len(plan.blocks) > 3

    def check_features(batches: list[pa.RecordBatch]) -> None:
        assert all(each.schema == view.output_schema for each in batches)
        for each in batches:
            part = pl.from_arrow(each)
            assert_frame_equal(part, part.sort("asked", "visit"), check_exact=True)
        got = pl.concat([pl.from_arrow(each) for each in batches])
        assert_frame_equal(got.sort("asked", "visit"), whole.sort("asked", "visit"), check_exact=True)

    def check_letters(batches: list[pa.RecordBatch]) -> None:
        assert all(each.schema == DEAD_LETTERS for each in batches)
        dead_letters = pl.concat([pl.from_arrow(each) for each in batches])
        assert dict(dead_letters.group_by("source").len().rows()) == {
            name: rows for name, rows in market.SET_ASIDE.items() if rows
        }
        assert set(dead_letters["view"]) == {"demand"}

    def check_tallies(found: list[Any]) -> None:
        (tallies,) = found
        assert all(tally.conserved for tally in tallies.values())
        assert tallies["visits"].used == len(whole)
        assert {name: tallies[name].dead for name in market.SET_ASIDE} == market.SET_ASIDE
        assert {name: tallies[name].repeated for name in market.REPEATED} == market.REPEATED

    with Pipeline() as pipeline:
        blocks = pipeline | beam.Create(list(plan.blocks))
        features, dead_letters, tallies = blocks | TrailingFeatures(view, plan)
        assert_that(features, check_features, "features")
        assert_that(dead_letters, check_letters, "dead_letters")
        assert_that(tallies | beam.CombineGlobally(add_tallies), check_tallies, "tallies")


def test_features_carry_the_id_of_their_spine_row_and_its_utc_date(view: FeatureView, whole: pl.DataFrame) -> None:
    assert whole["row_id"].n_unique() == len(whole)
    assert (whole["date"] == whole["asked"].dt.date()).all()
    again = features_batch(view, whole.drop("row_id", "date")[::-1])
    assert again.column(again.schema.get_field_index("row_id")).to_pylist() == whole["row_id"].to_list()[::-1]


def batch(*days: date, of: int = 0) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{"n": of + i, "date": day} for i, day in enumerate(days)], SCHEMA)


def contents(uri: str) -> list[tuple[int, date]]:
    table = open_table(uri)
    assert table is not None
    files = data_files(table)
    return sorted((row["n"], row["date"]) for row in read_group(files).to_pylist()) if files else []


def test_write_table_makes_one_commit_of_all_batches(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    batches = [batch(*DAYS), batch(*DAYS[:2], of=10), batch()]
    for _ in range(2):  # the same run again changes nothing
        with Pipeline() as pipeline:
            committed = pipeline | beam.Create(batches) | WriteTable(CommitTarget(uri, SCHEMA, DAYS, "run-1", None))
            assert_that(
                committed | beam.Map(lambda each: (each.version, each.rows, each.files, each.dates)),
                equal_to([(0, 5, 5, DAYS)]),
            )
    assert contents(uri) == [(0, DAYS[0]), (1, DAYS[1]), (2, DAYS[2]), (10, DAYS[0]), (11, DAYS[1])]


def test_write_table_of_nothing_empties_its_dates(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    full, empty = CommitTarget(uri, SCHEMA, DAYS, "run-1"), CommitTarget(uri, SCHEMA, DAYS[:2], "run-2", base=0)
    for target, batches in ((full, [batch(*DAYS)]), (empty, [])):
        with Pipeline() as pipeline:
            _ = pipeline | beam.Create(batches) | WriteTable(target)
    assert contents(uri) == [(2, DAYS[2])]


def test_write_files_shows_nothing_and_commit_files_all_of_it(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")

    def one_list(lists: list[Any]) -> None:
        (written,) = lists
        assert [(file.date, file.rows, values) for file, values in sorted(written, key=lambda each: each[0].date)] == [
            (day, 1, {"date": day.isoformat()}) for day in DAYS
        ]

    with Pipeline() as pipeline:
        files = pipeline | beam.Create([batch(*DAYS)]) | WriteFiles(uri, "run-1")
        assert_that(files, one_list)
    assert open_table(uri) is None
    with Pipeline() as pipeline:
        files = pipeline | beam.Create([batch(*DAYS)]) | WriteFiles(uri, "run-1")
        committed = files | CommitFiles(CommitTarget(uri, SCHEMA, DAYS, "run-1"))
        assert_that(committed, equal_to([Committed(0, 3, 3, DAYS, fresh=True)]))
    assert len(contents(uri)) == 3


def test_commit_files_takes_metadata_from_side_inputs(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    with Pipeline() as pipeline:
        count = beam.pvalue.AsSingleton(
            pipeline | "Numbers" >> beam.Create([1, 2, 3]) | beam.combiners.Count.Globally()
        )
        files = pipeline | beam.Create([batch(*DAYS)]) | WriteFiles(uri, "run-1")
        _ = files | CommitFiles(CommitTarget(uri, SCHEMA, DAYS, "run-1"), note, (count,))
    table = open_table(uri)
    assert table is not None
    assert table.history()[0]["counted"] == "None 3"


def note(table: Any, counted: int) -> dict[str, str]:
    return {"counted": f"{table} {counted}"}


def test_a_refused_commit_fails_the_pipeline_with_its_reason(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    with pytest.raises(StoreError, match="writes rows of its own dates only"), Pipeline() as pipeline:
        _ = pipeline | beam.Create([batch(*DAYS)]) | WriteTable(CommitTarget(uri, SCHEMA, DAYS[:1], "run-1"))
    assert open_table(uri) is None


def test_read_table_gives_the_pinned_files_whatever_comes_later(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    for run, of in (("run-1", 0), ("run-2", 50)):
        pinned = tuple(data_files(open_table(uri))) if run == "run-2" else ()  # type: ignore[arg-type]
        with Pipeline() as pipeline:
            _ = (
                pipeline
                | beam.Create([batch(*DAYS, of=of)])
                | WriteTable(CommitTarget(uri, SCHEMA, DAYS, run, 0 if of else None))
            )
    with Pipeline() as pipeline:
        batches = pipeline | ReadTable(pinned, columns=("date", "n"))
        assert_that(batches | beam.FlatMap(pairs), equal_to([(day, i) for i, day in enumerate(DAYS)]))
    with Pipeline() as pipeline:
        assert_that(pipeline | ReadTable(()), equal_to([]))


def pairs(rows: pa.RecordBatch) -> Iterator[tuple[date, int]]:
    assert rows.schema.names == ["date", "n"]
    yield from zip(rows.column(0).to_pylist(), rows.column(1).to_pylist(), strict=True)


def test_files_without_a_feature_row_for_every_spine_row_are_not_committed() -> None:
    written = [(DataFile("a", DAYS[0], 3, 1), {"date": "2020-01-01"})]
    assert require_conserved(written, {"q": SourceTally("q", 4, 3, 0, 0, 1)}, "q") == written
    with pytest.raises(DataError, match=r"3 feature rows of 4 spine rows.*Nothing was committed"):
        require_conserved(written, {"q": SourceTally("q", 4, 4)}, "q")
    with pytest.raises(DataError, match="Rows are conserved"):
        require_conserved(written, {"q": SourceTally("q", 3, 3), "e": SourceTally("e", 5, 3, 1)}, "q")
    # The same file told twice is one file.
    assert require_conserved([*written, *written], {"q": SourceTally("q", 3, 3)}, "q")
