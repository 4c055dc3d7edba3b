"""A project of two views and three models through features, training and inference, and its traces."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest

from tests.support.project_case import MODELS, VIEWS, Project
from transforms.models.bundle import load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, score
from transforms.records.record_batches import batch
from transforms.records.row_hashing import row_ids


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Features of both views, those of `crowd` for fewer days; all three models trained; then scored."""
    made = Project(tmp_path_factory.mktemp("project") / "store")
    assert made.run("features", "--view", "buying", "--run_id", "f1") == 0
    assert made.run("features", "--view", "crowd", "--end", "2024-02-24", "--run_id", "f2") == 0
    assert made.run("training", "--run_id", "t", "--threads=1", "--cutoff", "2024-03-01") == 0
    assert made.run("inference", "--run_id", "i") == 0
    return made


def test_a_second_model_computes_no_rows(project: Project) -> None:
    table = project.store / "features" / "buying"
    before = {path: path.stat().st_mtime_ns for path in table.rglob("*") if path.is_file()}
    assert project.run("features", "--view", "buying", "--run_id", "f3") == 0
    assert project.figures("f3")["nothing_to_do"]
    assert project.figures("f3")["rows_in"] == 0
    for name in ("buying", "by_hour"):
        record = project.figures(f"t-{name}")
        manifest = load_bundle(folder_of(project, name)).manifest
        assert (record["model"], record["rows_in"]) == (name, 1200)
        assert manifest["feature_table"]["version"] == 0
    assert {path: path.stat().st_mtime_ns for path in table.rglob("*") if path.is_file()} == before
    line = next(line for line in MODELS.splitlines() if line.startswith("by_hour"))
    assert len(line) < 120, "one line of definition"


def folder_of(project: Project, model: str) -> str:
    return Registry(registry_uri(str(project.store))).resolve(model, "1")[1]


def test_a_model_reads_what_it_chose(project: Project) -> None:
    assert list(load_bundle(folder_of(project, "by_hour")).encoders.inputs) == [
        "hour",
        "sales_by_shop_amount_mean_3d",
        "sales_by_shop_amount_count_3d",
    ]
    assert list(load_bundle(folder_of(project, "buying")).encoders.inputs)[-1] == "shop"


def test_rows_are_joined_or_missing_in_a_view(project: Project) -> None:
    buying, crowd = project.rows("features/buying"), project.rows("features/crowd")
    missing = len(buying.join(crowd, on=["visit", "asked"], how="anti"))
    assert 0 < missing == len(buying) - len(crowd)
    for run in ("t-both", "i-both"):
        figures = project.figures(run)
        assert figures["rows_in"] == 1200
        assert (figures["missing_in_buying"], figures["missing_in_crowd"]) == (0, missing)
    assert project.figures("i-both")["rows_out"] == 1200 - missing == len(project.rows("predictions/both"))
    splits = json.loads((project.store / "runs/t-both/training.json").read_text())
    assert splits["feature_rows"] == splits["outside"] + sum(each["rows"] for each in splits["splits"].values())
    assert splits["feature_rows"] + sum(splits["missing"].values()) == 1200
    report = (project.store / "runs/t-both/report.html").read_text()
    assert re.search(rf"\b{missing}\b[^.]{{0,20}} further rows are missing in crowd", report)


def test_predictions_are_those_of_the_joined_rows(project: Project) -> None:
    """Joined here by plain Polars, and scored by the registered booster."""
    buying, crowd = project.rows("features/buying"), project.rows("features/crowd")
    counts = [name for name in crowd.columns if name.startswith("visits_by")]
    joined = buying.join(crowd.select("visit", "asked", *counts), on=["visit", "asked"]).sort("visit")
    scorer = open_scorer(PinnedModel(folder_of(project, "both")), 1)
    assert list(scorer.bundle.encoders.inputs) == ["age", "hour", *buying.columns[-4:-2], *counts]
    expected = score(scorer, batch(joined.to_arrow(), joined.to_arrow().schema))
    found = project.rows("predictions/both")
    assert found["visit"].to_list() == joined["visit"].to_list()
    assert found["score"].to_numpy().tobytes() == expected.tobytes()
    assert found["row_id"].to_list() == row_ids("buying", [found["visit"], found["asked"]]).to_list()
    assert found["row_id"].to_list() == joined["row_id"].to_list()
    assert found["fingerprint"].unique().to_list() == [scorer.bundle.fingerprint]


def test_a_model_names_the_tables_of_all_its_views(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    bundle = load_bundle(folder_of(project, "both"))
    views = bundle.manifest["views"]
    assert [(each["view"], each["version"]) for each in views] == [("buying", 0), ("crowd", 0)]
    assert bundle.fingerprint == ",".join(each["fingerprint"] for each in views)
    prediction = project.rows("predictions/both").row(5, named=True)
    capfd.readouterr()
    assert project.run("trace", "--prediction", str(prediction["prediction_id"])) == 0
    text = capfd.readouterr().out
    for each in views:
        assert text.count(f"features/{each['view']}/{each['fingerprint']} version 0") == 2
    assert text.count("the row that was scored\n") == 2
    assert "visits_by_shop_count_1d" in text
    assert project.run("vacuum", "--dry_run") == 2  # it has no --definition
    from beam_pipelines.cli import main

    assert main(["vacuum", "--store", str(project.store), "--dry_run"]) == 0
    kept = " ".join(capfd.readouterr().out.split()).split("kept: ")[1:]
    assert ["both 1" in line for line in kept if "features/crowd" in line] == [True]


def test_a_version_of_several_views_trains_again_to_the_same_bits(project: Project) -> None:
    from beam_pipelines.cli import main

    assert main(["retrain", "1", "--model", "both", "--store", str(project.store), "--run_id", "again"]) == 0
    assert project.figures("again")["same_model"]


def test_a_changed_view_is_refused_by_every_model_that_reads_it(
    project: Project, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    changed = tmp_path / "definition.py"
    changed.write_text((VIEWS + MODELS).replace('over=("1d", "2d")', 'over=("1d", "3d")'))
    at = ["--definition", str(changed), "--store", str(project.store)]
    from beam_pipelines.cli import main

    assert main(["inference", *at, "--model", "by_hour", "--run_id", "c1"]) == 0
    capfd.readouterr()
    assert main(["inference", *at, "--model", "both", "--run_id", "c2"]) == 5
    found, crowd = load_bundle(folder_of(project, "both")).manifest["views"], capfd.readouterr().err
    assert f"was trained on buying/{found[0]['fingerprint']} and crowd/{found[1]['fingerprint']}" in crowd
    assert f"the definition describes buying/{found[0]['fingerprint']} and crowd/" in crowd


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("trace --key visit=3", "must be chosen; there are buying, crowd. Choose one with --view"),
        ("parity", "must be chosen; there are buying, crowd. Choose one with --view"),
        (
            "features --view crowds",
            "--view must be one of the views buying, crowd of {definition}; it is crowds. Did you mean 'crowd'?",
        ),
        (
            "training --model boths",
            "--model must be one of the models buying, by_hour, both of {definition}; it is boths. Did you mean",
        ),
        ("inference --model_version 1", "--model_version needs one model; there are buying, by_hour, both"),
        (
            "training --model both --features_version 0",
            "--features_version must name its view, because the model reads several; there are buying, crowd",
        ),
        (
            "training --model by_hour --features_version crowd=0",
            "views that model 'by_hour' reads, that is buying; it names 'crowd'",
        ),
        ("features --schema x.pbtxt", "--schema needs one view; there are buying, crowd"),
        ("schema check --schema x.pbtxt", "--schema needs one view; there are buying, crowd"),
        ("training --view crowd --model by_hour", "that model 'by_hour' reads, that is buying; it is crowd"),
    ],
)
def test_a_command_says_what_there_is_to_choose(
    project: Project, capfd: pytest.CaptureFixture[str], words: str, message: str
) -> None:
    command, *more = words.split()
    if command == "schema":
        command, *more = f"schema {more[0]}", *more[1:]
    assert project.run(command, *more) == 2
    assert message.format(definition=project.definition) in capfd.readouterr().err


def test_commands_work_on_every_view_or_model(project: Project, capfd: pytest.CaptureFixture[str]) -> None:
    for command in ("plan", "verify", "schema check"):
        capfd.readouterr()
        assert project.run(command) == (2 if command == "schema check" else 0)
        out = capfd.readouterr()
        assert "buying" in out.out + out.err
        assert command == "schema check" or "crowd" in out.out
    assert pl.Series([path.name for path in (project.store / "predictions").iterdir()]).sort().to_list() == [
        "both",
        "buying",
        "by_hour",
    ]
