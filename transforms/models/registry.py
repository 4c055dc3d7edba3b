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
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from schemas.errors import StoreError
from schemas.tables import scores
from transforms.models.bundle import (
    FORMAT,
    LOADER,
    MLMODEL,
    Bundle,
    check_digest,
    check_mlmodel,
    read_bytes,
    save_bundle,
)
from transforms.models.champion_moves import CHAMPION, RETURN, ROLLBACK, ChampionMoves, only_move
from transforms.models.registry_address import (
    absolute_address,
    artifacts_folder,
    file_uri,
    follow_move,
    registry_uri,
    relative_address,
    require_sqlite,
    sqlite_path,
    sqlite_uri,
    without_password,
)
from transforms.models.registry_content import EmptyContent, MlflowContent, RegistryContent, sqlite_content
from transforms.models.stored_records import ChampionMove, RequestExample
from transforms.storage import durable
from transforms.storage.bounded import NoResponse, first_contact
from transforms.storage.paths import MANIFEST

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

__all__ = ["CHAMPION", "Registry", "registry_uri"]

# Tags on MLflow's runs and versions.
RUN, DIGEST, FINGERPRINT = "millrace.run_id", "millrace.manifest_sha256", "millrace.fingerprint"
_MODEL_FOLDER = "model"  # of a run's artifacts
_EXAMPLE, _REQUEST = "input_example.json", "serving_input_example.json"


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """What MLflow records of a training run beside its model.

    Args:
        params: parameters, shown as text of at most 6000 characters.
        metrics: numbers; None and NaN are left out.
        artifacts: a local folder; its files are logged beside the model.
        tags: tags of the run and of the version.
        example: raw rows in the form of a request (`columns`, `data`), stored as MLflow's input example.
    """

    params: Mapping[str, object] = dataclasses.field(default_factory=dict)
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    artifacts: str | Path | None = None
    tags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    example: RequestExample | None = None


@dataclasses.dataclass(frozen=True)
class RegisteredVersion:
    """A version of a registered model.

    Args:
        version: its number.
        champion: whether it has the alias `champion`.
        at: ms since 1970.
        run: id of Millrace's run.
        gates: text that names the gates that failed, or states that all hold.
        metrics: the metrics of the run in MLflow.
    """

    version: str
    champion: bool
    at: int
    run: str
    gates: str
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Registry:
    """Registered models in MLflow.  It can be pickled, and imports MLflow when it is first used.

    Every method raises StoreError when the registry cannot be reached.

    Args:
        uri: MLflow tracking URI.  With `sqlite:///…/mlflow.db`, files go to `artifacts/` beside the database, and are
            found there after the folder was moved or copied.
    """

    uri: str

    def register(self, bundle: Bundle, run_id: str, record: RunRecord | None = None) -> str:
        """Record a training run and register its model; returns the version.

        A second call with the same `run_id` adds what is missing and returns the same version, even if the first was
        killed.  The alias `champion` does not move.

        Args:
            bundle: the model, registered under its manifest's `model` and logged as an MLflow model folder `model/`.
            run_id: Millrace's run id, a tag of the MLflow run.
            record: what MLflow shows of the run besides its model.
        """
        record = record or RunRecord()
        if not re.fullmatch(r"[a-z][a-z0-9_]{0,99}", bundle.name):  # because it names a folder
            rule = "The name of a registered model is lower-case letters, digits and underscores"
            raise StoreError(rule, repr(bundle.name), "Train the model again")
        with self.client(write=True) as client:
            run = self.run(client, bundle.name, run_id, {**record.tags, FINGERPRINT: bundle.fingerprint})
            of_this_run = f"name='{bundle.name}' and run_id='{run.info.run_id}'"
            if done := client.search_model_versions(of_this_run):
                return str(done[0].version)
            _log(client, run, record.params, record.metrics)
            if record.artifacts is not None:
                self._store(client, run, str(record.artifacts))
            with tempfile.TemporaryDirectory() as folder:
                digest = _model_folder(bundle, folder, run.info.run_id, record.example)
                self._store(client, run, folder, _MODEL_FOLDER)
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
            run = self.run(client, name, run_id, {})
            with tempfile.TemporaryDirectory() as folder:
                Path(folder, file).write_text(text, encoding="utf-8")
                self._store(client, run, folder)

    def champion(self, name: str) -> str | None:
        """The version that has the alias `champion`, or None."""
        return self.bearer(name, CHAMPION)

    def bearer(self, name: str, alias: str) -> str | None:
        """The version that has `alias`, or None."""
        with self.reading() as content:
            return _aliases(content, name).get(alias)

    def numbers(self, name: str) -> list[str]:
        """Versions that Millrace registered under `name`, oldest first."""
        with self.reading() as content:
            found = content.versions(name)
        return [version for version, each in found.items() if DIGEST in each.tags]

    def run_of(self, name: str, version: str) -> str:
        """The id of the run that registered a version, or "" if it is not recorded."""
        with self.reading() as content:
            found = content.versions(name)
        return str(found[version].tags.get(RUN, "")) if version in found else ""

    def resolve(self, name: str, version: str | int | None = None) -> tuple[str, str]:
        """Find a version and the folder that `load_bundle` reads it from, and check its manifest's digest.

        Files that Beam cannot read at their address are downloaded into a temporary folder.

        Args:
            version: None means the champion.

        Raises:
            StoreError: no such model or version, no champion, files gone or altered.
        """
        version, folder, expected = self.locate(name, version)
        check_mlmodel(folder)
        check_digest(folder, MANIFEST, read_bytes(folder, MANIFEST), expected)
        return version, folder

    def locate(self, name: str, version: str | int | None = None) -> tuple[str, str, str]:
        """As `resolve`, without reading the files; returns also the SHA-256 that their manifest must have.

        Raises:
            StoreError: no such model or version, no champion.
        """
        with self.reading() as content:
            versions = content.versions(name)
            if not versions:
                value = f"no model {name!r} in {self.uri}"
                raise StoreError("A model is registered before it is used", value, "Train one with: millrace training")
            if version is None and (version := _aliases(content, name).get(CHAMPION)) is None:
                value = f"{name!r} with versions {', '.join(versions)}"
                raise StoreError(
                    "A model has a champion once one passed its gates",
                    value,
                    "Name one with --model_version, or: millrace promote",
                )
            if (found := versions.get(str(version))) is None:
                raise StoreError(
                    f"Model {name!r} has the version named",
                    repr(str(version)),
                    f"Registered: {', '.join(versions) or 'none'}",
                )
            recorded = content.address(name, found.version)
        if (expected := found.tags.get(DIGEST)) is None:
            value = f"version {version} of {name!r} without the tag {DIGEST}"
            raise StoreError(
                "Millrace scores with models that it registered", value, "Register it with: millrace training"
            )
        return found.version, self._folder(recorded, found.run_id), expected

    def models(self) -> list[tuple[str, str]]:
        """(Name, version) of every model that Millrace registered, by name and version."""
        with self.reading() as content:
            return [
                (name, version)
                for name in content.names()
                for version, each in content.versions(name).items()
                if DIGEST in each.tags
            ]

    def promote(self, name: str, version: str | int, why: str, who: str | None = None) -> str | None:
        """Make `version` the champion, record who did it and why, and return the version it replaces.

        A promotion of the present champion is recorded too (see `records`).

        Raises:
            StoreError: no such model or version; or another process holds the lock of moves.
        """
        with self._moves(name, str(version)) as moves:
            return moves.promote(str(version), why, who or _user())

    def replace(self, name: str, champion: str | None, version: str, why: str, who: str) -> str | None:
        """Make `version` the champion if the champion is still `champion`; returns the champion afterwards.

        Raises:
            StoreError: as `promote`.
        """
        with self._moves(name, version) as moves:
            if moves.champion == champion:
                moves.promote(version, why, who)
            return moves.champion

    def rollback(self, name: str, why: str, who: str | None = None) -> tuple[str, str]:
        """Makes the previous champion the champion again; returns (from, to).  A second call goes back one more step.

        Raises:
            StoreError: there was no champion before, or as `promote`.
        """
        with self._moves(name) as moves:
            target = moves.previous()
            _require(moves.content, name, target)
            before = moves.promote(target, f"{ROLLBACK}{why}", who or _user(), RETURN)
            return str(before), target

    @contextlib.contextmanager
    def _moves(self, name: str, version: str | None = None) -> Iterator[ChampionMoves]:
        """The moves of a model's alias, while no other process can move it."""
        with self.client() as client:
            content: RegistryContent = EmptyContent() if client is None else MlflowContent(client)
            if client is None or version is not None:
                _require(content, name, version or "")
            path = sqlite_path(self.uri)
            with only_move(None if path is None else path.parent):
                yield ChampionMoves(content, name, client)

    def versions(self, name: str) -> list[RegisteredVersion]:
        """Every version that Millrace registered, oldest first."""
        with self.reading() as content:
            champion = _aliases(content, name).get(CHAMPION)
            return [
                RegisteredVersion(
                    version=version,
                    champion=version == champion,
                    at=each.at,
                    run=each.tags.get(RUN, ""),
                    gates=each.tags.get("millrace.gates", ""),
                    metrics=content.metrics(each.run_id),
                )
                for version, each in content.versions(name).items()
                if DIGEST in each.tags
            ]

    def history(self, name: str) -> list[ChampionMove]:
        """Every move of the alias, in the order in which they happened: `at` (ISO, UTC), `version`, `before`, `why`,
        `who`."""
        with self.reading() as content:
            return ChampionMoves(content, name).moves

    def records(self, name: str) -> list[ChampionMove]:
        """As `history`, including promotions of a version that was already champion (their `before` is their
        `version`)."""
        with self.reading() as content:
            return ChampionMoves(content, name).records

    @contextlib.contextmanager
    def client(self, write: bool = False) -> Iterator[MlflowClient]:
        """MLflow's client, whose errors become StoreErrors; None to read a SQLite file that does not exist."""
        path = sqlite_path(absolute_address(self.uri))
        there = path is not None and require_sqlite(path, write)
        if path is not None and not there and not write:
            yield None
            return
        mlflow = _mlflow()
        from sqlalchemy.exc import SQLAlchemyError  # MLflow does not wrap every error of its database

        try:
            if path is None:
                _require_response(self.uri)
            elif write:
                if not there:
                    _make_database(path)
                follow_move(path)
            yield _connect(self.uri if path is None else _plain_uri(path))
        except ModuleNotFoundError as error:
            raise StoreError(
                "The driver of a registry's database is installed",
                f"no module {error.name!r} for {without_password(self.uri)}",
                f"Install it: pip install {_DRIVERS.get(str(error.name), error.name)}; "
                "or name another driver, as mysql+pymysql://…",
            ) from None
        except (mlflow.exceptions.MlflowException, SQLAlchemyError, sqlite3.Error, OSError, NoResponse) as error:
            raise self._unreachable(error) from None

    @contextlib.contextmanager
    def reading(self) -> Iterator[RegistryContent]:
        """What the registry holds, without an import of MLflow where its file can be read directly.

        While the context is open, no other process can commit to a registry in SQLite.
        """
        path = sqlite_path(absolute_address(self.uri))
        if path is not None and not require_sqlite(path, write=False):
            yield EmptyContent()
            return
        with contextlib.ExitStack() as stack:
            content: RegistryContent | None = None
            if path is not None:
                with contextlib.suppress(sqlite3.Error):  # MLflow meets it too, unless it has passed
                    content = stack.enter_context(sqlite_content(path))
            if content is None:
                content = MlflowContent(stack.enter_context(self.client()))
            try:
                yield content
            except sqlite3.Error as error:
                raise self._unreachable(error) from None

    def _unreachable(self, error: Exception) -> StoreError:
        text = (str(error).splitlines() or [type(error).__name__])[0][:300]
        value = f"{without_password(self.uri)}: {without_password(text)}"
        fix = "Start it or correct --registry, then run the same command again"
        return StoreError("The model registry can be reached", value, fix)

    def run(self, client: MlflowClient, name: str, run_id: str, tags: Mapping[str, str]) -> MlflowRun:
        """The MLflow run of our `run_id` in the experiment `name`; it is created if there is none."""
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            path = sqlite_path(self.uri)
            position = None if path is None else file_uri(path.absolute().parent / "artifacts" / name)
            with _unless_there():
                client.create_experiment(name, position)
            experiment = client.get_experiment_by_name(name)
        runs = client.search_runs([experiment.experiment_id], f"tags.`{RUN}` = '{run_id}'", max_results=1)
        return (
            runs[0]
            if runs
            else client.create_run(experiment.experiment_id, tags={**tags, RUN: run_id}, run_name=run_id)
        )

    def _folder(self, recorded: str, run_id: str) -> str:
        """The folder from which `load_bundle` reads a version's files, by their recorded address and its run."""
        path = sqlite_path(self.uri)
        if path is not None and (relative := relative_address(recorded, run_id)) is not None:
            return str(path.absolute().parent / relative)
        parts = urlparse(recorded)
        if parts.scheme in ("", "file"):
            return unquote(parts.path)
        if parts.scheme in ("gs", "s3", "hdfs", "abfss"):
            return recorded
        with self.client():
            return str(_mlflow().artifacts.download_artifacts(recorded, tracking_uri=self.uri))

    def _store(self, client: MlflowClient, run: MlflowRun, folder: str, within: str = "") -> None:
        """Stores the files in `folder` as artifacts of a run; a local registry keeps them beside its database.

        Raises:
            StoreError: they cannot be written.
        """
        path = sqlite_path(self.uri)
        experiment = client.get_experiment(run.info.experiment_id)
        ours = (
            None if path is None else artifacts_folder(path.absolute(), experiment.artifact_location, experiment.name)
        )
        if ours is None:
            client.log_artifacts(run.info.run_id, folder, within or None)
            return
        target = ours / run.info.run_id / "artifacts" / within
        for file in sorted(Path(folder).iterdir()):
            durable.write_file(str(target / file.name), file.read_bytes())


def _aliases(content: RegistryContent, name: str) -> Mapping[str, str]:
    model = content.model(name)
    return {} if model is None else model.aliases


def _require(content: RegistryContent, name: str, version: str) -> None:
    """Refuse a version that is not registered."""
    versions = content.versions(name)
    if version not in versions:
        raise StoreError(
            f"Model {name!r} has the version to promote",
            repr(version),
            f"Registered: {', '.join(versions) or 'none'}",
        )


def _log(client: MlflowClient, run: MlflowRun, params: Mapping[str, object], metrics: Mapping[str, float]) -> None:
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


def _model_folder(bundle: Bundle, folder: str, run_id: str, example: RequestExample | None) -> str:
    """Write the bundle as an MLflow model with signature, metadata and example; returns its manifest's digest."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, Schema

    digest = save_bundle(bundle, folder)
    inputs = [ColSpec(_MLFLOW_TYPES[kind], name, required=False) for name, kind in bundle.manifest["inputs"].items()]
    outputs = [ColSpec("float", name) for name in scores(bundle.classes)]
    signature = ModelSignature(Schema(inputs), Schema(outputs))
    metadata = {"fingerprint": bundle.fingerprint, "manifest_sha256": digest}
    flavors = {
        "millrace": {"format": FORMAT, "manifest": MANIFEST},
        "python_function": {"loader_module": LOADER, "python_version": platform.python_version()},
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
    model.save(os.path.join(folder, MLMODEL))
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


def _mlflow() -> ModuleType:
    """Imports MLflow, without its telemetry and hints, and with a short wait for a server that does not respond."""
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

    for name in ("mlflow", "alembic", "urllib3.connectionpool"):  # the last of these logs every retry
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("mlflow.store.db.utils").setLevel(
        logging.CRITICAL
    )  # logs the traceback of every error that it raises
    return mlflow


@functools.lru_cache(16)
def _connect(uri: str) -> MlflowClient:
    return _mlflow().MlflowClient(uri)


@contextlib.contextmanager
def _unless_there() -> Iterator[None]:
    """Ignore that another process has created the object already; the caller looks it up next."""
    try:
        yield
    except _mlflow().exceptions.MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _plain_uri(path: Path) -> str:
    """An address of a SQLite file without quoted characters, because MLflow creates the folders of an address
    literally.

    A path with other characters is reached through a link in a temporary folder, which is removed when the process
    ends.
    """
    uri = sqlite_uri(str(path))
    return uri if unquote(uri) == uri else sqlite_uri(os.path.join(_link(str(path.absolute().parent)), path.name))


@functools.lru_cache(64)
def _link(folder: str) -> str:
    home = tempfile.TemporaryDirectory(prefix="millrace-registry-")
    _links.append(home)  # removed by its finaliser
    link = os.path.join(home.name, "registry")
    os.symlink(folder, link)
    return link


_links: list[tempfile.TemporaryDirectory[str]] = []


_DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}


@functools.lru_cache(16)
def _require_response(uri: str) -> None:
    """Ask a server or a database once, where MLflow and its libraries would try for minutes.

    Raises:
        NoResponse: the database does not respond.
        SQLAlchemyError, MlflowException, ModuleNotFoundError: it refuses, or its driver is not installed.
    """
    if uri.partition("+")[0].partition(":")[0] not in ("postgresql", "mysql", "mssql"):
        first_contact(lambda: _connect(uri).search_experiments(max_results=1))
        return
    import sqlalchemy

    timeout = {} if uri.startswith("mssql") else {"connect_timeout": 20}
    engine = sqlalchemy.create_engine(uri, connect_args=timeout, poolclass=sqlalchemy.NullPool)
    first_contact(lambda: engine.connect().close())


_making, _made = threading.Lock(), list[bytes]()


def _make_database(path: Path) -> None:
    """Writes MLflow's tables under a temporary name first, so that the file is complete or does not exist."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{time.time_ns()}")
    try:
        aside.write_bytes(_empty_database())
        durable.sync_file(str(aside))
        try:
            os.link(aside, path)
        except FileExistsError:  # another process was first
            pass
        except OSError:  # the disk has no hard links
            os.replace(aside, path)
        durable.sync_folder(str(path.parent))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(aside)


def _empty_database() -> bytes:
    """A database with MLflow's tables.  Making it takes a second or two, so it is made once per process."""
    with _making:
        if not _made:
            with tempfile.TemporaryDirectory(prefix="millrace-registry-") as folder:
                path = Path(folder, "mlflow.db")
                # MLflow refuses a database in which its migrations, which are not one transaction, were interrupted.
                _mlflow().MlflowClient(_plain_uri(path)).search_experiments(max_results=1)
                _made.append(path.read_bytes())
        return _made[0]


@contextlib.contextmanager
def preparing_database(uri: str) -> Iterator[None]:
    """Prepares, in parallel with other work, what a new SQLite registry will need; nothing is written to it."""
    path = sqlite_path(uri)
    if path is None or os.path.exists(path):  # this raises no error
        yield
        return
    pool = ThreadPoolExecutor(1, "registry")
    pool.submit(_empty_database)  # the error is raised again when the database is needed
    try:
        yield
    finally:
        pool.shutdown(wait=False)  # Ctrl-C does not wait for this thread


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # the user id has no name, for example in a container
        return str(os.getuid())
