"""Evaluates expressions of a definition one operation at a time, with arithmetic in the widest types.

Arithmetic on integers uses 128 bits, and its result is null where Int64 cannot hold it. Arithmetic on floats uses
Float64. The width of the columns does not matter.  All other operations read values as they are.
"""

from __future__ import annotations

import io
import json

import numpy as np
import polars as pl

from schemas.expressions import Node

# Operations on integers whose result is an integer, and other operations that compute; in Polars' written form, they
# begin with these names.
_WHOLE = {
    "Plus",
    "Minus",
    "Multiply",
    "FloorDivide",
    "Divide",
    "RustDivide",
    "TruncDivide",
    "Modulus",
    "Negate",
    "Abs",
    "Pow",
    "SumHorizontal",
    "ListExpr",
}
_OTHER = {"TrueDivide", "MeanHorizontal", "Log", "Log1p", "Exp", "Trigonometry", "Atan2", "Hypot", "Erf", "Erfc"}
_MINUS = json.loads((0 - pl.col("__0")).meta.serialize(format="json"))
# A power that is beyond this as a float64 does not fit into Int64, even if 128 bits can hold it.
_LARGE = 2.0**100


def evaluate(expr: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """The value of `expr` for each row of `frame`."""
    node = json.loads(expr.meta.serialize(format="json"))
    result = _value(node, frame)
    if result.dtype == pl.UInt64 and '"Hash"' in json.dumps(node):
        result = result.reinterpret(signed=True)  # a hash becomes the signed integer with the same 64 bits
    return result if len(result) == len(frame) else result.new_from_index(0, len(frame))


def where_true(condition: pl.Expr, frame: pl.DataFrame) -> pl.Series:
    """Where `condition` is true; null counts as false."""
    return evaluate(condition, frame).fill_null(False)


def as_stored(values: pl.Series, dtype: pl.DataType) -> pl.Series:
    """Converts `values` to a feature's stored type: null for values that it cannot hold, and for values that are not
    finite."""
    result = values.cast(dtype, strict=False)
    return result.set(~result.is_finite().fill_null(True), None) if dtype.is_float() else result


def _value(node: Node, frame: pl.DataFrame) -> pl.Series:
    ((kind, body),) = node.items()
    if kind == "Column":
        return frame[body]
    if kind == "Alias":
        return _value(body[0], frame)
    what = _computation(node)
    inputs: dict[str, pl.Series] = {}
    # Polars divides differently by a literal than by a column: so an operator gets only columns.
    over = _over(node, frame, inputs, literals=what is not None and kind == "BinaryExpr")
    if what is not None:
        return _computed(what, over, inputs, len(frame))
    try:
        return _made(over, inputs, len(frame))
    except pl.exceptions.PolarsError:  # a membership test does not accept the wider type of a computed value
        types = {name: _narrow(child, frame) for name, child in zip(inputs, _reading(node), strict=True)}
        return _made(over, {name: each.cast(types[name], strict=False) for name, each in inputs.items()}, len(frame))


def _computation(node: Node) -> str | None:
    """The arithmetic that `node` does, if any."""
    ((kind, body),) = node.items()
    if kind == "BinaryExpr":
        return body["op"] if body["op"] in _WHOLE | _OTHER else None
    if kind != "Function":
        return None
    function = body["function"]
    name = function if isinstance(function, str) else str(next(iter(function)))
    if name == "ListExpr":
        return name if function[name] == "Sum" else None
    return name if name in _WHOLE | _OTHER else None


def _computed(what: str, node: Node, inputs: dict[str, pl.Series], height: int) -> pl.Series:
    if what == "TrueDivide" and all(each.dtype.is_numeric() for each in inputs.values()):
        return _quotient(*inputs.values())
    wide = {name: _wide(each, whole=what in _WHOLE) for name, each in inputs.items()}
    if what == "Negate" and all(each.dtype == pl.Int128 for each in wide.values()):
        node = _MINUS  # Polars cannot negate integers of 128 bits
    result = _made(node, wide, height)
    if not result.dtype.is_integer():
        return result
    if what == "Pow":
        about = _made(node, {name: _wide(each, whole=False) for name, each in inputs.items()}, height).cast(pl.Float64)
        result = result.set((about.abs() >= _LARGE).fill_null(False), None)
    return result.cast(pl.Int64, strict=False)


def _made(node: Node, inputs: dict[str, pl.Series], height: int) -> pl.Series:
    rows = pl.Series("__height", [0]).new_from_index(0, height)
    operands = pl.DataFrame([rows, *(series.alias(name) for name, series in inputs.items())])
    return operands.select(_expression(node).alias("_")).to_series()


def _quotient(left: pl.Series, right: pl.Series) -> pl.Series:
    """The quotient of each pair of numbers, rounded once."""
    with np.errstate(all="ignore"):
        a, b = (side.cast(pl.Float64).fill_null(np.nan).to_numpy() for side in (left, right))
        result = pl.Series(a / b)
    return result.set(left.is_null() | right.is_null(), None)


def _wide(values: pl.Series, whole: bool) -> pl.Series:
    """`values` in the widest type of their kind; integers stay integers only if `whole`."""
    dtype = values.dtype
    inner = dtype.inner if isinstance(dtype, pl.List) else dtype
    if inner.is_integer():
        wide: pl.DataType = pl.Int128() if whole else pl.Float64()
    elif inner.is_float():
        wide = pl.Float64()
    else:
        return values
    return values.cast(pl.List(wide) if isinstance(dtype, pl.List) else wide)


def _narrow(node: Node, frame: pl.DataFrame) -> pl.DataType:
    """The type that Polars gives to a part of an expression."""
    return frame.clear().select(_expression(node).alias("_")).to_series().dtype


def _operands(node: Node) -> list[Node]:
    """The operands of an operation."""
    ((kind, body),) = node.items()
    if kind == "Function":
        return list(body["input"])
    names = {"BinaryExpr": ("left", "right"), "Cast": ("expr",), "Ternary": ("predicate", "truthy", "falsy")}
    return [body[name] for name in names.get(kind, ())]


def _reading(node: Node) -> list[Node]:
    """The operands that read columns; literals adapt to the type of a column by themselves."""
    return [child for child in _operands(node) if _expression(child).meta.root_names()]


def _over(node: Node, frame: pl.DataFrame, inputs: dict[str, pl.Series], literals: bool) -> Node:
    """`node` with every operand that reads columns (and literals too, if `literals`) evaluated, and replaced by a
    column of `inputs`.
    """

    def operand(child: Node) -> Node:
        if _expression(child).meta.root_names():
            value = _value(child, frame)
        elif literals:
            value = pl.select(_expression(child)).to_series()
        else:
            return child
        name = f"__{len(inputs)}"
        inputs[name] = value if len(value) == len(frame) else value.new_from_index(0, len(frame))
        # Some functions use the names of their operands, for example for the fields of a struct.
        return {"Alias": [{"Column": name}, _expression(child).meta.output_name()]}

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


def _expression(node: Node) -> pl.Expr:
    return pl.Expr.deserialize(io.StringIO(json.dumps(node)), format="json")
