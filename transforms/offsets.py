"""What a broker says of a topic's offsets, asked while a live job runs."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
from collections.abc import Sequence

from schemas.errors import StoreError
from transforms.clock import ALWAYS
from transforms.topics import WITHIN, Broker, _consumer

# What Kafka's client takes unless told otherwise, and what a record needs beside its value.
CLIENT_LIMIT, OVERHEAD = 1_000_000, 1_000


@dataclasses.dataclass(frozen=True)
class FirstThere:
    """Which record of a partition comes first, at or after an offset: a `NextThere`.

    Args:
        broker: where the topics are.
        prefix: before the sources' names.
    """

    broker: Broker
    prefix: str

    def __call__(self, source: str, partition: int, offset: int) -> int:
        """Its offset; ALWAYS, before any, while the broker does not say."""
        from confluent_kafka import TopicPartition

        properties = {**self.broker.properties, "auto.offset.reset": "earliest"}
        client = _consumer(dataclasses.replace(self.broker, properties=properties), "millrace-look")
        try:
            client.assign([TopicPartition(f"{self.prefix}{source}", partition, offset)])
            message = client.poll(WITHIN)
            return ALWAYS if message is None or message.error() else int(message.offset())
        finally:
            client.close()


def partitions_of(broker: Broker, topics: Sequence[str]) -> dict[str, int]:
    """How many partitions each topic has now; empty while the broker does not say."""
    from confluent_kafka import KafkaException

    client = _consumer(broker, "millrace-look")
    try:
        known = client.list_topics(timeout=WITHIN).topics
        return {topic: len(known[topic].partitions) for topic in topics if topic in known}
    except KafkaException:
        return {}
    finally:
        client.close()


def size_limit(broker: Broker, topics: Sequence[str]) -> int:
    """Bytes that a message to any of the topics may have, its batch included, as the topics' max.message.bytes say."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

    admin = AdminClient({**broker.config, "log_level": 0})
    asked = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics])
    limits = [CLIENT_LIMIT]
    for answer in asked.values():
        with contextlib.suppress(KafkaException, KeyError):  # without the right to ask, the client's own limit
            limits.append(int(answer.result(WITHIN)["max.message.bytes"].value))
    return min(limits)


def reach(what: str, flag: str, addresses: str) -> None:
    """Connect to one of some addresses HOST:PORT (with commas between), to say at once what is wrong with all.

    Raises:
        StoreError: nobody listens at any.
    """
    reasons = []
    for address in addresses.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            socket.create_connection((host or "localhost", int(port)), WITHIN / 2).close()
            return
        except (OSError, ValueError) as error:
            reasons.append(f"{address}: {getattr(error, 'strerror', None) or error}")
    raise StoreError(f"{what} answers", "; ".join(reasons), f"Start it, or correct {flag}")
