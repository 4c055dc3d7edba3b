"""Live features: messages → journal → shards → assembled feature rows → tables.  The graph is the same on every runner.

Each stateful step is a plain object (`Journal`, `Shard`, `PendingTurns`) whose state Beam keeps (see `mirrored_state`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import polars as pl
from apache_beam import typehints
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from schemas.live import joined_sources, live_schema, live_sources, newest_versions
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.record_batches import batch
from transforms.records.times import now_us
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
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits
from transforms.streaming.messages import EXPANDED_BYTES, Message, by_partition, decode_topic, expanded_size
from transforms.streaming.micro_batches import MicroBatch, micro_batch_envelope
from transforms.streaming.mirrored_state import SINGLE_KEY, KeyedBytes
from transforms.streaming.shard_dofns import AssembleDoFn, CommitDoFn, ShardDoFn
from transforms.streaming.step_messages import TurnEntry, TurnFeatures, commit_input_of, has_dead_letters

# An envelope is sent once the values of its messages have this many bytes: some fifty thousand rows of a backlog.
ENVELOPE_BYTES = 2 << 20


@dataclasses.dataclass(eq=False)  # Beam sets the label
class LiveFeatures(beam.PTransform):
    """PCollection of envelopes (see `Decode…` and `to_journal`) → PCollection of commits: (key, their status as JSON).

    There is no PCollection of feature rows: a runner would compute it even if nothing read it, and feature rows are in
        their topic and table.

    Args:
        views: the views whose features are computed, the newest definition first.
        live: the settings.
        sends: the topics of feature rows and dead letters; None: there are none.  Rows are committed to a table after
            the broker has acknowledged them, so that a topic always has everything that a table has.
    """

    views: Sequence[FeatureView]
    live: LiveSettings
    sends: Sends | None = None

    def expand(self, envelopes: beam.PCollection) -> beam.PCollection:
        views, live = tuple(self.views), self.live
        step = JournalDoFn if not live.pace else TimedJournalDoFn
        inside = live.shards == 1  # the shard is in the journal's step
        tags = ("features",) if inside else ("shards", "spine_rows")
        journal = envelopes | "Journal" >> _keyed_step(step(views, live), *tags, "entries")
        if not inside:
            parts = _pairs(journal.shards) | "Shard" >> _keyed_step(ShardDoFn(views, live))
            both = (_pairs(journal.spine_rows), parts) | "Parts" >> beam.Flatten()
            assembled = both | "Assemble" >> _keyed_step(AssembleDoFn(views, live), "features")
        entries, features = _pairs(journal.entries), _pairs(journal.features if inside else assembled.features)
        if self.sends is not None:
            entries = entries | "DeadLetters" >> Produce(self.sends.broker, self.sends.dead_letters)
            features = features | "FeatureRows" >> Produce(self.sends.broker, self.sends.feature_rows)
        turns = (entries, features) | "Turns" >> beam.Flatten()
        return turns | "Commit" >> _keyed_step(CommitDoFn(views, live))


@dataclasses.dataclass(frozen=True, eq=False)
class Sends:
    """The topics of feature rows and dead letters.

    Args:
        views: the views, the newest definition first.  The feature rows of further versions of a view have no topic.
        broker: the broker of the topics.
        prefix: prefix of their names.
        most: the most bytes of a message with feature rows.
    """

    views: tuple[FeatureView, ...]
    broker: Broker
    prefix: str
    most: int

    def feature_rows(self, pair: KeyedBytes) -> Iterator[tuple[str, bytes, bytes]]:
        """The feature rows of a turn as messages, and the dead letters about dimensions."""
        features = commit_input_of(pair[1])
        assert isinstance(features, TurnFeatures)
        view = self.views[features.view]
        if view in newest_versions(self.views):
            rows = batch(features.rows, live_schema(view))
            for key, value in feature_row_messages(rows, view.fingerprint, self.most):
                yield topic_of(view, self.prefix), key, value
        yield from self._messages(view, features.dead_letters)

    def dead_letters(self, pair: KeyedBytes) -> Iterator[tuple[str, bytes, bytes]]:
        """The dead letters of a turn's entry as messages."""
        if not has_dead_letters(pair[1]):
            return
        entry = commit_input_of(pair[1])
        assert isinstance(entry, TurnEntry)
        for view in newest_versions(self.views):
            mine = entry.unreadable.filter(pl.col("source").is_in(list(live_sources(view))))
            yield from self._messages(view, mine)
        for number, each in entry.dead_letters.items():
            yield from self._messages(self.views[number], each)

    def _messages(self, view: FeatureView, dead_letters: pl.DataFrame) -> Iterator[tuple[str, bytes, bytes]]:
        for key, value in dead_letter_messages(dead_letters):
            yield dead_letters_topic(view, self.prefix), key, value


def _pairs(pairs: beam.PCollection) -> beam.PCollection:
    pairs.element_type = typehints.Tuple[bytes, bytes]
    return pairs


def to_journal() -> beam.PTransform:
    """PCollection of envelopes (bytes) → the same, with the key of the journal."""
    return beam.Map(lambda envelope: (SINGLE_KEY, envelope)).with_output_types(KeyedBytes)


def _keyed_step(step: beam.DoFn, *tags: str) -> beam.PTransform:
    done = beam.ParDo(step).with_output_types(KeyedBytes)
    return done.with_outputs(*tags) if tags else done


def decode_messages(
    sources: Mapping[str, Source],
    messages: Iterable[Message],
    prefix: str = "",
    index: int | None = None,
    received: int = 0,
    limits: MessageLimits = DEFAULT_LIMITS,
) -> bytes:
    """Messages of any topics and partitions as one envelope for the journal.

    Args:
        sources: by name.
        messages: see above.
        prefix: of the names of topics.
        index: position in the order of a replay.
        received: when the messages were received, µs.
        limits: the most that a message may contain.
    """
    micro_batches, arrived = [], 0
    for topic, group in itertools.groupby(sorted(by_partition(messages).items()), lambda each: each[0][0]):
        source, partitions = topic.removeprefix(prefix), [some for _, some in group]
        for some, held in zip(partitions, decode_topic(sources[source], partitions, limits), strict=True):
            micro_batches.append(
                MicroBatch(
                    source=source,
                    partition=some[0].partition,
                    first=some[0].offset,
                    next=some[-1].offset + 1,
                    messages=len(some),
                    heartbeat=held.heartbeat,
                    rows=held.rows,
                    dead_letters=held.dead_letters,
                    received=received,
                )
            )
            arrived = max(arrived, *(each.timestamp for each in some), 0)
    return micro_batch_envelope(micro_batches, arrived, index)


def decode_alone(views: Sequence[FeatureView], prefix: str, limits: MessageLimits, message: Message) -> None:
    """Decodes one message, to see whether the process survives it."""
    decode_messages(joined_sources(views), [message], prefix, limits=limits)


class DecodeChunks(beam.DoFn):
    """(number, messages) of a replay → envelope."""

    def __init__(self, views: Sequence[FeatureView], prefix: str = "") -> None:
        self.views, self.prefix = tuple(views), prefix

    def setup(self) -> None:
        self.sources = joined_sources(self.views)

    def process(self, chunk: tuple[int, list[Message]]) -> Iterator[bytes]:
        yield decode_messages(self.sources, chunk[1], self.prefix, chunk[0])


class DecodeBundles(beam.DoFn):
    """Message → envelopes: one for the messages of a bundle, or several for many, so that a backlog takes many turns.

    Args:
        views: the views whose sources have these topics.
        prefix: prefix of the names of topics.
        guard: folder of the crash guard; None: there is none.
        limits: the most that a message may contain.
    """

    def __init__(
        self,
        views: Sequence[FeatureView],
        prefix: str = "",
        guard: str | None = None,
        limits: MessageLimits = DEFAULT_LIMITS,
    ) -> None:
        self.views, self.prefix, self.folder, self.limits = tuple(views), prefix, guard, limits

    def setup(self) -> None:
        self.sources = joined_sources(self.views)
        self.guard = CrashGuard(self.folder, functools.partial(decode_alone, self.views, self.prefix, self.limits))

    def teardown(self) -> None:
        self.guard.close()

    def start_bundle(self) -> None:
        self.messages: list[Message] = []
        self.bytes = self.expanded = 0

    def process(self, message: Message) -> Iterator[WindowedValue]:
        # The timestamp may be missing (−1), or from the clock of its producer, which may be wrong.
        now = now_us()
        self.messages.append(message if 0 < message.timestamp <= now else message._replace(timestamp=now))
        self.bytes += len(message.value)
        self.expanded += expanded_size(message, self.limits)
        if self.bytes >= ENVELOPE_BYTES or self.expanded >= EXPANDED_BYTES:
            yield from self.finish_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.messages:
            with self.guard.decoding(self.messages) as messages:
                envelope = decode_messages(self.sources, messages, self.prefix, None, now_us(), self.limits)
            self.messages, self.bytes, self.expanded = [], 0, 0
            yield WindowedValue(envelope, MIN_TIMESTAMP, [GlobalWindow()])
