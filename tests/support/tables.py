"""What a run leaves behind: the rows of its tables, and the figures of its `run.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from transforms.storage.delta_tables import data_files, open_table, read_file


def rows_of(uri: str, columns: list[str] | None = None) -> pl.DataFrame:
    """All rows of the table at `uri`, null in columns that their file does not have; no rows if it has no files."""
    table = open_table(uri)
    assert table is not None, f"no table at {uri}"
    empty = pl.DataFrame(schema=[field.name for field in table.schema().fields if not columns or field.name in columns])
    parts = [pl.DataFrame(pl.from_arrow(read_file(file, columns))) for file in data_files(table)]
    return pl.concat(parts or [empty], how="diagonal")


def figures_of(store: Path, run_id: str) -> dict[str, Any]:
    """The `run.json` of a run."""
    return dict(json.loads((store / "runs" / run_id / "run.json").read_text()))
