"""The graph of a live job without its work: what KafkaIO, the runner and Beam's worker take for themselves.

The steps are those of a live job with one shard: messages of a bundle become envelopes of as many bytes, all envelopes
go to one key with state, from there one element per envelope to a topic, and to a second step with one key.  Nothing is
decoded, no row is looked at, and no table is written.

    python -m benchmarks.streaming_empty --bootstrap H:P --expansion_service H:P --topic NAME [any Beam option]
"""

from __future__ import annotations

import argparse
import sys
import uuid
from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.coders import BytesCoder
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.userstate import BagStateSpec, ReadModifyWriteStateSpec
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from benchmarks.streaming_rig import DEFINITION
from schemas.live import live_sources
from schemas.loading import load_definition
from transforms.streaming import BagState, KeyedBytes, ValueState
from transforms.streaming.kafka import Broker, Produce, ReadTopics, begin_offsets, set_group_offsets
from transforms.streaming.live_features import ENVELOPE_BYTES
from transforms.streaming.messages import Message

KEY = b"0"


class Envelopes(beam.DoFn):
    """Message → (key, envelope): the values of a bundle's messages, after their number."""

    def start_bundle(self) -> None:
        self.values: list[bytes] = []
        self.bytes = 0

    def process(self, message: Message) -> Iterator[WindowedValue]:
        self.values.append(message.value)
        self.bytes += len(message.value)
        if self.bytes >= ENVELOPE_BYTES:
            yield from self.finish_bundle()

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.values:
            envelope = b"%d\n" % len(self.values) + b"".join(self.values)
            self.values, self.bytes = [], 0
            yield WindowedValue((KEY, envelope), MIN_TIMESTAMP, [GlobalWindow()])


class Stateful(beam.DoFn):
    """(Key, envelope) → (key, its first line): the element is kept in state until the next one comes."""

    HEAD, BAG = ReadModifyWriteStateSpec("head", BytesCoder()), BagStateSpec("bag", BytesCoder())

    def process(
        self,
        element: KeyedBytes,
        head: ValueState = beam.DoFn.StateParam(HEAD),
        bag: BagState = beam.DoFn.StateParam(BAG),
    ) -> Iterator[KeyedBytes]:
        key, envelope = element
        head.write(b"%d" % (int(head.read() or b"0") + 1))
        bag.clear()
        bag.add(envelope)
        yield key, envelope[: envelope.index(b"\n") + 1]


class Counts:
    """The message of an envelope: how many messages it had."""

    def __init__(self, topic: str) -> None:
        self.topic = topic

    def __call__(self, pair: KeyedBytes) -> list[tuple[str, bytes, bytes]]:
        return [(self.topic, b"", pair[1].strip())]


def main(argv: Sequence[str]) -> int:
    """Runs until it is stopped."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "expansion_service", "topic"):
        parser.add_argument(f"--{name}", required=True)
    flags, rest = parser.parse_known_args(argv)
    broker = Broker(flags.bootstrap, flags.expansion_service)
    topics = tuple(live_sources(load_definition(DEFINITION).view))
    group = f"empty-{uuid.uuid4().hex[:8]}"
    set_group_offsets(broker, group, begin_offsets(broker, topics))

    pipeline = beam.Pipeline(options=PipelineOptions(["--streaming", *rest]))
    envelopes = (
        pipeline
        | "Topics" >> ReadTopics(broker, topics, group)
        | "Envelopes" >> beam.ParDo(Envelopes()).with_output_types(KeyedBytes)
    )
    turns = envelopes | "Journal" >> beam.ParDo(Stateful()).with_output_types(KeyedBytes)
    sent = turns | "Send" >> Produce(broker, Counts(flags.topic))
    _ = sent | "Commit" >> beam.ParDo(Stateful()).with_output_types(KeyedBytes)
    result = pipeline.run()
    print("running: until it is stopped", flush=True)
    result.wait_until_finish()
    return 0


if __name__ == "__main__":
    from benchmarks import streaming_empty

    sys.exit(streaming_empty.main(sys.argv[1:]))
