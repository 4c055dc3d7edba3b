"""Values as text for people."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import polars as pl


def shown(value: object, dtype: pl.DataType | None = None) -> str:
    """`value` of a column of `dtype`; of float32 the shortest text that reads back to the same float32.

    >>> shown(23.329999923706055, pl.Float32())
    '23.33'
    >>> shown(23.329999923706055)
    '23.329999923706055'
    """
    if value is None:
        return "null"
    if isinstance(value, datetime | date):
        return value.isoformat()
    if dtype == pl.Float32 and isinstance(value, float):
        return str(np.float32(value))
    return str(value)
