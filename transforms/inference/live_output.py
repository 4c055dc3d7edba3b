"""Output of live inference: messages for the topic, and commits to a table that has each row once.

A row is scored, then acknowledged by the broker, then committed.  A commit records the next offset of every partition
of the features topic, so that a job that was killed resumes there.  Rows that are read again are scored again, and
dropped by id.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.transforms.userstate import on_timer
from deltalake import DeltaTable

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.live import live_predictions
from schemas.views import FeatureView
from transforms.inference.live_input import features_source_name
from transforms.inference.live_records import BatchOrigin, PredictionsStatus, ScoringState, ServingModel, ServingPeriod
from transforms.models.scoring import ARM
from transforms.records.frame_packets import Head, head_of
from transforms.records.garbage_collection import freeze_imports
from transforms.records.record_batches import frame
from transforms.records.times import FOREVER, now_us
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS, MESSAGE_DEAD_LETTERS
from transforms.storage.delta_tables import open_table
from transforms.storage.file_systems import FileSystems
from transforms.streaming.kafka import MESSAGE_ROWS, Broker, dead_letter_messages
from transforms.streaming.kafka_admin import FirstAvailable
from transforms.streaming.live_tables import BeyondOffsets, TableWriter, UnknownIds, application_of, last_commit_record
from transforms.streaming.messages import to_arrow
from transforms.streaming.micro_batches import (
    SKIPPED,
    MicroBatch,
    admissible,
    envelopes_of,
    micro_batch_envelope,
    micro_batches_of,
    no_topic,
)
from transforms.streaming.mirrored_state import (
    BAG_SPEC,
    HEAD_SPEC,
    SINGLE_KEY,
    BagState,
    KeyedBytes,
    Mirror,
    StateParam,
    ValueState,
    read_head,
    replace_bag,
    write_head,
)
from transforms.streaming.wake_ups import Timer, clear_wake_up, set_wake_up, wake_timer

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
        for key, value in dead_letter_messages(BatchOrigin.of(rows).dead_letters):
            yield dead_letters_topic, key, value


def to_envelope(rows: pa.RecordBatch) -> KeyedBytes:
    """A batch of predictions as an envelope for `PendingPredictions`: one micro-batch per partition."""
    origin, serving = BatchOrigin.of(rows), ServingModel.of(rows)
    # Polars accepts only text as metadata.
    predictions, dead_letters = frame(rows.replace_schema_metadata(None)), origin.dead_letters
    single, parts = len(origin.ranges) == 1, []
    for each in origin.ranges:
        mine = predictions if single else predictions.filter(pl.col("__partition") == each.partition)
        rejected = dead_letters if single else dead_letters.filter(pl.col("partition") == each.partition)
        parts.append(
            MicroBatch(
                source=each.source,
                partition=each.partition,
                first=each.first,
                next=each.next,
                messages=each.messages,
                heartbeat=each.heartbeat,
                rows=mine,
                dead_letters=rejected,
                received=origin.received,
            )
        )
    more = {"serving": {} if serving is None else serving.to_json()}
    return SINGLE_KEY, micro_batch_envelope(parts, more=more)


def serving_model_of(envelope: bytes) -> ServingModel | None:
    """The model that scored the rows of an envelope."""
    value = head_of(envelope).get("serving")
    return ServingModel.of_json(value) if value else None


class _NewIds(UnknownIds):
    """`UnknownIds` that also keeps the rows that it found to be new."""

    def __init__(self) -> None:
        super().__init__()
        self.new_rows = pl.DataFrame()

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        self.new_rows = super().__call__(table, frame)
        return self.new_rows


def begin_at(outlet: Outlet, begin: Mapping[int, int]) -> ScoringState:
    """The initial state: the record of the table's last commit, or else `begin`, the first offset per partition."""
    record = last_commit_record(open_table(outlet.uri), application_of(outlet.model))
    source = features_source_name(outlet.view)
    done = record.get("next", {}).get(source, {})
    next_offsets = {str(number): int(done.get(str(number), first)) for number, first in begin.items()}
    return ScoringState.of_json(source, {**record, "next": {source: next_offsets}})


class PendingPredictions:
    """Predictions in order of offsets until they are committed.  `state` and the inbox are the state to checkpoint."""

    def __init__(self, outlet: Outlet, start: ScoringState) -> None:
        self.outlet, self.source, self.turn = outlet, start.source, start.turn
        self.next, self.ended = dict(start.next), dict(start.ended)
        self.rows = {"read": 0, "predicted": 0, "repeated": 0, "letters": 0, **start.rows}
        self.by_version = dict(start.by_version)
        self.periods, self.refused = dict(start.periods), dict(start.refused)
        self.committed_at = now_us() if start.committed_at is None else start.committed_at
        self.inbox: list[MicroBatch] = []
        self._ids = _NewIds()
        self._next_available = no_topic if outlet.kafka is None else FirstAvailable(outlet.kafka, outlet.prefix)

    @property
    def state(self) -> ScoringState:
        """The state to checkpoint, apart from the inbox."""
        return ScoringState(
            source=self.source,
            next=self.next,
            turn=self.turn,
            ended=self.ended,
            rows=self.rows,
            by_version=self.by_version,
            periods=self.periods,
            refused=self.refused,
            committed_at=self.committed_at,
        )

    @property
    def last(self) -> bool:
        """Whether every partition has reported its end."""
        return self.state.at_end

    def take(self, envelope: bytes) -> list[MicroBatch]:
        """Add the micro-batches of an envelope, and note which model scored them.  Returns the micro-batches."""
        added = micro_batches_of(envelope)
        self.inbox += added
        serving = serving_model_of(envelope)
        if serving is None:
            return added
        period = ServingPeriod(serving.worker, serving.version, serving.since)
        period = self.periods.get(period.key, period)
        for micro_batch in added:
            if len(micro_batch.rows):
                period = period.with_message(micro_batch.partition, micro_batch.first)
        self.periods[period.key] = period
        self.refused |= {each.key: each for each in serving.refused}
        for shown in (self.periods, self.refused):
            while len(shown) > SWAPS_SHOWN:
                del shown[next(iter(shown))]
        return added

    def commit(self, now: int) -> PredictionsStatus | None:
        """Commits the micro-batches that are next in order, and keeps the others.

        Returns:
            The status; None if there was nothing to commit.
        """

        def count(_: str, what: str, number: int) -> None:
            if what == SKIPPED:
                self.rows[what] = self.rows.get(what, 0) + number

        admitted, self.inbox = admissible(self.inbox, {self.source: self.next}, now, count, self._next_available)
        if not admitted:
            return None
        rows, dead_letters = [], [pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)]
        for micro_batch in admitted:
            due = self.next.get(micro_batch.partition, micro_batch.first)
            repeats = due > micro_batch.first
            rows.append(micro_batch.rows.filter(pl.col("__offset") >= due) if repeats else micro_batch.rows)
            rejected = micro_batch.dead_letters
            dead_letters.append(rejected.filter(pl.col("offset") >= due) if repeats else rejected)
            self.next[micro_batch.partition] = max(micro_batch.next, due)
            if micro_batch.heartbeat is not None and micro_batch.heartbeat >= FOREVER:
                self.ended[micro_batch.partition] = self.next[micro_batch.partition]
        return self._write(pl.concat(rows), pl.concat(dead_letters), now)

    def _write(self, rows: pl.DataFrame, dead_letters: pl.DataFrame, now: int) -> PredictionsStatus:
        outlet = self.outlet
        self.turn += 1
        self.rows["read"] += len(rows)
        unique = rows.unique("row_id", keep="first", maintain_order=True)
        if len(dead_letters):
            self.rows["letters"] += self._write_dead_letters(dead_letters)
        new_rows = self._ids(open_table(outlet.uri), unique)
        record = self._record(len(rows), new_rows if outlet.table else unique)
        schema, app = live_predictions(outlet.view, outlet.classes), application_of(outlet.model)
        writer = TableWriter(outlet.uri, schema, app, outlet.run_id)
        writer.append(unique if outlet.table else unique.clear(), self.turn, record, self._ids, always=True)
        return PredictionsStatus(
            record=record,
            last=self.last,
            at=now,
            periods=tuple(sorted(self.periods.values(), key=lambda each: (each.worker, each.since))),
            refused=tuple(self.refused.values()),
            lag=(rows["__scored"].to_physical() - rows["__arrived"].to_physical()).to_numpy() / 1e6,
        )

    def _record(self, read: int, new_rows: pl.DataFrame) -> dict[str, object]:
        """Count the rows of a commit.  Returns the record of the commit."""
        self.rows["predicted"] += len(new_rows)
        self.rows["repeated"] += read - len(new_rows)
        for version, number in new_rows["model_version"].value_counts().iter_rows():
            self.by_version[version] = self.by_version.get(version, 0) + number
        newest = max(self.periods.values(), key=lambda each: each.since, default=None)
        version = None if newest is None else newest.version
        return {**self.state.commit_record(), "model": self.outlet.model, "version": version}

    def _write_dead_letters(self, dead_letters: pl.DataFrame) -> int:
        """Writes dead letters; returns how many of them the table did not have."""
        outlet = self.outlet
        arrived = pl.col("arrived").cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        view = pl.lit(outlet.view.name).alias("view")
        dated = dead_letters.with_columns(view, arrived, arrived.dt.date().alias("date"))
        app = application_of(f"{outlet.model}/letters")
        writer = TableWriter(outlet.dead_letters_uri, LIVE_DEAD_LETTERS, app, outlet.run_id)
        new_rows = BeyondOffsets(app, None, ("source", "partition", "offset"))
        return writer.append(dated, self.turn, self.state.commit_record(), new_rows)


class CommitPredictions(beam.DoFn):
    """Envelopes of predictions → one commit per interval; the output is the status as JSON.  There is one key."""

    def __init__(self, outlet: Outlet, start: ScoringState) -> None:
        self.outlet, self.start = outlet, start
        self.committed = Metrics.counter("millrace.serving", "rows_committed")

    def setup(self) -> None:
        freeze_imports()
        self.mirror = Mirror[PendingPredictions]()

    def process(
        self, element: KeyedBytes, head: ValueState = StateParam(HEAD_SPEC), bag: BagState = StateParam(BAG_SPEC)
    ) -> Iterator[KeyedBytes]:
        yield from self.add(element, head, bag)

    def add(self, element: KeyedBytes, head: ValueState, bag: BagState) -> Iterator[KeyedBytes]:
        """Add an envelope; commit if the interval has passed or a partition has sent a heartbeat."""
        key, envelope = element
        state = read_head(head)
        pending = self.pending(key, state, bag)
        bag.add(envelope)
        heartbeat = any(each.heartbeat is not None for each in pending.take(envelope))
        if heartbeat or now_us() - pending.committed_at >= self.outlet.commit_every:
            yield from self.commit(pending, bag)
        self.save(key, state, pending, head)

    def pending(self, key: bytes, state: Head, bag: BagState) -> PendingPredictions:
        """The predictions of a key: those in memory, or those of the checkpoint."""

        def build() -> PendingPredictions:
            start = ScoringState.of_json(self.start.source, state["ledger"]) if "ledger" in state else self.start
            pending = PendingPredictions(self.outlet, start)
            for envelope in bag.read():
                pending.take(envelope)
            return pending

        return self.mirror.get(key, state["version"], build)

    def commit(self, pending: PendingPredictions, bag: BagState) -> Iterator[KeyedBytes]:
        before = pending.rows["predicted"]
        status = pending.commit(now_us())
        pending.committed_at = now_us()
        if status is not None:
            self.committed.inc(pending.rows["predicted"] - before)
            replace_bag(bag, envelopes_of(pending.inbox))
            yield SINGLE_KEY, json.dumps(status.to_json()).encode()

    def save(self, key: bytes, state: Head, pending: PendingPredictions, head: ValueState) -> None:
        state.update(version=state["version"] + 1, ledger=pending.state.to_json())
        write_head(head, state)
        self.mirror.put(key, state["version"], pending)


WAKE = wake_timer()


class TimedCommitPredictions(CommitPredictions):
    """`CommitPredictions` with a timer that commits the rest when no more input arrives."""

    def process(
        self,
        element: KeyedBytes,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        wake: Timer = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[KeyedBytes]:
        yield from self.add(element, head, bag)
        self.set_timer(head, wake)

    def set_timer(self, head: ValueState, wake: Timer) -> None:
        """Set the timer for one interval from now, unless it is set already."""
        state = read_head(head)
        if set_wake_up(state, wake, now_us() + self.outlet.commit_every):
            write_head(head, state)

    @on_timer(WAKE)
    def on_wake(
        self,
        key: bytes = beam.DoFn.KeyParam,
        head: ValueState = StateParam(HEAD_SPEC),
        bag: BagState = StateParam(BAG_SPEC),
        wake: Timer = beam.DoFn.TimerParam(WAKE),
    ) -> Iterator[KeyedBytes]:
        state = read_head(head)
        pending = self.pending(key, state, bag)
        if pending.inbox:
            yield from self.commit(pending, bag)
        clear_wake_up(state)
        self.save(key, state, pending, head)
        if pending.inbox:  # these micro-batches wait for a gap in the offsets to be filled
            self.set_timer(head, wake)
