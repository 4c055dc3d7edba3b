"""A properties file of Kafka's Java clients serves all clients, and its secrets are in no text."""

import pickle
from pathlib import Path

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines.runtime.streaming_arguments import StreamingArguments
from schemas.errors import DefinitionError, StoreError
from tests.support import market
from transforms.streaming.kafka import Broker
from transforms.streaming.kafka_properties import (
    hidden,
    java_properties,
    librdkafka_properties,
    parsed_properties,
    read_properties,
    secrets_of,
)

MODULE = "org.apache.kafka.common.security"
SECRET = 'p4ss"w=rd\\'
JAAS = f'{MODULE}.scram.ScramLoginModule required username="ann" password="p4ss\\"w=rd\\\\";'
SASL = {"security.protocol": "SASL_SSL", "sasl.mechanism": "SCRAM-SHA-512", "sasl.jaas.config": JAAS}


@pytest.mark.parametrize(
    ("java", "expected"),
    [
        ({"security.protocol": "SSL"}, {"security.protocol": "SSL"}),
        (
            SASL,
            {
                "security.protocol": "SASL_SSL",
                "sasl.mechanism": "SCRAM-SHA-512",
                "sasl.username": "ann",
                "sasl.password": SECRET,
            },
        ),
        (
            {"sasl.jaas.config": 'com.sun.security.auth.module.Krb5LoginModule required keyTab="/k" principal="p@R";'},
            {"sasl.kerberos.keytab": "/k", "sasl.kerberos.principal": "p@R"},
        ),
        (
            {"ssl.truststore.location": "/ca.pem", "ssl.truststore.type": "PEM", "ssl.truststore.password": "x"},
            {"ssl.ca.location": "/ca.pem"},
        ),
        (
            {"ssl.truststore.location": "/t.jks", "librdkafka.ssl.ca.location": "/ca.pem"},
            {"ssl.ca.location": "/ca.pem"},
        ),
        (
            {"ssl.keystore.location": "/k.p12", "ssl.keystore.type": "PKCS12", "ssl.keystore.password": "x"},
            {"ssl.keystore.location": "/k.p12", "ssl.keystore.password": "x"},
        ),
        (
            {"ssl.keystore.location": "/k.pem", "ssl.keystore.type": "PEM", "ssl.key.password": "x"},
            {"ssl.certificate.location": "/k.pem", "ssl.key.location": "/k.pem", "ssl.key.password": "x"},
        ),
        ({"ssl.endpoint.identification.algorithm": ""}, {"ssl.endpoint.identification.algorithm": "none"}),
        ({"fetch.max.bytes": "1", "client.dns.lookup": "x"}, {}),
    ],
)
def test_properties_are_translated(java: dict[str, str], expected: dict[str, str]) -> None:
    assert librdkafka_properties(java) == expected
    assert java_properties(java) == {name: value for name, value in java.items() if not name.startswith("librdkafka.")}


@pytest.mark.parametrize(
    ("java", "words"),
    [
        ({"ssl.truststore.location": "/t.jks"}, r"ssl.truststore.type=JKS.*librdkafka.ssl.ca.location"),
        ({"ssl.keystore.location": "/k.jks"}, r"ssl.keystore.type=JKS.*PKCS12"),
        ({"sasl.jaas.config": 'some.OtherModule required password="S3CRET";'}, "OtherModule"),
    ],
)
def test_what_has_no_translation_is_refused_with_the_way_out(java: dict[str, str], words: str) -> None:
    with pytest.raises(DefinitionError, match=words) as caught:
        librdkafka_properties(java)
    assert "S3CRET" not in str(caught.value)


def test_the_format_is_that_of_java() -> None:
    text = "# c\n! c\n\na=1\n b : 2\nc 3\nd\n e.f=\\\n   x\\\n  y\ng=a\\u0041\\t\\=\nh\\:i=j=k\nw=C:\\\\x\n"
    assert dict(parsed_properties(text)) == {
        "a": "1", "b": "2", "c": "3", "d": "", "e.f": "xy", "g": "aA\t=", "h:i": "j=k", "w": "C:\\x",
    }  # fmt: skip


@given(st.text(max_size=40))
def test_any_text_is_parsed(text: str) -> None:
    dict(parsed_properties(text))


@pytest.mark.parametrize("name", ["group.id", "bootstrap.servers", "enable.auto.commit", "librdkafka.group.id", "acks"])
def test_what_the_jobs_set_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "k").write_text(f"{name}=S3CRET")
    with pytest.raises(DefinitionError, match=r"set some properties") as caught:
        read_properties(str(tmp_path / "k"))
    assert "S3CRET" not in str(caught.value)


def test_a_file_that_others_read_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "k"
    path.write_text("ssl.key.password=S3CRET")
    for mode, warned in ((0o600, False), (0o640, True)):
        path.chmod(mode)
        caplog.clear()
        read_properties(str(path))
        assert ("chmod 600" in caplog.text) is warned
        assert "S3CRET" not in caplog.text
    with pytest.raises(DefinitionError, match="No such file"):
        read_properties(str(tmp_path / "absent"))


def test_no_text_has_a_secret() -> None:
    broker = Broker("localhost:9", java={**SASL, "ssl.key.password": "S3CRET"})
    assert secrets_of(broker.java) >= {JAAS, SECRET, "S3CRET"}
    for text in (repr(broker), str(broker), f"{broker!r}"):
        assert "S3CRET" not in text
        assert SECRET not in text
    assert hidden(f"failed with {SECRET} and {JAAS}", broker.java) == "failed with *** and ***"
    assert pickle.loads(pickle.dumps(broker)) == broker


@pytest.mark.parametrize("kind", [Consumer, Producer, AdminClient])
def test_every_client_takes_the_properties_and_its_errors_have_no_secret(kind: type) -> None:
    more = {"group.id": "g"} if kind is Consumer else {}
    Broker("localhost:9", java={**SASL, "ssl.endpoint.identification.algorithm": ""}).client(kind, more)
    for broken in ({"librdkafka.sasl.pasword": "S3CRET"}, {"sasl.mechanism": "S3CRET", "ssl.key.password": "S3CRET"}):
        with pytest.raises(StoreError, match=r"Kafka's client takes its properties") as caught:
            Broker("localhost:9", java={**SASL, **broken}).client(kind, more)
        assert "S3CRET" not in str(caught.value)


def test_the_flag_reaches_all_clients(tmp_path: Path) -> None:
    path = tmp_path / "kafka.properties"
    path.write_text("security.protocol=SSL\nssl.truststore.type=PEM\nssl.truststore.location=/ca.pem\n")
    definition = market.define(tmp_path)
    arguments = StreamingArguments("p", "d", "s", "r", [])
    flags = ["--definition", str(definition), "--store", str(tmp_path), "--source", "kafka", "--bootstrap", "h:1"]
    options, _ = arguments.parse_streaming([*flags, "--kafka_properties", str(path)])
    assert options.job.broker is not None
    assert options.job.broker.config == {
        "security.protocol": "SSL",
        "ssl.ca.location": "/ca.pem",
        "bootstrap.servers": "h:1",
    }
    assert options.job.broker.java_config["ssl.truststore.location"] == "/ca.pem"
