"""The flags that the two live pipelines share: definition, store, source of messages, broker, sinks, intervals."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence

from beam_pipelines.runtime.arguments import Arguments, whole
from beam_pipelines.runtime.protection import hide
from schemas.durations import microseconds
from schemas.errors import DefinitionError
from schemas.loading import load_definition
from transforms.streaming.kafka import Broker
from transforms.streaming.kafka_properties import read_properties, secrets_of
from transforms.streaming.live_job import LiveJob
from transforms.streaming.message_limits import DEFAULT_LIMITS, MessageLimits

# Flag → its default, its greatest value, and what it limits.  Python's stack bounds the depth.
LIMIT_FLAGS = {
    "max_message_rows": (DEFAULT_LIMITS.rows, 2**31 - 1, "rows"),
    "max_message_mb": (DEFAULT_LIMITS.expanded_bytes >> 20, 1 << 14, "MiB once it is decompressed"),
    "max_message_columns": (DEFAULT_LIMITS.columns, 1_000_000, "columns"),
    "max_message_depth": (DEFAULT_LIMITS.depth, 500, "levels of nested JSON, or of an Avro schema,"),
}


@dataclasses.dataclass(frozen=True)
class Length:
    """A flag whose value is a length of time, such as `10s`."""

    name: str
    default: str
    help: str
    zero: bool = True  # whether 0 is allowed


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingOptions:
    """The values of the shared flags.

    Args:
        job: where the job reads and writes.
        lengths: µs by the name of the flag.
        limits: the most that a message may contain.
        beam_args: the flags for Beam.
    """

    job: LiveJob
    lengths: Mapping[str, int]
    limits: MessageLimits
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of the run's report."""
        return os.path.join(self.job.store, "runs", self.job.run_id)

    @property
    def status(self) -> str:
        """File of the last commit's status."""
        return os.path.join(self.folder, "status.json")


class StreamingArguments(Arguments):
    """The parser of a live pipeline: `Arguments`, with the shared flags.

    Args:
        source: the help of --source.
        results: what the pipeline writes, for the help of --sink.
        lengths: flags whose values are lengths of time.
        several: whether --definition may be repeated.
    """

    def __init__(
        self,
        prog: str,
        description: str,
        source: str,
        results: str,
        lengths: Sequence[Length],
        several: bool = False,
    ) -> None:
        super().__init__(prog, description, several=several)
        self.lengths = tuple(lengths)
        self.add_argument("--streaming", action="store_true", help="run the live pipeline")
        self.add_argument("--source", choices=("kafka", "replay"), default="replay", help=f"{source} (default: replay)")
        self.add_argument("--bootstrap", help="kafka: HOST:PORT of a broker")
        self.add_argument(
            "--expansion_service",
            help="kafka: HOST:PORT of Beam's KafkaIO expansion service (default: Beam fetches one)",
        )
        self.add_argument(
            "--kafka_properties",
            metavar="FILE",
            help="kafka: properties of Kafka's Java clients (security.protocol, sasl.…, ssl.…), for all clients; "
            "librdkafka.… for those that are not Java",
        )
        self.add_argument("--topic_prefix", default="", help="prefix of the names of all topics")
        self.add_argument(
            "--sink",
            choices=("table", "topic", "both"),
            help=f"where {results} go (default: both with kafka, table with replay)",
        )
        for flag, (default, most, what) in LIMIT_FLAGS.items():
            text = f"kafka: a message with more {what} is a dead letter (default {default:,})"
            self.add_argument(f"--{flag}", type=whole(1, most), default=default, metavar="N", help=text)
        for each in self.lengths:
            self.add_argument(f"--{each.name}", default=each.default, help=f"{each.help} (default {each.default})")

    def parse_streaming(self, argv: Sequence[str]) -> tuple[StreamingOptions, argparse.Namespace]:
        """The values of the shared flags, and all flags.

        Raises:
            DefinitionError: a flag or the definition is refused, or a broker is needed and not named.
        """
        flags, rest = self.parse(argv)
        definition = load_definition(flags.definition, flags.view, flags.model)
        lengths = {
            each.name: microseconds(getattr(flags, each.name), f"--{each.name}", zero=each.zero)
            for each in self.lengths
        }
        replaying = flags.source == "replay"
        if not replaying and flags.bootstrap is None:
            fix = "Add --bootstrap HOST:PORT, or --source replay"
            raise DefinitionError("--source kafka needs a broker", "there is no --bootstrap", fix)
        sink = flags.sink or ("table" if replaying else "both")
        if sink != "table" and flags.bootstrap is None:
            fix = "Add --bootstrap HOST:PORT, or --sink table"
            raise DefinitionError(f"--sink {sink} needs a broker", "there is no --bootstrap", fix)
        job = LiveJob(
            definition=definition,
            store=flags.store,
            run_id=flags.run_id,
            replaying=replaying,
            broker=_broker(flags),
            prefix=flags.topic_prefix,
            sinks=("table", "topic") if sink == "both" else (sink,),
        )
        options = StreamingOptions(
            job,
            lengths=lengths,
            limits=MessageLimits(
                rows=flags.max_message_rows,
                expanded_bytes=flags.max_message_mb << 20,
                columns=flags.max_message_columns,
                depth=flags.max_message_depth,
            ),
            beam_args=tuple(rest),
        )
        return options, flags


def _broker(flags: argparse.Namespace) -> Broker | None:
    """The broker that the flags name; None if they name none."""
    if flags.bootstrap is None:
        return None
    java = read_properties(flags.kafka_properties) if flags.kafka_properties else {}
    hide(secrets_of(java))
    return Broker(flags.bootstrap, flags.expansion_service, java=java)
