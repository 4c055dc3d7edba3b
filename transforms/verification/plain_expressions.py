"""Expressions of a definition evaluated one operation at a time, arithmetic in the widest types.

What computes numbers reads integers as Int64 and floats as Float64, whatever the width of the columns; sums, differences,
products and negatives of integers are taken in 128 bits, and are null where they leave Int64.  All else reads values as they are.
"""

from __future__ import annotations

import io
import json
from typing import Any

import polars as pl

_EXACT = {"Plus": lambda a, b: a + b, "Minus": lambda a, b: a - b, "Multiply": lambda a, b: a * b}
_ARITHMETIC = {*_EXACT, "TrueDivide", "FloorDivide", "Divide", "RustDivide", "TruncDivide", "Modulus"}
# Functions that compute; the name that Polars' written form begins with.
_COMPUTING = {
    "Negate", "Abs", "Pow", "SumHorizontal", "MeanHorizontal", "Log", "Log1p", "Exp", "Trigonometry", "Atan2", "Hypot", "Erf", "Erfc",
}  # fmt: skip


def evaluate(expr: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """The value of `expr` in each row of `frame`."""
    node = json.loads(expr.meta.serialize(format="json"))
    result = _value(node, frame)
    if result.dtype == pl.UInt64 and '"Hash"' in json.dumps(node):
        result = result.reinterpret(signed=True)  # a hash is kept as the integer of the same 64 bits
    return result if len(result) == len(frame) else result.new_from_index(0, len(frame))


def holds(condition: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """Where `condition` is true; null is not."""
    return evaluate(condition, frame).fill_null(False)


def stored(values: pl.Series, dtype: pl.DataType) -> pl.Series:
    """`values` as a feature's stored type: null for what it does not hold, and for what is not finite."""
    result = values.cast(dtype, strict=False)
    return result.set(~result.is_finite().fill_null(True), None) if dtype.is_float() else result


def _wide(values: pl.Series) -> pl.Series:
    """`values` in the widest type of their kind."""
    if values.dtype.is_integer():
        return values.cast(pl.Int128 if values.dtype == pl.UInt64 else pl.Int64)
    return values.cast(pl.Float64) if values.dtype.is_float() else values


def _value(node: Any, frame: pl.DataFrame) -> pl.Series:
    ((kind, body),) = node.items()
    if kind == "Column":
        return frame[body]
    if kind == "Alias":
        return _value(body[0], frame)
    inputs: dict[str, pl.Series] = {}
    over = _over(node, frame, inputs)
    height = pl.Series("__height", [0]).new_from_index(0, len(frame))

    def made(inputs: dict[str, pl.Series]) -> pl.Series:
        operands = pl.DataFrame([height, *(series.alias(name) for name, series in inputs.items())])
        if kind == "BinaryExpr" and body["op"] in _EXACT:
            sides = [operands.select(_expression(over[kind][side])).to_series() for side in ("left", "right")]
            if all(side.dtype.is_integer() for side in sides):
                return _exactly(body["op"], *sides)
        if _is_negative(node) and all(series.dtype.is_integer() for series in inputs.values()):
            return _exactly("Minus", pl.Series([0]), *inputs.values())
        return operands.select(_expression(over).alias("_")).to_series()

    if _computes(node):
        result = made({name: _wide(series) for name, series in inputs.items()})
        return result.cast(pl.Int64, strict=False) if result.dtype.is_integer() else result
    try:
        return made(inputs)
    except pl.exceptions.PolarsError:  # it does not take the wider type of what was computed
        types = {name: _narrow(child, frame) for name, child in zip(inputs, _reading(node), strict=True)}
        return made({name: series.cast(types[name], strict=False) for name, series in inputs.items()})


def _computes(node: Any) -> bool:
    ((kind, body),) = node.items()
    return (kind == "BinaryExpr" and body["op"] in _ARITHMETIC) or (
        kind == "Function" and _name(body["function"]) in _COMPUTING
    )


def _is_negative(node: Any) -> bool:
    return "Function" in node and _name(node["Function"]["function"]) == "Negate"


def _name(function: Any) -> str:
    return function if isinstance(function, str) else str(next(iter(function)))


def _narrow(node: Any, frame: pl.DataFrame) -> pl.DataType:
    """The type that Polars itself gives a part of an expression."""
    return frame.clear().select(_expression(node).alias("_")).to_series().dtype


def _exactly(op: str, left: pl.Series, right: pl.Series) -> pl.Series:
    exact = _EXACT[op](pl.lit(left).cast(pl.Int128), pl.lit(right).cast(pl.Int128))
    return pl.select(exact.cast(pl.Int64, strict=False)).to_series()


def _operands(node: Any) -> list[Any]:
    """The parts of an operation that it computes from."""
    ((kind, body),) = node.items()
    if kind == "Function":
        return list(body["input"])
    names = {"BinaryExpr": ("left", "right"), "Cast": ("expr",), "Ternary": ("predicate", "truthy", "falsy")}
    return [body[name] for name in names.get(kind, ())]


def _reading(node: Any) -> list[Any]:
    """Those that read columns; literals keep their own way of meeting a column's type."""
    return [child for child in _operands(node) if _expression(child).meta.root_names()]


def _over(node: Any, frame: pl.DataFrame, inputs: dict[str, pl.Series]) -> Any:
    """`node` with every operand that reads columns evaluated and replaced by one column of `inputs`."""

    def operand(child: Any) -> Any:
        if not _expression(child).meta.root_names():
            return child
        value, name = _value(child, frame), f"__{len(inputs)}"
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
        return {kind: {name: operand(body[name]) for name in ("predicate", "truthy", "falsy")}}
    return node


def _expression(node: Any) -> pl.Expr:
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")
