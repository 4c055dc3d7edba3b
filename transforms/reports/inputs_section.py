"""The part of a training report about what the model goes by: contributions of its inputs, over rows and by value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transforms.reports import charts
from transforms.reports.charts import Axis, medians
from transforms.reports.markup import Markup, category, details, figure, join, named, note, number, section, table, tag

Content = Mapping[str, Any]
# Inputs with a picture each, the categories of one, and points of a scatter or swarm.
PICTURES, CATEGORIES, POINTS = 6, 10, 800


def explanation(content: Content) -> Markup | None:
    """Mean contribution of each input, how single rows move, and how the first inputs' values matter."""
    known, points = content.get("explanation") or {}, (content.get("points") or {}).get("points") or []
    if not known.get("inputs"):
        reason = known.get("reason")
        return (
            section("inputs", "What the model goes by", note(f"There are no contributions: {reason}."))
            if reason
            else None
        )
    said = note(
        "Contributions of each input to the margin (", known["unit"], ") of ", number(known["rows"]), " test rows, chosen by a hash: SHAP values as XGBoost computes "
        "them. With the base they add up to the margin, row by row; the columns that an encoder makes of one input are added up.",
    )  # fmt: skip
    return section("inputs", "What the model goes by", said, summary(known, points), dependence(known, points))


def summary(known: Content, points: Sequence[Content]) -> Markup:
    """Inputs by mean absolute contribution, each with its rows as a swarm."""
    shapes = {each["input"]: each for each in points}
    ends = [value for each in points for value in each["contributions"]]
    x = Axis.over(
        [0.0, *(np.quantile(ends, [0.002, 0.998]) if ends else ())], f"contribution, {known['unit']}", ticks=4, pad=0.03
    )
    most = Axis.over([0.0, known["inputs"][0]["mean_abs"]], "mean |contribution|")

    def row(each: Content) -> list[object]:
        found = shapes.get(each["input"])
        marks = [charts.upright(x, 0.0, "zero")]
        if found is not None:
            kinds, moved = _kinds(found["values"][:POINTS]), np.array(found["contributions"][:POINTS])
            marks.append(charts.swarm(x, moved, kinds))
        which = f" (class {found['class']})" if found is not None and found.get("class") is not None else ""
        return [named(each["input"] + which), charts.strip(x, *marks, height=34), charts.strip(most, charts.bar(most, each["mean_abs"], "first"), height=14), number(each["mean_abs"])]  # fmt: skip

    heads = ["Input", charts.scale(x), tag("span", "As a bar", class_="hidden"), "Mean |contribution|"]
    first, rest = known["inputs"][: len(points)], known["inputs"][len(points) :]
    keys = charts.legend(("v0", "low value"), ("v2", "middle"), ("v4", "high value"), ("vx", "missing, or a category"))
    whole = tag(
        "div",
        table(heads, [row(each) for each in first], "Inputs by mean absolute contribution", (2,)),
        class_="swarms",
    )
    if not rest:
        return join([keys, whole])
    plain = [[named(each["input"]), charts.strip(most, charts.bar(most, each["mean_abs"], "first"), height=14), number(each["mean_abs"])] for each in rest]  # fmt: skip
    return join([keys, whole, details(f"{len(rest)} further inputs", table(["Input", tag("span", "As a bar", class_="hidden"), "Mean |contribution|"], plain, "Further inputs", (2,)))])  # fmt: skip


def _kinds(values: Sequence[Any]) -> Any:
    """Fifths of numbers by rank, −1 for what has none, as categories."""
    if any(isinstance(value, str) for value in values):
        return np.full(len(values), -1)
    numbers = np.array([math.nan if value is None else float(value) for value in values])
    known = np.isfinite(numbers)
    ordered = np.sort(numbers[known])
    if not len(ordered):
        return np.full(len(numbers), -1)
    position = (np.searchsorted(ordered, numbers, "left") + np.searchsorted(ordered, numbers, "right")) / 2
    return np.where(known, np.minimum(position * 5 // max(len(ordered), 1), 4), -1).astype(int)


def dependence(known: Content, points: Sequence[Content]) -> Markup:
    """Contribution by the value of each of the first inputs."""
    pictures = [_picture(each, known["unit"]) for each in points[:PICTURES]]
    return join([tag("h3", "By value"), tag("div", *[each for each in pictures if each], class_="grid three")])


def _picture(each: Content, unit: str) -> Markup:
    values, moved = each["values"], np.array(each["contributions"])
    title: list[object] = [tag("code", each["input"])]
    if each.get("class") is not None:
        title.append(tag("small", f" class {each['class']}"))
    if any(isinstance(value, str) for value in values):
        return figure(join(title), _by_category(values, moved, unit))
    numbers = np.array([math.nan if value is None else float(value) for value in values])
    there = np.isfinite(numbers)
    left = int((~there).sum())
    if left:
        title.append(
            tag("small", " ", number(left), " missing, mean ", number(float(moved[~there].mean()), 3, signed=True))
        )
    if not there.any():
        return figure(join(title), note("The value is missing in every row."))
    xs, ys = numbers[there], moved[there]
    x = Axis.over(np.quantile(xs, [0.01, 0.99]), "value", ticks=4, pad=0.02)
    y = Axis.over([0.0, *np.quantile(moved, [0.002, 0.998])], f"contribution, {unit}", ticks=4, pad=0.05)
    interior = medians(xs, ys)
    marks = [
        charts.line(x, y, [x.low, x.high], [0, 0], "zero"), charts.dots(x, y, xs[:POINTS], ys[:POINTS], "small v"),
        charts.line(x, y, [at for at, _ in interior], [value for _, value in interior], "second"),
    ]  # fmt: skip
    return figure(join(title), charts.plot(f"Contribution of {each['input']} by its value", x, y, *marks, ratio="5/4"))


def _by_category(values: Sequence[Any], moved: Any, unit: str) -> Markup:
    """A swarm for each of the most frequent categories, the greatest mean first."""
    names = ["null" if value is None else str(value) for value in values]
    often = sorted(set(names), key=lambda name: (-names.count(name), name))[:CATEGORIES]
    x = Axis.over([0.0, *np.quantile(moved, [0.002, 0.998])], f"contribution, {unit}", ticks=3, pad=0.03)
    found = []
    for name in often:
        mine = moved[np.array([each == name for each in names])]
        found.append((float(mine.mean()), name, mine))
    rows = [
        [named(category(name)), charts.strip(x, charts.upright(x, 0.0, "zero"), charts.swarm(x, mine[:200]), height=22), number(mean, 3, signed=True)]
        for mean, name, mine in sorted(found, key=lambda each: (-each[0], each[1]))
    ]  # fmt: skip
    return table(["Category", charts.scale(x), "Mean"], rows, "Contribution by category", (2,))
