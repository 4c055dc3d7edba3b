"""Input of live inference: messages of the features topic, or rows of the live feature table, → batches to score."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from schemas.live import ORIGIN, live_schema, scorable
from schemas.views import FeatureView
from transforms.inference.champion_model import BATCH_RECORD
from transforms.records.frame_packets import pack
from transforms.records.record_batches import batch
from transforms.records.times import FOREVER, now_us
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.storage.delta_log import commit_at, file_actions, versions
from transforms.storage.delta_tables import data_files, open_table, table_root
from transforms.storage.paths import features_live_uri
from transforms.streaming.live_tables import read_answers
from transforms.streaming.messages import HEARTBEAT, Message, by_partition, heartbeat, to_arrow

# Messages per batch: this bounds the memory of a worker while a job catches up.
BATCH_MESSAGES = 200
# Rows per replayed message.
MESSAGE_ROWS = 1000
_ARROW = b"\xff\xff\xff\xff"


def source_of(view: FeatureView) -> str:
    """The name of the features topic in offsets and dead letters, without the prefix."""
    return f"{view.name}.features"


def to_score(view: FeatureView, messages: Iterable[Message], by_row: bool = False) -> pa.RecordBatch:
    """Messages of any partitions as one batch of `scorable(view)`; its metadata has the offsets and the dead letters.

    Args:
        view: the view of the feature rows.
        messages: from the features topic.
        by_row: offsets count rows (a replayed table), not messages.
    """
    source, tables, dead_letters, parts = source_of(view), list[pa.Table](), list[tuple[object, ...]](), []
    for (_, partition), some in by_partition(messages).items():
        beat, rows = None, 0
        for message in some:
            if message.key == HEARTBEAT:
                until = int(message.value) if re.fullmatch(rb"-?\d{1,19}", message.value) else None
                if until is None:
                    dead_letters.append(_dead_letter(source, message, "", "a heartbeat is an integer, µs since 1970"))
                beat, rows = until, 0
                continue
            beat = None  # an end counts only if no message follows
            try:
                answers = _feature_rows(view, message)
            except (ValueError, OSError, pa.ArrowException) as error:
                dead_letters.append(
                    _dead_letter(source, message, "", (str(error).splitlines() or [repr(error)])[0][:300])
                )
                rows = 0
                continue
            rows = answers.num_rows
            kept, broken = _whole(view, answers)
            dead_letters += [
                _dead_letter(source, message, field, "an answer names its question", position)
                for position, field in broken
            ]
            tables.append(kept)
        after = some[-1].offset + (rows if by_row else 1)
        parts.append([source, partition, some[0].offset, after, len(some) if not by_row or rows else 0, beat])
    frames = {"letters": pl.DataFrame(dead_letters, schema=MESSAGE_DEAD_LETTERS, orient="row")} if dead_letters else {}
    schema = scorable(view).with_metadata({BATCH_RECORD: pack({"parts": parts, "came": now_us()}, frames)})
    return batch(pa.concat_tables(tables) if tables else schema.empty_table(), schema)


def _feature_rows(view: FeatureView, message: Message) -> pa.Table:
    """Rows of a message with the columns of `scorable(view)`, checked.

    Raises:
        ValueError: the fingerprint or the schema differs, or the value is not Arrow.
    """
    found_fingerprint = (message.key or b"").split(b":")[0].decode("utf-8", "replace")
    if found_fingerprint != view.fingerprint:
        raise ValueError(
            f"an answer is of fingerprint {view.fingerprint} (view {view.name}), its key says {found_fingerprint[:40]!r}"
        )
    if message.value[:4] != _ARROW:
        raise ValueError("a message of answers is an Arrow IPC stream")
    with pa.ipc.open_stream(message.value) as reader:
        table = reader.read_all()
    wanted = [
        field for field in live_schema(view) if field.name in scorable(view).names and field.name not in ORIGIN.names
    ]
    for field in wanted:
        found = table.schema.field(field.name).type if field.name in table.schema.names else "missing"
        if found != field.type and not (found == pa.large_string() and field.type == pa.string()):
            raise ValueError(f"an answer's column {field.name!r} is {field.type}, this one's {found}")
    table.validate(full=True)
    table = table.select([field.name for field in wanted]).cast(pa.schema(wanted))
    origin = (message.partition, message.offset, None, message.timestamp)
    for field, value in zip(ORIGIN, origin, strict=True):
        column = (
            pa.array(range(len(table)), field.type)
            if value is None
            else pa.repeat(pa.scalar(value, pa.int64()), len(table)).cast(field.type)
        )
        table = table.append_column(field, column)
    return table.select(scorable(view).names)


def _whole(view: FeatureView, answers: pa.Table) -> tuple[pa.Table, list[tuple[int, str]]]:
    """(Rows with a complete spine key, (position, field) of the other rows.)"""
    named = [*view.key, view.time, "row_id", "date"]
    broken: dict[int, str] = {}
    for name in named:
        column = answers[name]
        if column.null_count:
            for position in column.is_null().to_numpy().nonzero()[0].tolist():
                broken.setdefault(position, name)
    if not broken:
        return answers, []
    kept = pa.array([position not in broken for position in range(len(answers))])
    return answers.filter(kept), sorted(broken.items())


def _dead_letter(source: str, message: Message, field: str, rule: str, position: int = -1) -> tuple[object, ...]:
    text = message.value[:200].decode("utf-8", "backslashreplace") if position < 0 else None
    return source, message.partition, message.offset, position, field, rule, text, message.timestamp


class DecodeFeatureRows(beam.DoFn):
    """Message → batches of `scorable(view)`, each with at most `most` messages of a bundle."""

    def __init__(self, view: FeatureView, most: int = BATCH_MESSAGES, by_row: bool = False) -> None:
        self.view, self.most, self.by_row = view, most, by_row

    def start_bundle(self) -> None:
        self.messages: list[Message] = []

    def process(self, message: Message) -> Iterator[pa.RecordBatch]:
        self.messages.append(message)
        if len(self.messages) >= self.most:
            yield self._batch()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.messages:
            yield WindowedValue(self._batch(), MIN_TIMESTAMP, [GlobalWindow()])

    def _batch(self) -> pa.RecordBatch:
        messages, self.messages = self.messages, []
        return to_score(self.view, messages, self.by_row)


def replayed(view: FeatureView, store: str, begin: Mapping[int, int]) -> Iterator[Message]:
    """The live feature table as messages of one partition, commit by commit, with one offset per row, from `begin` on.

    A message that marks the end comes last.

    Raises:
        StoreError: the table's log cannot be read.
    """
    uri, topic = features_live_uri(store, view.name, view.fingerprint), source_of(view)
    due, offset, arrived = begin.get(0, 0), 0, 0
    table = open_table(uri)
    if table is not None:
        inside = len(table_root(table)) + 1
        files = {file.path[inside:]: file for file in data_files(table)}
        for version in versions(uri):
            arrived = int(commit_at(uri, version).get("timestamp", 0)) * 1000
            for path in sorted(file_actions(uri, version)[0] & files.keys()):
                if offset + files[path].rows > due:
                    rows = batch(read_answers(view, files[path]), live_schema(view))
                    for start in range(max(due - offset, 0), rows.num_rows, MESSAGE_ROWS):
                        part = to_arrow(rows.slice(start, MESSAGE_ROWS))
                        yield Message(topic, 0, offset + start, arrived, f"{view.fingerprint}:replay".encode(), part)
                offset += files[path].rows
    yield Message(topic, 0, offset, arrived, *heartbeat(FOREVER))


def rows_in(view: FeatureView, store: str) -> int:
    """Number of feature rows that a replay reads."""
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    return 0 if table is None else sum(file.rows for file in data_files(table))
