"""Micro-batches: decoded messages of a partition, on their way to the journal; and how rows and cuts are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from schemas.views import FeatureView
from transforms.records.frame_packets import pack, unpack
from transforms.records.row_hashing import UInt64s, combine, hash_column
from transforms.records.times import FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.streaming.messages import Decoded
from transforms.streaming.shards import RID

ORIGIN_COLUMNS = ["__partition", "__offset", "__place"]
# How long a hole in a partition's offsets is waited on before Kafka is asked what is in it, and before it is asked again when
# a record is (µs).  Every transaction ends in a hole, so the former is what its rows wait for.  Where nobody can be asked, a
# hole is waited on for the latter.
GAP_PATIENCE, AGAIN = 100_000, 2_000_000
# Counts offsets at which nothing was: deleted before they were read, compacted away, or a transaction's own.
SKIPPED = "offsets_skipped"
# The first offset at or after one of a partition (source, partition, offset) at which its topic has a record.
NextAvailable = Callable[[str, int, int], int]


@dataclasses.dataclass(eq=False)
class MicroBatch:
    """Messages `[first, next)` of one partition, decoded.  `received`: when the journal got it."""

    source: str
    partition: int
    first: int
    next: int
    messages: int
    heartbeat: int | None
    rows: pl.DataFrame
    dead_letters: pl.DataFrame
    received: int = 0


def micro_batch_envelope(
    parts: Sequence[tuple[str, int, int, int, int, Decoded]],
    arrived: int,
    index: int | None = None,
    received: int = 0,
    more: Mapping[str, Any] | None = None,
) -> bytes:
    """Decoded messages of some partitions (source, partition, first, next, messages, what they held) as one packet.

    Args:
        parts: see above.
        arrived: when the last of the messages did, µs.
        index: place in the order of a replay.
        came: when Millrace got them, µs; a hole before them is waited on from then.
        more: further entries of the head.
    """
    head, frames, rows = [], dict[str, pl.DataFrame](), dict[str, list[pl.DataFrame]]()
    for i, (source, partition, first, after, messages, held) in enumerate(parts):
        head.append([source, partition, first, after, messages, held.heartbeat, len(held.rows)])
        rows.setdefault(source, []).append(held.rows)
        if len(held.dead_letters):
            frames[f"{i}l"] = held.dead_letters
    frames |= {
        f"r:{source}": pl.concat(some, rechunk=True) for source, some in rows.items()
    }  # one costs less than many
    return pack(
        {"kind": "micro", "index": index, "arrived": arrived, "came": received, "parts": head, **(more or {})}, frames
    )


def micro_batches_of(envelope: bytes) -> list[MicroBatch]:
    head, frames = unpack(envelope)
    none, result, taken = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS), [], dict[str, int]()
    for i, (source, partition, first, after, messages, beat, count) in enumerate(head["parts"]):
        start = taken.get(source, 0)
        taken[source] = start + count
        rows, dead_letters = frames[f"r:{source}"][start : start + count], frames.get(f"{i}l", none)
        result.append(MicroBatch(source, partition, first, after, messages, beat, rows, dead_letters, head["came"]))
    return result


def envelopes_of(waiting: Sequence[MicroBatch]) -> list[bytes]:
    """Each micro-batch as a packet of its own again."""
    return [
        micro_batch_envelope(
            [
                (
                    each.source,
                    each.partition,
                    each.first,
                    each.next,
                    each.messages,
                    Decoded(each.rows, each.dead_letters, each.heartbeat),
                )
            ],
            0,
            received=each.received,
        )
        for each in waiting
    ]


def no_topic(source: str, partition: int, offset: int) -> int:
    """A `NextAvailable` that knows of no topic."""
    return FOREVER


def in_order(
    inbox: Sequence[MicroBatch],
    due: Mapping[str, Mapping[int, int]],
    now: int,
    count: Callable[[str, str, int], None],
    next_available: NextAvailable = no_topic,
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """(Micro-batches whose turn it is, in order of offsets; those that wait for one before them.)

    The one before may be on its way still, on a worker that is slow or was frozen.  Or there is none, since Kafka
    deleted it, compacted it away or keeps the offset to itself (a transaction's end): `next_available` knows.

    Args:
        inbox: of any partitions, in any order.
        due: next offset per source and partition.
        now: a hole that is waited on since `GAP_PATIENCE` is asked about.
        count: told of (source, what, how many) that came again or were passed over.
        next_there: see `NextAvailable`.
    """
    admitted: list[MicroBatch] = []
    waiting: list[MicroBatch] = []
    expected = {name: dict(each) for name, each in due.items()}
    for micro_batch in sorted(inbox, key=lambda each: (each.source, each.partition, each.first)):
        next_one = expected[micro_batch.source].get(micro_batch.partition)
        if next_one is not None and micro_batch.first > next_one:
            behind = bool(waiting) and (waiting[-1].source, waiting[-1].partition) == (
                micro_batch.source,
                micro_batch.partition,
            )
            if behind or now - micro_batch.received < (AGAIN if next_available is no_topic else GAP_PATIENCE):
                waiting.append(micro_batch)
                continue
            if next_available(micro_batch.source, micro_batch.partition, next_one) < micro_batch.first:
                waiting.append(dataclasses.replace(micro_batch, received=now + AGAIN - GAP_PATIENCE))
                continue
            count(micro_batch.source, SKIPPED, micro_batch.first - next_one)
        if next_one is not None and micro_batch.next <= next_one and micro_batch.messages:
            count(micro_batch.source, "messages_again", micro_batch.messages)
            continue
        admitted.append(micro_batch)
        expected[micro_batch.source][micro_batch.partition] = micro_batch.next
    return admitted, waiting


def known_columns(view: FeatureView, name: str) -> list[str]:
    """What is kept of a source's rows to tell which of two repeats stays: what ties are broken by."""
    return list(view.spine.schema) if view.events[name] is view.spine else view.columns_held(name)


def row_identity(rows: pl.DataFrame) -> pl.Series:
    """A row's identity by where it came from."""
    return pl.Series(
        RID, combine([hash_column(rows[name]) for name in ORIGIN_COLUMNS]).view(np.int64) if len(rows) else [], pl.Int64
    )


def digest(rows: pl.DataFrame, columns: Sequence[str]) -> pl.Series:
    """Hash of the rows' content."""
    if not len(rows):
        return pl.Series("__digest", [], pl.UInt64)
    parts: list[UInt64s] = []
    for name in columns:
        column = rows[name]
        if column.dtype.is_float():
            column = column.cast(pl.Float64).reinterpret(signed=True)
        parts.append(hash_column(column))
    return pl.Series("__digest", combine(parts))


def cut_of(text: str) -> dict[tuple[str, int], int]:
    """A cut's text as (source, partition) → next offset."""
    pairs = (part.rsplit(":", 1) for part in text.split(",") if part)
    return {(position.rsplit("/", 1)[0], int(position.rsplit("/", 1)[1])): int(offset) for position, offset in pairs}
