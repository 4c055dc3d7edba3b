"""The project in `examples/meals`: three views and four models over two sources, through the batch pipelines."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.cli import main
from examples.meals import data
from schemas import load_project
from transforms.storage.delta_tables import data_files, open_table, read_group

DEFINITION = ("--definition", "examples.meals")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of all views in one run, all models trained, all scored."""
    root = tmp_path_factory.mktemp("meals") / "store"
    data.write(root)
    at = (*DEFINITION, "--store", str(root))
    assert main(["features", *at, "--run_id", "f"]) == 0
    assert main(["training", *at, "--run_id", "t", "--threads=1"]) == 0
    assert main(["inference", *at, "--run_id", "i"]) == 0
    return root


def figures(store: Path, run: str) -> dict[str, object]:
    return json.loads((store / "runs" / run / "run.json").read_text())  # type: ignore[no-any-return]


def test_its_own_tests_pass(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["test", *DEFINITION]) == 0
    assert capfd.readouterr().out.endswith("3 of 3 passed\n")


def test_it_is_one_project_of_three_views_and_four_models() -> None:
    project = load_project("examples.meals")
    assert set(project.views) == {"basket", "courier", "habits"}
    assert set(project.models) == {"slow_delivery", "slow_courier", "minutes", "tip"}
    assert set(project.sources) == {"orders", "deliveries"}
    assert list(project.modules) == [
        f"examples/{name}.py" for name in ("__init__", "meals/models", "meals/sources", "meals/views")
    ]


def test_all_views_are_computed_in_one_pass(store: Path) -> None:
    views = figures(store, "f")["views"]
    assert isinstance(views, dict)
    assert {name: set(each["computed_with"]) for name, each in views.items()} == {
        name: {"basket", "courier", "habits"} - {name} for name in ("basket", "courier", "habits")
    }
    read = {name: sum(each["rows_read"].get(name, 0) for each in views.values()) for name in ("orders", "deliveries")}
    assert read == {"orders": data.ORDERS, "deliveries": data.ORDERS}, "each row once, in one block"


def test_every_model_learns_and_scores(store: Path) -> None:
    assert float(str(figures(store, "t-slow_delivery")["auc"])) > 0.7
    assert float(str(figures(store, "t-slow_courier")["auc"])) > 0.6
    predicted = {}
    for name in ("slow_delivery", "slow_courier", "minutes", "tip"):
        run = figures(store, f"i-{name}")
        assert run["rows_in"] == run["rows_out"] == data.ORDERS
        table = open_table(str(store / "predictions" / name))
        assert table is not None
        predicted[name] = pl.DataFrame(pl.from_arrow(read_group(data_files(table)))).sort("order_id")
    made = data.frames()["deliveries"].sort("order_id")
    error = (predicted["minutes"]["score"] - made["minutes"]).abs().mean()
    usual = (made["minutes"] - made["minutes"].mean()).abs().mean()
    assert error < usual  # type: ignore[operator]
    assert predicted["tip"]["fingerprint"].str.split(",").list.len().unique().to_list() == [2]


def test_a_second_run_has_nothing_to_do(store: Path) -> None:
    assert main(["features", *DEFINITION, "--store", str(store), "--run_id", "again"]) == 0
    assert figures(store, "again")["rows_in"] == 0
