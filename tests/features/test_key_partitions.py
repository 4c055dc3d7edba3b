"""However a block is divided by key, by hash, into long windows, by a shuffle, it gives the bits of the whole block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.views import lifetime_sources
from tests.support import oracles
from tests.support.without_beam import outputs_of
from transforms.features import key_partitions, plan, routed_dimensions
from transforms.features.lifetime_snapshots import Chain, SnapshotSegment, chains, segments
from transforms.records.times import EPOCH, MICROSECOND
from transforms.sources import reader
from transforms.sources.dead_letters import DEAD_LETTERS
from transforms.sources.inventory import Inventory, take_inventory
from transforms.sources.tallies import SourceTally

START = datetime(2024, 3, 1, tzinfo=UTC)
NOW = (START + timedelta(days=60) - EPOCH) // MICROSECOND
MOMENT = pl.Datetime("us", "UTC")
WORDS = ["a", "a/b", 'quote"d', "", "é", "=x y", None]
NUMBERS = ("count", "sum", "mean", "std", "var", "min", "max")
EVERY = (*NUMBERS, "first", "last", "median", "q95", "n_unique")

asks = Source("asks", time="at", columns={"id": pl.Int64, "k": pl.String, "g": pl.Int64, "x": pl.Float32})
pays = Source(
    "pays", time="at", unique="no", order="no", columns={"no": pl.Int64, "k": pl.String, "g": pl.Int32, "v": pl.Float64}
)
seen = Source("seen", time="at", event_time="was", columns={"k": pl.String, "v": pl.Float64, "s": pl.String})
shops = Source("shops", columns={"k": pl.String, "area": pl.Int32, "town": pl.String})
towns = Source("towns", columns={"town": pl.String, "rent": pl.Float64})
LONG = FeatureView(
    "long",
    asks,
    key="id",
    features=[
        Derived(half=pl.col("g") // 2),
        Trailing(
            pays,
            by="k",
            over=("6h", "2d", "365d"),
            stats={"v": EVERY, "g": ("count", "last", "n_unique"), "*": "count"},
        ),
        Trailing(
            pays,
            by={"half": "g"},
            over="40d",
            where=pl.col("v") > 20,
            name="dear",
            stats={"v": ("sum", "first", "q05")},
        ),
        Trailing(
            seen, by="k", over=("1d", "90d"), stats={"v": ("mean", "max", "first", "last"), "s": ("last", "n_unique")}
        ),
        Latest(seen, by="k", columns=("v", "s"), max_age="300d"),
        Latest(pays, by="g", columns=("no", "v"), max_age="3d"),
        Trailing(asks, by=("k", "g"), over="30d", stats={"x": ("mean", "min", "last"), "*": "count"}),
        Lookup(shops, by="k", columns=("area", "town")),
        Lookup(towns, by={"shops_town": "town"}, columns="rent"),
        Trailing(pays, by={"shops_area": "g"}, over="365d", name="like", stats={"v": ("sum", "max")}),
        Derived(share=pl.col("dear_by_half_v_sum_40d") / pl.col("towns_rent")),
    ],
)
EVER = FeatureView(
    "ever",
    asks,
    key="id",
    features=[
        Trailing(pays, by="k", over=("1d", "all"), stats={"v": (*NUMBERS, "first", "last"), "*": "count"}),
        Trailing(pays, by="g", over="100d", stats={"v": ("sum", "median")}),
        Trailing(pays, by=("k", "g"), over="all", where=pl.col("v") > 20, name="dear", stats={"v": ("sum", "std")}),
        Latest(pays, by="g", columns=("v", "k"), max_age="forever"),
        Trailing(asks, by="k", over="all", stats={"x": ("mean", "last"), "*": "count"}),
    ],
)


def history(seed: int, rows: int, heavy: float) -> dict[str, pl.DataFrame]:
    """Rows of 20 days: ties in time, nulls, repeats of a payment under other keys and at one moment, invalid rows."""
    random = np.random.default_rng(seed)

    def times(n: int) -> pl.Series:
        seconds = np.sort(random.integers(0, 20 * 24, n)) * 3600 * 1_000_000 + random.integers(0, 2, n)
        return pl.Series((START - EPOCH) // MICROSECOND + seconds).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")

    def words(n: int) -> list[str | None]:
        return [
            "a" if one < heavy else WORDS[i] for one, i in zip(random.random(n), random.integers(0, 7, n), strict=True)
        ]

    def some(values: np.ndarray[Any, Any]) -> list[Any]:
        return [
            None if gone else value
            for value, gone in zip(values.tolist(), random.random(len(values)) < 0.1, strict=True)
        ]

    n, many = rows // 3, rows
    found = {
        "asks": pl.DataFrame(
            {
                "at": times(n),
                "id": np.arange(n),
                "k": words(n),
                "g": some(random.integers(1, 7, n)),
                "x": some(random.normal(0, 1, n)),
            }
        ),
        "pays": pl.DataFrame(
            {
                "at": times(many),
                "no": np.arange(many),
                "k": words(many),
                "g": some(random.integers(1, 7, many)),
                "v": some(random.integers(-100, 10**7, many) / 100),
            }
        ),
        "seen": pl.DataFrame(
            {
                "was": times(n),
                "late": random.integers(0, 50, n),
                "k": words(n),
                "v": some(random.normal(0, 9, n)),
                "s": some(random.choice(np.array(["x", "y", "z"]), n)),
            }
        ),
        "shops": pl.DataFrame({"k": ["a", "", "é", "nobody"], "area": [3, None, 5, 6], "town": ["n", "m", None, "n"]}),
        "towns": pl.DataFrame({"town": ["n", "m"], "rent": [0.1, 2.5]}),
    }
    found["seen"] = found["seen"].with_columns(at=pl.col("was") + pl.duration(hours="late")).drop("late").sort("at")
    again = found["pays"].sample(fraction=0.2, seed=seed, with_replacement=True)
    found["pays"] = pl.concat(
        [
            found["pays"],
            again.with_columns(k=pl.Series(words(len(again)), dtype=pl.String), at=pl.col("at").dt.offset_by("7h")),
            again[::2].with_columns(k=pl.lit("a"), v=pl.lit(1.5)),
            again[:3],
        ]
    )
    types = {each.name: each for each in (asks, pays, seen, shops, towns)}
    return {name: frame.cast(types[name].schema).select(list(types[name].schema)) for name, frame in found.items()}  # type: ignore[arg-type]


def spoiled(frames: dict[str, pl.DataFrame]) -> dict[str, pl.DataFrame]:
    """With rows that break contracts, repeated spine rows, and keys of a dimension with two rows."""
    spine_rows, paid, shop = frames["asks"], frames["pays"], frames["shops"]
    timeless = spine_rows[1:2].with_columns(at=pl.lit(None, MOMENT), id=pl.lit(-3, pl.Int64))
    conflict = spine_rows[2:4].with_columns(x=pl.lit(1e9, pl.Float32))
    endless = paid[:2].with_columns(v=pl.lit(float("inf")))
    more = shop[:1].with_columns(area=pl.lit(99, pl.Int32))
    return {
        **frames,
        "asks": pl.concat([spine_rows, spine_rows[:2], conflict, timeless]),
        "pays": pl.concat([paid, endless]),
        "shops": pl.concat([shop, shop[1:2], more]),
    }


def write(store: Path, frames: Mapping[str, pl.DataFrame], group: int = 50, shuffle: bool = False) -> Path:
    for name, frame in frames.items():
        (store / "sources" / name).mkdir(parents=True, exist_ok=True)
        if shuffle:
            frame = frame.sample(fraction=1, shuffle=True, seed=1)
        elif "at" in frame.columns:
            frame = frame.sort("at", maintain_order=True)
        pl.DataFrame(frame).write_parquet(store / "sources" / name / "part.parquet", row_group_size=group)
    return store


def planned(view: FeatureView, store: Path, **choices: Any) -> tuple[plan.FeaturePlan, Inventory]:
    inventory = take_inventory(view, str(store / "sources"), NOW)
    repeats = {"pays": reader.repeats_of(inventory.contracts["pays"], inventory.slices["pays"]).first}
    ranges = [plan.resolve_interval(view, inventory, None, None)]
    options = plan.PlanOptions(everything=True, summarised=lifetime_sources(view), **choices)
    return plan.plan_blocks(view, inventory, ranges, repeats, options), inventory


def computed(
    view: FeatureView, store: Path, shuffled: bool = False, **choices: Any
) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, SourceTally]]:
    """Features, dead letters and accounts, as the steps of the pipeline give them; checked to be whole and in order."""
    chosen, inventory = planned(view, store, shuffled=shuffled, **choices)
    spans: tuple[SnapshotSegment, ...] = ()
    over: tuple[Chain, ...] = ()
    if lifetime_sources(view):
        over = chains(chosen, {})
        spans = segments(view, chosen, over, inventory.slices, {name: inventory.timeless(name) for name in view.events})
    made = outputs_of(view, chosen, str(store), spans, over)
    for each in made.features:
        assert each.schema == view.output_schema
    features = pl.concat([pl.from_arrow(each) for each in made.features]).sort("at", "id")
    dead_letters = pl.concat([pl.from_arrow(each) for each in [DEAD_LETTERS.empty_table(), *made.dead_letters]])
    tallies = dict(made.tallies)
    assert all(tally.conserved for tally in tallies.values())
    return features, dead_letters.sort(dead_letters.columns), tallies


def same(
    got: tuple[pl.DataFrame, pl.DataFrame, dict[str, SourceTally]],
    expected: tuple[pl.DataFrame, pl.DataFrame, dict[str, SourceTally]],
) -> None:
    assert_frame_equal(got[0], expected[0], check_exact=True)
    assert_frame_equal(got[1].drop("row"), expected[1].drop("row"), check_exact=True)
    # How many rows lie outside every window is known to a row group only.
    for name, tally in expected[2].items():
        there = got[2][name]
        assert (name, there.used, there.repeated, there.dead) == (name, tally.used, tally.repeated, tally.dead)


@dataclass(frozen=True)
class Cut:
    """How rows are cut into blocks, and blocks by key."""

    block_rows: int
    shards: int | None
    shuffled: bool
    routed: bool
    chunk: int


CUTS = st.builds(
    Cut,
    block_rows=st.sampled_from([25, 80, 10**6]),
    shards=st.sampled_from([None, 2, 3, 50]),
    shuffled=st.booleans(),
    routed=st.booleans(),
    chunk=st.sampled_from([7, 60, 10**6]),
)


@given(
    view=st.sampled_from([LONG, EVER]),
    seed=st.integers(0, 2**31),
    rows=st.sampled_from([12, 90, 240]),
    spread=st.tuples(st.sampled_from([0.0, 0.9]), st.booleans()),
    cut=CUTS,
)
@settings(max_examples=15)
def test_any_partition_by_key_gives_the_same_bits_dead_letters_and_tallies(
    tmp_path_factory: pytest.TempPathFactory,
    view: FeatureView,
    seed: int,
    rows: int,
    spread: tuple[float, bool],
    cut: Cut,
) -> None:
    heavy, unsorted = spread
    store = write(tmp_path_factory.mktemp("store"), spoiled(history(seed, rows, heavy)), shuffle=unsorted)
    whole = computed(view, store, key_shards=1)
    with pytest.MonkeyPatch.context() as patch:
        for module in (reader, key_partitions, routed_dimensions):
            patch.setattr(module, "CHUNK_ROWS", cut.chunk)
        patch.setattr(reader.stream_slices, "__defaults__", (*reader.stream_slices.__defaults__[:-1], cut.chunk))  # type: ignore[index]
        choices = {
            "block_rows": cut.block_rows,
            "key_shards": cut.shards,
            "broadcast_bytes": 0 if cut.routed else 10**9,
        }
        same(computed(view, store, cut.shuffled, **choices), whole)


@given(
    seed=st.integers(0, 2**31),
    heavy=st.sampled_from([0.0, 0.9]),
    block_rows=st.sampled_from([25, 300]),
    shuffled=st.booleans(),
)
@settings(max_examples=4)
def test_features_cut_by_key_are_those_of_the_oracle(
    tmp_path_factory: pytest.TempPathFactory, seed: int, heavy: float, block_rows: int, shuffled: bool
) -> None:
    frames = history(seed, 90, heavy)
    store = write(tmp_path_factory.mktemp("store"), frames)
    got = computed(LONG, store, shuffled, block_rows=block_rows, key_shards=3, broadcast_bytes=0)[0].drop(
        "row_id", "date"
    )
    order = [name for name in pays.schema if name not in ("at", "no")]
    first = frames["pays"].unique().sort("at", "no", *order).unique("no", keep="first", maintain_order=True)
    expected = pl.DataFrame(
        oracles.features(LONG, frames["asks"], {**frames, "pays": first}), schema=got.schema, orient="row"
    )
    assert_frame_equal(got, expected.sort("at", "id"), check_exact=True)
