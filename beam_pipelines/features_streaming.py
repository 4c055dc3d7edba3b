"""Live features: topics (or files replayed as such) → features exactly as of each question's time → topic and tables.

`millrace features --streaming`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.runtime.arguments import day
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.job_supervisor import (
    Reading,
    check_connections,
    read_status,
    run_until,
    skipped_in,
    stopped_by_signals,
    warn_of_loss,
    write_status,
)
from beam_pipelines.runtime.run_report import Run, execute
from beam_pipelines.runtime.streaming_arguments import Length, StreamingArguments
from schemas.errors import DefinitionError, MismatchError, StoreError
from schemas.loading import Definition, load_definition
from schemas.views import FeatureView
from transforms.records.frame_packets import pack
from transforms.records.times import ALWAYS, EPOCH, FOREVER, MICROSECOND, day_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY, of_topic
from transforms.streaming.history import Handover
from transforms.streaming.kafka import (
    Broker,
    ReadTopics,
    begin_offsets,
    dead_letters_topic,
    ensure,
    send_end,
    set_group_offsets,
    topic_of,
)
from transforms.streaming.kafka_admin import OVERHEAD, check_reachable, size_limit, unread
from transforms.streaming.live_features import DecodeBundles, DecodeChunks, LiveFeatures, Sends, to_journal
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.mirrored_state import LiveSettings
from transforms.streaming.recovery import RecoveryPoint, find_recovery_point
from transforms.streaming.replay import Replay, SendChunks, sources_of
from transforms.streaming.shards import groups_of
from transforms.streaming.store_owner import claim

log = logging.getLogger("millrace.live")


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one live job does."""

    definition: Definition
    run_id: str
    live: LiveSettings
    replay: Replay | None
    broker: Broker | None
    sinks: tuple[str, ...]
    handover: Handover
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        return os.path.join(self.live.store, "runs", self.run_id)

    @property
    def stream(self) -> dict[str, object]:
        """All that the offsets of its messages depend on."""
        if self.replay is None:
            return {"--source": "kafka", "--topic_prefix": self.live.prefix}
        said = dataclasses.asdict(self.replay)
        del said["root"]  # a store and its sources may be moved
        days = {name: None if abs(said[name]) >= FOREVER else str(day_of(said[name])) for name in ("start", "end")}
        return {"--source": "replay", **{f"--{name}": each for name, each in {**said, **days}.items()}}

    @property
    def table(self) -> str:
        view = self.definition.view
        return features_live_uri(self.live.store, view.name, view.fingerprint)


LENGTHS = (
    Length("pace", "200ms", "least time between micro-batches"),
    Length("commit_every", "10s", "least time between commits"),
    Length("keep", "1h", "spine rows that arrive up to this late are still answered"),
    Length("dimension_every", "60s", "time between reads of the dimensions"),
    Length("chunk", "1h", "replay: rows that arrive within this long are sent together"),
    Length("disorder", "0s", "replay: rows arrive up to this late"),
)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = StreamingArguments(
        "millrace features --streaming",
        "Compute the features of spine rows as they arrive.",
        source="where messages come from",
        results="feature rows",
        lengths=LENGTHS,
    )
    arguments.add_argument(
        "--start",
        type=day,
        help="first UTC day that comes as messages, like 2013-01-01; what --sources hold from before is history "
        "(default: replay, the first day there is; kafka, where each source's history ends)",
    )
    arguments.add_argument(
        "--end", type=day, help="replay: the UTC day after the last (default: the day after the last there is)"
    )
    arguments.add_argument(
        "--sources",
        help="folder of the sources' files or Delta tables: rows from before the start are loaded as history, "
        "dimensions are read there, and replay sends the rest",
    )
    arguments.add_argument(
        "--without_history",
        action="store_true",
        help="start with empty windows; feature rows are marked __cold until every window has filled "
        "(lifetime windows: for ever)",
    )
    arguments.add_argument(
        "--shards",
        type=int,
        default=1,
        help="parallel shards of keys (default 1: nothing is sent through the runner between steps)",
    )
    arguments.add_argument("--partitions", type=int, default=2, help="replay: partitions of every topic (default 2)")
    arguments.add_argument("--seed", type=int, default=0, help="replay: of the disorder")
    flags, rest = arguments.parse(argv)
    definition = load_definition(flags.definition)
    sources = replay_sources(flags)
    shared = arguments.shared(flags)
    lengths, replaying = shared.lengths, shared.replaying
    live = LiveSettings(
        store=flags.store,
        run_id=flags.run_id,
        dimensions=sources or sources_root(flags.store),
        shards=max(flags.shards, 1),
        keep=lengths["keep"],
        pace=0 if replaying else max(lengths["pace"], 1000),
        commit_every=lengths["commit_every"],
        dimension_every=lengths["dimension_every"],
        prefix=shared.prefix,
        table="table" in shared.sinks,
        kafka=None if replaying else shared.broker,
    )
    span = {
        name: (given - EPOCH.date()) // MICROSECOND
        for name in ("start", "end")
        if (given := getattr(flags, name)) is not None
    }
    replay = None
    if replaying:
        assert sources is not None
        replay = Replay(
            sources,
            **span,
            partitions=max(flags.partitions, 1),
            disorder=lengths["disorder"],
            seed=flags.seed,
            chunk=max(lengths["chunk"], 1),
        )
    elif flags.end is not None:
        raise DefinitionError(
            "A topic is read to its end", f"--end {flags.end}", "Leave it out, or add --source replay"
        )
    groups_of(definition.view)
    handover = Handover(
        definition.view,
        flags.store,
        None if sources == sources_root(flags.store) else sources,
        span.get("start"),
        live.keep,
        flags.without_history,
        span.get("start", ALWAYS) if replaying else None,
        flags.run_id,
    )
    return Options(definition, flags.run_id, live, replay, shared.broker, shared.sinks, handover, tuple(rest))


def replay_sources(flags: argparse.Namespace) -> str | None:
    """The folder of the sources, absolute.

    Raises:
        DefinitionError: a replay would read the folder that it writes to.
    """
    sources: str | None = flags.sources
    if sources and "://" not in sources:
        sources = os.path.abspath(sources)
    if flags.source == "replay" and (sources is None or sources == sources_root(flags.store)):
        raise DefinitionError(
            "A replay reads its files from another place than it writes to",
            f"--sources {sources or 'left out'}, --store {flags.store}",
            "Name the folder of the files with --sources, and a store of the live job's own",
        )
    return sources


def build(pipeline: beam.Pipeline, options: Options, start: RecoveryPoint | None = None, group: str = "") -> None:
    """The graph: messages → packets → turns → answers → tables and topics."""
    view, live = options.definition.view, options.live
    if options.replay is not None:
        if start is not None:
            live = dataclasses.replace(live, begin=start.to_json())
        chunks = pipeline | "Start" >> beam.Impulse() | "Replay" >> beam.ParDo(SendChunks(view, options.replay))
        envelopes = (
            chunks | "Decode" >> beam.ParDo(DecodeChunks(view)).with_output_types(bytes) | "ToJournal" >> to_journal()
        )
    else:
        assert options.broker is not None
        assert start is not None
        topics = tuple(f"{live.prefix}{name}" for name in sources_of(view))
        first = pipeline | "Start" >> beam.Create([pack({"kind": "start", "index": None, "start": start.to_json()})])
        messages = pipeline | "Topics" >> ReadTopics(options.broker, topics, group)
        decoded = messages | "Decode" >> beam.ParDo(DecodeBundles(view, live.prefix)).with_output_types(bytes)
        # Each by itself: what comes after a Flatten is one more way through the runner.
        envelopes = (first | "Begin" >> to_journal(), decoded | "ToJournal" >> to_journal()) | "Both" >> beam.Flatten()
    sends = None
    if "topic" in options.sinks:
        assert options.broker is not None
        sends = sends_to(view, options.broker, live.prefix)
    commits = envelopes | "Live" >> LiveFeatures(view, live, sends)
    _ = commits | "Status" >> beam.Map(write_status, os.path.join(options.folder, "status.json"))


def sends_to(view: FeatureView, broker: Broker, prefix: str) -> Sends:
    """The topics of answers and letters, made if they are missing, and what their messages may weigh."""
    topics = topic_of(view, prefix), dead_letters_topic(view, prefix)
    ensure(broker, topics)
    limits = [size_limit(broker, [topic]) for topic in topics]
    properties = {**broker.properties, "message.max.bytes": str(max(limits))}
    return Sends(view, dataclasses.replace(broker, properties=properties), prefix, max(limits[0] - OVERHEAD, 1))


def main(argv: Sequence[str]) -> int:
    """Run the job until it ends: the end of a replay, a word on every partition that nothing follows, or a signal."""
    options = parse(argv)
    options.handover.check()
    claim(options.definition.view, options.live.store, options.stream)
    with Run("features --streaming", options.run_id, options.folder) as run:
        if options.replay is not None:
            pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
            beginnings = options.handover.beginnings()
            none: dict[str, dict[int, int]] = {name: {} for name in sources_of(options.definition.view)}
            build(pipeline, options, find_recovery_point(options.definition.view, options.live.store, none, beginnings))
            execute(pipeline)
        else:
            run_live(options)
        run.update(summary(options))
    check_accounts(options, run.figures)
    return 0


def check_accounts(options: Options, figures: Mapping[str, Any]) -> None:
    """
    Raises:
        MismatchError: the job has come to its end, and questions are neither answered nor set aside.
    """
    lost = figures.get("questions_unaccounted_for", 0)
    ended = read_status(os.path.join(options.folder, "status.json")).get("last", options.replay is not None)
    if lost and ended:
        raise MismatchError(
            "Every question that a live job took in is answered, set aside or waits",
            f"{lost} of {options.table} are none of these",
            "Please report it, with run.json",
        )


def run_live(options: Options) -> None:
    """Place the consumers where the tables end, run, and cancel when all is told or somebody says stop.

    When a topic has got more partitions, which no reader would notice, the job goes on from its last commit with all of them.
    """
    assert options.broker is not None
    pipeline_options = PipelineOptions(["--streaming", *options.beam_args])
    check_connections(options.broker, pipeline_options)
    options.handover.beginnings()  # before anything is started
    with stopped_by_signals():
        while _launch(options, pipeline_options):
            pass


def _launch(options: Options, pipeline_options: PipelineOptions) -> bool:
    """One launch; whether there is to be another."""
    view, live, broker = options.definition.view, options.live, options.broker
    assert broker is not None
    names = list(sources_of(view))
    topics = [f"{live.prefix}{name}" for name in names]
    begin = begin_offsets(broker, topics)
    first = {name: begin[f"{live.prefix}{name}"] for name in names}
    start = find_recovery_point(view, live.store, first, options.handover.beginnings())
    group = f"millrace-{view.name}-{options.run_id}-{uuid.uuid4().hex[:8]}"
    due = {f"{live.prefix}{name}": of_topic(start.next[name]) for name in names}
    warn_of_loss(begin, due)
    set_group_offsets(broker, group, due)
    pipeline = beam.Pipeline(options=pipeline_options)
    build(pipeline, options, start, group)
    status = os.path.join(options.folder, "status.json")
    text = f"running: turn {start.turn}, reading on from {json.dumps(start.next)}"

    def over() -> bool:
        """Whether all is told and committed, and nothing has come behind the last words."""
        record = read_status(status)
        if not record or not record["last"] or int(record["turn"]) <= start.turn:
            return False
        due = {f"{live.prefix}{name}": of_topic(record["next"][name]) for name in names}
        try:
            left = unread(broker, due)
        except StoreError:  # asked again, once the broker is back
            return False
        return all(number in due[topic] and not count for topic, each in left.items() for number, count in each.items())

    skipped = skipped_in({"counts": start.counts})
    if run_until(pipeline, over, text, Reading(broker, due, live.prefix, status, live.commit_every, skipped)):
        return True
    if "topic" in options.sinks and over():  # so that who reads the answers ends too
        send_end(broker, topic_of(view, live.prefix))
    return False


def summary(options: Options) -> dict[str, object]:
    """What the closing table says, from the tables and the broker."""
    view, live = options.definition.view, options.live
    table = open_table(options.table)
    tables = {name: open_table(source_uri(sources_root(live.store), name)) for name in sources_of(view)}
    record = read_status(os.path.join(options.folder, "status.json"))
    if not record:  # nothing came
        said = [
            last_commit_record(table, application_of(view.name)),
            *(last_commit_record(each, application_of(name)) for name, each in tables.items()),
        ]
        record = max(said, key=lambda each: each.get("turn", 0))
    counts = {name: dict(record.get("counts", {}).get(name, {})) for name in tables}
    answered = 0 if table is None else sum(file.rows for file in data_files(table))
    for name, kept in tables.items():
        history = int(last_commit_record(kept, application_of(name)).get("next", {}).get(name, {}).get(str(HISTORY), 0))
        counts[name]["rows"] = 0 if kept is None else sum(file.rows for file in data_files(kept)) - history
        counts[name]["history"] = history
    if options.replay is None:
        assert options.broker is not None
        with contextlib.suppress(StoreError):  # stopped while the broker is away: what is unread is not known
            check_reachable("The broker", "--bootstrap", options.broker.bootstrap)
            done = {name: record.get("next", {}).get(name, {}) for name in tables}
            due = {f"{live.prefix}{name}": of_topic(each) for name, each in done.items()}
            for topic, left in unread(options.broker, due).items():
                counts[topic.removeprefix(live.prefix)]["unread"] = sum(left.values())
    figures: dict[str, object] = {
        "sources_root": live.dimensions,
        "rows_in": sum(each["rows"] for each in counts.values()),
        "rows_out": answered,
        "pending": record.get("pending"),
        "turns": record.get("turn"),
        "sources": counts,
        "counts": counts,
        "table": options.table,
        "fingerprint": view.fingerprint,
        "commit_version": None if table is None else table.version(),
    }
    if live.table:
        asked = counts[view.spine.name]
        aside = sum(asked.get(what, 0) for what in ("repeated", "conflicting", "too_late"))
        figures["questions_unaccounted_for"] = asked["rows"] - answered - aside - (record.get("pending") or 0)
    return figures


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
