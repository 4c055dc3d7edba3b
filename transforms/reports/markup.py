"""HTML of figures and tables: everything that is text is escaped, every number carries its exact value."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


class Markup(str):
    """Text that is HTML already."""


def text(value: object) -> Markup:
    """`value` as HTML, escaped unless it is HTML."""
    return value if isinstance(value, Markup) else Markup(html.escape(str(value)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
    """An element; `class_` is class, other underscores are hyphens, False and None leave an attribute out.

    >>> tag("td", "a < b", class_="name")
    '<td class="name">a &lt; b</td>'
    """
    given = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    return Markup(f"<{name}{given}>{''.join(text(each) for each in content if each is not None)}</{name}>")


def join(parts: Iterable[object], by: str = "") -> Markup:
    return Markup(text(by).join(text(each) for each in parts if each is not None))


def shown(value: float, digits: int = 4) -> str:
    """A number for reading: thousands apart, `digits` significant ones, a real minus sign.

    >>> shown(336776), shown(0.75231), shown(-12.3456), shown(0.00001234), shown(0.0)
    ('336,776', '0.7523', '−12.35', '1.234e−5', '0')
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


def number(value: float | int | None, digits: int = 4, signed: bool = False) -> Markup:
    """A `data` element: what one reads, and the exact value."""
    if value is None or not math.isfinite(value):
        return Markup(f'<span class="none">{DASH}</span>')
    words = ("+" if signed and value > 0 else "") + shown(value, digits)
    return Markup(f'<data value="{value!r}">{words}</data>')


def mark(value: float) -> str:
    """A number that somebody chose, such as a parameter or a mark of an axis: no zeros at its end.

    >>> mark(0.05), mark(-2.0), mark(12500)
    ('0.05', '−2', '12,500')
    """
    words = f"{value:,.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.4g}"
    return words.replace("e-0", "e-").replace("-", MINUS)


def given(value: float | int | None) -> Markup:
    """As `number`, of a number that somebody chose."""
    return number(None) if value is None else Markup(f'<data value="{value!r}">{mark(value)}</data>')


def named(value: object) -> Markup:
    """A name that may break after its underscores."""
    return Markup(f'<span class="name">{text(value).replace("_", "_<wbr>")}</span>')


def category(value: object) -> str:
    """A value of a column, in words where it has none to show.

    >>> category(None), category(""), category(" "), category("a")
    ('null', '(empty)', "' '", 'a')
    """
    words = "null" if value is None else str(value)
    return words if words.strip() else repr(words) if words else "(empty)"


def percent(value: float | None, digits: int = 1) -> Markup:
    """A share as per cent."""
    if value is None or not math.isfinite(value):
        return Markup(f'<span class="none">{DASH}</span>')
    words = f"{value * 100:.{digits}f}".replace("-", MINUS)
    return Markup(f'<data value="{value!r}">{words}&#8239;%</data>')


def interval(span: Sequence[float] | None, signed: bool = False) -> Markup:
    """A 95 % interval in small print; nothing where there is none."""
    if span is None:
        return Markup("")
    return tag("span", number(span[0], signed=signed), f" {DASH} " if min(span) >= 0 else " to ", number(span[1], signed=signed), class_="ci")  # fmt: skip


def estimate(value: float | None, span: Sequence[float] | None = None, signed: bool = False) -> Markup:
    """A value and its interval."""
    return join([number(value, signed=signed), " " if span else "", interval(span, signed)])


def day(stamp: str) -> Markup:
    """An ISO stamp as a `time` element; midnight goes without saying."""
    at = datetime.fromisoformat(stamp)
    at = at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)
    words = f"{at.day} {at:%b %Y}" + ("" if (at.hour, at.minute, at.second) == (0, 0, 0) else f", {at:%H:%M}")
    return tag("time", words, datetime=at.isoformat())


def table(
    heads: Sequence[object],
    rows: Iterable[Sequence[object]],
    caption: str,
    numeric: Sequence[int] = (),
    classes: Iterable[str] | None = None,
) -> Markup:
    """A table in a container of its own that scrolls, the first cell of each row its head.

    Args:
        caption: read by screen readers, not shown.
        numeric: columns aligned to the right.
        classes: of each row.
    """
    kind = ["n" if i in numeric else None for i in range(len(heads))]
    head = tag("tr", *(tag("th", each, scope="col", class_=kind[i]) for i, each in enumerate(heads)))
    names = iter(classes) if classes is not None else None
    body = []
    for row in rows:
        cells = [
            tag("td", each, class_=kind[i]) if i else tag("th", each, scope="row", class_=kind[i])
            for i, each in enumerate(row)
        ]
        body.append(tag("tr", *cells, class_=(next(names) or None) if names else None))
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)


def chip(word: str, kind: str) -> Markup:
    """A verdict: a sign and a word, so that colour alone says nothing."""
    return tag("span", word, class_=f"chip {kind}")


def details(summary: object, *content: object, open_: bool = False) -> Markup:
    return tag("details", tag("summary", summary), *content, open=open_)


def note(*content: object) -> Markup:
    return tag("p", *content, class_="note")


def section(anchor: str, title: str, *content: Any) -> Markup:
    return tag("section", tag("h2", title, id=f"{anchor}-h"), *content, id=anchor, aria_labelledby=f"{anchor}-h")


def figure(title: object, chart: object, *below: object) -> Markup:
    return tag("figure", tag("figcaption", title), chart, *below)
