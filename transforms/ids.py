"""Stable 64-bit ids of rows: the same on every machine, in every process, in every version of the libraries.

Method: splitmix64 (Steele, Lea & Flood 2014) as the mixer; strings by FNV-1a over their UTF-8 bytes, one vectorised step per byte position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

UInt64s = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0x6E756C6C6E756C6C)


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser, a bijection on 64 bits."""
    with np.errstate(over="ignore"):
        z = np.atleast_1d(values + _GOLDEN)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            z ^= z >> np.uint64(shift)
            z *= np.uint64(factor)
        z ^= z >> np.uint64(31)
        return z


def hash_text(text: str) -> np.uint64:
    """Hash of one string, equal to `hash_column` of a column that holds it."""
    return hash_column(pl.Series([text]))[0]


def hash_column(column: pl.Series) -> UInt64s:
    """Hash per value of an integer, number, boolean, date, time or string column."""
    if column.dtype == pl.String:
        result = _hash_strings(column) if len(column) < 1000 else _hash_levels(column)
    elif column.dtype.is_float():
        # Adding zero makes −0.0 the same as 0.0, and every NaN is one.
        floats = column.cast(pl.Float64).fill_null(0.0).to_numpy() + 0.0
        result = mix(np.where(np.isnan(floats), np.nan, floats).view(np.uint64))
    else:
        numbers = column.to_physical().cast(pl.Int64).fill_null(0)
        result = mix(numbers.to_numpy().view(np.uint64))
    return np.where(column.is_null().to_numpy(), _NULL, result) if column.null_count() else result


def _hash_levels(column: pl.Series) -> UInt64s:
    """As `_hash_strings`, of each distinct value once."""
    coded = column.fill_null("").cast(pl.Categorical(pl.Categories.random()))
    levels, codes = coded.unique(), coded.to_physical().to_numpy()
    table = np.zeros(int(codes.max()) + 1, np.uint64)
    table[levels.to_physical().to_numpy()] = _hash_strings(levels.cast(pl.String))
    return table[codes]


def _hash_strings(column: pl.Series) -> UInt64s:
    array = column.fill_null("").to_arrow().cast(pa.large_binary())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    raw = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    starts, lengths = offsets[:-1], np.diff(offsets)
    state = np.full(len(lengths), 0xCBF29CE484222325, np.uint64)
    with np.errstate(over="ignore"):
        for position in range(int(lengths.max(initial=0))):
            longer = np.flatnonzero(lengths > position)
            state[longer] = (state[longer] ^ raw[starts[longer] + position]) * np.uint64(0x100000001B3)
    return mix(state ^ lengths.astype(np.uint64))


def combine(parts: Sequence[UInt64s | np.uint64]) -> UInt64s:
    """One hash of several, order-sensitive."""
    state: UInt64s = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = mix(state * np.uint64(31) + np.asarray(part, np.uint64))
    return state


def row_ids(salt: str, columns: Sequence[pl.Series]) -> pl.Series:
    """`row_id` (int64) of rows named by `columns`: for a spine row the salt is its view, the columns its key and time."""
    return pl.Series("row_id", combine([hash_text(salt), *(hash_column(column) for column in columns)]).view(np.int64))


def prediction_ids(model: str, arm: pl.Series, row_id: pl.Series) -> pl.Series:
    """`prediction_id` (int64) of a row's prediction by a model's arm."""
    return row_ids(model, [arm, row_id]).alias("prediction_id")
