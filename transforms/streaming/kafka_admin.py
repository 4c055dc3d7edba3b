"""What a broker says of a topic's offsets, asked while a live job runs."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from schemas.errors import StoreError
from transforms.records.times import ALWAYS
from transforms.streaming.kafka import TIMEOUT_SECONDS, Broker, _consumer, end_offsets

# What Kafka's client takes unless told otherwise, and what a record needs beside its value.
CLIENT_LIMIT, OVERHEAD = 1_000_000, 1_000


@dataclasses.dataclass(frozen=True)
class FirstAvailable:
    """Which record of a partition comes first, at or after an offset: a `NextAvailable`.

    Args:
        broker: where the topics are.
        prefix: before the sources' names.
    """

    broker: Broker
    prefix: str

    def __call__(self, source: str, partition: int, offset: int) -> int:
        """Its offset; that behind the last stable one where there is none; ALWAYS, before any, while the broker does not say."""
        return first_record(self.broker, f"{self.prefix}{source}", partition, offset)


_lock = threading.Lock()
# A client per broker: one that is there already answers in milliseconds, and each transaction leaves a hole to ask about.
_clients: dict[str, Any] = {}


def first_record(broker: Broker, topic: str, partition: int, offset: int) -> int:
    """The offset of a partition's first committed record at or after `offset`; that behind the last stable one where there is none.

    Ends of transactions, rows of those that were aborted, and what was compacted away have offsets and are no records.
    ALWAYS while the broker does not say.
    """
    from confluent_kafka import KafkaError, TopicPartition

    properties = {
        **broker.properties,
        "auto.offset.reset": "earliest",
        "enable.partition.eof": "true",
        "queued.min.messages": "1",
    }
    name = repr((broker.bootstrap, sorted(properties.items())))
    with _lock:
        client = _clients.pop(name, None) or _consumer(
            dataclasses.replace(broker, properties=properties), "millrace-look"
        )
        client.assign([TopicPartition(topic, partition, offset)])
        message = client.poll(TIMEOUT_SECONDS)
        error = None if message is None else message.error()
        if message is None or (error is not None and error.code() != KafkaError._PARTITION_EOF):
            client.close()  # the next to ask gets another
            return ALWAYS
        client.unassign()  # so that it reads no further
        _clients[name] = client
        return int(message.offset())


def unread(broker: Broker, due: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
    """Per topic and partition that there is now, how many offsets a consumer that stands at `due` (0 if not named) has before
    it up to the last stable one; 0 where no record is among them, and nothing more will come of what is there.

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
    """How many partitions each topic has now; empty while the broker does not say."""
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
    """Bytes that a message to any of the topics may have, its batch included, as the topics' max.message.bytes say."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource  # type: ignore[attr-defined]

    admin = AdminClient({**broker.config, "log_level": 0})
    asked = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, topic) for topic in topics])
    limits = [CLIENT_LIMIT]
    for answer in asked.values():
        with contextlib.suppress(KafkaException, KeyError):  # without the right to ask, the client's own limit
            limits.append(int(answer.result(TIMEOUT_SECONDS)["max.message.bytes"].value))
    return min(limits)


def check_reachable(what: str, flag: str, addresses: str) -> None:
    """Connect to one of some addresses HOST:PORT (with commas between), to say at once what is wrong with all.

    Raises:
        StoreError: nobody listens at any.
    """
    reasons = []
    for address in addresses.split(","):
        host, _, port = address.strip().rpartition(":")
        try:
            socket.create_connection((host or "localhost", int(port)), TIMEOUT_SECONDS / 2).close()
            return
        except (OSError, ValueError) as error:
            reasons.append(f"{address}: {getattr(error, 'strerror', None) or error}")
    raise StoreError(f"{what} answers", "; ".join(reasons), f"Start it, or correct {flag}")
