"""Transactional producers on a real broker: what was aborted is no row, and what transactions leave in a partition
holds nothing up."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pytest
from confluent_kafka import Producer

from beam_pipelines import inference_streaming
from beam_pipelines.runtime.errors import guard
from tests.support import market
from tests.support.live_fixtures import Live
from tests.support.live_inference_case import ROWS, House, messages_of
from tests.support.live_jobs import END, Slot, Stage, slots
from tests.support.live_serving_case import check, flags, topics
from transforms.records.times import FOREVER
from transforms.streaming.kafka import Broker, begin_offsets, end_offsets
from transforms.streaming.kafka_admin import first_record, unread_offsets
from transforms.streaming.messages import HEARTBEAT, heartbeat, to_arrow

pytestmark = [pytest.mark.live, pytest.mark.timeout(280)]


class Transactions(Stage):
    """As `Stage`, with a producer that sends in transactions."""

    def connect(self) -> None:
        settings = {
            "bootstrap.servers": self.live.broker.bootstrap,
            "log_level": 0,
            "transactional.id": f"{self.prefix}{random.randrange(10**9)}",
        }
        self.producer = Producer(settings)
        self.producer.init_transactions(30)
        self.touched: set[tuple[str, int]] = set()

    def begin(self) -> None:
        self.producer.begin_transaction()
        self.before = dict(self.sent)

    def commit(self) -> None:
        self.producer.commit_transaction(30)
        self._marked()

    def abort(self) -> None:
        """What was sent since `begin` is none; what it would have been is dropped."""
        self.producer.flush(30)
        self.producer.abort_transaction(30)
        self._marked()

    def _marked(self) -> None:
        """The end of a transaction takes an offset of each partition that it wrote to."""
        assert not self.lost
        for position, offset in self.sent.items():
            if offset > self.before.get(position, 0):
                self.sent[position] = offset + 1

    def waste(self, some: Sequence[Slot]) -> None:
        """A transaction of rows like those of some slots, that is aborted."""
        kept = {name: set(positions) for name, positions in self.rows.items()}
        self.begin()
        for slot in some:
            for source, partition, frame in slot.parts:
                spoiled = frame.with_columns(
                    pl.col(name) + 1_000_000 for name in ("visit", "sale", "pieces") if name in frame.columns
                )
                self.send_frame(source, partition, spoiled, slot.end)
            self.beat(END)
        self.abort()
        self.rows = kept


def test_a_features_job_sees_committed_rows_alone_and_waits_for_no_gap(live: Live, tmp_path: Path) -> None:
    stage = Transactions(live, tmp_path, partitions=2)
    to_send = slots({name: frame for name, frame in market.sources(60).items() if name in market.TIMES}, share=(2, 1))
    stage.waste(to_send[:1])  # the partitions begin with what is none
    for number, slot in enumerate(to_send):
        stage.begin()
        for source, partition, frame in slot.parts:
            stage.send_frame(source, partition, frame, slot.end)
        stage.beat(slot.end)
        stage.commit()
        if number % 3 == 0:
            stage.waste(to_send[number : number + 2])
    stage.begin()
    stage.beat(FOREVER)
    stage.commit()
    stage.waste(to_send[:2])  # and end with it
    with stage.job("committed") as job:
        assert job.wait(150) == 0, job.output()[-3000:]
        printed = job.output()
    feature_rows = stage.audit()  # every committed row is accounted for, once, and no other
    assert len(feature_rows) == 60
    assert "questions unaccounted for  0" in printed
    figures = stage.figures("committed")
    assert all(each.get("unread", 0) == 0 for each in figures["counts"].values()), figures["counts"]
    assert stage.status("committed")["last"]
    with stage.job("again") as job:  # everything is committed: a restart has nothing to do, and ends as well
        assert job.wait(150) == 0, job.output()[-3000:]
    assert stage.audit().sort("row_id").equals(feature_rows.sort("row_id"))


def test_an_inference_job_scores_committed_feature_rows_alone(
    house: House, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, _, topic = topics(house, live, 2)
    producer = Producer({"bootstrap.servers": live.broker.bootstrap, "transactional.id": prefix, "log_level": 0})
    producer.init_transactions(30)
    sent = [each for each in messages_of(house, 50, 2) if each.key != HEARTBEAT]

    def transaction(commit: bool, messages: Sequence[tuple[int, bytes, bytes]]) -> None:
        producer.begin_transaction()
        for partition, key, value in messages:
            producer.produce(topic, value, key, partition)
        producer.flush(30)
        producer.commit_transaction(30) if commit else producer.abort_transaction(30)

    for number, message in enumerate(sent):
        whole = pl.read_ipc_stream(message.value)
        wrong = to_arrow(whole.with_columns(pl.col("row_id") + 1))
        if number % 2 == 0:
            transaction(False, [(message.partition, message.key or b"", wrong)])
        transaction(True, [(message.partition, message.key or b"", message.value)])
    transaction(True, [(number, *heartbeat(FOREVER)) for number in (0, 1)])
    transaction(False, [(number, sent[0].key or b"", sent[0].value) for number in (0, 1)])
    assert guard(inference_streaming.main)([*flags(house, live, prefix, "committed"), "--commit_every=500ms"]) == 0, (
        capsys.readouterr().err[-3000:]
    )
    found = house.predictions
    assert found["prediction_id"].n_unique() == len(found) == ROWS
    check(house, found)
    rows = house.status("committed")["rows"]
    assert rows["predicted"] == ROWS
    assert rows["read"] == ROWS + rows["repeated"]
    assert rows["letters"] == 0, json.dumps(rows)


def test_offsets_that_hold_no_record_are_distinguished_from_those_that_wait(live: Live) -> None:
    broker, name = Broker(live.broker.bootstrap), f"gaps-{random.randrange(10**9)}"
    live.broker.create(name, partitions=3)
    producer = Producer({"bootstrap.servers": live.broker.bootstrap, "transactional.id": name, "log_level": 0})
    producer.init_transactions(30)

    def send(values: dict[int, int], end: str) -> None:
        producer.begin_transaction()
        for partition, count in values.items():
            for number in range(count):
                producer.produce(name, f"{end} {number}".encode(), b"k", partition)
        producer.flush(30)
        {"commit": producer.commit_transaction, "abort": producer.abort_transaction, "open": lambda _: None}[end](30)

    send({0: 2, 1: 3}, "abort")  # offsets 0 to 2 and 0 to 3
    send({0: 1}, "commit")  # 3, and 4
    send({0: 2}, "abort")  # to 7
    assert end_offsets(broker, [name])[name] == {0: 8, 1: 4, 2: 0}
    assert first_record(broker, name, 0, 0) == 3
    assert first_record(broker, name, 0, 4) == 8
    assert first_record(broker, name, 1, 0) == 4
    assert unread_offsets(broker, {name: begin_offsets(broker, [name])[name]})[name] == {0: 5, 1: 0, 2: 0}
    assert unread_offsets(broker, {name: {0: 4, 1: 0, 2: 0}})[name] == {0: 0, 1: 0, 2: 0}
    send({0: 1, 1: 1}, "open")  # not there until it is committed
    assert end_offsets(broker, [name])[name] == {0: 8, 1: 4, 2: 0}
    assert first_record(broker, name, 0, 4) == 8
    producer.commit_transaction(30)
    assert first_record(broker, name, 0, 4) == 8
    assert unread_offsets(broker, {name: {0: 4, 1: 0, 2: 0}})[name] == {0: 2, 1: 2, 2: 0}
    assert unread_offsets(broker, {name: {0: 9, 1: 5}})[name] == {0: 0, 1: 0, 2: 0}
