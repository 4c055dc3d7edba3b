"""A job that copies the topic "sales" to the topic "copies": KafkaIO reads, librdkafka writes."""

from __future__ import annotations

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tests.support.live_fixtures import Live
from transforms.streaming.kafka import Broker, Produce, ReadTopics
from transforms.streaming.messages import Message


def copying(live: Live, broker: Broker) -> beam.runners.runner.PipelineResult:
    pipeline = beam.Pipeline(options=PipelineOptions([*live.options("EXTERNAL"), "--streaming"]))
    messages = pipeline | ReadTopics(broker, ("sales",), "readers")
    _ = messages | Produce(broker, copies)
    return pipeline.run()


def copies(message: Message) -> list[tuple[str, bytes, bytes]]:
    return [("copies", b"k", message.value)]
