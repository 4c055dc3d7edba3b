"""Queries about topics and their offsets while a live job runs."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from schemas.errors import StoreError
from transforms.records.times import ALWAYS
from transforms.storage.bounded import NoResponse, first_contact
from transforms.streaming.kafka import TIMEOUT_SECONDS, Broker, _consumer, end_offsets

if TYPE_CHECKING:
    import confluent_kafka

# The default size limit of Kafka's client, and the bytes of a record beside its value.
CLIENT_LIMIT, OVERHEAD = 1_000_000, 1_000


@dataclasses.dataclass(frozen=True)
class FirstAvailable:
    """The first record of a partition at or after an offset: a `NextAvailable`.

    Args:
        broker: the broker of the topics.
        prefix: prefix of topic names.
    """

    broker: Broker
    prefix: str

    def __call__(self, source: str, partition: int, offset: int) -> int:
        """See `first_record`."""
        return first_record(self.broker, f"{self.prefix}{source}", partition, offset)


_lock = threading.Lock()
# One client per broker: an open client responds in milliseconds, and every transaction leaves a gap in the offsets.
_clients: dict[str, confluent_kafka.Consumer] = {}


def first_record(broker: Broker, topic: str, partition: int, offset: int) -> int:
    """The offset of a partition's first committed record at or after `offset`.

    Markers of transactions, rows of aborted transactions and compacted rows have offsets, but are not records.

    Returns:
        The offset; the last stable offset if there is no such record; ALWAYS if the broker does not respond.
    """
    from confluent_kafka import KafkaError, TopicPartition

    properties = {
        **broker.properties,
        "auto.offset.reset": "earliest",
        "enable.partition.eof": "true",
        "queued.min.messages": "1",
    }
    name = repr((broker.bootstrap, sorted(properties.items()), sorted(broker.java.items())))
    with _lock:
        client = _clients.pop(name, None) or _consumer(
            dataclasses.replace(broker, properties=properties), "millrace-look"
        )
        client.assign([TopicPartition(topic, partition, offset)])
        message = client.poll(TIMEOUT_SECONDS)
        error = None if message is None else message.error()
        if message is None or (error is not None and error.code() != KafkaError._PARTITION_EOF):
            client.close()  # the next call opens another one
            return ALWAYS
        client.unassign()  # so that it reads no further
        _clients[name] = client
        found = message.offset()
        return ALWAYS if found is None else found


def unread_offsets(broker: Broker, due: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Number of unread offsets by topic and partition, up to the last stable offset; 0 if none of them is a record.

    Args:
        broker: the broker of the topics.
        due: next offset by topic and partition; 0 for partitions that are left out.

    Raises:
        StoreError: the broker cannot be reached, or has no such topic.
    """
    result: dict[str, dict[int, int]] = {}
    for topic, ends in end_offsets(broker, list(due)).items():
        for number, end in ends.items():
            at = due[topic].get(number, 0)
            if at < end:
                first = first_record(broker, topic, number, at)
                at = end if first >= end else max(at, first)
            result.setdefault(topic, {})[number] = max(end - at, 0)
    return result


def partitions_of(broker: Broker, topics: Sequence[str]) -> dict[str, int]:
    """Number of partitions by topic; empty if the broker does not respond."""
    from confluent_kafka import KafkaException

    client = _consumer(broker, "millrace-look")
    try:
        known = client.list_topics(timeout=TIMEOUT_SECONDS).topics
        return {topic: len(known[topic].partitions) for topic in topics if topic in known}
    except KafkaException:
        return {}
    finally:
        client.close()


def size_limit(broker: Broker, topics: Sequence[str]) -> int:
    """The most bytes of a message to any of the topics, with its batch: the least of their max.message.bytes."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource

    admin = broker.client(AdminClient, {})
    configurations = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics])
    limits = [CLIENT_LIMIT]
    for result in configurations.values():
        with contextlib.suppress(KafkaException, KeyError):  # without permission to read it, the client's limit applies
            limits.append(int(result.result(TIMEOUT_SECONDS)["max.message.bytes"].value))
    return min(limits)


def check_reachable(what: str, flag: str, addresses: str) -> None:
    """Checks that a server listens at one of some addresses HOST:PORT, separated by commas.

    Raises:
        StoreError: none can be reached; the error names the reason of each.
    """
    reasons: list[str] = []

    def connect() -> None:
        for address in addresses.split(","):
            host, _, port = address.strip().rpartition(":")
            try:
                socket.create_connection((host or "localhost", int(port)), TIMEOUT_SECONDS / 2).close()
                reasons.clear()
                return
            except (OSError, ValueError, OverflowError) as error:
                reasons.append(f"{address}: {getattr(error, 'strerror', None) or error}")

    try:
        first_contact(connect)  # names are looked up without a bound
    except NoResponse as error:
        reasons.append(str(error))
    if reasons:
        raise StoreError(f"{what} can be reached", "; ".join(reasons), f"Start it, or correct {flag}")
