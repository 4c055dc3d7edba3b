"""The fingerprint changes with whatever changes values, and with nothing else; it is the same in every process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from schemas import Derived, FeatureView, Gates, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders
from schemas.sources import TIME

ROOT = Path(__file__).parents[2]
SALES = {"sale": pl.Int64, "shop": pl.String, "price": pl.Float64, "paid": pl.Boolean}
SHOPS = {"shop": pl.String, "area": pl.Int32, "kind": pl.String}


def spine(**other: Any) -> Source:
    columns = {"visit": pl.Int64, "shop": pl.String, "due": TIME, "size": pl.Float32}
    return Source(**{"name": "visits", "time": "asked_at", "columns": columns, **other})


def sales(**other: Any) -> Source:
    return Source(**{"name": "sales", "time": "sold_at", "columns": SALES, **other})


def shops(**other: Any) -> Source:
    return Source(**{"name": "shops", "columns": SHOPS, **other})


def trailing(of: Source | None = None, **other: Any) -> Trailing:
    return Trailing(**{"source": of or sales(), "by": "shop", "over": "1h", "stats": {"price": "mean"}, **other})


def latest(of: Source | None = None, **other: Any) -> Latest:
    return Latest(**{"source": of or sales(), "by": "shop", "columns": "price", "max_age": "6h", **other})


def lookup(of: Source | None = None, **other: Any) -> Lookup:
    return Lookup(**{"source": of or shops(), "by": "shop", "columns": "area", **other})


def derived(**columns: pl.Expr) -> Derived:
    return Derived(**(columns or {"hour": pl.col("due").dt.hour()}))


def fingerprint(*features: Any, **other: Any) -> str:
    return FeatureView(
        **{"name": "v", "spine": spine(), "key": "visit", "features": list(features), **other}
    ).fingerprint


def where(expr: pl.Expr) -> Trailing:
    return trailing(where=expr, name="some")


CHANGES: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
    "a constant": (
        lambda: fingerprint(derived(a=pl.col("size") * 2)),
        lambda: fingerprint(derived(a=pl.col("size") * 3)),
    ),
    "the kind of a constant": (
        lambda: fingerprint(derived(a=pl.col("size") * 2)),
        lambda: fingerprint(derived(a=pl.col("size") * 2.0)),
    ),
    "a name": (lambda: fingerprint(derived(a=pl.col("size") * 2)), lambda: fingerprint(derived(b=pl.col("size") * 2))),
    "the order of features": (lambda: fingerprint(derived(), lookup()), lambda: fingerprint(lookup(), derived())),
    "one feature more": (lambda: fingerprint(derived()), lambda: fingerprint(derived(), lookup())),
    "a window": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(over="2h"))),
    "a statistic": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(stats={"price": "max"}))),
    "a quantile": (
        lambda: fingerprint(trailing(stats={"price": "q05"})),
        lambda: fingerprint(trailing(stats={"price": "q06"})),
    ),
    "a condition": (lambda: fingerprint(where(pl.col("price") > 5)), lambda: fingerprint(where(pl.col("price") >= 5))),
    "no condition": (lambda: fingerprint(trailing(name="some")), lambda: fingerprint(where(pl.col("price") > 5))),
    "the column of a key": (
        lambda: fingerprint(trailing(by={"visit": "sale"})),
        lambda: fingerprint(
            trailing(Source("sales", time="sold_at", columns={**SALES, "other": pl.Int64}), by={"visit": "other"})
        ),
    ),
    "an age": (lambda: fingerprint(latest()), lambda: fingerprint(latest(max_age="7h"))),
    "a looked up column": (lambda: fingerprint(lookup()), lambda: fingerprint(lookup(columns="kind"))),
    "what repeats count once": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(sales(unique="sale")))),
    "the time of a source": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(sales(time="seen_at")))),
    "an event time": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(sales(event_time="happened_at")))),
    "the order of ties": (lambda: fingerprint(latest()), lambda: fingerprint(latest(sales(order="sale")))),
    "columns that break ties": (
        lambda: fingerprint(latest()),
        lambda: fingerprint(latest(sales(columns={**SALES, "more": pl.Int64}))),
    ),
    "rows that are too old": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(not_before="2010-01-01"))),
    ),
    "the type of a value": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(columns={**SALES, "price": pl.Float32}))),
    ),
    "the name of a source": (
        lambda: fingerprint(trailing(name="x")),
        lambda: fingerprint(trailing(sales(name="deals"), name="x")),
    ),
    "the key of a view": (lambda: fingerprint(derived()), lambda: fingerprint(derived(), key=("visit", "shop"))),
    "the type of a spine column": (
        lambda: fingerprint(derived()),
        lambda: fingerprint(derived(), spine=spine(columns={"visit": pl.Int32, "due": TIME})),
    ),
    "what a derived feature uses": (
        lambda: fingerprint(lookup(name="a"), derived(a2=pl.col("a_area") * 2)),
        lambda: fingerprint(
            lookup(shops(columns={**SHOPS, "area": pl.Int64}), name="a"), derived(a2=pl.col("a_area") * 2)
        ),
    ),
}

STAYS: dict[str, tuple[Callable[[], str], Callable[[], str]]] = {
    "built twice": (lambda: fingerprint(trailing(), derived()), lambda: fingerprint(trailing(), derived())),
    "lateness": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(lateness="10m", ahead="2d", idle="1m"))),
    ),
    "columns that nobody reads": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(columns={**SALES, "more": pl.Int64}))),
    ),
    "the order of a source's columns": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(columns=dict(reversed(SALES.items()))))),
    ),
    "an order where no tie matters": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(order="sale"))),
    ),
    "one column or a tuple of one": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(by=("shop",), over=("1h",), stats={"price": ("mean",)})),
    ),
    "a mapping of equal names": (lambda: fingerprint(trailing()), lambda: fingerprint(trailing(by={"shop": "shop"}))),
    "a type or an instance of it": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(columns={name: dtype() for name, dtype in SALES.items()}))),
    ),
    "how the oldest moment is written": (
        lambda: fingerprint(trailing()),
        lambda: fingerprint(trailing(sales(not_before="1990-01-01T00:00:00+00:00"))),
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_it_changes_with_what_changes_values(what: str) -> None:
    before, after = CHANGES[what]
    assert before() != after()


@pytest.mark.parametrize("what", STAYS)
def test_it_stays_with_what_does_not(what: str) -> None:
    before, after = STAYS[what]
    assert before() == after()


def test_models_do_not_change_it() -> None:
    view = FeatureView("v", spine=spine(), key="visit", features=[trailing()])
    before = view.fingerprint
    label = Label(view.events["sales"], on="shop", value=pl.col("price") > 1, within="1d")
    Model(view, label, TimeSplit("1d", "1d"), encode={"shop": encoders.Ordinal()}, gates=Gates(slices=("shop",)))
    assert view.fingerprint == before
    assert len(before) == 16
    assert int(before, 16) >= 0


def everything() -> str:
    """A fingerprint with a part of every kind."""
    events = sales(unique="sale")
    return fingerprint(
        derived(a=pl.col("size") * 2, b=pl.col("shop").is_in(["x", "y"]), c=pl.col("shop").replace({"x": "y"})),
        trailing(events, over=("1h", "2h")),
        trailing(events, where=pl.col("price") > 5, name="some"),
        latest(events, name="newest"),
        lookup(columns=("area", "kind")),
    )


def test_it_is_the_same_in_every_process() -> None:
    program = "from tests.schemas.test_schemas_fingerprint import everything; print(everything())"
    found = {everything()}
    for seed in ("0", "1", "12345"):
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        made = subprocess.run(
            [sys.executable, "-c", program], env=environment, check=True, capture_output=True, text=True
        )
        found.add(made.stdout.strip())
    assert len(found) == 1
