"""Properties of Kafka's Java clients from a file, and the same for librdkafka, which names some of them differently.

KafkaIO is Java, and everything else here uses librdkafka (confluent-kafka): one file configures both.
"""

from __future__ import annotations

import logging
import os
import re
import stat
from collections.abc import Iterator, Mapping

from schemas.errors import DefinitionError
from transforms.storage.file_systems import open_regular

log = logging.getLogger("millrace.live")
# Properties that the jobs set themselves: with other values they would lose rows or read them twice.
OURS = (
    "bootstrap.servers", "group.id", "group.instance.id", "enable.auto.commit", "auto.offset.reset",
    "key.deserializer", "value.deserializer", "key.serializer", "value.serializer",
    "enable.idempotence", "acks", "transactional.id",
)  # fmt: skip
# Properties that have the same name in both.
SHARED = (
    "security.protocol", "sasl.mechanism", "sasl.kerberos.service.name", "ssl.key.password", "client.id",
    "isolation.level",
)  # fmt: skip
# Properties whose names begin with this are for librdkafka alone.
LIBRDKAFKA = "librdkafka."
SECRET = re.compile(r"password|secret|jaas|token|ssl\.(keystore\.)?key$|ssl\.key\.pem|certificate\.chain$")


def read_properties(path: str) -> dict[str, str]:
    """The properties of a file in Java's format.

    Raises:
        DefinitionError: the file cannot be read, or sets what the jobs set themselves.  Values are never quoted.
    """
    rule = "--kafka_properties names a file of properties of Kafka's clients"
    try:
        with open_regular(path) as file:
            mode, text = os.fstat(file.fileno()).st_mode, file.read().decode()
    except (OSError, ValueError) as error:
        raise DefinitionError(rule, f"{path}: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    found = dict(parsed_properties(text))
    for name in found:
        if name.removeprefix(LIBRDKAFKA) in OURS:
            raise DefinitionError(
                "The jobs set some properties of Kafka's clients themselves", f"{name} in {path}", "Leave it out"
            )
    if mode & (stat.S_IRGRP | stat.S_IROTH) and any(map(SECRET.search, found)):
        log.warning("%s has secrets, and others may read it: chmod 600", path)
    librdkafka_properties(found)  # refuses what it cannot translate, before anything is read
    return found


def parsed_properties(text: str) -> Iterator[tuple[str, str]]:
    """Names and values of text in the format of `java.util.Properties`.

    >>> list(parsed_properties("# note\\na.b = x y\\nc:1\\\\\\n  2"))
    [('a.b', 'x y'), ('c', '12')]
    """
    lines = iter(text.splitlines())
    for line in lines:
        line = line.lstrip(" \t\f")
        if not line or line[0] in "#!":
            continue
        while (len(line) - len(line.rstrip("\\"))) % 2:
            line = line[:-1] + next(lines, "").lstrip(" \t\f")
        match = re.match(r"((?:[^\\=:\s]|\\.)*)[ \t\f]*[=:]?[ \t\f]*(.*)", line, re.DOTALL)
        assert match is not None
        yield _plain(match[1]), _plain(match[2])


def _plain(text: str) -> str:
    letters = {"t": "\t", "n": "\n", "r": "\r", "f": "\f"}

    def letter(match: re.Match[str]) -> str:
        return chr(int(match[1][1:], 16)) if len(match[1]) == 5 else letters.get(match[1], match[1])

    return re.sub(r"\\(u[0-9a-fA-F]{4}|.)", letter, text)


def java_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """The properties for Java's clients."""
    return {name: value for name, value in properties.items() if not name.startswith(LIBRDKAFKA)}


def librdkafka_properties(properties: Mapping[str, str]) -> dict[str, str]:
    """The properties for librdkafka: the translated security properties, and those that are for it alone.

    Raises:
        DefinitionError: librdkafka has no equivalent of a property.
    """
    own = {name.removeprefix(LIBRDKAFKA): value for name, value in properties.items() if name.startswith(LIBRDKAFKA)}
    found = {name: properties[name] for name in SHARED if name in properties}
    found |= {"sasl.mechanism" if name == "sasl.mechanisms" else name: value for name, value in own.items()}
    if "ssl.endpoint.identification.algorithm" in properties:
        found.setdefault(
            "ssl.endpoint.identification.algorithm", properties["ssl.endpoint.identification.algorithm"] or "none"
        )
    if "sasl.jaas.config" in properties and "sasl.username" not in own:
        found |= _of_jaas(properties["sasl.jaas.config"], own)
    return {**found, **_of_truststore(properties, own), **_of_keystore(properties, own)}


def _of_jaas(text: str, own: Mapping[str, str]) -> dict[str, str]:
    options = {name: _plain(value) for name, value in re.findall(r'(\w+)\s*=\s*"((?:[^"\\]|\\.)*)"', text)}
    module = text.split()[0].rsplit(".", 1)[-1] if text.split() else ""
    if module in ("PlainLoginModule", "ScramLoginModule") and {"username", "password"} <= options.keys():
        return {"sasl.username": options["username"], "sasl.password": options["password"]}
    if module == "Krb5LoginModule":
        names = {"keyTab": "sasl.kerberos.keytab", "principal": "sasl.kerberos.principal"}
        return {names[name]: value for name, value in options.items() if name in names}
    if any(name.startswith("sasl.oauthbearer.") for name in own):
        return {}
    raise _untranslated("sasl.jaas.config", module, "sasl.username=… and librdkafka.sasl.password=…")


def _of_truststore(properties: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    if any(name.startswith("ssl.ca.") for name in own):
        return {}
    if "ssl.truststore.certificates" in properties:
        return {"ssl.ca.pem": properties["ssl.truststore.certificates"]}
    if "ssl.truststore.location" not in properties:
        return {}
    if properties.get("ssl.truststore.type", "JKS").upper() != "PEM":
        kind = properties.get("ssl.truststore.type", "JKS")
        raise _untranslated("ssl.truststore.location", f"ssl.truststore.type={kind}", "ssl.ca.location=…, a PEM file")
    return {"ssl.ca.location": properties["ssl.truststore.location"]}


def _of_keystore(properties: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    if any(name.startswith(("ssl.certificate.", "ssl.keystore.")) for name in own):
        return {}
    pem = {"ssl.keystore.certificate.chain": "ssl.certificate.pem", "ssl.keystore.key": "ssl.key.pem"}
    if "ssl.keystore.key" in properties:
        return {theirs: properties[name] for name, theirs in pem.items() if name in properties}
    if "ssl.keystore.location" not in properties:
        return {}
    path, kind = properties["ssl.keystore.location"], properties.get("ssl.keystore.type", "JKS").upper()
    if kind == "PEM":
        return {"ssl.certificate.location": path, "ssl.key.location": path}
    if kind == "PKCS12":
        return {"ssl.keystore.location": path, "ssl.keystore.password": properties.get("ssl.keystore.password", "")}
    raise _untranslated("ssl.keystore.location", f"ssl.keystore.type={kind}", "ssl.keystore.location=…, a PKCS12 file")


def _untranslated(name: str, value: str, instead: str) -> DefinitionError:
    return DefinitionError(
        f"Millrace's own Kafka clients (librdkafka) can use {name}", value, f"Add {LIBRDKAFKA}{instead}"
    )


def secrets_of(properties: Mapping[str, str]) -> set[str]:
    """Values that are never printed, including the parts of a JAAS configuration."""
    found = {value for name, value in properties.items() if SECRET.search(name) and value}
    translated = librdkafka_properties(properties)
    return found | {value for name, value in translated.items() if SECRET.search(name) and value}


def hidden(text: str, properties: Mapping[str, str]) -> str:
    """Text without the secrets among the properties."""
    for secret in sorted(secrets_of(properties), key=len, reverse=True):
        text = text.replace(secret, "***")
    return text
