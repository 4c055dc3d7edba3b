"""Intervals that do not depend on how data is cut, and agree with theory; gates that use them."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Gates, GroupSplit, RollingOrigin, TimeSplit
from schemas.errors import DefinitionError
from transforms.evaluation.bootstrap import weights
from transforms.evaluation.evaluate import Tallying, metrics_record, report, tally
from transforms.evaluation.gates import Rival, fairness_records, may_know, verdicts


def scored(rows: int, seed: int = 0, noise: float = 1.0) -> pa.RecordBatch:
    """Rows of the same ids and labels for every `noise`, which only spoils the score."""
    random = np.random.default_rng(seed)
    label = (random.random(rows) < 0.3).astype(np.float32)
    group = random.choice(np.array(["a", "b", "rare"]), rows, p=[0.6, 0.395, 0.005])
    odds = 2 * label - 1.5 + noise * random.normal(size=rows) + (group == "b")
    columns = {
        "row_id": random.integers(-(2**62), 2**62, rows),
        "score": (1 / (1 + np.exp(-odds))).astype(np.float32),
        "__label": label,
        "__group": group,
    }
    return pa.RecordBatch.from_pydict({name: pa.array(values) for name, values in columns.items()})


BINARY = Tallying("binary:logistic", ("group",))


@settings(max_examples=6)
@given(st.lists(st.integers(0, 400), max_size=4), st.randoms())
def test_any_cut_and_any_order_of_merging_give_the_same_report(cuts: list[int], random: Any) -> None:
    whole = scored(400)
    edges = [0, *sorted(cuts), 400]
    states = [BINARY.add_input({}, whole.slice(low, high - low)) for low, high in itertools.pairwise(edges)]
    random.shuffle(states)
    while len(states) > 1:
        states.append(BINARY.merge_accumulators([states.pop(0), states.pop(random.randrange(len(states)))]))
    expected = report("binary:logistic", tally(whole, "binary:logistic", ("group",)))
    assert metrics_record(BINARY.extract_output(states[0])) == metrics_record(expected)


def test_weights_are_poisson_of_mean_one_and_independent() -> None:
    drawn = weights(np.arange(20_000), 200)
    assert abs(drawn.mean() - 1) < 0.002
    assert abs(drawn.var() - 1) < 0.005
    assert abs(np.corrcoef(drawn[:, :40].T)[np.triu_indices(40, 1)]).max() < 0.04
    assert (drawn[:100] == weights(np.arange(100), 200)).all()


def test_intervals_are_as_wide_as_in_theory() -> None:
    whole = scored(8000)
    found = report("binary:logistic", tally(whole, "binary:logistic"))
    error = (whole["score"].to_numpy().astype(float) - whole["__label"].to_numpy()) ** 2
    low, high = found.intervals["brier"]  # type: ignore[misc]
    assert low < found.metrics["brier"] < high  # type: ignore[operator]
    assert high - low == pytest.approx(2 * 1.96 * error.std() / 8000**0.5, rel=0.25)
    for name, value in found.metrics.items():
        low, high = found.intervals[name]  # type: ignore[misc]
        assert low <= value <= high  # type: ignore[operator]
        assert high - low < 0.06
    regression = report("reg:squarederror", tally(whole, "reg:squarederror"))
    low, high = regression.intervals["mae"]  # type: ignore[misc]
    absolute = error**0.5
    assert high - low == pytest.approx(2 * 1.96 * absolute.std() / 8000**0.5, rel=0.25)


def test_a_challenger_is_compared_on_the_same_rows() -> None:
    good, poor = (report("binary:logistic", tally(scored(4000, noise=n), "binary:logistic")) for n in (1.0, 1.3))
    gates = Gates(margin=0.01)

    def challenge(ours: Any, theirs: Any) -> Any:
        return verdicts(gates, ours, "auc", Rival("3", theirs))[-1]

    assert challenge(good, poor).holds
    assert "of version 3" in challenge(good, poor).reason
    assert not challenge(poor, good).holds
    assert not challenge(good, good).holds
    assert verdicts(Gates(), good, "auc", Rival("3", good))[-1].holds
    none = verdicts(gates, good, "auc", Rival("3", None, "it reads other features"))[-1]
    assert (none.holds, none.judged) == (False, False)
    assert none.reason == "not judged, so version 3 stays champion: it reads other features"
    nobody = verdicts(gates, good, "auc", Rival())[-1]
    assert (nobody.holds, nobody.judged, nobody.reason) == (True, False, "there is no champion")
    few = report("binary:logistic", tally(scored(29), "binary:logistic"))
    verdict = verdicts(Gates(), few, "auc", Rival("3", few))[-1]
    assert (verdict.holds, verdict.judged) == (False, False)
    assert "29 test rows" in verdict.reason
    caveats = verdicts(gates, poor, "auc", Rival("3", good, caveats="it has seen these rows"))[-1]
    assert caveats.reason == f"{challenge(poor, good).reason}; it has seen these rows"


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (TimeSplit("9d", "9d"), TimeSplit("9d", "9d"), ""),
        (TimeSplit("9d", "5d"), TimeSplit("9d", "5d", embargo="1d"), ""),
        (TimeSplit("9d", "5d"), TimeSplit("9d", "9d"), "has seen rows up to 2024-01-26"),
        (RollingOrigin(2, "9d", "5d"), TimeSplit("9d", "6d"), "has seen rows up to 2024-01-26"),
        (GroupSplit("k"), GroupSplit("k"), ""),
        (GroupSplit("k"), GroupSplit("k", salt="2"), "divide rows in different ways"),
        (GroupSplit("k"), TimeSplit("9d", "9d"), "divide rows in different ways"),
        (TimeSplit("9d", "9d"), GroupSplit("k"), "divide rows in different ways"),
    ],
)
def test_a_champion_that_may_know_the_test_rows_is_reported(before: Any, now: Any, words: str) -> None:
    cutoff = datetime(2024, 1, 31, tzinfo=UTC)
    found = may_know({"split": json.loads(json.dumps(before.resolve(cutoff).as_json()))}, now.resolve(cutoff))
    assert words in found
    assert bool(words) == bool(found)


def test_groups_are_compared_by_who_is_selected() -> None:
    whole = scored(6000)
    gates = Gates(
        protected=("group",), max_difference={"demographic_parity": 0.05, "equalized_odds": 0.9}, min_slice_rows=100
    )
    found = report("binary:logistic", tally(whole, "binary:logistic", gates.slices))
    parity, odds = verdicts(gates, found)
    rows = whole.to_pandas()
    rates = (rows["score"] >= 0.5).groupby(rows["__group"]).mean()
    assert fairness_records(gates, found)[0]["differences"]["demographic_parity"] == pytest.approx(
        rates["b"] - rates["a"]
    )
    assert not parity.holds
    assert odds.holds
    assert "rare" not in parity.reason
    with pytest.raises(DefinitionError, match="demographic_parity, equal_opportunity, equalized_odds"):
        Gates(protected=("group",), max_difference={"parity": 0.1})
    with pytest.raises(DefinitionError, match="protected columns"):
        Gates(max_difference={"demographic_parity": 0.1})


def test_a_slice_fails_only_beyond_chance() -> None:
    found = report("binary:logistic", tally(scored(3000), "binary:logistic", ("group",)))
    tight = Gates(slices=("group",), max_gap={"auc": 0.0}, min_slice_rows=2)
    for verdict, part in zip(verdicts(tight, found), found.slices):
        if part.rows >= 30 and part.gaps["auc"] is not None:
            assert verdict.holds is (part.gaps["auc"][0] <= 0)
