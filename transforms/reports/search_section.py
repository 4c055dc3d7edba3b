"""The search of a training run: its trials, their learning curves, and the metric by parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from schemas.models import RISING
from transforms.models.stored_records import ModelManifest, TrainingRecord, TrialRecord
from transforms.reports import charts
from transforms.reports.charts import Axis, LegendEntry, Plot
from transforms.reports.formatting import format_number, metric_name

# The most trials that the table shows at once; trials and points of learning curves that are drawn; and pictures.
SHOWN, TRIALS, ROUNDS, PICTURES = 12, 60, 160, 7


@dataclasses.dataclass(frozen=True)
class TrialRow:
    """A row of the table of trials.

    Args:
        params: values of the parameters that the table shows, in its order.
        kept: whether this trial was chosen.
    """

    number: int
    value: float | None
    rounds: int | None
    params: tuple[object, ...]
    rung: int
    folds: tuple[float, ...]
    seconds: float
    error: str | None
    kept: bool


@dataclasses.dataclass(frozen=True)
class SearchPicture:
    """A chart of trials: learning curves, or the metric by a `parameter`."""

    parameter: str | None
    plot: Plot
    keys: tuple[LegendEntry, ...] = ()


@dataclasses.dataclass(frozen=True)
class Trials:
    """The table of trials, the best first, failed ones last.

    Args:
        names: names of the parameters that are shown.
        halved, folded: whether trials have rungs, and whether they have folds.
    """

    names: tuple[str, ...]
    halved: bool
    folded: bool
    first: tuple[TrialRow, ...]
    more: tuple[TrialRow, ...]


@dataclasses.dataclass(frozen=True)
class SearchSection:
    """The content of the section; `best` is None if no trial is recorded."""

    metric: str
    count: int
    failed: int
    best: TrialRow | None
    pictures: tuple[SearchPicture, ...] = ()
    trials: Trials | None = None


def search(content: TrainingRecord, manifest: ModelManifest) -> SearchSection:
    trials, metric = content["trials"], manifest["metric"]
    worked = [each for each in trials if not each["error"] and each["value"] is not None]
    failed = len(trials) - len(worked)
    if not worked:
        return SearchSection(metric, len(trials), failed, None)
    last, sign = max(each["rung"] for each in worked), _sign(metric)
    best = min((each for each in worked if each["rung"] == last), key=lambda each: (sign * _value(each), each["trial"]))
    varied = [name for name in trials[0]["params"] if len({str(each["params"].get(name)) for each in trials}) > 1]
    names = tuple(varied or trials[0]["params"])
    learning = curves(worked, best, metric)
    pictures = [learning] if learning else []
    room = PICTURES - 1  # the place of the learning curves stays empty if there are none
    pictures += [by_parameter(name, worked, best, metric) for name in varied if _numbers(name, worked)][:room]
    return SearchSection(
        metric, len(trials), failed, _trial(best, names, best), tuple(pictures), table(trials, best, names, metric)
    )


def _sign(metric: str) -> int:
    return -1 if metric in RISING else 1


def _trial(each: TrialRecord, names: Sequence[str], best: TrialRecord) -> TrialRow:
    params = tuple(each["params"].get(name) for name in names)
    return TrialRow(
        each["trial"],
        each["value"],
        each["rounds"],
        params,
        each["rung"],
        tuple(each["folds"]),
        each["seconds"],
        each["error"],
        each is best,
    )


def table(trials: Sequence[TrialRecord], best: TrialRecord, names: tuple[str, ...], metric: str) -> Trials:
    def merit(each: TrialRecord) -> tuple[bool, int, float, int]:
        return each["value"] is None, -each["rung"], _sign(metric) * (each["value"] or 0.0), each["trial"]

    rows = tuple(_trial(each, names, best) for each in sorted(trials, key=merit))
    halved, folded = any(each.rung for each in rows), any(each.folds for each in rows)
    return Trials(names, halved, folded, rows[:SHOWN], rows[SHOWN:])


def curves(worked: Sequence[TrialRecord], best: TrialRecord, metric: str) -> SearchPicture | None:
    """The metric on validation after each round, for some of the rounds."""
    chosen = [best, *[each for each in worked if each is not best][: TRIALS - 1]]
    thin = {each["trial"]: _thinned(each["history"]) for each in chosen}
    values = np.concatenate([found for _, found in thin.values()])
    if not len(values):
        return None
    # The first rounds are far from the rest, and not informative.
    low, high = np.quantile(values, [0.02, 1.0] if metric in RISING else [0.0, 0.98])
    x = Axis.over([1.0, *(float(at.max()) for at, _ in thin.values() if len(at))], "boosting rounds")
    y = Axis.over([low, high], f"validation {metric_name(metric)}", pad=0.04)
    others = [each for trial, each in thin.items() if trial != best["trial"]]
    paths = [path for at, found in others for path in charts.line(x, y, at, found, "thin solid")]
    at, found = thin[best["trial"]]
    paths += charts.line(x, y, at, found, "first")
    rounds, value = best["rounds"], format_number(_value(best))
    if best["history"]:
        title = f"trial {best['trial']}, round {rounds}: {value}"
        paths += charts.dots(x, y, [rounds], [_number(best["history"][rounds - 1])], "big first", [title])
    label = f"Validation {metric_name(metric)} by boosting round; the best trial ends at {value} after {rounds} rounds"
    keys = (
        LegendEntry("first", f"trial {best['trial']}, kept"),
        *([LegendEntry("thin solid", "others")] if others else []),
    )
    return SearchPicture(None, Plot(label, x, y, tuple(paths)), keys)


def _thinned(history: Sequence[float | None]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rounds and their values, at most `ROUNDS`, without rounds that have no value."""
    values = np.array([math.nan if value is None else value for value in history], np.float64)
    if not len(values):
        return np.zeros(0), values
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), ROUNDS)).astype(int))
    at = at[np.isfinite(values[at])]
    return at + 1.0, values[at]


def _value(each: TrialRecord) -> float:
    """The value of a trial that did not fail."""
    return _number(each["value"])


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _numbers(name: str, worked: Sequence[TrialRecord]) -> bool:
    values = [each["params"].get(name) for each in worked]
    return len(set(map(str, values))) > 1 and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in values
    )


def by_parameter(name: str, worked: Sequence[TrialRecord], best: TrialRecord, metric: str) -> SearchPicture:
    """The metric of each trial against one of its parameters; the scale is logarithmic if values span more than a
    factor of 20."""
    values = [_number(each["params"][name]) for each in worked]
    found = [_value(each) for each in worked]
    log = min(values) > 0 and max(values) / min(values) > 20
    x = Axis.over(values, name, log=log, pad=0.05)
    y = Axis.over(found, f"validation {metric_name(metric)}", pad=0.08)
    titles = [f"trial {each['trial']}: {format_number(_value(each))}" for each in worked]
    marks = charts.dots(x, y, values, found, "second", titles)
    kept = f"trial {best['trial']}, kept"
    marks += charts.dots(x, y, [_number(best["params"][name])], [_value(best)], "big first", [kept])
    return SearchPicture(name, Plot(f"Validation {metric_name(metric)} of {len(worked)} trials by {name}", x, y, marks))
