"""A Kafka broker of one node on loopback, with its data in a folder.

with Broker(folder) as broker:
    broker.create("departures", partitions=4)
    … broker.bootstrap …
    broker.stop(); broker.start()      # same address, same data
"""

from __future__ import annotations

import shlex
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from pathlib import Path

from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewPartitions, NewTopic

from deploy.streaming.processes import HOST, Service, listening
from deploy.streaming.toolchain import java

# Only the fast compiler: the broker starts in half the time, and handles as many records per second as one Python
# producer sends.
JVM = ("-Xms256m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1")
# Settings that differ from Kafka's defaults, and why.
PROPERTIES = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    # One node holds every copy.
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "4",
    # Replayed rows have old times: they would be deleted at once, or divided into one file per week.
    "log.retention.ms": "-1",
    "log.roll.ms": str(2**62),
    # A missing topic is an error.
    "auto.create.topics.enable": "false",
    "group.initial.rebalance.delay.ms": "0",
    "log.index.size.max.bytes": str(1 << 20),
}


class Broker(Service):
    """See the module.

    Args:
        folder: the folder of its log and its data; a broker that is started there again finds them.
        properties: Kafka's own settings, which override those above.
        jvm: options of the JVM.
    """

    name, ports = "kafka", ("port", "controller_port")
    port: int
    controller_port: int

    def __init__(
        self, folder: Path | str, properties: Mapping[str, str] | None = None, jvm: Sequence[str] = JVM
    ) -> None:
        super().__init__(folder)
        self.properties, self.jvm = {**PROPERTIES, **(properties or {})}, jvm
        self.cluster = "K" + urlsafe_b64encode(uuid.uuid4().bytes).decode()[1:22]  # a leading dash would make it a flag

    @property
    def bootstrap(self) -> str:
        return f"{HOST}:{self.port}"

    def command(self) -> list[str]:
        settings = self.folder / "server.properties"
        lines = {
            **self.properties,
            "controller.quorum.voters": f"1@{HOST}:{self.controller_port}",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{HOST}:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "log.dirs": str(self.folder / "data"),
        }
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        serve = java("broker", "kafka.Kafka", str(settings), options=self.jvm)
        if (self.folder / "data" / "meta.properties").exists():
            return serve
        form = java(
            "broker", "kafka.tools.StorageTool", "format", "-t", self.cluster, "-c", str(settings), options=self.jvm
        )
        return ["sh", "-c", f"{shlex.join(form)} && exec {shlex.join(serve)}"]

    def ready(self) -> bool:
        if not listening(self.port):
            return False
        try:
            return bool(self.admin().list_topics(timeout=2).brokers)
        except KafkaException:
            return False

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def create(self, *topics: str, partitions: int = 4, config: Mapping[str, str] | None = None) -> None:
        """Creates topics; returns when they can be used.

        Raises:
            KafkaException: a topic exists already.
        """
        wanted = [
            NewTopic(topic, num_partitions=partitions, replication_factor=1, config=dict(config or {}))
            for topic in topics
        ]
        admin = self.admin()
        for created in admin.create_topics(wanted, operation_timeout=30, request_timeout=30).values():
            created.result()
        while not all(self._led(admin, topic, partitions) for topic in topics):
            time.sleep(0.05)

    def grow(self, topic: str, partitions: int) -> None:
        """Increases a topic's partitions to this number."""
        admin = self.admin()
        for done in admin.create_partitions([NewPartitions(topic, partitions)], operation_timeout=30).values():
            done.result()
        while not self._led(admin, topic, partitions):
            time.sleep(0.05)

    def delete(self, until: Mapping[tuple[str, int], int]) -> None:
        """Deletes the records before an offset of each (topic, partition), as retention eventually does."""
        admin = self.admin()  # results arrive only while the client exists
        gone = [TopicPartition(topic, number, offset) for (topic, number), offset in until.items()]
        for done in admin.delete_records(gone, operation_timeout=30).values():
            done.result(30)

    @staticmethod
    def _led(admin: AdminClient, topic: str, partitions: int) -> bool:
        """Whether the broker knows the topic and leads its partitions, shortly after the controller created it."""
        found = admin.list_topics(topic, timeout=10).topics[topic].partitions.values()
        return len(found) == partitions and all(each.leader >= 0 for each in found)
