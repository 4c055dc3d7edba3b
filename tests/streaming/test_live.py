"""Live feature rows against the slow and obvious ones: random arrival, ties, late rows, repeats, and stops at any
moment."""

from __future__ import annotations

import tempfile
from pathlib import Path
from random import Random

import polars as pl
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from schemas import DefinitionError, Derived, FeatureView, Latest, Lookup, Source, Trailing
from tests.support import histories
from tests.support.live_turns import SOURCES, VALUES, audit, events, placed, run, sales, shops, spine_rows, stream
from tests.support.turns import Job, JobOptions, unread
from transforms.streaming.groups import shard_groups
from transforms.streaming.journal import Turn
from transforms.streaming.messages import Message, to_arrow

numbered = Source("numbered", columns={"n": pl.Int32, "g": pl.Int32})


# Shrinking what depends on a seed leads nowhere; the seed itself is small enough.
@settings(max_examples=15, phases=(Phase.explicit, Phase.generate))
@given(seed=st.integers(0, 2**32))
def test_every_feature_row_is_batch_over_what_it_could_see(seed: int) -> None:
    random = Random(seed)
    chunks = stream(random)
    commits = {random.randrange(len(chunks)) for _ in range(random.randrange(4))}
    kills = {random.randrange(len(chunks)): random.choice([None, 1, 2, 3, 4, 5]) for _ in range(random.randrange(4))}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        job = run(store, chunks, commits, kills)
        audit(folder, chunks, job)


def test_a_key_known_only_after_events_were_read_is_refused() -> None:
    features = [
        Trailing(events, by="k", over="1m", stats={"n": "max"}),
        Derived(most=(pl.col("events_by_k_n_max_1m") + 1).cast(pl.Int64)),
        Lookup(numbered, by={"most": "n"}, columns="g"),
    ]
    for key in ("most", "numbered_g"):
        other = Trailing(events, by={key: "g"}, over="1m", stats={"v": "sum"}, name="other")
        with pytest.raises(DefinitionError, match="keys must be columns of the spine") as refused:
            shard_groups(FeatureView("v", spine_rows, key="id", features=[*features, other]))
        assert repr(key) in str(refused.value)


def test_a_derived_with_the_name_of_a_key_is_the_key_if_it_has_its_values() -> None:
    above = Trailing(events, by="g", over="1m", stats={"v": "sum"}, name="above")
    below = Trailing(events, by={"g": "k"}, over="1m", stats={"v": "sum"}, name="below")
    text = Derived(g=pl.col("g").cast(pl.String))
    with pytest.raises(DefinitionError, match="'g', by which 'events' is read"):
        shard_groups(FeatureView("v", spine_rows, key="id", features=[text, below]))
    shard_groups(FeatureView("v", spine_rows, key="id", features=[above, text]))
    below = Trailing(events, by="g", over="1m", stats={"v": "sum"}, name="below")
    for same in (pl.col("g"), pl.col("g").cast(pl.Int64)):
        (group,) = shard_groups(FeatureView("v", spine_rows, key="id", features=[above, Derived(g=same), below]))
        assert group.spine_columns == ("g",)


def test_what_a_key_is_derived_from_is_as_a_derived_above_it_has_it() -> None:
    """Float32 holds no odd number above 16,777,216: the key would be another one live than in batch."""
    features = [
        Derived(y=pl.col("g").cast(pl.Float32)),
        Derived(odd=(pl.col("y") % 2).cast(pl.Int64)),
        Trailing(events, by={"odd": "g"}, over="1m", stats={"v": "sum"}),
    ]
    shard_groups(FeatureView("v", spine_rows, key="id", features=features))
    hidden = Derived(g=pl.col("g").cast(pl.Float32))
    odd = Derived(odd=(pl.col("g") % 2).cast(pl.Int64))
    with pytest.raises(DefinitionError, match="'odd', by which 'events' is read"):
        shard_groups(FeatureView("v", spine_rows, key="id", features=[hidden, odd, features[2]]))


looked_up = FeatureView(
    "looked_up",
    spine_rows,
    key="id",
    features=[
        Trailing(placed, by="k", over="10s", stats={"v": ("sum", "last"), "*": "count"}),
        Lookup(shops, by="k", columns=("size", "name", "rate")),
        Derived(pair=pl.col("shops_size") - pl.col("g"), g=pl.col("g"), double=pl.col("x") * 2),
        Lookup(numbered, by={"pair": "n"}, columns="g", name="second"),
        Trailing(events, by={"shops_size": "g"}, over=("10s", "1m"), stats={"v": ("mean", "last"), "*": "count"}),
        Trailing(events, by={"shops_name": "k", "g": "g"}, over="1m", stats={"v": "sum"}, name="pairs"),
        Trailing(sales, by={"shops_name": "k"}, over="1m", stats={"v": ("sum", "first")}),
        Latest(events, by={"second_g": "g"}, columns=("v", "s"), max_age="20s", name="latest"),
        Trailing(spine_rows, by="k", over="10s", stats={"x": "mean"}, name="crowd"),
    ],
)


def dimension_versions(random: Random, folder: Path) -> None:
    """Other shops and numbers than before."""
    keys = [key for key in VALUES["k"] if key is not None]
    columns = {"size": [1, 2, -5, None], "name": [*keys, None], "rate": [0.1, 2.5]}
    rows = {"k": keys, **{name: random.choices(some, k=len(keys)) for name, some in columns.items()}}
    made = {"shops": pl.DataFrame(rows, schema=shops.schema)}
    some = random.sample(range(-8, 8), 10)
    made["numbered"] = pl.DataFrame({"n": some, "g": random.choices([1, 2, -5, None], k=10)}, schema=numbered.schema)
    for name, frame in made.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        frame.write_parquet(folder / name / "aside")
        (folder / name / "aside").rename(folder / name / "s.parquet")


@settings(max_examples=10, phases=(Phase.explicit, Phase.generate))
@given(seed=st.integers(0, 2**32))
def test_keys_are_looked_up_in_the_version_that_the_feature_row_names(seed: int) -> None:
    """The dimensions change while the job runs, and it is killed meanwhile."""
    random = Random(seed)
    chunks = stream(random)
    begin = {name: {0: 0, 1: 0} for name in SOURCES}
    with tempfile.TemporaryDirectory() as path:
        store, dimensions = Path(path), Path(path, "in")
        dimension_versions(random, dimensions)

        class Changing(Job):
            """The dimensions change between the journal, which looks keys up, and the assembly."""

            def _pass_on(self, turn: Turn) -> None:
                if random.random() < 0.5:
                    dimension_versions(random, dimensions)
                super()._pass_on(turn)

        def launched(number: int) -> Job:
            job = Changing(looked_up, store, dimensions, begin, JobOptions(f"r{number}", shards=random.choice([1, 3])))
            assert job.journal.parts[0].dimensions is not None
            job.journal.parts[0].dimensions.every = 0
            return job

        job = launched(0)
        for number, chunk in enumerate(chunks):
            job.take(unread(chunk, job.start))
            if random.random() < 0.2:
                job.commit()
            if random.random() < 0.1:
                job = launched(number)
                for earlier in chunks[: number + 1]:
                    if again := unread(earlier, job.start):
                        job.take(again)
        job.commit()
        audit(path, chunks, job)


def test_a_key_derived_from_the_spine_is_routed() -> None:
    derived = FeatureView(
        "v",
        spine_rows,
        key="id",
        features=[Derived(near=pl.col("g") // 2), Trailing(events, by={"near": "g"}, over="1m", stats={"v": "sum"})],
    )
    (group,) = shard_groups(derived)
    assert group.spine_columns == ("near",)


def test_state_holds_what_windows_lateness_and_keep_reach_and_is_reported(tmp_path: Path) -> None:
    reads = Source("reads", time="at", lateness="5s", columns={"k": pl.String, "v": pl.Float64})
    minute = FeatureView("m", spine_rows, key="id", features=[Trailing(reads, by="k", over="1m", stats={"v": "mean"})])
    job = Job(minute, tmp_path, tmp_path, {"reads": {0: 0}, "questions": {0: 0}}, JobOptions(keep=10_000_000))
    held = []
    for number in range(100):  # ten rows a second for a thousand seconds, a spine row in each
        seconds = range(10 * number, 10 * number + 10)
        rows = {"at": [histories.at(second, 1000 * i) for second in seconds for i in range(10)]}
        reported = pl.DataFrame({**rows, "k": ["a", "b"] * 50, "v": [1.0] * 100}, schema=reads.schema)
        rows_of_spine = [
            {**dict.fromkeys(spine_rows.schema), "id": second, "t": histories.at(second), "k": "a"}
            for second in seconds
        ]
        spine = pl.DataFrame(rows_of_spine, schema=spine_rows.schema, orient="row")
        job.take(
            [
                Message(name, 0, number, 2**51, None, to_arrow(each))
                for name, each in (("reads", reported), ("questions", spine))
            ]
        )
        if number % 5 == 4:
            state = job.commit()["state"]
            held.append((state["shards"]["rows"], state["journal"]["rows"]))
            assert state["shards"]["bytes"] > 16 * state["shards"]["rows"]
    shards, journal = (max(each) for each in zip(*held, strict=True))
    # A minute of windows, one of a time bucket, keep, lateness of both sources and rows that arrived at once.
    assert 600 <= shards <= 10 * (60 + 60 + 10 + 5 + 1 + 10)
    assert max(held[:10])[0] == shards
    assert journal <= 2 * (60 + 10 + 5 + 1 + 10 + 10)
