"""The model registry: MLflow on SQLite and local files, or on a server."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import getpass
import json
import logging
import math
import os
import platform
import sqlite3
import tempfile
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from schemas.errors import StoreError
from schemas.tables import scores
from transforms.models.bundle import FORMAT, Bundle, check_digest, digest_of, load, read_bytes, save
from transforms.storage.paths import MANIFEST

__all__ = ["CHAMPION", "Bundle", "Registry", "digest_of", "load", "registry_uri", "save"]

CHAMPION = "champion"
# Prefix of a rollback's reason.
ROLLBACK = "rollback: "
# Tags on MLflow's runs and versions.
RUN, DIGEST, FINGERPRINT = "millrace.run_id", "millrace.manifest_sha256", "millrace.fingerprint"
_MODEL_FOLDER = "model"  # of a run's artifacts
_EXAMPLE, _REQUEST = "input_example.json", "serving_input_example.json"


def registry_uri(store: str, uri: str | None = None) -> str:
    """The tracking URI to use: `uri`, or SQLite under `<store>/registry`.

    Raises:
        StoreError: the store is not a local folder, and SQLite needs one.
    """
    if uri:
        return uri
    if "://" in store:
        raise StoreError(
            "A registry in SQLite lives on a local disk", store, "Name an MLflow server: --registry https://…"
        )
    return f"sqlite:///{os.path.abspath(store)}/registry/mlflow.db"


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """What MLflow records of a training run beside its model.

    Args:
        params: parameters, shown as text of at most 6000 characters.
        metrics: numbers; None and NaN are left out.
        artifacts: a local folder whose files are logged beside the model.
        tags: tags of the run and of the version.
        example: raw rows as a request has them (`columns`, `data`), stored as MLflow's input example.
    """

    params: Mapping[str, object] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    artifacts: str | Path | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class Registry:
    """Registered models in MLflow.  It can be pickled, and imports MLflow when it is first used.

    Every method raises StoreError when the registry cannot be reached.

    Args:
        uri: MLflow tracking URI.  With `sqlite:///…/mlflow.db`, files go to `artifacts/` beside the database.
    """

    uri: str

    def register(self, bundle: Bundle, run_id: str, record: RunRecord | None = None) -> str:
        """Record a training run and register its model; returns the version.

        A second call with the same `run_id` adds what is missing and returns the same version, also when the first was
        killed.  The alias `champion` does not move.

        Args:
            bundle: the model, registered under its manifest's `model` and logged as an MLflow model folder `model/`.
            run_id: Millrace's run id, a tag of the MLflow run.
            record: what else MLflow shows of the run.
        """
        record = record or RunRecord()
        with self.client(write=True) as client:
            run = self.run(client, bundle.name, run_id, {**record.tags, FINGERPRINT: bundle.fingerprint})
            of_this_run = f"name='{bundle.name}' and run_id='{run.info.run_id}'"
            if done := client.search_model_versions(of_this_run):
                return str(done[0].version)
            _log(client, run, record.params, record.metrics)
            if record.artifacts is not None:
                client.log_artifacts(run.info.run_id, str(record.artifacts))
            with tempfile.TemporaryDirectory() as folder:
                digest = _model_folder(bundle, folder, run.info.run_id, record.example)
                client.log_artifacts(run.info.run_id, folder, _MODEL_FOLDER)
            with _unless_there():
                client.create_registered_model(bundle.name)
            version = client.create_model_version(
                bundle.name,
                f"{run.info.artifact_uri}/{_MODEL_FOLDER}",
                run.info.run_id,
                tags={**record.tags, RUN: run_id, DIGEST: digest, FINGERPRINT: bundle.fingerprint},
                await_creation_for=60,
            )
            client.set_terminated(run.info.run_id)
            return str(version.version)

    def attach(self, name: str, run_id: str, file: str, text: str) -> None:
        """Store `text` as the artifact `file` of a training run, in place of an earlier one."""
        with self.client(write=True) as client:
            client.log_text(self.run(client, name, run_id, {}).info.run_id, text, file)

    def champion(self, name: str) -> str | None:
        """The version that has the alias `champion`, or None."""
        return self.bearer(name, CHAMPION)

    def bearer(self, name: str, alias: str) -> str | None:
        """The version that has `alias`, or None."""
        with self.client() as client:
            return None if client is None else self._aliases(client, name).get(alias)

    def numbers(self, name: str) -> list[str]:
        """Versions that Millrace registered under `name`, oldest first."""
        with self.client() as client:
            found = {} if client is None else self._versions(client, name)
        return [version for version, each in found.items() if DIGEST in each.tags]

    def run_of(self, name: str, version: str) -> str:
        """The id of the run that registered a version, or "" if it is not recorded."""
        with self.client() as client:
            found = {} if client is None else self._versions(client, name)
        return str(found[version].tags.get(RUN, "")) if version in found else ""

    def resolve(self, name: str, version: str | int | None = None) -> tuple[str, str]:
        """Find a version and the folder that `load` reads it from, and check its manifest's digest.

        Files that Beam cannot read at their address are downloaded into a temporary folder.

        Args:
            version: None means the champion.

        Raises:
            StoreError: no such model or version, no champion, files gone or altered.
        """
        version, folder, expected = self.locate(name, version)
        check_digest(folder, MANIFEST, read_bytes(folder, MANIFEST), expected)
        return version, folder

    def locate(self, name: str, version: str | int | None = None) -> tuple[str, str, str]:
        """As `resolve`, without reading the files; returns also the SHA-256 that their manifest must have.

        Raises:
            StoreError: no such model or version, no champion.
        """
        with self.client() as client:
            versions = {} if client is None else self._versions(client, name)
            if client is None or not versions:
                value = f"no model {name!r} in {self.uri}"
                raise StoreError("A model is registered before it is used", value, "Train one with: millrace training")
            if version is None and (version := self._aliases(client, name).get(CHAMPION)) is None:
                value = f"{name!r} with versions {', '.join(versions)}"
                raise StoreError(
                    "A model has a champion once one passed its gates",
                    value,
                    "Name one with --model_version, or: millrace promote",
                )
            if (found := versions.get(str(version))) is None:
                raise StoreError(
                    f"Model {name!r} has the version asked for",
                    repr(str(version)),
                    f"Registered: {', '.join(versions) or 'none'}",
                )
            folder = _local(client.get_model_version_download_uri(name, str(version)), self.uri)
        if (expected := found.tags.get(DIGEST)) is None:
            value = f"version {version} of {name!r} without the tag {DIGEST}"
            raise StoreError(
                "Millrace scores with models that it registered", value, "Register it with: millrace training"
            )
        return str(version), folder, expected

    def models(self) -> list[tuple[str, str]]:
        """(Name, version) of every model that Millrace registered, by name and version."""
        with self.client() as client:
            names, page = [], "" if client is not None else None
            while page is not None:
                found = client.search_registered_models(max_results=1000, page_token=page or None)
                names += [model.name for model in found]
                page = found.token or None
            return [
                (name, version)
                for name in sorted(names)
                for version, each in self._versions(client, name).items()
                if DIGEST in each.tags
            ]

    def promote(self, name: str, version: str | int, why: str, who: str | None = None) -> str | None:
        """Make `version` the champion, record who did it and why, and return the version it replaces.

        Raises:
            StoreError: no such model or version.
        """
        with self.client() as client:
            versions = {} if client is None else self._versions(client, name)
            if client is None or str(version) not in versions:
                raise StoreError(
                    f"Model {name!r} has the version to promote",
                    repr(str(version)),
                    f"Registered: {', '.join(versions) or 'none'}",
                )
            before = self._aliases(client, name).get(CHAMPION)
            if before != str(version):
                at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # a tag's name takes no +
                entry = {"version": str(version), "before": before, "why": why, "who": who or _user()}
                # The reason is written before the move: a second attempt finds and reuses it, whereas a move without a
                # reason would stay unexplained.
                moves = self.history(name)
                if not moves or (moves[-1]["version"], moves[-1]["before"]) != (str(version), before):
                    client.set_registered_model_tag(
                        name, f"{CHAMPION}.{at}", json.dumps(entry, ensure_ascii=False)[:5000]
                    )
                client.set_registered_model_alias(name, CHAMPION, str(version))
            return before

    def rollback(self, name: str, why: str, who: str | None = None) -> tuple[str, str]:
        """Make the previous champion the champion again; returns (from, to).  A second call goes back one further.

        Raises:
            StoreError: there was no champion before.
        """
        stack: list[str] = []
        for entry in self.history(name):
            if entry["why"].startswith(ROLLBACK):
                stack.pop()
            else:
                stack.append(entry["version"])
        if len(stack) < 2:
            raise StoreError(
                f"Model {name!r} had a champion before this one",
                ", ".join(stack) or "none at all",
                "Name one: millrace promote VERSION --why …",
            )
        self.promote(name, stack[-2], f"{ROLLBACK}{why}", who)
        return stack[-1], stack[-2]

    def versions(self, name: str) -> list[dict[str, Any]]:
        """Every version, oldest first: `version`, `champion`, `at` (ms since 1970), `run`, `gates`, `metrics`."""
        with self.client() as client:
            if client is None:
                return []
            champion = self._aliases(client, name).get(CHAMPION)
            return [
                {
                    "version": version,
                    "champion": version == champion,
                    "at": each.creation_timestamp,
                    "run": each.tags.get(RUN, ""),
                    "gates": each.tags.get("millrace.gates", ""),
                    "metrics": dict(client.get_run(each.run_id).data.metrics),
                }
                for version, each in self._versions(client, name).items()
                if DIGEST in each.tags
            ]

    def history(self, name: str) -> list[dict[str, Any]]:
        """Every promotion, oldest first: `at` (ISO, UTC), `version`, `before`, `why`, `who`."""
        with self.client() as client:
            tags = {} if client is None else client.get_registered_model(name).tags
        marks = sorted(tag for tag in tags if tag.startswith(f"{CHAMPION}."))
        return [{"at": tag.removeprefix(f"{CHAMPION}."), **json.loads(tags[tag])} for tag in marks]

    @contextlib.contextmanager
    def client(self, write: bool = False) -> Iterator[Any]:
        """MLflow's client, whose errors become StoreErrors; None to read a SQLite file that does not exist."""
        path = _sqlite_path(self.uri)
        if path is not None:
            if not path.exists() and not write:
                yield None
                return
            _require_sqlite(path, write)
        mlflow = _mlflow()
        from sqlalchemy.exc import SQLAlchemyError  # MLflow does not wrap every error of its database

        try:
            yield _connect(self.uri)
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, OSError) as error:
            text = (str(error).splitlines() or [type(error).__name__])[0][:300]
            value = f"{self.uri}: {text}"
            raise StoreError(
                "The model registry answers", value, "Start it or correct --registry, then run the same command again"
            ) from None

    def run(self, client: Any, name: str, run_id: str, tags: Mapping[str, str]) -> Any:
        """The MLflow run of our `run_id` in the experiment `name`; it is created if there is none."""
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            path = _sqlite_path(self.uri)
            position = None if path is None else str(path.parent / "artifacts" / name)
            with _unless_there():
                client.create_experiment(name, position)
            experiment = client.get_experiment_by_name(name)
        runs = client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = '{run_id}'", max_results=1)
        return (
            runs[0]
            if runs
            else client.create_run(experiment.experiment_id, tags={**tags, RUN: run_id}, run_name=run_id)
        )

    def _versions(self, client: Any, name: str) -> dict[str, Any]:
        found = client.search_model_versions(f"name='{name}'", max_results=10_000)
        return {str(each.version): each for each in sorted(found, key=lambda each: int(each.version))}

    def _aliases(self, client: Any, name: str) -> dict[str, str]:
        if not client.search_registered_models(f"name='{name}'"):
            return {}
        return {alias: str(version) for alias, version in client.get_registered_model(name).aliases.items()}


def _log(client: Any, run: Any, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
    """Log metrics, and the parameters that the run does not have yet, since MLflow refuses to change a parameter."""
    from mlflow.entities import Metric, Param

    at = run.info.start_time
    new = [Param(name, str(value)[:6000]) for name, value in params.items() if name not in run.data.params]
    known = [
        Metric(name, float(value), at, 0)
        for name, value in metrics.items()
        if value is not None and not math.isnan(value)
    ]
    for i in range(0, len(new), 100):
        client.log_batch(run.info.run_id, params=new[i : i + 100])
    for i in range(0, len(known), 1000):
        client.log_batch(run.info.run_id, metrics=known[i : i + 1000])


def _model_folder(bundle: Bundle, folder: str, run_id: str, example: Mapping[str, Any] | None) -> str:
    """Write the bundle as an MLflow model with signature, metadata and example; returns its manifest's digest."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    digest = save(bundle, folder)
    inputs = [ColSpec(_MLFLOW_TYPES[kind], name, required=False) for name, kind in bundle.manifest["inputs"].items()]
    outputs = [ColSpec("float", name) for name in scores(bundle.classes)]
    signature = ModelSignature(Schema(inputs), Schema(outputs))
    metadata = {"fingerprint": bundle.fingerprint, "manifest_sha256": digest}
    flavors = {
        "millrace": {"format": FORMAT, "manifest": MANIFEST},
        "python_function": {"loader_module": "transforms.serving", "python_version": platform.python_version()},
    }
    model = Model(_MODEL_FOLDER, run_id, flavors=flavors, signature=signature, metadata=metadata)
    if example:
        # MLflow stores an example twice: as rows, and as the body of a request.
        for name, content in ((_EXAMPLE, example), (_REQUEST, {"dataframe_split": example})):
            Path(folder, name).write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
        model.saved_input_example_info = {
            "artifact_path": _EXAMPLE,
            "type": "dataframe",
            "pandas_orient": "split",
            "serving_input_path": _REQUEST,
        }
    model.save(os.path.join(folder, "MLmodel"))
    return digest


_MLFLOW_TYPES = {
    # Any input may be null, but MLflow's integers may not.
    "int8": "double",
    "int16": "double",
    "int32": "double",
    "int64": "double",
    "float": "float",
    "double": "double",
    "bool": "boolean",
    "string": "string",
    "large_string": "string",
    "date32[day]": "datetime",
    "timestamp[us, tz=UTC]": "datetime",
}


def _mlflow() -> Any:
    """MLflow, without its telemetry and hints, and with a short wait for a server that does not answer."""
    settings = {
        "DISABLE_TELEMETRY": "true",
        "SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
        "ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "HTTP_REQUEST_MAX_RETRIES": "3",
        "HTTP_REQUEST_TIMEOUT": "30",
    }
    for name, value in settings.items():
        os.environ.setdefault(f"MLFLOW_{name}", value)
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    import mlflow

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # the last logs every retry
        logging.getLogger(name).setLevel(logging.ERROR)
    return mlflow


@functools.lru_cache(16)
def _connect(uri: str) -> Any:
    return _mlflow().MlflowClient(uri)


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Ignore that another process has created the object already; the caller looks it up next."""
    try:
        yield
    except _mlflow().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _sqlite_path(uri: str) -> Path | None:
    return Path(unquote(uri.removeprefix("sqlite:///"))) if uri.startswith("sqlite:///") else None


def _require_sqlite(path: Path, write: bool) -> None:
    """Refuse a path that cannot be written, or a file that is no database, where MLflow would retry ten times."""
    fix = "Grant access, restore the file, or name another registry with --registry"
    try:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise PermissionError(f"{path} cannot be written")
        if path.exists():
            with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
                database.execute("PRAGMA schema_version").fetchone()
        elif write:
            _make_database(path)
    except (OSError, sqlite3.Error) as error:
        raise StoreError("The model registry is a SQLite file that can be used", f"{path}: {error}", fix) from None


def _make_database(path: Path) -> None:
    """Create MLflow's tables in a temporary file first.

    Its migrations are not one transaction, and MLflow refuses a database whose migration was interrupted.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}")
    try:
        _mlflow().MlflowClient(f"sqlite:///{aside}").search_experiments(max_results=1)
        try:
            os.link(aside, path)
        except FileExistsError:  # another process was first
            pass
        except OSError:  # the disk has no hard links
            os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)


def _local(uri: str, tracking_uri: str) -> str:
    """The folder from which `load` reads the artifacts at `uri`."""
    parts = urlparse(uri)
    if parts.scheme in ("", "file"):
        return unquote(parts.path)
    if parts.scheme in ("gs", "s3", "hdfs", "abfss"):
        return uri
    return str(_mlflow().artifacts.download_artifacts(uri, tracking_uri=tracking_uri))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, as in a container
        return str(os.getuid())
