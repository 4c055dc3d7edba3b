"""Tests of a definition without files: a few rows as literals, their features, and a comparison that is easy to read.

>>> import polars as pl
>>> from schemas import FeatureView, Source, Trailing
>>> orders = Source("orders", time="at", columns={"id": pl.Int64, "price": pl.Float64})
>>> sales = Source("sales", time="at", columns={"id": pl.Int64})
>>> count = Trailing(sales, by="id", over="2d", stats={"*": "count"})
>>> view = FeatureView("v", spine=orders, key="id", features=[count])
>>> found = features(view, [{"id": 1, "at": "2024-01-03"}], sales=[{"id": 1, "at": "2024-01-02"}])
>>> found[0]["sales_by_id_count_2d"]
1
>>> expect(found, [{"id": 1, "sales_by_id_count_2d": 1}])
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime

import polars as pl

from schemas.durations import instant
from schemas.errors import DefinitionError, nearest
from schemas.sources import TIME, Source
from schemas.views import FeatureView

Row = Mapping[str, object]


def features(view: FeatureView, spine: Iterable[Row], **sources: Iterable[Row]) -> list[dict[str, object]]:
    """The features of spine rows, computed by the kernel that runs use, in the order in which the rows are given.

    A row is a mapping from column to value; columns that are left out are null.  A time is a datetime, or text such as
    `"2024-01-31"` or `"2024-01-31T10:00+00:00"`.

    Args:
        view: the view.
        spine: rows of its spine.
        sources: rows of the other sources, by name; a source that is left out has none.

    Returns:
        Per spine row its key, its time and its features.

    Raises:
        DefinitionError: a source or a column that is not declared, or a value of another type.
        ContractError: a row that a run would reject.
    """
    known = {name: source for name, source in view.sources.items() if source is not view.spine}
    for name in sources:
        if name not in known:
            raise DefinitionError(
                f"Rows must be of sources that view {view.name!r} reads beside its spine: {', '.join(known) or 'none'}",
                f"there is no {name!r}",
                nearest(name, known),
            )
    tables = {name: rows_of(source, sources.get(name, ())) for name, source in known.items()}
    tables[view.spine.name] = rows_of(view.spine, spine)
    # `schemas` imports nothing of Millrace; the kernel is looked up when it is needed.
    computed = importlib.import_module("transforms.features.literal_rows").features_of_rows(view, tables)
    names = [*view.key, view.time, *view.feature_names]
    return list(computed.select(list(dict.fromkeys(names))).iter_rows(named=True))


def rows_of(source: Source, rows: Iterable[Row]) -> pl.DataFrame:
    """Literal rows as a frame with all declared columns of the source.

    Raises:
        DefinitionError: a column that is not declared, or a value of another type.
    """
    values: dict[str, list[object]] = {name: [] for name in source.schema}
    for row in rows:
        for name in row:
            source.require((name,), "A literal row")
        for name, dtype in source.schema.items():
            values[name].append(_value(source, name, dtype, row.get(name)))
    columns = []
    for name, dtype in source.schema.items():
        try:
            columns.append(pl.Series(name, values[name], dtype=dtype, strict=True))
        except (TypeError, OverflowError, pl.exceptions.PolarsError):
            wrong = next(value for value in values[name] if not _fits(value, dtype))
            raise DefinitionError(
                f"Source {source.name!r}: {name!r} must be {dtype}", f"it is {wrong!r}", "Correct it"
            ) from None
    return pl.DataFrame(columns)


def _value(source: Source, name: str, dtype: pl.DataType, value: object) -> object:
    what = f"Source {source.name!r}: {name!r}"
    if value is None or dtype not in (TIME, pl.Date):
        return float(value) if dtype.is_float() and isinstance(value, int) and not isinstance(value, bool) else value
    if isinstance(value, str | date | datetime):
        moment = instant(value, what)
        return moment if dtype == TIME else moment.date()
    raise DefinitionError(f"{what} must be a time or a date", f"it is {value!r}", 'Write it like "2024-01-31"')


def _fits(value: object, dtype: pl.DataType) -> bool:
    try:
        pl.Series([value], dtype=dtype, strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return False
    return True


def expect(found: Sequence[Row], expected: Sequence[Row]) -> None:
    """Check that rows have the expected values; columns that `expected` leaves out are not compared.

    Rows are compared in order.  A float equals a number that rounds to the same float32.

    Raises:
        AssertionError: values differ; each is listed with its row and column.
    """
    lines = []
    if len(found) != len(expected):
        lines.append(f"{len(expected)} rows expected, {len(found)} found")
    for number, (row, wanted) in enumerate(zip(found, expected, strict=False)):
        for name, value in wanted.items():
            if name not in row:
                lines.append(f"row {number}: there is no {name!r}. {nearest(name, row)}")
            elif not _same(row[name], value):
                lines.append(f"row {number}, {name}: {_text(value)} expected, {_text(row[name])} found")
    if lines:
        raise AssertionError("\n".join(["features are not as expected", *(f"  {line}" for line in lines)]))


def _same(found: object, wanted: object) -> bool:
    if isinstance(found, datetime) and isinstance(wanted, str | date):
        return found == instant(wanted)
    if isinstance(found, float) and isinstance(wanted, int | float) and not isinstance(wanted, bool):
        single = pl.Series([float(wanted), found], dtype=pl.Float64).cast(pl.Float32)
        return bool(single[0] == single[1]) or (math.isnan(found) and math.isnan(wanted))
    return type(found) is type(wanted) and found == wanted


def _text(value: object) -> str:
    return "null" if value is None else value.isoformat() if isinstance(value, datetime) else repr(value)
