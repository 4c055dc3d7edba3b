"""Live features: topics (or files replayed as such) → features exactly as of each question's time → topic and tables.

`millrace features --streaming`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineState

from beam_pipelines.options import Arguments
from beam_pipelines.reporting import Run, execute, guard, write_json
from schemas.durations import microseconds
from schemas.errors import DefinitionError
from schemas.loading import Definition, load_definition
from transforms.contracts import EPOCH, MICROSECOND
from transforms.live import DecodeBundles, DecodeChunks, LiveFeatures
from transforms.live_tables import features_live_uri, last_told, sources_root
from transforms.packets import pack, unpack
from transforms.replay import Replay, SendChunks, sources_of
from transforms.resume import Start, find_start
from transforms.shards import groups_of
from transforms.state import Live
from transforms.tables import data_files, open_table
from transforms.topics import (
    Broker,
    ReadTopics,
    WriteTopic,
    answer_messages,
    begin_offsets,
    letter_messages,
    letters_topic,
    stand,
    topic_of,
)

log = logging.getLogger("millrace.live")
ENDED = (PipelineState.DONE, PipelineState.FAILED, PipelineState.CANCELLED, PipelineState.UNKNOWN)


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one live job does."""

    definition: Definition
    run_id: str
    live: Live
    replay: Replay | None
    broker: Broker | None
    sinks: tuple[str, ...]
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        return os.path.join(self.live.store, "runs", self.run_id)

    @property
    def table(self) -> str:
        view = self.definition.view
        return features_live_uri(self.live.store, view.name, view.fingerprint)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments("millrace features --streaming", "Answer questions as they arrive.")
    arguments.add_interval("messages (replay only)")
    arguments.add_argument("--streaming", action="store_true", help="live: this pipeline")
    arguments.add_argument(
        "--source", choices=("kafka", "replay"), default="replay", help="where messages come from (default: replay)"
    )
    arguments.add_argument("--sources", help="replay: folder of the files to send; dimensions are read there too")
    arguments.add_argument("--bootstrap", help="kafka: HOST:PORT of a broker")
    arguments.add_argument(
        "--expansion_service", help="kafka: HOST:PORT of Beam's KafkaIO expansion service (default: Beam fetches one)"
    )
    arguments.add_argument("--topic_prefix", default="", help="before the name of every topic")
    arguments.add_argument(
        "--sink",
        choices=("table", "topic", "both"),
        help="where answers go (default: both with kafka, table with replay)",
    )
    arguments.add_argument("--shards", type=int, default=2, help="parallel shards of keys (default 2)")
    for name, value, text in (
        ("pace", "200ms", "least time between turns"), ("commit_every", "10s", "least time between commits"),
        ("keep", "1h", "late questions are answered for this long"), ("dimension_every", "60s", "how often dimensions are looked at"),
        ("chunk", "1h", "replay: what arrives within this long comes together"), ("disorder", "0s", "replay: rows arrive up to this late"),
    ):  # fmt: skip
        arguments.add_argument(f"--{name}", default=value, help=f"{text} (default {value})")
    arguments.add_argument("--partitions", type=int, default=2, help="replay: partitions of every topic (default 2)")
    arguments.add_argument("--seed", type=int, default=0, help="replay: of the disorder")
    flags, rest = arguments.parse(argv)
    definition = load_definition(flags.definition)
    lengths = {
        name: microseconds(getattr(flags, name), f"--{name}", zero=True)
        for name in ("pace", "commit_every", "keep", "dimension_every", "chunk", "disorder")
    }
    replaying = flags.source == "replay"
    sources = os.path.abspath(flags.sources) if flags.sources and "://" not in flags.sources else flags.sources
    if replaying and (sources is None or sources == sources_root(flags.store)):
        raise DefinitionError(
            "A replay reads its files from another place than it writes to",
            f"--sources {sources or 'left out'}, --store {flags.store}",
            "Name the folder of the files with --sources, and a store of the live job's own",
        )
    sink = flags.sink or ("table" if replaying else "both")
    live = Live(
        store=flags.store, run_id=flags.run_id, dimensions=sources or sources_root(flags.store), shards=max(flags.shards, 1),
        keep=lengths["keep"], pace=0 if replaying else max(lengths["pace"], 1000), commit_every=lengths["commit_every"],
        dimension_every=lengths["dimension_every"], prefix=flags.topic_prefix, table=sink != "topic",
    )  # fmt: skip
    span = {
        name: (day - EPOCH.date()) // MICROSECOND
        for name in ("start", "end")
        if (day := getattr(flags, name)) is not None
    }
    replay = (
        Replay(
            sources,
            **span,
            partitions=max(flags.partitions, 1),
            disorder=lengths["disorder"],
            seed=flags.seed,
            chunk=max(lengths["chunk"], 1),
        )
        if replaying
        else None
    )
    if not replaying and flags.bootstrap is None:
        raise DefinitionError(
            "Live from Kafka, a broker is named", "no --bootstrap", "Add --bootstrap HOST:PORT, or --source replay"
        )
    broker = Broker(flags.bootstrap, flags.expansion_service) if flags.bootstrap else None
    if sink != "table" and broker is None:
        raise DefinitionError(
            "A topic is written to a broker", "no --bootstrap", "Add --bootstrap HOST:PORT, or --sink table"
        )
    groups_of(definition.view)
    return Options(
        definition, flags.run_id, live, replay, broker, ("table", "topic") if sink == "both" else (sink,), tuple(rest)
    )


def build(pipeline: beam.Pipeline, options: Options, start: Start | None = None, group: str = "") -> None:
    """The graph: messages → packets → turns → answers → tables and topics."""
    view, live = options.definition.view, options.live
    if options.replay is not None:
        chunks = pipeline | "Start" >> beam.Impulse() | "Replay" >> beam.ParDo(SendChunks(view, options.replay))
        packets = chunks | "Decode" >> beam.ParDo(DecodeChunks(view)).with_output_types(bytes)
    else:
        assert options.broker is not None
        assert start is not None
        topics = tuple(f"{live.prefix}{name}" for name in sources_of(view))
        first = pipeline | "Start" >> beam.Create([pack({"kind": "start", "index": None, "start": start.to_json()})])
        messages = pipeline | "Topics" >> ReadTopics(options.broker, topics, group)
        decoded = messages | "Decode" >> beam.ParDo(DecodeBundles(view, live.prefix)).with_output_types(bytes)
        packets = (first, decoded) | "Both" >> beam.Flatten()
    made = packets | "Live" >> LiveFeatures(view, live)
    _ = made["commits"] | "Status" >> beam.Map(write_status, os.path.join(options.folder, "status.json"))
    if "topic" in options.sinks:
        assert options.broker is not None
        answers = made["features"] | "AnswerMessages" >> beam.FlatMap(answer_messages, view.fingerprint)
        _ = answers | "Answers" >> WriteTopic(options.broker, topic_of(view, live.prefix))
        letters = made["letters"] | "LetterMessages" >> beam.FlatMap(_letter_messages)
        _ = letters | "Letters" >> WriteTopic(options.broker, letters_topic(view, live.prefix))


def _letter_messages(pair: tuple[bytes, bytes]) -> Iterator[tuple[bytes, bytes]]:
    yield from letter_messages(unpack(pair[1])[1]["letters"])


def write_status(commit: tuple[bytes, bytes], path: str) -> None:
    write_json(path, json.loads(commit[1]))


def main(argv: Sequence[str]) -> int:
    """Run the job until it ends: the end of a replay, a word on every partition that nothing follows, or a signal."""
    options = parse(argv)
    with Run("features --streaming", options.run_id, options.folder) as run:
        if options.replay is not None:
            pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
            build(pipeline, options)
            execute(pipeline)
        else:
            run_live(options)
        run.update(summary(options))
    return 0


def run_live(options: Options) -> None:
    """Place the consumers where the tables end, run, and cancel when all is told or somebody says stop."""
    view, live, broker = options.definition.view, options.live, options.broker
    assert broker is not None
    names = list(sources_of(view))
    begin = begin_offsets(broker, [f"{live.prefix}{name}" for name in names])
    start = find_start(view, live.store, {name: begin[f"{live.prefix}{name}"] for name in names})
    _warn_of_loss(names, begin, start, live.prefix)
    group = f"millrace-{view.name}-{options.run_id}-{uuid.uuid4().hex[:8]}"
    stand(
        broker,
        group,
        {f"{live.prefix}{name}": {int(n): offset for n, offset in start.next[name].items()} for name in names},
    )
    pipeline = beam.Pipeline(options=PipelineOptions(["--streaming", *options.beam_args]))
    build(pipeline, options, start, group)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = pipeline.run()
        log.info("running: turn %d, reading on from %s", start.turn, json.dumps(start.next))
        watch(result, os.path.join(options.folder, "status.json"), start.turn)
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(result: Any, status: str, turn: int) -> None:
    """Wait until the job ends, all is told, or a signal comes.

    Raises:
        StoreError: the job failed.
    """
    try:
        while result.state not in ENDED:
            time.sleep(0.2)
            if _told_all(status, turn):
                break
        else:
            if result.state not in (PipelineState.DONE, PipelineState.CANCELLED):
                result.wait_until_finish()
            return
    except KeyboardInterrupt:
        log.info("stopping: what is not committed will be read again")
    result.cancel()


def _told_all(status: str, turn: int) -> bool:
    try:
        with open(status) as handle:
            told = json.load(handle)
    except (OSError, ValueError):
        return False
    return bool(told["last"]) and int(told["turn"]) > turn


def _warn_of_loss(names: Sequence[str], begin: Mapping[str, Mapping[int, int]], start: Start, prefix: str) -> None:
    for name in names:
        for number, offset in begin[f"{prefix}{name}"].items():
            due = start.next[name][str(number)]
            if due < offset:
                log.warning(
                    "%s/%d: the broker no longer has offsets %d to %d; they are counted as skipped",
                    name,
                    number,
                    due,
                    offset - 1,
                )


def summary(options: Options) -> dict[str, object]:
    """What the closing table says."""
    table = open_table(options.table)
    told = last_told(table)
    counts = told.get("counts", {})
    answered = 0 if table is None else sum(file.rows for file in data_files(table))
    return {
        "rows_in": sum(each.get("rows", 0) for each in counts.values()), "rows_out": answered, "pending": told.get("pending"),
        "turns": told.get("turn"), "counts": counts, "table": options.table, "fingerprint": options.definition.view.fingerprint,
        "commit_version": None if table is None else table.version(),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
