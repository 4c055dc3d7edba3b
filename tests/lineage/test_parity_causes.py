"""Live feature rows compared with the full batch table: each cause that is provoked is named, and no other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from beam_pipelines import features
from beam_pipelines.commands import parity
from beam_pipelines.runtime.errors import guard
from schemas import FeatureView
from tests.support import market
from tests.support.live_turns import read
from tests.support.turns import Job, JobOptions
from transforms.lineage.counted_rows import (
    BEFORE_START,
    CORRECTED,
    DIMENSION,
    HISTORY,
    LATE,
    REJECTED,
    REPEAT,
    UNEXPLAINED,
    BatchSide,
)
from transforms.lineage.difference_causes import FullComparison, compare_with_full
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri, live_dead_letters_uri
from transforms.streaming.live_tables import NewDeadLetters, TableWriter
from transforms.streaming.messages import Message, heartbeat, to_arrow
from transforms.streaming.repeats import Deduplicated, RepeatFinder
from transforms.streaming.replay import Replay, chunks_of
from transforms.streaming.row_origin import RID

Frames = dict[str, pl.DataFrame]
HOUR = 3_600_000_000
US = pl.Datetime("us", "UTC")


def live(folder: Path, frames: Frames, keep: int = HOUR, **how: Any) -> tuple[FeatureView, Path]:
    """(View, store) after a live job that these rows were sent to, in their order or as `how` says."""
    view, store = market.load(folder), folder / "live"
    market.write(folder / "dimensions", {"shops": frames["shops"]})
    sent = {name: frame for name, frame in frames.items() if name != "shops"}
    replay = Replay("", **{"partitions": 1, "chunk": 3 * HOUR, **how})
    begin = {name: dict.fromkeys(range(replay.partitions), 0) for name in sent}
    job = Job(view, store, folder / "dimensions" / "sources", begin, JobOptions(keep=keep))
    for number, messages in enumerate(chunks_of([view], sent, replay)):
        job.take(messages)
        if number % 5 == 0:
            job.commit()
    job.commit()
    return view, store


def batch(folder: Path, frames: Frames) -> Path:
    """A batch store that holds these rows, without a table."""
    return market.write(folder / "batch", frames)


def compared(folder: Path, sent: Frames, held: Frames, **how: Any) -> FullComparison:
    view, store = live(folder, sent, **how)
    full = compare_with_full(view, str(store), BatchSide.of(view, str(batch(folder, held))))
    assert full.feature_rows
    return full


def named(full: FullComparison) -> set[str]:
    return {*full.causes, *full.only_live, *full.only_batch}


def without(frame: pl.DataFrame, positions: Iterable[int]) -> pl.DataFrame:
    return frame.with_row_index("_").filter(~pl.col("_").is_in(list(positions))).drop("_")


@pytest.fixture(scope="module")
def frames() -> Frames:
    return market.sources(80)


def test_the_same_rows_in_order_differ_in_nothing(tmp_path: Path) -> None:
    spoiled = market.spoiled(market.sources(80))
    full = compared(tmp_path, spoiled, spoiled)
    assert named(full) == set(), full
    assert full.feature_rows == 80
    assert full.values == 80 * len(market.load(tmp_path).columns)
    assert full.pending == full.not_computed == full.unexplained == 0


def test_rows_that_arrive_after_the_cut_are_late(tmp_path: Path, frames: Frames) -> None:
    full = compared(tmp_path, frames, frames, disorder=9 * HOUR, seed=5, chunk=HOUR, keep=12 * HOUR)
    assert named(full) == {LATE}, full
    assert full.differing > 10


def test_repeats_that_arrive_in_disorder_are_late_rows_as_well(tmp_path: Path) -> None:
    spoiled = market.spoiled(market.sources(80))
    full = compared(tmp_path, spoiled, spoiled, disorder=30 * HOUR, seed=6, chunk=HOUR)
    assert set(full.causes) == {LATE}, full
    assert set(full.only_batch) == {REJECTED}  # a spine row that is too late is a dead letter
    assert full.causes[LATE].values > 10


def test_a_job_that_never_had_the_rows_before_its_start(tmp_path: Path, frames: Frames) -> None:
    start = int(market.at(3).timestamp() * 1e6)
    full = compared(tmp_path, frames, frames, start=start)
    assert named(full) == {HISTORY}, full
    assert full.differing > 10
    assert full.feature_rows < 80
    assert not full.only_batch  # spine rows from before the job began are not a difference


def letters_about(view: FeatureView, store: Path, rows: pl.DataFrame, source: str, time: str) -> None:
    """Dead letters of a job that refuses rows older than its start."""
    reported = rows.select(
        pl.lit(source).alias("source"),
        pl.lit(0, pl.Int32).alias("partition"),
        pl.int_range(10**6, 10**6 + len(rows)).alias("offset"),
        pl.lit(0, pl.Int32).alias("place"),
        pl.lit(time).alias("field"),
        pl.lit("before_start: older than the topic's beginning").alias("rule"),
        pl.col(time).cast(pl.String).alias("value"),
        pl.lit(view.name).alias("view"),
        pl.col(time).alias("arrived"),
        pl.col(time).dt.date().alias("date"),
    )
    writer = TableWriter(live_dead_letters_uri(str(store), view.name), LIVE_DEAD_LETTERS, "live/a test", "t")
    assert writer.append(reported, 1, {}, NewDeadLetters("live/a test")) == len(rows)


def test_rows_refused_as_older_than_the_start_are_told_from_those_never_had(tmp_path: Path, frames: Frames) -> None:
    start = market.at(3)
    view, store = live(tmp_path, frames, start=int(start.timestamp() * 1e6))
    held = str(batch(tmp_path, frames))
    old = frames["stock"].filter(pl.col("counted") < start)
    letters_about(view, store, old, "stock", "counted")
    full = compare_with_full(view, str(store), BatchSide.of(view, held))
    assert named(full) == {HISTORY, BEFORE_START}, full
    for label, source in ((BEFORE_START, "stock"), (HISTORY, "stock")):
        reported = {each["feature"].startswith(source) for each in full.causes[label].examples}
        assert reported == {label == BEFORE_START}


def test_a_corrected_and_an_erased_row(tmp_path: Path, frames: Frames) -> None:
    sales, stock = frames["sales"], frames["stock"]
    changed = pl.when(pl.int_range(pl.len()) == 40).then(pl.lit(123456.78)).otherwise(pl.col("price")).alias("price")
    full = compared(
        tmp_path, frames, {**frames, "sales": sales.with_columns(changed), "stock": without(stock, [30, 31])}
    )
    assert named(full) == {CORRECTED}, full
    features = {each["feature"].split("_by_")[0].split("_")[0] for each in full.causes[CORRECTED].examples}
    assert features <= {"sales", "stock", "dear", "density"}


def test_a_corrected_row_of_which_the_time_is_another(tmp_path: Path, frames: Frames) -> None:
    moved = (
        pl.when(pl.int_range(pl.len()) % 5 == 0)
        .then(pl.col("counted").dt.offset_by("30h"))
        .otherwise(pl.col("counted"))
    )
    full = compared(tmp_path, frames, {**frames, "stock": frames["stock"].with_columns(moved.alias("counted"))})
    assert named(full) == {CORRECTED}, full


def test_questions_corrected_erased_and_asked_later_in_batch(tmp_path: Path, frames: Frames) -> None:
    visits = frames["visits"]
    larger = (
        pl.when(pl.int_range(pl.len()) == 20).then(pl.lit(77.5, pl.Float32)).otherwise(pl.col("size")).alias("size")
    )
    full = compared(tmp_path, frames, {**frames, "visits": without(visits.with_columns(larger), [50])})
    assert set(full.causes) == {CORRECTED}, full
    assert full.only_live == {CORRECTED: 1}
    assert not full.only_batch


@pytest.mark.parametrize("content", [{"rent": 99.25}, {"area": 7}])
def test_a_dimension_that_has_another_version_now(tmp_path: Path, frames: Frames, content: dict[str, Any]) -> None:
    shops = frames["shops"]
    ((name, value),) = content.items()
    now = shops.with_columns(pl.lit(value).cast(shops.schema[name]).alias(name))
    full = compared(tmp_path, frames, {**frames, "shops": now})
    assert named(full) == {DIMENSION}, full
    assert {"shops" in each["feature"] or "density" in each["feature"] for each in full.causes[DIMENSION].examples} == {
        True
    }


def test_a_repeat_beyond_what_live_remembers(tmp_path: Path, frames: Frames) -> None:
    first = frames["sales"].filter(pl.col("sold") < market.at(0.7), pl.col("shop").is_not_null())[:6]
    again = first.with_columns(sold=pl.lit(market.at(5.2)).cast(US), price=pl.lit(5000.25))
    sent = {**frames, "sales": pl.concat([frames["sales"], again])}
    full = compared(tmp_path, sent, sent)
    assert named(full) == {REPEAT}, full
    near = {**frames, "sales": pl.concat([frames["sales"], again.with_columns(sold=pl.lit(market.at(1.5)).cast(US))])}
    assert named(compared(tmp_path / "near", near, near)) == set()


def test_a_repeat_that_live_counts_though_it_knows_the_first_is_explained_by_nothing(
    tmp_path: Path, frames: Frames, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = frames["sales"].filter(pl.col("sold") < market.at(0.7), pl.col("shop").is_not_null())[:6]
    again = first.with_columns(sold=pl.lit(market.at(1.5)).cast(US), price=pl.lit(5000.25))
    sent = {**frames, "sales": pl.concat([frames["sales"], again])}
    nothing = pl.DataFrame(schema={RID: pl.Int64, "__instead": pl.Int64})
    monkeypatch.setattr(RepeatFinder, "deduplicate", lambda self, rows, horizon: Deduplicated(rows, nothing, 0))
    full = compared(tmp_path, sent, sent)
    assert {label.split(":")[0] for label in named(full)} == {UNEXPLAINED}, full


def test_a_row_rejected_live_alone_for_the_clock_of_its_arrival(tmp_path: Path, frames: Frames) -> None:
    view = market.load(tmp_path)
    early = frames["sales"][60:64]
    kept = {**frames, "sales": without(frames["sales"], range(60, 64))}
    market.write(tmp_path / "dimensions", {"shops": frames["shops"]})
    store = tmp_path / "live"
    sent = {name: frame for name, frame in kept.items() if name != "shops"}
    job = Job(view, store, tmp_path / "dimensions" / "sources", {name: {0: 0, 1: 0} for name in sent})
    arrived = int((early["sold"].min() - timedelta(days=2)).timestamp() * 1e6)  # type: ignore[operator]
    job.take([Message("sales", 1, 0, arrived, None, to_arrow(early))])
    job.take([Message(name, 1, int(name == "sales"), arrived, *heartbeat(2**62)) for name in sent])
    for messages in chunks_of([view], sent, Replay("", partitions=1, chunk=3 * HOUR)):
        job.take(messages)
    job.commit()
    full = compare_with_full(view, str(store), BatchSide.of(view, str(batch(tmp_path, frames))))
    assert named(full) == {REJECTED}, full


def test_a_row_rejected_by_batch_alone(tmp_path: Path, frames: Frames) -> None:
    broken = (
        pl.when(pl.int_range(pl.len()).is_in([40, 90])).then(float("inf")).otherwise(pl.col("price")).alias("price")
    )
    full = compared(tmp_path, frames, {**frames, "sales": frames["sales"].with_columns(broken)})
    assert named(full) == {REJECTED}, full


def test_a_row_that_live_lost_is_explained_by_nothing(tmp_path: Path, frames: Frames) -> None:
    full = compared(tmp_path, {**frames, "sales": without(frames["sales"], [100, 101])}, frames)
    assert {label.split(":")[0] for label in named(full)} == {UNEXPLAINED}, full
    assert full.unexplained == full.differing > 0


def test_a_question_that_live_lost_is_explained_by_nothing(tmp_path: Path, frames: Frames) -> None:
    full = compared(tmp_path, {**frames, "visits": without(frames["visits"], [40])}, frames)
    assert full.only_batch == {UNEXPLAINED: 1}, full
    assert full.unexplained > 0


def test_several_causes_of_one_value_are_named_together(tmp_path: Path, frames: Frames) -> None:
    start = int(market.at(2).timestamp() * 1e6)
    price = (
        pl.when(pl.int_range(pl.len()) % 3 == 0).then(pl.col("price") + 0.5).otherwise(pl.col("price")).alias("price")
    )
    shops = frames["shops"].with_columns(area=pl.lit(7, pl.Int32))
    held = {**frames, "sales": frames["sales"].with_columns(price), "shops": shops}
    full = compared(tmp_path, frames, held, start=start, disorder=5 * HOUR, seed=1, chunk=HOUR)
    single = {each for label in full.causes for each in label.split(", ")}
    assert single == {LATE, HISTORY, CORRECTED, DIMENSION}, full
    assert any(", " in label for label in full.causes)
    assert full.unexplained == 0


# -- the command ------------------------------------------------------------------------------------------------------


def altered(store: Path, view: FeatureView, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Changes the first file of the live feature rows in place."""
    table = open_table(features_live_uri(str(store), view.name, view.fingerprint))
    assert table is not None
    path = data_files(table)[0].path
    before = pq.read_table(path)
    rows = change(pl.DataFrame(pl.from_arrow(before)))
    pq.write_table(rows.to_arrow().cast(before.schema), path)


def reported(folder: Path, store: Path, *flags: str) -> tuple[int, dict[str, Any]]:
    argv = ["--definition", str(folder / "definition.py"), "--store", str(store), "--run_id", "parity", *flags]
    (store / "parity.json").unlink(missing_ok=True)
    code = guard(parity.main)([*argv, "--json", str(store / "parity.json")])
    return code, json.loads((store / "parity.json").read_text())


def test_the_command_compares_with_the_table_and_finds_an_altered_value(
    tmp_path: Path, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    view, store = live(tmp_path, frames)
    code, figures = reported(tmp_path, store)
    assert code == 0
    assert figures["full_batch"]["batch"] is None
    assert "none to compare with" in capsys.readouterr().out
    held = batch(tmp_path, frames)
    assert (
        features.main(["--definition", str(tmp_path / "definition.py"), "--store", str(held), "--run_id", "batch"]) == 0
    )
    code, figures = reported(tmp_path, store, "--batch_store", str(held))
    assert code == 0
    assert figures["full_batch"]["answers_compared"] == 80
    assert figures["full_batch"]["values_differing"] == figures["full_batch"]["unexplained"] == 0
    assert "version 0" in figures["full_batch"]["batch"]
    name = "sales_by_shop_count_2d"
    altered(store, view, lambda rows: rows.with_columns(pl.col(name) + (pl.int_range(pl.len()) == 0).cast(pl.Int64)))
    capsys.readouterr()
    code, figures = reported(tmp_path, store, "--batch_store", str(held))
    assert code == 5
    assert figures["values_differing"] == figures["full_batch"]["unexplained"] == 1
    assert list(figures["full_batch"]["causes"]) == [UNEXPLAINED]
    assert name in capsys.readouterr().err


def test_float32_values_are_printed_as_their_shortest_text(
    tmp_path: Path, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    view, store = live(tmp_path, frames)
    altered(
        store,
        view,
        lambda rows: rows.with_columns(
            size=pl.when(pl.int_range(pl.len()) == 0).then(pl.lit(23.33, pl.Float32)).otherwise(pl.col("size"))
        ),
    )
    code, figures = reported(tmp_path, store)
    printed = capsys.readouterr()
    assert code == 5
    assert "23.33 live" in printed.err
    assert "23.33 live" in printed.out
    assert "23.32999" not in printed.err + printed.out
    assert figures["features"]["size"]["examples"][0]["live"] == 23.329999923706055


def test_a_question_that_is_nowhere_ends_with_exit_code_5(
    tmp_path: Path, frames: Frames, capsys: pytest.CaptureFixture[str]
) -> None:
    view, store = live(tmp_path, frames)
    uri = features_live_uri(str(store), view.name, view.fingerprint)
    before = read(uri)
    day = before["date"].min()
    DeltaTable(uri).delete(f"date = '{day}'")  # whole files: nothing is written
    lost = len(before) - len(read(uri))
    assert 0 < lost < len(before)
    code, figures = reported(tmp_path, store)
    assert code == 5
    assert figures["questions_unaccounted_for"] == lost
    assert f"; {lost} are none of these" in capsys.readouterr().err


def test_whatever_is_mixed_is_explained_by_what_was_done(tmp_path: Path) -> None:
    for seed in range(4):
        random = Random(seed)
        sent, held = dict(market.spoiled(market.sources(60, seed + 10))), {}
        how: dict[str, Any] = {
            "chunk": random.choice([1, 4, 12]) * HOUR,
            "seed": seed,
            "partitions": random.choice([1, 2]),
        }
        causes = {REJECTED}  # spine rows that arrive too late
        if random.random() < 0.6:
            how["disorder"] = random.choice([2, 40]) * HOUR
            causes.add(LATE)
        if random.random() < 0.5:
            how["start"] = int(market.at(random.uniform(1, 4)).timestamp() * 1e6)
            causes.add(HISTORY)
        for name in ("sales", "stock", "visits"):
            if random.random() < 0.6:
                causes.add(CORRECTED)
                gone = random.sample(range(60), 5)
                held[name] = without(sent[name], gone)
        if random.random() < 0.5:
            causes.add(DIMENSION)
            held["shops"] = sent["shops"].with_columns(rent=pl.col("rent") * 2 + 1)
        full = compared(tmp_path / str(seed), sent, {**sent, **held}, **how)
        reported = {each for label in named(full) for each in label.split(", ")}
        assert reported <= causes, (seed, causes, full)
        assert full.unexplained == 0
