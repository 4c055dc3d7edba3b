"""Features of a few rows in memory, for tests of a definition."""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from schemas.errors import ContractError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.block_inputs import dimension_rows, distinct_by_key
from transforms.features.kernel import KernelTables, compute
from transforms.records.value_text import format_value
from transforms.sources.contracts import Contract, check_rows
from transforms.sources.reader import without_repeats


def features_of_rows(view: FeatureView, tables: Mapping[str, pl.DataFrame]) -> pl.DataFrame:
    """The view's context columns and features, one row for each row of the spine, in its order.

    Rows are checked, repeats are dropped, and features are computed by the same functions as in a run.

    Args:
        view: the view.
        tables: all rows of the spine and of each source, by name, with all declared columns.

    Raises:
        ContractError: a row that a run would reject.
    """
    spine_contract = Contract(view.spine, tuple(view.spine.schema), tuple(view.key))
    given = _accepted(spine_contract, tables[view.spine.name])
    spine, conflicts = distinct_by_key(given, (view.time, *view.key))
    if len(conflicts):
        key = ", ".join(f"{name} = {format_value(conflicts[name][0], view.spine.schema[name])}" for name in view.key)
        raise ContractError(
            "Key and time must identify a spine row",
            f"there are different rows of {key}",
            "Give one of them another key or time",
        )
    rows = {
        name: spine if source is view.spine else _rows(view, source, tables[name])
        for name, source in view.sources.items()
    }
    found = compute(view, spine, KernelTables(rows))
    moment = [view.time, *view.key]
    asked = given.select(moment).unique(maintain_order=True)
    return asked.join(found, on=moment, how="left", maintain_order="left").select(found.columns)


def _rows(view: FeatureView, source: Source, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows of a source as the kernel takes them."""
    contract = Contract(source, tuple(view.columns_read(source.name)), ordering=view.columns_ordering(source.name))
    rows = _accepted(contract, frame.select(contract.read))
    if source.time is None:
        return dimension_rows(contract, rows)
    if source.unique is None:
        return rows
    known = pl.col(source.time).to_physical().min().alias("__known")
    repeated = rows.group_by(source.unique).agg(known, pl.len().alias("__rows")).filter(pl.col("__rows") > 1)
    return without_repeats(source, rows, repeated.drop("__rows"))


def _accepted(contract: Contract, frame: pl.DataFrame) -> pl.DataFrame:
    rows, dead_letters = check_rows(contract, frame)
    if len(dead_letters):
        first = dead_letters.row(0, named=True)
        raise ContractError(
            f"Source {contract.source.name!r}: {first['rule']}",
            f"row {first['place']}: {first['field']} = {first['value']}",
            "A run would reject this row; correct the test",
        )
    return rows
