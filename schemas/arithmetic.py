"""Arithmetic in 64 bits: what `Derived`, `where` and labels compute, whatever the width of the columns.

Polars computes in the types of the columns, where Int32 · Int32 and UInt32 − 10 wrap.  Here every sum, difference,
product, quotient and power of integers is that of the integers themselves, null where int64 cannot hold it; and those
of floats are computed in float64.  Only parts that can differ from Polars are rewritten, as types and bounds decide: 60
times an hour stays within Int32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from schemas.expressions import canonical, children_of, function_names, node_expression, serialised

Bounds = tuple[int, int]
Tree = dict[str, Any]

INT64: Bounds = (-(2**63), 2**63 - 1)
# Int64 columns are assumed to be within these bounds when it is decided whether a feature's meaning has changed: a sum
# of four such values fits.
USUAL: Bounds = (-(2**61), 2**61 - 1)
# The most rows and distinct values of a window.
COUNTED: Bounds = (0, 2**48)
_HUGE = 2**200
_WIDTHS = {pl.Int8: 8, pl.Int16: 16, pl.Int32: 32, pl.Int64: 64, pl.Int128: 128}
_UNSIGNED = {pl.UInt8: 8, pl.UInt16: 16, pl.UInt32: 32, pl.UInt64: 64, pl.UInt128: 128}
_ARITHMETIC = (
    "Plus",
    "Minus",
    "Multiply",
    "TrueDivide",
    "FloorDivide",
    "Divide",
    "RustDivide",
    "TruncDivide",
    "Modulus",
)
# Operations for which float64 and one rounding to float32 give the result that float32 itself gives.
_ROUNDED_ONCE = ("Plus", "Minus", "Multiply", "TrueDivide")
_TRANSCENDENT = ("Log", "Log1p", "Exp", "Trigonometry", "Atan2", "Hypot", "Erf", "Erfc")
# Functions that return one of their inputs unchanged.
_HANDING_ON = ("FillNull", "FillNan", "Coalesce")
# Functions whose result does not depend on how a float is rounded.
_BLIND = ("IsNan", "IsNotNan", "IsNull", "IsNotNull")
_RANGES: dict[str, Bounds] = {
    "Year": (-300_000, 300_000),
    "IsoYear": (-300_000, 300_000),
    "Quarter": (1, 4),
    "Month": (1, 12),
    "Week": (1, 53),
    "WeekDay": (1, 7),
    "Day": (1, 31),
    "OrdinalDay": (1, 366),
    "Hour": (0, 23),
    "Minute": (0, 59),
    "Second": (0, 59),
    "Millisecond": (0, 999),
    "Microsecond": (0, 999_999),
    "Nanosecond": (0, 999_999_999),
    "LenBytes": (0, 2**31),
    "LenChars": (0, 2**31),
    "Length": (0, 2**31),
    "CountMatches": (0, 2**31),
    "Sign": (-1, 1),
    "Hash": (0, 2**64 - 1),
}

# How a value compares with the one that Polars computes in the columns' types: equal; equal after rounding to float32;
# or perhaps different.
EQUAL, ROUNDED, DIFFERS = 0, 1, 2


@dataclasses.dataclass(frozen=True, eq=False)
class Arithmetic:
    """An expression as it is computed.

    Args:
        expr: the expression in 64 bits; the original expression if they cannot differ.
        changed: whether values may differ from those of the original expression, if Int64 columns are within `USUAL`.
        overflow: true in rows in which int64 cannot hold an intermediate number; None if it always can.
        bounds: bounds of the values, if they are integers.
    """

    expr: pl.Expr
    changed: bool
    overflow: pl.Expr | None
    bounds: Bounds | None


def in_64_bits(
    expr: pl.Expr, columns: Mapping[str, pl.DataType], bounds: Mapping[str, Bounds] | None = None, rounded: bool = False
) -> Arithmetic:
    """`expr` over `columns`, computed in int64 and float64.

    Args:
        bounds: bounds of integer columns that are narrower than their types.
        rounded: whether the result is stored as float32, so that only differences in float32 count as changes.
    """
    return _in_64_bits(canonical(expr), tuple(columns.items()), tuple((bounds or {}).items()), rounded)


@functools.lru_cache(1000)
def _in_64_bits(
    text: str, types: tuple[tuple[str, pl.DataType], ...], limits: tuple[tuple[str, Bounds], ...], rounded: bool
) -> Arithmetic:
    node, columns, known = json.loads(text), dict(types), dict(limits)
    expr = node_expression(node)
    allowed = ROUNDED if rounded else EQUAL
    exact = _Visit(columns, known, INT64).node(node)
    usual = _Visit(columns, known, USUAL).node(node)
    guards = [node_expression(each) for each in exact.guards] if exact.status > EQUAL else []
    overflow = None
    if guards:
        overflow = pl.any_horizontal(
            [each.is_not_null() & each.cast(pl.Int64, strict=False).is_null() for each in guards]
        )
    made = node_expression(exact.wide) if exact.status > EQUAL else expr
    changed, bounds = usual.status > allowed, exact.bounds
    if bounds is not None and not _within(bounds, INT64):
        if pl.DataFrame(schema=dict(columns)).select(made.alias("_"))["_"].dtype == pl.UInt64 and "Hash" in json.dumps(
            node
        ):
            # Stored as the signed integer with the same 64 bits: as a number, half of all hashes would be null.
            made, changed = made.reinterpret(signed=True), True
        else:
            beyond = made.is_not_null() & made.cast(pl.Int64, strict=False).is_null()
            overflow = beyond if overflow is None else overflow | beyond
        bounds = INT64
    return Arithmetic(made, changed, overflow, bounds)


def bounds_of(dtype: pl.DataType, int64: Bounds = INT64) -> Bounds | None:
    """The bounds of a column of this type, if it is an integer or boolean type."""
    if dtype == pl.Boolean:
        return (0, 1)
    if dtype == pl.Int64:
        return int64
    for types, signed in ((_WIDTHS, 1), (_UNSIGNED, 0)):
        for each, width in types.items():
            if dtype == each:
                return (-(2 ** (width - 1)), 2 ** (width - 1) - 1) if signed else (0, 2**width - 1)
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class _Value:
    """A part of an expression.

    Args:
        node: the part as it was written.
        dtype: its type in Polars.
        bounds: bounds of its values, if they are integers or booleans.
        status: `EQUAL`, `ROUNDED` or `DIFFERS`.
        wide: the part in 64 bits; `node` itself if nothing in it is computed.
        guards: intermediate numbers of 128 bits that int64 may not hold.
        found: type of `wide` if it differs from `dtype`, such as a list of wider numbers.
    """

    node: Tree
    dtype: pl.DataType
    bounds: Bounds | None
    status: int
    wide: Tree
    guards: tuple[Tree, ...] = ()
    found: pl.DataType | None = None

    @property
    def integer(self) -> bool:
        return self.bounds is not None


class _Visit:
    def __init__(self, columns: Mapping[str, pl.DataType], bounds: Mapping[str, Bounds], int64: Bounds) -> None:
        self.empty, self.known, self.int64 = pl.DataFrame(schema=dict(columns)), bounds, int64

    def dtype(self, node: Tree) -> pl.DataType:
        return self.empty.select(node_expression(node).alias("_"))["_"].dtype

    def node(self, node: Tree) -> _Value:
        ((kind, body),) = node.items()
        dtype = self.dtype(node)
        if kind == "Column":
            limits = self.known.get(body)
            return _Value(node, dtype, _meet(bounds_of(dtype, self.int64), limits), EQUAL, node)
        if kind == "Literal":
            return _Value(node, dtype, _literal(body) or bounds_of(dtype, self.int64), EQUAL, node)
        parts = [self.node(each) for each in children_of(kind, body)]
        if kind == "BinaryExpr" and body["op"] in _ARITHMETIC and _numeric(dtype) and all(map(_counts, parts)):
            return self._binary(node, dtype, body["op"], parts)
        if kind == "Function":
            path = function_names(body["function"])
            made = self._function(node, dtype, path, parts) if _numeric(dtype) else None
            if made is not None:
                return made
        return self._other(node, dtype, kind, parts)

    def _binary(self, node: Tree, dtype: pl.DataType, op: str, parts: Sequence[_Value]) -> _Value:
        if dtype.is_float():
            if op in ("TrueDivide", "FloorDivide", "Modulus") and "Column" not in json.dumps(parts[1].node):
                return self._quotient(node, dtype, op, parts)
            return self._floats(node, dtype, parts, op in _ROUNDED_ONCE)
        left, right = (part.bounds for part in parts)
        assert left is not None
        assert right is not None
        return self._integers(node, dtype, parts, _bounds(op, left, right))

    def _integers(self, node: Tree, dtype: pl.DataType, parts: Sequence[_Value], bounds: Bounds) -> _Value:
        """An operation on integers, in 128 bits if 64 may not be enough."""
        own = bounds_of(dtype)
        assert own is not None
        equal = all(part.status == EQUAL and _within(part.bounds, own) for part in parts) and _within(bounds, own)
        large = not (_within(bounds, INT64) and all(_within(part.bounds, INT64) for part in parts))
        made = _with(node, [_cast(part.wide, "Int128" if large else "Int64") for part in parts])
        guards = tuple(guard for part in parts for guard in part.guards)
        wide = _cast(made, "Int64") if large else made
        guards = (*guards, made) if large else guards
        return _Value(node, dtype, _meet(bounds, self.int64), EQUAL if equal else DIFFERS, wide, guards)

    def _floats(self, node: Tree, dtype: pl.DataType, parts: Sequence[_Value], once: bool) -> _Value:
        """An operation on numbers whose result is a float.

        Args:
            once: whether float64 and then one rounding give the result of float32, for float32 numbers.
        """
        equal = all(part.status == EQUAL for part in parts)
        status = EQUAL if equal else DIFFERS
        if dtype == pl.Float32:
            status = ROUNDED if once and equal and all(map(_of_float32, parts)) else DIFFERS
        guards = tuple(guard for part in parts for guard in part.guards)
        return _Value(node, dtype, None, status, _with(node, [_cast(part.wide, "Float64") for part in parts]), guards)

    def _quotient(self, node: Tree, dtype: pl.DataType, op: str, parts: Sequence[_Value]) -> _Value:
        """A quotient by a constant, its floor, or its remainder.

        Polars multiplies by the constant's inverse, which rounds twice, unless there is only one row: then it divides.
        So a row would have other bits alone than among others.  A division by a column is always a quotient.
        """
        over, under = (node_expression(_cast(part.wide, "Float64")) for part in parts)
        column = serialised(over.is_not_null().cast(pl.Float64) * under)
        made = self._floats(node, dtype, parts, op in _ROUNDED_ONCE)
        # A quotient that is rounded twice is usually the same float32; its floor may be another number.
        differs = ROUNDED if dtype == pl.Float64 and op == "TrueDivide" else DIFFERS
        status = made.status if _power_of_two(parts[1]) else max(made.status, differs)
        return dataclasses.replace(made, status=status, wide=_with(node, [_cast(parts[0].wide, "Float64"), column]))

    def _function(self, node: Tree, dtype: pl.DataType, path: Sequence[str], parts: Sequence[_Value]) -> _Value | None:
        """A function that does arithmetic; None for any other function."""
        name, numbers = path[0], all(map(_counts, parts))
        if not numbers:
            return self._list_sum(node, dtype, path, parts)
        whole = all(part.integer for part in parts) and not dtype.is_float()
        if name == "Negate" and whole:
            (low, high), zero = _known(parts[0]), {"Literal": {"Dyn": {"Int": 0}}}
            minus = {"BinaryExpr": {"left": zero, "op": "Minus", "right": parts[0].node}}
            zeroth = _Value(zero, pl.Int64(), (0, 0), EQUAL, zero)
            made = self._integers(minus, dtype, [zeroth, parts[0]], (-high, -low))
            return dataclasses.replace(made, node=node)
        if name == "Abs" and whole:
            low, high = _known(parts[0])
            return self._integers(
                node, dtype, parts, (0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high)))
            )
        if name == "SumHorizontal":
            if whole:
                every = [_known(part) for part in parts]
                limits = sum(min(low, 0) for low, _ in every), sum(max(high, 0) for _, high in every)
                return self._integers(node, dtype, parts, limits)
            return self._floats(node, dtype, parts, len(parts) <= 2) if dtype.is_float() else None
        if name == "MeanHorizontal" and dtype.is_float():
            return self._floats(node, dtype, parts, False)
        if name == "Pow" and path[-1] == "Generic" and whole:
            return self._power(node, dtype, parts)
        if (name == "Pow" or name in _TRANSCENDENT) and dtype.is_float():
            return self._floats(node, dtype, parts, path[-1] == "Sqrt")
        return None

    def _power(self, node: Tree, dtype: pl.DataType, parts: Sequence[_Value]) -> _Value:
        base, exponent = parts
        (low, high), (least, most) = _known(base), _known(exponent)
        bounds = (-_HUGE, _HUGE)
        if least >= 0 and most <= 200 and max(abs(low), abs(high)) < _HUGE:
            top = max(abs(low), abs(high), 1) ** most
            bounds = (0 if low >= 0 else -top, top)
        if _within(bounds, INT64):
            return self._integers(node, dtype, parts, bounds)
        # 128 bits wrap too: a result that is beyond 2**100 as a float64 is beyond int64, whatever the 128 bits are.
        about = _with(node, [_cast(base.wide, "Float64"), _cast(exponent.wide, "Float64")])
        exact = _with(node, [_cast(base.wide, "Int128"), _cast(exponent.wide, "Int64")])
        chosen = (
            pl.when(node_expression(about).abs() >= 2.0**100).then(pl.lit(2**100)).otherwise(node_expression(exact))
        )
        guard = serialised(chosen)
        guards = (*base.guards, *exponent.guards, guard)
        return _Value(node, dtype, self.int64, DIFFERS, _cast(guard, "Int64"), guards)

    def _list_sum(self, node: Tree, dtype: pl.DataType, path: Sequence[str], parts: Sequence[_Value]) -> _Value | None:
        """The sum of a list's numbers; None for any other function."""
        if tuple(path) != ("ListExpr", "Sum") or len(parts) != 1:
            return None
        inner = (parts[0].found or parts[0].dtype).inner  # type: ignore[attr-defined]
        limits = bounds_of(inner, self.int64)
        if inner == pl.Float32:
            return _Value(
                node, dtype, None, DIFFERS, _with(node, [_cast(parts[0].wide, {"List": "Float64"})]), parts[0].guards
            )
        if limits is None or inner == pl.Boolean:
            return None
        small = _within(limits, (-(2**32), 2**32))  # int64 can hold the sum of fewer than 2**31 of them
        made = _with(node, [_cast(parts[0].wide, {"List": "Int64" if small else "Int128"})])
        narrow = dtype in (pl.Int32, pl.UInt32, pl.UInt64)
        equal = parts[0].status == EQUAL and not narrow and (small or self.int64 != INT64)
        guards = parts[0].guards if small else (*parts[0].guards, made)
        return _Value(
            node, dtype, self.int64, EQUAL if equal else DIFFERS, made if small else _cast(made, "Int64"), guards
        )

    def _other(self, node: Tree, dtype: pl.DataType, kind: str, parts: Sequence[_Value]) -> _Value:
        """Any part that does no arithmetic itself: unchanged, unless a part of it differs."""
        path = function_names(node[kind]["function"]) if kind == "Function" else [kind]
        name = path[0]
        hands_on = name in ("Alias", "Ternary", *_HANDING_ON)
        status = max((part.status for part in parts), default=EQUAL)
        if status == ROUNDED and ((kind == "Cast" and dtype == pl.Float32) or path[-1] in _BLIND):
            status = EQUAL
        if status == ROUNDED and not hands_on:
            status = DIFFERS
        if status == EQUAL:
            return _Value(node, dtype, self._limits(node, dtype, kind, parts), EQUAL, node)
        guards = tuple(guard for part in parts for guard in part.guards if part.status != EQUAL)
        widest = [part.wide if part.status != EQUAL else part.node for part in parts]
        narrow = [
            _cast(new, _type_of(part.node, part.dtype)) if part.status != EQUAL else new
            for part, new in zip(parts, widest, strict=True)
        ]
        made = _with(node, widest)
        try:
            found = self.dtype(made)
        except pl.exceptions.PolarsError:
            found = None
        if found is None or _kind(found) != _kind(dtype):  # it does not accept a wider type
            made, found = _with(node, narrow), dtype
        return _Value(node, dtype, self._limits(node, found, kind, parts), status, made, guards, found)

    def _limits(self, node: Tree, dtype: pl.DataType, kind: str, parts: Sequence[_Value]) -> Bounds | None:
        own = bounds_of(dtype, self.int64)
        if own is None:
            return None
        every = [part.bounds for part in parts]
        if kind == "Cast":
            return own if node[kind]["options"] == "Overflowing" else _meet(own, every[0])
        if kind == "Alias":
            return every[0]
        if kind == "Ternary":
            predicate = node["Ternary"]["predicate"]
            every = [part.bounds for part in parts if part.node is not predicate]
            return _union(every, own)
        if kind != "Function":
            return own
        path = function_names(node[kind]["function"])
        if path[0] in ("FillNull", "Coalesce", "MaxHorizontal", "MinHorizontal"):
            return _union(every, own)
        for name in (
            (path[-1], path[0]) if path[0] != "StructExpr" else ()
        ):  # the fields of a struct have their own names
            if name in _RANGES:
                return _meet((-_HUGE, _HUGE), _RANGES[name])
        return own


def _bounds(op: str, left: Bounds, right: Bounds) -> Bounds:
    (a, b), (c, d) = left, right
    if op == "Plus":
        return a + c, b + d
    if op == "Minus":
        return a - d, b - c
    if op == "Multiply":
        corners = (a * c, a * d, b * c, b * d)
        return min(corners), max(corners)
    most = max(abs(c), abs(d))
    if op == "Modulus":  # it has the divisor's sign, or the number's if the quotient is truncated
        return (0 if c >= 0 and a >= 0 else -most, most)
    far = max(abs(a), abs(b))
    return (0 if a >= 0 and c >= 0 else -far, far)


def _known(part: _Value) -> Bounds:
    assert part.bounds is not None
    return part.bounds


def _within(inner: Bounds | None, outer: Bounds) -> bool:
    return inner is not None and outer[0] <= inner[0] and inner[1] <= outer[1]


def _meet(a: Bounds | None, b: Bounds | None) -> Bounds | None:
    if a is None or b is None:
        return a
    low, high = max(a[0], b[0]), min(a[1], b[1])
    return (low, high) if low <= high else a


def _union(every: Sequence[Bounds | None], own: Bounds) -> Bounds:
    known = [each for each in every if each is not None]
    if len(known) != len(every) or not known:
        return own
    return min(low for low, _ in known), max(high for _, high in known)


def _literal(body: Any) -> Bounds | None:
    value = body.get("Dyn", body.get("Scalar")) if isinstance(body, dict) else None
    if isinstance(value, dict) and len(value) == 1:
        ((kind, number),) = value.items()
        if kind.startswith(("Int", "UInt")) and isinstance(number, int):
            return number, number
    return None


def _of_float32(part: _Value) -> bool:
    """Whether float32 can hold the values exactly."""
    if part.bounds is not None:
        return _within(part.bounds, (-(2**24), 2**24))
    if "Literal" in part.node:
        number = part.node["Literal"].get("Dyn", part.node["Literal"].get("Scalar", {}))
        (value,) = number.values() if isinstance(number, dict) and len(number) == 1 else (None,)
        if isinstance(value, float) and abs(value) < 3e38:
            return struct.unpack("f", struct.pack("f", value))[0] == value or math.isnan(value)
        return False
    return part.dtype == pl.Float32


def _power_of_two(part: _Value) -> bool:
    """Whether the part is a constant whose inverse is exact."""
    if "Literal" not in part.node or not isinstance(part.node["Literal"], dict):
        return False
    number = part.node["Literal"].get("Dyn", {})
    (value,) = number.values() if isinstance(number, dict) and len(number) == 1 else (0,)
    return isinstance(value, int | float) and value != 0 and abs(math.frexp(value)[0]) == 0.5


def _numeric(dtype: pl.DataType) -> bool:
    return dtype.is_integer() or dtype.is_float()


def _counts(part: _Value) -> bool:
    return part.integer or part.dtype.is_float()


def _kind(dtype: pl.DataType) -> str:
    """The kind of a type, apart from its width."""
    if isinstance(dtype, pl.List):
        return f"list of {_kind(dtype.inner)}"  # type: ignore[arg-type]
    if isinstance(dtype, pl.Struct):
        return "; ".join(f"{field.name}: {_kind(field.dtype)}" for field in dtype.fields)  # type: ignore[arg-type]
    return "integer" if dtype.is_integer() else "float" if dtype.is_float() else str(dtype)


def _cast(node: Tree, dtype: Any) -> Tree:
    return {"Cast": {"expr": node, "dtype": {"Literal": dtype}, "options": "NonStrict"}}


def _type_of(node: Tree, dtype: pl.DataType) -> Any:
    """The type that a serialised expression names."""
    return serialised(node_expression(node).cast(dtype))["Cast"]["dtype"]["Literal"]


def _with(node: Tree, parts: Sequence[Tree]) -> Tree:
    """`node` with its children replaced, in their order."""
    ((kind, body),) = node.items()
    left = iter(parts)
    if kind == "Function":
        return {kind: {**body, "input": [next(left) for _ in body["input"]]}}
    if kind == "Alias":
        return {kind: [next(left), *body[1:]]}
    return {kind: {key: value if key in ("op", "dtype", "options") else next(left) for key, value in body.items()}}
