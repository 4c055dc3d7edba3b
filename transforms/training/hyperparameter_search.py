"""Hyperparameter search by random, Sobol or successive halving, all decided by one seed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from schemas import Model
from schemas.errors import DataError, DefinitionError
from schemas.models import RISING, Params

# Parameters that the model itself sets, so that `params` must not; the device is a flag of the run.
FIXED = (
    "objective",
    "num_class",
    "eval_metric",
    "seed",
    "random_state",
    "verbosity",
    "process_type",
    "updater",
    "device",
)
Shares = list[list[float]]


@dataclasses.dataclass(frozen=True)
class Trial:
    """One set of XGBoost parameters to try.

    Args:
        index: position in the search.
        params: XGBoost's parameters.
        rung: rung of successive halving, from 0.
        rounds: most boosting rounds; 0 means the model's.
        fold: fold of rolling-origin cross-validation; the last is the split itself.
    """

    index: int
    params: Params
    rung: int = 0
    rounds: int = 0
    fold: int = 0


@dataclasses.dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Args:
        trial: the trial.
        value: the model's metric on validation at the best round, as the mean over folds; NaN if the trial failed.
        rounds: number of rounds up to the best.
        history: the metric on validation after each round.
        booster: path of the booster's UBJSON.
        seconds: duration.
        error: why it failed.
        folds: `value` of each fold if there are several.
    """

    trial: Trial
    value: float
    rounds: int = 0
    history: tuple[float, ...] = ()
    booster: str = ""
    seconds: float = 0.0
    error: str = ""
    folds: tuple[float, ...] = ()


def first_trials(model: Model) -> list[Trial]:
    """The trials with which a model's search begins; without a search it is one with `model.params`.

    The first n of a longer search are those of a search of n.

    Raises:
        DefinitionError: the model itself sets a parameter.
    """
    search = model.search
    for name in (*model.params, *(search.space if search else ())):
        if name in FIXED:
            raise DefinitionError(
                f"params leaves {', '.join(FIXED)} to the model",
                repr(name),
                "Say it in Model(objective=…, metric=…, seed=…), the device with --device",
            )
    if search is None:
        return [Trial(0, dict(model.params))]
    shares = _sobol if search.method == "sobol" else _random
    drawn = shares(search.trials, len(search.space), search.seed)
    rounds = budgets(model)[0] if search.method == "halving" else 0
    return [
        Trial(
            i,
            {
                **model.params,
                **{name: _placed(values, share) for (name, values), share in zip(search.space.items(), row)},
            },
            rounds=rounds,
        )
        for i, row in enumerate(drawn)
    ]


def budgets(model: Model) -> list[int]:
    """Boosting rounds of each rung, of which the last has the model's own; one rung without successive halving.

    For 9 trials of 300 rounds, of which a third continues: 33 rounds of 9 trials, 100 of 3, 300 of 1.
    """
    search = model.search
    if search is None or search.method != "halving":
        return [model.rounds]
    rungs = 1
    while _kept(search.trials, search.factor, rungs - 1) > 1 and model.rounds // search.factor**rungs >= 1:
        rungs += 1
    return [model.rounds // search.factor ** (rungs - 1 - i) for i in range(rungs)]


def promoted(model: Model, results: Iterable[TrialResult], rung: int) -> list[Trial]:
    """The best 1/factor of the trials of `rung`, with the next rung's rounds; of ties, those with lower numbers.

    Raises:
        DataError: every trial failed.
    """
    assert model.search is not None
    found = list(results)
    best_result(model, found)
    worked = sorted((each for each in found if not math.isnan(each.value)), key=lambda each: _merit(model, each))
    kept = worked[: _kept(model.search.trials, model.search.factor, rung + 1)]
    rounds = budgets(model)[rung + 1]
    going = sorted((each.trial for each in kept), key=lambda trial: trial.index)
    return [dataclasses.replace(trial, rung=rung + 1, rounds=rounds) for trial in going]


def best_result(model: Model, results: Iterable[TrialResult]) -> TrialResult:
    """The result with the best metric on validation among those of the highest rung; of ties, the one with the lower
    number.

    Raises:
        DataError: every trial failed.
    """
    ordered = sorted(results, key=lambda each: each.trial.index)
    worked = [each for each in ordered if not math.isnan(each.value)]
    if not worked:
        raise DataError(
            "A trial succeeds",
            f"{len(ordered)} failed, the first with: {ordered[0].error or 'an undefined metric'}",
            "Correct the model's params, or its label",
        )
    furthest = max(each.trial.rung for each in worked)
    return min((each for each in worked if each.trial.rung == furthest), key=lambda each: _merit(model, each))


def last_of_each(results: Iterable[TrialResult]) -> tuple[TrialResult, ...]:
    """The result of each trial's last rung, in order."""
    last: dict[int, TrialResult] = {}
    for each in sorted(results, key=lambda each: (each.trial.index, each.trial.rung)):
        last[each.trial.index] = each
    return tuple(last.values())


def over_folds(model: Model, results: Iterable[TrialResult]) -> list[TrialResult]:
    """Merge the results of folds to one per trial and rung: the last fold's, with the mean value over all folds."""
    groups: dict[tuple[int, int], list[TrialResult]] = {}
    for each in sorted(results, key=lambda each: each.trial.fold):
        groups.setdefault((each.trial.index, each.trial.rung), []).append(each)
    merged = []
    for _, parts in sorted(groups.items()):
        values = tuple(each.value for each in parts)
        last = dataclasses.replace(parts[-1], seconds=sum(each.seconds for each in parts))
        failed = next((f"fold {each.trial.fold}: {each.error}" for each in parts if each.error), "")
        if len(parts) > 1:
            last = dataclasses.replace(last, value=math.fsum(values) / len(values), folds=values, error=failed)
        merged.append(last)
    return merged


def _merit(model: Model, result: TrialResult) -> tuple[float, int]:
    """Sort key of a result; smaller is better."""
    return (-result.value if model.metric in RISING else result.value), result.trial.index


def _kept(trials: int, factor: int, rung: int) -> int:
    return max(1, math.ceil(trials / factor**rung))


def _random(trials: int, dimensions: int, seed: int) -> Shares:
    drawn = [np.random.default_rng((seed, each)).random(trials) for each in range(dimensions)]
    return [[float(shares[i]) for shares in drawn] for i in range(trials)]


def _sobol(trials: int, dimensions: int, seed: int) -> Shares:
    """The first points of a scrambled Sobol sequence (Owen 1998)."""
    from scipy.stats import qmc

    if not dimensions:
        return [[] for _ in range(trials)]
    points = qmc.Sobol(dimensions, scramble=True, rng=seed).random_base2((trials - 1).bit_length())
    return [[float(share) for share in row] for row in points[:trials]]


def _placed(values: Any, share: float) -> object:
    """The value at `share` (0 ≤ share < 1) of a parameter's choices or bounds."""
    if isinstance(values, list):
        return values[int(share * len(values))]
    low, high = values
    if all(isinstance(value, int) for value in values):
        return low + int(share * (high + 1 - low))
    if low > 0:
        return float(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
    return low + share * (high - low)
