"""A job that copies the topic "sales" to the topic "copies": KafkaIO reads, librdkafka writes."""

from __future__ import annotations

import time

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tests.support.live_fixtures import Live
from transforms.streaming.kafka import Broker, Produce, ReadTopics, begin_offsets, end_offsets, set_group_offsets
from transforms.streaming.messages import Message


def copied(live: Live, broker: Broker, within: float) -> int:
    """Runs the job until the other topic has messages, and returns how many; fails after `within` seconds."""
    set_group_offsets(broker, "readers", {"sales": begin_offsets(broker, ["sales"])["sales"]})
    result = copying(live, broker)
    try:
        deadline = time.monotonic() + within
        while not (count := sum(end_offsets(broker, ["copies"])["copies"].values())):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return count
    finally:
        result.cancel()


def copying(live: Live, broker: Broker) -> beam.runners.runner.PipelineResult:
    pipeline = beam.Pipeline(options=PipelineOptions([*live.options("EXTERNAL"), "--streaming"]))
    messages = pipeline | ReadTopics(broker, ("sales",), "readers")
    _ = messages | Produce(broker, copies)
    return pipeline.run()


def copies(message: Message) -> list[tuple[str, bytes, bytes]]:
    return [("copies", b"k", message.value)]
