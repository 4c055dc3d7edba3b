"""Encoders between the feature table, which stays unencoded, and the model's matrix.

They are fitted on the training split (`transforms/fitting.py`), saved as JSON with the model, and applied by one
vectorised function to training examples, batches and live requests.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from schemas import encoders
from schemas.errors import DataError, MismatchError, nearest
from transforms.ids import hash_column
from transforms.sums import Floats

Matrix = npt.NDArray[np.float32]
_LARGEST = float(np.finfo(np.float32).max)
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Encoding:
    """One input, its encoder (None passes a number through) and what was fitted for it.

    Args:
        input: column of the feature table.
        type: its Arrow type.
        encoder: as declared.
        state: what was fitted, as JSON values.
    """

    input: str
    type: str
    encoder: encoders.Encoder | None = None
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Columns of the matrix made from this input."""
        if isinstance(self.encoder, encoders.OneHot):
            return [f"{self.input}={category}" for category in (*self.state["categories"], "*")]
        return [self.input]

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
        else:
            matrix[:, 0] = _missing_unless_finite(self._number(numbers(column)))

    def _number(self, values: Floats) -> Floats:
        encoder, state = self.encoder, self.state
        if isinstance(encoder, encoders.Standardize | encoders.MinMax | encoders.Robust):
            scaled: Floats = (values - state["offset"]) / state["scale"]
            return scaled
        if isinstance(encoder, encoders.Bucketize):
            bucket = np.searchsorted(np.array(state["boundaries"], np.float64), values, side="right")
            return np.where(np.isnan(values), np.nan, bucket)
        if isinstance(encoder, encoders.Log):
            # Arrow takes one value at a time from the C library; NumPy's vectors need not agree with its remainders.
            inside = pa.array(np.where(values > -1, values, 0.0))
            logs: Floats = pc.log1p(inside).to_numpy()
            return np.where(values > -1, logs, np.nan)
        if isinstance(encoder, encoders.Impute):
            return np.where(np.isnan(values), state["value"], values)
        return values


@dataclasses.dataclass(frozen=True)
class Fitted:
    """All inputs of a model, ready to encode."""

    encodings: tuple[Encoding, ...]

    @functools.cached_property
    def names(self) -> list[str]:
        """Columns of the matrix, unique, and free of what XGBoost refuses in names."""
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
        """The model's matrix: float32, C-contiguous, [rows, len(names)].

        Missing is NaN, and so is a number beyond float32.  A row's values depend on that row alone, to the last bit.

        Raises:
            MismatchError: an input is not in `batch`, or of another type.
        """
        columns = [column_of(batch, each) for each in self.encodings]
        matrix = np.empty((batch.num_rows, sum(len(each.names) for each in self.encodings)), np.float32)
        place = 0
        for each, column in zip(self.encodings, columns):
            width = len(each.names)
            each.write(column, matrix[:, place : place + width])
            place += width
        return matrix

    def to_json(self) -> str:
        """Equal text, equal encoders."""
        inputs = [
            {"input": each.input, "type": each.type, "encoder": _declared(each.encoder), "state": dict(each.state)}
            for each in self.encodings
        ]
        return json.dumps({"format": _FORMAT, "inputs": inputs}, sort_keys=True, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Fitted:
        """What `to_json` wrote.

        Raises:
            MismatchError: written by another version of Millrace.
        """
        content = json.loads(text)
        if content.get("format") != _FORMAT:
            raise MismatchError(
                f"Encoders are in format {_FORMAT}",
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


def column_of(batch: pa.RecordBatch, each: Encoding) -> pa.Array:
    """The input's column, of the type it was trained with (strings may come large or coded)."""
    place = batch.schema.get_field_index(each.input)
    if place < 0:
        raise MismatchError(
            "A batch has every input of the model", repr(each.input), nearest(each.input, batch.schema.names)
        )
    column = batch.column(place)
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


def numbers(column: pa.Array) -> Floats:
    """A numeric or boolean column as doubles; null, NaN and what float32 cannot hold as NaN."""
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    # Always by way of doubles: an integer column of one batch has nulls and that of the next has none.
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return _missing_unless_finite(values)


def _missing_unless_finite(values: Floats) -> Floats:
    outside = np.abs(values) > _LARGEST
    return np.where(outside, np.nan, values) if outside.any() else values


def texts(column: pa.Array) -> pa.Array:
    """A column as categories: strings as they are, other types as text; NaN is null."""
    if pa.types.is_string(column.type):
        return column
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.int64())
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False) + 0.0
        column = pa.array(values, mask=np.isnan(values))
    return column.cast(pa.string())


def _codes(column: pa.Array, categories: pa.Array) -> Matrix:
    """Place of each category, their number for unseen ones, NaN for null."""
    strings = texts(column)
    codes = pc.fill_null(pc.index_in(strings, value_set=categories), len(categories)).to_numpy(zero_copy_only=False)
    result: Matrix = codes.astype(np.float32)
    if strings.null_count:
        result[strings.is_null().to_numpy(zero_copy_only=False)] = np.nan
    return result


def _hashed(column: pa.Array, buckets: int) -> Matrix:
    """`transforms.ids.hash_column` of each text, modulo `buckets`; NaN for null."""
    coded = texts(column).dictionary_encode()
    hashes = hash_column(pl.Series(pl.from_arrow(coded.dictionary)))
    places = np.append((hashes % np.uint64(buckets)).astype(np.float32), np.float32(np.nan))
    result: Matrix = places[pc.fill_null(coded.indices, len(hashes)).to_numpy(zero_copy_only=False)]
    return result


def _declared(encoder: encoders.Encoder | None) -> dict[str, Any] | None:
    return None if encoder is None else {"kind": type(encoder).__name__, **dataclasses.asdict(encoder)}


def _encoder(content: dict[str, Any] | None) -> encoders.Encoder | None:
    if content is None:
        return None
    kinds = {kind.__name__: kind for kind in (*encoders.CATEGORICAL, *encoders.NUMERIC)}
    kind = kinds.get(content["kind"])
    if kind is None:
        raise DataError("An encoder is one this version knows", content["kind"], nearest(content["kind"], kinds))
    return kind(**{name: value for name, value in content.items() if name != "kind"})
