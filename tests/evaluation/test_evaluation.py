"""Metrics against scikit-learn; the same however rows are divided; gates that give their reasons."""

from __future__ import annotations

import itertools
import math
from random import Random
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn import metrics as theirs

from schemas import Gates
from schemas.models import METRICS_OF
from transforms.evaluation.evaluate import EvaluationSlice, Report, Tallying, metrics_record, report, tally
from transforms.evaluation.gates import Verdict, verdicts
from transforms.evaluation.metrics import MetricTally, auc_error, metrics

scored = st.tuples(
    st.sampled_from([0.0, 1.0]), st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
)


def binary(rows: list[tuple[float, float]]) -> MetricTally:
    label, score = np.array([y for y, _ in rows]), np.array([p for _, p in rows], np.float32)
    return MetricTally.of("binary:logistic", label, score)


@given(st.lists(scored, min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=3), st.randoms())
@example(rows=[(0.0, float(np.float32(1e-5)))], positions=[], random=Random(0))
def test_binary_metrics_are_those_of_scikit_learn(rows: list[Any], positions: list[int], random: Any) -> None:
    cuts = [0, *sorted(min(position, len(rows)) for position in positions), len(rows)]
    parts = [binary(rows[low:high]) for low, high in itertools.pairwise(cuts)]
    random.shuffle(parts)
    found = metrics("binary:logistic", sum(parts, MetricTally()))
    assert found == metrics("binary:logistic", binary(rows))
    label, score = np.array([y for y, _ in rows]), np.array([p for _, p in rows], np.float32)
    wide = score.astype(np.float64)  # of float32, scikit-learn rounds squares and 1 − p to float32
    assert found["brier"] == pytest.approx(theirs.brier_score_loss(label, wide, pos_label=1))
    least = float(np.finfo(np.float32).eps)
    clipped = np.clip(wide, least, 1 - least)
    assert found["log_loss"] == pytest.approx(theirs.log_loss(label, clipped, labels=[0, 1]), rel=1e-6)
    assert found["average_precision"] == (
        pytest.approx(theirs.average_precision_score(label, score)) if label.any() else None
    )
    if len(set(label.tolist())) == 2:
        assert found["auc"] == pytest.approx(theirs.roc_auc_score(label, score), rel=1e-12)
    else:
        assert found["auc"] is None


def test_binned_ranking_stays_within_its_stated_error(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    label = (random.random(20_000) < 0.3).astype(float)
    score = (1 / (1 + np.exp(-label - random.normal(size=20_000)))).astype(np.float32)
    exact = MetricTally.of("binary:logistic", label, score)
    assert auc_error(exact.bins) == 0  # type: ignore[arg-type]
    monkeypatch.setattr("transforms.evaluation.metrics.SCORE_BINS", 256)
    thirds = [MetricTally.of("binary:logistic", label[i::3], score[i::3]) for i in range(3)]
    coarse = sum(thirds, MetricTally())
    assert coarse.bins is not None
    assert len(coarse.bins.keys) <= 256
    stated = auc_error(coarse.bins)
    found, true = metrics("binary:logistic", coarse)["auc"], metrics("binary:logistic", exact)["auc"]
    assert 0 < abs(found - true) <= stated < 0.02  # type: ignore[operator]


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.floats(-1e6, 1e6, width=32)), min_size=1, max_size=40))
def test_regression_metrics_are_those_of_scikit_learn(rows: list[tuple[float, float]]) -> None:
    label, score = np.array([y for y, _ in rows]), np.array([p for _, p in rows], np.float32)
    found = metrics("reg:squarederror", MetricTally.of("reg:squarederror", label, score))
    assert list(found) == ["rmse", "mae"]
    assert found["rmse"] == pytest.approx(theirs.root_mean_squared_error(label, score))
    assert found["mae"] == pytest.approx(theirs.mean_absolute_error(label, score))


def several(rows: int, seed: int, classes: int = 3) -> tuple[Any, Any]:
    """Labels of all classes and probabilities that know something of them; the last class is rare and never chosen."""
    random = np.random.default_rng(seed)
    label = random.choice(classes, rows, p=[0.5, *[0.48 / (classes - 2)] * (classes - 2), 0.02])
    logits = random.normal(size=(rows, classes)) + 1.5 * (np.arange(classes) == label[:, None])
    logits[:, -1] -= 8
    return label.astype(float), (np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)).astype(np.float32)


def theirs_of_several(label: Any, score: Any) -> dict[str, float]:
    """scikit-learn's, over the classes that occur."""
    chosen, occur = score.argmax(axis=1), sorted(set(label.astype(int).tolist()))
    binary = [theirs.roc_auc_score(label == k, score[:, k]) for k in occur if len(occur) > 1]
    return {
        "log_loss": theirs.log_loss(label, score, labels=range(score.shape[1])),
        "accuracy": theirs.accuracy_score(label, chosen),
        "macro_auc": float(np.mean(binary)) if binary else None,
        "macro_precision": theirs.precision_score(label, chosen, labels=occur, average="macro", zero_division=0),
        "macro_recall": theirs.recall_score(label, chosen, labels=occur, average="macro", zero_division=0),
    }  # type: ignore[dict-item]


@settings(max_examples=40)
@given(st.integers(1, 120), st.integers(0, 50), st.lists(st.integers(0, 120), max_size=3), st.randoms())
def test_multi_class_metrics_are_those_of_scikit_learn(rows: int, seed: int, positions: list[int], random: Any) -> None:
    label, score = several(rows, seed)
    cuts = [0, *sorted(min(position, rows) for position in positions), rows]
    parts = [
        MetricTally.of("multi:softprob", label[low:high], score[low:high])
        for low, high in itertools.pairwise(cuts)
        if high > low
    ]
    random.shuffle(parts)
    found = metrics("multi:softprob", sum(parts, MetricTally()))
    assert found == metrics("multi:softprob", MetricTally.of("multi:softprob", label, score))
    expected = theirs_of_several(label, score)
    assert list(found) == list(METRICS_OF["multi:softprob"]) == list(expected)
    for name, value in expected.items():
        assert found[name] == (value if value is None else pytest.approx(value, rel=1e-5)), name
    if len(set(label.tolist())) == 3:
        whole = theirs.roc_auc_score(
            label, score.astype(float) / score.astype(float).sum(axis=1, keepdims=True), multi_class="ovr"
        )
        assert found["macro_auc"] == pytest.approx(whole, abs=1e-6)


def test_each_class_has_metrics_and_every_confusion_is_counted() -> None:
    label, score = several(2000, 3, 4)
    found = report("multi:softprob", tally(scored_classes(label, score), "multi:softprob"))
    chosen = score.argmax(axis=1)
    assert found.details["confusion"] == theirs.confusion_matrix(label, chosen).tolist()
    precision, recall, _, rows = theirs.precision_recall_fscore_support(label, chosen, zero_division=0)
    for k, each in enumerate(found.details["classes"]):
        assert (each["class"], each["rows"], each["chosen"]) == (k, rows[k], (chosen == k).sum())
        assert (each["precision"], each["recall"]) == (pytest.approx(precision[k]), pytest.approx(recall[k]))
        assert each["auc"] == pytest.approx(theirs.roc_auc_score(label == k, score[:, k]), rel=1e-12)
        for name in ("precision", "recall", "auc"):
            low, high = each["intervals"][name]
            assert low <= each[name] <= high
            assert (low < high) == (each[name] > 0)
    assert found.details["classes"][3]["chosen"] == found.details["classes"][3]["precision"] == 0
    assert set(found.intervals) == set(found.metrics)


def test_intervals_of_several_classes_are_those_of_a_plain_bootstrap() -> None:
    label, score = several(1500, 9)
    found = report("multi:softprob", tally(scored_classes(label, score), "multi:softprob"))
    random, drawn = np.random.default_rng(1), []
    for _ in range(300):
        at = random.integers(0, len(label), len(label))
        drawn.append(
            [theirs_of_several(label[at], score[at])[name] for name in ("macro_auc", "macro_precision", "macro_recall")]
        )
    for i, name in enumerate(("macro_auc", "macro_precision", "macro_recall")):
        low, high = np.quantile([each[i] for each in drawn], [0.025, 0.975])
        assert np.allclose(found.intervals[name], (low, high), atol=0.25 * (high - low)), name  # type: ignore[arg-type]


def test_where_bins_hide_the_ranking_there_is_no_interval() -> None:
    label, score = several(1500, 9)
    score[:, 2] *= np.float32(1e-9)
    found = report("multi:softprob", tally(scored_classes(label, score), "multi:softprob"))
    last = found.details["classes"][2]
    assert last["auc"] == pytest.approx(theirs.roc_auc_score(label == 2, score[:, 2]))
    assert last["intervals"]["auc"] is None
    assert last["intervals"]["recall"] is not None


def scored_classes(label: Any, score: Any) -> pa.RecordBatch:
    columns = {f"score_{k}": score[:, k] for k in range(score.shape[1])}
    columns |= {
        "row_id": np.arange(len(label)) * 7919,
        "__label": label.astype(np.float32),
        "__origin": np.where(np.arange(len(label)) % 3 == 0, "JFK", "LGA"),
        "__hour": np.arange(len(label)) % 2,
    }
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})


def test_slices_of_several_classes_are_evaluated_by_their_own_rows_and_merge_in_any_order() -> None:
    label, score = several(900, 5)
    whole = scored_classes(label, score)
    found = report("multi:softprob", tally(whole, "multi:softprob", SLICES))
    assert len(found.slices) == 2 + 4
    for each in found.slices:
        mine = np.ones(900, bool)
        for column, value in each.by:
            mine &= np.array([str(cell) == value for cell in whole.column(f"__{column}").to_pylist()])
        assert each.rows == mine.sum()
        expected = theirs_of_several(label[mine], score[mine])
        assert {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()} == each.metrics
        assert set(each.intervals) == set(each.gaps) == set(each.metrics)
    tallying = Tallying("multi:softprob", SLICES)
    parts = [tallying.add_input({}, whole.slice(start, 300)) for start in (600, 0, 300)]
    assert metrics_record(tallying.extract_output(tallying.merge_accumulators(parts))) == metrics_record(found)


def test_a_class_that_a_model_does_not_know_counts_against_it() -> None:
    label, score = several(400, 2)
    label[:40] = 4  # as a champion of three classes meets a fifth
    found = report("multi:softprob", tally(scored_classes(label, score), "multi:softprob"))
    *_, fifth = found.details["classes"]
    assert (fifth["class"], fifth["rows"], fifth["chosen"], fifth["recall"], fifth["auc"]) == (4, 40, 0, 0.0, 0.5)
    assert found.metrics["accuracy"] == theirs.accuracy_score(label, score.argmax(axis=1))


def test_quantiles_of_the_absolute_error_are_those_of_the_rows() -> None:
    random = np.random.default_rng(3)
    label, score = random.normal(size=5000), random.normal(size=5000).astype(np.float32)
    columns = {"row_id": np.arange(5000), "__label": label.astype(np.float32), "score": score}
    scored = pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})
    found = report("reg:squarederror", tally(scored, "reg:squarederror")).details["errors"]
    errors = np.sort(np.abs(score - label.astype(np.float32)))
    for each in found:
        assert each["error"] == pytest.approx(errors[math.ceil(each["share"] * 5000) - 1], rel=2.1e-3)


def batch(rows: int, seed: int) -> pa.RecordBatch:
    random = np.random.default_rng(seed)
    columns = {
        "row_id": random.integers(-(2**62), 2**62, rows),
        "score": random.random(rows).astype(np.float32),
        "__label": (random.random(rows) < 0.4).astype(np.float32),
        "__origin": random.choice(np.array(["JFK", "LGA", None], object), rows),
        "__hour": random.integers(0, 2, rows),
    }
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})


SLICES = ("origin", ("origin", "hour"))


def test_slices_are_evaluated_by_their_own_rows() -> None:
    whole = batch(300, 1)
    found = report("binary:logistic", tally(whole, "binary:logistic", SLICES))
    rows = whole.to_pandas()
    assert found.rows == 300
    assert found.metrics["auc"] == pytest.approx(theirs.roc_auc_score(rows["__label"], rows["score"]))
    assert len(found.slices) == 3 + 6
    assert sum(each.rows for each in found.slices) == 600
    for each in found.slices:
        mine = rows
        for column, value in each.by:
            texts = rows[f"__{column}"].map(lambda cell: None if cell is None else str(cell))
            mine = mine[texts.loc[mine.index].isna() if value is None else texts.loc[mine.index] == value]
        assert each.rows == len(mine)
        assert each.metrics["auc"] == pytest.approx(theirs.roc_auc_score(mine["__label"], mine["score"]))
        assert each.metrics["brier"] == pytest.approx(theirs.brier_score_loss(mine["__label"], mine["score"]))


def test_a_beam_pipeline_reports_what_one_call_reports() -> None:
    whole = batch(200, 2)
    expected = metrics_record(report("binary:logistic", tally(whole, "binary:logistic", SLICES)))
    with test_pipeline.TestPipeline() as pipeline:
        parts = pipeline | beam.Create([whole.slice(0, 1), whole.slice(1, 120), whole.slice(121)])
        found = parts | beam.CombineGlobally(Tallying("binary:logistic", SLICES)) | beam.Map(metrics_record)
        assert_that(found, equal_to([expected]))


def test_a_slice_of_one_row_and_no_rows_at_all() -> None:
    one = report("binary:logistic", tally(batch(1, 3), "binary:logistic", SLICES))
    assert one.metrics["auc"] is None
    assert [each.rows for each in one.slices] == [1, 1]
    none = report("binary:logistic", tally(batch(0, 3), "binary:logistic", SLICES))
    assert none == Report(0, dict.fromkeys(METRICS_OF["binary:logistic"]))


def judged(gates: Gates, whole: float | None, part: float | None, rows: int = 1000) -> list[Verdict]:
    metric = next(iter([*gates.at_least, *gates.max_gap]))
    return verdicts(
        gates, Report(5000, {metric: whole}, (EvaluationSlice((("origin", "JFK"),), rows, {metric: part}),))
    )


@pytest.mark.parametrize(
    ("gates", "whole", "part", "rows", "holds", "words"),
    [
        (Gates(at_least={"auc": 0.7}), 0.7, None, 9, True, "auc is 0.7000"),
        (Gates(at_least={"auc": 0.7}), 0.69, None, 9, False, "auc is 0.6900"),
        (Gates(at_least={"auc": 0.7}), None, None, 9, False, "undefined on 5000 test rows"),
        (Gates(at_least={"rmse": 2}), 1.9, None, 9, True, "rmse is 1.9000"),
        (Gates(at_least={"rmse": 2}), 2.1, None, 9, False, "rmse is 2.1000"),
        (Gates(max_gap={"auc": 0.1}), 0.8, 0.71, 1000, True, "0.7100 against 0.8000 overall"),
        (Gates(max_gap={"auc": 0.1}), 0.8, 0.65, 1000, False, "0.6500 against 0.8000 overall, 1000 rows"),
        (Gates(max_gap={"auc": 0.1}), 0.8, 0.1, 499, True, "499 rows, fewer than 500"),
        (Gates(max_gap={"auc": 0.1}), 0.8, None, 1000, True, "undefined there"),
        (Gates(max_gap={"mae": 0.1}), 1.0, 1.2, 1000, False, "1.2000 against 1.0000 overall"),
    ],
)
def test_gates_say_what_they_saw(gates: Gates, whole: Any, part: Any, rows: int, holds: bool, words: str) -> None:
    (verdict,) = judged(gates, whole, part, rows)
    assert verdict.holds is holds
    assert words in verdict.reason
    assert verdict.judged is not ("fewer" in words or "undefined there" in words)


@given(st.lists(scored, max_size=4), st.integers(0, 4), st.integers(0, 50))
@example([(1.0, 1.0)], 1, 0)
def test_a_metric_is_never_nan(rows: list[tuple[float, float]], count: int, seed: int) -> None:
    label, score = np.array([y for y, _ in rows]), np.array([p for _, p in rows], np.float32)
    tallies = {
        "binary:logistic": MetricTally.of("binary:logistic", label, score),
        "reg:squarederror": MetricTally.of("reg:squarederror", label, score),
        "multi:softprob": MetricTally.of("multi:softprob", *several(count, seed)),
    }
    for objective, each in tallies.items():
        values = metrics(objective, each).values()
        assert not any(math.isnan(value) for value in values if value is not None)
