"""The parts of a training report about parts of the test split: slices as forest plots, protected groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transforms.evaluation.gates import RATES
from transforms.reports import charts
from transforms.reports.charts import Axis
from transforms.reports.data_section import words
from transforms.reports.markup import (
    Markup,
    category,
    chip,
    details,
    estimate,
    join,
    named,
    note,
    number,
    percent,
    section,
    table,
    tag,
)

Content = Mapping[str, Any]
# Slices of one group that are shown at once, and at all.
SHOWN, MOST = 25, 200


def slices(content: Content, manifest: Content) -> Markup | None:
    """Metrics by slice as forest plots; slices that a gate failed are marked."""
    if not content["slices"]:
        return None
    rules = content.get("rules") or {}
    chosen = list(dict.fromkeys([manifest["metric"], *rules.get("max_gap", {})]))
    parts: list[Markup] = []
    groups: dict[tuple[str, ...], list[Content]] = {}
    for each in content["slices"]:
        groups.setdefault(tuple(each["by"]), []).append(each)
    for columns, members in groups.items():
        parts.append(tag("h3", " × ".join(columns)))
        parts += [forest(content, members, metric) for metric in chosen]
    least = rules.get("min_slice_rows")
    return section(
        "slices", "Slices", note("The vertical line is the metric of the whole, the shade its 95 % interval.",
        f" Slices of fewer than {least:,} rows are pale: they are shown, not judged, and lie at the edge where they are beyond the scale." if least else ""), *parts,
    )  # fmt: skip


def forest(content: Content, members: Sequence[Content], metric: str) -> Markup:
    """One row per slice, the largest first."""
    rules = content.get("rules") or {}
    bound, least = rules.get("max_gap", {}).get(metric), rules.get("min_slice_rows", 0)
    whole, span = content["metrics"][metric], content["intervals"].get(metric)
    firm = [each for each in members if each["rows"] >= least] or members
    ends = [value for each in firm for value in (each["metrics"][metric], *(each["intervals"].get(metric) or ()))]
    x = Axis.over(
        [value for value in (whole, *(span or ()), *ends) if value is not None], words(metric), ticks=4, pad=0.04
    )
    judged = {each["gate"]: each for each in content["gates"]}

    def row(each: Content) -> tuple[list[object], str]:
        name = ", ".join(f"{column}={'null' if value is None else value}" for column, value in each["by"].items())
        gate = judged.get(f"{metric} of {name} within {bound:g} of the whole") if bound is not None else None
        failed = gate is not None and not gate["holds"]
        kind = "fail" if failed else "first" if each["rows"] >= least else "pale"
        marks = [charts.stripe(x, span[0], span[1], "whole")] if span else []
        marks += [charts.upright(x, whole, "whole")] if whole is not None else []
        value, mine = each["metrics"][metric], each["intervals"].get(metric)
        shown_ = ", ".join(category(value) for value in each["by"].values())
        cells: list[object] = [
            join([named(shown_), " ", chip("fails", "fail") if failed else ""]), charts.strip(x, *marks, charts.whisker(x, value, mine, kind)),
            number(each["rows"]), estimate(value, mine),
        ]  # fmt: skip
        return cells, kind if kind == "pale" else ""

    heads = ["Slice", charts.scale(x), "Rows", f"{words(metric)}, 95 % interval"]
    rows = [row(each) for each in members]
    caption = f"{words(metric)} by slice"
    first = table(heads, [cells for cells, _ in rows[:SHOWN]], caption, (2, 3), [kind for _, kind in rows[:SHOWN]])
    if len(rows) <= SHOWN:
        return first
    rest = rows[SHOWN:MOST]
    left = note(f"{len(rows) - MOST:,} smaller ones are in training.json.") if len(rows) > MOST else None
    return join([first, details(f"{len(rows) - SHOWN:,} smaller slices", table(heads, [cells for cells, _ in rest], caption, (2, 3), [kind for _, kind in rest]), left)])  # fmt: skip


def groups(content: Content) -> Markup | None:
    """Rates by the values of protected columns, and the differences that the gates bound."""
    if not content["fairness"]:
        return None
    rules = content.get("rules") or {}
    bounds = rules.get("max_difference", {})
    parts = []
    for found in content["fairness"]:
        rates = [
            ("selection_rate", "Selected"),
            ("recall", "Recall"),
            ("false_positive_rate", "False positive rate"),
            ("precision", "Precision"),
        ]
        x = Axis.share()
        rows = [
            [
                named(category(each["value"])),
                charts.strip(x, *(charts.dots(x, charts.ROW, [each[rate]], [0.5], f"big g{i}", [word]) for i, (rate, word) in enumerate(rates[:3]) if each.get(rate) is not None)),
                number(each["rows"]), *(percent(each.get(rate)) for rate, _ in rates),
            ]
            for each in found["groups"]
        ]  # fmt: skip
        kinds = ["" if each["judged"] else "pale" for each in found["groups"]]
        heads = ["Group", charts.scale(x), "Rows", *(word for _, word in rates)]
        measures = []
        for name, value in found["differences"].items():
            bound = bounds.get(name)
            verdict = (
                ""
                if bound is None or value is None
                else chip("holds", "pass")
                if value <= bound
                else chip("fails", "fail")
            )
            measures.append([name.replace("_", " "), number(value), number(bound), verdict, "greatest difference in " + " or ".join(rate.replace("_", " ") for rate in RATES[name])])  # fmt: skip
        parts += [
            tag("h3", found["column"]), table(heads, rows, f"Rates by {found['column']}", range(2, 7), kinds),
            charts.legend(("g0", "selected"), ("g1", "recall"), ("g2", "false positive rate")),
            table(["Measure", "Difference", "At most", "", "What it compares"], measures, "Differences between groups", (1, 2)),
        ]  # fmt: skip
    at = rules.get("threshold")
    return section("fairness", "Fairness", note(f"A row is selected from a score of {at:g} on. Pale groups have too few rows to be judged." if at else ""), *parts)  # fmt: skip
