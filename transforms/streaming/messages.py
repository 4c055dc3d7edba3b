"""Messages and their rows: a value is an Arrow IPC stream, JSON or an Avro container, which its first bytes show.

A row is *readable* if its columns have the declared types and its time is plausible.  Every readable row is accepted,
whichever views read its source: whether it keeps the contract of a view is decided later (see `view_contracts`).  A
declared column that a row does not have is null, and is named in `ABSENT`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from schemas.durations import microseconds
from schemas.errors import ContractError, nearest
from schemas.sources import Source
from transforms.records.columns import moments_of, select, with_series
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.contracts import IN_YEARS, Contract, all_in_years, check_rows, outside_years
from transforms.sources.conversions import Reading, converted, problem_free
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS, message_dead_letters
from transforms.streaming.avro_messages import MAGIC, avro_rows, check_avro
from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits, check_arrow, check_json, read_arrow

HEARTBEAT = b"__heartbeat"
# The declared columns that a row does not have, as a JSON list; null if it has them all.
ABSENT = "__absent"
# Columns beside the source's own: the origin of a row.
ORIGIN_TYPES = {"__partition": pl.Int32, "__offset": pl.Int64, "__place": pl.Int32, "__arrived": pl.Int64}
_NO_DEAD_LETTERS = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
_ARROW = b"\xff\xff\xff\xff"
_READABLE = "a message must be an Arrow IPC stream, JSON or an Avro container with the declared columns"
# A message that cannot be read must never stop a job, whatever error it raises, because it would stop the job again.
ANY_ERROR = (Exception, pl.exceptions.PanicException)
_JSON_TYPES: dict[type, set[type]] = {pl.String: {str}, pl.Boolean: {bool}, pl.Date: {str}, pl.Datetime: {str}}


class Message(NamedTuple):
    """A record of a topic; `timestamp` (µs) is when it arrived there.  A message with a reason in `refused` is not
    decoded."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    key: bytes | None
    value: bytes
    refused: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
    """The rows of some messages of one partition.

    Args:
        rows: the readable rows: the declared columns, `ABSENT` and `ORIGIN_TYPES`.
        dead_letters: of the other rows and messages, with the columns `MESSAGE_DEAD_LETTERS`.
        heartbeat: the greatest time (µs) up to which a heartbeat declares the partition complete, or None.
    """

    rows: pl.DataFrame
    dead_letters: pl.DataFrame
    heartbeat: int | None


def to_arrow(batch: pa.RecordBatch | pl.DataFrame) -> bytes:
    """The rows of a batch as the value of a message: an Arrow IPC stream."""
    if isinstance(batch, pl.DataFrame):
        sink = io.BytesIO()
        batch.write_ipc_stream(sink, compression="lz4", compat_level=pl.CompatLevel.oldest())
        return sink.getvalue()
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, batch.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_batch(batch)
    return bytes(buffer.getvalue())


def from_arrow(value: bytes) -> pa.RecordBatch:
    """The batch of `to_arrow`.

    Raises:
        ContractError: the bytes are not such a batch, or their schema names code to run.
    """
    try:
        check_arrow(value)
        with pa.ipc.open_stream(value) as reader:
            return reader.read_next_batch()
    except Exception as error:  # crafted bytes may raise any error
        reason = (str(error).splitlines() or [repr(error)])[0][:300]
        raise ContractError("A message of rows must be an Arrow IPC stream", reason, "") from None


def to_json(batch: pa.RecordBatch | pl.DataFrame) -> list[bytes]:
    """One value per row, in JSON; times are ISO 8601 in UTC."""
    frame = batch if isinstance(batch, pl.DataFrame) else pl.DataFrame(pl.from_arrow(batch))
    times = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.Datetime)]
    frame = frame.with_columns(pl.col(times).dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ"))
    return frame.write_ndjson().encode().splitlines()


def heartbeat(until: int) -> tuple[bytes, bytes]:
    """Key and value of a heartbeat: no row before `until` (µs since 1970) follows on its partition."""
    return HEARTBEAT, str(until).encode()


def decode(source: Source, messages: Sequence[Message], limits: MessageLimits = DEFAULT_LIMITS) -> Decoded:
    """The readable rows of one partition's messages, and dead letters of the rest."""
    (decoded,) = decode_topic(source, [messages], limits)
    return decoded


def decode_topic(
    source: Source, partitions: Sequence[Sequence[Message]], limits: MessageLimits = DEFAULT_LIMITS
) -> list[Decoded]:
    """Like `decode`, for several partitions of one topic at once, in ascending order."""
    rows = [each for messages in partitions for each in messages if each.key != HEARTBEAT]
    frames, dead_letters = _frames(source, rows, limits)
    kept = _empty(source)
    if frames:
        whole = frames[0] if len(frames) == 1 else _concat(frames)
        kept, broken = check_rows(_plausible(source), whole)
        if len(broken):
            dead_letters.append(located(source, whole, broken))
        for reject in (_ahead, _beyond_calendar):
            kept, rejected = reject(source, kept)
            dead_letters += rejected
    broken, result = pl.concat([_NO_DEAD_LETTERS, *dead_letters]) if dead_letters else _NO_DEAD_LETTERS, []
    numbers = [messages[0].partition if messages else 0 for messages in partitions]
    positions = np.searchsorted(kept["__partition"].to_numpy(), [*numbers, 2**31 - 1])
    for messages, number, start, end in zip(partitions, numbers, positions[:-1], positions[1:], strict=True):
        until, more = _promised(source, messages)
        mine = broken.filter(pl.col("partition") == number) if len(broken) and len(partitions) > 1 else broken
        result.append(Decoded(kept[int(start) : int(end)], pl.concat([mine, *more]) if more else mine, until))
    return result


def _concat(frames: list[pl.DataFrame]) -> pl.DataFrame:
    """Frames of which some may have the columns `PROBLEM`."""
    alike = len({"__rule" in each.columns for each in frames}) == 1
    return pl.concat(frames, how="vertical" if alike else "diagonal")


@functools.lru_cache(256)
def _plausible(source: Source) -> Contract:
    """The rules that every row keeps, whoever reads it."""
    return Contract(source, (), time_only=True)


def _promised(source: Source, messages: Sequence[Message]) -> tuple[int | None, list[pl.DataFrame]]:
    """Returns the greatest time of a partition's heartbeats, and dead letters of heartbeats without a valid time."""
    until, dead_letters, ahead_by = list[int](), list[pl.DataFrame](), microseconds(source.ahead, zero=True)
    for message in (each for each in messages if each.key == HEARTBEAT):
        stamp = int(message.value) if re.fullmatch(rb"-?\d{1,19}", message.value) else None
        if stamp is None or stamp < ALWAYS or (stamp > message.timestamp + ahead_by and stamp != FOREVER):
            rule = f"a heartbeat is an integer, µs since 1970, at most {source.ahead} ahead of its arrival (ahead)"
            dead_letters.append(_unreadable(source, message, rule))
        elif stamp != FOREVER or message is messages[-1]:  # an end counts only if no message follows
            until.append(stamp)
    return max(until, default=None), dead_letters


@functools.lru_cache(256)
def _empty(source: Source) -> pl.DataFrame:
    return pl.DataFrame(schema={**source.schema, ABSENT: pl.String(), **ORIGIN_TYPES})


def _frames(
    source: Source, messages: Sequence[Message], limits: MessageLimits
) -> tuple[list[pl.DataFrame], list[pl.DataFrame]]:
    """Frames of the readable messages, and dead letters of the others."""
    frames, dead_letters = [], []
    for together, group in itertools.groupby(messages, _together):
        some = list(group)
        if together is not None and len(some) > 1:
            with contextlib.suppress(*ANY_ERROR):  # all at once; if that fails, one by one
                frames.append(together(source, some, limits))
                continue
        for message in some:
            try:
                frames.append(_one(source, message, limits))
            except ANY_ERROR as error:
                reason = str(error).strip().splitlines()
                dead_letters.append(_unreadable(source, message, reason[0][:300] if reason else _READABLE))
    return frames, dead_letters


def _one(source: Source, message: Message, limits: MessageLimits) -> pl.DataFrame:
    if message.refused:
        raise ContractError(message.refused)
    together = _together(message)
    if together is not None:
        return together(source, [message], limits)
    if message.value[:4] == MAGIC:
        return _from_rows(source, _avro_rows(source, message, limits), [message])
    raise ContractError(_READABLE.capitalize(), f"{len(message.value)} bytes starting {message.value[:12]!r}", "")


def _together(message: Message) -> Callable[[Source, Sequence[Message], MessageLimits], pl.DataFrame] | None:
    """The function that reads several messages of this format at once; None if they are read one by one."""
    if message.refused:
        return None
    if message.value[:1] in (b"{", b"["):
        return _from_json
    return _from_arrow if message.value[:4] == _ARROW else None


def _from_arrow(source: Source, messages: Sequence[Message], limits: MessageLimits) -> pl.DataFrame:
    tables: list[pa.Table] = []
    for message in messages:
        place = f"{message.topic}/{message.partition}@{message.offset}"

        def check(schema: pa.Schema, place: str = place) -> None:
            given = frozenset({str(source.time), *schema.names})
            _having(source, given.intersection(source.schema)).check(schema, place)

        tables.append(read_arrow(message.value, source.schema.keys(), check, limits))
    parts = []
    for _, some in itertools.groupby(tables, lambda table: table.schema):
        whole = _in_microseconds(pa.concat_tables(some))
        frame = pl.DataFrame(
            pl.from_arrow(whole.select([name for name in source.schema if name in whole.schema.names]))
        )
        absent = [name for name in source.schema if name not in frame.columns]
        there = [
            frame[name] if name in frame.columns else pl.Series(name, [None], dtype).new_from_index(0, len(frame))
            for name, dtype in source.schema.items()
        ]
        columns = converted(pl.DataFrame(there), source.schema, _reading(source), (), _weights(source))
        text = pl.Series(ABSENT, [absent_text(absent)], pl.String).new_from_index(0, len(frame))
        parts.append(with_series(columns, [text]))
    whole = parts[0] if len(parts) == 1 else _concat(parts)
    return _with_origin(whole, messages, [len(table) for table in tables])


def _reading(source: Source) -> Reading:
    """How times of messages are read: which instant a local time is that occurs twice, nobody can tell."""
    return Reading(source.zone, source.unit, None)


def _weights(source: Source) -> dict[str, int]:
    """Every declared column counts; those first that decide whether a row is the source's."""
    return {name: place for place, name in enumerate(dict.fromkeys([*source.columns_of_where, *source.schema]))}


@functools.lru_cache(1024)
def _having(source: Source, columns: frozenset[str]) -> Contract:
    """The contract of messages that have these columns, to check their types."""
    return Contract(source, tuple(name for name in source.schema if name in columns))


def absent_text(columns: Iterable[str]) -> str | None:
    """The value of `ABSENT` of a row that does not have these columns.

    >>> absent_text(["price", "shop"])
    '["price","shop"]'
    """
    names = list(columns)
    return json.dumps(names, separators=(",", ":")) if names else None


def _in_microseconds(table: pa.Table) -> pa.Table:
    """The table with times in µs; Polars would let seconds beyond their range wrap around.

    Raises:
        pa.ArrowInvalid: a time does not fit.
    """
    for number, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type) and field.type.unit in ("s", "ms"):
            exact = table.column(number).cast(pa.timestamp("us", field.type.tz))
            table = table.set_column(number, field.name, exact)
    return table


def _from_json(source: Source, messages: Sequence[Message], limits: MessageLimits) -> pl.DataFrame:
    counts: list[int] = []
    rows: list[object] = []
    for message in messages:
        check_json(message.value, limits)
        value = json.loads(message.value)
        some = value if isinstance(value, list) else [value]
        limits.check_rows(len(some))
        rows += some
        counts.append(len(some))
    return _from_rows(source, rows, messages, counts)


def _from_rows(
    source: Source, rows: list[object], messages: Sequence[Message], counts: Sequence[int] | None = None
) -> pl.DataFrame:
    """Rows of messages as a frame.  Every row must have its time."""
    declared, time, objects, absent = source.schema.keys(), str(source.time), [], list[str | None]()
    for row in rows:
        if not isinstance(row, dict):
            raise ContractError("A message holds an object or a list of them", repr(row)[:100], "")
        if declared <= row.keys():
            absent.append(None)
        else:
            if time not in row:
                what = f"Source {source.name!r}: every row has the declared column {time!r}"
                raise ContractError(what, ", ".join(map(str, row)), nearest(time, map(str, row)))
            absent.append(absent_text(name for name in declared if name not in row))
        objects.append(row)
    columns = [
        _column(source, name, dtype, [each.get(name) for each in objects]) for name, dtype in source.schema.items()
    ]
    columns.append(pl.Series(ABSENT, absent, pl.String))
    return _with_origin(pl.DataFrame(columns), messages, [len(rows)] if counts is None else counts)


def _column(source: Source, name: str, dtype: pl.DataType, values: list[object]) -> pl.Series:
    """Python values as a column of exactly `dtype`; times may be ISO 8601 text."""
    allowed = _JSON_TYPES.get(type(dtype)) or ({int} if dtype.is_integer() else {int, float})
    found = set(map(type, values)) - {type(None)}
    if isinstance(dtype, pl.Datetime) and source.unit is not None and found <= {str, int, float}:
        return _moments(source, name, [each if each is None else str(each) for each in values])
    if (
        found == {datetime}
        and isinstance(dtype, pl.Datetime)
        and all(each.tzinfo for each in values if isinstance(each, datetime))
    ):
        return pl.Series(name, values, dtype)
    if found == {date} and dtype == pl.Date:
        return pl.Series(name, values, dtype)
    if not found <= allowed:
        raise ContractError(
            f"Source {source.name!r}: column {name!r} must be {dtype}",
            f"it has {', '.join(sorted(each.__name__ for each in found - allowed))}",
            "",
        )
    if dtype.is_integer() or dtype.is_float():
        try:
            series = pl.Series(
                name, values, pl.Int64 if dtype.is_integer() else pl.Float64, strict=not dtype.is_float()
            )
            return series.cast(dtype)
        except (OverflowError, TypeError, pl.exceptions.PolarsError):
            raise ContractError(
                f"Source {source.name!r}: column {name!r} must be {dtype}", "it has a number beyond it", ""
            ) from None
    if isinstance(dtype, pl.Datetime) and source.zone is not None:
        return _moments(source, name, values)
    series = pl.Series(name, values, pl.String if dtype.is_temporal() else dtype)
    if dtype.is_temporal():
        parsed = (
            series.str.to_date(strict=False)
            if dtype == pl.Date
            else series.str.to_datetime("%+", time_unit="us", time_zone="UTC", strict=False)
        )
        if parsed.null_count() > series.null_count():
            bad = series.filter(parsed.is_null() & series.is_not_null())[0]
            raise ContractError(
                f"Source {source.name!r}: {name!r} must be ISO 8601 with a time zone", f"it is {bad!r}", ""
            )
        return parsed
    return series


def _moments(source: Source, name: str, values: list[object]) -> pl.Series:
    """Times as text, or as numbers in the source's unit, by the rules of its files."""
    frame = pl.DataFrame([pl.Series(name, values, pl.String)])
    found = converted(frame, {name: source.schema[name]}, _reading(source))
    if not problem_free(found):
        rule, value = found.filter(pl.col("__rule").is_not_null()).row(0)[-2:]
        raise ContractError(f"Source {source.name!r}: {name!r}: {rule}", repr(value), "")
    return found[name]


def _avro_rows(source: Source, message: Message, limits: MessageLimits) -> list[object]:
    try:
        return avro_rows(message.value, source.schema.keys(), limits)
    except ContractError:
        raise
    except Exception as error:  # fastavro may raise any error on bytes that are not Avro
        raise ContractError("An Avro container must be readable", repr(error)[:200], "") from None


def _with_origin(frame: pl.DataFrame, messages: Sequence[Message], counts: Sequence[int]) -> pl.DataFrame:
    lengths = np.array(counts, np.int64)
    position = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    origin = [
        pl.Series("__partition", np.repeat(np.array([each.partition for each in messages], np.int32), lengths)),
        pl.Series("__offset", np.repeat(np.array([each.offset for each in messages], np.int64), lengths)),
        pl.Series("__place", position.astype(np.int32)),
        pl.Series("__arrived", np.repeat(np.array([each.timestamp for each in messages], np.int64), lengths)),
    ]
    return with_series(frame, origin)


def _unreadable(source: Source, message: Message, reason: str) -> pl.DataFrame:
    text = message.value[:200].decode("utf-8", "backslashreplace")
    reason = reason.encode("utf-8", "backslashreplace").decode()  # it may quote half a surrogate pair
    row = (source.name, message.partition, message.offset, -1, "", reason, text, message.timestamp)
    return pl.DataFrame([row], schema=MESSAGE_DEAD_LETTERS, orient="row")


def located(source: Source, whole: pl.DataFrame, broken: pl.DataFrame) -> pl.DataFrame:
    """The dead letters `broken` of rows of `whole` (see `check_rows`), with the origin of each."""
    at = whole[broken["place"]].select("__partition", "__offset", "__place", "__arrived")
    return broken.select(
        pl.lit(source.name).alias("source"),
        at["__partition"].alias("partition"),
        at["__offset"].alias("offset"),
        at["__place"].alias("place"),
        "field",
        "rule",
        "value",
        at["__arrived"].alias("arrived"),
    )


def _ahead(source: Source, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Rejects rows whose time is more than `ahead` after their arrival, since they would move the watermark.

    Returns:
        The other rows, and dead letters.
    """
    time = str(source.time)
    ahead = moments_of(rows, time) > rows["__arrived"].to_numpy() + microseconds(source.ahead, zero=True)
    if not ahead.any():
        return rows, []
    late = pl.Series(ahead)
    bad = rows.filter(late)
    rule = f"a time is at most {source.ahead} ahead of its arrival (ahead)"
    return rows.filter(~late), [message_dead_letters(source.name, bad, time, rule, pl.col(time).cast(pl.String))]


def _beyond_calendar(source: Source, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
    """Rejects rows with a time that no file, log or report can hold.

    Returns:
        The other rows, and dead letters.
    """
    dead_letters = []
    for name, dtype in source.schema.items():
        if dtype.is_temporal() and len(rows):
            beyond = out_of_calendar(rows[name])
            if beyond.any():
                value = pl.col(name).to_physical().cast(pl.String)
                dead_letters.append(message_dead_letters(source.name, rows.filter(beyond), name, IN_YEARS, value))
                rows = rows.filter(~beyond)
    return rows, dead_letters


def out_of_calendar(times: pl.Series) -> pl.Series:
    """Whether each date or time (µs) is outside the years 1 to 9999; False for null."""
    if all_in_years(times):
        return pl.Series(times.name, np.zeros(len(times), np.bool_))
    return select(times.to_frame("_"), outside_years(pl.col("_"), times.dtype).fill_null(False)).to_series()


# The messages of one micro-batch take at most so many bytes after decompression, not counting the last message.
EXPANDED_BYTES = 64 << 20


def expanded_size(message: Message, limits: MessageLimits = DEFAULT_LIMITS) -> int:
    """The approximate bytes to which the value of a message expands; 0 if it will be refused."""
    try:
        if message.value[:4] == _ARROW:
            return check_arrow(message.value, limits)
        if message.value[:1] in (b"{", b"["):
            return check_json(message.value, limits)
        return check_avro(message.value, limits) if message.value[:4] == MAGIC else len(message.value)
    except Exception:  # decoding it meets the same error
        return 0


def by_partition(messages: Iterable[Message]) -> Mapping[tuple[str, int], list[Message]]:
    """Messages by topic and partition, in order of offsets."""
    groups: dict[tuple[str, int], list[Message]] = {}
    for message in messages:
        groups.setdefault((message.topic, message.partition), []).append(message)
    for some in groups.values():
        if any(b.offset < a.offset for a, b in itertools.pairwise(some)):
            some.sort(key=lambda each: each.offset)
    return groups
