"""Kafka topics: read through Beam's KafkaIO, written and administered through Kafka's own client."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam.io.kafka import ReadFromKafka
from apache_beam.transforms.window import BoundedWindow
from apache_beam.utils.timestamp import Timestamp
from apache_beam.utils.windowed_value import WindowedValue

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import StoreError, nearest
from schemas.views import FeatureView
from transforms.records.times import FOREVER
from transforms.streaming.kafka_properties import hidden, java_properties, librdkafka_properties
from transforms.streaming.messages import Message, heartbeat, to_arrow, to_json

if TYPE_CHECKING:
    import confluent_kafka
    import confluent_kafka.admin

Element = TypeVar("Element")
Client = TypeVar("Client")
# Topic, key and value of a message that is sent.
Sent = tuple[str, bytes, bytes]
# The most ms until the broker acknowledges a message, and the most elements that wait for acknowledgement.
DELIVERY_MS, MAX_WAITING = 120_000, 64
# The partition is chosen by a hash of the key.
ANY = -1
# The most rows and bytes of a message: the usual limit of clients and brokers is a megabyte.
MESSAGE_ROWS, MESSAGE_BYTES = 1000, 950_000
TIMEOUT_SECONDS = 10.0
# No consumer reads rows of aborted or open transactions, unless `Broker.properties` sets another isolation level.
COMMITTED = {"isolation.level": "read_committed"}


@dataclasses.dataclass(frozen=True)
class Broker:
    """How to reach Kafka.

    Args:
        bootstrap: HOST:PORT.
        expansion: HOST:PORT of Beam's KafkaIO expansion service; None lets Beam fetch and start one.
        properties: further properties of librdkafka's clients.
        java: properties of Kafka's Java clients, mostly about security; they are translated for librdkafka (see
            `kafka_properties`).  Some are secret, so they are left out of the text of a `Broker`.
    """

    bootstrap: str
    expansion: str | None = None
    properties: Mapping[str, str] = dataclasses.field(default_factory=dict)
    java: Mapping[str, str] = dataclasses.field(default_factory=dict, repr=False)

    @property
    def config(self) -> dict[str, str]:
        """Properties for librdkafka."""
        return {**librdkafka_properties(self.java), **self.properties, "bootstrap.servers": self.bootstrap}

    @property
    def java_config(self) -> dict[str, str]:
        """Properties for Java."""
        return {**java_properties(self.java), "bootstrap.servers": self.bootstrap}

    def client(
        self, kind: Callable[[dict[str, str | int | float | bool]], Client], config: Mapping[str, str | int | bool]
    ) -> Client:
        """A client of librdkafka with further properties.

        Raises:
            StoreError: it refuses a property; the message contains no secret.
        """
        from confluent_kafka import KafkaException

        try:
            return kind({**self.config, **config, "log_level": 0})
        except (KafkaException, ValueError, TypeError) as error:
            reason = hidden(str(error.args[0].str() if isinstance(error, KafkaException) else error), self.java)
            raise StoreError("Kafka's client takes its properties", reason, "Correct --kafka_properties") from None


@dataclasses.dataclass(eq=False)  # Beam sets the label
class ReadTopics(beam.PTransform):
    """PBegin → PCollection[Message], from the offsets of `group` (see `set_group_offsets`); each partition in order.

    Nothing is committed to the broker: offsets are committed to the tables, together with the rows.
    """

    broker: Broker
    topics: tuple[str, ...]
    group: str

    def expand(self, begin: beam.PBegin) -> beam.PCollection:
        config = {
            **COMMITTED,
            **self.broker.java_config,
            "group.id": self.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": "false",
        }
        step = ReadFromKafka(
            config,
            list(self.topics),
            with_metadata=True,
            timestamp_policy=ReadFromKafka.processing_time_policy,
            expansion_service=self.broker.expansion,
        )
        try:
            read = begin | "Read" >> step
        except RuntimeError as error:  # errors of the expansion service, which may quote the properties
            reason = (hidden(str(error), self.broker.java).splitlines() or ["no word"])[0][:500]
            fix = "See its log, and correct --expansion_service or --kafka_properties"
            raise StoreError("The expansion service makes KafkaIO's steps", reason, fix) from None
        return read | "Message" >> beam.Map(_message).with_output_types(Message)


class KafkaRecord(Protocol):
    """A record as KafkaIO reads it; the timestamp is in ms."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes | None


def _message(record: KafkaRecord) -> Message:
    return Message(
        record.topic, record.partition, record.offset, record.timestamp * 1000, record.key, record.value or b""
    )


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Produce(beam.PTransform, Generic[Element]):
    """PCollection[T] → the same; an element is emitted once the broker has acknowledged its messages, at least once.

    So everything that is committed after this step is in the topic.  WriteToKafka does not report when it is done.

    Args:
        broker: the broker of the topics.
        messages: returns the (topic, key, value) of each message of an element.
    """

    broker: Broker
    messages: Callable[[Element], Iterable[Sent]]

    def expand(self, elements: beam.PCollection) -> beam.PCollection:
        done = elements | "Send" >> beam.ParDo(_Send(self.broker, self.messages))
        done.element_type = elements.element_type
        return done


class _Send(beam.DoFn, Generic[Element]):
    def __init__(self, broker: Broker, messages: Callable[[Element], Iterable[Sent]]) -> None:
        self.broker, self.messages = broker, messages

    def setup(self) -> None:
        self.sender = Sender(self.broker)

    def start_bundle(self) -> None:
        self.waiting: list[WindowedValue] = []

    def process(
        self,
        element: Element,
        at: Timestamp = beam.DoFn.TimestampParam,
        window: BoundedWindow = beam.DoFn.WindowParam,
    ) -> Iterator[WindowedValue]:
        for topic, key, value in self.messages(element):
            self.sender.send(topic, key, value)
        self.waiting.append(WindowedValue(element, at, [window]))
        if len(self.waiting) == MAX_WAITING:
            yield from self.finish_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        self.sender.acknowledged()
        acknowledged, self.waiting = self.waiting, []
        yield from acknowledged


class Sender:
    """Kafka's own producer: it is idempotent, and all replicas acknowledge every message."""

    def __init__(self, broker: Broker) -> None:
        from confluent_kafka import Producer

        config = {"enable.idempotence": True, "delivery.timeout.ms": DELIVERY_MS}
        self.broker, self.failed = broker, list[str]()
        self.producer = broker.client(Producer, config)

    def send(self, topic: str, key: bytes, value: bytes, partition: int = ANY) -> None:
        """Sends a message; waits while the client's queue is full.

        Raises:
            StoreError: the client refuses the message, because it is too large.
        """
        from confluent_kafka import KafkaException

        while True:
            try:
                self.producer.produce(topic, value, key, partition, self._delivered)
                return
            except BufferError:
                self.producer.poll(0.1)
            except KafkaException as error:
                self._refuse(f"{topic}: {error.args[0].str()}")

    def acknowledged(self) -> None:
        """Waits until every message is acknowledged.

        Raises:
            StoreError: the broker did not accept a message within two minutes, or refused it.
        """
        left = self.producer.flush(DELIVERY_MS / 1000 + 10)
        if left or self.failed:
            failed, self.failed = self.failed, []
            self._refuse(failed[0] if failed else f"{left} messages without an acknowledgement")

    def _delivered(self, error: confluent_kafka.KafkaError | None, message: confluent_kafka.Message) -> None:
        if error is not None:
            self.failed.append(f"{message.topic()}: {error.str()}")

    def _refuse(self, value: str) -> None:
        raise StoreError(
            "The broker accepts the messages of a job",
            f"{self.broker.bootstrap}, {value}",
            "Check its disk, its quotas and the topic's max.message.bytes; no message is lost, "
            "the job continues from its last commit",
        )


def send_end(broker: Broker, topic: str) -> None:
    """Sends the heartbeat that marks the end to every partition of a topic."""
    sender = Sender(broker)
    for number in begin_offsets(broker, [topic])[topic]:
        sender.send(topic, *heartbeat(FOREVER), partition=number)
    sender.acknowledged()


def ensure_topics(broker: Broker, topics: Sequence[str]) -> None:
    """Creates missing topics with the defaults of the broker.

    Raises:
        StoreError: the broker cannot be reached, or refuses.
    """
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient
    from confluent_kafka.cimpl import NewTopic

    admin = broker.client(AdminClient, {})
    known = _metadata(broker, admin)
    missing = [NewTopic(topic) for topic in topics if topic not in known]
    for topic, made in admin.create_topics(missing).items() if missing else ():
        try:
            made.result(TIMEOUT_SECONDS)
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                fix = "Create it yourself, or grant the right to"
                value = f"{topic}: {error.args[0].str()}"
                raise StoreError("An output topic is there or can be created", value, fix) from None


def feature_row_messages(
    rows: pa.RecordBatch, fingerprint: str, most: int = MESSAGE_BYTES
) -> Iterator[tuple[bytes, bytes]]:
    """Feature rows as messages.  The key has the fingerprint and the first `row_id`, the value is an Arrow IPC stream.

    A message of more than `most` bytes is split in half, down to one row.
    """
    for start in range(0, rows.num_rows, MESSAGE_ROWS):
        part = rows.slice(start, MESSAGE_ROWS)
        value = to_arrow(part)
        if len(value) > most and part.num_rows > 1:
            half = part.num_rows // 2
            for some in (part.slice(0, half), part.slice(half)):
                yield from feature_row_messages(some, fingerprint, most)
            continue
        first = part.column(part.schema.get_field_index("row_id"))[0].as_py()
        yield f"{fingerprint}:{first & 0xFFFFFFFFFFFFFFFF:016x}".encode(), value


def dead_letter_messages(dead_letters: pl.DataFrame) -> Iterator[tuple[bytes, bytes]]:
    """Dead letters as messages, in JSON; the key is the position of the row."""
    positions = dead_letters.select("source", "partition", "offset", "place").rows()
    for position, value in zip(positions, to_json(dead_letters), strict=True):
        yield "/".join(map(str, position)).encode(), value


def topic_of(view: FeatureView, prefix: str = "") -> str:
    """The topic of a view's feature rows."""
    return f"{prefix}{view.name}.features"


def dead_letters_topic(view: FeatureView, prefix: str = "") -> str:
    return f"{prefix}{view.name}.dead_letters"


def begin_offsets(broker: Broker, topics: Sequence[str]) -> dict[str, dict[int, int]]:
    """The first offset of every partition that the broker still has.

    Raises:
        StoreError: the broker cannot be reached, or has no such topic.
    """
    return _offsets(broker, topics, 0)


def end_offsets(broker: Broker, topics: Sequence[str]) -> dict[str, dict[int, int]]:
    """The last stable offset of every partition, which is after its last committed message.

    The offset before it need not be a message (see `kafka_admin.unread`).

    Raises:
        StoreError: the broker cannot be reached, or has no such topic.
    """
    return _offsets(broker, topics, 1)


def _offsets(broker: Broker, topics: Sequence[str], which: int) -> dict[str, dict[int, int]]:
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
                number: client.get_watermark_offsets(TopicPartition(topic, number), timeout=TIMEOUT_SECONDS)[which]
                for number in sorted(known[topic])
            }
            for topic in topics
        }
    finally:
        client.close()


def set_group_offsets(broker: Broker, group: str, offsets: Mapping[str, Mapping[int, int]]) -> None:
    """Sets the offsets of a new consumer group.

    Args:
        broker: the broker of the topics.
        group: the group.
        offsets: next offset by topic and partition.

    Raises:
        StoreError: the broker refuses, for example because the group is in use.
    """
    from confluent_kafka import KafkaException, TopicPartition

    client = _consumer(broker, group)
    try:
        positions = [
            TopicPartition(topic, number, offset)
            for topic, numbers in offsets.items()
            for number, offset in numbers.items()
        ]
        client.commit(offsets=positions, asynchronous=False)
    except KafkaException as error:
        raise StoreError(
            "The offsets of a new consumer group can be set", f"{group}: {error}", "Use a new group for every launch"
        ) from None
    finally:
        client.close()


def _consumer(broker: Broker, group: str) -> confluent_kafka.Consumer:
    try:
        from confluent_kafka import Consumer
    except ImportError:
        raise StoreError(
            "--source kafka needs confluent-kafka", "it is not installed", "pip install 'millrace[live]'"
        ) from None
    isolation = {name: broker.config.get(name, value) for name, value in COMMITTED.items()}
    return broker.client(Consumer, {**isolation, "group.id": group, "enable.auto.commit": False})


def _metadata(
    broker: Broker, client: confluent_kafka.Consumer | confluent_kafka.admin.AdminClient
) -> dict[str, list[int]]:
    from confluent_kafka import KafkaException

    try:
        return {
            name: list(topic.partitions) for name, topic in client.list_topics(timeout=TIMEOUT_SECONDS).topics.items()
        }
    except KafkaException as error:
        raise StoreError(
            "The broker can be reached",
            f"{broker.bootstrap}: {error.args[0].str()}",
            "Start it, or correct --bootstrap",
        ) from None
