"""Addresses with a scheme work, or are refused before the network is used."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from apache_beam.io.filesystem import BeamIOError
from apache_beam.io.filesystems import FileSystems

from beam_pipelines.commands.tables import tables
from beam_pipelines.runtime import addresses
from beam_pipelines.runtime.addresses import usable_address
from beam_pipelines.runtime.errors import guard
from schemas.errors import DefinitionError, StoreError
from transforms.models.registry import Registry
from transforms.storage import bounded
from transforms.streaming.kafka_admin import check_reachable


@pytest.mark.parametrize("path", ["out", "/data/a b", "./x", "a:b", "50%20off"])
def test_a_path_stays_as_it_is(path: str) -> None:
    assert usable_address("--store", path, []) == path


@pytest.mark.parametrize("address", ["file:///data/a%20b", "file://localhost/data/a b"])
def test_the_address_of_a_file_is_its_path(address: str) -> None:
    assert usable_address("--store", address, []) == "/data/a b"


@pytest.mark.parametrize("scheme", ["abfss", "azfs", "hdfs", "http", "s3a", "S4"])
def test_a_scheme_that_beam_or_delta_rs_does_not_know_is_refused(scheme: str) -> None:
    with pytest.raises(StoreError, match="--sources must name a folder, or an address that begins with gs:// or s3://"):
        usable_address("--sources", f"{scheme}://bucket/store", [])


@pytest.mark.parametrize("address", ["file://other-machine/data", "s3://", "s3:///store"])
def test_an_address_that_names_nothing_here_is_refused(address: str) -> None:
    with pytest.raises(StoreError):
        usable_address("--store", address, [])


@pytest.mark.parametrize("address", ["", "a\0b"])
def test_what_is_no_path_is_refused(address: str) -> None:
    with pytest.raises(DefinitionError):
        usable_address("--store", address, [])


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_installed", lambda module: False)
    with pytest.raises(StoreError, match=r"needs the package boto3; it is not installed\. pip install"):
        usable_address("--store", "s3://bucket/store", [])


def test_a_store_that_does_not_respond_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_installed", lambda module: True)
    monkeypatch.setattr(bounded, "FIRST_CONTACT", 0.2)
    answered = threading.Event()
    monkeypatch.setattr(addresses.FileSystems, "exists", staticmethod(lambda path: answered.wait(60)))
    try:
        with pytest.raises(StoreError, match=r"gs://silent/store: no response within 0\.2 s"):
            usable_address("--store", "gs://silent/store", [])
    finally:
        answered.set()


def test_beams_file_systems_have_their_options_before_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_installed", lambda module: True)
    usable_address("--store", "s3://bucket/store", ["--s3_region_name=eu-west-1"])
    FileSystems.get_filesystem("s3://bucket/store")  # without options: ValueError


@pytest.mark.parametrize("address", ["abfss://c@a/store", "file:///nowhere", "s4://b"])
def test_any_command_ends_with_one_message(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert guard(tables)(["--store", address]) in (3, 4)
    assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_that_fails_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    def fails(argv: object) -> int:
        raise BeamIOError("Match operation failed\nwith exceptions", {"s3://b/x": OSError("no route")})

    assert guard(fails)([]) == 4
    printed = capsys.readouterr().err
    assert printed.startswith(
        "millrace: The store must be reachable, readable and writable; Match operation failed with"
    )
    assert printed.count("\n") == 1


@pytest.fixture
def silent() -> Iterator[str]:
    """HOST:PORT of a server that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_a_registry_that_does_not_respond_is_given_up(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "FIRST_CONTACT", 1.0)
    with pytest.raises(StoreError, match=rf"http://{silent}: no response within 1 s"):
        Registry(f"http://{silent}").champion("buying")


def test_brokers_whose_names_are_not_found_in_time_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "FIRST_CONTACT", 0.5)
    monkeypatch.setattr(socket, "create_connection", lambda *how: time.sleep(5))
    with pytest.raises(StoreError, match=r"The broker must be reachable; no response within 0\.5 s"):
        check_reachable("The broker", "--bootstrap", "somewhere:9092,elsewhere:9092")


def test_any_broker_of_several_will_do(silent: str) -> None:
    check_reachable("The broker", "--bootstrap", f"127.0.0.1:1,{silent}")
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:1: Connection refused; x: "):
        check_reachable("The broker", "--bootstrap", "127.0.0.1:1,x")
