"""One program, any runner: the options choose it, and the feature rows stay the same.  docs/runners.md describes
this."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import apache_beam as beam
import polars as pl
import pytest
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines import features, inference, training
from beam_pipelines import features_streaming as streaming
from beam_pipelines.runtime import addresses
from beam_pipelines.runtime.errors import guard
from tests.support import shop
from tests.support.live_fixtures import Live
from tests.support.tables import figures_of, rows_of
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import features_uri, predictions_uri
from transforms.streaming.preparation import LiveFeaturesPlan, output_topics
from transforms.streaming.recovery import RecoveryPoint

ROOT = Path(__file__).parents[2]
DATAFLOW = (
    "--runner=DataflowRunner",
    "--project=my-project",
    "--region=europe-west4",
    "--temp_location=gs://bucket/tmp",
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the sources of a small case."""
    folder = tmp_path_factory.mktemp("runners")
    shop.write(folder)
    return folder


def flags(store: Path, run_id: str, *more: str) -> list[str]:
    return ["--definition", str(store / "definition.py"), "--store", str(store), "--run_id", run_id, *more]


def frame(uri: str, key: str) -> pl.DataFrame:
    """All rows of a Delta table, in the order of their key."""
    return rows_of(uri).sort(key)


def feature_table(store: Path) -> pl.DataFrame:
    view = features.parse(flags(store, "x")).definition.view
    return frame(features_uri(str(store), view.name, view.fingerprint), "row_id")


def test_dataflow_takes_the_batch_graph_without_credentials(store: Path) -> None:
    options = features.parse(flags(store, "dataflow", *DATAFLOW, "--dry_run=True"))
    pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
    features.build(pipeline, options, features.prepare(options))
    proto = pipeline.run().job.proto_pipeline
    steps = {transform.unique_name for transform in proto.components.transforms.values()}
    assert {"Features", "Write", "Conserve", "Commit", "DeadLetters", "Account"} <= steps
    images = [environment.payload.decode(errors="replace") for environment in proto.components.environments.values()]
    assert len(images) == 1
    assert "beam_python3.11_sdk:2.72.0" in images[0]


def test_a_dry_run_reports_it_and_leaves_nothing(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert guard(features.main)(flags(store, "dry", *DATAFLOW, "--dry_run=True")) == 0
    assert re.search(r"translated \d+ steps; a dry run submits nothing", capsys.readouterr().out)
    assert (
        open_table(features_uri(str(store), "buying", features.parse(flags(store, "x")).definition.view.fingerprint))
        is None
    )


def test_no_pipeline_has_code_for_one_runner() -> None:
    named = re.compile(r"DirectRunner|FnApi|Prism|Portable|Flink|Dataflow|isinstance\([^)]*runner", re.IGNORECASE)
    found = []
    for path in [*(ROOT / "beam_pipelines").rglob("*.py"), *(ROOT / "transforms").rglob("*.py")]:
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.If | ast.IfExp | ast.Match)
                and named.search(ast.unparse(getattr(node, "test", node)))
                and path.name != "local_runner.py"
            ):  # which only makes the default explicit
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node).splitlines()[0]}")
    assert not found, "\n".join(found)


def test_the_java_side_is_of_the_same_beam() -> None:
    lock, pom = (ROOT / "constraints.txt").read_text(), (ROOT / "deploy/streaming/pom.xml").read_text()
    ours, theirs = (
        re.search(r"^apache-beam==(.+)$", lock, re.MULTILINE),
        re.search("<beam.version>(.+)</beam.version>", pom),
    )
    assert ours
    assert theirs
    assert ours[1] == theirs[1]


def commands() -> list[list[str]]:
    """The `millrace` commands of docs/runners.md, word by word."""
    page = (ROOT / "docs/runners.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```sh\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks if block.startswith("millrace ")]


@pytest.mark.parametrize(
    "command", commands(), ids=lambda words: " ".join(w for w in words if w.startswith("--runner"))
)
def test_the_commands_of_the_page_are_understood(monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    # The bucket of the page does not exist, and a test must not ask anyone for it.
    monkeypatch.setattr(addresses, "_require_response", lambda flag, address: None)
    program, pipeline, *argv = command
    assert (program, pipeline) == ("millrace", "features")
    options = features.parse(argv)
    known = PipelineOptions(list(options.beam_args)).get_all_options()
    flink = {"checkpointing_interval", "state_backend", "state_backend_storage_path"}  # the job server knows these
    for flag in options.beam_args:
        name, value = flag.removeprefix("--").split("=", 1)
        assert name in flink or str(known[name]) == value or value in known[name], flag


@pytest.fixture(scope="module")
def reference(store: Path) -> pl.DataFrame:
    """What the runner in this process computes."""
    assert features.main(flags(store, "direct")) == 0
    return feature_table(store)


@pytest.mark.live
def test_dataflow_takes_the_live_graph_without_credentials(live: Live, store: Path) -> None:
    kafka = [
        "--streaming",
        "--source=kafka",
        f"--bootstrap={live.broker.bootstrap}",
        f"--expansion_service={live.expansion.address}",
    ]
    options, job = streaming.parse(flags(store, "dataflow-live", *kafka, *DATAFLOW, "--dry_run=True"))
    pipeline = beam.Pipeline(options=PipelineOptions(["--streaming", *options.beam_args]))
    start = RecoveryPoint(0, {}, {}, {}, {})
    streaming.build(pipeline, options, LiveFeaturesPlan(job, start, "group", sends=output_topics(job)))
    proto = pipeline.run().job.proto_pipeline
    assert {environment.urn for environment in proto.components.environments.values()} == {"beam:env:docker:v1"}
    images = [environment.payload.decode(errors="replace") for environment in proto.components.environments.values()]
    assert sorted("python" if "beam_python3.11_sdk" in image else "java" for image in images) == ["java", "python"]


@pytest.mark.live
@pytest.mark.timeout(240)
@pytest.mark.parametrize("environment", ["LOOPBACK", "EXTERNAL"])
def test_prism_computes_the_same_features_to_the_bit(
    live: Live, store: Path, reference: pl.DataFrame, environment: str
) -> None:
    assert features.main(flags(store, environment, "--full", *live.options(environment))) == 0
    found = feature_table(store)
    assert found.height == reference.height == 3000
    assert found.equals(reference.select(found.columns))
    account = figures_of(store, environment)
    assert account["rows_out"] == 3000


@pytest.mark.live
@pytest.mark.timeout(240)
def test_a_worker_pool_trains_and_scores(live: Live, store: Path, reference: pl.DataFrame) -> None:
    pool = live.options("EXTERNAL")
    assert training.main(flags(store, "train", "--threads=1", *pool)) == 0
    assert inference.main(flags(store, "score", *pool)) == 0
    there = frame(predictions_uri(str(store), "buying"), "row_id")
    assert inference.main(flags(store, "again")) == 0
    here = frame(predictions_uri(str(store), "buying"), "row_id")
    assert there.height == reference.height
    assert there.select("row_id", "score").equals(here.select("row_id", "score"))
