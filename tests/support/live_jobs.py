"""A view's topics on a real broker, live jobs on them as processes of their own, and the books of what became of every
message."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from confluent_kafka import Consumer, Producer, TopicPartition

from deploy.streaming.processes import Child
from schemas import FeatureView, load_definition
from schemas.live import accepted, live_schema, live_sources
from tests.support import market
from tests.support.live_fixtures import Live
from tests.support.tables import figures_of
from transforms.lineage.feature_parity import check_parity
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, sources_root
from transforms.streaming.messages import HEARTBEAT, heartbeat, to_arrow
from transforms.streaming.view_contracts import contract_of, keeps

ROOT = Path(__file__).parents[2]
# Of the rows, per partition: uneven, and the last one idle.
SHARE = (6, 3, 1, 0)
HOUR = 3_600_000_000
END = int(market.at(market.DAYS + 40).timestamp() * 1e6)
PLACES = ["partition", "offset", "place"]
# Dead letters about accepted rows of the spine that were not computed.
ABOUT_QUESTIONS = pl.col("rule").str.contains("one key asks one question|no later than the spine's lateness")
_numbers = itertools.count(1)


class Stage:
    """A view, its topics and its store.

    Args:
        live: broker, expansion service and Prism.
        folder: holds definition, dimensions, store and logs.
        partitions: of every source's topic.
        definition: the definition's text.
        config: of the topic of feature rows.
    """

    def __init__(
        self,
        live: Live,
        folder: Path,
        partitions: int = 4,
        definition: str = market.DEFINITION,
        config: Mapping[str, str] | None = None,
    ) -> None:
        self.live, self.folder, self.store, self.partitions = live, folder, folder / "store", partitions
        self.definition = market.define(folder, definition)
        self.view: FeatureView = load_definition(str(self.definition)).view
        self.prefix = f"s{os.getpid()}-{next(_numbers)}-"
        self.sources = live_sources(self.view)
        live.broker.create(*map(self.topic, self.sources), partitions=partitions)
        live.broker.create(self.outputs[0], partitions=1, config=dict(config or {}))
        live.broker.create(self.outputs[1], partitions=1)
        self.connect()
        self.sent: dict[tuple[str, int], int] = {}  # messages, by source and partition
        self.grown: dict[str, int] = {}  # partitions of topics that have got more
        self.rows: dict[str, set[tuple[int, int, int]]] = {}  # places of rows, or of what is none
        self.lost: list[str] = []  # messages that the broker did not take
        self.beginning = ["--without_history"]  # flags
        market.write(folder, {"shops": market.spoiled(market.sources())["shops"]})

    def topic(self, source: str) -> str:
        return self.prefix + source

    @property
    def outputs(self) -> tuple[str, str]:
        return f"{self.prefix}{self.view.name}.features", f"{self.prefix}{self.view.name}.dead_letters"

    def connect(self) -> None:
        """A producer that knows the topics as they are now: one that has sent to a topic does not see it grow for
        minutes."""
        settings = {"bootstrap.servers": self.live.broker.bootstrap, "enable.idempotence": True, "log_level": 0}
        self.producer = Producer(settings)

    # -- what producers do -----------------------------------------------------------------------------------------

    def send(
        self, source: str, partition: int, value: bytes, moment: int, key: bytes | None = None, rows: int | None = None
    ) -> None:
        """A message that says to have arrived at `moment` µs; of so many rows (None: nothing that can be read)."""
        self.producer.produce(
            self.topic(source), value, key, partition, self._delivered, timestamp=max(moment // 1000, 1)
        )
        offset = self.sent.get((source, partition), 0)
        self.sent[source, partition] = offset + 1
        if key is None:
            positions = [-1] if rows is None else range(rows)
            self.rows.setdefault(source, set()).update((partition, offset, position) for position in positions)

    def send_frame(self, source: str, partition: int, frame: pl.DataFrame, moment: int) -> None:
        self.send(source, partition, to_arrow(frame), moment, rows=len(frame))

    def beat(self, until: int, sources: Sequence[str] = (), partitions: Sequence[int] | None = None) -> None:
        """Sends a heartbeat to every partition: everything was sent before `until`."""
        for source in sources or self.sources:
            for partition in range(self.partitions) if partitions is None else partitions:
                key, value = heartbeat(until)
                self.send(source, partition, value, min(until, END), key)

    def send_bad(self, source: str, partition: int, values: Sequence[bytes], moment: int) -> None:
        """Messages of which nothing can be read."""
        for value in values:
            self.send(source, partition, value, moment)

    def beat_badly(self, source: str, partition: int, value: bytes, moment: int) -> None:
        """A heartbeat that is none."""
        self.rows.setdefault(source, set()).add((partition, self.sent.get((source, partition), 0), -1))
        self.send(source, partition, value, moment, HEARTBEAT)

    def flush(self) -> None:
        assert self.producer.flush(60) == 0
        assert not self.lost

    def _delivered(self, error: Any, message: Any) -> None:
        if error is not None:
            self.lost.append(f"{message.topic()}: {error}")

    def grow(self, source: str, partitions: int) -> None:
        """More partitions for a source's topic, and a producer that knows of them."""
        self.flush()
        self.live.broker.grow(self.topic(source), partitions)
        self.grown[source] = partitions
        self.connect()

    def send_slots(self, slots: Sequence[Slot], beats: bool = True, partitions: Sequence[int] | None = None) -> None:
        """Sends the rows that became known in some slots, and heartbeats (None: to every partition)."""
        for slot in slots:
            for source, partition, frame in slot.parts:
                self.send_frame(source, partition, frame, slot.end)
            if beats:
                self.beat(slot.end, partitions=partitions)
        self.flush()

    # -- jobs ------------------------------------------------------------------------------------------------------

    def flags(self, run_id: str, beam: Sequence[str]) -> list[str]:
        """Of a live job."""
        return [
            "--streaming",
            "--source=kafka",
            "--definition",
            str(self.definition),
            "--store",
            str(self.store),
            "--sources",
            str(self.folder / "sources"),
            "--bootstrap",
            self.live.broker.bootstrap,
            "--expansion_service",
            self.live.expansion.address,
            "--topic_prefix",
            self.prefix,
            "--run_id",
            run_id,
            "--commit_every=500ms",
            "--keep=2d",
            *self.beginning,
            *beam,
        ]

    def job(self, run_id: str, environment: str = "LOOPBACK", options: Sequence[str] | None = None) -> Child:
        """A live job as a process of its own."""
        flags = self.flags(run_id, self.live.options(environment) if options is None else options)
        command = [sys.executable, "-W", "ignore", "-m", "beam_pipelines.features_streaming", *flags]
        return Child(command, self.folder / f"{run_id}.log", cwd=ROOT, env={"PYTHONPATH": str(ROOT)})

    def status(self, run_id: str) -> dict[str, Any]:
        """What the job said of itself at its last commit; empty before its first."""
        path = self.store / "runs" / run_id / "status.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def figures(self, run_id: str) -> dict[str, Any]:
        return figures_of(self.store, run_id)

    # -- the books -------------------------------------------------------------------------------------------------

    def table(self, uri: str, schema: pa.Schema) -> pl.DataFrame:
        table = open_table(uri)
        files = [] if table is None else data_files(table)
        parts = [pl.DataFrame(pl.from_arrow(read_file(file))) for file in files]
        return pl.concat(
            [pl.DataFrame(pl.from_arrow(schema.empty_table())), *(part.select(schema.names) for part in parts)]
        )

    def kept(self, source: str) -> pl.DataFrame:
        return self.table(f"{sources_root(str(self.store))}/{source}", accepted(self.view, source))

    def feature_rows(self) -> pl.DataFrame:
        uri = features_live_uri(str(self.store), self.view.name, self.view.fingerprint)
        return self.table(uri, live_schema(self.view))

    def dead_letters(self) -> pl.DataFrame:
        return self.table(live_dead_letters_uri(str(self.store), self.view.name), LIVE_DEAD_LETTERS)

    def on_topic(self, topic: str) -> list[bytes]:
        """Values of a topic's messages, heartbeats left out."""
        return [value for _, _, key, value in read(self.live.broker.bootstrap, topic) if key != HEARTBEAT]

    def audit(self) -> pl.DataFrame:
        """Every message that the broker took is accounted for, once, and every feature row is what batch gives; returns
        the feature rows."""
        ends = high_marks(self.live.broker.bootstrap, [self.topic(name) for name in self.sources])
        assert ends == {
            (self.topic(name), number): self.sent.get((name, number), 0)
            for name in self.sources
            for number in range(self.grown.get(name, self.partitions))
        }
        dead_letters, spine = self.dead_letters(), self.kept(self.view.spine.name)
        assert not dead_letters.select("source", *PLACES).is_duplicated().any()
        assert len(dead_letters.filter(pl.col("source") == "shops")) == market.SET_ASIDE["shops"]
        for name in self.sources:
            kept = self.kept(name)
            accepted = list(kept.select("__partition", "__offset", "__place").iter_rows())
            dead = set(dead_letters.filter(pl.col("source") == name, ~ABOUT_QUESTIONS).select(PLACES).iter_rows())
            assert len(accepted) == len(set(accepted)), f"{name}: a row is there twice"
            keeping = pl.Series(keeps(contract_of(self.view, name), kept), dtype=pl.Boolean)
            broken = set(kept.filter(~keeping).select("__partition", "__offset", "__place").iter_rows())
            assert dead & set(accepted) == broken, f"{name}: what breaks the contract is a dead letter"
            assert set(accepted) | dead == self.rows.get(name, set()), f"{name}: a row is missing"
        feature_rows, ids = self.feature_rows(), [*self.view.key, self.view.time]
        asked = spine.select(*ids, pl.col("__partition", "__offset", "__place").name.map(lambda name: name[2:]))
        asked = (
            asked.join(dead_letters.filter(pl.col("source") == self.view.spine.name), on=PLACES, how="anti")
            .select(ids)
            .unique()
        )
        assert feature_rows["row_id"].n_unique() == len(feature_rows)
        assert asked.sort(ids).equals(feature_rows.select(ids).sort(ids))
        found = check_parity(self.view, str(self.store))
        assert found.differing == 0, {name: each.examples for name, each in found.features.items() if each.differing}
        assert found.feature_rows == len(feature_rows)
        reported = {row for value in self.on_topic(self.outputs[0]) for row in pl.read_ipc_stream(value)["row_id"]}
        assert reported == set(feature_rows["row_id"]), (
            f"{len(reported)} rows on the topic, {len(feature_rows)} in the table"
        )
        spoken = {
            tuple(json.loads(value)[name] for name in ("source", *PLACES)) for value in self.on_topic(self.outputs[1])
        }
        assert spoken == set(dead_letters.select("source", *PLACES).iter_rows())
        return feature_rows


@dataclasses.dataclass(frozen=True)
class Slot:
    """What became known within some hours: (source, partition, rows), and when they ended, µs."""

    parts: list[tuple[str, int, pl.DataFrame]]
    end: int


def slots(frames: Mapping[str, pl.DataFrame], hours: int = 6, share: Sequence[int] = SHARE) -> list[Slot]:
    """The frames' rows (those with a plausible time) as they became known, dealt to partitions by `share`."""
    made: dict[int, Slot] = {}
    for name, frame in frames.items():
        frame = frame.sort(market.TIMES[name], maintain_order=True)
        moments = frame[market.TIMES[name]].to_physical().fill_null(0).to_numpy()
        position = np.searchsorted(np.cumsum(share), np.arange(len(frame)) * 7 % sum(share), side="right")
        number = moments // (hours * HOUR)
        for slot in np.unique(number[(moments > 0) & (moments < END)]).tolist():
            for partition in range(len(share)):
                rows = np.flatnonzero((number == slot) & (position == partition))
                if len(rows):
                    made.setdefault(slot, Slot([], (slot + 1) * hours * HOUR)).parts.append(
                        (name, partition, frame[rows])
                    )
    return [made[slot] for slot in sorted(made)]


def high_marks(bootstrap: str, topics: Sequence[str]) -> dict[tuple[str, int], int]:
    """Next offset of every partition, as the broker says."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "marks", "log_level": 0})
    try:
        known = consumer.list_topics(timeout=10).topics
        return {
            (topic, number): consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10)[1]
            for topic in topics
            for number in known[topic].partitions
        }
    finally:
        consumer.close()


def read(bootstrap: str, topic: str) -> list[tuple[int, int, bytes | None, bytes]]:
    """(partition, offset, key, value) of every record there is."""
    consumer = Consumer(
        {"bootstrap.servers": bootstrap, "group.id": "audit", "enable.auto.commit": False, "log_level": 0}
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        bounds = {
            number: consumer.get_watermark_offsets(TopicPartition(topic, number), timeout=10) for number in partitions
        }
        consumer.assign([TopicPartition(topic, number, low) for number, (low, _) in bounds.items()])
        left = {number for number, (low, high) in bounds.items() if high > low}
        found: list[tuple[int, int, bytes | None, bytes]] = []
        deadline = time.monotonic() + 60
        while left:
            assert time.monotonic() < deadline, f"{topic}: partitions {left} do not end"
            for message in consumer.consume(1000, timeout=0.2):  # it waits so long for the last of a thousand
                assert message.error() is None
                found.append((message.partition(), message.offset(), message.key(), message.value()))
                if message.offset() + 1 >= bounds[message.partition()][1]:
                    left.discard(message.partition())
        return found
    finally:
        consumer.close()


def await_(happened: Callable[[], Any], within: float, child: Child | None = None) -> None:
    """Until `happened`, or the child has ended."""
    deadline = time.monotonic() + within
    while not happened():
        assert child is None or child.running, child.output()[-3000:]  # type: ignore[union-attr]
        assert time.monotonic() < deadline, child.output()[-3000:] if child else "it did not happen"
        time.sleep(0.1)


def end(child: Child, within: float = 200) -> str:
    """Wait until the job has ended well; what it said."""
    code = child.wait(within)
    assert code == 0, child.output()[-5000:]
    return child.output()
