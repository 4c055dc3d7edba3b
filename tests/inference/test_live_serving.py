"""Live inference on a real broker and a real engine: swaps under load, kills, and what ends up in topic and table."""

from __future__ import annotations

import io
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

from beam_pipelines import inference_streaming
from beam_pipelines.runtime.errors import guard
from deploy.streaming.prism import Prism
from deploy.streaming.processes import Child
from tests.support.live_fixtures import Live
from tests.support.live_inference_case import ROWS, House, messages_of
from tests.support.live_serving_case import check, flags, topics
from transforms.streaming.kafka import Broker, send_end
from transforms.streaming.messages import HEARTBEAT

pytestmark = [pytest.mark.live, pytest.mark.timeout(280)]
ROOT = Path(__file__).parents[2]


def topic_rows(live: Live, topic: str) -> pl.DataFrame:
    """Everything in a topic of predictions, in the order of each partition."""
    consumer = Consumer(
        {"bootstrap.servers": live.broker.bootstrap, "group.id": "look", "enable.auto.commit": False, "log_level": 0}
    )
    try:
        partitions = list(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in partitions])
        left = sum(
            consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1] for number in partitions
        )
        frames, deadline = [], time.monotonic() + 30
        while left and time.monotonic() < deadline:
            for message in consumer.consume(500, timeout=0.5):
                assert message.error() is None
                left -= 1
                frames.append(pl.read_ipc_stream(io.BytesIO(message.value())))
        assert not left
        return pl.concat(frames)
    finally:
        consumer.close()


@pytest.mark.parametrize("environment", ["LOOPBACK", "EXTERNAL"])
def test_swaps_under_load_lose_and_double_nothing(house: House, live: Live, environment: str) -> None:
    """A job of which the champion changes twice while rows come; it ends by itself when the topic does."""
    prefix, sender, topic = topics(house, live)
    ended: list[int] = []
    argv = [*flags(house, live, prefix, "swaps", environment), "--poll=200ms", "--commit_every=1s"]
    child = Child([sys.executable, "-m", "beam_pipelines.inference", *argv], house.store / "inference.log", cwd=ROOT)
    try:
        first = [each for each in messages_of(house, 5, 4) if each.key != HEARTBEAT]
        third = len(first) // 3
        for number, message in enumerate(first):
            if number == third or number == 2 * third:
                _await(child, lambda n=number: _read(house, "swaps") >= 5 * (n - 1), 60)  # the job has come this far
                house.registry.promote("orders", "2" if number == third else "3", "a test")
                wanted = "2" if number == third else "3"
                _await(
                    child,
                    lambda v=wanted: f"version {v} of 'orders' serves" in child.output() or environment == "EXTERNAL",
                    30,
                )
                time.sleep(1.5 if environment == "EXTERNAL" else 0)
            sender.send(topic, message.key or b"", message.value, partition=message.partition)
            time.sleep(0.002)
        sender.acknowledged()
        send_end(Broker(live.broker.bootstrap), topic)
        ended.append(child.wait(60))
    finally:
        child.stop()
    assert ended == [0], child.output()[-3000:]
    found = house.predictions
    assert found["prediction_id"].n_unique() == len(found) == ROWS
    check(house, found)
    assert sorted(found["model_version"].unique()) == ["1", "2", "3"]
    sent = topic_rows(live, f"{prefix}orders.predictions")
    assert set(sent["prediction_id"]) == set(found["prediction_id"])
    check(house, sent)
    status = house.status("swaps")
    assert status["last"]
    assert status["rows"]["predicted"] == ROWS
    assert [(each["from"], each["to"]) for each in status["swaps"]] == [("1", "2"), ("2", "3")]
    for swap, after in zip(
        status["swaps"], "23", strict=True
    ):  # no row of before is stamped after it, and the other way round
        later = found.filter(pl.col("__scored").to_physical() >= swap["at"])
        assert int(later["model_version"].min()) >= int(after)  # type: ignore[arg-type]
        earlier = found.filter(pl.col("__scored").to_physical() < swap["at"])
        assert int(earlier["model_version"].max()) < int(after)  # type: ignore[arg-type]


def _read(house: House, run_id: str) -> int:
    try:
        return int(house.status(run_id)["rows"]["read"])
    except (OSError, ValueError):
        return -10


def _await(child: Child, what: Callable[[], Any], within: float) -> None:
    deadline = time.monotonic() + within
    while not what():
        assert child.running, child.output()[-3000:]
        assert time.monotonic() < deadline, child.output()[-3000:]
        time.sleep(0.02)


def test_killed_at_any_moment_the_table_has_every_row_once(house: House, live: Live, tmp_path: Path) -> None:
    killed(house, live, tmp_path, 4, 11)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(6))
def test_thirty_kills_of_the_inference_job(house: House, live: Live, tmp_path: Path, seed: int) -> None:
    killed(house, live, tmp_path, 5, seed)


def killed(house: House, live: Live, folder: Path, times: int, seed: int) -> None:
    """Kill −9 so many times, from while it starts to while it commits, a few times of Prism; the alias moves
    meanwhile."""
    prefix, sender, topic = topics(house, live)
    messages = [each for each in messages_of(house, 5, 4) if each.key != HEARTBEAT]
    stop = threading.Event()

    def send() -> None:
        for message in messages:
            sender.send(topic, message.key or b"", message.value, partition=message.partition)
            if stop.wait(times * 8 / len(messages)):
                break

    chance, thread, prism = random.Random(seed), threading.Thread(target=send), Prism(folder)
    prism.start()
    argv = [
        sys.executable,
        "-m",
        "beam_pipelines.inference",
        *flags(house, live, prefix, "killed"),
        *prism.options,
        "--poll=200ms",
        "--commit_every=200ms",
    ]
    thread.start()
    try:
        for number in range(times):
            child = Child(argv, house.store / "inference.log", cwd=ROOT)
            if number % 4:  # once it works, amid work
                _await(child, lambda: "running: reading on" in child.output(), 150)  # noqa: B023
                time.sleep(chance.uniform(0, 4))
            else:
                time.sleep(chance.uniform(0, 8))
            house.registry.promote("orders", str(number % 3 + 1), "a test")
            if number % 4 == 3:  # the cluster, and with it its workers
                prism.kill()
                prism.start()
                assert child.wait(100) == 4, child.output()[-3000:]
                assert "nothing is lost" in child.output()
                assert "Traceback" not in child.output(), child.output()[-3000:]
            child.kill()
    finally:
        stop.set()
        thread.join()
        prism.stop()
    for message in messages:  # all once more, as a features job that starts again may do
        sender.send(topic, message.key or b"", message.value, partition=message.partition)
    sender.acknowledged()
    send_end(Broker(live.broker.bootstrap), topic)
    with Child([*argv, *live.prism.options, "--commit_every=1s"], house.store / "inference.log", cwd=ROOT) as child:
        assert child.wait(150) == 0, child.output()[-3000:]
    found = house.predictions
    assert found["row_id"].n_unique() == len(found) == ROWS
    check(house, found)
    reported = topic_rows(live, f"{prefix}orders.predictions")
    assert set(reported["prediction_id"]) == set(found["prediction_id"])  # the topic lacks nothing
    check(house, reported)
    both = found.join(reported, on=["prediction_id", "model_version", "score"], how="semi")
    assert len(both) == ROWS  # the topic has what the table has
    status = house.status("killed")
    assert status["rows"]["predicted"] == ROWS
    assert status["rows"]["read"] == ROWS + status["rows"]["repeated"]


def test_a_missing_topic_a_missing_broker_and_a_missing_model_are_named(
    house: House,
    live: Live,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("transforms.streaming.kafka.TIMEOUT_SECONDS", 2.0)
    run = guard(inference_streaming.main)
    assert run(flags(house, live, "none-", "r")) == 4
    assert "'none-orders.features'" in capsys.readouterr().err
    wrong = flags(house, live, "none-", "r")
    wrong[wrong.index("--bootstrap") + 1] = "127.0.0.1:1"
    assert run(wrong) == 4
    assert "127.0.0.1:1" in capsys.readouterr().err
    assert run([*flags(house, live, "none-", "r"), "--alias=nobody"]) == 4
    error = capsys.readouterr().err
    assert "A live job has a model before it starts" in error
    assert "millrace promote" in error


def test_dead_letters_go_to_topic_and_table_and_what_was_deleted_unread_is_counted(
    house: House, live: Live, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, sender, topic = topics(house, live, 1)
    good = messages_of(house, 100, 1)[0]
    for key, value in (
        (good.key, good.value),
        (b"?", b"garbage"),
        (b"0123456789abcdef:1", good.value),
        (good.key, good.value),
    ):
        sender.send(topic, key or b"", value, partition=0)
    sender.acknowledged()
    send_end(Broker(live.broker.bootstrap), topic)
    assert guard(inference_streaming.main)(flags(house, live, prefix, "letters")) == 0
    status = house.status("letters")
    assert status["rows"] == {"read": 200, "predicted": 100, "repeated": 100, "letters": 2}
    assert 0 < status["lag_s"]["median"] < 60
    dead_letters = house.table("dead_letters", "live_predictions_orders").sort("offset")
    assert dead_letters["offset"].to_list() == [1, 2]
    consumer = Consumer({"bootstrap.servers": live.broker.bootstrap, "group.id": "look", "enable.auto.commit": False})
    consumer.assign([TopicPartition(f"{prefix}orders.predictions.dead_letters", 0, OFFSET_BEGINNING)])
    reported = [json.loads(message.value()) for message in consumer.consume(2, timeout=20)]
    consumer.close()
    assert [each["offset"] for each in reported] == [1, 2]
    assert (
        guard(inference_streaming.main)(flags(house, live, prefix, "again")) == 0
    )  # the topic had ended: nothing to do
    for _ in range(3):
        sender.send(topic, good.key or b"", good.value, partition=0)
    sender.acknowledged()
    live.broker.delete({(topic, 0): 7})  # four messages and the last words were read; two more were not
    send_end(Broker(live.broker.bootstrap), topic)
    capsys.readouterr()
    assert guard(inference_streaming.main)(flags(house, live, prefix, "later")) == 0
    assert f"{topic}/0: the broker no longer has offsets 5 to 6, which were not read" in capsys.readouterr().err
    assert house.status("later")["rows"] == {**status["rows"], "read": 300, "repeated": 200, "offsets_skipped": 2}
