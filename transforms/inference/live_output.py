"""Output of live inference: messages for the topic, and commits to a table that has each row once.

A row is scored, then acknowledged by the broker, then committed.  A commit records the next offset of every partition
of the features topic, so that a job that was killed resumes there.  Rows that are read again are scored again, and
dropped by id.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import Metrics
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import TimerSpec, on_timer
from deltalake import DeltaTable

from schemas.live import live_predictions
from schemas.views import FeatureView
from transforms.inference.champion_model import SERVING, batch_record
from transforms.inference.live_input import source_of
from transforms.models.scoring import ARM
from transforms.records.frame_packets import head_of, unpack
from transforms.records.garbage_collection import freeze_imports
from transforms.records.record_batches import frame
from transforms.records.times import FOREVER, now_us
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS, MESSAGE_DEAD_LETTERS
from transforms.storage.delta_tables import open_table
from transforms.streaming.kafka import MESSAGE_ROWS, Broker, dead_letter_messages
from transforms.streaming.kafka_admin import FirstAvailable
from transforms.streaming.live_tables import BeyondOffsets, UnknownIds, Writer, application_of, last_commit_record
from transforms.streaming.messages import Decoded, to_arrow
from transforms.streaming.micro_batches import (
    SKIPPED,
    MicroBatch,
    envelopes_of,
    in_order,
    micro_batch_envelope,
    micro_batches_of,
    no_topic,
)
from transforms.streaming.mirrored_state import (
    BAG_SPEC,
    HEAD_SPEC,
    SINGLE_KEY,
    KeyedBytes,
    Mirror,
    StateParam,
    read_head,
    write_head,
)

# The most (worker, model) pairs whose first rows the status reports.
SWAPS_SHOWN = 50


@dataclasses.dataclass(frozen=True)
class Outlet:
    """Where the predictions of a live job are written.

    Args:
        view: the view whose rows are scored.
        model: the model's name, part of the names of topic and table.
        store: the folder of the tables.
        run_id: prefix of file names.
        classes: scores per row.
        arm: the arm of the predictions.
        prefix: prefix of topic names.
        table: whether rows are written to the table; if not, commits record only the offsets.
        commit_every: minimum interval between commits, µs.
        kafka: the broker of the features topic, which can explain a gap in the offsets; None: a replay.
    """

    view: FeatureView
    model: str
    store: str
    run_id: str
    classes: int = 1
    arm: str = ARM
    prefix: str = ""
    table: bool = True
    commit_every: int = 10_000_000
    kafka: Broker | None = None

    @property
    def uri(self) -> str:
        return FileSystems.join(self.store, "predictions_live", self.model)

    @property
    def dead_letters_uri(self) -> str:
        return FileSystems.join(self.store, "dead_letters", f"live_predictions_{self.model}")

    @property
    def topics(self) -> tuple[str, str]:
        """The topics of predictions and of dead letters."""
        return f"{self.prefix}{self.model}.predictions", f"{self.prefix}{self.model}.predictions.dead_letters"

    def messages(self, rows: pa.RecordBatch) -> Iterator[tuple[str, bytes, bytes]]:
        """A batch of predictions and its dead letters as messages.  `prediction_id` identifies a row."""
        topic, dead_letters_topic = self.topics
        plain = rows.replace_schema_metadata(None)
        for start in range(0, rows.num_rows, MESSAGE_ROWS):
            part = plain.slice(start, MESSAGE_ROWS)
            first = part.column(part.schema.get_field_index("prediction_id"))[0].as_py()
            yield topic, f"{self.model}:{self.arm}:{first & 0xFFFFFFFFFFFFFFFF:016x}".encode(), to_arrow(part)
        dead_letters = unpack(batch_record(rows))[1].get("letters")
        if dead_letters is not None:
            for key, value in dead_letter_messages(dead_letters):
                yield dead_letters_topic, key, value


def to_envelope(rows: pa.RecordBatch) -> KeyedBytes:
    """A batch of predictions as an envelope for `PendingPredictions`: one micro-batch per partition."""
    record, frames = unpack(batch_record(rows))
    serving = json.loads((rows.schema.metadata or {}).get(SERVING, b"{}"))
    # Polars accepts only text as metadata.
    whole, dead_letters, parts = (
        frame(rows.replace_schema_metadata(None)),
        frames.get("letters", pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)),
        [],
    )
    for source, partition, first, after, count, beat in record["parts"]:
        mine = whole if len(record["parts"]) == 1 else whole.filter(pl.col("__partition") == partition)
        bad = dead_letters if len(record["parts"]) == 1 else dead_letters.filter(pl.col("partition") == partition)
        parts.append((source, partition, first, after, count, Decoded(mine, bad, beat)))
    return SINGLE_KEY, micro_batch_envelope(parts, 0, received=record["came"], more={"serving": serving})


class _Once(UnknownIds):
    """`UnknownIds` that also keeps the rows it found to be new."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = pl.DataFrame()

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        self.kept = super().__call__(table, frame)
        return self.kept


def begin_at(outlet: Outlet, begin: Mapping[int, int]) -> dict[str, Any]:
    """The initial state: the record of the table's last commit, else `begin`, the first offset per partition."""
    record = last_commit_record(open_table(outlet.uri), application_of(outlet.model))
    source = source_of(outlet.view)
    done = record.get("next", {}).get(source, {})
    return {
        **record,
        "next": {source: {str(number): int(done.get(str(number), first)) for number, first in begin.items()}},
    }


class PendingPredictions:
    """Predictions in order of offsets until they are committed.  `state` and the inbox are the state to checkpoint."""

    def __init__(self, outlet: Outlet, start: Mapping[str, Any]) -> None:
        self.outlet, self.source = outlet, source_of(outlet.view)
        self.turn = int(start.get("turn", 0))
        self.next = {int(number): int(offset) for number, offset in start["next"][self.source].items()}
        self.ended = {int(number): int(offset) for number, offset in start.get("ended", {}).items()}
        self.rows = {"read": 0, "predicted": 0, "repeated": 0, "letters": 0, **start.get("rows", {})}
        self.by_version: dict[str, int] = dict(start.get("by_version", {}))
        self.tenures: dict[str, dict[str, Any]] = dict(start.get("reigns", {}))
        self.refused: dict[str, dict[str, Any]] = dict(start.get("refused", {}))
        self.since = int(start.get("since", now_us()))  # the last commit
        self.inbox: list[MicroBatch] = []
        self._ids = _Once()
        self._next_available = no_topic if outlet.kafka is None else FirstAvailable(outlet.kafka, outlet.prefix)

    def state(self) -> dict[str, Any]:
        """The state to checkpoint, apart from the inbox."""
        return {**self.head(), "reigns": self.tenures, "refused": self.refused, "since": self.since}

    def head(self) -> dict[str, Any]:
        """The record of a commit."""
        return {
            "turn": self.turn,
            "next": {self.source: {str(number): offset for number, offset in self.next.items()}},
            "ended": {str(number): offset for number, offset in self.ended.items()},
            "rows": self.rows,
            "by_version": self.by_version,
        }

    def take(self, envelope: bytes) -> None:
        serving = head_of(envelope).get("serving")
        some = micro_batches_of(envelope)
        self.inbox += some
        if not serving:
            return
        key = f"{serving['worker']} {serving['since']}"
        tenure = self.tenures.setdefault(
            key, {"worker": serving["worker"], "version": serving["version"], "since": serving["since"], "offsets": {}}
        )
        for micro_batch in some:
            if len(micro_batch.rows):
                known = tenure["offsets"].get(str(micro_batch.partition), micro_batch.first)
                tenure["offsets"][str(micro_batch.partition)] = min(known, micro_batch.first)
        for each in serving["refused"]:
            self.refused[f"{each['version']} {each['at']}"] = each
        for held in (self.tenures, self.refused):
            while len(held) > SWAPS_SHOWN:
                del held[next(iter(held))]

    @property
    def last(self) -> bool:
        """Whether every partition has reported its end."""
        return bool(self.next) and all(self.ended.get(number) == offset for number, offset in self.next.items())

    def commit(self, now: int) -> dict[str, Any] | None:
        """Commit what is there in order and keep the rest.  Returns the status; None if there was nothing to commit."""

        def count(_: str, what: str, number: int) -> None:
            if what == SKIPPED:
                self.rows[what] = self.rows.get(what, 0) + number

        admitted, self.inbox = in_order(self.inbox, {self.source: self.next}, now, count, self._next_available)
        if not admitted:
            return None
        rows, dead_letters = [], [pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)]
        for micro_batch in admitted:
            due = self.next.get(micro_batch.partition, micro_batch.first)
            rows.append(
                micro_batch.rows if due <= micro_batch.first else micro_batch.rows.filter(pl.col("__offset") >= due)
            )
            dead_letters.append(
                micro_batch.dead_letters
                if due <= micro_batch.first
                else micro_batch.dead_letters.filter(pl.col("offset") >= due)
            )
            self.next[micro_batch.partition] = max(micro_batch.next, due)
            if micro_batch.heartbeat is not None and micro_batch.heartbeat >= FOREVER:
                self.ended[micro_batch.partition] = self.next[micro_batch.partition]
        return self._write(pl.concat(rows), pl.concat(dead_letters), now)

    def _write(self, rows: pl.DataFrame, dead_letters: pl.DataFrame, now: int) -> dict[str, Any]:
        outlet = self.outlet
        self.turn += 1
        self.rows["read"] += len(rows)
        once = rows.unique("row_id", keep="first", maintain_order=True)
        if len(dead_letters):
            self.rows["letters"] += self._dead_letters(dead_letters)
        table, schema, app = (
            open_table(outlet.uri),
            live_predictions(outlet.view, outlet.classes),
            application_of(outlet.model),
        )
        fresh = self._ids(table, once)
        record = self._record(rows, once, fresh) if outlet.table else self._record(rows, once, once)
        Writer(outlet.uri, schema, app, outlet.run_id).append(
            once if outlet.table else once.clear(), self.turn, record, self._ids, always=True
        )
        return {**record, **self._status(rows, now)}

    def _record(self, rows: pl.DataFrame, once: pl.DataFrame, fresh: pl.DataFrame) -> dict[str, Any]:
        self.rows["predicted"] += len(fresh)
        self.rows["repeated"] += len(rows) - len(fresh)
        for version, number in fresh["model_version"].value_counts().iter_rows():
            self.by_version[version] = self.by_version.get(version, 0) + number
        newest = max(self.tenures.values(), key=lambda each: int(each["since"]), default={"version": None})
        return {**self.head(), "model": self.outlet.model, "version": newest["version"]}

    def _status(self, rows: pl.DataFrame, now: int) -> dict[str, Any]:
        tenures = sorted(self.tenures.values(), key=lambda each: (each["worker"], each["since"]))
        swaps = [
            {
                "at": after["since"],
                "from": before["version"],
                "to": after["version"],
                "offsets": after["offsets"],
                "worker": after["worker"],
            }
            for before, after in itertools.pairwise(tenures)
            if before["worker"] == after["worker"]
        ]
        workers = {each["worker"]: {"version": each["version"], "since": each["since"]} for each in tenures}
        lag = (rows["__scored"].to_physical() - rows["__arrived"].to_physical()).to_numpy() / 1e6
        marks = (
            dict(zip(("median", "p99", "max"), np.quantile(lag, (0.5, 0.99, 1)).round(4).tolist())) if len(lag) else {}
        )
        return {
            "last": self.last,
            "at": now,
            "swaps": sorted(swaps, key=lambda each: int(each["at"])),
            "refused": list(self.refused.values()),
            "workers": workers,
            "lag_s": {"rows": len(lag), **marks},
        }

    def _dead_letters(self, dead_letters: pl.DataFrame) -> int:
        outlet = self.outlet
        arrived = pl.col("arrived").cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        named = dead_letters.with_columns(
            pl.lit(outlet.view.name).alias("view"), arrived, arrived.dt.date().alias("date")
        )
        writer = Writer(
            outlet.dead_letters_uri, LIVE_DEAD_LETTERS, application_of(f"{outlet.model}/letters"), outlet.run_id
        )
        fresh = BeyondOffsets(writer.app, None, ("source", "partition", "offset"))
        return writer.append(named, self.turn, self.head(), fresh)


class CommitPredictions(beam.DoFn):
    """Envelopes of predictions → one commit per interval; the output is the status as JSON.  There is one key."""

    def __init__(self, outlet: Outlet, start: Mapping[str, Any]) -> None:
        self.outlet, self.start = outlet, start
        self.committed = Metrics.counter("millrace.serving", "rows_committed")

    def setup(self) -> None:
        freeze_imports()
        self.mirror = Mirror()

    def process(
        self, element: KeyedBytes, head: Any = StateParam(HEAD_SPEC), bag: Any = StateParam(BAG_SPEC)
    ) -> Iterator[KeyedBytes]:
        yield from self.taken(element, head, bag)

    def taken(self, element: KeyedBytes, head: Any, bag: Any) -> Iterator[KeyedBytes]:
        """Add an envelope; commit if the interval has passed."""
        key, envelope = element
        state = read_head(head)
        ledger = self.ledger(key, state, bag)
        bag.add(envelope)
        ledger.take(envelope)
        ends = any(part[5] is not None for part in head_of(envelope)["parts"])
        if ends or now_us() - ledger.since >= self.outlet.commit_every:
            yield from self.commit(ledger, bag)
        self.save(key, state, ledger, head)

    def ledger(self, key: bytes, state: Mapping[str, Any], bag: Any) -> PendingPredictions:
        def build() -> PendingPredictions:
            ledger = PendingPredictions(self.outlet, state.get("ledger", self.start))
            for envelope in bag.read():
                ledger.take(envelope)
            return ledger

        return self.mirror.get(key, state["version"], build)

    def commit(self, ledger: PendingPredictions, bag: Any) -> Iterator[KeyedBytes]:
        before = ledger.rows["predicted"]
        record = ledger.commit(now_us())
        ledger.since = now_us()
        if record is not None:
            self.committed.inc(ledger.rows["predicted"] - before)
            bag.clear()
            for envelope in envelopes_of(ledger.inbox):
                bag.add(envelope)
            yield SINGLE_KEY, json.dumps(record).encode()

    def save(self, key: bytes, state: dict[str, Any], ledger: PendingPredictions, head: Any) -> None:
        state.update(version=state["version"] + 1, ledger=ledger.state())
        write_head(head, state)
        self.mirror.put(key, state["version"], ledger)


WAKE = TimerSpec("wake", TimeDomain.REAL_TIME)


class TimedCommitPredictions(CommitPredictions):
    """`CommitPredictions` with a timer that commits the rest when no more input arrives."""

    def process(
        self,
        element: KeyedBytes,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[KeyedBytes]:
        yield from self.taken(element, head, bag)
        self.arm(head, wake)

    def arm(self, head: Any, wake: Any) -> None:
        """Set the timer for one interval from now, unless it is set already."""
        state, now = read_head(head), now_us()
        at = now + self.outlet.commit_every
        if not now - 5_000_000 < state.get("wake", 0) <= at:
            state["wake"] = at
            wake.set(at / 1e6)
            write_head(head, state)

    @on_timer(WAKE)
    def woken(
        self,
        key: Any = beam.DoFn.KeyParam,
        head: Any = StateParam(HEAD_SPEC),
        bag: Any = StateParam(BAG_SPEC),
        wake: Any = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[KeyedBytes]:
        state = read_head(head)
        ledger = self.ledger(key, state, bag)
        if ledger.inbox:
            yield from self.commit(ledger, bag)
        state["wake"] = 0
        self.save(key, state, ledger, head)
        if ledger.inbox:  # a gap in the offsets is still waited for
            self.arm(head, wake)
