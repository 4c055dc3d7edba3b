"""Formats values for people to read."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import polars as pl

from schemas.errors import in_one_line


def format_value(value: object, dtype: pl.DataType | None = None) -> str:
    """Formats a `value` of a column of `dtype`. A float32 becomes the shortest text that parses to the same float32.

    >>> format_value(23.329999923706055, pl.Float32())
    '23.33'
    >>> format_value(23.329999923706055)
    '23.329999923706055'
    >>> print(format_value("two\\nlines"))
    two\\nlines
    """
    if value is None:
        return "null"
    if isinstance(value, datetime | date):
        return value.isoformat()
    if dtype == pl.Float32 and isinstance(value, float):
        return str(np.float32(value))
    return in_one_line(str(value))
