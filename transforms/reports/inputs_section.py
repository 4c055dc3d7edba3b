"""The inputs of a model in a training report: their contributions, over rows and by value."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from transforms.models.stored_records import (
    ExplanationRecord,
    ExplanationSummary,
    InputPoints,
    InputShare,
    TrainingRecord,
)
from transforms.reports import charts
from transforms.reports.charts import Axis, Plot, Strip, medians
from transforms.reports.formatting import category

Floats = npt.NDArray[np.float64]
# The most inputs with a picture; categories of an input; points of a scatter or swarm; points of one category's swarm.
PICTURES, CATEGORIES, POINTS, SWARM = 6, 10, 800, 200


@dataclasses.dataclass(frozen=True)
class Moving:
    """An input: its contributions to single rows, if they are known, and its mean absolute contribution."""

    name: str
    swarm: Strip | None
    bar: Strip
    mean: float


@dataclasses.dataclass(frozen=True)
class Category:
    """Contributions of one value, and their mean."""

    name: str
    swarm: Strip
    mean: float


@dataclasses.dataclass(frozen=True)
class Missing:
    """The rows without a value, and the mean of their contributions."""

    rows: int
    mean: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """Contributions by the value of one input: a plot for numbers, or categories for strings; neither if all are null.

    Args:
        scale: the axis of the categories.
    """

    name: str
    of_class: int | None
    missing: Missing | None = None
    plot: Plot | None = None
    scale: Axis | None = None
    categories: tuple[Category, ...] = ()


@dataclasses.dataclass(frozen=True)
class Explained:
    """Inputs by mean absolute contribution: those with pictures first."""

    unit: str
    rows: int
    scale: Axis
    first: tuple[Moving, ...]
    more: tuple[Moving, ...]
    pictures: tuple[Picture, ...]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The content of the section: contributions, or the `reason` why there are none."""

    reason: str | None
    explained: Explained | None = None


def inputs(content: TrainingRecord, points: ExplanationRecord) -> Inputs | None:
    known = content.get("explanation")
    if not known:
        return None
    if not known["inputs"]:
        return Inputs(known["reason"]) if known["reason"] else None
    return Inputs(None, explained(known, points.get("points") or []))


def explained(known: ExplanationSummary, points: Sequence[InputPoints]) -> Explained:
    shapes = {each["input"]: each for each in points}
    ends = [value for each in points for value in each["contributions"]]
    outer = np.quantile(ends, [0.002, 0.998]) if ends else ()
    x = Axis.over([0.0, *outer], f"contribution, {known['unit']}", ticks=4, pad=0.03)
    most = Axis.over([0.0, known["inputs"][0]["mean_abs"]], "mean |contribution|")

    def bar(each: InputShare) -> Strip:
        return Strip(most, charts.bar(most, each["mean_abs"], "first"), 14)

    def moving(each: InputShare) -> Moving:
        found, marks = shapes.get(each["input"]), charts.upright(x, 0.0, "zero")
        of_class = None if found is None else found.get("class")
        if found is not None:
            marks += charts.swarm(x, np.array(found["contributions"][:POINTS]), _fifths(found["values"][:POINTS]))
        name = each["input"] + ("" if of_class is None else f" (class {of_class})")
        return Moving(name, Strip(x, marks, 34), bar(each), each["mean_abs"])

    first, more = known["inputs"][: len(points)], known["inputs"][len(points) :]
    return Explained(
        known["unit"],
        known["rows"],
        x,
        tuple(map(moving, first)),
        tuple(Moving(each["input"], None, bar(each), each["mean_abs"]) for each in more),
        tuple(picture(each, known["unit"]) for each in points[:PICTURES]),
    )


def _fifths(values: Sequence[float | str | None]) -> npt.NDArray[np.int64]:
    """The fifth (0 … 4) of each value by rank; −1 for values without a rank, such as categories."""
    if any(isinstance(value, str) for value in values):
        return np.full(len(values), -1)
    numbers = _numbers(values)
    known = np.isfinite(numbers)
    ordered = np.sort(numbers[known])
    if not len(ordered):
        return np.full(len(numbers), -1)
    place = (np.searchsorted(ordered, numbers, "left") + np.searchsorted(ordered, numbers, "right")) / 2
    return np.where(known, np.minimum(place * 5 // len(ordered), 4), -1).astype(int)


def _numbers(values: Sequence[float | str | None]) -> Floats:
    return np.array([math.nan if value is None else float(value) for value in values])


def picture(each: InputPoints, unit: str) -> Picture:
    values, moved = each["values"], np.array(each["contributions"])
    found = Picture(each["input"], each.get("class"))
    if any(isinstance(value, str) for value in values):
        return by_category(found, values, moved, unit)
    numbers = _numbers(values)
    there = np.isfinite(numbers)
    if not there.all():
        missing = Missing(int((~there).sum()), float(moved[~there].mean()))
        found = dataclasses.replace(found, missing=missing)
    if not there.any():
        return found
    xs, ys = numbers[there], moved[there]
    x = Axis.over(np.quantile(xs, [0.01, 0.99]), "value", ticks=4, pad=0.02)
    y = Axis.over([0.0, *np.quantile(moved, [0.002, 0.998])], f"contribution, {unit}", ticks=4, pad=0.05)
    middle = medians(xs, ys)
    paths = (
        charts.line(x, y, [x.low, x.high], [0, 0], "zero")
        + charts.dots(x, y, xs[:POINTS], ys[:POINTS], "small v")
        + charts.line(x, y, [at for at, _ in middle], [value for _, value in middle], "second")
    )
    return dataclasses.replace(found, plot=Plot(f"Contribution of {each['input']} by its value", x, y, paths, "5/4"))


def by_category(found: Picture, values: Sequence[float | str | None], moved: Floats, unit: str) -> Picture:
    """A swarm for each of the most frequent categories, in descending order of the mean."""
    names = ["null" if value is None else str(value) for value in values]
    often = sorted(set(names), key=lambda name: (-names.count(name), name))[:CATEGORIES]
    x = Axis.over([0.0, *np.quantile(moved, [0.002, 0.998])], f"contribution, {unit}", ticks=3, pad=0.03)
    means = []
    for name in often:
        mine = moved[np.array([each == name for each in names])]
        means.append((float(mine.mean()), name, mine))
    categories = [
        Category(category(name), Strip(x, charts.upright(x, 0.0, "zero") + charts.swarm(x, mine[:SWARM]), 22), mean)
        for mean, name, mine in sorted(means, key=lambda each: (-each[0], each[1]))
    ]
    return dataclasses.replace(found, scale=x, categories=tuple(categories))
