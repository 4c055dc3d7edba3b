"""Helpers and fixtures for: the features pipeline by its `main(argv)`, on real files."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
from polars.testing import assert_frame_equal

from beam_pipelines.features import main
from schemas.loading import load_definition
from tests.support import market
from tests.support.tables import figures_of
from transforms.storage.paths import dead_letters_uri, features_uri


def run(store: Path, *flags: str, run_id: str | None = None) -> dict[str, Any]:
    """One run, without statistics unless `flags` ask for them; its `run.json`."""
    path = market.define(store) if not (store / "definition.py").exists() else store / "definition.py"
    name = run_id or f"run-{len(list(store.glob('runs/*')))}"
    assert main(["--definition", str(path), "--store", str(store), "--run_id", name, "--no-statistics", *flags]) == 0
    return figures_of(store, name)


def table_of(store: Path) -> str:
    view = load_definition(str(store / "definition.py")).view
    return features_uri(str(store), view.name, view.fingerprint)


def feature_rows(store: Path, version: int | None = None) -> pl.DataFrame:
    return pl.read_delta(table_of(store), version=version).sort("asked", "visit")


def dead_letters(store: Path) -> pl.DataFrame:
    return pl.read_delta(dead_letters_uri(str(store), "features")).sort("source", "file", "row")


def same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    assert_frame_equal(a, b, check_exact=True, check_column_order=False)


def days() -> list[date]:
    return [market.at(i).date() for i in range(market.DAYS + 1)]
