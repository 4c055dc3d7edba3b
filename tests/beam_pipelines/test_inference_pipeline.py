"""`millrace inference` on real files: a real feature table, a real registry, real boosters."""

import dataclasses
import os
import shutil
from datetime import date
from pathlib import Path

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.pipeline import AppliedPTransform, PipelineVisitor
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline

from beam_pipelines import features, inference
from beam_pipelines.runtime.errors import guard
from schemas.loading import load_definition
from schemas.splits import LABEL, LABEL_TIME
from tests.support.inference_case import DAYS, DEFINITION, feature_rows, train, write_sources
from tests.support.tables import figures_of
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, predict
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import BOOSTER, predictions_uri
from transforms.storage.tfrecord_codec import gzipped
from transforms.storage.tfrecord_io import matching_files, read_examples
from transforms.training.examples import schema_of


def predictions(store: Path) -> pl.DataFrame:
    table = open_table(predictions_uri(str(store), "orders"))
    assert table is not None
    return pl.from_arrow(read_group(data_files(table))).sort("id")


@dataclasses.dataclass(frozen=True)
class House:
    definition: str
    store: Path

    def run(self, *flags: str) -> int:
        arguments = ["--definition", self.definition, "--store", str(self.store), *flags]
        return guard(inference.main)(arguments)

    @property
    def registry(self) -> Registry:
        return Registry(registry_uri(str(self.store)))

    def account(self, run_id: str) -> dict[str, object]:
        return figures_of(self.store, run_id)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> House:
    """Features of six days, and a registered champion.  Copied, not changed."""
    root = tmp_path_factory.mktemp("built")
    definition = root / "definition.py"
    definition.write_text(DEFINITION)
    store = root / "store"
    write_sources(store)
    assert guard(features.main)(["--definition", str(definition), "--store", str(store), "--run_id", "features"]) == 0
    house = House(str(definition), store)
    assert house.registry.register(train(str(definition), store), "run-1") == "1"
    house.registry.promote("orders", "1", "a test")
    return house


@pytest.fixture
def house(built: House, tmp_path: Path) -> House:
    """The built store with tables of its own; the registry, which nobody changes, is shared."""
    shutil.copytree(built.store / "features", tmp_path / "store" / "features")
    os.symlink(built.store / "registry", tmp_path / "store" / "registry")
    shutil.copy(built.definition, tmp_path / "definition.py")
    return House(str(tmp_path / "definition.py"), tmp_path / "store")


def test_the_champion_scores_every_row_once(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.run("--run_id", "one") == 0
    _, folder = house.registry.resolve("orders")
    expected = predict(open_scorer(PinnedModel(folder, "1")), feature_rows(house.definition, house.store))
    found = predictions(house.store)
    assert found.equals(pl.from_arrow(expected).sort("id").select(found.columns))
    assert found["prediction_id"].n_unique() == len(found) == 400 * DAYS
    account = house.account("one")
    printed = ("rows_in", "rows_out", "set_aside", "model", "model_version", "dates", "commit_version")
    assert [account[name] for name in printed] == [2400, 2400, 0, "orders", "1", DAYS, 0]
    assert "rows out" in capsys.readouterr().out


def test_an_interval_replaces_exactly_its_dates(house: House) -> None:
    assert house.run("--run_id", "all") == 0
    before = predictions(house.store)
    assert house.run("--start", "2024-01-02", "--end", "2024-01-04", "--run_id", "some") == 0
    assert predictions(house.store).equals(before)
    table = open_table(predictions_uri(str(house.store), "orders"))
    assert table is not None
    names = {str(file.date): Path(file.origin or file.path).name.split("-")[0] for file in data_files(table)}
    assert names == {f"2024-01-0{d}": "some" if d in (2, 3) else "all" for d in range(1, DAYS + 1)}
    assert (
        house.account("some")["rows_out"]
        == before.filter(pl.col("date").is_between(date(2024, 1, 2), date(2024, 1, 3))).height
    )


def test_the_same_run_again_commits_nothing_twice(house: House) -> None:
    assert house.run("--run_id", "one") == 0
    before = predictions(house.store)
    assert house.run("--run_id", "one") == 0
    assert house.account("one")["commit_version"] == 0
    assert predictions(house.store).equals(before)


def test_a_named_version_is_used_and_signed(house: House, tmp_path: Path) -> None:
    (house.store / "registry").unlink()
    assert house.registry.register(train(house.definition, house.store, 0), "a") == "1"
    assert house.registry.register(train(house.definition, house.store, 3), "b") == "2"
    house.registry.promote("orders", "1", "first")
    assert house.run() == 0
    first = predictions(house.store)
    assert house.run("--model_version", "2") == 0
    second = predictions(house.store)
    assert (first["model_version"].unique().to_list(), second["model_version"].unique().to_list()) == (["1"], ["2"])
    assert (first["score"] != second["score"]).all()
    assert first["prediction_id"].equals(second["prediction_id"])


def test_tfrecords_in_and_out_give_the_same_scores(house: House) -> None:
    assert house.run() == 0
    table = predictions(house.store)
    assert house.run("--output_tfrecord", str(house.store / "out" / "scores"), "--run_id", "out") == 0
    paths = matching_files(str(house.store / "out" / "scores-*-of-*.tfrecord.gz"))
    assert [Path(path).name for path in paths] == ["scores-00000-of-00001.tfrecord.gz"]
    assert os.listdir(house.store / "out") == ["scores-00000-of-00001.tfrecord.gz"]
    schema = pa.schema([(name, table.to_arrow().schema.field(name).type) for name in table.columns])
    schema = pa.schema([pa.field(f.name, pa.string() if pa.types.is_large_string(f.type) else f.type) for f in schema])
    (batch,) = read_examples(paths[0], schema)
    assert pl.from_arrow(batch).sort("id").equals(table)
    assert house.account("out")["rows_out"] == len(table)

    # Examples as training writes them, cut into two files.
    model = load_definition(house.definition).require_model()
    rows = pl.from_arrow(feature_rows(house.definition, house.store))
    rows = rows.with_columns(pl.lit(1.0, pl.Float32).alias(LABEL), pl.col("asked_at").alias(LABEL_TIME))
    examples = pa.table(
        [rows[name].to_arrow().cast(schema_of(model).field(name).type) for name in schema_of(model).names],
        schema=schema_of(model),
    )
    for i, (start, length) in enumerate([(0, 1000), (1000, 1400)]):
        (part,) = examples.slice(start, length).combine_chunks().to_batches()
        (house.store / f"test-{i}.tfrecord.gz").write_bytes(b"".join(gzipped(part)))
    shutil.rmtree(house.store / "predictions")
    assert house.run("--input_tfrecord", str(house.store / "test-*.tfrecord.gz"), "--run_id", "in") == 0
    assert predictions(house.store).equals(table)
    account = house.account("in")
    assert (account["rows_in"], account["rows_out"], account["dates"]) == (2400, 2400, DAYS)


def test_examples_without_row_id_and_date_get_theirs(house: House) -> None:
    assert house.run() == 0
    table = predictions(house.store)
    whole = pa.Table.from_batches([feature_rows(house.definition, house.store)])
    (bare,) = whole.drop(["row_id", "date"]).combine_chunks().to_batches()
    (house.store / "bare.tfrecord.gz").write_bytes(b"".join(gzipped(bare)))
    shutil.rmtree(house.store / "predictions")
    assert house.run("--input_tfrecord", str(house.store / "bare.tfrecord.gz")) == 0
    assert predictions(house.store).equals(table)
    (keyless,) = whole.drop(["id"]).combine_chunks().to_batches()
    (house.store / "keyless.tfrecord.gz").write_bytes(b"".join(gzipped(keyless)))
    assert house.run("--input_tfrecord", str(house.store / "keyless.tfrecord.gz")) == 3


def refused(house: House, capsys: pytest.CaptureFixture[str], code: int, *flags: str) -> str:
    """The one message of a run that ends with `code` and leaves no predictions."""
    capsys.readouterr()
    assert house.run(*flags) == code
    assert open_table(predictions_uri(str(house.store), "orders")) is None
    captured = capsys.readouterr().err
    assert "Traceback" not in captured
    (line,) = [line for line in captured.splitlines() if line.startswith("millrace: ")]
    return line


def test_another_definition_is_refused_with_both_fingerprints(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    trained = load_definition(house.definition).view.fingerprint
    Path(house.definition).write_text(DEFINITION.replace('"6h"', '"5h"'))
    now = load_definition(house.definition).view.fingerprint
    for file in (house.store / "features").rglob("*.parquet"):
        file.unlink()  # nothing is read
    line = refused(house, capsys, 5)
    assert trained in line
    assert now in line
    assert "millrace training --definition" in line


def test_a_feature_table_of_another_shape_is_refused(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    view = load_definition(house.definition).view
    log = next((house.store / "features" / "orders" / view.fingerprint / "_delta_log").glob("*.json"))
    text = log.read_text()
    assert r"{\"name\":\"hour\",\"type\":\"long\"" in text
    log.write_text(text.replace(r"{\"name\":\"hour\",\"type\":\"long\"", r"{\"name\":\"hour\",\"type\":\"double\""))
    line = refused(house, capsys, 5)
    assert "hour is double instead of long" in line


def test_missing_things_name_the_command_to_run(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    interval = ("--start", "2024-03-01", "--end", "2024-03-02")
    line = refused(house, capsys, 3, *interval)
    assert "2024-01-01 to 2024-01-06" in line
    assert (
        f"millrace features --definition {house.definition} --store {house.store} --start 2024-03-01 --end 2024-03-02"
        in line
    )
    assert "Registered: 1" in refused(house, capsys, 4, "--model_version", "9")
    assert "matches some" in refused(house, capsys, 4, "--input_tfrecord", str(house.store / "no-*.gz"))
    assert "Leave them out" in refused(house, capsys, 2, "--input_tfrecord", "x", "--start", "2024-01-01")
    view = house.store / "features" / "orders"
    (table,) = view.iterdir()
    table.rename(view / "0123456789abcdef")  # computed by another definition
    line = refused(house, capsys, 5)
    assert "0123456789abcdef in" in line
    assert table.name in line
    shutil.rmtree(house.store / "features")
    assert f"millrace features --definition {house.definition}" in refused(house, capsys, 4)
    (house.store / "registry").unlink()
    assert f"millrace training --definition {house.definition} --store {house.store}" in refused(house, capsys, 4)


def test_a_model_altered_on_disk_scores_nothing(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    _, folder = house.registry.resolve("orders")
    path = Path(folder) / BOOSTER
    before = path.read_bytes()
    try:
        path.write_bytes(before[:-1] + b"]")
        assert "SHA-256" in refused(house, capsys, 4)
    finally:
        path.write_bytes(before)


def test_a_feature_file_that_changed_publishes_nothing(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows vanish from a file between its commit and the run: the account does not balance."""
    path = next((house.store / "features").rglob("*.parquet"))
    rows = pq.read_table(path)
    pq.write_table(rows.slice(1), path)
    line = refused(house, capsys, 3)
    assert f"2400 rows listed, {2399} read, {2399} predictions" in line


def test_a_cut_tfrecord_is_refused(house: House, capsys: pytest.CaptureFixture[str]) -> None:
    content = b"".join(gzipped(feature_rows(house.definition, house.store)))
    path = house.store / "cut.tfrecord.gz"
    path.write_bytes(content[: len(content) // 2])
    assert "TFRecord file is whole" in refused(house, capsys, 4, "--input_tfrecord", str(path))
    path.write_bytes(b"")
    assert "There are rows to score" in refused(house, capsys, 3, "--input_tfrecord", str(path))


def test_the_graph_is_small_and_shuffles_no_rows(house: House) -> None:
    options = inference.parse(["--definition", house.definition, "--store", str(house.store)])
    with Pipeline() as pipeline:
        inference.build(pipeline, options, inference.plan_inference(options))
        names = {part.full_label for part in pipeline._root_transform().parts}
    assert names >= {"Features", "Score", "Write", "Conserve", "Publish"}
    assert len(names) <= 7
    grouping = Grouping()
    pipeline.visit(grouping)
    assert sorted(label.split("/")[0] for label in grouping.labels) == ["Read", "Write"]  # counts, and names of files


class Grouping(PipelineVisitor):
    """Collects the labels of all GroupByKey steps."""

    def __init__(self) -> None:
        self.labels: list[str] = []

    def visit_transform(self, node: AppliedPTransform) -> None:
        if isinstance(node.transform, beam.GroupByKey):
            self.labels.append(node.full_label)
