"""Whatever cannot mean anything is refused when it is built: the rule, the value, the way out."""

import pickle
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from schemas import (
    DefinitionError,
    Derived,
    FeatureView,
    Gates,
    Label,
    Latest,
    Lookup,
    Model,
    Search,
    Source,
    TimeSplit,
    Trailing,
    encoders,
    load_definition,
)
from schemas.durations import instant, microseconds
from schemas.errors import ContractError, MillraceError, nearest
from schemas.features import STATISTICS
from schemas.sources import TIME

spine = Source(
    "visits",
    time="asked_at",
    columns={"visit": pl.Int64, "shop": pl.String, "city": pl.Int32, "due": TIME, "size": pl.Float32, "open": pl.Boolean},
)  # fmt: skip
sales = Source(
    "sales",
    time="sold_at",
    columns={"sale": pl.Int64, "shop": pl.String, "city": pl.Int64, "price": pl.Float64, "paid": pl.Boolean, "on": pl.Date},
)  # fmt: skip
shops = Source("shops", columns={"shop": pl.String, "area": pl.Int32, "kind": pl.String, "opened": pl.Date})
mean = Trailing(sales, by="shop", over="1h", stats={"price": "mean"})


def view(*features: Any, **other: Any) -> FeatureView:
    return FeatureView(**{"name": "demand", "spine": spine, "key": "visit", "features": features or [mean], **other})


def label(**other: Any) -> Label:
    return Label(**{"source": sales, "on": "shop", "value": pl.col("price") > 10, "within": "1d", **other})


def model(**other: Any) -> Model:
    return Model(**{"view": view(), "label": label(), "split": TimeSplit("10d", "10d"), **other})


def source(**other: Any) -> Source:
    return Source(**{"name": "s", "time": "t", "columns": {"a": pl.Int64}, **other})


REFUSED: dict[str, tuple[Callable[[], Any], str, str, str]] = {
    # name of the case: what is built, then words of the rule, the value and the fix
    "source name": (lambda: source(name="Sales"), "lower-case letters", "'Sales'", 'like "late_departures"'),
    "source name of path": (lambda: source(name="a/b"), "lower-case letters", "'a/b'", "Write it like"),
    "source without columns": (lambda: source(columns={}), "columns must map names to Polars types", "{}", "pl.String"),
    "source columns a list": (lambda: source(columns=["a"]), "columns must map names", "['a']", "pl.String"),
    "column type": (lambda: source(columns={"a": pl.List(pl.Int64)}), "a column must be a signed integer", "'a' is List(Int64)", "Cast it"),
    "column unsigned": (lambda: source(columns={"a": pl.UInt32}), "a column must be a signed integer", "UInt32", "Cast it"),
    "column type a string": (lambda: source(columns={"a": "int"}), "a column must be a signed integer", "int", "Cast it"),
    "column without zone": (lambda: source(columns={"a": pl.Datetime("us")}), "a timestamp must have a time zone", "'a'", 'pl.Datetime("us", "UTC")'),
    "column of our name": (lambda: source(columns={"row_id": pl.Int64}), "date, row_id, nor begin with __", "'row_id'", "Rename"),
    "column of underscores": (lambda: source(columns={"__x": pl.Int64}), "nor begin with __", "'__x'", "Rename"),
    "column without name": (lambda: source(columns={"": pl.Int64}), "a column must have a name", "''", "Write"),
    "time of our name": (lambda: source(time="date"), "nor begin with __", "'date'", "Rename"),
    "event_time of our name": (lambda: source(event_time="__t"), "nor begin with __", "'__t'", "Rename"),
    "time of another type": (lambda: source(time="a"), "time must be a Datetime in microseconds and UTC", "'a' is Int64", "Leave it out"),
    "event_time without time": (lambda: source(time=None, event_time="e"), "a source with event_time must have time", "it has none", "time=…"),
    "event_time is time": (lambda: source(event_time="t"), "event_time must differ from time", "'t'", "Leave event_time out"),
    "lateness": (lambda: source(lateness="ten minutes"), "lateness must be a whole number and a unit", "'ten minutes'", '"10m"'),
    "lateness below zero": (lambda: source(lateness="-1m"), "lateness must be a whole number", "'-1m'", "Write"),
    "ahead": (lambda: source(ahead=5), "ahead must be a whole number", "5", "Write"),
    "idle of zero": (lambda: source(idle="0s"), "idle must be longer than zero", "'0s'", "lengthen"),
    "not_before": (lambda: source(not_before="yesterday"), "not_before must be an ISO date", "'yesterday'", "2013-10-01"),
    "not_before a number": (lambda: source(not_before=1990), "not_before must be an ISO date", "1990", "2013-10-01"),
    "unique unknown": (lambda: source(unique="b"), "unique of source 's' must name declared columns", "'b'", "Known names: a, t"),
    "order unknown": (lambda: source(order=("a", "aa")), "order of source 's' must name declared columns", "'aa'", "Did you mean 'a'?"),
    "unique of a dimension": (lambda: source(time=None, unique="a"), "only events may have unique", "a dimension", "Remove unique"),
    "unique twice": (lambda: source(unique=("a", "a")), "must have each column name once", "('a', 'a')", "Remove the repeat"),
    "view name": (lambda: view(name="My view"), "name of a view must consist of lower-case", "'My view'", "Write it like"),
    "spine without time": (lambda: view(spine=shops), "the spine must be a Source with a time", "shops", "time=…"),
    "spine no source": (lambda: view(spine="visits"), "the spine must be a Source with a time", "visits", "Declare"),
    "spine with event_time": (lambda: view(spine=source(event_time="e"), key="a"), "the spine must have one time", "event_time='e'", "Leave event_time out"),
    "spine with unique": (lambda: view(spine=source(unique="a"), key="a"), "must not have unique or order", "it has unique", "Leave them out"),
    "key unknown": (lambda: view(key="visti"), "must name declared columns", "'visti'", "Did you mean 'visit'?"),
    "key none": (lambda: view(key=None), "key must be a column name", "None", "origin"),
    "key the time": (lambda: view(key="asked_at"), "a key must be an integer, a string, a boolean or a date", "'asked_at'", "Leave out the time"),
    "key another time": (lambda: view(key="due"), "a key must be an integer", "'due'", "Leave out the time"),
    "key a float": (lambda: view(key="size"), "a key must be an integer", "'size'", ""),
    "no features": (lambda: view(features=[]), "at least one feature", "none", "Add Derived"),
    "features no list": (lambda: view(features=mean), "features must be a list", "Trailing", "features=[…]"),
    "feature of no kind": (lambda: view(pl.col("size")), "a feature must be Derived, Trailing, Latest or Lookup", "col(", "docs"),
    "two sources of one name": (lambda: view(mean, Latest(Source("sales", time="t", columns={"shop": pl.String}), by="shop", columns="shop", max_age="1h")), "a name must stand for one source", "'sales'", "same Source object"),
    "same feature twice": (lambda: view(mean, mean), "a feature must have a name of its own", "sales_by_shop_price_mean_1h", "name=…"),
    "feature of a spine column's name": (lambda: view(Lookup(Source("d", columns={"shop": pl.String, "s": pl.Int8}), by="shop", columns="s"), spine=Source("q", time="t", columns={"visit": pl.Int64, "shop": pl.String, "d_s": pl.Int8})), "name of its own", "'d_s' comes from the spine", "name=…"),
    "feature of our name": (lambda: view(Derived(date=pl.col("size"))), "name of its own", "Millrace's own columns", "name=…"),
    "feature of underscores": (lambda: view(Derived(__x=pl.col("size"))), "name of its own", "'__x'", "name=…"),
    "derived over a spine column": (lambda: view(Derived(size=pl.col("size") * 2)), "A feature must have a name of its own", "has the name of the column 'size'", "Rename"),
    "derived time": (lambda: view(Derived(asked_at=pl.col("asked_at").cast(pl.Int64))), "key and time must stay as the spine has them", "asked_at", "another name"),
    "derived key": (lambda: view(Derived(visit=pl.col("visit").cast(pl.String))), "key and time must stay", "visit", "another name"),
    "derived a time": (lambda: view(Derived(x=pl.col("due"))), "must be a number, a string or a boolean", "Datetime", ".dt.hour()"),
    "derived a list": (lambda: view(Derived(x=pl.col("shop").str.split(" "))), "must be a number, a string or a boolean", "List", "Turn"),
    "derived nothing": (Derived, "must name at least one column", "none", "Write Derived("),
    "derived no expression": (lambda: Derived(x="size"), "'x' must be a Polars expression", "'size'", 'pl.col("…")'),
    "derived unknown column": (lambda: view(Derived(x=pl.col("siez") + 1)), "must read columns that exist", "'siez'", "Did you mean 'size'?"),
    "derived types": (lambda: view(Derived(x=pl.col("shop") + 1.5 * pl.col("open"))), "must fit the types of its columns", "", "Cast"),
    "cycle": (lambda: view(Derived(a=pl.col("b")), Derived(b=pl.col("a"))), "must use only features above it", "'b'", "Move the feature that computes 'b' up"),
    "cycle of one": (lambda: view(Derived(a=pl.col("a") + 1)), "must use only features above it", "'a'", "Move"),
    "feature below": (lambda: view(Derived(a=pl.col("shops_area") + 1), Lookup(shops, by="shop", columns="area")), "must use only features above it", "'shops_area'", "up"),
    "key below": (lambda: view(Trailing(sales, by={"shops_kind": "shop"}, over="1h", stats={"*": "count"}), Lookup(shops, by="shop", columns="kind")), "must use only features above it", "'shops_kind'", "up"),
    "no source": (lambda: Trailing("sales", by="shop", over="1h", stats={"*": "count"}), "Trailing must read a Source", "'sales'", "Write Trailing("),
    "latest of no source": (lambda: Latest(None, by="shop", columns="price", max_age="1h"), "Latest must read a Source", "None", "Write Latest("),
    "lookup of no source": (lambda: Lookup("shops", by="shop", columns="area"), "Lookup must read a Source", "'shops'", "Write Lookup("),
    "trailing over a dimension": (lambda: Trailing(shops, by="shop", over="1h", stats={"*": "count"}), "its source must have a time", "a dimension", "Lookup"),
    "lookup of events": (lambda: Lookup(sales, by="shop", columns="price"), "its source must be a dimension, without time", "time='sold_at'", "Latest"),
    "by unknown": (lambda: Trailing(sales, by="shpo", over="1h", stats={"*": "count"}), "by of source 'sales'", "'shpo'", "Did you mean 'shop'?"),
    "by nothing": (lambda: Trailing(sales, by=(), over="1h", stats={"*": "count"}), "by must be a column name", "()", "Write"),
    "by a number": (lambda: Latest(sales, by=5, columns="price", max_age="1h"), "by must be a column name", "5", "Write"),
    "by an empty mapping": (lambda: Trailing(sales, by={}, over="1h", stats={"*": "count"}), "by must be a column name", "()", "Write"),
    "by not in the spine": (lambda: view(Trailing(sales, by="sale", over="1h", stats={"*": "count"})), "must be a column of the spine or a feature above", "'sale'", "Known names"),
    "by of two types": (lambda: view(Trailing(sales, by={"city": "shop"}, over="1h", stats={"*": "count"})), "the same type on both sides", "'city' is Int32, 'shop' is String", "Cast"),
    "by a float": (lambda: view(Trailing(sales, by={"size": "price"}, over="1h", stats={"*": "count"})), "must not be a float", "Float32", "Key by"),
    "window of zero": (lambda: Trailing(sales, by="shop", over="0h", stats={"*": "count"}), "a window must be longer than zero", "'0h'", "Remove it"),
    "window without unit": (lambda: Trailing(sales, by="shop", over="24", stats={"*": "count"}), "a whole number and a unit", "'24'", '"7d"'),
    "window of months": (lambda: Trailing(sales, by="shop", over="1mo", stats={"*": "count"}), "a whole number and a unit", "'1mo'", '"7d"'),
    "window of a fraction": (lambda: Trailing(sales, by="shop", over="1.5h", stats={"*": "count"}), "a whole number and a unit", "'1.5h'", '"7d"'),
    "window of ages": (lambda: Trailing(sales, by="shop", over="40000d", stats={"*": "count"}), "at most a century", "'40000d'", "all"),
    "windows a number": (lambda: Trailing(sales, by="shop", over=3600, stats={"*": "count"}), "over must be a length of time", "3600", "Write"),
    "windows none": (lambda: Trailing(sales, by="shop", over=(), stats={"*": "count"}), "over must be", "()", "Write"),
    "window twice": (lambda: Trailing(sales, by="shop", over=("1h", "1h"), stats={"*": "count"}), "must have each length of time once", "('1h', '1h')", "Remove"),
    "median of a lifetime": (lambda: Trailing(sales, by="shop", over=("1h", "all"), stats={"price": "median"}), "a statistic over all history must be one of", "'median'", "window of its own"),
    "lifetime placed in time": (lambda: Trailing(source(event_time="e"), by="a", over="all", stats={"*": "count"}), "must follow the time at which rows become known", "event_time='e'", "without event_time"),
    "forever placed in time": (lambda: Latest(source(event_time="e"), by="a", columns="a", max_age="forever"), "must follow the time at which rows become known", "event_time='e'", "without event_time"),
    "stats empty": (lambda: Trailing(sales, by="shop", over="1h", stats={}), "stats must map columns to statistics", "{}", "dep_delay"),
    "stats a list": (lambda: Trailing(sales, by="shop", over="1h", stats=["count"]), "stats must map columns", "['count']", "Write"),
    "stats of a column none": (lambda: Trailing(sales, by="shop", over="1h", stats={"price": ()}), "statistics of 'price'", "()", "Write"),
    "statistic unknown": (lambda: Trailing(sales, by="shop", over="1h", stats={"price": "maen"}), "a statistic must be one of count, sum", "'maen'", "Did you mean 'mean'?"),
    "quantile of 100": (lambda: Trailing(sales, by="shop", over="1h", stats={"price": "q100"}), "q01 … q99", "'q100'", ""),
    "quantile of 0": (lambda: Trailing(sales, by="shop", over="1h", stats={"price": "q00"}), "q01 … q99", "'q00'", ""),
    "stats of unknown column": (lambda: Trailing(sales, by="shop", over="1h", stats={"prise": "mean"}), "stats of source 'sales'", "'prise'", "Did you mean 'price'?"),
    "mean of rows": (lambda: Trailing(sales, by="shop", over="1h", stats={"*": "mean"}), "must be count", "('mean',)", "Name a column"),
    "mean of strings": (lambda: Trailing(sales, by="shop", over="1h", stats={"shop": "mean"}), "mean needs numbers", "'shop' is String", "n_unique"),
    "max of dates": (lambda: Trailing(sales, by="shop", over="1h", stats={"on": "max"}), "max needs numbers", "'on' is Date", "Times have"),
    "last of times": (lambda: Trailing(sales, by="shop", over="1h", stats={"sold_at": "last"}), "last needs numbers", "'sold_at'", "Times have"),
    "where without name": (lambda: Trailing(sales, by="shop", over="1h", stats={"*": "count"}, where=pl.col("price") > 5), "a condition needs a name", "price", "name="),
    "where no condition": (lambda: Trailing(sales, by="shop", over="1h", stats={"*": "count"}, where=pl.col("price"), name="dear"), "where must be a condition", "price", "Compare"),
    "where unknown column": (lambda: Latest(sales, by="shop", columns="price", max_age="1h", where=pl.col("prize") > 1, name="dear"), "where must read columns that exist", "'prize'", "Did you mean 'price'?"),
    "where looks around": (lambda: Latest(sales, by="shop", columns="price", max_age="1h", where=pl.col("price") > pl.col("price").mean(), name="dear"), "where must be row-local", "mean()", "History belongs"),
    "where types": (lambda: Latest(sales, by="shop", columns="price", max_age="1h", where=pl.col("shop") > pl.col("on"), name="dear"), "where must fit the types", "", "Cast"),
    "name of a feature": (lambda: Trailing(sales, by="shop", over="1h", stats={"*": "count"}, name="Dear sales"), "name must consist of", "'Dear sales'", ""),
    "latest without age": (lambda: Latest(sales, by="shop", columns="price"), "max_age must state how old the row may be", "it is missing", 'max_age="6h"'),
    "latest of age zero": (lambda: Latest(sales, by="shop", columns="price", max_age="0s"), "max_age must be longer than zero", "'0s'", ""),
    "latest unknown column": (lambda: Latest(sales, by="shop", columns="prices", max_age="1h"), "columns of source 'sales'", "'prices'", "Did you mean 'price'?"),
    "latest of a date": (lambda: view(Latest(sales, by="shop", columns="on", max_age="1h")), "must be a number, a string or a boolean", "Date", ""),
    "lookup of a date": (lambda: view(Lookup(shops, by="shop", columns="opened")), "must be a number, a string or a boolean", "Date", ""),
    "lookup unknown column": (lambda: Lookup(shops, by="shop", columns="aera"), "columns of source 'shops'", "'aera'", "Did you mean 'area'?"),
    "lookup name": (lambda: Lookup(shops, by="shop", columns="area", name="9"), "name must consist of", "'9'", ""),
    "label of a dimension": (lambda: label(source=shops), "source must be a Source with a time", "shops", "time=…"),
    "label of unknown key": (lambda: label(on="shopp"), "on of source 'sales'", "'shopp'", "Did you mean 'shop'?"),
    "label no expression": (lambda: label(value="price"), "value must be a Polars expression", "'price'", ""),
    "label looks around": (lambda: label(value=pl.col("price") > pl.col("price").median()), "value must be row-local", "median()", ""),
    "label a string": (lambda: label(value=pl.col("shop")), "value must be a number or a condition", "String", "Number the classes"),
    "label unknown column": (lambda: label(value=pl.col("cost") > 1), "value must read columns that exist", "'cost'", "Known names"),
    "label within zero": (lambda: label(within="0d"), "within must be longer than zero", "'0d'", ""),
    "label absent": (lambda: label(absent="zero"), 'absent must be "drop" or a number', "'zero'", "absent=0"),
    "label absent none": (lambda: label(absent=None), "absent must be", "None", "absent=0"),
    "split length": (lambda: TimeSplit("sixty days", "10d"), "validate must be a whole number and a unit", "'sixty days'", ""),
    "split of a number": (lambda: TimeSplit(60, "10d"), "validate must be an ISO date", "60", ""),
    "split of zero": (lambda: TimeSplit("10d", "0d"), "test must be longer than zero", "'0d'", ""),
    "split date": (lambda: TimeSplit("2013-02-30", "10d"), "validate must be an ISO date", "'2013-02-30'", ""),
    "split moment without zone": (lambda: TimeSplit("2013-01-01T10:00", "10d"), "must have a time zone", "T10:00", "+00:00"),
    "split order": (lambda: TimeSplit("2013-10-01", "2013-09-01"), "validation must come before test", "2013-10-01 and 2013-09-01", "Exchange"),
    "split embargo": (lambda: TimeSplit("10d", "10d", "-1d"), "embargo must be a whole number", "'-1d'", ""),
    "search trials": (lambda: Search(0, {}), "trials must be at least 1", "0", "Raise"),
    "search method": (lambda: Search(1, {}, "sobel"), "method must be random, sobol or halving", "'sobel'", "Did you mean 'sobol'?"),
    "search space": (lambda: Search(1, {"eta": (0.3, 0.1)}), "'eta' must have a list of choices or a pair of bounds", "(0.3, 0.1)", "[4, 6, 8]"),
    "search space empty": (lambda: Search(1, {"eta": []}), "'eta' must have a list of choices", "[]", ""),
    "gates no numbers": (lambda: Gates(at_least={"auc": "0.7"}), "at_least must map metrics to numbers", "'0.7'", '{"auc": 0.7}'),
    "gates a number": (lambda: Gates(max_gap=0.1), "max_gap must map metrics to numbers", "0.1", ""),
    "gates margin": (lambda: Gates(margin=-0.1), "margin must be at least 0", "-0.1", "Raise"),
    "model of no view": (lambda: model(view="demand"), "must read a FeatureView", "'demand'", "Model(view, …)"),
    "model name": (lambda: model(name="My model"), "name of a model must consist of lower-case", "'My model'", ""),
    "objective": (lambda: model(objective="binary:logistics"), "objective must be one of", "'binary:logistics'", "Did you mean 'binary:logistic'?"),
    "metric": (lambda: model(metric="rmse"), "a metric of binary:logistic must be one of auc", "'rmse'", "Known names"),
    "gate of another metric": (lambda: model(gates=Gates(at_least={"acu": 0.7})), "a metric of binary:logistic must be one of", "'acu'", "Did you mean 'auc'?"),
    "slice unknown": (lambda: model(gates=Gates(slices=("shop", "citi"))), "slices must name features or spine columns", "'citi'", "Did you mean 'city'?"),
    "slice alone": (lambda: model(gates=Gates(slices="shopp")), "slices must name features or spine columns", "'shopp'", "Did you mean 'shop'?"),
    "encode unknown": (lambda: model(encode={"cities": encoders.Ordinal()}), "encode must name features or spine columns", "'cities'", "Did you mean"),
    "encode with no encoder": (lambda: model(encode={"shop": "ordinal"}), "encode must map inputs to encoders", "'shop' has 'ordinal'", "encoders.Ordinal()"),
    "encode strings as numbers": (lambda: model(encode={"shop": encoders.Standardize()}), "the input of Standardize must be a number", "'shop' is String", "Use Ordinal"),
    "string without encoder": (lambda: model(view=view(Latest(sales, by="shop", columns="shop", max_age="1h"))), "a string input needs an encoder", "'sales_shop'", "encoders.Ordinal()"),
    "rounds": (lambda: model(rounds=0), "rounds must be at least 1", "they are 0 and 0", "Raise"),
    "label not in the spine": (lambda: model(label=label(on="sale")), "the label must be joined on spine columns", "'sale'", ""),
    "label source of a known name": (lambda: model(label=label(source=Source("sales", time="t", columns={"shop": pl.String, "price": pl.Float64}))), "a name must stand for one source", "'sales'", "same Source object"),
    "ordinal size": (lambda: encoders.Ordinal(max_size=0), "max_size must be at least 1", "0", "Raise"),
    "one-hot count": (lambda: encoders.OneHot(min_count=0), "min_count must be at least 1", "0", "Raise"),
    "buckets": (lambda: encoders.Bucketize(1), "buckets must be at least 2", "1", "Raise"),
    "categories beyond float32": (lambda: model(encode={"shop": encoders.Ordinal(max_size=1 << 25)}), "at most 2^24 categories or buckets", "33554432", "Lower"),
    "hashing": (lambda: encoders.Hashing(1), "buckets must be at least 2", "1", "Raise"),
    "impute": (lambda: encoders.Impute("mode"), "'mean', 'median' or a number", "'mode'", "Choose"),
    "target": (lambda: encoders.Target(0), "smoothing must be above 0", "0", "Raise"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_mean_anything_is_refused_with_rule_value_and_fix(case: str) -> None:
    build, rule, value, fix = REFUSED[case]
    with pytest.raises(DefinitionError) as caught:
        build()
    error = caught.value
    assert rule in error.rule
    assert value in str(error.value)
    assert fix in error.fix
    assert error.fix
    for part in (error.rule, str(error.value), error.fix):
        assert part.rstrip(".") in str(error)
    assert error.exit_code == 2
    assert isinstance(error, ValueError)


def test_errors_cross_processes_whole() -> None:
    for error in (DefinitionError("a", "b", "c"), ContractError("a"), MillraceError("a", 5, "b?")):
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert (str(again), again.rule, again.value, again.fix) == (str(error), error.rule, error.value, error.fix)


def test_a_message_is_sentences() -> None:
    assert str(MillraceError("Rule.", "x", "Fix")) == "Rule; x. Fix."
    assert str(MillraceError("Rule", "x", "Did you mean 'y'?")) == "Rule; x. Did you mean 'y'?"
    assert str(MillraceError("Rule")) == "Rule."


def test_the_nearest_name_is_offered_else_all_of_them() -> None:
    assert nearest("orgin", ["origin", "dest"]) == "Did you mean 'origin'?"
    assert nearest("xyz", ["origin", "dest"]) == "Known names: dest, origin."
    assert nearest("xyz", []) == "Known names: none."


@pytest.mark.parametrize(
    ("text", "length"),
    [("1us", 1), ("3ms", 3000), ("90s", 90_000_000), ("10m", 600_000_000), ("24h", 86_400_000_000), ("7d", 604_800_000_000), ("2w", 1_209_600_000_000)],
)  # fmt: skip
def test_lengths_of_time_are_read_in_microseconds(text: str, length: int) -> None:
    assert microseconds(text) == length


def test_moments_are_read_in_utc() -> None:
    expected = datetime(2013, 10, 1, tzinfo=UTC)
    for value in ("2013-10-01", date(2013, 10, 1), datetime(2013, 10, 1), "2013-10-01T02:00:00+02:00", expected):
        assert instant(value) == expected
        assert instant(value).tzinfo == UTC


# What is made of a definition


def test_names_say_source_key_column_statistic_and_window() -> None:
    made = view(
        Trailing(sales, by=("shop", "city"), over=("1h", "7d"), stats={"price": ("mean", "q05"), "*": "count"}),
        Trailing(sales, by={"city": "city"}, over="1d", stats={"*": "count"}, where=pl.col("paid"), name="paid"),
        Latest(sales, by="shop", columns=("price", "paid"), max_age="6h"),
        Latest(sales, by="shop", columns="price", max_age="6h", name="newest"),
        Lookup(shops, by="shop", columns=("area", "kind")),
        Derived(hour=pl.col("due").dt.hour(), size=pl.col("size")),
    )
    assert made.feature_names == (
        "sales_by_shop_city_price_mean_1h", "sales_by_shop_city_price_mean_7d", "sales_by_shop_city_price_q05_1h",
        "sales_by_shop_city_price_q05_7d", "sales_by_shop_city_count_1h", "sales_by_shop_city_count_7d",
        "paid_by_city_count_1d", "sales_price", "sales_paid", "newest_price", "shops_area", "shops_kind", "hour", "size",
    )  # fmt: skip
    assert made.context == ("asked_at", "visit", "shop", "city", "due", "open")


def test_a_mapping_names_features_by_the_spine_column() -> None:
    made = view(Trailing(sales, by={"visit": "sale"}, over="1h", stats={"*": "count"}))
    assert made.feature_names == ("sales_by_visit_count_1h",)


def test_every_statistic_has_its_type() -> None:
    made = view(Trailing(sales, by="shop", over="1h", stats={"price": STATISTICS, "city": STATISTICS, "shop": ("first", "count"), "paid": ("last", "mean")}))  # fmt: skip
    for name, dtype in made.columns.items():
        stat = name.removeprefix("sales_by_shop_").removesuffix("_1h").split("_", 1)[1]
        column = name.removeprefix("sales_by_shop_").split("_")[0]
        if stat in ("count", "n_unique"):
            assert dtype == pl.Int64
        elif stat in ("first", "last"):
            assert dtype == {"price": pl.Float32, "city": pl.Int64, "shop": pl.String, "paid": pl.Boolean}[column]
        else:
            assert dtype == pl.Float32


def test_the_output_schema_is_context_features_id_and_date_in_arrow() -> None:
    made = view(mean, Latest(sales, by="shop", columns=("city", "shop", "paid"), max_age="1h"))
    assert made.output_schema == pa.schema([
        ("asked_at", pa.timestamp("us", "UTC")), ("visit", pa.int64()), ("shop", pa.string()), ("city", pa.int32()),
        ("due", pa.timestamp("us", "UTC")), ("size", pa.float32()), ("open", pa.bool_()), ("sales_by_shop_price_mean_1h", pa.float32()),
        ("sales_city", pa.int64()), ("sales_shop", pa.string()), ("sales_paid", pa.bool_()), ("row_id", pa.int64()), ("date", pa.date32()),
    ])  # fmt: skip


def test_a_derived_column_of_the_spines_name_replaces_it() -> None:
    made = view(Derived(size=pl.col("size"), city=pl.col("city").cast(pl.String), visit=pl.col("visit")))
    assert made.context == ("asked_at", "shop", "due", "open")
    assert dict(made.columns) == {"size": pl.Float32, "city": pl.String, "visit": pl.Int64}


def test_only_the_columns_that_are_needed_are_read() -> None:
    assert view(mean).columns_read("sales") == ["sold_at", "shop", "price"]
    counted = Trailing(sales, by="city", over="1h", stats={"*": "count"}, where=pl.col("paid"), name="paid")
    assert view(counted).columns_read("sales") == ["sold_at", "city", "paid"]
    # Ties are broken by all columns, unless an order is declared.
    assert view(Latest(sales, by="shop", columns="price", max_age="1h")).columns_read("sales") == list(sales.schema)
    tidy = Source("sales", time="sold_at", order="sale", columns=dict(sales.columns))
    newest = view(Latest(tidy, by="shop", columns="price", max_age="1h"))
    assert newest.columns_read("sales") == ["sold_at", "sale", "shop", "price"]


def test_the_reach_of_a_source_is_its_longest_window() -> None:
    made = view(mean, Latest(sales, by="shop", columns="price", max_age="6h"), Lookup(shops, by="shop", columns="area"))
    assert made.reach("sales") == microseconds("6h")
    assert list(made.events) == ["sales"]
    assert list(made.dimensions) == ["shops"]


def test_definitions_cross_processes_unchanged() -> None:
    made = model(view=view(mean, Derived(x=pl.col("size") * 2), Lookup(shops, by="shop", columns="area")))
    for _ in range(2):  # before and after what is cached has been computed
        again = pickle.loads(pickle.dumps(made))
        assert again.view.fingerprint == made.view.fingerprint
        assert again.view.columns == made.view.columns
        assert again.view.output_schema == made.view.output_schema
        assert again.inputs == made.inputs
        assert again.view.events["sales"] is again.label.source


def test_definitions_cannot_be_changed() -> None:
    made = model()
    for thing, field in ((made, "rounds"), (made.view, "name"), (sales, "time"), (mean, "over")):
        with pytest.raises(AttributeError):
            setattr(thing, field, "x")


def test_inputs_are_the_features_and_the_spine_columns_that_are_encoded() -> None:
    made = model(encode={"shop": encoders.Ordinal(), "size": encoders.Log()})
    assert made.inputs == {"sales_by_shop_price_mean_1h": pl.Float32, "shop": pl.String, "size": pl.Float32}
    assert made.name == "demand"
    assert made.horizon == timedelta(days=1)


@pytest.mark.parametrize("absent", ["drop", 0, 1, False, 0.5])
def test_rows_without_a_label_may_be_dropped_or_get_one(absent: Any) -> None:
    assert label(absent=absent).absent == absent


# Splits

END = datetime(2014, 1, 1, tzinfo=UTC)


def day(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def test_lengths_count_back_from_the_end_with_the_embargo_between() -> None:
    split = TimeSplit(validate="60d", test="90d", embargo="1d").resolve(END)
    assert split.test_start == day("2013-10-03")
    assert split.validate_end == day("2013-10-02")
    assert split.validate_start == day("2013-08-03")
    assert split.train_end == day("2013-08-02")
    assert split.cutoff == END


def test_dates_are_the_starts_of_their_parts() -> None:
    split = TimeSplit(validate="2013-08-01", test=date(2013, 10, 1), embargo="12h").resolve(END)
    assert (split.validate_start, split.test_start) == (day("2013-08-01"), day("2013-10-01"))
    assert (split.train_end, split.validate_end) == (day("2013-07-31T12:00"), day("2013-09-30T12:00"))


def test_a_date_and_a_length_may_be_mixed() -> None:
    split = TimeSplit(validate="30d", test="2013-10-01").resolve(END)
    assert (split.validate_start, split.validate_end, split.test_start) == (
        day("2013-09-01"), day("2013-10-01"), day("2013-10-01"),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("split", "end"),
    [
        (TimeSplit("2013-08-01", "2013-10-01"), day("2013-09-01")),  # data end before the test starts
        (TimeSplit("2013-08-01", "2013-10-01"), day("2013-10-01")),
        (TimeSplit("2013-09-30", "2013-10-01", embargo="1d"), END),  # the embargo eats the validation
        (TimeSplit("2013-12-30", "10d"), END),
    ],
)
def test_a_part_without_length_is_refused_when_resolved(split: TimeSplit, end: datetime) -> None:
    with pytest.raises(DefinitionError, match="every part must have a length"):
        split.resolve(end)


# Files of definitions

GOOD = """
import polars as pl
from schemas import Derived, FeatureView, Source
view = FeatureView("v", spine=Source("s", time="t", columns={"a": pl.Int64}), key="a", features=[Derived(x=pl.col("a"))])
"""


def test_a_file_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "my definition.py"
    path.write_text(GOOD)
    definition = load_definition(str(path))
    assert (definition.view.name, definition.model, definition.path) == ("v", None, str(path))
    with pytest.raises(DefinitionError, match="must name a model"):
        definition.require_model()


def test_a_module_is_loaded_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shop_definition.py").write_text(GOOD)
    assert load_definition("shop_definition").view.name == "v"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", r"must name a FeatureView `view`.*there is none.*Write view ="),
        ("view = 5", r"must name a FeatureView `view`.*view=5"),
        ("def f(:", r"must be valid Python; line 1: .*Correct the file"),
        (
            "import no_such_library",
            r"must import only installed modules; there is no module 'no_such_library'.*Install it",
        ),
        ("\nview = FeatureVeiw()", r"must be importable; line 2 .*NameError.*FeatureVeiw"),
        ("from schemas import Trailling", r"must be importable.*ImportError.*Trailling"),
        (GOOD.replace('"t"', '"date"'), r"begin with __.*'date'"),
        (
            GOOD + "from schemas import Source\nview.spine.name = 'x'",
            r"must be importable; line 6 .*FrozenInstanceError",
        ),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "definition.py"
    path.write_text(text)
    with pytest.raises(DefinitionError, match=message):
        load_definition(str(path))


@pytest.mark.parametrize("name", ["no/such/file.py", "no.such.module", "examples.no_such_case"])
def test_a_definition_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DefinitionError, match=r"importable module or a \.py file"):
        load_definition(name)


def test_a_model_of_another_view_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "definition.py"
    path.write_text(
        GOOD
        + """
from schemas import Label, Model, TimeSplit
other = FeatureView("v", spine=view.spine, key="a", features=[Derived(x=pl.col("a") * 7)])
model = Model(other, Label(view.spine, on="a", value=pl.col("a"), within="1d"), TimeSplit("1d", "1d"))
"""
    )
    with pytest.raises(
        DefinitionError,
        match=r"A name must stand for one view; there is 'v' at .*definition.py, line \d+ and, with other content, at .*line \d+",
    ):
        load_definition(str(path))
