"""`millrace features` for several views in one run, against a run for each view."""

from __future__ import annotations

import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.support.project_case import Project


def spoil(store: Path) -> None:
    """Rows that break a contract: of visits for both views, of sales for the view that reads them; small row groups."""
    for source, column, rows in (("visits", "age", [3, 500]), ("sales", "amount", [7])):
        path = store / "sources" / source / "part.parquet"
        frame = pl.read_parquet(path)
        bad = pl.int_range(len(frame)).is_in(rows)
        value = pl.when(bad).then(float("inf")).otherwise(column).cast(frame.schema[column])
        frame.with_columns(value.alias(column)).write_parquet(path, use_pyarrow=True, row_group_size=50)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project]:
    """The same sources twice: views computed together, and one after the other."""
    together = Project(tmp_path_factory.mktemp("together") / "store", rows=700)
    spoil(together.store)
    apart = Project(tmp_path_factory.mktemp("apart") / "store", rows=700)
    shutil.rmtree(apart.store / "sources")
    shutil.copytree(together.store / "sources", apart.store / "sources")
    assert together.run("features", "--run_id", "f", "--block_rows", "200") == 0
    for view in ("buying", "crowd"):
        assert apart.run("features", "--view", view, "--run_id", view, "--block_rows", "200") == 0
    return together, apart


@pytest.mark.parametrize("view", ["buying", "crowd"])
def test_one_run_for_all_views_gives_what_a_run_for_each_gives(stores: tuple[Project, Project], view: str) -> None:
    together, apart = stores
    assert together.rows(f"features/{view}").equals(apart.rows(f"features/{view}"))
    one, other = together.figures("f")["views"][view], apart.figures(view)
    same = ("sources", "rows_in", "rows_out", "set_aside", "dates", "first", "last", "fingerprint")
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert one["set_aside"] == (3 if view == "buying" else 2)
    assert one["computed_with"] == [{"buying": "crowd", "crowd": "buying"}[view]]
    assert "0 differing" in one["verified"]


def test_dead_letters_are_those_of_each_view(stores: tuple[Project, Project]) -> None:
    letters = []
    for project in stores:
        root = str(project.store)
        paths = sorted((project.store / "dead_letters" / "features").glob("**/*.parquet"))
        parts = [
            pl.read_parquet(path, columns=["source", "row", "field", "rule", "value"]).with_columns(
                view=pl.lit(next(each for each in path.parts if each.startswith("view=")))
            )
            for path in paths
        ]
        letters.append(pl.concat(parts).sort("view", "source", "row").filter(pl.lit(bool(root))))
    assert letters[0].equals(letters[1])
    assert len(letters[0]) == 5


def test_each_source_is_read_once_for_all_views(stores: tuple[Project, Project]) -> None:
    together, apart = stores
    views = together.figures("f")["views"]
    read = {
        name: views["buying"]["rows_read"].get(name, 0) + views["crowd"]["rows_read"].get(name, 0)
        for name in ("visits", "sales")
    }
    alone = {view: apart.figures(view)["rows_read"] for view in ("buying", "crowd")}
    assert read["visits"] <= alone["crowd"]["visits"]
    # Blocks hold the rows of all views, so there are more of them, and windows of neighbouring blocks overlap.
    assert sum(read.values()) < 0.75 * sum(sum(each.values()) for each in alone.values())


def test_a_new_day_is_computed_for_all_views_in_one_run(stores: tuple[Project, Project], tmp_path: Path) -> None:
    together, _ = stores
    store = Path(shutil.copytree(together.store, tmp_path / "store"))
    path = store / "sources" / "visits" / "part.parquet"
    frame = pl.read_parquet(path)
    more = frame.tail(5).with_columns(pl.col("asked").dt.offset_by("1d"), pl.col("visit") + 10_000)
    more.write_parquet(store / "sources" / "visits" / "more.parquet")
    at = ["--definition", str(store / "definition.py"), "--store", str(store)]
    from beam_pipelines.cli import main

    assert main(["features", *at, "--run_id", "g"]) == 0
    project = object.__new__(Project)
    project.store, project.definition = store, store / "definition.py"
    figures = project.figures("g")["views"]
    days = len(set(frame.tail(5)["asked"].dt.offset_by("1d").dt.date()) - set(frame["asked"].dt.date()))
    assert {each["computed_with"][0] for each in figures.values()} == {"buying", "crowd"}
    assert all(days <= each["dates"] <= 4 for each in figures.values())
    assert len(project.rows("features/buying")) == len(project.rows("features/crowd")) == 700 - 2 + 5
    assert main(["verify", *at, "--rows", "all", "--run_id", "v"]) == 0
