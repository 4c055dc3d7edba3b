"""A broker that speaks TLS alone and asks for a certificate: every client of a live job meets it with one file."""

from __future__ import annotations

import datetime
import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from deploy.streaming.kafka import Broker as KafkaServer
from schemas.errors import StoreError
from tests.support.copying_job import copied
from tests.support.live_fixtures import Live
from transforms.streaming.kafka import Broker, Sender, begin_offsets, end_offsets, ensure_topics
from transforms.streaming.kafka_properties import read_properties

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


class Authority:
    """Signs certificates; each is a PEM file with its key, the certificate and the authority's own."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name, self.key = folder, name, ec.generate_private_key(ec.SECP256R1())
        self.path = folder / f"{name}.pem"
        self.own = self._signed(name, self.key, authority=True)
        self.path.write_bytes(self.own.public_bytes(serialization.Encoding.PEM))

    def signed(self, name: str, address: str = "127.0.0.1") -> Path:
        key = ec.generate_private_key(ec.SECP256R1())
        made, path = self._signed(name, key, address), self.folder / f"{self.name}-{name}.pem"
        kind, plain = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        secret = key.private_bytes(serialization.Encoding.PEM, kind, plain)
        path.write_bytes(secret + made.public_bytes(serialization.Encoding.PEM) + self.path.read_bytes())
        path.chmod(0o600)
        return path

    def _signed(
        self, name: str, key: ec.EllipticCurvePrivateKey, address: str = "127.0.0.1", authority: bool = False
    ) -> x509.Certificate:
        now = datetime.datetime.now(datetime.UTC)
        subject, issuer = (x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, each)]) for each in (name, self.name))
        places = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
        builder = x509.CertificateBuilder(issuer, subject, key.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(now - datetime.timedelta(hours=1))
        builder = builder.not_valid_after(now + datetime.timedelta(hours=1))
        builder = builder.add_extension(x509.BasicConstraints(authority, None), True).add_extension(places, False)
        return builder.sign(self.key, hashes.SHA256())


class TlsServer(KafkaServer):
    """A broker whose clients speak TLS with certificates of `authority`; it speaks to itself in plain text."""

    ports = ("port", "controller_port", "own_port")
    own_port: int
    authority: Authority
    address = "127.0.0.1"

    def command(self) -> list[str]:
        command = super().command()
        settings = self.folder / "server.properties"
        lines = dict(line.split("=", 1) for line in settings.read_text().splitlines())
        lines |= {
            "listeners": f"CLIENT://{self.bootstrap},OWN://127.0.0.1:{self.own_port},"
            f"CONTROLLER://127.0.0.1:{self.controller_port}",
            "advertised.listeners": f"CLIENT://{self.bootstrap},OWN://127.0.0.1:{self.own_port}",
            "listener.security.protocol.map": "CLIENT:SSL,OWN:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "OWN",
            "ssl.client.auth": "required",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(self.authority.signed("server", self.address)),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(self.authority.path),
        }
        settings.write_text("".join(f"{name}={value}\n" for name, value in lines.items()))
        return command

    def ready(self) -> bool:
        return "Kafka Server started" in self.log.read_text(errors="replace")


def properties(folder: Path, name: str, trusted: Authority, certificate: Path | None) -> dict[str, str]:
    lines = ["security.protocol=SSL", "ssl.truststore.type=PEM", f"ssl.truststore.location={trusted.path}"]
    if certificate is not None:
        lines += ["ssl.keystore.type=PEM", f"ssl.keystore.location={certificate}"]
    path = folder / f"{name}.properties"
    path.write_text("\n".join(lines))
    path.chmod(0o600)
    return read_properties(str(path))


def test_all_clients_speak_tls_with_a_certificate(live: Live, tmp_path: Path) -> None:
    ours, foreign = Authority(tmp_path, "ours"), Authority(tmp_path, "foreign")
    certificate = ours.signed("ann")
    server = TlsServer(tmp_path / "kafka")
    server.authority = ours
    with server:
        broker = Broker(server.bootstrap, live.expansion.address, java=properties(tmp_path, "ann", ours, certificate))
        ensure_topics(broker, ["sales", "copies"])
        sender = Sender(broker)
        sender.send("sales", b"k", b"v")
        sender.acknowledged()
        assert sum(end_offsets(broker, ["sales"])["sales"].values()) == 1
        refused = {
            "an authority that did not sign the broker's": properties(tmp_path, "a", foreign, certificate),
            "no certificate of its own": properties(tmp_path, "b", ours, None),
            "a certificate of another authority": properties(tmp_path, "c", ours, foreign.signed("ann")),
            "no TLS": {},
        }
        for why, other in refused.items():
            with pytest.raises(StoreError) as caught:
                begin_offsets(Broker(server.bootstrap, java=other), ["sales"])
            assert "\n" not in str(caught.value), why
        assert copied(live, broker, 120) == 1


def test_a_broker_with_the_certificate_of_another_address_is_refused(live: Live, tmp_path: Path) -> None:
    ours = Authority(tmp_path, "ours")
    server = TlsServer(tmp_path / "kafka")
    server.authority, server.address = ours, "127.0.0.2"
    with server:
        java = properties(tmp_path, "ann", ours, ours.signed("ann"))
        with pytest.raises(StoreError):
            begin_offsets(Broker(server.bootstrap, java=java), ["sales"])
        unchecked = {**java, "ssl.endpoint.identification.algorithm": ""}
        ensure_topics(Broker(server.bootstrap, java=unchecked), ["sales"])
