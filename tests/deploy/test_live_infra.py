"""The ground the live jobs stand on, with real processes: Kafka, KafkaIO through Prism, worker pools, and their end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import apache_beam as beam
import polars as pl
import psutil
import pytest
from apache_beam.io.kafka import ReadFromKafka, WriteToKafka
from apache_beam.options.pipeline_options import PipelineOptions
from confluent_kafka import OFFSET_BEGINNING, Consumer, Producer, TopicPartition

from beam_pipelines.runtime.beam_workers import listen_on_loopback
from deploy.streaming import toolchain
from deploy.streaming.expansion import Expansion
from deploy.streaming.kafka import Broker
from deploy.streaming.processes import Child, Service, StartError, free_ports, listening
from tests.support import shop
from tests.support.live_fixtures import Live

pytestmark = [pytest.mark.live, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]


def produce(broker: Broker, topic: str, values: range) -> Counter[int]:
    """Records with these numbers, 6 : 3 : 1 : 0 over four partitions; how many went to each."""
    settings = {"bootstrap.servers": broker.bootstrap, "enable.idempotence": True, "log_level": 0}
    producer, sent, failed = Producer(settings), Counter[int](), []  # without idempotence a retry may change the order
    for value in values:
        partition = 0 if value % 10 < 6 else 1 if value % 10 < 9 else 2
        producer.produce(
            topic, f"{value}".encode(), b"key", partition, on_delivery=lambda e, _: failed.append(e) if e else None
        )
        sent[partition] += 1
    assert producer.flush(60) == 0
    assert not failed
    return sent


@contextlib.contextmanager
def consumer(broker: Broker, topic: str, partitions: int = 4) -> Iterator[Consumer]:
    reader = Consumer(
        {"bootstrap.servers": broker.bootstrap, "group.id": "test", "enable.auto.commit": False, "log_level": 0}
    )
    reader.assign([TopicPartition(topic, number, OFFSET_BEGINNING) for number in range(partitions)])
    try:
        yield reader
    finally:
        reader.close()


def consume(reader: Consumer, until: int, within: float = 60) -> list[tuple[int, int, bytes]]:
    """(partition, offset, value) of records until there are so many."""
    found: list[tuple[int, int, bytes]] = []
    deadline = time.monotonic() + within
    while len(found) < until and time.monotonic() < deadline:
        found += [(m.partition(), m.offset(), m.value()) for m in reader.consume(1000, timeout=0.2) if not m.error()]
    return found


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_(happened: Callable[[], bool], within: float = 20) -> bool:
    deadline = time.monotonic() + within
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.05)
    return happened()


def test_four_uneven_partitions_keep_order_and_lose_nothing(broker: Broker, topic: Callable[..., str]) -> None:
    name = topic("uneven")
    sent = produce(broker, name, range(20_000))
    with consumer(broker, name) as reader:
        found = consume(reader, 20_000)
        ends = {p: reader.get_watermark_offsets(TopicPartition(name, p), timeout=10)[1] for p in range(4)}
    assert ends == {p: sent[p] for p in range(4)}
    assert ends[3] == 0
    assert sorted(int(value) for _, _, value in found) == list(range(20_000))
    for partition in range(4):
        values = [int(value) for p, _, value in found if p == partition]
        assert values == sorted(values)


def test_records_older_than_the_retention_stay(broker: Broker, topic: Callable[..., str]) -> None:
    name = topic("old", partitions=1)
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for year in (2009, 2013, 2026):
        producer.produce(name, b"%d" % year, timestamp=(year - 1970) * 31_557_600_000)
    producer.flush(10)
    with consumer(broker, name, 1) as reader:
        assert [value for _, _, value in consume(reader, 3)] == [b"2009", b"2013", b"2026"]


def test_the_producer_sends_every_row_once_in_order_and_reports_its_progress(broker: Broker, tmp_path: Path) -> None:
    shop.write(tmp_path, rows=3000)
    prefix, status = f"shop-{os.getpid()}-", tmp_path / "status.json"
    flags = [
        "--definition",
        str(tmp_path / "definition.py"),
        "--sources",
        str(tmp_path / "sources"),
        "--bootstrap",
        broker.bootstrap,
    ]
    command = [
        sys.executable,
        "-m",
        "deploy.streaming.producer",
        *flags,
        "--topic_prefix",
        prefix,
        "--status",
        str(status),
        "--rows=50",
    ]
    began = time.monotonic()
    # Ten days in four seconds.
    with Child(
        [*command, "--start=2024-01-11", "--end=2024-01-21", "--speed=216000"], tmp_path / "log", cwd=ROOT
    ) as child:
        assert child.wait(timeout=60) == 0, child.output()
    assert time.monotonic() - began > 4
    reported = json.loads(status.read_text())
    assert reported["done"]
    start, end = datetime(2024, 1, 11, tzinfo=UTC), datetime(2024, 1, 21, tzinfo=UTC)
    for source, time_column in (("visits", "asked"), ("sales", "sold")):
        moment = pl.col(time_column)
        wanted = pl.read_parquet(tmp_path / "sources" / source / "*.parquet").filter((moment >= start) & (moment < end))
        with consumer(broker, prefix + source) as reader:
            ends = [reader.get_watermark_offsets(TopicPartition(prefix + source, p), timeout=10)[1] for p in range(4)]
            messages: list[Any] = []
            while len(messages) < sum(ends):
                messages += reader.consume(1000, timeout=5)
        found = []
        for partition in range(4):
            until = datetime.min.replace(tzinfo=UTC)
            for message in (each for each in messages if each.partition() == partition):
                if message.key() == b"__heartbeat":
                    told_until = int(message.value())
                    continue
                rows = pl.read_ipc_stream(message.value())
                assert len(rows) <= 50
                assert rows[time_column].is_sorted()
                assert rows[time_column].min() >= until
                until = rows[time_column].max()
                assert abs(message.timestamp()[1] - until.timestamp() * 1000) < 1
                found.append(rows)
            assert told_until == 2**62
        assert len(wanted) == sum(reported["sent"][source])
        assert pl.concat(found).sort("visit").select(wanted.columns).equals(wanted.sort("visit"))
        assert (
            reported["sent"][source][0]
            > reported["sent"][source][1]
            > reported["sent"][source][2]
            > reported["sent"][source][3]
            == 0
        )


def seen(record: tuple[bytes, bytes]) -> tuple[bytes, bytes]:
    return record[0], b"seen " + record[1]


def job(live: Live, source: str, sink: str, environment: str) -> beam.runners.runner.PipelineResult:
    options = PipelineOptions([*live.options(environment), "--streaming"])
    settings = {"bootstrap.servers": live.broker.bootstrap}
    reading = {**settings, "group.id": sink, "auto.offset.reset": "earliest", "enable.auto.commit": "false"}
    pipeline = beam.Pipeline(options=options)
    read = pipeline | ReadFromKafka(reading, [source], expansion_service=live.expansion.address)
    marked = read | beam.Map(seen).with_output_types(tuple[bytes, bytes])
    _ = marked | WriteToKafka(settings, sink, expansion_service=live.expansion.address)
    return pipeline.run()


@pytest.mark.parametrize("environment", ["LOOPBACK", "EXTERNAL"])
def test_kafkaio_reads_and_writes_through_prism(
    live: Live, broker: Broker, topic: Callable[..., str], environment: str
) -> None:
    source, sink = topic("in"), topic("out", partitions=1)
    produce(broker, source, range(2_000))
    result = job(live, source, sink, environment)
    try:
        with consumer(broker, sink, 1) as reader:
            found = consume(reader, 2_000, within=90)
            assert sorted(int(value.removeprefix(b"seen ")) for _, _, value in found) == list(range(2_000))
            produce(broker, source, range(2_000, 2_500))  # it goes on
            assert len(consume(reader, 500)) == 500
    finally:
        result.cancel()


def listening_beyond_loopback(process: psutil.Process) -> set[str]:
    """Addresses other than those of loopback that a process and all it started listen at."""
    return {
        f"{each.name()} {connection.laddr.ip}:{connection.laddr.port}"
        for each in (process, *process.children(recursive=True))
        for connection in each.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
        and not ip_address(connection.laddr.ip.removeprefix("::ffff:")).is_loopback
    }


@pytest.mark.parametrize("environment", ["LOOPBACK", "EXTERNAL"])
def test_nothing_of_the_demo_listens_beyond_loopback(
    live: Live, broker: Broker, topic: Callable[..., str], environment: str
) -> None:
    """Not while a job runs either: whoever reaches Prism, the expansion service or a worker can have it run code."""
    listen_on_loopback()
    source, sink = topic("in"), topic("out", partitions=1)
    produce(broker, source, range(100))
    result = job(live, source, sink, environment)
    try:
        with consumer(broker, sink, 1) as reader:
            assert len(consume(reader, 100, within=90)) == 100
            for service in (live.broker, live.expansion, live.prism, live.workers):
                assert service.child is not None
                assert listening_beyond_loopback(psutil.Process(service.child.pid)) == set()
            assert listening_beyond_loopback(psutil.Process()) == set()
    finally:
        result.cancel()


def test_without_a_compiler_the_expansion_service_runs_and_reports_where_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("deploy.streaming.expansion.loopback_expansion", lambda: None)
    with caplog.at_level("WARNING", "millrace.setup"):
        command = Expansion(tmp_path).command()
    assert "org.apache.beam.sdk.expansion.service.ExpansionService" in command
    assert "listens on all interfaces, since javac is missing" in caplog.text


def test_a_broker_that_stops_and_comes_back_costs_nothing(
    live: Live, broker: Broker, topic: Callable[..., str]
) -> None:
    source, sink = topic("in"), topic("out", partitions=1)
    produce(broker, source, range(1_000))
    result = job(live, source, sink, "LOOPBACK")
    try:
        with consumer(broker, sink, 1) as reader:
            before = consume(reader, 1_000, within=90)
            assert len(before) == 1_000
            broker.stop()
            assert not listening(broker.port)
            time.sleep(2)
            broker.start()
            produce(broker, source, range(1_000, 2_000))
            after = consume(reader, 1_000, within=90)
        numbers = Counter(int(value.removeprefix(b"seen ")) for _, _, value in before + after)
        assert set(numbers) == set(range(2_000))  # at least once: a retried write may appear twice
    finally:
        result.cancel()


class Sleeper(Service):
    """A service that listens a while after it started."""

    name, ports = "sleeper", ("port",)
    port: int
    within = 10

    def command(self) -> list[str]:
        server = (
            "import http.server as s; "
            f"s.HTTPServer(('127.0.0.1', {self.port}), s.SimpleHTTPRequestHandler).serve_forever()"
        )
        return [sys.executable, "-c", server]


def test_a_taken_port_costs_a_second_try(tmp_path: Path) -> None:
    with Sleeper(tmp_path / "first") as first:
        second = Sleeper(tmp_path / "second")
        second.port = first.port
        second.ready = lambda: second.port != first.port and listening(second.port)  # type: ignore[method-assign]
        with second:
            assert second.port != first.port
            assert first.running
    assert not first.running
    assert not second.running
    assert not listening(second.port)


def test_a_service_that_ends_reports_its_output(tmp_path: Path) -> None:
    mute = "print('no room'); raise SystemExit(3)"
    with (
        Child([sys.executable, "-c", mute], tmp_path / "log") as child,
        pytest.raises(StartError, match="exit status 3: no room"),
    ):
        child.await_ready(lambda: False, within=20)
    with pytest.raises(StartError, match="no-such-program can be run"):
        Child(["no-such-program"], tmp_path / "log")


def test_ports_are_free_and_differ() -> None:
    ports = free_ports(50)
    assert len(set(ports)) == 50
    assert not any(map(listening, ports))


def test_two_processes_get_the_class_paths_once(tmp_path: Path) -> None:
    env = {**os.environ, "MILLRACE_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = (
        "import logging; logging.basicConfig(level='INFO'); "
        "from deploy.streaming.toolchain import classpath; print(classpath('broker'))"
    )
    both = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    (first, printed), (second, also_said) = [process.communicate(timeout=200) for process in both]
    assert first == second
    assert all(Path(jar).is_file() for jar in first.strip().split(":"))
    assert (printed + also_said).count("getting the broker's class path") == 1


def test_what_is_missing_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert len(toolchain.missing()) == 3
    monkeypatch.setenv("MILLRACE_CACHE", str(tmp_path))
    with pytest.raises(toolchain.MissingTool, match="apt-get install maven"):
        toolchain.classpath("broker")
    with pytest.raises(toolchain.MissingTool, match=r"Go 1\.24 or later: apt-get install golang"):
        toolchain.prism()


# A parent that starts a broker's worth of processes: one that listens to SIGTERM, one that is deaf to it, one with a
# child.
PARENT = """
    import sys, time
    from pathlib import Path
    from deploy.streaming.processes import Child
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf', flush=True); time.sleep(600)"
    )
    family = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']).pid, flush=True); "
        "time.sleep(600)"
    )
    folder = Path(sys.argv[1])
    children = [Child([sys.executable, "-c", program], folder / name, grace=1)
                for name, program in (("plain", "import time; time.sleep(600)"), ("deaf", deaf), ("family", family))]
    while not children[1].output() or not children[2].output():
        time.sleep(0.05)
    print(*[child.pid for child in children], *[child._keeper.pid for child in children], end=' ')
    print(children[2].output().strip(), flush=True)
    {then}
"""


@pytest.mark.parametrize(
    ("then", "number"),
    [
        ("time.sleep(600)", signal.SIGKILL),
        ("time.sleep(600)", signal.SIGINT),
        ("time.sleep(600)", signal.SIGTERM),
        ("sys.exit(0)", None),
        ("import os; os._exit(1)", None),
    ],
)
def test_children_end_with_their_parent(tmp_path: Path, then: str, number: int | None) -> None:
    program = textwrap.dedent(PARENT).format(then=then)
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 7
        if number is not None:
            assert all(map(alive, pids))
            parent.send_signal(number)
    assert await_(lambda: not any(map(alive, pids))), [pid for pid in pids if alive(pid)]


def test_a_keeper_that_is_killed_takes_its_command_along(tmp_path: Path) -> None:
    with Child([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path / "log") as child:
        os.kill(child._keeper.pid, signal.SIGKILL)
        assert await_(lambda: not alive(child.pid))


def test_a_command_hears_ctrl_c_and_its_keeper_outlives_it(tmp_path: Path) -> None:
    program = (
        "import time\ntry: print('up', flush=True); time.sleep(600)\n"
        "except KeyboardInterrupt: print('heard'); raise SystemExit(130)"
    )
    with Child([sys.executable, "-c", program], tmp_path / "log") as child:
        assert await_(lambda: "up" in child.output())
        os.kill(child._keeper.pid, signal.SIGINT)
        child.signal(signal.SIGINT)
        assert child.wait(10) == 130
    assert "heard" in child.output()


def test_children_of_a_thread_outlive_it_and_stop_on_request(tmp_path: Path) -> None:
    started: list[Child] = []
    thread = threading.Thread(target=lambda: started.append(Child(["sleep", "600"], tmp_path / "log")))
    thread.start()
    thread.join()
    time.sleep(0.3)
    assert started[0].running
    assert alive(started[0].pid)
    started[0].stop()
    assert not alive(started[0].pid)


def test_a_killed_broker_comes_back_with_its_records(tmp_path: Path) -> None:
    quick = {
        "broker.session.timeout.ms": "3000",
        "broker.heartbeat.interval.ms": "500",
    }  # the dead one's place is held so long
    with Broker(tmp_path / "kafka", quick) as broker:
        broker.create("kept", partitions=4)
        produce(broker, "kept", range(1_000))
        broker.kill()
        assert not listening(broker.port)
        broker.start()
        with consumer(broker, "kept") as reader:
            assert len(consume(reader, 1_000)) == 1_000
        pid = broker.child.pid if broker.child else 0
    assert not alive(pid)
