"""`schemas.testing`: features of literal rows are those of a run, and differences are listed."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.errors import ContractError, DefinitionError
from schemas.testing import expect, features
from tests.support.project_case import Project

orders = Source("orders", time="at", columns={"id": pl.Int64, "who": pl.String, "price": pl.Float64, "day": pl.Date})
sales = Source("sales", time="at", unique="id", columns={"id": pl.Int64, "who": pl.String, "paid": pl.Float32})
people = Source("people", columns={"who": pl.String, "age": pl.Int32})
view = FeatureView(
    "v",
    spine=orders,
    key="id",
    features=[
        Derived(price=pl.col("price"), month=pl.col("day").dt.month()),
        Trailing(sales, by="who", over=("1d", "7d"), stats={"paid": ("mean", "count")}),
        Trailing(orders, by="who", over="7d", stats={"*": "count"}),
        Latest(sales, by="who", columns="paid", max_age="30d", name="last"),
        Lookup(people, by="who", columns="age"),
    ],
)
ASKED = [
    {"id": 2, "who": "b", "at": "2024-01-10", "price": 3},
    {"id": 1, "who": "a", "at": "2024-01-09T12:00+00:00", "price": 0.1, "day": "2024-02-01"},
    {"id": 3, "who": "a", "at": datetime(2024, 1, 10, tzinfo=UTC)},
]
SALES = [
    {"id": 7, "who": "a", "at": "2024-01-09", "paid": 2.0},
    {"id": 7, "who": "a", "at": "2024-01-09T13:00+00:00", "paid": 1000.0},  # repeats an id
    {"id": 8, "who": "a", "at": "2024-01-10", "paid": 50.0},  # not yet known at that moment
    {"id": 9, "who": "a", "at": "2024-01-03T12:00+00:00", "paid": 4.0},
]


def test_features_of_literal_rows_are_exact() -> None:
    found = features(view, ASKED, sales=SALES, people=[{"who": "a", "age": 30}])
    assert [row["id"] for row in found] == [2, 1, 3]
    expect(
        found,
        [
            {"price": 3, "sales_by_who_paid_count_7d": 0, "sales_by_who_paid_mean_7d": None, "people_age": None},
            {
                "at": "2024-01-09T12:00+00:00",
                "price": 0.1,
                "month": 2,
                "sales_by_who_paid_count_1d": 1,
                "sales_by_who_paid_mean_7d": 3.0,
                "last_paid": 2.0,
                "people_age": 30,
                "orders_by_who_count_7d": 0,
            },
            {
                "price": None,
                "sales_by_who_paid_mean_1d": 2,
                "sales_by_who_paid_count_7d": 2,
                "orders_by_who_count_7d": 1,
            },
        ],
    )


def test_a_difference_names_row_column_and_both_values() -> None:
    found = features(view, ASKED[:1])
    with pytest.raises(AssertionError) as caught:
        expect(found, [{"price": 4, "people_age": 0, "prise": 3, "sales_by_who_paid_count_1d": False}, {}])
    assert str(caught.value).split("\n") == [
        "features are not as expected",
        "  2 rows expected, 1 found",
        "  row 0, price: 4 expected, 3.0 found",
        "  row 0, people_age: 0 expected, null found",
        "  row 0: there is no 'prise'. Did you mean 'price'?",
        "  row 0, sales_by_who_paid_count_1d: False expected, 0 found",
    ]


@pytest.mark.parametrize(
    ("spine", "sources", "kind", "message"),
    [
        (
            ASKED,
            {"sale": []},
            DefinitionError,
            r"reads beside its spine: sales, people; there is no 'sale'. Did you mean 'sales'",
        ),
        (
            [{"id": 1, "whom": "a"}],
            {},
            DefinitionError,
            r"must name declared columns; there is no 'whom'. Did you mean 'who'",
        ),
        ([{"id": "x", "at": "2024-01-01"}], {}, DefinitionError, r"'id' must be Int64; it is 'x'"),
        ([{"id": 1, "at": "2024-01-01 10:00"}], {}, DefinitionError, r"must have a time zone"),
        ([{"id": 1, "at": 5}], {}, DefinitionError, r"'at' must be a time or a date; it is 5"),
        ([{"who": "a", "at": "2024-01-01"}], {}, ContractError, r"Source 'orders'.*row 0: id"),
        ([{"id": 1}], {}, ContractError, r"a time is present"),
        (
            ASKED[:1] + [{**ASKED[0], "price": 9}],
            {},
            ContractError,
            r"must identify a spine row; there are different rows of id = 2",
        ),
        (ASKED[:1], {"sales": [{"id": 1, "at": "2024-01-01", "paid": float("inf")}]}, ContractError, r"paid"),
    ],
)
def test_rows_that_a_run_would_refuse_are_refused(
    spine: list[dict[str, object]], sources: dict[str, list[dict[str, object]]], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        features(view, spine, **sources)


def test_literal_rows_give_what_a_run_gives(tmp_path: Path) -> None:
    """The rows of real files, handed over as literals."""
    project = Project(tmp_path / "store", rows=300)
    assert project.run("features", "--view", "buying", "--no-statistics") == 0
    from schemas import load_definition

    buying = load_definition(str(project.definition), "buying").view
    rows = {name: pl.read_parquet(project.store / "sources" / name).to_dicts() for name in ("visits", "sales")}
    found = features(buying, rows["visits"], sales=rows["sales"])
    table = project.rows("features/buying").select("visit", "asked", *buying.feature_names)
    assert pl.DataFrame(found, schema=table.schema).sort("visit").equals(table)
