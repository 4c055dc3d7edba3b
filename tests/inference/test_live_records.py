"""The records of live inference and what they are stored as: state of an earlier Millrace is restored."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pyarrow as pa

from transforms.inference.live_records import (
    BatchOrigin,
    MessageRange,
    PredictionsStatus,
    Refusal,
    ScoringState,
    ServingModel,
    ServingPeriod,
)
from transforms.streaming.messages import MESSAGE_DEAD_LETTERS

# A checkpoint as earlier versions of Millrace wrote it, with its odd names.
STORED = json.loads("""{
    "turn": 3,
    "next": {"orders.features": {"0": 12, "1": 7}},
    "ended": {"1": 7},
    "rows": {"read": 19, "predicted": 18, "repeated": 1, "letters": 2},
    "by_version": {"1": 10, "2": 8},
    "reigns": {
        "host/1 100": {"worker": "host/1", "version": "1", "since": 100, "offsets": {"0": 0, "1": 0}},
        "host/1 200": {"worker": "host/1", "version": "2", "since": 200, "offsets": {"0": 9}}
    },
    "refused": {"9 150": {"at": 150, "version": "9", "rule": "a rule", "value": "a value", "fix": "a fix"}},
    "since": 300
}""")


def test_a_checkpoint_is_restored_and_written_as_it_was() -> None:
    state = ScoringState.of_json("orders.features", STORED)
    assert state.next == {0: 12, 1: 7}
    assert state.ended == {1: 7}
    assert not state.at_end
    assert state.periods["host/1 200"] == ServingPeriod("host/1", "2", 200, {0: 9})
    assert state.refused["9 150"] == Refusal(150, "9", "a rule", "a value", "a fix")
    assert state.committed_at == 300
    assert json.dumps(state.to_json()) == json.dumps(STORED)


def test_a_commit_records_no_periods() -> None:
    state = ScoringState.of_json("orders.features", STORED)
    names = ["turn", "next", "ended", "rows", "by_version"]
    assert json.dumps(state.commit_record()) == json.dumps({name: STORED[name] for name in names})
    again = ScoringState.of_json("orders.features", state.commit_record())
    assert (again.next, again.periods, again.committed_at) == (state.next, {}, None)


def test_keys_of_periods_and_refusals_are_those_of_the_checkpoint() -> None:
    state = ScoringState.of_json("orders.features", STORED)
    assert {each.key for each in state.periods.values()} == set(STORED["reigns"])
    assert {each.key for each in state.refused.values()} == set(STORED["refused"])


def test_the_status_names_each_swap_of_a_worker() -> None:
    state = ScoringState.of_json("orders.features", STORED)
    other = ServingPeriod("host/2", "2", 50, {1: 3})
    periods = (*state.periods.values(), other)
    lag = np.array([0.5, 1.5])
    status = PredictionsStatus({"turn": 3}, False, 400, periods, tuple(state.refused.values()), lag).to_json()
    assert json.loads(json.dumps(status)) == {
        "turn": 3,
        "last": False,
        "at": 400,
        "swaps": [{"at": 200, "from": "1", "to": "2", "offsets": {"0": 9}, "worker": "host/1"}],
        "refused": [STORED["refused"]["9 150"]],
        "workers": {"host/1": {"version": "2", "since": 200}, "host/2": {"version": "2", "since": 50}},
        "lag_s": {"rows": 2, "median": 1.0, "p99": 1.49, "max": 1.5},
    }


def test_origin_and_model_travel_with_a_batch() -> None:
    bad = ("orders.features", 0, 5, -1, "", "a rule", "a value", 7)
    dead_letters = pl.DataFrame([bad], schema=MESSAGE_DEAD_LETTERS, orient="row")
    origin = BatchOrigin((MessageRange("orders.features", 0, 5, 7, 2, None),), 42, dead_letters)
    model = ServingModel("host/1", "2", 200, (Refusal(150, "9", "a rule", "a value", "a fix"),))
    schema = pa.schema([], metadata={**origin.to_metadata(), **model.to_metadata()})
    rows = pa.RecordBatch.from_arrays([], schema=schema)
    found = BatchOrigin.of(rows)
    assert (found.ranges, found.received) == (origin.ranges, 42)
    assert found.dead_letters.rows() == [bad]
    assert ServingModel.of(rows) == model
    plain = pa.RecordBatch.from_arrays([], schema=pa.schema([]))
    assert BatchOrigin.of(plain).ranges == ()
    assert ServingModel.of(plain) is None
