"""Views over one spine that are computed together: the same bits, tallies and dead letters as each alone, and each
source read once."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from transforms.features.block_inputs import read_dimension
from transforms.features.plan import FeaturePlan, PlanOptions, block_cuts, plan_blocks, resolve_interval
from transforms.features.shared_blocks import ViewPart, compute_together, read_together
from transforms.features.trailing_features import compute_block
from transforms.sources.inventory import Inventory, take_inventory
from transforms.sources.reader import repeats_of
from transforms.sources.tallies import add_tallies, rows_loaded

NOW = 1_800_000_000_000_000
START = datetime(2024, 1, 1, tzinfo=UTC)
asked = Source("asked", time="at", columns={"id": pl.Int64, "who": pl.String, "where": pl.String, "x": pl.Float64})
sold = Source(
    "sold",
    time="at",
    unique="id",
    columns={"id": pl.Int64, "who": pl.String, "where": pl.String, "paid": pl.Float64, "tip": pl.Float64},
)
places = Source("places", columns={"where": pl.String, "size": pl.Int32})
HIGH = pl.col("paid") > 5
FEATURES = (
    Trailing(sold, by="who", over=("1d", "3d"), stats={"paid": ("mean", "std", "count")}),
    Trailing(sold, by="who", over="2d", stats={"tip": ("sum", "last")}),
    Trailing(sold, by=("who", "where"), over="4d", stats={"paid": ("median", "n_unique")}),
    Trailing(sold, by="who", over="3d", where=HIGH, name="high", stats={"*": "count"}),
    Trailing(asked, by="where", over=("6h", "2d"), stats={"x": "mean", "*": "count"}),
    Latest(sold, by="who", columns=("paid", "tip"), max_age="2d"),
    Latest(asked, by="where", columns="x", max_age="1d", name="before"),
    Lookup(places, by="where", columns="size"),
    Derived(hour=pl.col("at").dt.hour(), double=pl.col("x") * 2),
)


def write(folder: Path, seed: int, broken: str) -> None:
    """Random sources of a few days; `broken` names columns of `sold` in which some rows break the contract; "text":
    it is a CSV file in which some values of two columns are no numbers."""
    random = np.random.default_rng(seed)

    def times(rows: int) -> list[datetime]:
        return [START + timedelta(seconds=int(s)) for s in np.sort(random.integers(0, 6 * 86_400, rows))]

    def names(rows: int, letters: str) -> np.ndarray:
        return np.array(list(letters))[random.integers(0, len(letters), rows)]

    rows, more = 120, 200
    paid, tip = (np.round(random.gamma(2, 3, more), 2) for _ in range(2))
    for column, values in (("paid", paid), ("tip", tip)):
        if column in broken:
            values[random.integers(0, more, 3)] = np.inf
    frames = {
        asked: {
            "at": times(rows),
            "id": range(rows),
            "who": names(rows, "abc"),
            "where": names(rows, "uv"),
            "x": random.normal(0, 1, rows),
        },
        sold: {
            "at": times(more),
            "id": random.integers(0, 150, more),
            "who": names(more, "abcd"),
            "where": names(more, "uvw"),
            "paid": paid,
            "tip": tip,
        },
        places: {"where": ["u", "v"], "size": [3, 4]},
    }
    for source, columns in frames.items():
        (folder / source.name).mkdir(parents=True)
        frame = pl.DataFrame(columns, schema=source.schema)
        if source is sold and broken == "text":
            spoiled = [
                pl.when(pl.int_range(pl.len()).is_in(random.integers(0, more, 40).tolist()))
                .then(pl.lit("none"))
                .otherwise(pl.col(name).cast(pl.String))
                .alias(name)
                for name in ("paid", "tip")
            ]
            moment = pl.col("at").dt.strftime("%Y-%m-%dT%H:%M:%SZ")
            frame.with_columns(moment, *spoiled).write_csv(folder / source.name / "all.csv")
        else:
            frame.write_parquet(folder / source.name / "all.parquet", use_pyarrow=True, row_group_size=40)


def plan_of(view: FeatureView, root: Path, cuts: object = None, rows: int = 90) -> tuple[FeaturePlan, Inventory]:
    inventory = take_inventory(view, str(root), NOW)
    repeats = {
        name: repeats_of(inventory.contracts[name], inventory.slices[name]).first
        for name, source in view.events.items()
        if source.unique
    }
    ranges = [resolve_interval(view, inventory, None, None)]
    options = PlanOptions(everything=True, digest=True, block_rows=rows, shuffled=False, key_shards=1, cuts=cuts)  # type: ignore[arg-type]
    return plan_blocks(view, inventory, ranges, repeats, options), inventory


def alone(view: FeatureView, root: Path) -> tuple[pa.Table, Mapping[str, object], pl.DataFrame, dict[str, int]]:
    plan, _ = plan_of(view, root)
    dimensions = {name: read_dimension(view, plan, name) for name in plan.dimensions}
    batches, inputs = [], [*dimensions.values()]
    for block in plan.blocks:
        batch, read = compute_block(view, plan, block, dimensions)
        batches.append(batch)
        inputs += read
    tallies = add_tallies([each.tally for each in inputs])
    return (
        pa.Table.from_batches(batches),
        tallies,
        pl.concat([each.dead_letters for each in inputs]),
        rows_loaded(tallies),
    )


def together(
    views: list[FeatureView], root: Path
) -> list[tuple[pa.Table, Mapping[str, object], pl.DataFrame, dict[str, int]]]:
    plans = [plan_of(view, root) for view in views]
    ranges = list(plans[0][0].ranges)
    options = PlanOptions(everything=True, digest=True, block_rows=90)
    cuts = block_cuts([(view, inventory) for view, (_, inventory) in zip(views, plans)], ranges, options)
    parts = [ViewPart(view, plan_of(view, root, cuts)[0]) for view in views]
    dimensions = [{name: read_dimension(part.view, part.plan, name) for name in part.plan.dimensions} for part in parts]
    batches, inputs = [[] for _ in views], [[*own.values()] for own in dimensions]
    for blocks in zip(*(part.plan.blocks for part in parts), strict=True):
        shared = read_together(parts, blocks)
        for i, batch in enumerate(compute_together(parts, shared, dimensions)):
            batches[i].append(batch)
            inputs[i] += [shared.spines[i], *shared.events[i].values()]
    result = []
    for i in range(len(views)):
        tallies = add_tallies([each.tally for each in inputs[i]])
        letters = pl.concat([each.dead_letters for each in inputs[i]])
        result.append((pa.Table.from_batches(batches[i]), tallies, letters, rows_loaded(tallies)))
    return result


@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    chosen=st.lists(st.sets(st.integers(0, len(FEATURES) - 1), min_size=1), min_size=2, max_size=3),
    broken=st.sampled_from(["", "", "tip", "paid tip", "text"]),
)
def test_views_computed_together_are_what_each_is_alone(
    tmp_path_factory: pytest.TempPathFactory, seed: int, chosen: list[set[int]], broken: str
) -> None:
    root = tmp_path_factory.mktemp("sources")
    write(root, seed, broken)
    views = [
        FeatureView(f"v{i}", asked, key="id", features=[FEATURES[n] for n in sorted(some)])
        for i, some in enumerate(chosen)
    ]
    found, loaded = together(views, root), dict[str, int]()
    apart = dict[str, int]()
    for view, (rows, tallies, letters, read) in zip(views, found, strict=True):
        expected, counts, dead, own = alone(view, root)
        moment = [(view.time, "ascending"), ("id", "ascending")]
        assert rows.sort_by(moment).equals(expected.sort_by(moment))
        assert tallies == counts
        assert letters.sort("source", "file", "row").equals(dead.sort("source", "file", "row"))
        loaded = {name: loaded.get(name, 0) + read.get(name, 0) for name in {**loaded, **read}}
        apart = {name: max(apart.get(name, 0), own.get(name, 0)) for name in {**apart, **own}}
    for name in apart:
        if name != "places":
            assert loaded[name] <= 1.5 * apart[name] + 90, "about as many as the view that reads most"


def test_equal_columns_are_computed_once_and_sources_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transforms.features import kernel

    write(tmp_path, 3, "")
    views = [
        FeatureView("one", asked, key="id", features=[FEATURES[0], FEATURES[2]]),
        FeatureView("two", asked, key="id", features=[FEATURES[0], FEATURES[1], FEATURES[3]]),
    ]
    union = FeatureView("union", asked, key="id", features=[FEATURES[n] for n in (0, 1, 2, 3)])
    made, computed = list[tuple[str, ...]](), list[str]()
    of_frame, statistic = kernel.History.of_frame, kernel._statistic
    monkeypatch.setattr(
        kernel.History,
        "of_frame",
        lambda source, keys, *rest: made.append(tuple(keys)) or of_frame(source, keys, *rest),
    )
    monkeypatch.setattr(
        kernel, "_statistic", lambda history, each: computed.append(each.name) or statistic(history, each)
    )
    found = together(views, tmp_path)
    shared = (len(made), sorted(computed))
    blocks = len(plan_of(views[0], tmp_path)[0].blocks)
    assert blocks > 2
    made.clear(), computed.clear()
    (whole,) = together([union], tmp_path)
    assert shared == (len(made), sorted(computed)), "histories and columns as of one view with the union"
    total = {name: sum(each[3].get(name, 0) for each in found) for name in ("asked", "sold")}
    assert total == {name: whole[3][name] for name in total}, "rows read as of one view with the union"
