"""Preparation of a training run: the versions that it reads are fixed and recorded before its graph is built."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date, timedelta
from pathlib import Path
from typing import cast

from deltalake import DeltaTable

from schemas import Model
from schemas.durations import instant
from schemas.errors import DataError, DefinitionError, StoreError
from schemas.loading import Definition, decode_python
from transforms.features.manifest_store import read_manifest, warn_of_outdated
from transforms.models.stored_records import ProvenanceRecord, SourceRecord, SplitBounds, TableVersion
from transforms.records.times import as_date
from transforms.sources.inventory import version_of
from transforms.storage.delta_tables import DataFile, data_files
from transforms.storage.feature_tables import open_feature_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_uri, place_of
from transforms.training.examples import EXAMPLES_FOLDER, ExamplePlan, ExampleRequest, plan_examples
from transforms.training.hyperparameter_search import first_trials
from transforms.training.xgboost_checks import require_known

log = logging.getLogger("millrace.training")
# Packages whose source code is part of a model's identity, and libraries whose versions are recorded with it.
PACKAGES = ("beam_pipelines", "transforms", "schemas")
LIBRARIES = ("apache-beam", "deltalake", "numpy", "polars", "pyarrow", "xgboost")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRequest:
    """Which model to train, and on what.

    Args:
        definition: the model's definition.
        store: address of the store.
        sources: folder of the label's source.
        run_id: id of the run, which registers one version.
        features_versions: by view, the version of its feature table; of others the newest is read.
        label_version: version of the label's source, if that is a Delta table; None means the newest.
        start: first day of features to use; None means the first of the table.
        cutoff: the day before which everything is known; None means the day after the table's last.
        now: µs since 1970; rows stamped later are not known yet.
        cores: cores that the trials of one worker share.
        device: XGBoost's device.
        keep_examples: whether the examples stay after the run.
    """

    definition: Definition
    store: str
    sources: str
    run_id: str
    features_versions: Mapping[str, int]
    label_version: int | None
    start: date | None
    cutoff: date | None
    now: int
    cores: int
    device: str
    keep_examples: bool

    @property
    def model(self) -> Model:
        return self.definition.require_model()

    @property
    def examples(self) -> str:
        """Folder that the examples are written to."""
        return FileSystems.join(self.store, EXAMPLES_FOLDER, self.model.name, self.run_id)


def open_features(request: TrainingRequest) -> list[DeltaTable]:
    """Open the feature table of each of the model's views.

    Raises:
        MismatchError: there are features of a view, but only under another fingerprint; both are named.
        DataError: there are no features of a view.
        DefinitionError: a version is requested of a view that the model does not read.
    """
    names = [view.name for view in request.model.views]
    if wrong := [name for name in request.features_versions if name not in names]:
        raise DefinitionError(
            f"--features_version must name views that model {request.model.name!r} reads, that is {', '.join(names)}",
            f"it names {wrong[0]!r}",
        )
    command = f"millrace features --definition {request.definition.name} --store {request.store}"
    tables = []
    for view in request.model.views:
        uri = features_uri(request.store, view.name, view.fingerprint)
        tables.append(open_feature_table(uri, command, request.features_versions.get(view.name), missing=DataError))
    return tables


def prepare_training(request: TrainingRequest) -> tuple[ExamplePlan, ProvenanceRecord]:
    """Fix the versions that the run reads, and record where everything comes from.

    Returns:
        The plan of the examples, and the manifest entries that record the run's input.

    Raises:
        MillraceError: there are no features, or only those of another definition; see `open_features`, `plan_examples`.
    """
    model = request.model
    require_known(model.objective, first_trials(model))  # before anything is read
    tables, files = open_features(request), []
    for view, table in zip(model.views, tables, strict=True):
        warn_of_outdated(view, table)
        files.append(data_files(table, request.start, request.cutoff))
        if not files[-1]:
            whose = "" if len(tables) == 1 else f" of view {view.name!r}"
            raise DataError(
                f"The feature table{whose} must have rows before the cutoff",
                f"there are none from {request.start or 'the first day'} to {request.cutoff or 'the last'}",
                "Choose other dates, or compute features",
            )
    # After the last day of one table no row of all views is there.
    cutoff = instant(request.cutoff or min(max(file.date for file in each) for each in files) + timedelta(days=1))
    version = request.label_version
    if version is None:
        version = version_of(request.sources, model.label.source)
    examples = ExampleRequest(
        model=model,
        sources=request.sources,
        folder=request.examples,
        split=model.split.resolve(cutoff),
        now=request.now,
        tfrecords=request.keep_examples,
        version=version,
    )
    plan = plan_examples(files, examples)
    return plan, {
        **_provenance_of_features(model, tables, files),
        **_provenance_of_labels(request, plan, version),
        **_provenance_of_run(request, cutoff.date()),
        **_provenance_of_code(),
    }


def _provenance_of_features(
    model: Model, tables: Sequence[DeltaTable], files: Sequence[Sequence[DataFile]]
) -> ProvenanceRecord:
    """Manifest entries of the feature tables, and of the sources that they were computed from."""
    versions: list[TableVersion] = [
        {"uri": table.table_uri, "version": table.version(), "first": str(min(file.date for file in each))}
        for table, each in zip(tables, files, strict=True)
    ]
    sources: dict[str, SourceRecord] = {}
    for table in reversed(tables):
        sources |= sources_read(table)
    found: ProvenanceRecord = {"feature_table": versions[0], "sources": sources}
    if len(tables) > 1:
        found["views"] = [
            {
                "view": view.name,
                "fingerprint": view.fingerprint,
                "inputs": [name for name in model.inputs if model.rows.origins[name] is view],
                **version,
            }
            for view, version in zip(model.views, versions, strict=True)
        ]
    return found


def _provenance_of_labels(request: TrainingRequest, plan: ExamplePlan, version: int | None) -> ProvenanceRecord:
    """Manifest entries of the label's source and of the splits."""
    root = place_of(request.sources, request.model.label.source)
    paths = {each.path for block in plan.blocks for each in block.events}
    found: ProvenanceRecord = {}
    if version is None:
        found["label_content"] = content_digests(root, paths)
    return {
        **found,
        "label_files": sorted({each.stamp + " " + each.path for block in plan.blocks for each in block.events}),
        "label_table": {"uri": root, "version": version},
        "split": cast(SplitBounds, plan.split.as_json()),
    }


def _provenance_of_run(request: TrainingRequest, cutoff: date) -> ProvenanceRecord:
    """Manifest entries of the run's options and definition."""
    definition = request.definition
    return {
        "read": {
            "start": None if request.start is None else str(request.start),
            "cutoff": str(cutoff),
            "now": request.now,
            "sources": path_within_store(request.store, request.sources),
        },
        "cores": request.cores,
        "device": request.device,
        "definition": {
            "name": definition.name,
            "sha256": hashlib.sha256(definition.source).hexdigest(),
            "source": decode_python(definition.source),
            "modules": {path: decode_python(source) for path, source in definition.modules.items()},
        },
        "run_id": request.run_id,
    }


def path_within_store(store: str, folder: str) -> str:
    """The path of a folder within the store, which may be moved; the folder itself if it lies elsewhere.

    >>> path_within_store("/data/store", "/data/store/sources"), path_within_store("/data/store", "/lake/raw")
    ('sources', '/lake/raw')
    """
    root = store.rstrip("/") + "/"
    if "://" not in folder:
        folder = os.path.abspath(folder)
    return folder.removeprefix(root).rstrip("/") if folder.startswith(root) else folder


def content_digests(root: str, paths: Iterable[str]) -> dict[str, str]:
    """SHA-256 of the content of files, by their path below `root`."""

    def digest(path: str) -> tuple[str, str]:
        if "://" in path:
            with FileSystems.open(path, compression_type="uncompressed") as handle:
                return path, hashlib.file_digest(handle, "sha256").hexdigest()
        with open(path, "rb") as file:
            return path, hashlib.file_digest(file, "sha256").hexdigest()

    try:
        with ThreadPoolExecutor(4) as pool:
            return {path_within_source(root, path): value for path, value in pool.map(digest, sorted(paths))}
    except OSError as error:
        raise StoreError(
            "The label's source must stay readable during training", str(error), "Run the same command again"
        ) from None


def path_within_source(root: str, path: str) -> str:
    """The part of a file's path below its source's folder."""
    return path.removeprefix(root.rstrip("/") + "/")


def _provenance_of_code() -> ProvenanceRecord:
    """Manifest entries of Millrace's code and of the installed packages."""
    return {
        "code_version": _version("millrace"),
        "code_sha256": code_digest(),
        "constraints_sha256": constraints_digest(),
        "environment": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def sources_read(table: DeltaTable) -> dict[str, SourceRecord]:
    """What the newest commit of a feature table read of each source.

    Returns:
        By name of a source: the number of files, their digest, the first and the last date; of a dimension the digest
        of its content.
    """
    try:
        manifest = read_manifest(table)
    except StoreError as error:
        log.warning("where the features come from is not known: %s", error)
        return {}
    found: dict[str, SourceRecord] = {}
    for name, files in manifest.files.items():
        stamps = "\n".join(sorted(f"{path} {each[0]}" for path, each in files.items()))
        dates = [day for day, (rows, _) in manifest.digests.get(name, {}).items() if rows]
        found[name] = {"files": len(files), "digest": hashlib.sha256(stamps.encode()).hexdigest()[:16]}
        if dates:
            found[name] |= {"first": str(as_date(min(dates))), "last": str(as_date(max(dates)))}
    for name, digest in manifest.dimensions.items():
        found[name] = {"digest": f"{digest:016x}"}
    return found


def code_digest() -> str:
    """SHA-256 of the source code of `PACKAGES`."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def constraints_digest() -> str:
    """SHA-256 of the installed distributions, as sorted lines of `name==version`."""
    # `each.version` would parse the metadata once more.
    known = (each.metadata for each in importlib.metadata.distributions())
    installed = {f"{each['Name'].lower()}=={each['Version']}" for each in known}
    return hashlib.sha256("\n".join(sorted(installed)).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source"
