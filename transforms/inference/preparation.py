"""The decisions of a batch inference run before its graph is built: the model and the rows, at fixed versions."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from datetime import date, timedelta

import pyarrow as pa
from deltalake import DeltaTable

from schemas.errors import DataError, MismatchError, StoreError
from schemas.feature_rows import FeatureRows
from schemas.loading import Definition
from schemas.tables import predictions
from transforms.features.manifest_store import warn_of_outdated
from transforms.inference.champion_model import check_model
from transforms.models.bundle import Bundle, bundle_digest, load_bundle
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, columns_read
from transforms.storage.date_spans import partition_days
from transforms.storage.delta_tables import CommitTarget, DataFile, data_files, days_between, delta_schema, open_table
from transforms.storage.feature_tables import open_feature_table
from transforms.storage.joined_features import TableFiles
from transforms.storage.paths import features_uri, predictions_uri
from transforms.storage.tfrecord_io import matching_files


@dataclasses.dataclass(frozen=True, eq=False)
class InferenceRequest:
    """Which rows to score, and with what.

    Args:
        definition: the definition of the view and the model.
        store: address of the store.
        registry: MLflow tracking URI.
        run_id: the run.
        start: first day of feature rows; None: the first day in the table.
        end: the day after the last; None: the day after the last in the table.
        model_version: the version to score with; None: the champion.
        input_tfrecord: pattern of the TFRecord files to score; None: the feature table is scored.
        output_tfrecord: prefix of the TFRecord files to write; None: the predictions table is written.
    """

    definition: Definition
    store: str
    registry: str
    run_id: str
    start: date | None
    end: date | None
    model_version: str | None
    input_tfrecord: str | None
    output_tfrecord: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class InferencePlan:
    """The model and the rows of a run, at fixed versions.

    Args:
        model: version, folder and digest of the model.
        bundle: the model, loaded and checked.
        columns: columns of the feature table that the predictions need.
        rows: which table each column comes from.
        tables: files of the feature table of each view; empty if TFRecord files are read.
        paths: TFRecord files; empty if tables are read.
        features: address and version of the feature tables, or the pattern of TFRecord files.
        target: the dates of the predictions table to replace; its dates are None if TFRecord files decide them.
    """

    model: PinnedModel
    bundle: Bundle
    columns: pa.Schema
    rows: FeatureRows
    tables: TableFiles
    paths: tuple[str, ...]
    features: str
    target: CommitTarget


def prepare_inference(request: InferenceRequest) -> InferencePlan:
    """Finds the model and the rows, and checks that the model was trained on such rows.

    Raises:
        StoreError: there is no champion, version or feature table, or files were altered.
        MismatchError: fingerprints or schemas differ.
        DataError: the interval has no rows.
    """
    declared = request.definition.require_model()
    view, name, rows = declared.view, declared.name, declared.rows
    model, bundle = pinned(request, name)
    check_model(bundle, model.version, rows, _command("training", request))
    schema = pa.schema([rows.schema.field(column) for column in columns_read(bundle)])
    uri = predictions_uri(request.store, name)
    written = predictions(view.output_schema, view.key, view.time, bundle.classes)  # type: ignore[arg-type]
    base = None if request.output_tfrecord else predictions_version(uri, written)
    paths: tuple[str, ...] = ()
    tables: TableFiles = ()
    dates: tuple[date, ...] | None = None
    if request.input_tfrecord:
        paths, features = tuple(matching_files(request.input_tfrecord)), request.input_tfrecord
    else:
        features, tables, dates = feature_files(request, rows, schema, predicted_days(uri, base, request))
    metadata = {
        "pipeline": "inference",
        "model": name,
        "model_version": model.version,
        "fingerprint": bundle.fingerprint,
        "features": features,
    }
    days = 1  # of rows from TFRecord files nothing is known before they are read
    if tables and tables[0] and not request.output_tfrecord:
        span = tables[0][0].date, tables[0][-1].date
        days = partition_days(uri, open_table(uri), sum(file.rows for file in tables[0]), span)
    target = CommitTarget(uri, written, dates, request.run_id, base, None, metadata, days)
    return InferencePlan(model, bundle, schema, rows, tables, paths, features, target)


def pinned(request: InferenceRequest, name: str) -> tuple[PinnedModel, Bundle]:
    """The requested version, or else the current champion, with the digest of its files."""
    registry = Registry(request.registry)
    version = request.model_version or registry.champion(name)
    if version is None:
        fix = f"Train one with: {_command('training', request)}; or name a version with --model_version"
        raise StoreError("A model has a champion before it scores", f"none for {name!r} in {request.registry}", fix)
    version, folder = registry.resolve(name, version)
    digest = bundle_digest(folder)
    return PinnedModel(folder, version, digest), load_bundle(folder, digest)


def feature_files(
    request: InferenceRequest, rows: FeatureRows, schema: pa.Schema, predicted: Sequence[date] = ()
) -> tuple[str, TableFiles, tuple[date, ...]]:
    """Returns addresses and versions of the feature tables, their files in the interval, and its dates.

    An open end of the interval is where both the rows and the predictions end: predictions of rows that are gone must
        not stay.

    Args:
        predicted: dates in the interval that have predictions.
    """
    again = _command("features", request)
    names, every, tables = list[str](), list[DataFile](), list[tuple[DataFile, ...]]()
    for view in rows.views:
        uri = features_uri(request.store, view.name, view.fingerprint)
        table = open_feature_table(uri, again)
        read = (
            schema
            if len(rows.views) == 1
            else pa.schema([view.output_schema.field(name) for name in rows.read_from(view, schema.names)])
        )
        check_fields(uri, table, read, f"Compute them again with: {again}")
        warn_of_outdated(view, table)
        every += data_files(table)
        tables.append(tuple(data_files(table, request.start, request.end)))
        names.append(f"{uri}@{table.version()}")
    dated = sorted({*(file.date for files in tables for file in files), *predicted})
    if not dated:
        every.sort(key=lambda file: file.date)
        has = f"{every[0].date} to {every[-1].date}" if every else "none at all"
        value = f"none in [{request.start or 'the first'}, {request.end or 'the last'}) of {uri}, which has {has}"
        raise DataError("The interval has feature rows", value, f"Compute them with: {again}")
    dates = days_between(request.start or dated[0], request.end or dated[-1] + timedelta(days=1))
    return ", ".join(names), tuple(tables), dates


def predicted_days(uri: str, base: int | None, request: InferenceRequest) -> tuple[date, ...]:
    """Dates in the interval that have predictions at version `base` (None: there is no table, or none is written)."""
    table = None if base is None else open_table(uri, base)
    return () if table is None else tuple(file.date for file in data_files(table, request.start, request.end))


def predictions_version(uri: str, schema: pa.Schema) -> int | None:
    """The version of the predictions table; None if there is no table.

    Raises:
        MismatchError: the table has other columns.
    """
    if (table := open_table(uri)) is None:
        return None
    check_fields(uri, table, schema, "Give the model a new name, or move the old table away")
    return int(table.version())


def check_fields(uri: str, table: DeltaTable, schema: pa.Schema, fix: str) -> None:
    """
    Raises:
        MismatchError: a Delta table does not have the columns of `schema`.
    """
    found = {field.name: str(field.type.type) for field in table.schema().fields}
    wanted = {field.name: str(field.type.type) for field in delta_schema(schema).fields}
    wrong = [
        f"{name} is {found.get(name, 'missing')} instead of {kind}"
        for name, kind in wanted.items()
        if found.get(name) != kind
    ]
    if wrong:
        raise MismatchError(f"The table {uri} has the columns of this definition", "; ".join(wrong), fix)


def _command(pipeline: str, request: InferenceRequest) -> str:
    """The command that computes the missing features or trains the missing model."""
    words = ["millrace", pipeline, "--definition", request.definition.name, "--store", request.store]
    if pipeline == "features":
        words += ["--start", str(request.start)] if request.start else []
        words += ["--end", str(request.end)] if request.end else []
    elif "://" in request.store or request.registry != registry_uri(request.store):
        words += ["--registry", request.registry]
    return shlex.join(words)
