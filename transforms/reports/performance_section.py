"""The part of a training report about the whole test split: metrics, curves, calibration, classes, errors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from schemas.models import RISING
from transforms.reports import charts
from transforms.reports.charts import Axis
from transforms.reports.data_section import words
from transforms.reports.markup import (
    Markup,
    estimate,
    figure,
    given,
    interval,
    join,
    note,
    number,
    percent,
    section,
    shown,
    table,
    tag,
)

Content = Mapping[str, Any]
# Points of a scatter.
POINTS = 800


def performance(content: Content, manifest: Content) -> Markup:
    """Metrics with intervals, beside the champion's; then what the objective has to show."""
    objective = manifest["objective"]
    if objective == "binary:logistic":
        shape: list[Markup] = [curves(content), calibration(content), thresholds(content)]
    elif objective == "multi:softprob":
        shape = [classes(content), confusion(content)]
    else:
        shape = [errors(content)]
    return section("performance", "Performance on the test split", metrics(content), *shape)


def metrics(content: Content) -> Markup:
    rival, spans = content["rival"], content["intervals"]
    theirs, apart = rival["metrics"], rival.get("differences") or {}
    rows = []
    for name, value in content["metrics"].items():
        row: list[object] = [words(name), estimate(value, spans.get(name)), "more" if name in RISING else "less"]
        if theirs is not None:
            span = apart.get(name)
            row += [
                number(theirs.get(name)),
                join([number(span[0], signed=True), " ", interval(span[1], True)]) if span else number(None),
            ]
        rows.append(row)
    heads: list[object] = ["Metric", "Value, 95 % interval", "Better is"]
    if theirs is not None:
        heads += [f"Champion (version {rival['version']})", "Difference, 95 % interval"]
    error = content.get("auc_error")
    said = [
        "Over ", number(content["rows"]), " test rows. Intervals are the middle 95 % of 200 Poisson bootstrap replicates",
        "; differences are paired, row by row." if theirs is not None else ".",
    ]  # fmt: skip
    said += [" Scores were binned: AUC is right to ", number(error), "."] if error else []
    return join([table(heads, rows, "Metrics of the test split", range(1, len(heads))), note(*said)])


def curves(content: Content) -> Markup:
    """ROC and precision–recall, the champion's beside."""
    if not content.get("roc"):
        return note("The test split has one class only: there are no curves.")
    rival = content["rival"]
    x, y = Axis.share("false positive rate"), Axis.share("true positive rate")
    roc = np.array(content["roc"])
    marks = [
        charts.line(x, y, [0, 1], [0, 1], "thin"),
        charts.band(x, y, roc[:, 0], np.zeros(len(roc)), roc[:, 1], "first"),
    ]
    if rival.get("roc"):
        other = np.array(rival["roc"])
        marks.append(charts.line(x, y, other[:, 0], other[:, 1], "second"))
    marks.append(charts.line(x, y, roc[:, 0], roc[:, 1], "first"))
    entries = [
        ("first", "this model"),
        *([("second", f"champion, version {rival['version']}")] if rival.get("roc") else []),
    ]
    first = figure(
        join(["ROC ", tag("small", "area ", number(content["metrics"]["auc"]))]),
        charts.plot(f"ROC curve, area {shown(content['metrics']['auc'] or math.nan)}", x, y, *marks, ratio="1"), charts.legend(*entries, ("thin", "chance")),
    )  # fmt: skip
    x, y = Axis.share("recall"), Axis.share("precision")
    found, total = np.array(content["precision_recall"]), sum(each["rows"] for each in content["calibration"])
    share = sum(each["rows"] * each["share"] for each in content["calibration"]) / total
    marks = [
        charts.line(x, y, [0, 1], [share, share], "thin"),
        charts.band(x, y, found[:, 0], np.zeros(len(found)), found[:, 1], "first"),
    ]
    if rival.get("precision_recall"):
        other = np.array(rival["precision_recall"])
        marks.append(charts.line(x, y, other[:, 0], other[:, 1], "second"))
    marks.append(charts.line(x, y, found[:, 0], found[:, 1], "first"))
    at = _at(content)
    if at and at["precision"] is not None and at["recall"] is not None:
        said = f"threshold {at['threshold']:g}: precision {shown(at['precision'])}, recall {shown(at['recall'])}"
        marks.append(charts.dots(x, y, [at["recall"]], [at["precision"]], "big first", [said]))
    second = figure(
        join(["Precision and recall ", tag("small", "average precision ", number(content["metrics"]["average_precision"]))]),
        charts.plot(f"Precision by recall, average precision {shown(content['metrics']['average_precision'])}", x, y, *marks, ratio="1"),
        charts.legend(*entries, ("thin", f"share of positives, {share:.1%}"), *([("point", f"threshold {at['threshold']:g}")] if at else [])),
    )  # fmt: skip
    return tag("div", first, second, class_="grid")


def _at(content: Content) -> Content | None:
    """Rates at the gates' threshold."""
    wanted = (content.get("rules") or {}).get("threshold")
    return next((each for each in content.get("thresholds", ()) if each["threshold"] == wanted), None)


def calibration(content: Content) -> Markup:
    """Reliability diagram: share of positives by score, and how many rows each point stands for."""
    points = content.get("calibration") or []
    if not points:
        return Markup("")
    spans = [wilson(each["share"], each["rows"]) for each in points]
    x, y = Axis.share("mean score of a tenth of the scale"), Axis.share("share of positives")
    scores, shares = [each["score"] for each in points], [each["share"] for each in points]
    titles = [
        f"{each['rows']:,} rows: score {shown(each['score'])}, positives {shown(each['share'])}" for each in points
    ]
    marks = [
        charts.line(x, y, [0, 1], [0, 1], "thin"), charts.line(x, y, scores, shares, "first faint"),
        charts.spans(x, y, scores, [low for low, _ in spans], [high for _, high in spans], "first"),
        charts.dots(x, y, scores, shares, "big first", titles),
    ]  # fmt: skip
    error = content["metrics"].get("calibration_error")
    first = figure(
        join(["Calibration ", tag("small", "mean distance from the diagonal ", number(error))]),
        charts.plot(f"Share of positives by score; calibration error {shown(error or 0.0)}", x, y, *marks, ratio="1"),
        charts.legend(("point", "share, 95 % Wilson interval"), ("thin", "perfect")),
    )  # fmt: skip
    most = Axis.over([0, *(each["rows"] for each in points)], "rows", ticks=3)
    rows = [
        [number(each["score"]), charts.strip(most, charts.bar(most, each["rows"], "first"), height=18), number(each["rows"]), number(each["share"]), interval(span)]
        for each, span in zip(points, spans, strict=True)
    ]  # fmt: skip
    counts = table(
        ["Mean score", charts.scale(most), "Rows", "Positives", "95 %"], rows, "Calibration in numbers", (0, 2, 3, 4)
    )
    second = figure("Rows by score", counts)
    return tag("div", first, second, class_="grid")


def wilson(share: float, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    interior, spread = share + z * z / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, (interior - spread) / (1 + z * z / rows)), min(1.0, (interior + spread) / (1 + z * z / rows))


def thresholds(content: Content) -> Markup:
    found = content.get("thresholds") or []
    if not found:
        return Markup("")
    chosen = (content.get("rules") or {}).get("threshold")
    rows = [
        [
            given(each["threshold"]), estimate(each["precision"], each["intervals"].get("precision")), estimate(each["recall"], each["intervals"].get("recall")),
            percent(each["false_positive_rate"]), percent(each["selection_rate"]),
        ]
        for each in found
    ]  # fmt: skip
    heads = ["Score from", "Precision", "Recall", "False positive rate", "Selected"]
    kinds = ["best" if each["threshold"] == chosen else "" for each in found]
    return join([
        tag("h3", "By threshold"), table(heads, rows, "Precision and recall by threshold", range(5), kinds),
        note("The marked row is the threshold that the gates use."),
    ])  # fmt: skip


def classes(content: Content) -> Markup:
    """Each class against all others."""
    found = content.get("classes") or []
    rows = [
        [
            number(each["class"]), number(each["rows"]), number(each["chosen"]),
            *(estimate(each[name], each["intervals"].get(name)) for name in ("precision", "recall", "auc")),
        ]
        for each in found
    ]  # fmt: skip
    heads = ["Class", "Rows", "Chosen", "Precision", "Recall", "AUC against the rest"]
    return join([tag("h3", "By class"), table(heads, rows, "Metrics of each class", range(6))]) if rows else Markup("")


def confusion(content: Content) -> Markup:
    """How often each class was taken for each other."""
    found = content.get("confusion") or []
    if not found or len(found) > 20:
        return Markup("")
    rows = []
    for true, counts in enumerate(found):
        total = sum(counts) or 1
        cells = [
            tag("div", number(count), class_="cell" + (" own" if chosen == true else ""), style=f"--share:{count / total:.3f}", title=f"{count / total:.1%} of class {true}")
            for chosen, count in enumerate(counts)
        ]  # fmt: skip
        rows.append([f"is {true}", *cells])
    heads = ["", *(f"taken for {each}" for each in range(len(found)))]
    return join([
        tag("h3", "Confusion"), table(heads, rows, "Rows by true class and the class of the greatest score", range(1, len(heads))),
        note("Shades are shares of a row: what became of each true class."),
    ])  # fmt: skip


def errors(content: Content) -> Markup:
    """Predicted against actual on the sample, and quantiles of the absolute error over all rows."""
    parts = []
    sample = content.get("points") or {}
    if sample.get("scores"):
        predicted, actual = np.array(sample["scores"][:POINTS]), np.array(sample["labels"][:POINTS])
        both = np.concatenate([predicted, actual])
        low, high = np.quantile(both, [0.005, 0.995])
        x, y = Axis.over([low, high], "predicted", pad=0.03), Axis.over([low, high], "actual", pad=0.03)
        marks = (
            charts.line(x, y, [x.low, x.high], [x.low, x.high], "thin"),
            charts.dots(x, y, predicted, actual, "small v"),
        )
        interior = charts.medians(predicted, actual)
        trend = charts.line(x, y, [at for at, _ in interior], [value for _, value in interior], "second")
        parts.append(figure(
            join(["Predicted and actual ", tag("small", number(len(predicted)), " test rows, by hash")]),
            charts.plot("Actual value by predicted value", x, y, *marks, trend, ratio="1"), charts.legend(("point", "row"), ("second", "median of actual"), ("thin", "perfect")),
        ))  # fmt: skip
    found = content.get("errors") or []
    if found:
        most = Axis.over([0, *(each["error"] for each in found)], "absolute error", ticks=3)
        rows = [[percent(each["share"], 0), charts.strip(most, charts.bar(most, each["error"], "first"), height=18), number(each["error"])] for each in found]  # fmt: skip
        parts.append(figure("Absolute error", table(["Of rows within", charts.scale(most), "Error"], rows, "Quantiles of the absolute error", (2,)), note("Over all test rows, to 0.2 %.")))  # fmt: skip
    return tag("div", *parts, class_="grid") if parts else Markup("")
