"""A plan decides where rows are computed, never what comes out."""

import itertools
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from schemas import FeatureView
from schemas.durations import DAY
from schemas.errors import DataError
from tests.support import market, oracles
from transforms.features.block_inputs import read_dimension
from transforms.features.plan import FeaturePlan, plan_features
from transforms.features.trailing_features import compute_block
from transforms.records.times import ALWAYS, EPOCH, MICROSECOND
from transforms.sources.tallies import SourceTally, add_tallies

NOW = (datetime(2024, 6, 1, tzinfo=UTC) - EPOCH) // MICROSECOND


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> FeatureView:
    return market.load(tmp_path_factory.mktemp("definition"))


def plan_of(
    view: FeatureView, store: Path, start: date | None = None, end: date | None = None, **other: Any
) -> FeaturePlan:
    return plan_features(view, str(store / "sources"), start, end, NOW, **other)


def computed(view: FeatureView, plan: FeaturePlan) -> tuple[pl.DataFrame, pl.DataFrame, dict[str, SourceTally]]:
    """Features, dead letters and accounts of a whole plan."""
    dimensions = {name: read_dimension(view, plan, name) for name in plan.dimensions}
    features, dead_letters = [], [each.dead_letters for each in dimensions.values()]
    tallies = [each.tally for each in dimensions.values()]
    for block in plan.blocks:
        made, inputs = compute_block(view, plan, block, dimensions)
        features.append(pl.from_arrow(made))
        dead_letters += [each.dead_letters for each in inputs]
        tallies += [each.tally for each in inputs]
    return pl.concat(features), pl.concat(dead_letters), add_tallies(tallies)


def same(a: pl.DataFrame, b: pl.DataFrame) -> None:
    assert_frame_equal(a.sort("asked", "visit"), b.sort("asked", "visit"), check_exact=True)


def test_features_of_a_plan_are_those_of_the_oracle(view: FeatureView, tmp_path: Path) -> None:
    frames = market.sources(60)
    market.write(tmp_path, frames)
    got = computed(view, plan_of(view, tmp_path, block_rows=100))[0]
    tables = {name: frames[name] for name in view.sources}
    expected = pl.DataFrame(
        oracles.features(view, frames["visits"], tables), schema=got.drop("row_id", "date").schema, orient="row"
    )
    same(got.drop("row_id", "date"), expected)


@dataclass(frozen=True)
class Files:
    """How a source's rows lie in Parquet files; `seed` shuffles them."""

    files: int
    group: int
    seed: int | None
    statistics: bool


@given(
    seed=st.integers(0, 2**31),
    block_rows=st.sampled_from([20, 60, 150, 600]),
    files=st.builds(
        Files,
        files=st.integers(1, 3),
        group=st.integers(9, 200),
        seed=st.none() | st.integers(0, 2**31),
        statistics=st.booleans(),
    ),
)
@settings(max_examples=12)
def test_any_blocks_over_any_files_give_the_same_bits_dead_letters_and_tallies(
    view: FeatureView,
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    block_rows: int,
    files: Files,
) -> None:
    store = tmp_path_factory.mktemp("store")
    frames = market.spoiled(market.sources(60, seed))
    market.write(store, frames, group=100_000)
    features, dead_letters, tallies = computed(view, plan_of(view, store))
    market.write(store, frames, files.files, files.group, files.seed, files.statistics)
    plan = plan_of(view, store, block_rows=block_rows)
    again, others, accounts = computed(view, plan)
    same(again, features)
    reported = ["source", "field", "rule", "value"]
    assert_frame_equal(
        others.select(reported).sort(reported), dead_letters.select(reported).sort(reported), check_exact=True
    )
    assert accounts["visits"].counts == tallies["visits"].counts
    for name, tally in accounts.items():  # how many lie outside every window is known to a row group only
        assert (name, tally.dead, tally.repeated) == (name, tallies[name].dead, tallies[name].repeated)
        assert tally.conserved
    for name, dead in market.SET_ASIDE.items():
        assert (name, tallies[name].dead) == (name, dead)
        assert (name, tallies[name].repeated) == (name, market.REPEATED[name])


def test_bad_rows_change_no_feature_row_of_good_ones(view: FeatureView, tmp_path: Path) -> None:
    frames = market.sources()
    clean = computed(view, plan_of(view, market.write(tmp_path / "a", frames)))[0]
    same(computed(view, plan_of(view, market.write(tmp_path / "b", market.spoiled(frames))))[0], clean)


@given(data=st.data(), block_rows=st.integers(1, 500))
@settings(max_examples=25)
def test_blocks_tile_the_interval(view: FeatureView, shared: Path, data: st.DataObject, block_rows: int) -> None:
    first = data.draw(st.none() | st.integers(-2, market.DAYS - 1))
    last = data.draw(
        st.none() | st.integers((-1 if first is None else first) + 1, market.DAYS + 2).filter(lambda n: n > 0)
    )
    start, end = (None if day is None else market.at(day).date() for day in (first, last))
    plan = plan_of(view, shared, start, end, block_rows=block_rows)
    bounds = [block.start for block in plan.blocks] + [plan.blocks[-1].end]
    assert bounds == sorted(set(bounds))
    assert [block.end for block in plan.blocks] == bounds[1:]
    assert (plan.start, plan.end) == (bounds[0], bounds[-1])
    assert plan.start % DAY == plan.end % DAY == 0
    assert start is None or plan.start == (start - EPOCH.date()).days * DAY
    assert end is None or plan.end == (end - EPOCH.date()).days * DAY
    owned = [block.own for block in plan.blocks]
    assert [low for low, _ in owned[1:]] == [high for _, high in owned[:-1]]
    assert (owned[0][0] == ALWAYS) == (start is None and end is None)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return market.write(tmp_path_factory.mktemp("shared"), market.sources(60), group=20)


def test_a_block_sees_its_spine_rows_and_what_their_windows_reach_and_no_more(view: FeatureView, shared: Path) -> None:
    day = date(2024, 3, 5)
    (block,) = plan_of(view, shared, day, date(2024, 3, 6)).blocks
    for slices, reach in ((block.spine, 0), *((block.events[name], view.reach(name)) for name in block.events)):
        assert slices
        for each in slices:
            assert each.low < block.end
            assert each.high >= block.start - reach
    assert len(block.events["sales"]) < 60 * 3 / 20


def test_day_by_day_is_the_whole(view: FeatureView, tmp_path: Path) -> None:
    store = market.write(tmp_path, market.spoiled(market.sources()))
    whole = computed(view, plan_of(view, store))[0]
    days = [market.at(i).date() for i in range(market.DAYS + 1)]
    parts = [computed(view, plan_of(view, store, a, b))[0] for a, b in itertools.pairwise(days)]
    same(pl.concat(parts), whole)


def test_dead_letters_of_day_by_day_runs_are_emitted_once(view: FeatureView, tmp_path: Path) -> None:
    """But for rows without any plausible time in their row group, which only a run over everything can own."""
    store = market.write(tmp_path, market.spoiled(market.sources()), group=1000)
    days = [market.at(i).date() for i in range(market.DAYS + 1)]
    plans = [plan_of(view, store, a, b) for a, b in itertools.pairwise(days)]
    parts = [computed(view, plan)[1].filter(pl.col("source") != "shops") for plan in plans]
    whole = computed(view, plan_of(view, store))[1].filter(pl.col("source") != "shops")
    columns = ["source", "file", "row", "rule"]
    assert_frame_equal(
        pl.concat(parts).select(columns).sort(columns), whole.select(columns).sort(columns), check_exact=True
    )
    for part, day in zip(parts, days, strict=False):
        assert set(part["time"].cast(pl.Datetime("us")).dt.date()) <= {day}


def test_row_groups_without_any_plausible_time_are_reported_by_a_run_over_everything(
    view: FeatureView, tmp_path: Path
) -> None:
    frames = market.sources(30)
    market.write(tmp_path, frames)
    for name, moment in (("visits", datetime(1970, 1, 1)), ("sales", datetime(2199, 1, 1)), ("stock", None)):
        lost = frames[name][:2].with_columns(
            pl.lit(moment, pl.Datetime("us")).dt.replace_time_zone("UTC").alias(market.TIMES[name])
        )
        lost.write_parquet(tmp_path / "sources" / name / "lost.parquet")
    _, dead_letters, tallies = computed(view, plan_of(view, tmp_path, block_rows=50))
    assert sorted(dead_letters["source"]) == ["sales", "sales", "stock", "stock", "visits", "visits"]
    assert all(tallies[name].dead == 2 and tallies[name].conserved for name in market.TIMES)


def test_one_stray_time_of_the_future_does_not_stretch_the_interval(view: FeatureView, tmp_path: Path) -> None:
    frames = market.sources(30)
    whole = computed(view, plan_of(view, market.write(tmp_path, frames)))[0]
    stray = frames["visits"][:1].with_columns(
        asked=pl.lit(datetime(2199, 1, 1, tzinfo=UTC)), visit=pl.lit(-9, pl.Int64)
    )
    market.write(tmp_path, {**frames, "visits": pl.concat([frames["visits"], stray])}, group=1000)
    plan = plan_of(view, tmp_path, block_rows=10)
    same(computed(view, plan)[0], whole)
    assert plan.blocks[-1].end <= NOW + 2 * DAY


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (date(2024, 4, 1), None),
        (None, date(2024, 3, 1)),
        (date(2024, 3, 20), date(2024, 3, 21)),
        (date(2024, 3, 3), date(2024, 3, 3)),
    ],
)
def test_an_interval_without_spine_rows_is_refused_with_those_there_are(
    view: FeatureView, shared: Path, start: date | None, end: date | None
) -> None:
    with pytest.raises(DataError, match=r"'visits' has rows in the interval.*from 2024-03-01 to 2024-03-0\d.*--start"):
        plan_of(view, shared, start, end)


def test_a_spine_of_no_rows_is_refused(view: FeatureView, tmp_path: Path) -> None:
    frames = market.sources(30)
    market.write(tmp_path, {**frames, "visits": frames["visits"].clear()})
    with pytest.raises(DataError, match="no row with a plausible time"):
        plan_of(view, tmp_path)


def test_events_and_dimensions_of_no_rows_give_empty_windows_and_nulls(view: FeatureView, tmp_path: Path) -> None:
    frames = {name: frame if name == "visits" else frame.clear() for name, frame in market.sources(30).items()}
    features, dead_letters, tallies = computed(view, plan_of(view, market.write(tmp_path, frames), block_rows=20))
    assert len(features) == 30
    assert features["sales_by_shop_count_2d"].sum() == 0
    assert features["sales_by_shop_price_mean_2d"].null_count() == features["shops_area"].null_count() == 30
    assert len(dead_letters) == 0
    assert tallies["sales"] == SourceTally("sales")


def test_a_repeated_spine_row_counts_once_as_an_event_too(view: FeatureView, tmp_path: Path) -> None:
    """Identical spine rows count once; of contradictory ones the smallest stays, also where windows read the spine."""
    frames = market.sources(30)
    one = computed(view, plan_of(view, market.write(tmp_path / "a", frames)))[0]
    more = pl.concat(
        [frames["visits"], frames["visits"][3:6], frames["visits"][3:5].with_columns(size=pl.lit(1e9, pl.Float32))]
    )
    same(computed(view, plan_of(view, market.write(tmp_path / "b", {**frames, "visits": more})))[0], one)


def test_accounts_tell_events_apart(view: FeatureView, tmp_path: Path) -> None:
    store = market.write(tmp_path, market.spoiled(market.sources()), group=7)
    tallies = computed(view, plan_of(view, store))[2]
    assert tallies["visits"].used == 120
    assert tallies["shops"].used == 3
    assert tallies["shops"].read == 5
    for tally in tallies.values():
        assert tally.read == tally.used + tally.outside + tally.repeated + tally.dead
