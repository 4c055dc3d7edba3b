"""Charts as paths in stretched SVG, with their texts beside it in HTML: readable at any width, in light and dark.

A plot is a square of 1000 units that is stretched to the space available.  Strokes keep their width, and a dot is a
line of length 0 with round ends, so neither is distorted.  Colours come from the page's style; `charts.html.j2` writes
the SVG.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from transforms.reports.formatting import mark

SIDE = 1000.0
Values = Sequence[float] | npt.NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Args:
        low, high: the range that is shown.
        label: the quantity, with its unit.
        ticks: marked values and their texts.
        log: whether the scale is logarithmic.
    """

    low: float
    high: float
    label: str = ""
    ticks: tuple[tuple[float, str], ...] = ()
    log: bool = False

    @classmethod
    def over(
        cls, values: Iterable[float], label: str = "", *, log: bool = False, ticks: int = 5, pad: float = 0.0
    ) -> Axis:
        """An axis that shows all finite `values`, marked at round numbers."""
        known = [float(each) for each in values if math.isfinite(each) and (not log or each > 0)]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        if low == high:
            low, high = (
                (low * 0.9, high * 1.1)
                if log and low
                else (low - (abs(low) or 1) * 0.05, high + (abs(high) or 1) * 0.05)
            )
        if log:
            marks = [(at, mark(at)) for at in _decades(low, high)]
        else:
            low, high = low - pad * (high - low), high + pad * (high - low)
            marks = [(at, mark(at)) for at in _round(low, high, ticks)]
        return cls(low, high, label, tuple(marks), log)

    @classmethod
    def share(cls, label: str = "") -> Axis:
        """An axis from 0 to 1."""
        return cls(0.0, 1.0, label, tuple((i / 4, ("0", "0.25", "0.5", "0.75", "1")[i]) for i in range(5)))

    @property
    def positions(self) -> list[tuple[float, str]]:
        """Positions of the ticks, 0 … 1000, and their texts."""
        found = self.position([at for at, _ in self.ticks])
        return [(float(position), word) for position, (_, word) in zip(found, self.ticks, strict=True)]

    def position(self, values: Values) -> npt.NDArray[np.float64]:
        """Positions of values, 0 … 1000; values outside the axis are at its edge."""
        found = np.asarray(values, np.float64)
        low, high = self.low, self.high
        if self.log:
            found, low, high = np.log(np.maximum(found, 1e-300)), math.log(low), math.log(high)
        result: npt.NDArray[np.float64] = np.clip((found - low) / (high - low), 0, 1) * SIDE
        return result


def _round(low: float, high: float, ticks: int) -> list[float]:
    """About `ticks` round numbers from `low` to `high`."""
    step = 10.0 ** math.floor(math.log10((high - low) / ticks))
    step *= next(each for each in (1, 2, 2.5, 5, 10) if (high - low) / (step * each) <= ticks)
    return [float(f"{i * step:.12g}") for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    marks = [
        base * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for base in (1, 2, 5)
    ]
    inside = [each for each in marks if low <= each <= high]
    return inside if len(inside) <= 6 else [each for each in inside if math.log10(each) % 1 < 1e-9][:8]


@dataclasses.dataclass(frozen=True)
class Path:
    """One path of a chart.

    Args:
        kind: its CSS classes, which decide how it is drawn and in which colour.
        d: the `d` attribute in SVG.
        title: a tooltip.
    """

    kind: str
    d: str
    title: str = ""


Paths = tuple[Path, ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """A chart with two axes.

    Args:
        label: a description of what it shows.
        ratio: width divided by height.
    """

    label: str
    x: Axis
    y: Axis
    paths: Paths
    ratio: str = "4/3"

    @property
    def grid(self) -> str:
        across = [f"M{at:.0f} 0V1000" for at, _ in self.x.positions]
        return "".join([*across, *(f"M0 {SIDE - at:.0f}H1000" for at, _ in self.y.positions)])

    @property
    def left(self) -> float:
        """Space for the texts of the vertical axis, in em."""
        return max((len(word) for _, word in self.y.ticks), default=1) * 0.62 + 0.6


@dataclasses.dataclass(frozen=True)
class Strip:
    """One row of a table of charts that share `x`."""

    x: Axis
    paths: Paths
    height: int = 26

    @property
    def grid(self) -> str:
        return "".join(f"M{at:.0f} 0V1000" for at, _ in self.x.positions)


class LegendEntry(NamedTuple):
    """An entry of a legend: the class of a mark, and its name."""

    kind: str
    name: str


def _d(xs: Values, ys: Values) -> list[str]:
    return [f"{x:.0f} {y:.0f}" for x, y in zip(xs, ys, strict=True)]


def line(x: Axis, y: Axis, xs: Values, ys: Values, kind: str) -> Paths:
    """A line through points."""
    if not len(xs):
        return ()
    return (Path(f"line {kind}", f"M{'L'.join(_d(x.position(xs), SIDE - y.position(ys)))}"),)


def band(x: Axis, y: Axis, xs: Values, lows: Values, highs: Values, kind: str) -> Paths:
    """The area between two lines."""
    there, back = _d(x.position(xs), SIDE - y.position(highs)), _d(x.position(xs), SIDE - y.position(lows))[::-1]
    return (Path(f"band {kind}", f"M{'L'.join([*there, *back])}Z"),)


def dots(x: Axis, y: Axis, xs: Values, ys: Values, kind: str, titles: Sequence[str] = ()) -> Paths:
    """Points; `titles` are their tooltips."""
    positions = _d(x.position(xs), SIDE - y.position(ys))
    if titles:
        return tuple(Path(f"dot {kind}", f"M{at}h0", title) for at, title in zip(positions, titles, strict=True))
    return (Path(f"dot {kind}", f"M{'h0M'.join(positions)}h0"),) if positions else ()


def spans(x: Axis, y: Axis, xs: Values, lows: Values, highs: Values, kind: str) -> Paths:
    """Vertical lines from low to high."""
    at, low, high = x.position(xs), SIDE - y.position(lows), SIDE - y.position(highs)
    return (Path(f"line {kind}", "".join(f"M{a:.0f} {b:.0f}V{c:.0f}" for a, b, c in zip(at, low, high, strict=True))),)


ROW = Axis(0.0, 1.0)


def upright(x: Axis, at: float, kind: str) -> Paths:
    """A vertical line through a strip or plot."""
    return (Path(f"line {kind}", f"M{x.position([at])[0]:.0f} 0V1000"),)


def stripe(x: Axis, low: float, high: float, kind: str) -> Paths:
    """A vertical band."""
    a, b = x.position([low, high])
    return (Path(f"band {kind}", f"M{a:.0f} 0H{b:.0f}V1000H{a:.0f}Z"),)


def bar(x: Axis, value: float, kind: str, thick: float = 0.5) -> Paths:
    """A bar from 0 to `value` in a strip."""
    a, b = x.position([0.0, value])
    top, end = SIDE * (0.5 - thick / 2), SIDE * (0.5 + thick / 2)
    return (Path(f"bar {kind}", f"M{a:.0f} {top:.0f}H{b:.0f}V{end:.0f}H{a:.0f}Z"),)


def whisker(x: Axis, value: float | None, span: Sequence[float] | None, kind: str) -> Paths:
    """An estimate and its interval in a strip."""
    parts: Paths = ()
    if span is not None:
        a, b = x.position(list(span))
        parts += (Path(f"line {kind}", f"M{a:.0f} 500H{b:.0f}"),)
    if value is not None:
        parts += dots(x, ROW, [value], [0.5], f"big {kind}")
    return parts


def swarm(x: Axis, values: Values, kinds: npt.NDArray[np.int64] | None = None) -> Paths:
    """Points of a strip, spread vertically where they are dense, in the colours `v0` … `v4` given by `kinds` (−1 is
    `none`)."""
    positions = x.position(values)
    bins = np.floor(positions / SIDE * 90).astype(int)
    # Points of a bin are shuffled, so that they do not form lines; the order is always the same.
    order = np.lexsort((np.random.default_rng(0).random(len(positions)), bins))
    bins = bins[order]
    first = np.searchsorted(bins, bins)
    rank, size = np.arange(len(bins)) - first, np.bincount(bins, minlength=1)[bins] if len(bins) else bins
    most = max(int(size.max()) if len(size) else 1, 8)
    # Points alternate above and below the middle; the fuller the bin, the further out.
    offset = np.where(rank % 2, 1, -1) * ((rank + 1) // 2) * (2.0 / most)
    ys = np.empty(len(positions))
    ys[order] = 0.5 + np.clip(offset, -1, 1) * 0.42
    if kinds is None:
        return dots(x, ROW, np.asarray(values), ys, "small v")
    drawn: Paths = ()
    for kind in (-1, 0, 1, 2, 3, 4):
        mine = kinds == kind
        drawn += dots(x, ROW, np.asarray(values)[mine], ys[mine], "small " + (f"v{kind}" if kind >= 0 else "vx"))
    return drawn


def medians(xs: npt.NDArray[np.float64], ys: npt.NDArray[np.float64], parts: int = 12) -> list[tuple[float, float]]:
    """Medians of x and y over groups of equal size in order of x, without groups whose median x does not increase."""
    order = np.argsort(xs, kind="stable")
    found = [
        (float(np.median(xs[each])), float(np.median(ys[each]))) for each in np.array_split(order, parts) if len(each)
    ]
    return [pair for i, pair in enumerate(found) if i == 0 or pair[0] > found[i - 1][0]]
