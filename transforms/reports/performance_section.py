"""The whole test split in a training report: metrics, curves, calibration, thresholds, classes, errors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from schemas.models import RISING
from transforms.models.stored_records import ExplanationRecord, ModelManifest, Spans, ThresholdRates, TrainingRecord
from transforms.reports import charts
from transforms.reports.charts import Axis, LegendEntry, Paths, Plot, Strip
from transforms.reports.formatting import format_number

# The most points of a scatter, and the most classes for which a confusion matrix is shown.
POINTS, CONFUSED = 800, 20


@dataclasses.dataclass(frozen=True)
class RivalDifference:
    """The champion's value of a metric, and the model's value minus that."""

    theirs: float | None
    value: float | None
    span: Sequence[float] | None


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric with its 95 % interval; `against` is None if there is no champion to compare with."""

    name: str
    value: float | None
    span: Sequence[float] | None
    rising: bool
    against: RivalDifference | None


@dataclasses.dataclass(frozen=True)
class Curves:
    """ROC and precision by recall.

    Args:
        keys: the legend of both.
        share: the share of positives.
        threshold: the threshold that the gates use; None: there is none, or it is not among the evaluated ones.
    """

    roc: Plot
    auc: float | None
    precision_recall: Plot
    average_precision: float | None
    keys: tuple[LegendEntry, ...]
    share: float
    threshold: float | None


@dataclasses.dataclass(frozen=True)
class Bin:
    """Rows with similar scores: their mean score, their number, and the share of positives with its 95 % interval."""

    score: float
    strip: Strip
    rows: int
    share: float
    span: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A reliability diagram, and how many rows each of its points represents."""

    error: float | None
    plot: Plot
    scale: Axis
    bins: tuple[Bin, ...]


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Rates among the rows whose score is at least `at`; `used`: whether the gates use this threshold."""

    at: float
    precision: float | None
    recall: float | None
    intervals: Spans
    false_positive_rate: float | None
    selection_rate: float | None
    used: bool


@dataclasses.dataclass(frozen=True)
class Class:
    """A class against all others: its rows, how many rows were predicted to be in it, and metrics by name with their
    intervals."""

    number: int
    rows: int
    chosen: int
    metrics: tuple[tuple[float | None, Sequence[float] | None], ...]


@dataclasses.dataclass(frozen=True)
class Confused:
    """Rows of a true class that were predicted to be in another or the same class, and their share of the true
    class."""

    rows: int
    share: float


@dataclasses.dataclass(frozen=True)
class Scatter:
    """Predicted against actual values of a number of rows."""

    plot: Plot
    rows: int


@dataclasses.dataclass(frozen=True)
class Quantile:
    """The absolute error that a share of rows does not exceed."""

    share: float
    strip: Strip
    error: float


@dataclasses.dataclass(frozen=True)
class Errors:
    """Predicted against actual values on the sample, and quantiles of the absolute error over all rows."""

    scatter: Scatter | None
    scale: Axis
    quantiles: tuple[Quantile, ...]


@dataclasses.dataclass(frozen=True)
class Performance:
    """The content of the section: metrics, and details that depend on the objective.

    Args:
        champion: version of the model with which it is compared; None: there is none.
        auc_error: the greatest error of AUC, if scores were binned.
    """

    objective: str
    rows: int
    metrics: tuple[Metric, ...]
    champion: str | None
    auc_error: float | None
    curves: Curves | None = None
    calibration: Calibration | None = None
    thresholds: tuple[Threshold, ...] = ()
    classes: tuple[Class, ...] = ()
    confusion: tuple[tuple[Confused, ...], ...] = ()
    errors: Errors | None = None


def performance(content: TrainingRecord, manifest: ModelManifest, points: ExplanationRecord) -> Performance:
    objective, rival = manifest["objective"], content["rival"]
    champion = None if rival["metrics"] is None else str(rival["version"])
    found = Performance(objective, content["rows"], metrics(content), champion, content.get("auc_error") or None)
    if objective == "binary:logistic":
        return dataclasses.replace(
            found, curves=curves(content), calibration=calibration(content), thresholds=thresholds(content)
        )
    if objective == "multi:softprob":
        return dataclasses.replace(found, classes=classes(content), confusion=confusion(content))
    return dataclasses.replace(found, errors=errors(content, points))


def metrics(content: TrainingRecord) -> tuple[Metric, ...]:
    theirs, apart = content["rival"]["metrics"], content["rival"].get("differences") or {}

    def against(name: str) -> RivalDifference | None:
        if theirs is None:
            return None
        value, span = apart.get(name) or (None, None)
        return RivalDifference(theirs.get(name), value, span)

    return tuple(
        Metric(name, value, content["intervals"].get(name), name in RISING, against(name))
        for name, value in content["metrics"].items()
    )


def curves(content: TrainingRecord) -> Curves | None:
    """The model's curves, and the champion's beside them."""
    if not content.get("roc"):
        return None
    rival, bins, at = content["rival"], content["calibration"], _at(content)
    auc, precision = content["metrics"]["auc"], content["metrics"]["average_precision"]
    x, y = Axis.share("false positive rate"), Axis.share("true positive rate")
    paths = charts.line(x, y, [0, 1], [0, 1], "thin") + _curve(x, y, content["roc"], rival.get("roc"))
    roc = Plot(f"ROC curve, area {format_number(auc or math.nan)}", x, y, paths, "1")
    share = sum(each["rows"] * each["share"] for each in bins) / sum(each["rows"] for each in bins)
    x, y = Axis.share("recall"), Axis.share("precision")
    paths = charts.line(x, y, [0, 1], [share, share], "thin")
    paths += _curve(x, y, content["precision_recall"], rival.get("precision_recall"))
    if at and at["precision"] is not None and at["recall"] is not None:
        shown = f"precision {format_number(at['precision'])}, recall {format_number(at['recall'])}"
        text = f"threshold {at['threshold']:g}: {shown}"
        paths += charts.dots(x, y, [at["recall"]], [at["precision"]], "big first", [text])
    by_recall = Plot(f"Precision by recall, average precision {format_number(precision or math.nan)}", x, y, paths, "1")
    keys = (
        LegendEntry("first", "this model"),
        *([LegendEntry("second", f"champion, version {rival['version']}")] if rival.get("roc") else []),
    )
    return Curves(roc, auc, by_recall, precision, keys, share, at["threshold"] if at else None)


def _curve(x: Axis, y: Axis, points: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]] | None) -> Paths:
    """The area under a curve, the champion's curve, and the curve, in the order of drawing."""
    mine = np.array(points)
    paths = charts.band(x, y, mine[:, 0], np.zeros(len(mine)), mine[:, 1], "first")
    if theirs:
        other = np.array(theirs)
        paths += charts.line(x, y, other[:, 0], other[:, 1], "second")
    return paths + charts.line(x, y, mine[:, 0], mine[:, 1], "first")


def _at(content: TrainingRecord) -> ThresholdRates | None:
    """Rates at the gates' threshold."""
    wanted = (content.get("rules") or {}).get("threshold")
    return next((each for each in content.get("thresholds", ()) if each["threshold"] == wanted), None)


def calibration(content: TrainingRecord) -> Calibration | None:
    points, error = content.get("calibration") or [], content["metrics"].get("calibration_error")
    if not points:
        return None
    spans = [wilson(each["share"], each["rows"]) for each in points]
    x, y = Axis.share("mean score of a tenth of the scale"), Axis.share("share of positives")
    scores, shares = [each["score"] for each in points], [each["share"] for each in points]
    titles = [
        f"{each['rows']:,} rows: score {format_number(each['score'])}, positives {format_number(each['share'])}"
        for each in points
    ]
    paths = (
        charts.line(x, y, [0, 1], [0, 1], "thin")
        + charts.line(x, y, scores, shares, "first faint")
        + charts.spans(x, y, scores, [low for low, _ in spans], [high for _, high in spans], "first")
        + charts.dots(x, y, scores, shares, "big first", titles)
    )
    plot = Plot(f"Share of positives by score; calibration error {format_number(error or 0.0)}", x, y, paths, "1")
    most = Axis.over([0, *(each["rows"] for each in points)], "rows", ticks=3)
    bins = tuple(
        Bin(each["score"], Strip(most, charts.bar(most, each["rows"], "first"), 18), each["rows"], each["share"], span)
        for each, span in zip(points, spans, strict=True)
    )
    return Calibration(error, plot, most, bins)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    z = 1.959964
    interior, spread = share + z * z / (2 * rows), z * math.sqrt(share * (1 - share) / rows + z * z / (4 * rows * rows))
    return max(0.0, (interior - spread) / (1 + z * z / rows)), min(1.0, (interior + spread) / (1 + z * z / rows))


def thresholds(content: TrainingRecord) -> tuple[Threshold, ...]:
    used = (content.get("rules") or {}).get("threshold")
    return tuple(
        Threshold(
            each["threshold"],
            each["precision"],
            each["recall"],
            each["intervals"],
            each["false_positive_rate"],
            each["selection_rate"],
            each["threshold"] == used,
        )
        for each in content.get("thresholds") or []
    )


def classes(content: TrainingRecord) -> tuple[Class, ...]:
    return tuple(
        Class(
            each["class"],
            each["rows"],
            each["chosen"],
            tuple((each[name], each["intervals"].get(name)) for name in ("precision", "recall", "auc")),
        )
        for each in content.get("classes") or []
    )


def confusion(content: TrainingRecord) -> tuple[tuple[Confused, ...], ...]:
    """How often each class was predicted for each true class."""
    found = content.get("confusion") or []
    if len(found) > CONFUSED:
        return ()
    return tuple(tuple(Confused(count, count / (sum(counts) or 1)) for count in counts) for counts in found)


def errors(content: TrainingRecord, points: ExplanationRecord) -> Errors:
    found = content.get("errors") or []
    most = Axis.over([0, *(each["error"] for each in found)], "absolute error", ticks=3)
    quantiles = tuple(
        Quantile(each["share"], Strip(most, charts.bar(most, each["error"], "first"), 18), each["error"])
        for each in found
    )
    return Errors(scatter(points), most, quantiles)


def scatter(points: ExplanationRecord) -> Scatter | None:
    if not points.get("scores"):
        return None
    predicted, actual = np.array(points["scores"][:POINTS]), np.array(points["labels"][:POINTS])
    low, high = np.quantile(np.concatenate([predicted, actual]), [0.005, 0.995])
    x, y = Axis.over([low, high], "predicted", pad=0.03), Axis.over([low, high], "actual", pad=0.03)
    middle = charts.medians(predicted, actual)
    paths = (
        charts.line(x, y, [x.low, x.high], [x.low, x.high], "thin")
        + charts.dots(x, y, predicted, actual, "small v")
        + charts.line(x, y, [at for at, _ in middle], [value for _, value in middle], "second")
    )
    return Scatter(Plot("Actual value by predicted value", x, y, paths, "1"), len(predicted))
