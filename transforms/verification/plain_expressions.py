"""Expressions of a definition evaluated one operation at a time, in the widest types.

Every step's result is widened before the next one reads it: integers to Int64, floats to Float64.  Sums, differences and
products of integers are taken in 128 bits, and are null where they leave Int64.
"""

from __future__ import annotations

import io
import json
from typing import Any

import polars as pl

_EXACT = {"Plus", "Minus", "Multiply"}


def evaluate(expr: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """The value of `expr` in each row of `frame`."""
    result = _value(json.loads(expr.meta.serialize(format="json")), frame)
    return result if len(result) == len(frame) else result.new_from_index(0, len(frame))


def holds(condition: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """Where `condition` is true; null is not."""
    return evaluate(condition, frame).fill_null(False)


def stored(values: pl.Series, dtype: pl.DataType) -> pl.Series:
    """`values` as a feature's stored type: null for what it does not hold, and for what is not finite."""
    result = values.cast(dtype, strict=False)
    return result.set(~result.is_finite().fill_null(True), None) if dtype.is_float() else result


def widened(values: pl.Series) -> pl.Series:
    """`values` in the widest type of their kind."""
    if values.dtype.is_integer() and values.dtype != pl.UInt64:
        return values.cast(pl.Int64)
    return values.cast(pl.Float64) if values.dtype.is_float() else values


def _value(node: Any, frame: pl.DataFrame) -> pl.Series:
    if set(node) == {"Column"}:
        return widened(frame[node["Column"]])
    if "Alias" in node:
        return _value(node["Alias"][0], frame)
    inputs: dict[str, pl.Series] = {}
    node = _over(node, frame, inputs)
    height = pl.Series("__height", [0]).new_from_index(0, len(frame))
    operands = pl.DataFrame([height, *(series.alias(name) for name, series in inputs.items())])
    if "BinaryExpr" in node and node["BinaryExpr"]["op"] in _EXACT:
        sides = [operands.select(_expression(node["BinaryExpr"][side])).to_series() for side in ("left", "right")]
        if all(side.dtype.is_integer() for side in sides):
            return _exactly(node["BinaryExpr"]["op"], *sides)
    return widened(operands.select(_expression(node).alias("_")).to_series())


def _exactly(op: str, left: pl.Series, right: pl.Series) -> pl.Series:
    a, b = pl.lit(left).cast(pl.Int128), pl.lit(right).cast(pl.Int128)
    exact = a + b if op == "Plus" else a - b if op == "Minus" else a * b
    return pl.select(exact.cast(pl.Int64, strict=False)).to_series()


def _over(node: Any, frame: pl.DataFrame, inputs: dict[str, pl.Series]) -> Any:
    """`node` with every operand that reads columns evaluated and replaced by one column of `inputs`."""

    def operand(child: Any) -> Any:
        if not _expression(child).meta.root_names():
            return child  # literals keep their own way of meeting a column's type
        value = _value(child, frame)
        name = f"__{len(inputs)}"
        inputs[name] = value if len(value) == len(frame) else value.new_from_index(0, len(frame))
        return {"Column": name}

    ((kind, body),) = node.items()
    if kind == "Function":
        return {kind: {**body, "input": [operand(child) for child in body["input"]]}}
    if kind == "BinaryExpr":
        return {kind: {**body, "left": operand(body["left"]), "right": operand(body["right"])}}
    if kind == "Cast":
        return {kind: {**body, "expr": operand(body["expr"])}}
    if kind == "Ternary":
        return {kind: {name: operand(child) for name, child in body.items()}}
    return node


def _expression(node: Any) -> pl.Expr:
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")
