"""Evaluation of a scored test split: metrics with confidence intervals, overall and by slice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa

from schemas import Gates, Model
from schemas.models import RISING
from schemas.splits import LABEL
from schemas.tables import scores
from transforms.evaluation import metrics as measures
from transforms.evaluation.bootstrap import (
    ReplicateBins,
    Replicates,
    error_quantiles,
    keys_of,
    percentile_interval,
    rate_replicates,
    replicate_bins,
    replicates,
    weights,
)
from transforms.evaluation.metrics import MetricTally, auc_error, metrics
from transforms.models.scoring import carried_name
from transforms.models.stored_records import CalibrationBin, MetricDetails, MetricsRecord, ThresholdRates
from transforms.records.arrays import Ints
from transforms.records.exact_sums import Bins
from transforms.records.record_batches import frame

# (column, value as text or None) of each column of a slice; () stands for the whole split.
SliceKey = tuple[tuple[str, str | None], ...]
Interval = tuple[float, float]
Intervals = Mapping[str, Interval | None]
# The most classes for which a confusion matrix is reported, and the reported quantiles of the absolute error.
MATRIX, ERRORS = 50, (0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
# The metrics of each class that have intervals.
OF_CLASS: tuple[Literal["auc", "precision", "recall"], ...] = ("auc", "precision", "recall")
THRESHOLDS = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclasses.dataclass(frozen=True)
class GroupTally:
    """Accumulator of the whole split or of a slice: exact tallies, and bootstrap counts if rows have ids."""

    tally: MetricTally
    by_replicate: ReplicateBins | None = None

    def __add__(self, other: GroupTally) -> GroupTally:
        by_replicate = (
            None if self.by_replicate is None or other.by_replicate is None else self.by_replicate + other.by_replicate
        )
        return GroupTally(self.tally + other.tally, by_replicate)


Tallies = dict[SliceKey, GroupTally]


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics of a test split.

    Args:
        rows: number of examples.
        metrics: overall metrics, None where undefined.
        slices: metrics by value of each declared slice, the largest first.
        auc_error: greatest error of the overall AUC that is due to binning.
        intervals: 95 % interval of each metric; empty without row ids.
        details: JSON values by objective.  A binary model has rates by threshold, calibration, and the points of
            curves; a multi-class model has each class's metrics and the confusion matrix; a regression has quantiles of
            the error.
        replicates: metrics per bootstrap replicate, for paired differences.
    """

    rows: int
    metrics: Mapping[str, float | None]
    slices: tuple[EvaluationSlice, ...] = ()
    auc_error: float = 0.0
    intervals: Intervals = dataclasses.field(default_factory=dict)
    details: MetricDetails = dataclasses.field(default_factory=lambda: MetricDetails())
    replicates: Replicates | None = dataclasses.field(default=None, compare=False, repr=False)


@dataclasses.dataclass(frozen=True)
class EvaluationSlice:
    """Metrics of the examples with one value of a slice's columns.

    Args:
        by: columns and their values.
        rows: number of examples.
        metrics: metrics of the slice, None where undefined.
        intervals: 95 % interval of each metric; empty below 30 rows.
        gaps: 95 % interval of how much worse a metric is than that of the whole, on the same replicates.
        rates: confusion rates at the threshold; only of binary models.
    """

    by: SliceKey
    rows: int
    metrics: Mapping[str, float | None]
    intervals: Intervals = dataclasses.field(default_factory=dict)
    gaps: Intervals = dataclasses.field(default_factory=dict)
    rates: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    @property
    def name(self) -> str:
        return ", ".join(f"{column}={'null' if value is None else value}" for column, value in self.by)


def tally_columns(gates: Gates) -> tuple[str, ...]:
    """Columns of the examples that `tally` needs besides the scores."""
    return tuple(dict.fromkeys([*(name for group in gates.slices for name in _group(group)), LABEL]))


def _group(group: str | tuple[str, ...]) -> tuple[str, ...]:
    return (group,) if isinstance(group, str) else tuple(group)


def tally(scored: pa.RecordBatch, objective: str, slices: Iterable[str | tuple[str, ...]] = ()) -> Tallies:
    """The tally of `scored`, for the whole split and for each slice.

    Args:
        scored: the output of `Score` for examples, with the columns named by `tally_columns`.
    """
    rows = frame(scored)
    label = rows[carried_name(LABEL)].cast(pl.Float64).to_numpy()
    several = [name for name in scores(len(rows.columns)) if name in rows.columns]
    values = rows.select(several).to_numpy() if several else rows["score"].to_numpy()
    if not len(label):
        return {}
    drawn = keys = None
    if "row_id" in rows.columns:
        drawn, keys = weights(rows["row_id"].to_numpy()), keys_of(objective, label, values)

    def part(index: slice | Ints) -> GroupTally:
        by_replicate = None if drawn is None or keys is None else replicate_bins(keys[..., index], drawn[index])
        return GroupTally(MetricTally.of(objective, label[index], values[index]), by_replicate)

    result: Tallies = {(): part(slice(None))}
    for group in slices:
        columns = _group(group)
        texts = rows.select(pl.col(carried_name(name)).cast(pl.String).alias(name) for name in columns)
        positions = texts.with_row_index("__row").group_by(list(columns)).agg("__row")
        for *key, position in positions.iter_rows():
            result[tuple(zip(columns, key))] = part(np.array(position))
    return result


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class Tallying(beam.CombineFn):
    """RecordBatches of scored examples → `Report`."""

    objective: str
    slices: tuple[str | tuple[str, ...], ...] = ()
    threshold: float = 0.5

    def create_accumulator(self) -> Tallies:
        return {}

    def add_input(self, state: Tallies, scored: pa.RecordBatch) -> Tallies:
        return self.merge_accumulators([state, tally(scored, self.objective, self.slices)])

    def merge_accumulators(self, states: Iterable[Tallies]) -> Tallies:
        total: Tallies = {}
        for state in states:
            for key, part in state.items():
                total[key] = total[key] + part if key in total else part
        return total

    def extract_output(self, state: Tallies) -> Report:
        return report(self.objective, state, self.threshold)


def report(objective: str, state: Tallies, threshold: float = 0.5) -> Report:
    """Compute the metrics of merged tallies."""
    whole = state.get((), GroupTally(MetricTally()))
    drawn = _drawn(objective, whole, threshold)
    parts = [_slice(objective, key, part, drawn, threshold) for key, part in state.items() if key]
    parts.sort(key=lambda each: ([column for column, _ in each.by], -each.rows, each.name))
    bins = whole.tally.bins
    return Report(
        whole.tally.rows,
        metrics(objective, whole.tally, threshold),
        tuple(parts),
        auc_error(bins) if bins else 0.0,
        _intervals(drawn),
        _details(objective, whole, drawn, threshold),
        drawn,
    )


def _exact(objective: str, part: GroupTally, threshold: float) -> dict[str, float | None]:
    bins, found = part.tally.bins, metrics(objective, part.tally, threshold)
    if objective == "multi:softprob":
        each = measures.per_class(part.tally)
        found |= {f"{name} of class {of['class']}": of[name] for of in each for name in OF_CLASS}
    return {**found, **(measures.confusion_rates(bins, threshold) if bins else {})}


def _drawn(objective: str, part: GroupTally, threshold: float) -> Replicates | None:
    if part.by_replicate is None:
        return None
    return replicates(objective, part.by_replicate, _exact(objective, part, threshold), threshold)


def _intervals(drawn: Replicates | None) -> dict[str, Interval | None]:
    return (
        {}
        if drawn is None
        else {name: percentile_interval(values) for name, values in drawn.values.items() if " of class " not in name}
    )


def _slice(
    objective: str, key: SliceKey, part: GroupTally, whole: Replicates | None, threshold: float
) -> EvaluationSlice:
    drawn = _drawn(objective, part, threshold)
    gaps = {}
    if drawn is not None and whole is not None:
        for name, values in drawn.values.items():
            if name in whole.values and " of class " not in name:
                gap = whole.values[name] - values
                gaps[name] = percentile_interval(gap if name in RISING else -gap)
    bins = part.tally.bins
    rates = measures.confusion_rates(bins, threshold) if bins else {}
    return EvaluationSlice(
        key, part.tally.rows, metrics(objective, part.tally, threshold), _intervals(drawn), gaps, rates
    )


def _details(objective: str, whole: GroupTally, drawn: Replicates | None, threshold: float) -> MetricDetails:
    if not whole.tally.rows:
        return {}
    if objective == "multi:softprob":
        return _classes(whole.tally, drawn)
    if (bins := whole.tally.bins) is None:
        return (
            {}
            if whole.by_replicate is None
            else {
                "errors": [
                    {"share": share, "error": error} for share, error in error_quantiles(whole.by_replicate, ERRORS)
                ]
            }
        )
    return _binary(whole, bins, threshold)


def _classes(whole: MetricTally, drawn: Replicates | None) -> MetricDetails:
    found = measures.per_class(whole)
    for each in found:
        names = [str(name) for name in OF_CLASS]
        each["intervals"] = (
            {name: drawn.interval(f"{name} of class {each['class']}") for name in names} if drawn else {}
        )
    if len(found) > MATRIX:
        return {"classes": found}
    rows = dict(whole.pairs)
    return {
        "classes": found,
        "confusion": [[rows.get((true, chosen), 0) for chosen in range(len(found))] for true in range(len(found))],
    }


def _binary(whole: GroupTally, bins: Bins, threshold: float) -> MetricDetails:
    rates_at = {each: measures.confusion_rates(bins, each) for each in sorted({*THRESHOLDS, threshold})}
    drawn_at = {} if whole.by_replicate is None else rate_replicates(whole.by_replicate, rates_at)
    at: list[ThresholdRates] = []
    for each, rates in rates_at.items():
        drawn = drawn_at.get(each)
        shown = {name: drawn.interval(name) for name in ("precision", "recall")} if drawn else {}
        at.append(
            {
                "threshold": each,
                "precision": rates["precision"],
                "recall": rates["recall"],
                "false_positive_rate": rates["false_positive_rate"],
                "selection_rate": rates["selection_rate"],
                "intervals": shown,
            }
        )
    points: list[CalibrationBin] = [
        {"rows": rows, "score": score, "share": share} for rows, score, share in measures.calibration_bins(bins)
    ]
    details: MetricDetails = {"thresholds": at, "calibration": points}
    return {**details, **measures.curve_points(bins)}


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Evaluate(beam.PTransform):
    """PCollection[RecordBatch] of scored examples → one `Report`.

    Args:
        model: the model whose objective, slices and threshold apply.
        slices: whether slices are evaluated, too.
    """

    model: Model
    slices: bool = True

    def expand(self, scored: beam.PCollection) -> beam.PCollection:
        gates = self.model.gates
        tallying = Tallying(self.model.objective, gates.slices if self.slices else (), gates.threshold)
        return scored | "Tally" >> beam.CombineGlobally(tallying)


def metrics_record(report: Report) -> MetricsRecord:
    """The report as JSON values, as in `training.json`."""
    return {
        "rows": report.rows,
        "metrics": dict(report.metrics),
        "intervals": dict(report.intervals),
        "auc_error": report.auc_error,
        "slices": [
            {
                "by": dict(each.by),
                "rows": each.rows,
                "metrics": dict(each.metrics),
                "intervals": dict(each.intervals),
                "gaps": dict(each.gaps),
                "rates": dict(each.rates),
            }
            for each in report.slices
        ],
        **report.details,
    }
