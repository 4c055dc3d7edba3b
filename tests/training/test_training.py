"""Training through the iterator against XGBoost on whole arrays, for every kind of objective."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xgboost

from schemas import Model, Search
from schemas.errors import DataError, DefinitionError
from schemas.models import METRICS_OF, OBJECTIVES
from schemas.splits import LABEL
from tests.support.training_case import examples, model, study
from transforms.evaluation.metrics import MetricTally, metrics
from transforms.models.encoders import Fitted
from transforms.training import trainer, xgboost_data
from transforms.training.examples import ExamplesAccount
from transforms.training.fit_encoders import fit
from transforms.training.hyperparameter_search import Trial, TrialResult, best_result, first_trials
from transforms.training.trainer import BundleRequest, save_best, side_by_side
from transforms.training.xgboost_checks import require_known


def train(
    model: Model, trial: Trial, fitted: Fitted, account: ExamplesAccount, threads: int
) -> tuple[bytes, list[float], int]:
    data = xgboost_data.matrices(model, fitted, account, threads)
    return trainer.train(model, trial, data, threads, trainer.classes_of(model, account))


def native(model: Model, tables: dict[str, pa.Table]) -> tuple[bytes, list[float]]:
    """The same training on whole arrays."""
    batches = {name: table.combine_chunks().to_batches()[0] for name, table in tables.items()}
    fitted = fit(model, [batches["train"]])
    names = {"feature_names": fitted.names, "feature_types": fitted.types, "enable_categorical": True}
    learn, judge = (
        xgboost.DMatrix(fitted.apply(batches[n]), tables[n][LABEL].to_numpy(), **names) for n in ("train", "validate")
    )
    params = {
        **model.params,
        "objective": model.objective,
        "eval_metric": trainer.evaluated(model),
        "seed": model.seed,
        "nthread": 1,
        "tree_method": "hist",
    }
    if model.objective.startswith("multi"):
        params["num_class"] = 3
    history: dict[str, Any] = {}
    booster = xgboost.train(params, learn, model.rounds, evals=[(judge, "v")], evals_result=history, verbose_eval=False)
    return bytes(booster.save_raw("ubj")), history["v"][params["eval_metric"]]


PAIRS = [(objective, metric) for objective, names in OBJECTIVES.items() for metric in names]


@pytest.mark.parametrize("kept", [0, 1 << 30])
@pytest.mark.parametrize(("objective", "metric"), PAIRS)
def test_the_iterator_trains_what_whole_arrays_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str, metric: str, kept: int
) -> None:
    monkeypatch.setattr(xgboost_data, "KEPT_BYTES", kept)
    chosen = model(objective, metric)
    account, tables = examples(tmp_path, objective)
    fitted = fit(chosen, list(tables["train"].to_batches()))
    assert fitted.types == ["q", "q", "c"]
    booster, history, rounds = train(chosen, first_trials(chosen)[0], fitted, account, 1)
    theirs, values = native(chosen, tables)
    ours = {"brier": [v * v for v in values], "accuracy": [1 - v for v in values]}.get(metric, values)
    assert rounds == chosen.rounds
    assert history == pytest.approx(ours, rel=1e-6)
    matrix = xgboost.DMatrix(
        fitted.apply(tables["validate"].combine_chunks().to_batches()[0]),
        feature_names=fitted.names,
        feature_types=fitted.types,
        enable_categorical=True,
    )
    scores = [xgboost.Booster(model_file=bytearray(each)).predict(matrix) for each in (booster, theirs)]
    np.testing.assert_allclose(*scores, rtol=1e-5)
    label = tables["validate"][LABEL].to_numpy().astype(float)
    # The metric of trials is the one that the test is judged by; XGBoost's average precision interpolates between
    # scores.
    judged = metrics(objective, MetricTally.of(objective, label, scores[0]))[metric]
    assert history[-1] == pytest.approx(judged, rel=0.02 if metric == "average_precision" else 1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_metric_that_does_not_fit_the_objective_is_refused(objective: str) -> None:
    for metric in {name for names in METRICS_OF.values() for name in names} - set(OBJECTIVES[objective]):
        with pytest.raises(DefinitionError, match=f"{objective} has the metrics {', '.join(OBJECTIVES[objective])}"):
            model(objective, metric)


def test_the_same_seed_trains_the_same_bytes_however_files_are_cut(tmp_path: Path) -> None:
    chosen = model(params={"max_depth": 3, "subsample": 0.7, "colsample_bytree": 0.5}, seed=5)
    found = []
    for parts in (1, 4):
        account, tables = examples(tmp_path, "binary:logistic", parts)
        found.append(train(chosen, first_trials(chosen)[0], fit(chosen, tables["train"].to_batches()), account, 1))
    assert found[0] == found[1]
    other = dataclasses.replace(chosen, seed=6)
    assert train(other, first_trials(other)[0], fit(chosen, tables["train"].to_batches()), account, 1)[0] != found[0][0]


def test_early_stopping_keeps_the_best_rounds(tmp_path: Path) -> None:
    chosen = model(rounds=200, early_stopping=5, params={"max_depth": 6, "eta": 0.8})
    account, tables = examples(tmp_path, "binary:logistic")
    booster, history, rounds = train(
        chosen, first_trials(chosen)[0], fit(chosen, tables["train"].to_batches()), account, 1
    )
    assert rounds == 1 + int(np.argmax(history))
    assert len(history) == rounds + 5 < 200
    assert xgboost.Booster(model_file=bytearray(booster)).num_boosted_rounds() == rounds


def test_trials_are_decided_by_the_seed_and_stay_in_bounds() -> None:
    space = {"max_depth": (2, 4), "eta": (0.01, 0.3), "gamma": (0.0, 1.0), "grow_policy": ["depthwise", "lossguide"]}
    several = first_trials(model(search=Search(200, space, seed=3)))
    assert several == first_trials(model(search=Search(200, space, seed=3)))
    assert several[:5] == first_trials(model(search=Search(5, space, seed=3)))
    assert several != first_trials(model(search=Search(200, space, seed=4)))
    drawn = {name: [each.params[name] for each in several] for name in space}
    assert set(drawn["max_depth"]) == {2, 3, 4}
    assert set(drawn["grow_policy"]) == {"depthwise", "lossguide"}
    assert 0.01 <= min(drawn["eta"]) < 0.02
    assert 0.2 < max(drawn["eta"]) <= 0.3
    assert 0.04 < float(np.median(drawn["eta"])) < 0.075, "drawn in the logarithm"
    assert 0 <= min(drawn["gamma"]) < 0.1
    assert first_trials(model()) == [Trial(0, {"max_depth": 3})]


@pytest.mark.parametrize(
    "change", [{"params": {"objective": "x"}}, {"search": Search(2, {"seed": (1, 3)})}, {"params": {"device": "cuda"}}]
)
def test_what_a_model_may_not_say_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(DefinitionError):
        first_trials(model(**change))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"maxdepth": 3}, "'maxdepth'. Did you mean 'max_depth'?"),
        ({"n_estimators": 100}, "Rounds are Model"),
        ({"max_depth": 3, "rate_drop": 0.1}, "'rate_drop'. Correct its name, or leave it out"),
    ],
)
def test_a_parameter_that_xgboost_would_pass_over_is_refused(params: dict[str, Any], words: str) -> None:
    for objective in OBJECTIVES:
        with pytest.raises(DefinitionError, match=re.escape(words)):
            require_known(objective, [Trial(0, params)])
        require_known(objective, [Trial(0, {**params, "max_depth": -1})])  # refused as a whole: the search tells
        some = [Trial(0, {"booster": "dart", "rate_drop": 0.1}), Trial(1, {"booster": "gbtree", "rate_drop": 0.1})]
        require_known(objective, some)
        require_known(
            objective, [Trial(0, {"eta": 0.1, "max_bin": 16, "lambda": 2, "interaction_constraints": [["x"]]})]
        )


def test_a_failed_trial_is_reported_and_the_best_of_the_others_is_saved(tmp_path: Path) -> None:
    chosen = model()
    account, tables = examples(tmp_path, "binary:logistic")
    fitted = fit(chosen, tables["train"].to_batches())
    several = [Trial(i, {"max_depth": d}) for i, d in enumerate((-3, 1, 4))]
    tried = side_by_side(study(chosen, tmp_path / "run"), account, [fitted], several)
    assert [bool(each.error) for each in tried] == [True, False, False]
    assert tried[0].error == "value -3 for Parameter max_depth should be greater equal to 0"
    trained = save_best(tried[::-1], BundleRequest(chosen, str(tmp_path / "bundle"), {"run_id": "r"}), account, fitted)
    assert trained.best == max(tried[1:], key=lambda each: each.value)
    assert [each.trial.index for each in trained.results] == [0, 1, 2]
    with pytest.raises(DataError, match=r"1 failed, the first with: .*max_depth"):
        save_best(tried[:1], BundleRequest(chosen, str(tmp_path / "none"), {}), account, fitted)


def test_the_best_is_the_least_error_or_the_greatest_score_and_of_equals_the_first() -> None:
    results = [TrialResult(Trial(i, {}), value) for i, value in enumerate((math.nan, 0.5, 0.7, 0.7, 0.5))]
    assert best_result(model(), results).trial.index == 2
    assert best_result(model(metric="log_loss"), results[::-1]).trial.index == 1
