"""Micro-batches: the decoded messages of a partition, on their way to the journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import polars as pl

from transforms.records.frame_packets import Head, pack, unpack
from transforms.records.times import FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS

# A gap in a partition's offsets stays open for GAP_PATIENCE µs before Kafka is queried for the records in it. If there
# is one, it stays open for AGAIN µs until the next query.  Every transaction ends with a gap, so its rows wait for
# GAP_PATIENCE.  If there is no Kafka to query, a gap stays open for AGAIN.
GAP_PATIENCE, AGAIN = 100_000, 2_000_000
_NO_DEAD_LETTERS = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
# Counts the offsets without a record: deleted before they were read, compacted away, or used by a transaction itself.
SKIPPED = "offsets_skipped"
# (source, partition, offset) → the first offset at or after this one at which the topic has a record.
NextAvailable = Callable[[str, int, int], int]


@dataclasses.dataclass(eq=False)
class MicroBatch:
    """Messages `[first, next)` of one partition, decoded.

    Args:
        source, partition: source and partition of the messages.
        first: the first offset.
        next: the offset after the last.
        messages: number of messages.
        heartbeat: the greatest time (µs) up to which a heartbeat declares the partition complete, or None.
        rows: the readable rows, with `ABSENT` and their origin (see `messages`).
        dead_letters: the dead letters, with the columns `MESSAGE_DEAD_LETTERS`.
        received: when the job received the messages, µs; a gap before them counts as open from then on.
    """

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
    micro_batches: Sequence[MicroBatch], arrived: int = 0, index: int | None = None, more: Head | None = None
) -> bytes:
    """Micro-batches that were received at one time, as one envelope.

    Args:
        micro_batches: micro-batches of any partitions.
        arrived: when the last of their messages arrived, µs.
        index: position in the order of a replay.
        more: further entries of the head.
    """
    head, frames, rows = [], dict[str, pl.DataFrame](), dict[str, list[pl.DataFrame]]()
    for i, each in enumerate(micro_batches):
        ranges = [each.source, each.partition, each.first, each.next, each.messages, each.heartbeat, len(each.rows)]
        head.append(ranges)
        rows.setdefault(each.source, []).append(each.rows)
        if len(each.dead_letters):
            frames[f"{i}l"] = each.dead_letters
    # Encoding one frame per source is faster than one per partition.
    frames |= {f"r:{source}": _joined(some) for source, some in rows.items()}
    received = micro_batches[0].received if micro_batches else 0
    return pack(
        {"kind": "micro", "index": index, "arrived": arrived, "came": received, "parts": head, **(more or {})}, frames
    )


def _joined(parts: Sequence[pl.DataFrame]) -> pl.DataFrame:
    filled = [each for each in parts if len(each)] or parts[:1]
    return filled[0].rechunk() if len(filled) == 1 else pl.concat(filled, rechunk=True)


def micro_batches_of(envelope: bytes) -> list[MicroBatch]:
    """The micro-batches of `micro_batch_envelope`."""
    head, frames = unpack(envelope)
    none, result, taken = _NO_DEAD_LETTERS, [], dict[str, int]()
    for i, (source, partition, first, after, messages, heartbeat, count) in enumerate(head["parts"]):
        start = taken.get(source, 0)
        taken[source] = start + count
        rows, dead_letters = frames[f"r:{source}"][start : start + count], frames.get(f"{i}l", none)
        result.append(
            MicroBatch(source, partition, first, after, messages, heartbeat, rows, dead_letters, head["came"])
        )
    return result


def envelopes_of(waiting: Sequence[MicroBatch]) -> list[bytes]:
    """Each micro-batch as an envelope of its own."""
    return [micro_batch_envelope([each]) for each in waiting]


def no_topic(source: str, partition: int, offset: int) -> int:
    """A `NextAvailable` that knows of no topic."""
    return FOREVER


def admissible(
    inbox: Sequence[MicroBatch],
    due: Mapping[str, Mapping[int, int]],
    now: int,
    count: Callable[[str, str, int], None],
    next_available: NextAvailable = no_topic,
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """Sorts micro-batches into those that can be admitted and those that wait for an earlier one.

    The earlier one may still be on its way, on a slow or frozen worker.  Or there is none, because Kafka deleted it,
    compacted it away or uses the offset itself (the end of a transaction); `next_available` finds out.

    Args:
        inbox: micro-batches of any partitions, in any order.
        due: next offset by source and partition.
        now: µs; a gap that has been open for `GAP_PATIENCE` is looked up.
        count: called with (source, what, number) of messages that are repeated and of offsets that are skipped.
        next_available: see `NextAvailable`.

    Returns:
        The micro-batches that can be admitted, in order of offsets, and the others.
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
