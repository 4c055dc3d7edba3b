"""A project over the shop's sources: two views, and three models of which one reads both views."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from tests.support import shop
from transforms.storage.delta_tables import data_files, open_table, read_group

VIEWS = """
import polars as pl
from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, Trailing, encoders

visits = Source("visits", time="asked", columns={"visit": pl.Int64, "shop": pl.String, "age": pl.Float32})
sales = Source("sales", time="sold", columns={"visit": pl.Int64, "shop": pl.String, "amount": pl.Float64},
               unique="visit", order="visit")
buying = FeatureView("buying", visits, key="visit", features=[
    Derived(age=pl.col("age"), hour=pl.col("asked").dt.hour()),
    Trailing(sales, by="shop", over="3d", stats={"amount": ("mean", "count")}),
])
crowd = FeatureView("crowd", visits, key="visit", features=[
    Derived(hour=pl.col("asked").dt.hour() + 1),
    Trailing(visits, by="shop", over=("1d", "2d"), stats={"*": "count"}),
])
"""
MODELS = """
bought = Label(sales, on="visit", value=pl.col("amount") > 0, within="1d", absent=0)
split = TimeSplit("12d", "12d", embargo="1d")
small = dict(params={"max_depth": 3, "eta": 0.3}, rounds=4)
will_buy = Model(buying, bought, split, encode={"shop": encoders.OneHot()}, **small)
by_hour = Model(buying, bought, split, name="by_hour", features=["hour", "sales_*"], **small)
both = Model([buying, crowd], bought, split, name="both", features=["buying.*", "crowd.visits_by_*"], **small)
"""


class Project:
    """A store with the project's definition and sources, on which commands are run."""

    def __init__(self, store: Path, rows: int = 1200) -> None:
        self.store = store
        self.definition = shop.write(store, rows, VIEWS + MODELS)

    def run(self, command: str, *words: str) -> int:
        """Run a command on the project; its exit code."""
        from beam_pipelines.cli import main

        at = ["--definition", str(self.definition), "--store", str(self.store)]
        return main([*command.split(), *at, *words])

    def figures(self, run_id: str) -> dict[str, Any]:
        """`run.json` of a run."""
        return json.loads((self.store / "runs" / run_id / "run.json").read_text())  # type: ignore[no-any-return]

    def rows(self, table: str) -> pl.DataFrame:
        """All rows of a table, named by its path below the store but for the fingerprint."""
        (folder,) = (each.parent for each in (self.store / table).glob("**/_delta_log"))
        found = open_table(str(folder))
        assert found is not None
        return pl.DataFrame(pl.from_arrow(read_group(data_files(found)))).sort("visit")
