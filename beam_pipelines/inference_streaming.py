"""Live inference, `millrace inference --streaming`: feature rows are scored by the model that has an alias.

Feature rows come from the features topic, or from the live feature table, which a replay reads as messages.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence

import apache_beam as beam
import pyarrow as pa
from apache_beam import typehints
from apache_beam.ml.inference.base import RunInference
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.runtime.arguments import threads
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
from beam_pipelines.runtime.live_compaction import PREDICTIONS_TABLES, compacting
from beam_pipelines.runtime.run_report import Run, execute
from beam_pipelines.runtime.streaming_arguments import Length, StreamingArguments, StreamingOptions
from transforms.inference.champion_model import ChampionHandler, close_all
from transforms.inference.live_input import DecodeFeatureRows, SendFeatureRows
from transforms.inference.live_output import CommitPredictions, TimedCommitPredictions, to_envelope
from transforms.inference.live_preparation import (
    LiveInferencePlan,
    LiveInferenceRequest,
    live_inference_figures,
    prepare_live_inference,
)
from transforms.models.registry import CHAMPION, registry_uri
from transforms.streaming.crash_guard import guard_folder
from transforms.streaming.kafka import Produce, ReadTopics, set_group_offsets

log = logging.getLogger("millrace.serving")
LENGTHS = (
    Length("poll", "5s", "interval between reads of the alias; a new version takes over without a restart", zero=False),
    Length("commit_every", "10s", "minimum interval between commits"),
    Length("compact_every", "1m", "kafka: interval between compactions of the job's tables; 0s: never"),
    Length("pace", "0s", "replay: time between messages"),
)


def parse(argv: Sequence[str]) -> tuple[StreamingOptions, LiveInferenceRequest]:
    """The options of the run and the job that it does.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = StreamingArguments(
        "millrace inference --streaming",
        "Score feature rows as they arrive.",
        source="where feature rows come from: the features topic, or the live feature table, read in order",
        results="predictions",
        lengths=LENGTHS,
    )
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite in <store>/registry)")
    arguments.add_argument(
        "--alias", default=CHAMPION, help=f"the version with this alias scores (default: {CHAMPION})"
    )
    arguments.add_argument("--threads", type=threads, default=1, help="XGBoost threads in each worker (default: 1)")
    options, flags = arguments.parse_streaming(argv)
    options.job.definition.require_model()
    request = LiveInferenceRequest(
        options.job,
        registry=registry_uri(options.job.store, flags.registry),
        alias=flags.alias,
        poll=options.lengths["poll"],
        threads=flags.threads,
        pace=options.lengths["pace"],
        commit_every=options.lengths["commit_every"],
    )
    return options, request


def build(pipeline: beam.Pipeline, options: StreamingOptions, plan: LiveInferencePlan) -> None:
    """The graph: messages → batches of feature rows → predictions → topic → table."""
    rows = replayed_rows(pipeline, plan) if options.job.replaying else rows_of_topic(pipeline, options, plan)
    predictions = rows | "Score" >> RunInference(ChampionHandler(plan.serving)).with_output_types(pa.RecordBatch)
    if "topic" in options.job.sinks:
        predictions = predictions | "Publish" >> Produce(plan.broker, plan.outlet.messages)
    envelopes = predictions | "Envelopes" >> beam.Map(to_envelope)
    envelopes.element_type = typehints.Tuple[bytes, bytes]
    step = CommitPredictions if options.job.replaying else TimedCommitPredictions
    commits = envelopes | "Commit" >> beam.ParDo(step(plan.outlet, plan.start))
    _ = commits | "Status" >> beam.Map(write_status, options.status)


def replayed_rows(pipeline: beam.Pipeline, plan: LiveInferencePlan) -> beam.PCollection:
    """Feature rows of the live feature table, one batch per message."""
    request = plan.request
    send = SendFeatureRows(request.view, request.job.store, plan.start.next, request.pace)
    decode = DecodeFeatureRows(request.view, most=1, by_row=True)
    messages = pipeline | "Start" >> beam.Impulse() | "Replay" >> beam.ParDo(send)
    return messages | "Decode" >> beam.ParDo(decode).with_output_types(pa.RecordBatch)


def rows_of_topic(pipeline: beam.Pipeline, options: StreamingOptions, plan: LiveInferencePlan) -> beam.PCollection:
    """Feature rows of the features topic."""
    messages = pipeline | "Topic" >> ReadTopics(plan.broker, (plan.request.topic,), plan.group)
    guard = guard_folder(plan.request.job.store, f"{plan.request.view.name}.inference")
    decode = DecodeFeatureRows(plan.request.view, guard=guard, limits=options.limits)
    return messages | "Decode" >> beam.ParDo(decode).with_output_types(pa.RecordBatch)


def main(argv: Sequence[str]) -> int:
    """Runs the job until the end of the replay, the end of every partition of the topic, or a signal."""
    options, request = parse(argv)
    with Run("inference --streaming", options.job.run_id, options.folder) as run:
        try:
            plan = run_replay(options, request) if options.job.replaying else run_live(options, request)
        finally:
            close_all()
        run.update(live_inference_figures(plan, read_status(options.status)))
    return 0


def run_replay(options: StreamingOptions, request: LiveInferenceRequest) -> LiveInferencePlan:
    """Scores the rows of the live feature table."""
    plan = prepare_live_inference(request)
    pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
    build(pipeline, options, plan)
    execute(pipeline)
    return plan


def run_live(options: StreamingOptions, request: LiveInferenceRequest) -> LiveInferencePlan:
    """Launches the job until it ends: it is launched again when the topic gets more partitions.

    Returns:
        The plan of the last launch.
    """
    assert options.job.broker is not None
    pipeline_options = PipelineOptions(["--streaming", *options.beam_args])
    check_connections(options.job.broker, pipeline_options)
    compaction = compacting(options.job.store, PREDICTIONS_TABLES, options.lengths["compact_every"])
    with stopped_by_signals(), compaction:
        while True:
            plan = prepare_live_inference(request)
            if not launch(options, plan, pipeline_options):
                return plan


def launch(options: StreamingOptions, plan: LiveInferencePlan, pipeline_options: PipelineOptions) -> bool:
    """Runs the job once.  Returns whether it must be launched again."""
    if plan.finished:
        log.info("every partition of the topic has ended, and all rows are scored: nothing to do")
        return False
    due = {plan.request.topic: plan.start.next}
    warn_of_loss({plan.request.topic: plan.first_available}, due)
    set_group_offsets(plan.broker, plan.group, due)
    pipeline = beam.Pipeline(options=pipeline_options)
    build(pipeline, options, plan)
    skipped = skipped_in(plan.start.commit_record())
    commit_every = options.lengths["commit_every"]
    reading = Reading(plan.broker, due, options.job.prefix, options.status, commit_every, skipped)
    text = f"running: reading on from {json.dumps(plan.start.next)}"
    return run_until(pipeline, lambda: plan.finished_at(read_status(options.status)), text, reading)


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
