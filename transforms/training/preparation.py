"""What a training run reads, fixed before its graph is built, and the record of where everything came from."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import logging
import platform
from datetime import date, timedelta
from pathlib import Path
from typing import Any

from deltalake import DeltaTable

from schemas import Model
from schemas.durations import instant
from schemas.errors import DataError, StoreError
from schemas.loading import Definition
from transforms.features.manifest_store import read_manifest, warn_of_outdated
from transforms.records.times import EPOCH
from transforms.sources.inventory import version_of
from transforms.storage.delta_tables import data_files
from transforms.storage.feature_tables import open_feature_table
from transforms.storage.paths import features_uri, source_uri
from transforms.training.examples import ExamplePlan, plan_examples
from transforms.training.hyperparameter_search import trials
from transforms.training.xgboost_checks import require_known

log = logging.getLogger("millrace.training")
# Packages whose source decides what a model is, and libraries whose versions are recorded with it.
PACKAGES = ("beam_pipelines", "transforms", "schemas")
LIBRARIES = ("apache-beam", "deltalake", "numpy", "polars", "pyarrow", "xgboost")


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingRequest:
    """Which model to train, and on what.

    Args:
        definition: of the model.
        store: its address.
        sources: folder of the label's source.
        examples: folder that the examples are written to.
        run_id: of the run.
        features_version: of the feature table; None: the newest.
        label_version: of the label's source, if it is a Delta table; None: the newest.
        start: first day of the feature table used; None: the first there is.
        cutoff: the day before which everything is known; None: the day after the last of the feature table.
        now: µs since 1970; rows stamped later are not known yet.
        cores: shared by the trials of one worker.
        device: of XGBoost.
        keep_examples: whether the examples stay after the run.
    """

    definition: Definition
    store: str
    sources: str
    examples: str
    run_id: str
    features_version: int | None
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


def open_features(request: TrainingRequest) -> DeltaTable:
    """The feature table of the model's view.

    Raises:
        MismatchError: there are features of this view under another fingerprint only; both are named.
        DataError: there are none at all.
    """
    view = request.model.view
    uri = features_uri(request.store, view.name, view.fingerprint)
    command = f"millrace features --definition {request.definition.name} --store {request.store}"
    return open_feature_table(uri, command, request.features_version, missing=DataError)


def prepare_training(request: TrainingRequest) -> tuple[ExamplePlan, dict[str, Any]]:
    """What the run reads, at fixed versions, and where all of it comes from.

    Raises:
        MillraceError: no features, or of another definition; see `open_features` and `plan_examples`.
    """
    model = request.model
    require_known(model.objective, trials(model))  # refused before anything is read
    table = open_features(request)
    warn_of_outdated(model.view, table)
    files = data_files(table, request.start, request.cutoff)
    if not files:
        raise DataError(
            "The feature table has rows before the cutoff",
            f"none from {request.start or 'the first day'} to {request.cutoff or 'the last'}",
            "Choose other dates, or compute features",
        )
    cutoff = instant(request.cutoff or max(file.date for file in files) + timedelta(days=1))
    split = model.split.resolve(cutoff)
    source = model.label.source
    version = request.label_version if request.label_version is not None else version_of(request.sources, source)
    plan = plan_examples(
        model, files, request.sources, request.examples, split, request.now, request.keep_examples, version
    )
    text = Path(request.definition.path).read_bytes()
    return plan, {
        "feature_table": {
            "uri": table.table_uri,
            "version": table.version(),
            "first": str(min(file.date for file in files)),
        },
        "sources": sources_of(table),
        "label_files": sorted({each.stamp + " " + each.path for block in plan.blocks for each in block.events}),
        "label_table": {"uri": source_uri(request.sources, source.name), "version": version},
        "split": split.as_json(),
        "read": {
            "start": request.start and str(request.start),
            "cutoff": str(cutoff.date()),
            "now": request.now,
            "sources": request.sources,
        },
        "cores": request.cores,
        "device": request.device,
        "definition": {
            "name": request.definition.name,
            "sha256": hashlib.sha256(text).hexdigest(),
            "source": text.decode(),
        },
        "run_id": request.run_id,
        "code_version": _version("millrace"),
        "code_sha256": code_digest(),
        "constraints_sha256": constraints_digest(),
        "environment": {"python": platform.python_version(), **{name: _version(name) for name in LIBRARIES}},
    }


def sources_of(table: DeltaTable) -> dict[str, dict[str, Any]]:
    """What the feature table's newest commit read of each source: files, their digest, first and last date; of a dimension its content's digest."""
    try:
        manifest = read_manifest(table)
    except StoreError as error:
        log.warning("where the features come from is not known: %s", error)
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, files in manifest.files.items():
        stamps = "\n".join(sorted(f"{path} {each[0]}" for path, each in files.items()))
        dates = [day for day, (rows, _) in manifest.digests.get(name, {}).items() if rows]
        known = {"first": str(_day(min(dates))), "last": str(_day(max(dates)))} if dates else {}
        found[name] = {"files": len(files), "digest": hashlib.sha256(stamps.encode()).hexdigest()[:16], **known}
    return found | {name: {"digest": f"{digest:016x}"} for name, digest in manifest.dimensions.items()}


def _day(number: int) -> date:
    return EPOCH.date() + timedelta(days=number)


def code_digest() -> str:
    """SHA-256 of this program's source."""
    root = Path(__file__).resolve().parents[2]
    digest = hashlib.sha256()
    for path in sorted(path for name in PACKAGES for path in (root / name).rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def constraints_digest() -> str:
    """SHA-256 of all installed distributions, a `name==version` a line, sorted: of the constraints they would make."""
    installed = {f"{each.metadata['Name'].lower()}=={each.version}" for each in importlib.metadata.distributions()}
    return hashlib.sha256("\n".join(sorted(installed)).encode()).hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "source"
