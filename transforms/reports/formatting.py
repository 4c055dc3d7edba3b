"""Formats numbers, times and names in a report: text for readers, and the exact value.

All functions but `format_number`, `mark`, `category` and `metric_name` return HTML; their arguments are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime

from markupsafe import Markup, escape

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
_NONE = Markup('<span class="none">{}</span>').format(DASH)
_METRICS = {"auc": "AUC", "rmse": "RMSE", "mae": "MAE", "brier": "Brier score", "macro_auc": "macro AUC"}


def format_number(value: float, digits: int = 4) -> str:
    """A number for readers: with separated thousands, `digits` significant digits and a real minus sign.

    >>> [format_number(each) for each in (336776, 0.75231, -12.3456, 0.00001234, 0.0)]
    ['336,776', '0.7523', '−12.35', '1.234e−5', '0']
    """
    if not math.isfinite(value):
        return DASH
    if value == int(value) and abs(value) < 1e15:
        words = f"{int(value):,}"
    elif 1e-3 <= abs(value) < 1e6:
        positions = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        words = f"{value:,.{min(positions, digits)}f}"
    else:
        words = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    return words.replace("-", MINUS)


def mark(value: float) -> str:
    """A number that a user chose, such as a parameter, or a tick of an axis: without trailing zeros.

    >>> mark(0.05), mark(-2.0), mark(12500)
    ('0.05', '−2', '12,500')
    """
    words = f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return words.replace("e-0", "e-").replace("-", MINUS)


def category(value: object) -> str:
    """A value of a column; null and invisible text are described.

    >>> category(None), category(""), category(" "), category("a")
    ('null', '(empty)', "' '", 'a')
    """
    words = "null" if value is None else str(value)
    return words if words.strip() else repr(words) if words else "(empty)"


def metric_name(metric: str) -> str:
    """A metric's name for readers.

    >>> metric_name("auc"), metric_name("log_loss")
    ('AUC', 'log loss')
    """
    return _METRICS.get(metric, metric.replace("_", " "))


def number(value: float | int | None, digits: int = 4, signed: bool = False) -> Markup:
    """A `data` element: text for readers, and the exact value.

    >>> number(0.1 + 0.2)
    Markup('<data value="0.30000000000000004">0.3000</data>')
    """
    if value is None or not math.isfinite(value):
        return _NONE
    return _data(value, ("+" if signed and value > 0 else "") + format_number(value, digits))


def given(value: float | int | None) -> Markup:
    """As `number`, for a number that a user chose."""
    return _NONE if value is None else _data(value, mark(value))


def parameter(value: object) -> Markup:
    """As `given`, for a parameter, which need not be a number."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return given(value)
    return escape(DASH if value is None else value)


def percent(value: float | None, digits: int = 1) -> Markup:
    """A share in per cent."""
    if value is None or not math.isfinite(value):
        return _NONE
    return _data(value, f"{value * 100:.{digits}f}\N{NARROW NO-BREAK SPACE}%".replace("-", MINUS))


def _data(value: float | int, words: str) -> Markup:
    return Markup('<data value="{}">{}</data>').format(repr(value), words)


def interval(span: Sequence[float] | None, signed: bool = False) -> Markup:
    """A 95 % interval in small type; empty if there is none."""
    if span is None:
        return Markup("")
    low, high = (number(each, signed=signed) for each in span)
    return Markup('<span class="ci">{}{}{}</span>').format(low, f" {DASH} " if min(span) >= 0 else " to ", high)


def estimate(value: float | None, span: Sequence[float] | None = None, signed: bool = False) -> Markup:
    """A value and its interval."""
    return number(value, signed=signed) + (" " if span else "") + interval(span, signed)


def day(stamp: str) -> Markup:
    """An ISO time as a `time` element; midnight is left out."""
    at = datetime.fromisoformat(stamp)
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    words = f"{at.day} {at:%b %Y}" + ("" if (at.hour, at.minute, at.second) == (0, 0, 0) else f", {at:%H:%M}")
    return Markup('<time datetime="{}">{}</time>').format(at.isoformat(), words)


def named(value: object) -> Markup:
    """A name in which lines may break after underscores.

    >>> named("a_b<c>")
    Markup('<span class="name">a_<wbr>b&lt;c&gt;</span>')
    """
    return Markup('<span class="name">{}</span>').format(escape(value).replace("_", Markup("_<wbr>")))
