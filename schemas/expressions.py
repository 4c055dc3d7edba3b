"""Row-local Polars expressions: which columns they read, whether they depend on other rows, and how they are stored."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import polars as pl

from schemas.errors import DefinitionError, nearest

# Nodes of a serialised Polars expression whose value at a row depends only on that row.  `is_row_separable` is right
# about functions, but not about trees (it accepts `x - x.mean()`), so each function is checked alone.
_PLAIN = {"BinaryExpr", "Cast", "Ternary", "Alias"}
_FUNCTIONS = {
    **dict.fromkeys(
        ("DropNulls", "DropNans", "Explode", "Reshape", "Repeat", "ArgWhere"), "changes the number of rows"
    ),
    "SetSortedFlag": "claims an order of rows",
}
_REASONS = {
    "Agg": "aggregates over all rows of a batch",
    "Over": "aggregates over groups of rows",
    "Window": "aggregates over groups of rows",
    "Rolling": "looks at neighbouring rows",
    "AnonymousFunction": "calls a Python function",
    "AnonymousAgg": "calls a Python function",
    "Filter": "drops rows",
    "Slice": "drops rows",
    "Explode": "changes the number of rows",
    "Sort": "depends on the order of rows",
    "SortBy": "depends on the order of rows",
    "Gather": "reads another row",
    "Len": "counts the rows of a batch",
}
# A part of an expression as Polars serialises it to JSON, in an undocumented form.
Node = Any


def canonical(expr: pl.Expr) -> str:
    """The expression as sorted JSON: equal text, equal values."""
    return json.dumps(serialised(expr), sort_keys=True, separators=(",", ":"))


def passes(expr: pl.Expr, name: str) -> bool:
    """Whether `expr` is the column `name` itself, possibly cast."""
    node = serialised(expr)
    if "Cast" in node:
        node = node["Cast"]["expr"]
    return bool(node == {"Column": name})


def columns_of(expr: pl.Expr) -> list[str]:
    """Names of the columns that `expr` reads, sorted."""
    return sorted(set(expr.meta.root_names()))


def require_row_local(expr: pl.Expr, what: str) -> None:
    """Refuses an expression whose value at one row depends on any other row.

    Raises:
        DefinitionError: names the part at fault, and the reason.
    """
    if not isinstance(expr, pl.Expr):
        raise DefinitionError(f"{what} is a Polars expression", repr(expr), 'Write it with pl.col("…") or pl.lit(…)')
    if expr.meta.has_multiple_outputs():
        raise DefinitionError(f"{what} yields one column", str(expr), "Name a single column instead of a selector")
    try:
        tree = serialised(expr)
    except Exception as error:
        raise DefinitionError(
            f"{what} can be written down (no Python function)", f"{expr}: {error}", "Use Polars' own functions"
        ) from None
    for part, reason in _offences(tree):
        raise DefinitionError(
            f"{what} is row-local: its value at a row comes from that row alone",
            f"{expr}, of which {part} {reason}",
            "History belongs in Trailing or Latest, another table in Lookup",
        )


def dtype_of(expr: pl.Expr, columns: Mapping[str, pl.DataType], what: str) -> pl.DataType:
    """The type of `expr` over `columns`.

    Raises:
        DefinitionError: a column is unknown, or types do not fit.
    """
    for name in columns_of(expr):
        if name not in columns:
            raise DefinitionError(f"{what} reads columns that exist", repr(name), nearest(name, columns))
    try:
        # The expression is evaluated over no rows, because a lazy schema has a type even for the hour of a text.
        return pl.DataFrame(schema=dict(columns)).select(expr.alias("_"))["_"].dtype
    except pl.exceptions.PolarsError as error:
        raise DefinitionError(
            f"{what} fits the types of its columns", str(error).splitlines()[0], "Cast the columns first"
        ) from None


def serialised(expr: pl.Expr) -> Node:
    """The expression as Polars serialises it."""
    return json.loads(expr.meta.serialize(format="json"))


def _offences(node: Node) -> Iterator[tuple[str, str]]:
    """Each part of a serialised expression that depends on other rows, innermost first."""
    if isinstance(node, str):
        yield node, _REASONS.get(node, "is not known to be row-local")
        return
    ((kind, body),) = node.items()
    if kind == "Column":
        return
    if kind == "Literal":
        if isinstance(body, dict) and "Series" in body:
            yield "a literal Series", "carries rows of its own"
        return
    if kind not in _PLAIN and kind != "Function":
        yield _text(node), _REASONS.get(kind, "is not known to be row-local")
        return
    for child in children_of(kind, body):
        yield from _offences(child)
    if kind == "Cast" and "Categorical" in json.dumps(body["dtype"]):
        yield _text(node), "numbers categories by their first row in a batch (use pl.Enum)"
    if kind == "Function":
        yield from _function_offences(node)


def _function_offences(node: Node) -> Iterator[tuple[str, str]]:
    path = function_names(node["Function"]["function"])
    if path[0] in _FUNCTIONS:
        yield _text(node), _FUNCTIONS[path[0]]
    elif any(word in name for name in path for word in ("Sample", "Shuffle", "Random")):
        yield _text(node), "draws at random"
    else:
        try:
            alone = node_expression(node).meta.is_row_separable()
        except pl.exceptions.PolarsError:
            yield _text(node), "is not known to be row-local"
        else:
            if not alone:
                yield _text(node), "depends on other rows of the batch"


def function_names(function: Node) -> list[str]:
    """The names in `{"ListExpr": {"Sample": …}}`, outermost first."""
    if isinstance(function, str):
        return [function]
    if isinstance(function, dict) and len(function) == 1:
        ((name, inner),) = function.items()
        return [name, *function_names(inner)]
    return []


def children_of(kind: str, body: Node) -> Iterator[Node]:
    """The parts of a serialised expression that are expressions."""
    if kind == "Function":
        yield from body["input"]
    elif kind == "Alias":
        yield body[0]
    else:
        yield from (value for key, value in body.items() if key not in ("op", "dtype", "options"))


def node_expression(node: Node) -> pl.Expr:
    """The expression of `serialised`."""
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")


def _text(node: Node) -> str:
    try:
        return str(node_expression(node))
    except Exception:
        return json.dumps(node)[:80]
