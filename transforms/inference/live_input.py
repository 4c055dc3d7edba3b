"""Input of live inference: messages of the features topic, or rows of the live feature table, → batches to score."""

from __future__ import annotations

import functools
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.live import ORIGIN_FIELDS, live_schema, scorable
from schemas.views import FeatureView
from transforms.inference.live_records import BatchOrigin, MessageRange
from transforms.records.record_batches import batch
from transforms.records.times import ALWAYS, FOREVER, now_us
from transforms.sources.contracts import IN_YEARS
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.storage.delta_log import commit_at, file_actions, logged_versions
from transforms.storage.delta_tables import data_files, open_table, table_root
from transforms.storage.paths import features_live_uri
from transforms.streaming.crash_guard import CrashGuard
from transforms.streaming.live_tables import read_feature_rows
from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits, read_arrow
from transforms.streaming.messages import (
    ANY_ERROR,
    EXPANDED_BYTES,
    HEARTBEAT,
    Message,
    by_partition,
    expanded_size,
    heartbeat,
    out_of_calendar,
    to_arrow,
)

log = logging.getLogger("millrace.serving")
# The log message by which a replay reports its progress.
REPLAY = "replay: at row %d of %d"
# Messages per batch: this bounds the memory of a worker while a job catches up.
BATCH_MESSAGES = 200
# Rows per replayed message.
MESSAGE_ROWS = 1000
_ARROW = b"\xff\xff\xff\xff"


def features_source_name(view: FeatureView) -> str:
    """The name of the features topic in offsets and dead letters: without the prefix."""
    return f"{view.name}.features"


def to_score(
    view: FeatureView, messages: Iterable[Message], by_row: bool = False, limits: MessageLimits = DEFAULT_LIMITS
) -> pa.RecordBatch:
    """Messages of any partitions as one batch of `scorable(view)`, with its `BatchOrigin` in the metadata.

    Args:
        view: the view of the feature rows.
        messages: messages from the features topic.
        by_row: offsets count rows (of a replayed table), not messages.
        limits: the most that a message may contain.
    """
    source, tables, dead_letters, ranges = features_source_name(view), list[pa.Table](), list[tuple[object, ...]](), []
    for (_, partition), some in by_partition(messages).items():
        heartbeat, rows = None, 0
        for message in some:
            if message.key == HEARTBEAT:
                heartbeat, rows = _heartbeat_time(message), 0
                if heartbeat is None:
                    dead_letters.append(_dead_letter(source, message, "", "a heartbeat is an integer, µs since 1970"))
                continue
            heartbeat = None  # an end only counts if no message follows it
            try:
                found = _feature_rows(view, message, limits)
            except ANY_ERROR as error:
                reason = (str(error).splitlines() or [repr(error)])[0][:300]
                dead_letters.append(_dead_letter(source, message, "", reason))
                rows = 0
                continue
            rows = found.num_rows
            usable, broken = _usable(view, found)
            dead_letters += [_dead_letter(source, message, field, rule, position) for position, field, rule in broken]
            tables.append(usable)
        after = some[-1].offset + (rows if by_row else 1)
        count = len(some) if not by_row or rows else 0
        ranges.append(MessageRange(source, partition, some[0].offset, after, count, heartbeat))
    rejected = pl.DataFrame(dead_letters, schema=MESSAGE_DEAD_LETTERS, orient="row")
    origin = BatchOrigin(tuple(ranges), now_us(), rejected)
    schema = scorable(view).with_metadata(origin.to_metadata())
    return batch(pa.concat_tables(tables) if tables else schema.empty_table(), schema)


def _heartbeat_time(message: Message) -> int | None:
    """The time (µs) in the value of a heartbeat; None if it is not an integer of 64 bits."""
    time = int(message.value) if re.fullmatch(rb"-?\d{1,19}", message.value) else None
    return time if time is None or ALWAYS <= time <= -ALWAYS else None


def _feature_rows(view: FeatureView, message: Message, limits: MessageLimits) -> pa.Table:
    """Rows of a message with the columns of `scorable(view)`, checked.

    Raises:
        ValueError: the fingerprint or the schema differs, or the value is not Arrow.
        Exception: whatever pyarrow raises for bytes that are not Arrow.
    """
    if message.refused:
        raise ValueError(message.refused)
    found_fingerprint = (message.key or b"").split(b":")[0].decode("utf-8", "replace")
    if found_fingerprint != view.fingerprint:
        raise ValueError(
            f"a feature row has fingerprint {view.fingerprint} (view {view.name}), "
            f"its message has the key {found_fingerprint[:40]!r}"
        )
    if message.value[:4] != _ARROW:
        raise ValueError("a message of feature rows is an Arrow IPC stream")
    wanted = [
        field
        for field in live_schema(view)
        if field.name in scorable(view).names and field.name not in ORIGIN_FIELDS.names
    ]

    def check(schema: pa.Schema) -> None:
        for field in wanted:
            found = schema.field(field.name).type if field.name in schema.names else "missing"
            if found != field.type and not (found == pa.large_string() and field.type == pa.string()):
                raise ValueError(f"column {field.name!r} must be {field.type}; it is {found}")

    table = read_arrow(message.value, {field.name for field in wanted}, check, limits)
    table = table.select([field.name for field in wanted]).cast(pa.schema(wanted))
    origin = (message.partition, message.offset, None, message.timestamp)
    for field, value in zip(ORIGIN_FIELDS, origin, strict=True):
        column = (
            pa.array(range(len(table)), field.type)
            if value is None
            else pa.repeat(pa.scalar(value, pa.int64()), len(table)).cast(field.type)
        )
        table = table.append_column(field, column)
    return table.select(scorable(view).names)


def _usable(view: FeatureView, rows: pa.Table) -> tuple[pa.Table, list[tuple[int, str, str]]]:
    """The rows that have a complete spine key and times that can be stored; and (position, field, rule) of the
    others."""
    broken: dict[int, tuple[str, str]] = {}
    for field in rows.schema:
        if pa.types.is_temporal(field.type):
            beyond = out_of_calendar(pl.Series(pl.from_arrow(rows[field.name])))
            for position in beyond.arg_true().to_list():
                broken.setdefault(position, (field.name, IN_YEARS))
    for name in (*view.key, view.time, "row_id", "date"):
        column = rows[name]
        if column.null_count:
            for position in column.is_null().to_numpy().nonzero()[0].tolist():
                broken.setdefault(position, (name, "a feature row has the key and time of its spine row"))
    if not broken:
        return rows, []
    kept = pa.array([position not in broken for position in range(len(rows))])
    return rows.filter(kept), [(position, *why) for position, why in sorted(broken.items())]


def _dead_letter(source: str, message: Message, field: str, rule: str, position: int = -1) -> tuple[object, ...]:
    text = message.value[:200].decode("utf-8", "backslashreplace") if position < 0 else None
    return source, message.partition, message.offset, position, field, rule, text, message.timestamp


class DecodeFeatureRows(beam.DoFn):
    """Message → batches of `scorable(view)`, each with at most `most` messages of a bundle.

    Args:
        view: the view of the feature rows.
        most: messages of a batch.
        by_row: see `to_score`.
        guard: folder of the crash guard; None: there is none.
        limits: the most that a message may contain.
    """

    def __init__(
        self,
        view: FeatureView,
        most: int = BATCH_MESSAGES,
        by_row: bool = False,
        guard: str | None = None,
        limits: MessageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.view, self.most, self.by_row, self.folder, self.limits = view, most, by_row, guard, limits

    def setup(self) -> None:
        self.guard = CrashGuard(self.folder, functools.partial(decode_alone, self.view, self.limits))

    def teardown(self) -> None:
        self.guard.close()

    def start_bundle(self) -> None:
        self.messages: list[Message] = []
        self.expanded = 0

    def process(self, message: Message) -> Iterator[pa.RecordBatch]:
        # The timestamp may be missing (−1), or from the clock of its producer, which may be wrong.
        now = now_us()
        self.messages.append(message if 0 < message.timestamp <= now else message._replace(timestamp=now))
        self.expanded += expanded_size(message, self.limits)
        if len(self.messages) >= self.most or self.expanded >= EXPANDED_BYTES:
            yield self._batch()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.messages:
            yield WindowedValue(self._batch(), MIN_TIMESTAMP, [GlobalWindow()])

    def _batch(self) -> pa.RecordBatch:
        messages, self.messages, self.expanded = self.messages, [], 0
        with self.guard.decoding(messages) as checked:
            return to_score(self.view, checked, self.by_row, self.limits)


def decode_alone(view: FeatureView, limits: MessageLimits, message: Message) -> None:
    """Decodes one message, to see whether the process survives it."""
    to_score(view, [message], limits=limits)


def replayed(view: FeatureView, store: str, begin: Mapping[int, int]) -> Iterator[Message]:
    """The live feature table as messages of one partition, commit by commit, with one offset per row, from `begin` on.

    A message that marks the end comes last.

    Raises:
        StoreError: the table's log cannot be read.
    """
    uri, topic = features_live_uri(store, view.name, view.fingerprint), features_source_name(view)
    due, offset, arrived = begin.get(0, 0), 0, 0
    table = open_table(uri)
    if table is not None:
        inside = len(table_root(table)) + 1
        files = {file.path[inside:]: file for file in data_files(table)}
        for version in logged_versions(uri):
            arrived = int(commit_at(uri, version).get("timestamp", 0)) * 1000
            for path in sorted(file_actions(uri, version)[0] & files.keys()):
                if offset + files[path].rows > due:
                    rows = batch(read_feature_rows(view, files[path]), live_schema(view))
                    for start in range(max(due - offset, 0), rows.num_rows, MESSAGE_ROWS):
                        part = to_arrow(rows.slice(start, MESSAGE_ROWS))
                        yield Message(topic, 0, offset + start, arrived, f"{view.fingerprint}:replay".encode(), part)
                offset += files[path].rows
    yield Message(topic, 0, offset, arrived, *heartbeat(FOREVER))


class SendFeatureRows(beam.DoFn):
    """Impulse → the live feature table as messages.

    Args:
        view: the view of the table.
        store: the folder of the tables.
        begin: first offset by partition; see `replayed`.
        pace: time between messages, µs.
    """

    def __init__(self, view: FeatureView, store: str, begin: Mapping[int, int], pace: int) -> None:
        self.view, self.store, self.begin, self.pace = view, store, begin, pace

    def process(self, _: bytes) -> Iterator[Message]:
        total = rows_in(self.view, self.store)
        for message in replayed(self.view, self.store, self.begin):
            log.info(REPLAY, message.offset, total)
            yield message
            time.sleep(self.pace / 1e6)


def rows_in(view: FeatureView, store: str) -> int:
    """The number of feature rows that a replay reads."""
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    return 0 if table is None else sum(file.rows for file in data_files(table))
