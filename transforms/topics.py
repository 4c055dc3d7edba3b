"""Kafka topics: read and written through Beam's KafkaIO, looked at and positioned through Kafka's own client."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.io.kafka import ReadFromKafka, WriteToKafka

from schemas.errors import StoreError, nearest
from schemas.views import FeatureView
from transforms.messages import Message, to_arrow, to_json

# Rows of one message of answers: a value stays well under a broker's usual limit of a megabyte.
ROWS = 1000
WITHIN = 10.0


@dataclasses.dataclass(frozen=True)
class Broker:
    """How to reach Kafka.

    Args:
        bootstrap: HOST:PORT.
        expansion: HOST:PORT of Beam's KafkaIO expansion service; None lets Beam fetch and start one.
        properties: further client properties (security and so on).
    """

    bootstrap: str
    expansion: str | None = None
    properties: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def config(self) -> dict[str, str]:
        return {**self.properties, "bootstrap.servers": self.bootstrap}


@dataclasses.dataclass(eq=False)  # Beam sets the label
class ReadTopics(beam.PTransform):
    """PBegin → PCollection[Message], from where `group` stands (see `stand`); each partition in order.

    Nothing is committed to the broker: where to go on is kept with what was made of the messages.
    """

    broker: Broker
    topics: tuple[str, ...]
    group: str

    def expand(self, begin: beam.PBegin) -> beam.PCollection:
        config = {
            **self.broker.config,
            "group.id": self.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": "false",
        }
        read = begin | "Read" >> ReadFromKafka(
            config, list(self.topics), with_metadata=True, timestamp_policy=ReadFromKafka.processing_time_policy,
            expansion_service=self.broker.expansion,
        )  # fmt: skip
        return read | "Message" >> beam.Map(_message).with_output_types(Message)


def _message(record: Any) -> Message:
    return Message(
        record.topic, record.partition, record.offset, record.timestamp * 1000, record.key, record.value or b""
    )


@dataclasses.dataclass(eq=False)  # Beam sets the label
class WriteTopic(beam.PTransform):
    """PCollection[(key, value)], both bytes → the topic, at least once."""

    broker: Broker
    topic: str

    def expand(self, pairs: beam.PCollection) -> Any:
        typed = pairs | "Pairs" >> beam.Map(lambda pair: pair).with_output_types(tuple[bytes, bytes])
        config = {**self.broker.config, "enable.idempotence": "true", "acks": "all"}
        return typed | "Write" >> WriteToKafka(config, self.topic, expansion_service=self.broker.expansion)


def answer_messages(answers: pa.RecordBatch, fingerprint: str) -> Iterator[tuple[bytes, bytes]]:
    """Answers as messages: the key names the fingerprint and the first row, the value is Arrow; rows are told apart by `row_id`."""
    for start in range(0, answers.num_rows, ROWS):
        part = answers.slice(start, ROWS)
        first = part.column(part.schema.get_field_index("row_id"))[0].as_py()
        yield f"{fingerprint}:{first & 0xFFFFFFFFFFFFFFFF:016x}".encode(), to_arrow(part)


def letter_messages(letters: Any) -> Iterator[tuple[bytes, bytes]]:
    """Dead letters as messages, JSON each; the key is the place of the row."""
    places = letters.select("source", "partition", "offset", "place").rows()
    for place, value in zip(places, to_json(letters), strict=True):
        yield "/".join(map(str, place)).encode(), value


def topic_of(view: FeatureView, prefix: str = "") -> str:
    """Where a view's answers go."""
    return f"{prefix}{view.name}.features"


def letters_topic(view: FeatureView, prefix: str = "") -> str:
    return f"{prefix}{view.name}.dead_letters"


def begin_offsets(broker: Broker, topics: Sequence[str]) -> dict[str, dict[int, int]]:
    """First offset there is of every partition.

    Raises:
        StoreError: the broker cannot be reached, or has no such topic.
    """
    from confluent_kafka import TopicPartition

    client = _consumer(broker, "millrace-look")
    try:
        known = _metadata(broker, client)
        for topic in topics:
            if topic not in known:
                raise StoreError(
                    "Every source has its topic",
                    repr(topic),
                    f"{nearest(topic, known)} Create it, or correct --topic_prefix",
                )
        return {
            topic: {
                number: client.get_watermark_offsets(TopicPartition(topic, number), timeout=WITHIN)[0]
                for number in sorted(known[topic])
            }
            for topic in topics
        }
    finally:
        client.close()


def stand(broker: Broker, group: str, offsets: Mapping[str, Mapping[int, int]]) -> None:
    """Let the consumer group `group` (a fresh one) begin at these offsets."""
    from confluent_kafka import KafkaException, TopicPartition

    client = _consumer(broker, group)
    try:
        places = [
            TopicPartition(topic, number, offset)
            for topic, numbers in offsets.items()
            for number, offset in numbers.items()
        ]
        client.commit(offsets=places, asynchronous=False)
    except KafkaException as error:
        raise StoreError(
            "A consumer group can be placed", f"{group}: {error}", "Use a group of its own for every launch"
        ) from None
    finally:
        client.close()


def _consumer(broker: Broker, group: str) -> Any:
    try:
        from confluent_kafka import Consumer
    except ImportError:
        raise StoreError(
            "--source kafka needs confluent-kafka", "it is not installed", "pip install 'millrace[live]'"
        ) from None
    return Consumer({**broker.config, "group.id": group, "enable.auto.commit": False, "log_level": 0})


def _metadata(broker: Broker, client: Any) -> dict[str, list[int]]:
    from confluent_kafka import KafkaException

    try:
        return {name: list(topic.partitions) for name, topic in client.list_topics(timeout=WITHIN).topics.items()}
    except KafkaException as error:
        raise StoreError(
            "The broker answers", f"{broker.bootstrap}: {error.args[0].str()}", "Start it, or correct --bootstrap"
        ) from None
