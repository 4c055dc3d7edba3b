"""A broker that asks for a password: every client of a live job has it from one file, and nobody else sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy.streaming.kafka import Broker as KafkaServer
from schemas.errors import StoreError
from tests.support.copying_job import copied
from tests.support.live_fixtures import Live
from transforms.streaming.kafka import (
    Broker,
    Sender,
    begin_offsets,
    end_offsets,
    ensure_topics,
)
from transforms.streaming.kafka_properties import read_properties

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]
PLAIN = "org.apache.kafka.common.security.plain.PlainLoginModule required"


class AskingServer(KafkaServer):
    """A broker whose clients log in as ann, and which speaks to itself in plain text on another port."""

    ports = ("port", "controller_port", "own_port")
    own_port: int

    def command(self) -> list[str]:
        command = super().command()
        settings = self.folder / "server.properties"
        lines = dict(line.split("=", 1) for line in settings.read_text().splitlines())
        lines |= {
            "listeners": f"CLIENT://{self.bootstrap},OWN://127.0.0.1:{self.own_port},"
            f"CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"CLIENT://{self.bootstrap},OWN://127.0.0.1:{self.own_port}",
            "listener.security.protocol.map": "CLIENT:SASL_PLAINTEXT,OWN:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "OWN",
            "listener.name.client.sasl.enabled.mechanisms": "PLAIN",
            "listener.name.client.plain.sasl.jaas.config": f'{PLAIN} user_ann="S3CRET";',
        }
        settings.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return command

    def ready(self) -> bool:
        return "Kafka Server started" in self.log.read_text(errors="replace")


def properties(folder: Path, password: str) -> dict[str, str]:
    path = folder / f"{password}.properties"
    path.write_text(
        f'security.protocol=SASL_PLAINTEXT\nsasl.mechanism=PLAIN\nsasl.jaas.config={PLAIN} username="ann" '
        f'password="{password}";\n'
    )
    path.chmod(0o600)
    return read_properties(str(path))


def test_all_clients_log_in_with_the_properties_of_the_file(live: Live, tmp_path: Path) -> None:
    with AskingServer(tmp_path / "kafka") as server:
        broker = Broker(server.bootstrap, live.expansion.address, java=properties(tmp_path, "S3CRET"))
        ensure_topics(broker, ["sales", "copies"])
        sender = Sender(broker)
        sender.send("sales", b"k", b"v")
        sender.acknowledged()
        assert sum(end_offsets(broker, ["sales"])["sales"].values()) == 1
        for other in (properties(tmp_path, "WR0NG"), {}):
            with pytest.raises(StoreError) as caught:
                begin_offsets(Broker(server.bootstrap, java=other), ["sales"])
            assert "WR0NG" not in str(caught.value)
        assert copied(live, broker, 90) == 1
        texts = [path.read_text(errors="replace") for path in (live.prism.log, live.expansion.log, live.workers.log)]
        assert not any("S3CRET" in text for text in texts)
