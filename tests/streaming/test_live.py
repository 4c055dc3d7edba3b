"""Live answers against the slow and obvious one: random arrival, ties, late rows, repeats, and stops at any moment."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from schemas import DefinitionError, Derived, FeatureView, Lookup, Source, Trailing
from tests.support import histories
from tests.support.live_turns import audit, events, run, shops, spine_rows, stream
from tests.support.turns import Job, JobOptions
from transforms.streaming.groups import groups_of
from transforms.streaming.messages import Message, to_arrow


# Shrinking what depends on a seed leads nowhere; the seed itself is small enough.
@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(seed=st.integers(0, 2**32))
def test_every_answer_is_batch_over_what_it_could_see(seed: int) -> None:
    random = Random(seed)
    chunks = stream(random)
    commits = {random.randrange(len(chunks)) for _ in range(random.randrange(4))}
    kills = {random.randrange(len(chunks)): random.choice([None, 1, 2, 3, 4, 5]) for _ in range(random.randrange(4))}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        job = run(store, chunks, commits, kills)
        audit(folder, chunks, job)


def test_a_key_known_only_after_a_look_up_is_refused() -> None:
    keyed = FeatureView(
        "v",
        spine_rows,
        key="id",
        features=[
            Lookup(shops, by="k", columns="name"),
            Trailing(events, by={"shops_name": "s"}, over="1m", stats={"v": "sum"}),
        ],
    )
    with pytest.raises(DefinitionError, match="keys come from the spine's columns"):
        groups_of(keyed)


def test_a_key_derived_from_the_spine_is_routed() -> None:
    derived = FeatureView(
        "v",
        spine_rows,
        key="id",
        features=[Derived(near=pl.col("g") // 2), Trailing(events, by={"near": "g"}, over="1m", stats={"v": "sum"})],
    )
    (group,) = groups_of(derived)
    assert group.spine_columns == ("near",)


def test_state_holds_what_windows_lateness_and_keep_reach_and_is_told(tmp_path: Path) -> None:
    reads = Source("reads", time="at", lateness="5s", columns={"k": pl.String, "v": pl.Float64})
    minute = FeatureView("m", spine_rows, key="id", features=[Trailing(reads, by="k", over="1m", stats={"v": "mean"})])
    job = Job(minute, tmp_path, tmp_path, {"reads": {0: 0}, "questions": {0: 0}}, JobOptions(keep=10_000_000))
    held = []
    for number in range(100):  # ten rows a second for a thousand seconds, a question in each
        seconds = range(10 * number, 10 * number + 10)
        rows = {"at": [histories.at(second, 1000 * i) for second in seconds for i in range(10)]}
        told = pl.DataFrame({**rows, "k": ["a", "b"] * 50, "v": [1.0] * 100}, schema=reads.schema)
        asked = [
            {**dict.fromkeys(spine_rows.schema), "id": second, "t": histories.at(second), "k": "a"}
            for second in seconds
        ]
        spine = pl.DataFrame(asked, schema=spine_rows.schema, orient="row")
        job.take(
            [
                Message(name, 0, number, 2**51, None, to_arrow(each))
                for name, each in (("reads", told), ("questions", spine))
            ]
        )
        if number % 5 == 4:
            state = job.commit()["state"]
            held.append((state["shards"]["rows"], state["journal"]["rows"]))
            assert state["shards"]["bytes"] > 16 * state["shards"]["rows"]
    shards, journal = (max(each) for each in zip(*held, strict=True))
    # A minute of windows, one of a pane, keep, lateness of both sources and what came at once.
    assert 600 <= shards <= 10 * (60 + 60 + 10 + 5 + 1 + 10)
    assert max(held[:10])[0] == shards
    assert journal <= 2 * (60 + 10 + 5 + 1 + 10 + 10)
