"""Live features, `millrace features --streaming`: the features of spine rows are computed as messages arrive.

Messages come from Kafka topics, or from files that a replay sends as messages.  Feature rows go to a topic and tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.runtime.arguments import utc_day, whole
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
from beam_pipelines.runtime.live_compaction import FEATURES_TABLES, compacting
from beam_pipelines.runtime.run_report import Run, execute
from beam_pipelines.runtime.streaming_arguments import Length, StreamingArguments, StreamingOptions
from schemas.errors import DefinitionError, StoreError
from schemas.live import joined_sources, newest_versions
from schemas.loading import Definition, decode_python, load_definition, load_recorded
from transforms.lineage.erasure_records import erasures
from transforms.lineage.feature_parity import unaccounted_after_erasures
from transforms.records.times import ALWAYS, EPOCH, FOREVER, MICROSECOND
from transforms.storage.paths import sources_root
from transforms.streaming.crash_guard import guard_folder
from transforms.streaming.groups import shard_groups
from transforms.streaming.history import Handover
from transforms.streaming.kafka import ReadTopics, send_end, set_group_offsets, topic_of
from transforms.streaming.live_features import DecodeBundles, DecodeChunks, LiveFeatures, to_journal
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.preparation import (
    LiveFeaturesJob,
    LiveFeaturesPlan,
    live_features_figures,
    prepare_live_features,
)
from transforms.streaming.progress import version_name
from transforms.streaming.replay import Replay, SendChunks
from transforms.streaming.step_messages import start_envelope
from transforms.streaming.store_owner import RecordedDefinition, has_read, read_note

LENGTHS = (
    Length("pace", "200ms", "minimum interval between micro-batches"),
    Length("commit_every", "10s", "minimum interval between commits"),
    Length("compact_every", "1m", "kafka: interval between compactions of the job's tables; 0s: never"),
    Length("keep", "1h", "features are still computed for spine rows that arrive up to this late"),
    Length("dimension_every", "60s", "interval between reads of the dimensions"),
    Length("chunk", "1h", "replay: rows that arrive within this interval are sent together"),
    Length("disorder", "0s", "replay: rows arrive up to this late"),
)


def parse(argv: Sequence[str]) -> tuple[StreamingOptions, LiveFeaturesJob]:
    """The options of the run and the job that it does.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    options, flags = arguments().parse_streaming(argv)
    sources = sources_folder(options, flags)
    definitions = served_definitions(options, flags)
    views = tuple(each.view for each in definitions)
    start, end = _microseconds(flags.start), _microseconds(flags.end)
    settings = live_settings(options, sources, flags.shards)
    replay = None
    if options.job.replaying:
        assert sources is not None
        replay = Replay(
            sources,
            start=ALWAYS if start is None else start,
            end=FOREVER if end is None else end,
            partitions=flags.partitions,
            disorder=options.lengths["disorder"],
            seed=flags.seed,
            chunk=max(options.lengths["chunk"], 1),
        )
    elif flags.end is not None:
        raise DefinitionError(
            "--end must be left out for topics, which are read to their end",
            f"it is {flags.end}",
            "Leave it out, or add --source replay",
        )
    for view in views:
        shard_groups(view)
    joined_sources(views)
    handover = Handover(
        views,
        options.job.store,
        root=None if sources == sources_root(options.job.store) else sources,
        start=start,
        keep=settings.keep,
        without=flags.without_history,
        sent=None if replay is None else replay.start,
        run_id=options.job.run_id,
    )
    job = LiveFeaturesJob(
        views,
        settings,
        replay,
        options.job.broker,
        options.job.sinks,
        handover,
        drop=tuple(flags.drop),
        definitions={version_name(each.view): recorded_definition(each) for each in definitions},
    )
    return options, job


def served_definitions(options: StreamingOptions, flags: argparse.Namespace) -> list[Definition]:
    """The definitions of the views that the job serves: those that are named, and older versions.

    Raises:
        DefinitionError: one is refused, or the store has not recorded an older version.
    """
    store = options.job.store
    found = [options.job.definition, *map(load_definition, flags.definitions[1:])]
    note = read_note(store) if flags.also else None
    for name in flags.also:
        recorded = None if note is None else note.definitions.get(name)
        if recorded is None:
            raise DefinitionError(
                "--also must name a version of a view that was served on the store, as VIEW@FINGERPRINT",
                f"{name!r}: {store} has {', '.join(note.definitions) if note else 'no note'}",
                "See features_live/ in the store for the versions that there are",
            )
        with tempfile.TemporaryDirectory() as folder:
            project = load_recorded(recorded.name, recorded.source, recorded.modules, Path(folder))
        found.append(project.definition(name.split("@")[0]))
    names = [version_name(each.view) for each in found]
    if again := [name for number, name in enumerate(names) if name in names[:number]]:
        raise DefinitionError(
            "Each version of a view must be served once", f"{again[0]} is named again", "Name it once"
        )
    return found


def recorded_definition(definition: Definition) -> RecordedDefinition:
    """The texts of a definition, as the store keeps them."""
    modules = {path: decode_python(text) for path, text in definition.modules.items()}
    return RecordedDefinition(definition.name, decode_python(definition.source), modules)


def arguments() -> StreamingArguments:
    """The parser of the flags."""
    result = StreamingArguments(
        "millrace features --streaming",
        "Compute the features of spine rows as they arrive.",
        source="where messages come from",
        results="feature rows",
        lengths=LENGTHS,
        several=True,
    )
    result.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="VIEW@FINGERPRINT",
        help="also serve this older version of a view, by the definition that the store keeps (may be repeated)",
    )
    result.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="VIEW",
        help="a view that the last job on this store served and this one does not (may be repeated)",
    )
    result.add_argument(
        "--start",
        type=utc_day,
        help="first UTC day whose rows come as messages, like 2013-01-01; earlier rows under --sources are history "
        "(default: replay, the first day in the files; kafka, the end of each source's history)",
    )
    result.add_argument(
        "--end", type=utc_day, help="replay: the UTC day after the last (default: the day after the last in the files)"
    )
    result.add_argument(
        "--sources",
        help="folder of the sources' files or Delta tables: history and dimensions are read from it, and a replay "
        "sends the other rows",
    )
    result.add_argument(
        "--without_history",
        action="store_true",
        help="start with empty windows; feature rows are marked __cold until every window has filled "
        "(lifetime windows: for ever)",
    )
    result.add_argument(
        "--shards",
        type=whole(1, 1024),
        default=1,
        help="parallel shards of keys (default 1: the job's steps share one process)",
    )
    result.add_argument(
        "--partitions", type=whole(1, 1024), default=2, help="replay: partitions of every topic (default 2)"
    )
    result.add_argument("--seed", type=whole(0, 2**62), default=0, help="replay: seed of the random delays")
    return result


def live_settings(options: StreamingOptions, sources: str | None, shards: int) -> LiveSettings:
    """The settings of the engine; in a replay, each micro-batch has its own time."""
    lengths = options.lengths
    return LiveSettings(
        store=options.job.store,
        run_id=options.job.run_id,
        dimensions=sources or sources_root(options.job.store),
        shards=shards,
        keep=lengths["keep"],
        pace=0 if options.job.replaying else max(lengths["pace"], 1000),
        commit_every=lengths["commit_every"],
        dimension_every=lengths["dimension_every"],
        prefix=options.job.prefix,
        table="table" in options.job.sinks,
        kafka=None if options.job.replaying else options.job.broker,
    )


def sources_folder(options: StreamingOptions, flags: argparse.Namespace) -> str | None:
    """The folder of the sources, absolute.

    Raises:
        DefinitionError: a replay would read the folder that it writes to.
    """
    sources: str | None = flags.sources
    if sources and "://" not in sources:
        sources = os.path.abspath(sources)
    if options.job.replaying and (sources is None or sources == sources_root(options.job.store)):
        raise DefinitionError(
            "A replay must read its files from another folder than the one that it writes to",
            f"--sources is {sources or 'left out'}, --store is {options.job.store}",
            "Name the folder of the files with --sources, and a store that only the live job uses",
        )
    return sources


def build(pipeline: beam.Pipeline, options: StreamingOptions, plan: LiveFeaturesPlan) -> None:
    """The graph: messages → micro-batches → feature rows → topics and tables."""
    envelopes = (
        replayed_envelopes(pipeline, plan) if options.job.replaying else envelopes_of_topics(pipeline, options, plan)
    )
    commits = envelopes | "Live" >> LiveFeatures(plan.job.views, plan.settings, plan.sends)
    _ = commits | "Status" >> beam.Map(write_status, options.status)


def replayed_envelopes(pipeline: beam.Pipeline, plan: LiveFeaturesPlan) -> beam.PCollection:
    """Files → messages → micro-batches."""
    views, replay = plan.job.views, plan.job.replay
    assert replay is not None
    chunks = pipeline | "Start" >> beam.Impulse() | "Replay" >> beam.ParDo(SendChunks(views, replay))
    return chunks | "Decode" >> beam.ParDo(DecodeChunks(views)).with_output_types(bytes) | "ToJournal" >> to_journal()


def envelopes_of_topics(pipeline: beam.Pipeline, options: StreamingOptions, plan: LiveFeaturesPlan) -> beam.PCollection:
    """The start of the job, and messages → micro-batches."""
    job = plan.job
    read = ReadTopics(job.required_broker(), tuple(job.topics.values()), plan.group)
    guard = guard_folder(job.settings.store, f"{job.view.name}.features")
    decode = beam.ParDo(DecodeBundles(job.views, job.settings.prefix, guard, options.limits)).with_output_types(bytes)
    # Each branch is mapped separately: a step after the Flatten would be one more exchange through the runner.
    first = pipeline | "Start" >> beam.Create([start_envelope(plan.start)]) | "Begin" >> to_journal()
    decoded = pipeline | "Topics" >> read | "Decode" >> decode | "ToJournal" >> to_journal()
    return (first, decoded) | "Both" >> beam.Flatten()


def main(argv: Sequence[str]) -> int:
    """Runs the job until the end of the replay, the end of every partition of the topics, or a signal."""
    options, job = parse(argv)
    refuse_erased_replay(options, job)
    job.check_and_claim()
    with Run("features --streaming", options.job.run_id, options.folder) as run:
        if options.job.replaying:
            run_replay(options, job)
        else:
            run_live(options, job)
        status = read_status(options.status)
        figures = live_features_figures(job, status)
        if job.settings.table:
            views = [
                dataclasses.replace(each, recounted=unaccounted_after_erasures(each.view, options.job.store))
                for each in figures.views
            ]
            figures = dataclasses.replace(figures, views=tuple(views))
        run.update(figures.to_json())
    figures.check(ended=status.get("last", options.job.replaying))
    return 0


def refuse_erased_replay(options: StreamingOptions, job: LiveFeaturesJob) -> None:
    """Refuses to continue a replay after rows of its sources were erased: it would send them again.

    Raises:
        StoreError: see above.
    """
    if not options.job.replaying or not has_read(job.views, options.job.store):
        return
    if erased := sorted({each.source for each in erasures(options.job.store)} & job.topics.keys()):
        raise StoreError(
            "A replay must not continue after rows were erased, because it sends all its rows again, and these too",
            f"rows of {', '.join(erased)} were erased in {options.job.store}",
            "Replay files without these rows into another --store",
        )


def run_replay(options: StreamingOptions, job: LiveFeaturesJob) -> None:
    """Computes the features for the rows of files."""
    pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
    build(pipeline, options, prepare_live_features(job))
    execute(pipeline)


def run_live(options: StreamingOptions, job: LiveFeaturesJob) -> None:
    """Launches the job until it ends: it is launched again when a topic gets more partitions."""
    pipeline_options = PipelineOptions(["--streaming", *options.beam_args])
    check_connections(job.required_broker(), pipeline_options)
    job.handover.beginnings()  # history is loaded before the first launch, with the default handling of signals
    compaction = compacting(options.job.store, FEATURES_TABLES, options.lengths["compact_every"])
    with stopped_by_signals(), compaction:
        while launch(options, prepare_live_features(job), pipeline_options):
            pass


def launch(options: StreamingOptions, plan: LiveFeaturesPlan, pipeline_options: PipelineOptions) -> bool:
    """Runs the job once.  Returns whether it must be launched again."""
    broker, due = plan.job.required_broker(), plan.due
    warn_of_loss(plan.first_available, due)
    set_group_offsets(broker, plan.group, due)
    pipeline = beam.Pipeline(options=pipeline_options)
    build(pipeline, options, plan)

    def finished() -> bool:
        return plan.finished_at(read_status(options.status))

    text = f"running: turn {plan.start.turn}, reading on from {json.dumps(plan.start.next)}"
    skipped = skipped_in({"counts": plan.start.counts})
    commit_every = options.lengths["commit_every"]
    reading = Reading(broker, due, options.job.prefix, options.status, commit_every, skipped)
    if run_until(pipeline, finished, text, reading):
        return True
    if "topic" in options.job.sinks and finished():  # so that jobs that read the feature rows end too
        for view in newest_versions(plan.job.views):
            send_end(broker, topic_of(view, options.job.prefix))
    return False


def _microseconds(value: date | None) -> int | None:
    """Start of a UTC day, µs since 1970."""
    return None if value is None else (value - EPOCH.date()) // MICROSECOND


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
