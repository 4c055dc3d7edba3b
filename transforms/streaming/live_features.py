"""Live features: messages → journal → shards → assembled answers → tables.  One graph for every runner.

Each stateful step is a plain object (`Journal`, `Shard`, `Ledger`) whose state Beam keeps (see `state`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import apache_beam as beam
from apache_beam import typehints
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from schemas.live import live_schema
from schemas.views import FeatureView
from transforms.records.frame_packets import head_of, unpack
from transforms.records.record_batches import batch
from transforms.records.times import now_us
from transforms.sources.contracts import Contract
from transforms.streaming.crash_guard import CrashGuard
from transforms.streaming.journal_dofn import JournalDoFn, TimedJournalDoFn
from transforms.streaming.kafka import (
    Broker,
    Produce,
    dead_letter_messages,
    dead_letters_topic,
    feature_row_messages,
    topic_of,
)
from transforms.streaming.messages import EXPANDED_BYTES, Message, by_partition, decode_topic, expanded_size
from transforms.streaming.micro_batches import micro_batch_envelope
from transforms.streaming.mirrored_state import SINGLE_KEY, KeyedBytes, LiveSettings
from transforms.streaming.shard_dofns import AssembleDoFn, CommitDoFn, ShardDoFn

# Values of messages that one packet, and so one turn, takes in at most and one more: some fifty thousand rows of a backlog.
ENVELOPE_BYTES = 2 << 20


@dataclasses.dataclass(eq=False)  # Beam sets the label
class LiveFeatures(beam.PTransform):
    """PCollection of packets (see `Decode…` and `to_journal`) → PCollection of commits: (key, what the tables were told as JSON).

    It gives no PCollection of answers: one that nobody reads is worked through all the same, and they are on their topic and in
    their table.

    Args:
        view: what to compute.
        live: how.
        sends: topics that answers and letters go to.  Tables are told of them once their topic has them, so that whatever
            moment a job ends at, no topic lacks what a table holds.
    """

    view: FeatureView
    live: LiveSettings
    sends: Sends | None = None

    def expand(self, envelopes: beam.PCollection) -> beam.PCollection:
        view, live = self.view, self.live
        step = JournalDoFn if not live.pace else TimedJournalDoFn
        inside = live.shards == 1  # the shard is in the journal's step
        tags = ("answers",) if inside else ("shards", "spine_rows")
        journal = envelopes | "Journal" >> _keyed_step(step(view, live), *tags, "entries")
        if not inside:
            parts = _pairs(journal.shards) | "Shard" >> _keyed_step(ShardDoFn(view, live))
            asked = (_pairs(journal.spine_rows), parts) | "Parts" >> beam.Flatten()
            assembled = asked | "Assemble" >> _keyed_step(AssembleDoFn(view, live), "answers")
        entries, answers = _pairs(journal.entries), _pairs(journal.answers if inside else assembled.answers)
        if self.sends is not None:
            entries = entries | "Letters" >> Produce(self.sends.broker, self.sends.dead_letters)
            answers = answers | "Answers" >> Produce(self.sends.broker, self.sends.answers)
        ledger = (entries, answers) | "Turns" >> beam.Flatten()
        return ledger | "Commit" >> _keyed_step(CommitDoFn(view, live))


@dataclasses.dataclass(frozen=True, eq=False)
class Sends:
    """Where answers and letters are sent.

    Args:
        view: what was asked.
        broker: where the topics are.
        prefix: before their names.
        most: bytes that a message of answers may have.
    """

    view: FeatureView
    broker: Broker
    prefix: str
    most: int

    def answers(self, pair: KeyedBytes) -> Iterator[tuple[str, bytes, bytes]]:
        rows = batch(unpack(pair[1])[1]["rows"], live_schema(self.view))
        for key, value in feature_row_messages(rows, self.view.fingerprint, self.most):
            yield topic_of(self.view, self.prefix), key, value
        yield from self.dead_letters(pair)  # about dimensions

    def dead_letters(self, pair: KeyedBytes) -> Iterator[tuple[str, bytes, bytes]]:
        if head_of(pair[1]).get("letters"):
            for key, value in dead_letter_messages(unpack(pair[1])[1]["letters"]):
                yield dead_letters_topic(self.view, self.prefix), key, value


def _pairs(pairs: beam.PCollection) -> beam.PCollection:
    pairs.element_type = typehints.Tuple[bytes, bytes]
    return pairs


def to_journal() -> beam.PTransform:
    """PCollection of packets (bytes) → the same, addressed to the journal."""
    return beam.Map(lambda envelope: (SINGLE_KEY, envelope)).with_output_types(KeyedBytes)


def _keyed_step(step: beam.DoFn, *tags: str) -> Any:
    done = beam.ParDo(step).with_output_types(KeyedBytes)
    return done.with_outputs(*tags) if tags else done


def contracts_of(view: FeatureView) -> dict[str, Contract]:
    """What rows of each topic are judged by: the columns that features read, all of a spine's."""
    spine = Contract(view.spine, tuple(view.spine.schema), tuple(view.key))
    return {
        view.spine.name: spine,
        **{
            name: Contract(source, tuple(view.columns_read(name)))  # rows hold all declared columns anyway
            for name, source in view.events.items()
            if source is not view.spine
        },
    }


def decoded(
    contracts: Mapping[str, Contract],
    messages: Iterable[Message],
    prefix: str = "",
    index: int | None = None,
    received: int = 0,
) -> bytes:
    """Messages of any topics and partitions as one packet for the journal."""
    parts, arrived = [], 0
    for topic, group in itertools.groupby(sorted(by_partition(messages).items()), lambda each: each[0][0]):
        source, partitions = topic.removeprefix(prefix), [some for _, some in group]
        for some, held in zip(partitions, decode_topic(contracts[source], partitions), strict=True):
            parts.append((source, some[0].partition, some[0].offset, some[-1].offset + 1, len(some), held))
            arrived = max(arrived, *(each.timestamp for each in some), 0)
    return micro_batch_envelope(parts, arrived, index, received)


def decode_alone(view: FeatureView, prefix: str, message: Message) -> None:
    """Decodes one message, to see whether the process survives it."""
    decoded(contracts_of(view), [message], prefix)


class DecodeChunks(beam.DoFn):
    """(number, messages) of a replay → packet."""

    def __init__(self, view: FeatureView, prefix: str = "") -> None:
        self.view, self.prefix = view, prefix

    def setup(self) -> None:
        self.contracts = contracts_of(self.view)

    def process(self, chunk: tuple[int, list[Message]]) -> Iterator[bytes]:
        yield decoded(self.contracts, chunk[1], self.prefix, chunk[0])


class DecodeBundles(beam.DoFn):
    """Message → packets, one for all messages of a bundle; more where these are many, so that a backlog takes many turns.

    Args:
        view: whose sources the messages are of.
        prefix: before the names of topics.
        guard: folder of the crash guard; None: none.
    """

    def __init__(self, view: FeatureView, prefix: str = "", guard: str | None = None) -> None:
        self.view, self.prefix, self.folder = view, prefix, guard

    def setup(self) -> None:
        self.contracts = contracts_of(self.view)
        self.guard = CrashGuard(self.folder, functools.partial(decode_alone, self.view, self.prefix))

    def teardown(self) -> None:
        self.guard.close()

    def start_bundle(self) -> None:
        self.messages: list[Message] = []
        self.bytes = self.expanded = 0

    def process(self, message: Message) -> Iterator[WindowedValue]:
        # It says itself when it arrived, perhaps by its producer's clock, which may be wrong, or not at all (−1).
        now = now_us()
        self.messages.append(message if 0 < message.timestamp <= now else message._replace(timestamp=now))
        self.bytes += len(message.value)
        self.expanded += expanded_size(message)
        if self.bytes >= ENVELOPE_BYTES or self.expanded >= EXPANDED_BYTES:
            yield from self.finish_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.messages:
            with self.guard.decoding(self.messages) as messages:
                envelope = decoded(self.contracts, messages, self.prefix, received=now_us())
            self.messages, self.bytes, self.expanded = [], 0, 0
            yield WindowedValue(envelope, MIN_TIMESTAMP, [GlobalWindow()])
