"""Categories of the test split that training never had are named, and nothing else is."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from transforms.training.data_checks import Findings
from transforms.training.unseen_categories import NAMED, warn_of_unseen
from transforms.validation.statistics import RANKS, describe_batch, statistics_proto

COLUMNS = pa.schema([("shop", pa.string())])
BEFORE = Findings({}, {}, None, ("said before",))


def statistics(values: list[str | None]) -> Any:
    rows = pa.RecordBatch.from_arrays([pa.array(values, pa.string())], schema=COLUMNS)
    return statistics_proto(describe_batch(rows, COLUMNS))


def warned(learnt: list[str | None], tested: list[str | None], inputs: tuple[str, ...] = ("shop",)) -> list[str]:
    first, *more = warn_of_unseen(BEFORE, statistics(learnt), statistics(tested), inputs).warnings
    assert first == "said before"
    return more


def test_a_value_of_the_test_split_only_is_named_with_its_rows() -> None:
    (warning,) = warned(["north", "south", None], ["north", "east", "east", None])
    assert "'shop'" in warning
    assert warning.endswith("encoded as unknown: 'east' (2 rows)")


def test_of_many_values_some_are_named_and_the_rest_counted() -> None:
    (warning,) = warned(["north"], [f"new {i}" for i in range(NAMED + 3)])
    assert warning.count("rows)") == NAMED
    assert warning.endswith("and 3 more")


@pytest.mark.parametrize(
    ("learnt", "tested", "inputs"),
    [
        (["north", "south"], ["south", None], ("shop",)),  # nothing new
        (["north"], ["east"], ()),  # no input of the model
        ([None], ["east"], ("shop",)),  # null throughout: another warning says so
        ([f"shop {i}" for i in range(RANKS + 1)], ["east"], ("shop",)),  # not all listed: it may have been there
    ],
)
def test_otherwise_nothing_is_said(learnt: list[str | None], tested: list[str | None], inputs: tuple[str, ...]) -> None:
    assert warned(learnt, tested, inputs) == []
