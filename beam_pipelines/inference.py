"""inference: feature rows → a registered model → one commit to the predictions table, or TFRecord files."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from typing import Any

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from beam_pipelines.runtime.arguments import Arguments, next_day
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.run_report import Run, execute, read_json, write_json
from schemas.errors import ContractError, DataError, DefinitionError, MismatchError, StoreError
from schemas.loading import Definition, load_definition
from schemas.tables import predictions
from schemas.views import FeatureView
from transforms.features.manifest_store import warn_of_outdated
from transforms.inference.champion_model import check_model
from transforms.models.bundle import Bundle, digest_of, load
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import Pinned, Score, columns_read
from transforms.records.record_batches import batch as to_batch
from transforms.records.record_batches import frame
from transforms.records.row_hashing import row_ids
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    DataFile,
    ReadTable,
    WriteFiles,
    commit,
    data_files,
    days_between,
    delta_schema,
    open_table,
)
from transforms.storage.paths import features_uri, predictions_uri
from transforms.storage.tfrecord_io import (
    ReadExamples,
    TFRecordFile,
    WriteTFRecordFiles,
    matching,
    publish_tfrecord_files,
)

Written = list[tuple[DataFile, dict[str, str]]] | list[TFRecordFile]


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one run of the inference pipeline does."""

    definition: Definition
    store: str
    registry: str
    run_id: str
    start: date | None
    end: date | None
    model_version: str | None
    input_tfrecord: str | None
    output_tfrecord: str | None
    threads: int
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Where the run's own account goes."""
        return FileSystems.join(self.store, "runs", self.run_id)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments("millrace inference", "Score feature rows with a registered model.")
    arguments.add_interval("feature rows")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite in <store>/registry)")
    arguments.add_argument("--model_version", help="a registered version (default: the champion, as of the launch)")
    arguments.add_argument("--input_tfrecord", metavar="GLOB", help="score tf.Examples instead of the feature table")
    arguments.add_argument(
        "--output_tfrecord", metavar="PREFIX", help="write <PREFIX>-*.tfrecord.gz instead of the table"
    )
    arguments.add_argument("--threads", type=int, default=0, help="of XGBoost in each worker (default: every core)")
    flags, rest = arguments.parse(argv)
    if flags.input_tfrecord and (flags.start or flags.end):
        fix = "Leave them out: every example of the files is scored"
        raise DefinitionError("--start and --end choose rows of the feature table", "--input_tfrecord beside them", fix)
    return Options(
        definition=load_definition(flags.definition), store=flags.store, registry=registry_uri(flags.store, flags.registry),
        run_id=flags.run_id, start=flags.start, end=flags.end, model_version=flags.model_version, input_tfrecord=flags.input_tfrecord,
        output_tfrecord=flags.output_tfrecord, threads=flags.threads, beam_args=tuple(rest),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class InferencePlan:
    """What a launch resolves and pins before any row is read.

    Args:
        model: pinned.
        bundle: the same, loaded and checked.
        columns: of the feature table, as the model's predictions need them.
        files: of the feature table; none where TFRecords are read.
        paths: TFRecord files; none where the table is read.
        features: address and version of the feature table read, or the pattern of TFRecord files.
        target: what the predictions replace.  Its dates are None where TFRecords decide them.
    """

    model: Pinned
    bundle: Bundle
    columns: pa.Schema
    files: tuple[DataFile, ...]
    paths: tuple[str, ...]
    features: str
    target: CommitTarget


def plan_inference(options: Options) -> InferencePlan:
    """Resolve the model and the rows, and see that they were made for each other.

    Raises:
        StoreError: no champion, no such version, no feature table, files altered.
        MismatchError: fingerprints or schemas differ.
        DataError: the interval has no rows.
    """
    view, name = options.definition.view, options.definition.require_model().name
    model, bundle = pinned(options, name)
    check_model(bundle, model.version, view, _command("training", options))
    schema = pa.schema([view.output_schema.field(column) for column in columns_read(bundle)])
    if options.input_tfrecord:
        paths, files, dates = tuple(matching(options.input_tfrecord)), (), None
        features = options.input_tfrecord
    else:
        paths, (features, files, dates) = (), feature_files(options, view, schema)
    uri = predictions_uri(options.store, name)
    written = predictions(view.output_schema, view.key, view.time, bundle.classes)  # type: ignore[arg-type]
    base = None if options.output_tfrecord else check_target(uri, written)
    metadata = {
        "pipeline": "inference", "model": name, "model_version": model.version, "fingerprint": bundle.fingerprint, "features": features,
    }  # fmt: skip
    target = CommitTarget(uri, written, dates, options.run_id, base, None, metadata)
    return InferencePlan(model, bundle, schema, files, paths, features, target)


def pinned(options: Options, name: str) -> tuple[Pinned, Bundle]:
    """The version asked for, or the champion of this moment, its files checked."""
    registry = Registry(options.registry)
    version = options.model_version or registry.champion(name)
    if version is None:
        fix = f"Train one with: {_command('training', options)}; or name a version with --model_version"
        raise StoreError("A model has a champion before it scores", f"none for {name!r} in {options.registry}", fix)
    version, folder = registry.resolve(name, version)
    digest = digest_of(folder)
    return Pinned(folder, version, digest), load(folder, digest)


def feature_files(
    options: Options, view: FeatureView, schema: pa.Schema
) -> tuple[str, tuple[DataFile, ...], tuple[date, ...]]:
    """(Address and version of the feature table, its files in the interval, the interval's dates)."""
    uri = features_uri(options.store, view.name, view.fingerprint)
    again = _command("features", options)
    if (table := open_table(uri)) is None:
        if others := fingerprints(options.store, view.name):
            value = f"{', '.join(others)} in {FileSystems.split(uri)[0]}, {view.fingerprint} in the definition"
            raise MismatchError("The definition's features have been computed", value, f"Compute them with: {again}")
        raise StoreError(
            "Features are computed before they are scored", f"no table at {uri}", f"Compute them with: {again}"
        )
    check_fields(uri, table, schema, f"Compute them again with: {again}")
    warn_of_outdated(view, table)
    every = data_files(table)
    files = tuple(data_files(table, options.start, options.end))
    if not files:
        has = f"{every[0].date} to {every[-1].date}" if every else "none at all"
        value = f"none in [{options.start or 'the first'}, {options.end or 'the last'}) of {uri}, which has {has}"
        raise DataError("The interval has feature rows", value, f"Compute them with: {again}")
    dates = days_between(options.start or files[0].date, options.end or next_day(files[-1].date))
    return f"{uri}@{table.version()}", files, dates


def fingerprints(store: str, view: str) -> list[str]:
    """Of all tables there are of a view's features."""
    (match,) = FileSystems.match([FileSystems.join(features_uri(store, view, "*"), "_delta_log", "*.json")])
    return sorted({each.path.replace("\\", "/").split("/")[-3] for each in match.metadata_list})


def check_target(uri: str, schema: pa.Schema) -> int | None:
    """Version of the predictions table, None where there is none; refused if its columns are others."""
    if (table := open_table(uri)) is None:
        return None
    check_fields(uri, table, schema, "Give the model a new name, or move the old table away")
    return int(table.version())


def check_fields(uri: str, table: Any, schema: pa.Schema, fix: str) -> None:
    """Refuse a Delta table without the columns of `schema`."""
    found = {field.name: str(field.type.type) for field in table.schema().fields}
    wanted = {field.name: str(field.type.type) for field in delta_schema(schema).fields}
    wrong = [
        f"{name} is {found.get(name, 'missing')} instead of {kind}"
        for name, kind in wanted.items()
        if found.get(name) != kind
    ]
    if wrong:
        raise MismatchError(f"The table {uri} has the columns of this definition", "; ".join(wrong), fix)


def build(pipeline: beam.Pipeline, options: Options, plan: InferencePlan) -> None:
    """The graph: features → predictions → files, counted → published at once."""
    features = pipeline | "Features" >> source(options, plan)
    read = features | "Rows" >> beam.Map(len) | "Read" >> beam.CombineGlobally(sum)
    predicted = features | "Score" >> Score(plan.model, threads=options.threads)
    files = predicted | "Write" >> sink(options, plan)
    listed = sum(file.rows for file in plan.files) if plan.files else None
    checked = files | "Conserve" >> beam.Map(conserve, beam.pvalue.AsSingleton(read), listed, plan.features)
    account = FileSystems.join(options.folder, "account.json")
    publish = beam.Map(finish, beam.pvalue.AsSingleton(read), options.output_tfrecord, plan.target, account)
    _ = checked | "Publish" >> publish


def source(options: Options, plan: InferencePlan) -> beam.PTransform:
    """Feature rows: RecordBatches of the plan's columns."""
    if not options.input_tfrecord:
        return ReadTable(plan.files, tuple(plan.columns.names))
    view = options.definition.view
    return ReadExamples(plan.paths, plan.columns) | "Complete" >> beam.Map(complete, view.name, view.key, view.time)


def sink(options: Options, plan: InferencePlan) -> beam.PTransform:
    """Predictions to files that nobody sees yet."""
    if options.output_tfrecord:
        return WriteTFRecordFiles(options.output_tfrecord, options.run_id)
    return WriteFiles(plan.target.uri, plan.target.run_id)


def complete(batch: pa.RecordBatch, view: str, key: tuple[str, ...], time: str) -> pa.RecordBatch:
    """tf.Examples as feature rows: `row_id` and `date`, where they were left out, follow from key and time.

    Raises:
        ContractError: a row without its key or time.
    """
    rows = frame(batch)
    for name in (*key, time):
        if count := rows[name].null_count():
            fix = "Write the key and the time (µs since 1970) into every example"
            raise ContractError("An example names its question", f"{count} of {len(rows)} without {name!r}", fix)
    identity = row_ids(view, [rows[name] for name in (*key, time)])
    filled = rows.with_columns(
        pl.col("row_id").fill_null(identity), pl.col("date").fill_null(pl.col(time).dt.date()).alias("date")
    )
    return to_batch(filled, batch.schema)


def conserve(files: Written, read: int, listed: int | None, where: str) -> Written:
    """`files`, if they hold one prediction for every feature row that was read, and that the table lists.

    Args:
        files: written.
        read: rows, counted from what was read.
        listed: rows by the table's log; None where there is no table.
        where: they were read.

    Raises:
        DataError: nothing is published then.
    """
    written = _total(files)
    if read != written or listed not in (read, None):
        value = f"{read if listed is None else listed} rows listed, {read} read, {written} predictions"
        fix = "Nothing was published; files may have changed while they were read: run the same command again"
        raise DataError("Rows are conserved: one prediction for each feature row", value, fix)
    if not read:
        raise DataError("There are rows to score", f"none in {where}", "Name files that hold examples")
    return files


def _total(files: Written) -> int:
    """Rows in `files`, each file once: equal rows written twice are one file, and so one answer."""
    each_once = {
        file.path: file.rows for file in (each if isinstance(each, TFRecordFile) else each[0] for each in files)
    }
    return sum(each_once.values())


def finish(files: Written, read: int, prefix: str | None, target: CommitTarget, account: str) -> None:
    """Make the predictions visible, and leave the run's figures where the launcher finds them."""
    figures: dict[str, Any] = {"rows_in": read, "rows_out": _total(files), "set_aside": 0, "files": len(files)}
    if prefix:
        publish_tfrecord_files(files, prefix)  # type: ignore[arg-type]
    else:
        dates = tuple(sorted({file.date for file, _ in files}))  # type: ignore[misc]
        target = target if target.dates is not None else dataclasses.replace(target, dates=dates)
        committed: Committed = commit(target, files)  # type: ignore[arg-type]
        figures |= {"dates": len(dates), "commit_version": committed.version}
    write_json(account, figures)


def main(argv: Sequence[str]) -> int:
    """Run the pipeline; 0 when the predictions are published.  With --streaming, live: see `beam_pipelines.inference_streaming`."""
    if "--streaming" in argv:
        return int(importlib.import_module("beam_pipelines.inference_streaming").main(argv))
    options = parse(argv)
    with Run("inference", options.run_id, options.folder) as run:
        plan = plan_inference(options)
        pipeline = batch_pipeline(options.beam_args)
        build(pipeline, options, plan)
        execute(pipeline)
        run.update(read_json(FileSystems.join(options.folder, "account.json")))
        run.update({
            "model": plan.bundle.name, "model_version": plan.model.version, "fingerprint": plan.bundle.fingerprint,
            "features": plan.features, "predictions": options.output_tfrecord or plan.target.uri,
        })  # fmt: skip
    return 0


def _command(pipeline: str, options: Options) -> str:
    """The command line that would prepare what is missing."""
    words = ["millrace", pipeline, "--definition", options.definition.name, "--store", options.store]
    if pipeline == "features":
        words += ["--start", str(options.start)] if options.start else []
        words += ["--end", str(options.end)] if options.end else []
    elif "://" in options.store or options.registry != registry_uri(options.store):
        words += ["--registry", options.registry]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
