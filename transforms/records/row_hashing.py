"""Stable 64-bit row ids: the same on every machine, in every process and with every version of the libraries.

Strings are hashed with XXH3 (64 bits, seed 0; frozen since xxHash 0.8) over their UTF-8. Other values are hashed with
splitmix64 (Steele, Lea & Flood 2014), which also combines the columns of a row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl
import polars_hash as plh

from transforms.records.arrays import UInt64s
from transforms.records.columns import select

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = tuple(
    (np.uint64(shift), np.uint64(factor)) for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
_LAST = np.uint64(31)
_NULL = np.uint64(0x6E756C6C6E756C6C)
# Number of values mixed at a time: few enough to stay in a core's cache and in memory that the allocator reuses.
_PIECE = 1 << 14


def mix_bits(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser, a bijection on 64 bits."""
    result: UInt64s = np.atleast_1d(values) + _GOLDEN
    shifted = np.empty(min(len(result), _PIECE), np.uint64)
    for start in range(0, len(result), _PIECE):
        z = result[start : start + _PIECE]
        some = shifted[: len(z)]
        for shift, factor in _ROUNDS:
            z ^= np.right_shift(z, shift, out=some)
            z *= factor
        z ^= np.right_shift(z, _LAST, out=some)
    return result


@functools.lru_cache(1024)
def hash_text(text: str) -> np.uint64:
    """The hash of one string, equal to the `hash_column` hash of that value in a column."""
    return hash_column(pl.Series([text]))[0]


def hash_column(column: pl.Series) -> UInt64s:
    """The hash of each value of an integer, float, boolean, date, time or string column."""
    if column.dtype == pl.String:
        return _with_nulls(select(column.to_frame("text"), plh.col("text").nchash.xxh3_64()).to_series())
    if column.dtype.is_float():
        # Adding zero turns −0.0 into 0.0. All NaNs are replaced by one NaN.
        wide = column.cast(pl.Float64)
        floats = (wide.fill_null(0.0) if wide.null_count() else wide).to_numpy() + 0.0
        result = mix_bits(np.where(np.isnan(floats), np.nan, floats).view(np.uint64))
    else:
        numbers = column.cast(pl.Int64)
        result = mix_bits((numbers.fill_null(0) if numbers.null_count() else numbers).to_numpy().view(np.uint64))
    return np.where(column.is_null().to_numpy(), _NULL, result) if column.null_count() else result


def hash_columns(frame: pl.DataFrame, columns: Iterable[str]) -> dict[str, UInt64s]:
    """The hashes of several columns by name, each as `hash_column` returns it; strings are hashed in one pass."""
    names = list(dict.fromkeys(columns))
    texts = [name for name in names if frame[name].dtype == pl.String]
    hashed = select(frame, *(plh.col(name).nchash.xxh3_64() for name in texts)) if texts else frame
    return {name: _with_nulls(hashed[name]) if name in texts else hash_column(frame[name]) for name in names}


def _with_nulls(hashes: pl.Series) -> UInt64s:
    """The hashes of texts, with the hash of null."""
    return (hashes.fill_null(int(_NULL)) if hashes.null_count() else hashes).to_numpy()


def combine_hashes(parts: Sequence[UInt64s | np.uint64]) -> UInt64s:
    """Combines several hashes into one. The order matters."""
    state: UInt64s = np.zeros(1, np.uint64)
    for part in parts:
        state = mix_bits(state * _LAST + np.asarray(part, np.uint64))
    return state


def key_hashes(frame: pl.DataFrame, columns: Sequence[str]) -> UInt64s:
    """One hash per row of the key `columns`; integers of different widths have equal hashes."""
    return keys_hashes(frame, [tuple(columns)])[tuple(columns)]


def keys_hashes(frame: pl.DataFrame, keys: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], UInt64s]:
    """As `key_hashes`, for several keys."""
    keys = list(dict.fromkeys(keys))
    if not len(frame):
        return {key: np.empty(0, np.uint64) for key in keys}
    hashed = hash_columns(frame, [name for key in keys for name in key])
    return {key: combine_hashes([hashed[name] for name in key]) for key in keys}


def row_ids(salt: str, columns: Sequence[pl.Series]) -> pl.Series:
    """The `row_id` (int64) of rows identified by `columns`.

    For a spine row the salt is its view, and the columns are its key and time.
    """
    return pl.Series(
        "row_id", combine_hashes([hash_text(salt), *(hash_column(column) for column in columns)]).view(np.int64)
    )


def prediction_ids(model: str, arm: pl.Series, row_id: pl.Series) -> pl.Series:
    """The `prediction_id` (int64) of the prediction that an arm of a model makes for a row."""
    return row_ids(model, [arm, row_id]).alias("prediction_id")
