"""inference: feature rows → a registered model → one commit to the predictions table, or TFRecord files."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa

from beam_pipelines.runtime.arguments import Arguments, run_of_model, threads
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.run_report import Run, execute, read_json, write_json
from schemas.errors import ContractError, DataError, DefinitionError
from schemas.feature_rows import MISSING
from schemas.loading import load_project
from transforms.inference.preparation import InferencePlan, InferenceRequest, prepare_inference
from transforms.models.registry import registry_uri
from transforms.models.scoring import Score
from transforms.records.record_batches import batch as to_batch
from transforms.records.record_batches import frame
from transforms.records.row_hashing import row_ids
from transforms.storage.delta_tables import CommitTarget, Committed, DataFile, commit
from transforms.storage.file_systems import FileSystems
from transforms.storage.joined_features import JoinCounts, ReadJoined, add_counts
from transforms.storage.table_transforms import ReadTable, WriteFiles
from transforms.storage.tfrecord_io import (
    ReadExamples,
    TFRecordFile,
    WriteTFRecordFiles,
    publish_tfrecord_files,
)

PredictionFiles = list[tuple[DataFile, dict[str, str]]] | list[TFRecordFile]


@dataclasses.dataclass(frozen=True, eq=False)
class InferenceOptions(InferenceRequest):
    """The options of one run: what to score, and how to run it.

    Args:
        threads: XGBoost threads in each worker; 0: one for each core.
        beam_args: flags for Beam.
    """

    threads: int
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of the run's report."""
        return FileSystems.join(self.store, "runs", self.run_id)


def parse(argv: Sequence[str]) -> InferenceOptions:
    """InferenceOptions from flags that mean one model.

    Raises:
        DefinitionError: a flag or the definition is refused, or several models are meant.
    """
    found = parse_each(argv)
    if len(found) > 1:
        names = ", ".join(each.definition.require_model().name for each in found)
        raise DefinitionError("One model must be chosen", f"there are {names}", "Choose one with --model")
    return found[0]


def parse_each(argv: Sequence[str]) -> list[InferenceOptions]:
    """InferenceOptions from flags, of each model that is meant.

    Of several models each has a run of its own, whose id ends in its name.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments("millrace inference", "Score feature rows with registered models.", every="model")
    arguments.add_interval("feature rows")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite in <store>/registry)")
    arguments.add_argument("--model_version", help="a registered version (default: the champion, as of the launch)")
    arguments.add_argument("--input_tfrecord", metavar="GLOB", help="score tf.Examples instead of the feature table")
    arguments.add_argument(
        "--output_tfrecord", metavar="PREFIX", help="write <PREFIX>-*.tfrecord.gz instead of the table"
    )
    arguments.add_argument(
        "--threads", type=threads, default=0, help="XGBoost threads in each worker (default: one for each core)"
    )
    flags, rest = arguments.parse(argv)
    if flags.input_tfrecord and (flags.start or flags.end):
        fix = "Leave them out: every example of the files is scored"
        raise DefinitionError(
            "--start and --end must be left out with --input_tfrecord: they select rows of the feature table",
            "both are given",
            fix,
        )
    definitions = load_project(flags.definition).each_model(flags.view, flags.model)
    for name in ("model_version", "input_tfrecord", "output_tfrecord"):
        if getattr(flags, name) and len(definitions) > 1:
            models = ", ".join(each.require_model().name for each in definitions)
            raise DefinitionError(f"--{name} needs one model", f"there are {models}", "Choose one with --model")
    return [
        InferenceOptions(
            definition=definition,
            store=flags.store,
            registry=registry_uri(flags.store, flags.registry),
            run_id=run_of_model(flags.run_id, definition, len(definitions)),
            start=flags.start,
            end=flags.end,
            model_version=flags.model_version,
            input_tfrecord=flags.input_tfrecord,
            output_tfrecord=flags.output_tfrecord,
            threads=flags.threads,
            beam_args=tuple(rest),
        )
        for definition in definitions
    ]


def plan_inference(options: InferenceOptions) -> InferencePlan:
    """Decides which model scores which rows; see `transforms.inference.preparation`."""
    return prepare_inference(options)


def build(pipeline: beam.Pipeline, options: InferenceOptions, plan: InferencePlan) -> None:
    """The graph: features → predictions → files, counted → published at once."""
    features, counts = source(pipeline, options, plan)
    predicted = features | "Score" >> Score(plan.model, threads=options.threads)
    files = predicted | "Write" >> sink(options, plan)
    listed = sum(file.rows for file in plan.tables[0]) if len(plan.tables) == 1 else None
    checked = files | "Conserve" >> beam.Map(require_all_scored, beam.pvalue.AsSingleton(counts), listed, plan.features)
    account = FileSystems.join(options.folder, "account.json")
    publish = beam.Map(finish, beam.pvalue.AsSingleton(counts), options.output_tfrecord, plan.target, account)
    _ = checked | "Publish" >> publish


def source(
    pipeline: beam.Pipeline, options: InferenceOptions, plan: InferencePlan
) -> tuple[beam.PCollection, beam.PCollection]:
    """Feature rows, as RecordBatches of the plan's columns, and one `JoinCounts` of them."""
    if len(plan.tables) > 1:
        features, counts = pipeline | "Features" >> ReadJoined(plan.rows, plan.tables, tuple(plan.columns.names))
        return features, counts
    if options.input_tfrecord:
        view = plan.rows.first
        examples = ReadExamples(plan.paths, plan.columns)
        complete_rows = beam.Map(complete, view.name, view.key, view.time)
        features = pipeline | "Features" >> examples | "Complete" >> complete_rows
    else:
        features = pipeline | "Features" >> ReadTable(plan.tables[0], tuple(plan.columns.names))
    return features, features | "Rows" >> beam.Map(counted) | "Read" >> beam.CombineGlobally(add_counts)


def counted(rows: pa.RecordBatch) -> JoinCounts:
    """The count of rows of one view."""
    return JoinCounts(rows.num_rows)


def sink(options: InferenceOptions, plan: InferencePlan) -> beam.PTransform:
    """Writes predictions to files that are not visible yet."""
    if options.output_tfrecord:
        return WriteTFRecordFiles(options.output_tfrecord, options.run_id)
    return WriteFiles(plan.target.uri, plan.target.run_id, days=plan.target.days)


def complete(batch: pa.RecordBatch, view: str, key: tuple[str, ...], time: str) -> pa.RecordBatch:
    """Completes tf.Examples to feature rows: missing `row_id` and `date` are computed from key and time.

    Raises:
        ContractError: a row lacks its key or time.
    """
    rows = frame(batch)
    for name in (*key, time):
        if count := rows[name].null_count():
            fix = "Write the key and the time (µs since 1970) into every example"
            raise ContractError(
                "An example must have the key and time of its spine row", f"{count} of {len(rows)} lack {name!r}", fix
            )
    identity = row_ids(view, [rows[name] for name in (*key, time)])
    filled = rows.with_columns(
        pl.col("row_id").fill_null(identity), pl.col("date").fill_null(pl.col(time).dt.date()).alias("date")
    )
    return to_batch(filled, batch.schema)


def require_all_scored(files: PredictionFiles, counts: JoinCounts, listed: int | None, where: str) -> PredictionFiles:
    """`files`, if they hold one prediction for every feature row that was read, and that the table lists.

    Args:
        files: written.
        counts: of the rows that were read; of several views, those that all have are scored.
        listed: rows by the table's log; None where there is no table, or several. 0: only predictions of rows that
            are gone are removed.
        where: they were read.

    Raises:
        DataError: the numbers differ; nothing is published.
    """
    written, read = _total(files), counts.joined
    if read != written or listed not in (read, None):
        value = f"{read if listed is None else listed} rows listed, {read} read, {written} predictions"
        fix = "Nothing was published; files may have changed while they were read: run the same command again"
        raise DataError("Every feature row must have exactly one prediction", value, fix)
    if not counts.rows and listed is None:
        raise DataError("There must be rows to score", f"there are none in {where}", "Name files that hold examples")
    return files


def _total(files: PredictionFiles) -> int:
    """Number of rows in `files`. Each file counts once: equal rows that were written twice are one file."""
    return sum(file.rows for file in {each if isinstance(each, TFRecordFile) else each[0] for each in files})


def finish(files: PredictionFiles, counts: JoinCounts, prefix: str | None, target: CommitTarget, account: str) -> None:
    """Make the predictions visible, and leave the run's figures where the launcher finds them."""
    count = len({each.path if isinstance(each, TFRecordFile) else each[0].path for each in files})
    missing = {f"{MISSING}{view}": rows for view, rows in counts.missing.items()}
    figures: dict[str, object] = {"rows_in": counts.rows, "rows_out": _total(files), "set_aside": 0, **missing}
    figures["files"] = count
    if prefix:
        publish_tfrecord_files(files, prefix)  # type: ignore[arg-type]
    else:
        dates = tuple(sorted({file.date for file, _ in files}))  # type: ignore[misc]
        target = target if target.dates is not None else dataclasses.replace(target, dates=dates)
        committed: Committed = commit(target, files)  # type: ignore[arg-type]
        figures |= {"dates": len(dates), "commit_version": committed.version, "files": committed.files}
    write_json(account, figures)


def main(argv: Sequence[str]) -> int:
    """Runs the pipeline; returns 0 if the predictions are published.

    With --streaming it runs `beam_pipelines.inference_streaming` instead.
    """
    if "--streaming" in argv:
        return int(importlib.import_module("beam_pipelines.inference_streaming").main(argv))
    every = parse_each(argv)
    for options in every:
        score_with(options, several=len(every) > 1)
    return 0


def score_with(options: InferenceOptions, several: bool) -> None:
    """Score with one model.

    Args:
        several: whether the command scores with other models too.
    """
    with Run("inference", options.run_id, options.folder) as run:
        run.words = ("--model", options.definition.require_model().name) if several else ()
        plan = plan_inference(options)
        pipeline = batch_pipeline(options.beam_args)
        build(pipeline, options, plan)
        execute(pipeline)
        run.update(read_json(FileSystems.join(options.folder, "account.json")))
        run.update(
            {
                "model": plan.bundle.name,
                "model_version": plan.model.version,
                "fingerprint": plan.bundle.fingerprint,
                "features": plan.features,
                "predictions": options.output_tfrecord or plan.target.uri,
            }
        )


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
