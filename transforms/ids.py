"""Stable 64-bit ids of rows: the same on every machine, in every process, in every version of the libraries.

Method: splitmix64 (Steele, Lea & Flood 2014) as the mixer, chained; strings by the words of 8 bytes (little-endian, the last padded
with zeros) of their UTF-8, then their length in bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl

UInt64s = npt.NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NULL = np.uint64(0x6E756C6C6E756C6C)
_SEED = np.uint64(0xCBF29CE484222325)
_WORD = 8
# Per number of bytes that a string has left, which bits of a word are its own.
_INSIDE = np.array([(1 << (8 * size)) - 1 for size in range(_WORD + 1)], np.uint64)
# Values mixed at a time: they stay in a core's cache, and in memory that the allocator keeps.
_PIECE = 1 << 14


def mix(values: UInt64s) -> UInt64s:
    """splitmix64's finaliser, a bijection on 64 bits."""
    with np.errstate(over="ignore"):
        result = np.atleast_1d(values + _GOLDEN)
        shifted = np.empty(min(len(result), _PIECE), np.uint64)
        for start in range(0, len(result), _PIECE):
            z = result[start : start + _PIECE]
            some = shifted[: len(z)]
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
                z ^= np.right_shift(z, np.uint64(shift), out=some)
                z *= np.uint64(factor)
            z ^= np.right_shift(z, np.uint64(31), out=some)
        return result


def hash_text(text: str) -> np.uint64:
    """Hash of one string, equal to `hash_column` of a column that holds it."""
    return hash_column(pl.Series([text]))[0]


def hash_column(column: pl.Series) -> UInt64s:
    """Hash per value of an integer, number, boolean, date, time or string column."""
    if column.dtype == pl.String:
        result = _hash_strings(column)
    elif column.dtype.is_float():
        # Adding zero makes −0.0 the same as 0.0, and every NaN is one.
        floats = column.cast(pl.Float64).fill_null(0.0).to_numpy() + 0.0
        result = mix(np.where(np.isnan(floats), np.nan, floats).view(np.uint64))
    else:
        numbers = column.to_physical().cast(pl.Int64).fill_null(0)
        result = mix(numbers.to_numpy().view(np.uint64))
    return np.where(column.is_null().to_numpy(), _NULL, result) if column.null_count() else result


def _hash_strings(column: pl.Series) -> UInt64s:
    array = column.fill_null("").to_arrow()  # large_string
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    raw = np.zeros(last - first + _WORD, np.uint8)
    if last > first:
        raw[: last - first] = np.frombuffer(array.buffers()[2], np.uint8)[first:last]
    # The word that begins at each byte.
    words = np.lib.stride_tricks.as_strided(raw[:_WORD].view("<u8"), (len(raw) - _WORD + 1,), (1,))
    result = np.empty(len(array), np.uint64)
    for at in range(0, len(array), _PIECE):
        some = offsets[at : at + _PIECE + 1] - first
        result[at : at + _PIECE] = _hash_words(words, some[:-1], np.diff(some))
    return result


def _hash_words(words: UInt64s, starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> UInt64s:
    state = np.full(len(lengths), _SEED, np.uint64)
    for position in range(0, int(lengths.max()), _WORD):
        rest = lengths - position
        more = rest > 0
        count = int(np.count_nonzero(more))
        if count == len(rest):
            state = mix(_word(words, starts + position, rest) ^ state)
        elif 2 * count < len(rest):
            at = np.flatnonzero(more)
            state[at] = mix(_word(words, starts[at] + position, rest[at]) ^ state[at])
        else:
            taken = _word(words, np.minimum(starts + position, len(words) - 1), np.maximum(rest, 0))
            np.copyto(state, mix(taken ^ state), where=more)
    state ^= lengths.view(np.uint64)
    return mix(state)


def _word(words: UInt64s, starts: npt.NDArray[np.int64], rest: npt.NDArray[np.int64]) -> UInt64s:
    """The next 8 bytes of strings that have `rest` ≥ 0 left, zeros after their end."""
    taken = words[starts]
    taken &= _INSIDE[np.minimum(rest, _WORD)]
    return taken


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
