"""The contracts of a view's sources, by which it sorts the rows that a live job accepted.

A live job accepts every readable row of a source (see `messages`).  Which of them keep the contract of a view is
decided when the view uses them: by the journal as they come, and again by recovery, parity and trace.  So several
versions of a view use the same accepted rows.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

from schemas.views import FeatureView
from transforms.sources.contracts import Contract, check_rows
from transforms.sources.conversions import Twice
from transforms.sources.dead_letters import message_dead_letters
from transforms.sources.inventory import spine_contract
from transforms.streaming.messages import ABSENT, located

Bools = npt.NDArray[np.bool_]


def contracts_of(view: FeatureView) -> dict[str, Contract]:
    """The contract of each topic's rows: the columns that features read, and all columns of the spine."""
    return {name: contract_of(view, name) for name in dict.fromkeys([view.spine.name, *view.events])}


def contract_of(view: FeatureView, name: str) -> Contract:
    """The contract of the rows of the source `name`, which is the spine or has events."""
    if name == view.spine.name:
        return spine_contract(view)
    return Contract(view.events[name], tuple(view.columns_read(name)))


def twice_in(views: Sequence[FeatureView], name: str) -> Twice:
    """Which instant a local time of the source `name` stands for that occurs twice: the earlier in a spine, the later
    in a source of events, and neither in a source that is both."""
    if not any(view.spine.name == name for view in views):
        return "latest"
    return None if any(name in view.events for view in views) else "earliest"


def sort_rows(contract: Contract, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Sorts accepted rows by whether they keep a contract.

    Args:
        contract: of a view.
        rows: the columns of the contract, `ABSENT` and the origin with `__arrived`.

    Returns:
        The rows that keep it, and dead letters of the others, if there are any, with the columns
        `MESSAGE_DEAD_LETTERS`.
    """
    dead_letters = []
    if rows[ABSENT].null_count() < len(rows):
        lacking = _lacking(contract, rows[ABSENT])
        for name in lacking.filter(lacking != "").unique(maintain_order=True):
            rule = f"every row has the declared column {name!r}"
            some = rows.filter(lacking == name)
            dead_letters.append(message_dead_letters(contract.source.name, some, name, rule, pl.lit("absent")))
        rows = rows.filter(lacking == "")
    good, broken = check_rows(contract, rows)
    return good, [*dead_letters, located(contract.source, rows, broken)] if len(broken) else dead_letters


def keeps(contract: Contract, rows: pl.DataFrame) -> Bools:
    """Whether each accepted row keeps a contract.  `rows` have its columns, and `ABSENT`."""
    broken = rows.select(contract.breaks)["_"]  # one value if there are no rules
    result = np.zeros(len(rows), np.bool_) | ~broken.to_numpy()
    if rows[ABSENT].null_count() < len(rows):
        result &= (_lacking(contract, rows[ABSENT]) == "").to_numpy()
    return result


def _lacking(contract: Contract, absent: pl.Series) -> pl.Series:
    """By row, the first column of the contract that it does not have; empty if it has them all."""
    texts = absent.unique().drop_nulls().to_list()
    names = [set(json.loads(text)) for text in texts]
    first = [next((name for name in contract.columns if name in each), "") for each in names]
    return absent.replace_strict(texts, first, default="", return_dtype=pl.String)
