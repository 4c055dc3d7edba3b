"""Metrics from integer accumulators, which merge in any order and are bit-identical however data is divided.

Ranking metrics come from counts per distinct score.  Beyond `SCORE_BINS` distinct scores these are binned, and the
error is reported: it is at most half of the pairs that share a bin but not a score.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas.models import METRICS_OF
from transforms.models.stored_records import ClassMetrics, CurvePoints
from transforms.records.arrays import Floats, Ints
from transforms.records.exact_sums import Bins, as_fraction, exact_sum

SCORE_BINS = 1 << 18
# scikit-learn clips float32 probabilities by this before it takes logarithms.
_EPSILON = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class MetricTally:
    """Accumulator over scored examples.

    Args:
        rows: number of examples.
        sums: (name, exact sum).
        bins: counts of examples and of positives per score; binary models only.
        classes: the same by class, per score of that class; multi-class models only.
        pairs: `((true class, predicted class), rows)`, ascending; multi-class models only.
    """

    rows: int = 0
    sums: tuple[tuple[str, int], ...] = ()
    bins: Bins | None = None
    classes: tuple[Bins, ...] = ()
    pairs: tuple[tuple[tuple[int, int], int], ...] = ()

    @classmethod
    def of(cls, objective: str, label: Floats, scores: npt.NDArray[np.float32]) -> MetricTally:
        """The tally of labels [rows] and scores [rows], or [rows, classes] of a multi-class model."""
        if objective == "binary:logistic":
            share = _clipped(scores)
            sums = {
                "positive": label,
                "log_loss": -_logarithm(np.where(label > 0, share, 1 - share)),
                "brier": (scores.astype(np.float64) - label) ** 2,
            }
            weights = np.stack([np.ones(len(label), np.int64), label.astype(np.int64)], axis=1)
            bins = Bins.of(scores.astype(np.float64), SCORE_BINS, weights)
            return cls(len(label), _summed(sums), bins)
        if objective == "multi:softprob":
            true, chosen = label.astype(np.int64), scores.argmax(axis=1)
            sums = {"log_loss": -_logarithm(_clipped(of_true_class(label, scores))), "accuracy": (chosen == true) * 1.0}
            limit = max(SCORE_BINS // scores.shape[1], 256)
            ones = np.ones(len(label), np.int64)
            bins_of = [
                Bins.of(scores[:, k].astype(np.float64), limit, np.stack([ones, true == k], axis=1).astype(np.int64))
                for k in range(scores.shape[1])
            ]
            positions, counts = np.unique(np.stack([true, chosen], axis=1), axis=0, return_counts=True)
            pairs = tuple(((t, c), n) for (t, c), n in zip(positions.tolist(), counts.tolist(), strict=True))
            return cls(len(label), _summed(sums), None, tuple(bins_of), pairs)
        error = scores.astype(np.float64) - label
        return cls(len(label), _summed({"squared": error * error, "absolute": np.abs(error)}))

    def __add__(self, other: MetricTally) -> MetricTally:
        if not self.rows or not other.rows:
            return self if self.rows else other
        sums = tuple((name, total + dict(other.sums)[name]) for name, total in self.sums)
        bins = None if self.bins is None or other.bins is None else self.bins + other.bins
        classes = tuple(mine + theirs for mine, theirs in zip(self.classes, other.classes, strict=True))
        pairs = Counter(dict(self.pairs))
        pairs.update(dict(other.pairs))
        return MetricTally(self.rows + other.rows, sums, bins, classes, tuple(sorted(pairs.items())))

    def mean(self, name: str) -> float:
        return float(as_fraction(dict(self.sums)[name]) / self.rows)


def metrics(objective: str, tally: MetricTally, threshold: float = 0.5) -> dict[str, float | None]:
    """The objective's metrics as scikit-learn defines them; None where undefined (no rows, one class)."""
    names = METRICS_OF[objective]
    if not tally.rows:
        return dict.fromkeys(names)
    if objective == "binary:logistic" and tally.bins is not None:
        known = {
            "auc": auc(tally.bins),
            "average_precision": average_precision(tally.bins),
            "calibration_error": calibration_error(tally.bins),
            **confusion_rates(tally.bins, threshold),
        }
        return {name: known[name] if name in known else tally.mean(name) for name in names}
    if objective == "multi:softprob":
        found = per_class(tally)
        macro = {
            f"macro_{name}": _mean([each[name] for each in found if each["rows"]])
            for name in ("auc", "precision", "recall")
        }
        return {name: macro[name] if name in macro else tally.mean(name) for name in names}
    errors = {
        "rmse": tally.mean("squared") ** 0.5 if "squared" in dict(tally.sums) else None,
        "mae": tally.mean("absolute"),
    }
    return {name: errors[name] for name in names}


def of_true_class(label: Floats, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each row's probability of its true class, which is 0 for a class that the model does not have."""
    true = label.astype(np.int64)
    known = true < scores.shape[1]
    found: npt.NDArray[np.float32] = scores[np.arange(len(true)), np.where(known, true, 0)]
    return np.where(known, found, np.float32(0))


def per_class(tally: MetricTally) -> list[ClassMetrics]:
    """Metrics of each class against all others: `class`, `rows`, `chosen`, `precision`, `recall` and `auc`.

    `chosen` is how often the class had the highest score.  A class that occurs and was never chosen has precision 0;
    one that does not occur has no recall.
    """
    true, chosen, hits = Counter[int](), Counter[int](), Counter[int]()
    for (is_, taken), rows in tally.pairs:
        true[is_] += rows
        chosen[taken] += rows
        hits[is_] += rows if is_ == taken else 0
    result: list[ClassMetrics] = []
    for k in range(max(len(tally.classes), max(true, default=-1) + 1)):
        # A class that the model does not have is ranked at random.
        ranked = auc(tally.classes[k]) if k < len(tally.classes) else 0.5
        precision = hits[k] / chosen[k] if chosen[k] else 0.0 if true[k] else None
        result.append(
            {
                "class": k,
                "rows": true[k],
                "chosen": chosen[k],
                "precision": precision,
                "recall": hits[k] / true[k] if true[k] else None,
                "auc": ranked,
            }
        )
    return result


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def confusion_rates(bins: Bins, threshold: float) -> dict[str, float | None]:
    """Rates among the rows whose score is at least `threshold`; None where nothing could be counted."""
    chosen = bins.values >= float(np.float32(threshold))
    positive, negative, _ = _ranked(bins)
    hits, alarms = int(positive[chosen].sum()), int(negative[chosen].sum())
    total, others = int(positive.sum()), int(negative.sum())

    def share(part: int, of: int) -> float | None:
        return part / of if of else None

    return {
        "precision": share(hits, hits + alarms),
        "recall": share(hits, total),
        "false_positive_rate": share(alarms, others),
        "selection_rate": share(hits + alarms, total + others),
    }


def calibration_bins(bins: Bins, buckets: int = 10) -> list[tuple[int, float, float]]:
    """(Rows, mean score, share of positives) of each equal part of 0 … 1 that holds a score."""
    position = np.minimum((bins.values * buckets).astype(int), buckets - 1)
    result = []
    for each in np.unique(position).tolist():
        inside = position == each
        rows, positive = bins.counts[inside].sum(axis=0).tolist()
        result.append((rows, float(bins.values[inside] @ bins.counts[inside, 0]) / rows, positive / rows))
    return result


def calibration_error(bins: Bins) -> float:
    """Mean distance between score and share of positives over ten bins, weighted by rows (Naeini et al. 2015)."""
    rows = int(bins.counts[:, 0].sum())
    return sum(count * abs(share - score) for count, score, share in calibration_bins(bins)) / rows if rows else 0.0


def curve_points(bins: Bins, points: int = 200) -> CurvePoints:
    """At most `points` points each of the ROC curve (false and true positive rate) and of precision by recall."""
    positive, negative, pairs = _ranked(bins)
    if not pairs:
        return {}
    hits, alarms = np.cumsum(positive[::-1]), np.cumsum(negative[::-1])
    even = np.linspace(0, 1, points // 2)
    positions = [np.searchsorted(each / each[-1], even).clip(0, len(hits) - 1) for each in (hits, alarms)]
    at = np.unique(np.concatenate(positions))
    recall, false, precision = hits / hits[-1], alarms / alarms[-1], hits / np.maximum(hits + alarms, 1)
    return {
        "roc": [[0.0, 0.0], *np.stack([false[at], recall[at]], axis=1).round(5).tolist()],
        "precision_recall": np.stack([recall[at], precision[at]], axis=1).round(5).tolist(),
    }


def auc(bins: Bins) -> float | None:
    """Area under the ROC curve: the share of pairs that are ranked correctly, ties counted half (Mann and Whitney
    1947)."""
    positive, negative, pairs = _ranked(bins)
    if not pairs:
        return None
    below = np.cumsum(negative) - negative
    # Twice the pairs won, an integer below 2^63 up to 3 · 10^9 rows of each class.
    return int((positive * (2 * below + negative)).sum()) / (2 * pairs)


def auc_error(bins: Bins) -> float:
    """The most by which binning may have moved `auc`: 0 as long as every distinct score has a bin of its own."""
    positive, negative, pairs = _ranked(bins)
    return float((positive * negative).sum()) / (2 * pairs) if bins.shift and pairs else 0.0


def average_precision(bins: Bins) -> float | None:
    """Σ (recallᵢ − recallᵢ₋₁) · precisionᵢ over falling scores, without interpolation."""
    positive, negative, _ = _ranked(bins)
    total = int(positive.sum())
    if not total:
        return None
    positive, negative = positive[::-1], negative[::-1]
    hits = np.cumsum(positive)
    precision = hits / np.maximum(hits + np.cumsum(negative), 1)
    return float((positive * precision).sum() / total)


def _ranked(bins: Bins) -> tuple[Ints, Ints, int]:
    positive = bins.counts[:, 1]
    negative = bins.counts[:, 0] - positive
    return positive, negative, int(positive.sum()) * int(negative.sum())


def _clipped(scores: npt.NDArray[np.float32]) -> Floats:
    return np.clip(scores.astype(np.float64), _EPSILON, 1 - _EPSILON)


def _logarithm(values: Floats) -> Floats:
    # One value at a time from the C library: NumPy's vectors need not agree with its remainders.
    result: Floats = pc.ln(pa.array(values)).to_numpy()
    return result


def _summed(sums: Mapping[str, npt.ArrayLike]) -> tuple[tuple[str, int], ...]:
    return tuple((name, exact_sum(np.asarray(values, np.float64))) for name, values in sums.items())
