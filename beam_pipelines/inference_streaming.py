"""Live inference: the features topic (or the live feature table replayed as such) → the model that bears an alias → predictions.

`millrace inference --streaming`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam import typehints
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

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
from schemas.errors import MillraceError, StoreError
from schemas.live import live_predictions
from schemas.loading import Definition, load_definition
from transforms.inference.champion_model import ChampionHandler, Serving, check_model, close_all, open_checked
from transforms.inference.live_input import DecodeFeatureRows, replayed, rows_in, source_of
from transforms.inference.live_output import CommitPredictions, Outlet, TimedCommitPredictions, begin_at, to_envelope
from transforms.models.registry import CHAMPION, Registry, registry_uri
from transforms.models.scoring import ARM, Pinned
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri
from transforms.streaming.kafka import Broker, Produce, ReadTopics, begin_offsets, ensure, set_group_offsets, topic_of
from transforms.streaming.kafka_admin import unread
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.messages import Message
from transforms.streaming.micro_batches import SKIPPED

log = logging.getLogger("millrace.serving")
# How a replay tells of its progress.
REPLAY = "replay: at row %d of %d"


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one live inference job does."""

    definition: Definition
    store: str
    registry: str
    run_id: str
    alias: str
    poll: int
    threads: int
    broker: Broker | None
    replaying: bool
    pace: int
    prefix: str
    sinks: tuple[str, ...]
    commit_every: int
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        return os.path.join(self.store, "runs", self.run_id)

    @property
    def status(self) -> str:
        return os.path.join(self.folder, "status.json")

    @property
    def name(self) -> str:
        """Of tables and topics: the model's; of another alias's job, with the alias behind."""
        model = self.definition.require_model().name
        return model if self.alias == CHAMPION else f"{model}.{self.alias}"


LENGTHS = (
    Length("poll", "5s", "how often the alias is read; a new version takes over without a restart", zero=False),
    Length("commit_every", "10s", "least time between commits"),
    Length("pace", "0s", "replay: time between messages"),
)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = StreamingArguments(
        "millrace inference --streaming",
        "Score feature rows as they arrive.",
        source="where feature rows come from: the features topic, or the live feature table read in order",
        results="predictions",
        lengths=LENGTHS,
    )
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite in <store>/registry)")
    arguments.add_argument(
        "--alias", default=CHAMPION, help=f"the version with this alias scores (default: {CHAMPION})"
    )
    arguments.add_argument("--threads", type=int, default=1, help="of XGBoost in each worker (default: 1)")
    flags, rest = arguments.parse(argv)
    definition = load_definition(flags.definition)
    definition.require_model()
    shared = arguments.shared(flags)
    return Options(
        definition=definition,
        store=flags.store,
        registry=registry_uri(flags.store, flags.registry),
        run_id=flags.run_id,
        alias=flags.alias,
        poll=shared.lengths["poll"],
        threads=flags.threads,
        broker=shared.broker,
        replaying=shared.replaying,
        pace=shared.lengths["pace"],
        prefix=shared.prefix,
        sinks=shared.sinks,
        commit_every=shared.lengths["commit_every"],
        beam_args=tuple(rest),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class LiveInferencePlan:
    """What a launch resolves before any row is read: the model to begin with, where predictions go, and where to read on."""

    serving: Serving
    outlet: Outlet
    start: Mapping[str, Any]

    @property
    def next(self) -> dict[int, int]:
        """Next offset per partition of the features topic."""
        return {int(number): offset for number, offset in self.start["next"][source_of(self.serving.view)].items()}


def plan_live_inference(options: Options) -> LiveInferencePlan:
    """See that there is a model to begin with, and where the job stands.

    Raises:
        StoreError: no model bears the alias, no broker, no topic, no live feature table.
        MismatchError: the model or the predictions table is of other features.
    """
    view, model = options.definition.view, options.definition.require_model()
    outlet = Outlet(
        view,
        options.name,
        options.store,
        options.run_id,
        prefix=options.prefix,
        table="table" in options.sinks,
        commit_every=options.commit_every,
        kafka=None if options.replaying else options.broker,
        arm=ARM if options.alias == CHAMPION else options.alias,
    )
    serving = first_model(options, outlet)
    outlet = dataclasses.replace(outlet, classes=serving.classes)
    check_target(outlet)
    if options.replaying:
        if open_table(features_live_uri(options.store, view.name, view.fingerprint)) is None:
            value = f"no table at {features_live_uri(options.store, view.name, view.fingerprint)}"
            fix = "Run first: millrace features --streaming, or read a topic with --source kafka"
            raise StoreError("A replay reads the live feature table", value, fix)
        begin = {0: 0}
    else:
        assert options.broker is not None
        topic = topic_of(view, options.prefix)
        begin = begin_offsets(options.broker, [topic])[topic]
    if "topic" in options.sinks:
        assert options.broker is not None
        ensure(options.broker, outlet.topics)
    log.info("version %s of %r serves from the start", serving.first.version, model.name)
    return LiveInferencePlan(serving, outlet, begin_at(outlet, begin))


def first_model(options: Options, outlet: Outlet) -> Serving:
    """The bearer of the alias; where that one is broken, what the last commit names, loudly.

    Raises:
        StoreError: nobody bears the alias, or the registry or the files cannot be read.
        MismatchError: the bearer was made for other features, and no version served before.
    """
    name, view = options.definition.require_model().name, options.definition.view
    registry = Registry(options.registry)
    train = shlex.join(["millrace", "training", "--definition", options.definition.name, "--store", options.store])
    version = registry.bearer(name, options.alias)
    if version is None:
        value = f"nobody bears {options.alias!r} of {name!r} in {options.registry}"
        fix = f"Train one with: {train}; or: millrace promote VERSION --why …"
        raise StoreError("A live job has a model before it starts", value, fix)

    def opened(version: str) -> Serving:
        _, folder, digest = registry.locate(name, version)
        serving = Serving(
            options.registry,
            name,
            view,
            Pinned(folder, version, digest),
            alias=options.alias,
            arm=outlet.arm,
            poll=options.poll,
            threads=options.threads,
        )
        from transforms.models.bundle import load

        bundle = load(folder, digest)
        check_model(bundle, version, view, train)
        serving = dataclasses.replace(serving, classes=bundle.classes)
        open_checked(serving, serving.first)
        return serving

    try:
        return opened(version)
    except MillraceError as error:
        before = last_commit_record(open_table(outlet.uri), application_of(outlet.model)).get("version")
        if before is None or before == version:
            raise
        log.error(
            "version %s of %r is refused, version %s, which served before, serves on: %s", version, name, before, error
        )
        return opened(str(before))


def check_target(outlet: Outlet) -> None:
    """Refuse a predictions table of other columns, such as another number of classes."""
    table, wanted = open_table(outlet.uri), live_predictions(outlet.view, outlet.classes)
    if table is not None and (found := {field.name for field in table.schema().fields}) != set(wanted.names):
        value = f"{outlet.uri}: {', '.join(sorted(found ^ set(wanted.names)))} in one of them only"
        raise StoreError(
            "The table of live predictions has this model's columns",
            value,
            "Give the model a new name, or move the old table away",
        )


def build(pipeline: beam.Pipeline, options: Options, plan: LiveInferencePlan, group: str = "") -> None:
    """The graph: messages → batches → predictions → topic → table."""
    view, outlet = options.definition.view, plan.outlet
    if options.replaying:
        send = beam.ParDo(SendFeatureRows(plan.serving, options.store, plan.next, options.pace))
        messages = pipeline | "Start" >> beam.Impulse() | "Replay" >> send
        decode = DecodeFeatureRows(view, most=1, by_row=True)
    else:
        assert options.broker is not None
        messages = pipeline | "Topic" >> ReadTopics(options.broker, (topic_of(view, options.prefix),), group)
        decode = DecodeFeatureRows(view)
    answers = messages | "Decode" >> beam.ParDo(decode).with_output_types(pa.RecordBatch)
    predicted = answers | "Score" >> RunInference(ChampionHandler(plan.serving)).with_output_types(pa.RecordBatch)
    if "topic" in options.sinks:
        assert options.broker is not None
        predicted = predicted | "Publish" >> Produce(options.broker, outlet.messages)
    envelopes = predicted | "Packets" >> beam.Map(to_envelope)
    envelopes.element_type = typehints.Tuple[bytes, bytes]
    step = CommitPredictions if options.replaying else TimedCommitPredictions
    commits = envelopes | "Commit" >> beam.ParDo(step(outlet, plan.start))
    _ = commits | "Status" >> beam.Map(write_status, options.status)


class SendFeatureRows(beam.DoFn):
    """Impulse → the live feature table as messages, `pace` µs apart."""

    def __init__(self, serving: Serving, store: str, begin: Mapping[int, int], pace: int) -> None:
        self.view, self.store, self.begin, self.pace = serving.view, store, begin, pace

    def process(self, _: bytes) -> Iterator[Message]:
        total = rows_in(self.view, self.store)
        for message in replayed(self.view, self.store, self.begin):
            log.info(REPLAY, message.offset, total)
            yield message
            time.sleep(self.pace / 1e6)


def main(argv: Sequence[str]) -> int:
    """Run the job until it ends: the end of a replay, of every partition of the topic, or a signal."""
    options = parse(argv)
    with Run("inference --streaming", options.run_id, options.folder) as run:
        try:
            if options.replaying:
                plan = plan_live_inference(options)
                pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
                build(pipeline, options, plan)
                execute(pipeline)
            else:
                plan = run_live(options)
        finally:
            close_all()
        run.update(summary(options, plan))
    return 0


def run_live(options: Options) -> LiveInferencePlan:
    """Place the consumers where the table ends, run, and cancel when the topic has ended or somebody says stop.

    Returns:
        The plan of the last launch; there is another when the topic has got more partitions.
    """
    assert options.broker is not None
    pipeline_options = PipelineOptions(["--streaming", *options.beam_args])
    check_connections(options.broker, pipeline_options)
    with stopped_by_signals():
        while True:
            plan = plan_live_inference(options)
            if not _launch(options, plan, pipeline_options):
                return plan


def _launch(options: Options, plan: LiveInferencePlan, pipeline_options: PipelineOptions) -> bool:
    """One launch; whether there is to be another."""
    view, broker = options.definition.view, options.broker
    assert broker is not None
    topic = topic_of(view, options.prefix)
    group = f"millrace-{plan.outlet.model}-{options.run_id}-{uuid.uuid4().hex[:8]}"

    def at_end(status: Mapping[str, Any]) -> bool:
        """Whether nothing has come behind the last words, as after a restart of the features job."""
        due = {int(number): offset for number, offset in status["next"][source_of(view)].items()}
        try:
            left = unread(broker, {topic: due})[topic]
        except StoreError:  # asked again, once the broker is back
            return False
        return all(number in due and not count for number, count in left.items())

    if begin_at_end(plan) and at_end(plan.start):
        log.info("the topic had ended, and all of it is scored: nothing to do")
        return False
    warn_of_loss(begin_offsets(broker, [topic]), {topic: plan.next})
    set_group_offsets(broker, group, {topic: plan.next})
    pipeline = beam.Pipeline(options=pipeline_options)
    build(pipeline, options, plan, group)
    first = int(plan.start.get("turn", 0))

    def done() -> bool:
        status = read_status(options.status)
        return bool(status.get("last")) and int(status["turn"]) > first and at_end(status)

    text = f"running: reading on from {json.dumps(plan.next)}"
    skipped = skipped_in(plan.start)
    reading = Reading(broker, {topic: plan.next}, options.prefix, options.status, options.commit_every, skipped)
    return run_until(pipeline, done, text, reading)


def begin_at_end(plan: LiveInferencePlan) -> bool:
    """Whether the last commit stands behind the last words of every partition."""
    ended = plan.start.get("ended", {})
    return bool(ended) and all(ended.get(str(number)) == offset for number, offset in plan.next.items())


def summary(options: Options, plan: LiveInferencePlan) -> dict[str, object]:
    """What the closing table says."""
    table, status = open_table(plan.outlet.uri), read_status(options.status)
    rows = status.get("rows", {})
    return {
        "rows_in": rows.get("read", 0),
        "rows_out": 0 if table is None else sum(file.rows for file in data_files(table)),
        "repeated": rows.get("repeated", 0),
        "set_aside": rows.get("letters", 0),
        SKIPPED: rows.get(SKIPPED, 0),
        "swaps": status.get("swaps", []),
        "refused": status.get("refused", []),
        "by_version": status.get("by_version", {}),
        "model": options.definition.require_model().name,
        "model_version": status.get("version", plan.serving.first.version),
        "fingerprint": options.definition.view.fingerprint,
        "predictions": plan.outlet.uri,
        "commit_version": None if table is None else table.version(),
    }


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
