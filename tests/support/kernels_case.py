"""Helpers and fixtures for: whole views against the oracle, and what must not matter: order, other rows, how far keys
and times spread."""

from __future__ import annotations

import polars as pl
from polars.testing import assert_frame_equal


def same(got: pl.DataFrame, expected: pl.DataFrame) -> None:
    """Equal to the last bit, −0.0 and null included."""
    assert_frame_equal(got, expected, check_exact=True)
    for name in got.columns:
        if got[name].dtype.is_float():
            a, b = (frame[name].fill_null(0).to_numpy() for frame in (got, expected))
            assert a.tobytes() == b.tobytes(), name
