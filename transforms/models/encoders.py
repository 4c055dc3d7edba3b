"""Encoders between the feature table, which stays unencoded, and the model's matrix.

They are fitted on the training split (`transforms/training/fit_encoders.py`) and saved as JSON with the model.  One
vectorised function applies them to training examples, batches and live requests.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas import encoders
from schemas.errors import DataError, MismatchError, nearest
from transforms.records.arrays import Bools, Floats, Ints
from transforms.records.row_hashing import hash_column

log = logging.getLogger("millrace.training")

Matrix = npt.NDArray[np.float32]
_LARGEST = float(np.finfo(np.float32).max)
# The first format is written if no input is split or shifted, so that earlier versions can read it; see
# `Encoding.state`.
_FORMAT, _WHOLE_FORMAT = 1, 2
# float32 has every whole number up to this one; beyond it, neighbours become equal.
EXACT = 1 << 24
# The range of integers that one and two float32 columns represent as their sum; three represent any (see
# `columns_needed`).
_PARTS = ((1, 1 << 24), (2, 1 << 48))


class EncoderState(TypedDict, total=False):
    """The fitted state of one input, as `encoders.json` has it; which keys there are depends on the encoder.

    Args:
        categories: of an ordinal, one-hot or target encoder; `means` of the label go with them.
        prior: mean of the label over all rows.
        offset, scale, rest: a value is encoded as (value - offset - rest) / scale.
        boundaries: of buckets; integers if `whole`.
        value: the value that replaces null.
        base: integer that is subtracted from integers beyond 2^24 before they become floats.
        columns: number of float32 columns whose sum is a value that is passed through or imputed.
    """

    categories: list[str]
    means: list[float]
    prior: float
    offset: float
    scale: float
    rest: float
    boundaries: list[float] | list[int]
    whole: bool
    value: float
    base: int
    columns: int


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One input, its encoder, and the encoder's fitted state.

    Args:
        input: column of the feature table.
        type: its Arrow type.
        encoder: the declared encoder; None passes a number through.
        state: the fitted state.
    """

    input: str
    type: str
    encoder: encoders.Encoder | None = None
    state: EncoderState = dataclasses.field(default_factory=lambda: EncoderState())

    @property
    def names(self) -> list[str]:
        """Names of the matrix columns of this input."""
        if isinstance(self.encoder, encoders.OneHot):
            return [f"{self.input}={category}" for category in (*self.state["categories"], "*")]
        return [self.input, *(f"{self.input} rest {i}" for i in range(1, self.state.get("columns", 1)))]

    @functools.cached_property
    def categories(self) -> pa.Array:
        return pa.array(self.state["categories"], pa.string())

    def write(self, column: pa.Array, matrix: Matrix) -> None:
        """Encode `column` into `matrix` [rows, len(names)]."""
        encoder = self.encoder
        if isinstance(encoder, encoders.Ordinal):
            codes = _codes(column, self.categories)
            if isinstance(encoder, encoders.OneHot):
                matrix[:] = codes[:, None] == np.arange(matrix.shape[1], dtype=np.float32)
            else:
                matrix[:, 0] = codes
        elif isinstance(encoder, encoders.Hashing):
            matrix[:, 0] = _hashed(column, encoder.buckets)
        elif isinstance(encoder, encoders.Target):
            means = np.array([*self.state["means"], self.state["prior"], np.nan])
            codes = _codes(column, self.categories)
            matrix[:, 0] = means[np.where(np.isnan(codes), len(means) - 1, codes).astype(np.int64)]
        elif "columns" in self.state and "base" in self.state:
            self._write_whole(column, matrix)
        elif "columns" in self.state:
            left = self._number(as_doubles(column))
            for position in range(matrix.shape[1]):
                matrix[:, position] = left
                left = left - matrix[:, position]
        elif self.state.get("whole"):
            whole, known = as_int64(column)
            bucket = np.searchsorted(np.array(self.state["boundaries"], np.int64), whole, side="right")
            matrix[:, 0] = np.where(known, bucket, np.nan)
        elif "base" in self.state:
            whole, known = as_int64(column)
            values = (_difference(whole, self.state["base"]) - self.state["offset"]) / self.state["scale"]
            matrix[:, 0] = _missing_unless_finite(np.where(known, values, np.nan))
        else:
            matrix[:, 0] = _missing_unless_finite(self._number(as_doubles(column)))

    def _write_whole(self, column: pa.Array, matrix: Matrix) -> None:
        """x − base as a sum of float32s: the nearest one, the nearest to the remainder, and so on."""
        base, (whole, known) = self.state["base"], as_int64(column)
        # Arithmetic modulo 2^64 suffices for the remainder, which is less than 2^41.
        left = whole.view(np.uint64) - np.uint64(base % (1 << 64))
        nearest = _difference(whole, base)
        for position in range(matrix.shape[1]):
            if position:
                nearest = left.view(np.int64).astype(np.float64)
            matrix[:, position] = nearest
            taken = matrix[:, position].astype(np.float64)
            high = np.floor(taken / 2**32)
            left = left - (
                (high.astype(np.int64).view(np.uint64) << np.uint64(32)) + (taken - high * 2**32).astype(np.uint64)
            )
        if (lost := np.flatnonzero((left != 0) & known)).size and self.input not in _warned:
            _warned.add(self.input)
            log.warning(
                "input %r has %d values in this batch, such as %d, so far outside the training split's that float32 "
                "merges neighbours: no tree was trained to separate them",
                self.input,
                lost.size,
                int(whole[lost[0]]),
            )
        if not known.all():
            matrix[~known] = np.nan
            if "value" in self.state:
                rest = self.state["value"]
                for position in range(matrix.shape[1]):
                    matrix[~known, position] = rest
                    rest -= float(np.float32(rest))

    def _number(self, values: Floats) -> Floats:
        encoder, state = self.encoder, self.state
        if isinstance(encoder, encoders.Standardize | encoders.MinMax | encoders.Robust):
            # `rest` extends a double's offset: a mean of 53 bits is not exact enough for values that lie close
            # together.
            scaled: Floats = (values - state["offset"] - state.get("rest", 0.0)) / state["scale"]
            return scaled
        if isinstance(encoder, encoders.Bucketize):
            bucket = np.searchsorted(np.array(state["boundaries"], np.float64), values, side="right")
            return np.where(np.isnan(values), np.nan, bucket)
        if isinstance(encoder, encoders.Log):
            # Arrow calls the C library for each value.  NumPy's vector code may give other bits than its scalar code.
            inside = pa.array(np.where(values > -1, values, 0.0))
            logs: Floats = pc.log1p(inside).to_numpy()
            return np.where(values > -1, logs, np.nan)
        if isinstance(encoder, encoders.Impute):
            return np.where(np.isnan(values), state["value"], values)
        return values


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The fitted encoders of all inputs of a model."""

    encodings: tuple[Encoding, ...]

    @functools.cached_property
    def names(self) -> list[str]:
        """Unique names of the matrix columns, without characters that XGBoost refuses."""
        result: dict[str, None] = {}
        for name in (name for each in self.encodings for name in each.names):
            unique = name.translate(_RENAME)
            while unique in result:
                unique += "_"
            result[unique] = None
        return list(result)

    @property
    def types(self) -> list[str]:
        """XGBoost's feature types: "c" for a native category, "q" for a number."""
        return [
            "c" if isinstance(each.encoder, encoders.Native) else "q" for each in self.encodings for _ in each.names
        ]

    @property
    def inputs(self) -> dict[str, str]:
        """Input column to its Arrow type."""
        return {each.input: each.type for each in self.encodings}

    def apply(self, batch: pa.RecordBatch) -> Matrix:
        """Encode a batch as the model's matrix: float32, C-contiguous, [rows, len(names)].

        A missing value is NaN, and so is a number beyond float32.  A row's values depend only on that row, to the last
        bit.

        Raises:
            MismatchError: an input is not in `batch`, or has another type.
        """
        columns = [input_column(batch, each) for each in self.encodings]
        matrix = np.empty((batch.num_rows, sum(len(each.names) for each in self.encodings)), np.float32)
        position = 0
        for each, column in zip(self.encodings, columns):
            width = len(each.names)
            each.write(column, matrix[:, position : position + width])
            position += width
        return matrix

    def to_json(self) -> str:
        """The encoders as JSON; equal encoders give equal text."""
        inputs = [
            {"input": each.input, "type": each.type, "encoder": _declared(each.encoder), "state": dict(each.state)}
            for each in self.encodings
        ]
        whole = any({"base", "columns", "whole", "rest"} & set(each.state) for each in self.encodings)
        content = {"format": _WHOLE_FORMAT if whole else _FORMAT, "inputs": inputs}
        return json.dumps(content, sort_keys=True, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Fitted:
        """Read the encoders that `to_json` wrote.

        Raises:
            MismatchError: another version of Millrace wrote them.
        """
        content = json.loads(text)
        if content.get("format") not in (_FORMAT, _WHOLE_FORMAT):
            raise MismatchError(
                f"Encoders are in format {_FORMAT} or {_WHOLE_FORMAT}",
                content.get("format"),
                "Use the version of Millrace that trained the model",
            )
        return cls(
            tuple(
                Encoding(each["input"], each["type"], _encoder(each["encoder"]), each["state"])
                for each in content["inputs"]
            )
        )


_RENAME = str.maketrans({"[": "(", "]": ")", "<": "‹"})


def input_column(batch: pa.RecordBatch, each: Encoding) -> pa.Array:
    """The input's column, in the type of its training (strings may be large or dictionary-encoded)."""
    position = batch.schema.get_field_index(each.input)
    if position < 0:
        raise MismatchError(
            "A batch has every input of the model", repr(each.input), nearest(each.input, batch.schema.names)
        )
    column = batch.column(position)
    kind = str(column.type)
    if kind != each.type:
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        if each.type != "string" or column.type not in (pa.string(), pa.large_string()):
            raise MismatchError(
                f"Input {each.input!r} has the type it was trained with, {each.type}",
                kind,
                "Use the feature table of the model's view",
            )
    return column


def as_doubles(column: pa.Array) -> Floats:
    """A numeric or boolean column as doubles; NaN for null, NaN and values beyond float32."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    # Always through doubles, since an integer column may have nulls in one batch and none in the next.
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return _missing_unless_finite(values)


def is_whole(kind: str) -> bool:
    """Whether a column of this Arrow type, given as text, can have integers beyond 2^24."""
    return kind in ("int32", "int64")


def as_int64(column: pa.Array) -> tuple[Ints, Bools]:
    """An integer column as int64, with 0 for null, and whether each value is known."""
    known = column.is_valid().to_numpy(zero_copy_only=False)
    values = (pc.fill_null(column, 0) if column.null_count else column).to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(values, np.int64), known


def columns_needed(least: int, greatest: int) -> int:
    """How many float32 columns represent x − least exactly for every integer from `least` to `greatest`.

    A float32 has 24 bits.  Its remainder of a number below 2^48 is at most 2^23.  Its remainder of a number of 64 bits
    is at most 2^40, of which a second float32 leaves at most 2^16.
    """
    return next((count for count, bound in _PARTS if greatest - least <= bound), 3)


def _difference(whole: Ints, base: int) -> Floats:
    """x − base as the nearest double, without overflow."""
    high, low = (whole >> 32) - (base >> 32), (whole & 0xFFFFFFFF) - (base & 0xFFFFFFFF)
    return high * 2.0**32 + low


# Inputs about which this process has already warned.
_warned: set[str] = set()


def _missing_unless_finite(values: Floats) -> Floats:
    outside = np.abs(values) > _LARGEST
    return np.where(outside, np.nan, values) if outside.any() else values


def as_categories(column: pa.Array) -> pa.Array:
    """A column as categories: strings unchanged, other types as text; NaN becomes null."""
    return column if pa.types.is_string(column.type) else as_distinct_values(column).cast(pa.string())


def as_distinct_values(column: pa.Array) -> pa.Array:
    """A column whose values are equal if their texts are equal: 0.0 replaces -0.0, and null replaces NaN."""
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False) + 0.0
        return pa.array(values, mask=np.isnan(values))
    return column


def _codes(column: pa.Array, categories: pa.Array) -> Matrix:
    """Position of each category as a float32; the number of categories for an unseen one, NaN for null."""
    strings = as_categories(column)
    codes = pc.fill_null(pc.index_in(strings, value_set=categories), len(categories)).to_numpy(zero_copy_only=False)
    result: Matrix = codes.astype(np.float32)
    if strings.null_count:
        result[strings.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return result


def _hashed(column: pa.Array, buckets: int) -> Matrix:
    """`transforms.records.row_hashing.hash_column` of each text, modulo `buckets`; NaN for null."""
    coded = as_categories(column).dictionary_encode()
    hashes = hash_column(pl.Series(pl.from_arrow(coded.dictionary)))
    positions = np.append((hashes % np.uint64(buckets)).astype(np.float32), np.float32(np.nan))
    result: Matrix = positions[pc.fill_null(coded.indices, len(hashes)).to_numpy(zero_copy_only=False)]
    return result


def _declared(encoder: encoders.Encoder | None) -> dict[str, object] | None:
    return None if encoder is None else {"kind": type(encoder).__name__, **dataclasses.asdict(encoder)}


def _encoder(content: dict[str, Any] | None) -> encoders.Encoder | None:
    if content is None:
        return None
    kinds = {kind.__name__: kind for kind in (*encoders.CATEGORICAL, *encoders.NUMERIC)}
    kind = kinds.get(content["kind"])
    if kind is None:
        raise DataError("An encoder is one this version knows", content["kind"], nearest(content["kind"], kinds))
    return kind(**{name: value for name, value in content.items() if name != "kind"})
