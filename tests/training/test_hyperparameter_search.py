"""Which trials are drawn, which go on, and that trials side by side are what they are alone."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import apache_beam as beam
import numpy as np
import pytest
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that
from scipy.stats import qmc

from schemas import Search
from schemas.errors import DataError, DefinitionError
from tests.support.training_case import examples, model, study
from transforms.training import xgboost_data
from transforms.training.fit_encoders import fit
from transforms.training.hyperparameter_search import (
    Trial,
    TrialResult,
    best_result,
    budgets,
    first_trials,
    last_of_each,
    over_folds,
    promoted,
)
from transforms.training.trainer import Train, side_by_side

SPACE = {"max_depth": (2, 4), "eta": (0.05, 0.5), "subsample": [0.5, 0.7, 0.9]}


def test_sobol_covers_the_space_more_evenly_than_chance() -> None:
    space = {"eta": (-1.0, 1.0), "gamma": (-1.0, 1.0), "alpha": (-1.0, 1.0)}
    spread = {}
    for method in ("random", "sobol"):
        drawn = first_trials(model(search=Search(64, space, method, seed=2)))
        points = np.array([[(each.params[name] + 1) / 2 for name in space] for each in drawn])
        spread[method] = qmc.discrepancy(points)
        assert drawn[:5] == first_trials(model(search=Search(5, space, method, seed=2)))
        assert drawn != first_trials(model(search=Search(64, space, method, seed=3)))
    assert spread["sobol"] < spread["random"] / 3


@pytest.mark.parametrize(
    ("count", "rounds", "factor", "expected"),
    [
        (9, 300, 3, [33, 100, 300]),
        (1, 300, 3, [300]),
        (10, 300, 3, [11, 33, 100, 300]),
        (8, 16, 2, [2, 4, 8, 16]),
        (27, 5, 3, [1, 5]),
    ],
)
def test_halving_gives_few_trials_many_rounds(count: int, rounds: int, factor: int, expected: list[int]) -> None:
    chosen = model(rounds=rounds, search=Search(count, SPACE, "halving", factor=factor))
    assert budgets(chosen) == expected
    going = first_trials(chosen)
    assert {each.rounds for each in going} == {expected[0]}
    for rung in range(len(expected) - 1):
        results = [TrialResult(each, math.nan if each.index == 0 else each.index / 100) for each in going]
        if len(going) == 1:
            break
        following = promoted(chosen, results, rung)
        best = sorted(results[1:], key=lambda each: -each.value)[: max(1, math.ceil(count / factor ** (rung + 1)))]
        assert [each.index for each in following] == sorted(each.trial.index for each in best)
        assert {(each.rung, each.rounds) for each in following} == {(rung + 1, expected[rung + 1])}
        going = following


def test_a_rung_where_all_fail_ends_the_search() -> None:
    chosen = model(search=Search(3, SPACE, "halving"))
    with pytest.raises(DataError, match="A trial succeeds"):
        promoted(chosen, [TrialResult(each, math.nan, error="no") for each in first_trials(chosen)], 0)


def test_the_best_is_of_those_that_went_furthest() -> None:
    low, high = TrialResult(Trial(0, {}), 0.9), TrialResult(Trial(1, {}, rung=1), 0.8)
    earlier = TrialResult(Trial(1, {}), 0.7)
    assert best_result(model(), [low, earlier, high]) is high
    assert last_of_each([high, low, earlier]) == (low, high)


def test_folds_are_averaged_and_one_that_fails_fails_the_trial() -> None:
    parts = [TrialResult(Trial(i, {}, fold=fold), 0.5 + fold / 10, rounds=fold) for fold in (2, 0, 1) for i in (0, 1)]
    parts[0] = dataclasses.replace(parts[0], value=math.nan, error="no")
    failed, worked = over_folds(model(), parts)
    assert worked.value == pytest.approx(0.6)
    assert worked.folds == (0.5, 0.6, 0.7)
    assert worked.rounds == 2
    assert math.isnan(failed.value)
    assert failed.error == "fold 2: no"


@pytest.mark.parametrize("change", [{"trials": 0}, {"factor": 1}, {"method": "grid"}, {"space": {"eta": (2, 1)}}])
def test_a_search_that_cannot_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError, match="Search"):
        Search(**({"trials": 2, "space": SPACE} | change))


def test_trials_side_by_side_are_the_same_bytes_as_one_after_another(tmp_path: Path) -> None:
    chosen = model(search=Search(6, {**SPACE, "max_bin": [64, 256]}), rounds=20, early_stopping=3)
    account, tables = examples(tmp_path, "binary:logistic")
    fitted = fit(chosen, tables["train"].to_batches())
    found = []
    for name, cores in (("one", 1), ("three", 3)):
        several = side_by_side(study(chosen, tmp_path / name, cores), account, [fitted], first_trials(chosen))
        found.append({each.trial.index: (each.value, Path(each.booster).read_bytes()) for each in several})
    assert found[0] == found[1]
    assert len({booster for _, booster in found[0].values()}) == 6


def test_bins_on_disk_train_as_bins_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = model(encode={"word": model().encode["word"]}, rounds=6)
    account, tables = examples(tmp_path, "binary:logistic")
    fitted = fit(chosen, tables["train"].to_batches())
    found = {}
    for limit in (1 << 40, 1):
        monkeypatch.setattr(xgboost_data, "EXTERNAL", limit)
        monkeypatch.setattr(xgboost_data, "PAGE", 1000)
        monkeypatch.setattr(xgboost_data, "KEPT_BYTES", 0)
        (found[limit],) = side_by_side(study(chosen, tmp_path / str(limit)), account, [fitted], first_trials(chosen))
        assert not found[limit].error
    assert found[1].history == pytest.approx(found[1 << 40].history, abs=2e-3)


def test_halving_in_a_pipeline_ends_with_the_trial_that_a_plain_run_would_give(tmp_path: Path) -> None:
    chosen = model(search=Search(5, SPACE, "halving", seed=1, factor=2), rounds=12)
    account, tables = examples(tmp_path, "binary:logistic")
    fitted = fit(chosen, tables["train"].to_batches())
    whole = side_by_side(
        study(chosen, tmp_path / "whole"),
        account,
        [fitted],
        [dataclasses.replace(each, rounds=0) for each in first_trials(chosen)],
    )
    histories = {each.trial.index: each.history for each in whole}

    def right(results: list[TrialResult]) -> None:
        assert sorted((each.trial.rung, each.rounds) for each in results) == [(0, 1)] * 5 + [(1, 3)] * 3 + [
            (2, 6)
        ] * 2 + [(3, 12)]
        for each in results:
            assert each.history == histories[each.trial.index][: each.rounds]
        last = best_result(chosen, results)
        other = next(each for each in whole if each.trial.index == last.trial.index)
        assert Path(last.booster).read_bytes() == Path(other.booster).read_bytes()

    with test_pipeline.TestPipeline() as pipeline:
        sides = [pipeline | f"Side{i}" >> beam.Create([side]) for i, side in enumerate((account, fitted))]
        tried = (
            pipeline | beam.Create(first_trials(chosen)) | Train(study(chosen, tmp_path / "run"), sides[0], sides[1:])
        )
        assert_that(tried, right)
