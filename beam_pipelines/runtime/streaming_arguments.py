"""Flags that the two live pipelines share: where messages come from, the broker, where results go, and lengths of time."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence

from beam_pipelines.runtime.arguments import Arguments
from schemas.durations import microseconds
from schemas.errors import DefinitionError
from transforms.streaming.kafka import Broker


@dataclasses.dataclass(frozen=True)
class Length:
    """A flag whose value is a length of time, such as `10s`."""

    name: str
    default: str
    help: str
    zero: bool = True  # whether 0 is allowed


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingFlags:
    """Values of the shared flags.

    Args:
        replaying: messages come from a replay, not from Kafka.
        broker: None where none is named.
        prefix: before the name of every topic.
        sinks: "table", "topic" or both.
        lengths: µs by the flag's name.
    """

    replaying: bool
    broker: Broker | None
    prefix: str
    sinks: tuple[str, ...]
    lengths: Mapping[str, int]


class StreamingArguments(Arguments):
    """The parser of a live pipeline: `Arguments`, with the shared flags.

    Args:
        source: what --source means.
        results: what the pipeline writes, for the help of --sink.
        lengths: flags whose values are lengths of time.
    """

    def __init__(self, prog: str, description: str, source: str, results: str, lengths: Sequence[Length]) -> None:
        super().__init__(prog, description)
        self.lengths = tuple(lengths)
        self.add_argument("--streaming", action="store_true", help="live: this pipeline")
        self.add_argument("--source", choices=("kafka", "replay"), default="replay", help=f"{source} (default: replay)")
        self.add_argument("--bootstrap", help="kafka: HOST:PORT of a broker")
        self.add_argument(
            "--expansion_service",
            help="kafka: HOST:PORT of Beam's KafkaIO expansion service (default: Beam fetches one)",
        )
        self.add_argument("--topic_prefix", default="", help="before the name of every topic")
        self.add_argument(
            "--sink",
            choices=("table", "topic", "both"),
            help=f"where {results} go (default: both with kafka, table with replay)",
        )
        for each in self.lengths:
            self.add_argument(f"--{each.name}", default=each.default, help=f"{each.help} (default {each.default})")

    def shared(self, flags: argparse.Namespace) -> StreamingFlags:
        """Values of the shared flags.

        Raises:
            DefinitionError: a value is not a length of time, or a broker is needed and not named.
        """
        lengths = {
            each.name: microseconds(getattr(flags, each.name), f"--{each.name}", zero=each.zero)
            for each in self.lengths
        }
        replaying = flags.source == "replay"
        if not replaying and flags.bootstrap is None:
            fix = "Add --bootstrap HOST:PORT, or --source replay"
            raise DefinitionError("Live from Kafka, a broker is named", "no --bootstrap", fix)
        sink = flags.sink or ("table" if replaying else "both")
        if sink != "table" and flags.bootstrap is None:
            fix = "Add --bootstrap HOST:PORT, or --sink table"
            raise DefinitionError("A topic is written to a broker", "no --bootstrap", fix)
        return StreamingFlags(
            replaying=replaying,
            broker=Broker(flags.bootstrap, flags.expansion_service) if flags.bootstrap else None,
            prefix=flags.topic_prefix,
            sinks=("table", "topic") if sink == "both" else (sink,),
            lengths=lengths,
        )
