"""Confidence intervals by the Poisson bootstrap (Chamandy et al. 2012).

Each row enters each replicate Poisson(1) times.  The number is a hash of the row's id and the replicate, so the result
does not depend on bundles or on the order of merging, and two models that score the same rows have the same replicates,
which makes their differences paired.  The accumulator has integer counts per bin of a fine histogram and replicate.  A
replicate's metric is computed from the midpoints of the bins; its offset to the exact metric, at most half of a bin's
width, is subtracted from the interval.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from transforms.evaluation.metrics import of_true_class
from transforms.records.arrays import Floats, Ints
from transforms.records.row_hashing import mix_bits

REPLICATES = 200
# Fewest rows that get an interval: replicates of fewer hardly differ from the rows themselves.
LEAST_ROWS = 30
LEVEL = 0.95
# Bins per unit of log odds, and the log odds beyond which all scores are in one bin.
_STEPS, _BOUND = 128, 16
# Low bits of a float32 error that are ignored: 8 bits of the mantissa stay, so a bin is 0.4 % wide.
_DROPPED = 15
# The most classes for which AUCs have intervals, and their bins per unit of log odds.
MOST_CLASSES = 20
_COARSE = 16
# A row of a multi-class model is in one bin of each kind; the bits from this one on number the kind.
_KIND = 1 << 40
# Rows hashed at a time, so that they stay in the CPU's caches.
_CACHED = 1024
# Greatest offset between the binned and the exact metric for which there is an interval; relative above 1.
HIDDEN = 0.02
_EPSILON = float(np.finfo(np.float32).eps)

DrawCounts = npt.NDArray[np.int32]


def _inverse() -> npt.NDArray[np.uint8]:
    """Table from 16 uniform bits to a Poisson(1) number; probabilities are exact to 2^−16."""
    below = np.cumsum([math.exp(-1) / math.factorial(k) for k in range(20)])
    return np.searchsorted(below, (np.arange(1 << 16) + 0.5) / (1 << 16), side="right").astype(np.uint8)


_POISSON = _inverse()


def weights(row_ids: Ints, replicates: int = REPLICATES) -> npt.NDArray[np.uint8]:
    """How often each row enters each replicate, uint8 [rows, replicates].

    >>> weights(np.array([7, 8]), 4).tolist() == [weights(np.array([row]), 4)[0].tolist() for row in (7, 8)]
    True
    """
    words = -(-replicates // 4)
    result = np.empty((len(row_ids), words * 4), np.uint8)
    with np.errstate(over="ignore"):
        steps = np.arange(1, words + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for start in range(0, len(row_ids), _CACHED):
            mixed = mix_bits(row_ids[start : start + _CACHED].view(np.uint64))
            hashed = mix_bits((mixed[:, None] + steps).ravel()).reshape(len(mixed), words)
            np.take(_POISSON, hashed.view(np.uint16), out=result[start : start + _CACHED], mode="clip")
    return result[:, :replicates]


@dataclasses.dataclass(frozen=True, eq=False)
class ReplicateBins:
    """Counts per bin and replicate.

    Args:
        keys: keys of the bins that have rows, ascending, int64 [bins].
        counts: rows per bin and replicate, int32 [bins, replicates].
        plain: rows per bin, each counted once, int64 [bins].
    """

    keys: Ints
    counts: DrawCounts
    plain: Ints

    def __add__(self, other: ReplicateBins) -> ReplicateBins:
        if len(self.keys) == len(other.keys) and bool((self.keys == other.keys).all()):
            return ReplicateBins(self.keys, self.counts + other.counts, self.plain + other.plain)
        keys = np.union1d(self.keys, other.keys)
        counts = np.zeros((len(keys), self.counts.shape[1]), np.int32)
        plain = np.zeros(len(keys), np.int64)
        for each in (self, other):
            position = np.searchsorted(keys, each.keys)
            counts[position] += each.counts
            plain[position] += each.plain
        return ReplicateBins(keys, counts, plain)

    @property
    def rows(self) -> int:
        return int(self.plain[self.keys < _KIND].sum())


def replicate_bins(keys: Ints, drawn: npt.NDArray[np.uint8]) -> ReplicateBins:
    """Count rows by bin and replicate.

    Args:
        keys: bin of each row, [rows], or [kinds, rows].
        drawn: how often each row enters each replicate, [rows, replicates].
    """
    if keys.ndim == 2:
        kinds = [replicate_bins(each, drawn) for each in keys]
        return ReplicateBins(
            *(np.concatenate([getattr(each, name) for each in kinds]) for name in ("keys", "counts", "plain"))
        )
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(keys) else np.zeros(0, int)
    sums = (
        np.add.reduceat(drawn[order], first, axis=0, dtype=np.int32)
        if len(keys)
        else np.zeros((0, drawn.shape[1]), np.int32)
    )
    return ReplicateBins(ordered[first], sums, np.diff(np.append(first, len(keys))).astype(np.int64))


def keys_of(objective: str, label: Floats, scores: npt.NDArray[np.float32]) -> Ints:
    """Key of each row's bin: [rows], or [kinds, rows] of a multi-class model.

    A binary model's key is twice the score's bin plus the label.  A regression's key is the leading bits of the error.
    A multi-class model has three kinds: twice the bin of the true class's score plus whether that class was predicted;
    the pair of true and predicted class; and, by class, twice the coarse bin of its score plus whether it is the true
    class.
    """
    if objective == "binary:logistic":
        return _odds(scores) * 2 + (label > 0)
    if objective == "multi:softprob":
        true, chosen = label.astype(np.int64), scores.argmax(axis=1)
        kinds = [_odds(of_true_class(label, scores)) * 2 + (chosen == true), _KIND + (true << 16) + chosen]
        if scores.shape[1] <= MOST_CLASSES:
            step = _STEPS // _COARSE
            kinds += [(2 + k) * _KIND + _odds(scores[:, k]) // step * 2 + (true == k) for k in range(scores.shape[1])]
        return np.stack(kinds)
    error = np.abs(scores.astype(np.float64) - label).astype(np.float32)
    return (error.view(np.uint32) >> np.uint32(_DROPPED)).astype(np.int64)


def _odds(scores: npt.NDArray[np.float32]) -> Ints:
    share = np.clip(scores.astype(np.float64), _EPSILON, 1 - _EPSILON)
    # One value at a time from the C library, as in `metrics`.
    odds = pc.ln(pa.array(share / (1 - share))).to_numpy()
    return np.floor(np.clip(odds, -_BOUND, _BOUND) * _STEPS).astype(np.int64) + _BOUND * _STEPS


def _share(by_replicate: Ints) -> Floats:
    """The midpoint of each bin, as a probability."""
    return 1 / (1 + np.exp(_BOUND - (by_replicate + 0.5) / _STEPS))


def replicated(objective: str, by_replicate: ReplicateBins, threshold: float = 0.5) -> dict[str, Floats]:
    """Each metric in every replicate, NaN where undefined; the last value is that of the rows themselves."""
    counts = _counts(by_replicate)
    rows = counts.sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        if objective == "binary:logistic":
            return _binary(by_replicate.keys, counts, rows, threshold)
        if objective == "multi:softprob":
            return _multiple(by_replicate.keys, counts)
        error = _errors(by_replicate)
        return {"rmse": np.sqrt((error * error) @ counts / rows), "mae": error @ counts / rows}


def _counts(by_replicate: ReplicateBins) -> Ints:
    """Rows per bin in every replicate, and those of the rows themselves."""
    return np.column_stack([by_replicate.counts, by_replicate.plain]).astype(np.int64)


def _errors(by_replicate: ReplicateBins) -> Floats:
    """The midpoint of each bin of absolute errors."""
    interior = (
        ((by_replicate.keys.astype(np.uint32) << _DROPPED) + (1 << (_DROPPED - 1))).astype(np.uint32).view(np.float32)
    )
    return np.where(by_replicate.keys == 0, 0.0, interior.astype(np.float64))


def error_quantiles(by_replicate: ReplicateBins, shares: Sequence[float]) -> list[tuple[float, float]]:
    """(share, the absolute error that this share of rows does not exceed), exact to half a bin, which is 0.2 %."""
    below = np.cumsum(by_replicate.plain)
    positions = [np.searchsorted(below, math.ceil(share * int(below[-1]))) for share in shares]
    return [(share, float(_errors(by_replicate)[position])) for share, position in zip(shares, positions, strict=True)]


def _multiple(keys: Ints, counts: Ints) -> dict[str, Floats]:
    """Metrics of a multi-class model, and `… of class k`; means are over the classes that occur in a replicate."""
    kind, inner = keys // _KIND, keys % _KIND
    plain, pairs = counts[kind == 0], counts[kind == 1]
    rows, losses = plain.sum(axis=0), -np.log(_share(inner[kind == 0] >> 1))
    result = {"log_loss": losses @ plain / rows, "accuracy": (inner[kind == 0] & 1) @ plain / rows}
    true, chosen = inner[kind == 1] >> 16, inner[kind == 1] & 0xFFFF
    found: dict[str, list[Floats]] = {"auc": [], "precision": [], "recall": []}
    for k in np.unique(true).tolist():
        occurs, taken = pairs[true == k].sum(axis=0), pairs[chosen == k].sum(axis=0)
        hits = pairs[(true == k) & (chosen == k)].sum(axis=0)
        of_class = {"precision": np.where(occurs > 0, hits / np.maximum(taken, 1), np.nan), "recall": hits / occurs}
        mine = kind == 2 + k
        if mine.any():
            of_class["auc"] = _area(inner[mine], counts[mine])
        elif (kind > 1).any():
            of_class["auc"] = np.where(occurs > 0, 0.5, np.nan)  # the model has no such class, and ranks it at random
        for name, values in of_class.items():
            found[name].append(values)
            result[f"{name} of class {k}"] = values
    for name, each in found.items():
        if each:
            known = np.isfinite(np.stack(each))
            result[f"macro_{name}"] = np.where(known, np.stack(each), 0).sum(axis=0) / known.sum(axis=0)
    return result


def _area(keys: Ints, counts: Ints) -> Floats:
    """AUC of each replicate: the share of pairs that are ranked correctly, ties counted half."""
    label = (keys & 1)[:, None]
    # Bins of one score are neighbours, that of the negatives first.
    first = np.flatnonzero(np.concatenate([[True], (keys[1:] >> 1) != (keys[:-1] >> 1)]))
    up, down = np.add.reduceat(counts * label, first, axis=0), np.add.reduceat(counts * (1 - label), first, axis=0)
    won: Floats = (up * (2 * (np.cumsum(down, axis=0) - down) + down)).sum(axis=0)
    return won / (2.0 * up.sum(axis=0) * down.sum(axis=0))


def _binary(keys: Ints, counts: Ints, rows: Ints, threshold: float) -> dict[str, Floats]:
    label, share = (keys & 1)[:, None], _share(keys >> 1)
    positive, negative = counts * label, counts * (1 - label)
    hits, misses = positive.sum(axis=0), negative.sum(axis=0)
    losses = -np.log(np.where(label[:, 0] == 1, share, 1 - share))
    # Bins of one score are neighbours, that of the negatives first.
    first = np.flatnonzero(np.concatenate([[True], (keys[1:] >> 1) != (keys[:-1] >> 1)]))
    up, down = np.add.reduceat(positive, first, axis=0), np.add.reduceat(negative, first, axis=0)
    below = np.cumsum(down, axis=0) - down
    won = (up * (2 * below + down)).sum(axis=0)
    caught, alarms = np.cumsum(up[::-1], axis=0), np.cumsum(down[::-1], axis=0)
    precision = caught / np.maximum(caught + alarms, 1)
    bucket = np.minimum((share * 10).astype(int), 9)
    gaps = np.zeros(counts.shape[1])
    for each in np.unique(bucket):
        inside = bucket == each
        gaps += np.abs(positive[inside].sum(axis=0) - share[inside] @ counts[inside])
    return {
        "auc": won / (2.0 * hits * misses),
        "average_precision": np.where(hits > 0, (up[::-1] * precision).sum(axis=0) / hits, np.nan),
        "log_loss": losses @ counts / rows,
        "brier": ((share[:, None] - label) ** 2 * counts).sum(axis=0) / rows,
        "calibration_error": gaps / rows,
        **_rates(keys, counts, threshold),
    }


def _rates(keys: Ints, counts: Ints, threshold: float) -> dict[str, Floats]:
    """The metrics of a binary model that depend on the threshold."""
    positive, selected = keys & 1 == 1, _share(keys >> 1) >= threshold
    hits, misses = counts[positive].sum(axis=0), counts[~positive].sum(axis=0)
    true, false = counts[positive & selected].sum(axis=0), counts[~positive & selected].sum(axis=0)
    return {
        "precision": true / (true + false),
        "recall": true / hits,
        "false_positive_rate": false / misses,
        "selection_rate": (true + false) / (hits + misses),
    }


@dataclasses.dataclass(frozen=True, eq=False)
class Replicates:
    """Each metric in every replicate, less the offset to the exact metric."""

    values: dict[str, Floats]

    def interval(self, name: str) -> tuple[float, float] | None:
        """The interval of one metric; None if it is undefined."""
        return percentile_interval(self.values[name]) if name in self.values else None


def replicates(
    objective: str, by_replicate: ReplicateBins, exact: dict[str, float | None], threshold: float = 0.5
) -> Replicates | None:
    """The replicates of `exact` metrics, NaN where bins are too coarse for a metric; None if there are too few rows."""
    if by_replicate.rows < LEAST_ROWS:
        return None
    return _centred(replicated(objective, by_replicate, threshold), exact)


def rate_replicates(
    by_replicate: ReplicateBins, exact_at: Mapping[float, Mapping[str, float | None]]
) -> dict[float, Replicates | None]:
    """By threshold, as `replicates`, but only of the metrics of a binary model that depend on the threshold."""
    if by_replicate.rows < LEAST_ROWS:
        return dict.fromkeys(exact_at)
    counts = _counts(by_replicate)
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            threshold: _centred(_rates(by_replicate.keys, counts, threshold), exact)
            for threshold, exact in exact_at.items()
        }


def _centred(found: Mapping[str, Floats], exact: Mapping[str, float | None]) -> Replicates:
    values = {}
    for name, drawn in found.items():
        if (value := exact.get(name)) is None:
            continue
        offset = value - drawn[-1]
        # Bins that are too coarse for a metric, such as probabilities beyond the last bin, do not show its spread.
        hidden = not abs(offset) <= HIDDEN * max(1.0, abs(value))
        values[name] = np.full(len(drawn) - 1, np.nan) if hidden else drawn[:-1] + offset
    return Replicates(values)


def percentile_interval(values: Floats) -> tuple[float, float] | None:
    """The central 95 % of replicates; None if the metric is undefined in more than half of them."""
    defined = values[np.isfinite(values)]
    if 2 * len(defined) < len(values) or not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
