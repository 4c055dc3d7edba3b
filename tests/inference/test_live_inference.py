"""`millrace inference --streaming` without a broker: the live feature table replayed through the same graph."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from beam_pipelines.commands import parity
from beam_pipelines.runtime.errors import guard
from schemas.loading import load_definition
from tests.support.live_inference_case import ROWS, House, messages_of
from transforms.inference import champion_model
from transforms.inference.champion_model import Champion, Serving, score_live
from transforms.inference.live_input import replayed, to_score
from transforms.inference.live_output import Outlet, PendingPredictions, begin_at, to_envelope
from transforms.inference.live_records import BatchOrigin, MessageRange, ScoringState
from transforms.lineage.prediction_parity import Rescored, rescore
from transforms.models.scoring import PinnedModel, open_scorer
from transforms.records.record_batches import batch
from transforms.records.times import FOREVER
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import BOOSTER
from transforms.streaming.live_tables import TableWriter
from transforms.streaming.messages import Message, heartbeat, to_arrow


class At(logging.Handler):
    """Does something when the replay comes to a row."""

    def __init__(self, row: int, what: Callable[[], Any]) -> None:
        super().__init__()
        self.row, self.what, self.done = row, what, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.done and record.msg.startswith("replay: at row") and record.args[0] >= self.row:  # type: ignore[index,operator]
            self.done = True
            self.what()


@pytest.fixture
def at() -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    log, handlers = logging.getLogger("millrace.serving"), []

    def add(row: int, what: Callable[[], Any]) -> None:
        handlers.append(At(row, what))
        log.addHandler(handlers[-1])

    yield add
    for handler in handlers:
        log.removeHandler(handler)


def test_every_feature_row_is_scored_once_as_a_batch_job_would(house: House) -> None:
    assert house.run("--run_id", "one") == 0
    found, expected = house.predictions.sort("row_id"), house.expected("1")
    assert found.select(expected.columns).equals(expected)
    assert len(found) == ROWS
    status = house.status("one")
    assert status["rows"] == {"read": ROWS, "predicted": ROWS, "repeated": 0, "letters": 0}
    assert (status["version"], status["last"], status["by_version"]) == ("1", True, {"1": ROWS})
    seen = pl.DataFrame(pl.from_arrow(house.feature_rows())).sort("row_id")
    assert found.select("__cut", "__late", "__answered").equals(seen.select("__cut", "__late", "__answered"))
    assert house.run("--run_id", "again") == 0  # nothing is left to do
    assert len(house.predictions) == ROWS


def swapped_to(version: str) -> None:
    """Wait until a model of this process is that version, or has refused it."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if any(
            each.current.version == version or version in {e.version for e in each.refused}
            for each in champion_model._open
        ):
            return
        time.sleep(0.005)
    raise AssertionError(f"version {version} was not looked at")


def test_a_new_champion_takes_over_between_two_batches(
    house: House, at: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def swap() -> None:
        house.registry.promote("orders", "2", "a test")
        swapped_to("2")

    at(1200, swap)
    assert house.run("--run_id", "swap", "--poll", "20ms") == 0
    found = house.predictions.sort("__offset", "__place")
    border = found["__offset"].filter(found["__offset"] >= 1200).min()
    assert 1200 <= border < ROWS  # type: ignore[operator]
    assert len(found) == found["prediction_id"].n_unique() == ROWS
    for version, rows in (("1", found[:border]), ("2", found[border:])):
        expected = house.expected(version).join(rows.select("row_id"), on="row_id", how="semi")
        assert rows.sort("row_id").select(expected.columns).equals(expected)
    status = house.status("swap")
    (swap_told,) = status["swaps"]
    assert (swap_told["from"], swap_told["to"], swap_told["offsets"]) == ("1", "2", {"0": border})
    scored = found["__scored"].to_physical()
    assert scored[border - 1] < swap_told["at"] <= scored[border]
    assert status["by_version"] == {"1": border, "2": ROWS - border}
    printed = [record.getMessage() for record in caplog.records if record.name == "millrace.serving"]
    assert any("version 2 of 'orders' serves instead of version 1 since" in line for line in printed)
    assert any(f"version 2 of 'orders' scores from orders.features/0@{border} on" in line for line in printed)


def test_a_broken_champion_is_refused_and_the_old_one_serves_on(
    house: House, at: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    def spoil() -> None:
        booster = house.folder("2") / BOOSTER
        content = bytearray(booster.read_bytes())
        content[len(content) // 2] ^= 1
        booster.write_bytes(bytes(content))
        house.registry.promote("orders", "2", "a test")
        swapped_to("2")

    at(800, spoil)
    assert house.run("--run_id", "broken", "--poll", "20ms", "--pace", "50ms") == 0
    found, expected = house.predictions.sort("row_id"), house.expected("1")
    assert found.select(expected.columns).equals(expected)
    status = house.status("broken")
    (refused,) = status["refused"]  # once, though it was looked at again and again
    assert refused["version"] == "2"
    assert refused["rule"] == "A model's files are as they were saved"
    assert "restore" in refused["fix"].lower()
    assert (status["version"], status["swaps"]) == ("1", [])
    (error,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert (
        "version 2 of 'orders' is refused, version 1 serves on: A model's files are as they were saved"
        in error.getMessage()
    )


def test_a_restart_begins_where_the_last_commit_ended(house: House) -> None:
    """The first job is stopped after a while; what it had not committed is scored again, by the champion of then."""
    view = load_definition(house.definition).view
    outlet = Outlet(view, "orders", str(house.store), "by-hand")
    first, second, third, fourth, *_ = replayed(view, str(house.store), {})
    for message in (first, second, third):
        feed(house, outlet, "1", [message], by_row=True)
    house.registry.promote("orders", "3", "a test")
    assert house.run("--run_id", "on") == 0
    assert house.predictions.group_by("model_version").len().sort("model_version", descending=True).rows() == [
        ("3", ROWS - fourth.offset),
        ("1", fourth.offset),
    ]
    assert house.status("on")["rows"] == {"read": ROWS, "predicted": ROWS, "repeated": 0, "letters": 0}


def feed(
    house: House, outlet: Outlet, version: str, messages: list[Message], by_row: bool = False, commit: bool = True
) -> PendingPredictions:
    """One job's life by hand: messages → scores → a ledger that starts where the table stands."""
    model = PinnedModel(str(house.folder(version)), version)
    serving = Serving(house.registry.uri, "orders", outlet.view, model)
    ledger = PendingPredictions(outlet, begin_at(outlet, {0: 0, 1: 0}))
    champion = Champion(serving, watch=False)
    # The job does not give up a gap in the offsets at this time, however slow the machine is.
    now = time.time_ns() // 1000
    held = dataclasses.replace(champion.current, scorer=open_scorer(model))
    for message in messages:
        rows = to_score(outlet.view, [message], by_row)
        ledger.take(to_envelope(score_live(serving, champion, held, time.time_ns() // 1000, rows))[1])
    if commit:
        ledger.commit(now)
    return ledger


class Killed(Exception):
    pass


@settings(max_examples=15, phases=(Phase.explicit, Phase.generate), suppress_health_check=[*HealthCheck])
@given(seed=st.integers(0, 2**32))
def test_every_row_is_in_the_table_once_whatever_comes_again_and_wherever_it_dies(shared: House, seed: int) -> None:
    """Messages in any order, some twice under new offsets; the process dies anywhere, also between two commits."""
    random = Random(seed)
    house = dataclasses.replace(shared, store=Path(tempfile.mkdtemp(dir=shared.store.parent)))
    shutil.copytree(shared.store / "features_live", house.store / "features_live")
    os.symlink(shared.store / "registry", house.store / "registry")
    outlet = Outlet(load_definition(house.definition).view, "orders", str(house.store), "r")
    made = messages_of(house, 100)
    *some, _, _ = made
    again = [random.choice(some) for _ in range(random.randrange(6))]  # the features job wrote them twice
    stream = [each for each in some if each.partition == 0], [each for each in some if each.partition == 1]
    for each in again:
        part = stream[random.randrange(2)]
        part.insert(random.randrange(len(part) + 1), each)
    stream = tuple(
        [each._replace(offset=n, partition=p) for n, each in enumerate(part)] for p, part in enumerate(stream)
    )
    garbage = Message("orders.features", 0, len(stream[0]), 2**50, b"?", b"garbage")
    ends = [
        Message("orders.features", p, len(part) + (p == 0), 2**50, *heartbeat(FOREVER)) for p, part in enumerate(stream)
    ]
    every = [*stream[0], *stream[1], garbage, *ends]
    append = TableWriter.append
    for life in range(random.randrange(1, 6)):
        start = begin_at(outlet, {0: 0, 1: 0}).next
        unread = [each for each in every if each.offset >= start[each.partition]]
        random.shuffle(unread)
        seen, dies = unread[: random.randrange(len(unread) + 1)], random.randrange(3)
        done: list[str] = []

        def dying(self: TableWriter, *args: Any, done: list[str] = done, dies: int = dies, **named: Any) -> int:
            if len(done) == dies:
                raise Killed
            done.append(self.uri)
            return append(self, *args, **named)

        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(TableWriter, "append", dying)
            feed(house, outlet, "123"[life % 3], seen)
    start = begin_at(outlet, {0: 0, 1: 0}).next
    ledger = feed(house, outlet, "1", [each for each in every if each.offset >= start[each.partition]])
    assert ledger.last
    found = house.predictions
    assert found["row_id"].n_unique() == len(found) == ROWS
    for version in found["model_version"].unique():
        expected = house.expected(version).join(
            found.filter(model_version=version).select("row_id"), on="row_id", how="semi"
        )
        assert found.filter(model_version=version).sort("row_id").select(expected.columns).equals(expected)
    (dead_letter,) = house.table("dead_letters", "live_predictions_orders").rows(named=True)
    assert (dead_letter["source"], dead_letter["partition"], dead_letter["offset"]) == (
        "orders.features",
        0,
        garbage.offset,
    )
    shutil.rmtree(house.store)


@pytest.fixture(scope="module")
def shared(built: House) -> House:
    return built


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"key": b"0123456789abcdef:1"}, "a feature row has fingerprint"),
        ({"key": None}, "a feature row has fingerprint"),
        ({"value": b""}, "Arrow IPC stream"),
        ({"value": b'{"id": 1}'}, "Arrow IPC stream"),
        ({"value": b"\xff\xff\xff\xff\x10\x00\x00\x00 nonsense"}, ""),
        ({"key": b"__heartbeat", "value": b"9" * 5000}, "a heartbeat is an integer"),
        ({"key": b"__heartbeat", "value": b"soon"}, "a heartbeat is an integer"),
    ],
)
def test_a_message_without_feature_rows_becomes_a_dead_letter_and_spoils_no_other(
    house: House, change: dict[str, Any], rule: str
) -> None:
    view = load_definition(house.definition).view
    first, second, third, *_ = messages_of(house, 10, partitions=1)
    rows = to_score(view, [first, second._replace(**change), third])
    origin = BatchOrigin.of(rows)
    assert rows.num_rows == 20
    assert origin.ranges == (MessageRange("orders.features", 0, 0, 3, 3, None),)
    (dead_letter,) = origin.dead_letters.rows(named=True)
    assert (dead_letter["partition"], dead_letter["offset"], dead_letter["place"]) == (0, 1, -1)
    assert rule in dead_letter["rule"]


def test_feature_rows_of_another_schema_or_without_their_key_become_dead_letters(house: House) -> None:
    view = load_definition(house.definition).view
    feature_rows = pl.DataFrame(pl.from_arrow(house.feature_rows().slice(0, 4)))
    good, *_ = messages_of(house, 10, partitions=1)
    rows = to_score(view, [good._replace(value=to_arrow(feature_rows.drop("amount")))])
    (less,) = BatchOrigin.of(rows).dead_letters.rows(named=True)
    assert "column 'amount' must be float; it is missing" in less["rule"]
    holed = feature_rows.with_columns(
        pl.when(pl.col("row_id") == feature_rows["row_id"][2]).then(None).otherwise(pl.col("row_id")).alias("row_id")
    )
    schema = pa.schema(house.feature_rows().schema)
    rows = to_score(view, [good._replace(value=to_arrow(batch(holed, schema)))])
    (dead_letter,) = BatchOrigin.of(rows).dead_letters.rows(named=True)
    assert rows.num_rows == 3
    assert (dead_letter["place"], dead_letter["field"]) == (2, "row_id")


def test_an_end_is_one_only_while_nothing_follows(house: House) -> None:
    outlet = Outlet(load_definition(house.definition).view, "orders", str(house.store), "r")
    first, second, *_ = messages_of(house, 1200, partitions=1)
    end = Message("orders.features", 0, 1, 2**50, *heartbeat(FOREVER))
    ledger = PendingPredictions(outlet, ScoringState("orders.features", {0: 0}))
    serving = Serving(house.registry.uri, "orders", outlet.view, PinnedModel(str(house.folder("1")), "1"))
    champion = Champion(serving, watch=False)

    def take(*messages: Message) -> None:
        ledger.take(to_envelope(score_live(serving, champion, champion.current, 1, to_score(outlet.view, messages)))[1])
        ledger.commit(2**51)

    take(first, end)
    assert ledger.last
    take(second._replace(offset=2))
    assert not ledger.last
    take(end._replace(offset=3))
    assert ledger.last


@pytest.fixture
def scored(house: House) -> House:
    assert house.run("--run_id", "scored") == 0
    return house


def rescored(house: House) -> Rescored:
    return rescore(load_definition(house.definition).view, str(house.store), "orders", house.registry.uri)


def alter(house: House, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    """Put other rows into a file of the predictions."""
    table = open_table(str(house.store / "predictions_live" / "orders"))
    assert table is not None
    path = data_files(table)[0].path
    before = pq.read_table(path)
    rows = change(pl.DataFrame(pl.from_arrow(before)))
    pq.write_table(rows.select(before.schema.names).to_arrow().cast(before.schema), path)


def test_scored_again_by_a_batch_job_nothing_differs(scored: House) -> None:
    assert rescored(scored) == Rescored(feature_rows=ROWS, predictions=ROWS, compared={"1": ROWS})


def test_a_score_with_one_other_bit_is_found(scored: House) -> None:
    alter(scored, lambda rows: rows.with_columns(_nudged(rows)))
    found = rescored(scored)
    assert found.differing == 1
    assert "score" in found.examples[0]


def _nudged(rows: pl.DataFrame) -> pl.Series:
    values = rows["score"].to_numpy().copy()
    values[0] = np.nextafter(values[0], np.float32(2))
    return pl.Series("score", values)


def test_a_lost_a_doubled_and_a_stray_prediction_are_found(scored: House) -> None:
    alter(scored, lambda rows: pl.concat([rows[1:], rows[1:2]]))
    found = rescored(scored)
    assert (found.missing, found.doubled, found.stray, found.differing) == (1, 1, 0, 0)
    other = scored.predictions["row_id"].max()
    alter(
        scored,
        lambda rows: rows.with_columns(
            pl.when(pl.int_range(pl.len()) == 0).then(other - 1).otherwise("row_id").alias("row_id")
        ),
    )
    assert rescored(scored).stray == 1


def test_parity_scores_again_what_was_predicted(
    built: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(built.store, tmp_path / "store", symlinks=True, ignore=shutil.ignore_patterns("registry"))
    house = House(built.definition, tmp_path / "store")
    registry = f"--registry={built.registry.uri}"
    built.registry.promote("orders", "1", "a test")
    assert house.run("--run_id", "scored", registry) == 0
    command = ["--definition", house.definition, "--store", str(house.store), registry, "--run_id"]
    assert guard(parity.main)([*command, "parity"]) == 0
    assert (
        f"predictions: {ROWS:,} by version 1; 0 differ, 0 doubled, 0 without a feature row" in capsys.readouterr().out
    )
    alter(house, lambda rows: rows.with_columns(_nudged(rows)))
    assert guard(parity.main)([*command, "again"]) == 5
    assert "Live predictions equal a batch job's" in capsys.readouterr().err


def test_without_a_champion_the_job_does_not_start(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert house.run("--registry", f"sqlite:///{tmp_path}/empty.db") == 4
    error = capsys.readouterr().err
    assert "A live job has a model before it starts" in error
    assert "millrace training" in error
    assert house.run("--source=kafka") == 2
    assert "--bootstrap" in capsys.readouterr().err
    shutil.rmtree(house.store / "features_live")
    assert house.run() == 4
    assert "features --streaming" in capsys.readouterr().err


def test_a_champion_that_is_broken_at_launch_leaves_the_one_before_it_serving(
    house: House, capsys: pytest.CaptureFixture[str]
) -> None:
    (house.folder("2") / BOOSTER).write_bytes(b"nothing")
    house.registry.promote("orders", "2", "a test")
    assert house.run("--run_id", "no") == 4  # nothing has served before
    assert "A model's files are as they were saved" in capsys.readouterr().err
    outlet = Outlet(load_definition(house.definition).view, "orders", str(house.store), "by-hand")
    feed(house, outlet, "1", [next(replayed(outlet.view, str(house.store), {}))], by_row=True)
    assert house.run("--run_id", "yes") == 0
    assert "version 2 of 'orders' is refused, version 1, which served before, serves on" in capsys.readouterr().err
    assert house.status("yes")["by_version"] == {"1": ROWS}
