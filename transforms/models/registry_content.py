"""What a registry holds, read through MLflow's client or, since importing MLflow takes 1.6 s, from its SQLite file.

Both readers give the same.  The file is read directly only where its tables are those that `SCHEMAS` names; registries
of any other version, and servers, are read through MLflow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from transforms.models.registry_address import open_sqlite

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = [
    "EmptyContent",
    "MlflowContent",
    "RegisteredModel",
    "RegistryContent",
    "RegistryVersion",
    "SqliteContent",
    "sqlite_content",
]

# Alembic's revisions of MLflow's tables that `SqliteContent` can read: that of MLflow 3.17.
SCHEMAS = ("dc11669786a5",)
# Settings under which MLflow would read something else than the default workspace of the file.
_ELSEWHERE = ("MLFLOW_REGISTRY_URI", "MLFLOW_ENABLE_WORKSPACES", "MLFLOW_WORKSPACE")
_OWNED = ("registered_models", "experiments", "webhooks")
_TAGGED = ("registered_model_tags", "model_version_tags")
_WAIT = 20.0  # seconds for another process's commit, as MLflow waits
_PROMPT = "mlflow.prompt.is_prompt"  # MLflow keeps prompts among its models
_PAGE = 1000


@dataclasses.dataclass(frozen=True)
class RegisteredModel:
    """A registered model.

    Args:
        aliases: version by alias.
        tags: MLflow's tags of the model.
    """

    aliases: Mapping[str, str]
    tags: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class RegistryVersion:
    """A version of a registered model that was not deleted.

    Args:
        version: its number.
        at: when it was created, in ms since 1970.
        run_id: the id of MLflow's run.
        tags: MLflow's tags of the version.
    """

    version: str
    at: int
    run_id: str
    tags: Mapping[str, str]


class RegistryContent(Protocol):
    """Reads a registry."""

    def names(self) -> list[str]:
        """Names of all registered models, sorted."""

    def model(self, name: str) -> RegisteredModel | None:
        """A registered model, or None."""

    def versions(self, name: str) -> dict[str, RegistryVersion]:
        """Versions of a model by their number, oldest first; empty if there is no such model."""

    def address(self, name: str, version: str) -> str:
        """Where MLflow recorded the files of a version that exists."""

    def metrics(self, run_id: str) -> dict[str, float]:
        """The metrics of a run that exists."""


@dataclasses.dataclass(frozen=True)
class EmptyContent:
    """A registry that does not exist yet."""

    def names(self) -> list[str]:
        return []

    def model(self, name: str) -> None:
        return None

    def versions(self, name: str) -> dict[str, RegistryVersion]:
        return {}

    def address(self, name: str, version: str) -> str:
        raise KeyError(name, version)

    def metrics(self, run_id: str) -> dict[str, float]:
        raise KeyError(run_id)


@dataclasses.dataclass(frozen=True)
class MlflowContent:
    """A registry read through MLflow's client."""

    client: MlflowClient

    def names(self) -> list[str]:
        found, token = list[str](), ""
        while True:
            page = self.client.search_registered_models(max_results=_PAGE, page_token=token or None)
            found += [model.name for model in page]
            if not (token := page.token or ""):
                return sorted(found)

    def model(self, name: str) -> RegisteredModel | None:
        if not self.client.search_registered_models(f"name='{name}'"):
            return None
        found = self.client.get_registered_model(name)
        aliases = {alias: str(version) for alias, version in found.aliases.items()}
        return RegisteredModel(aliases, dict(found.tags))

    def versions(self, name: str) -> dict[str, RegistryVersion]:
        found, token = list[RegistryVersion](), ""
        while True:
            page = self.client.search_model_versions(f"name='{name}'", max_results=10_000, page_token=token or None)
            found += [
                RegistryVersion(str(each.version), each.creation_timestamp, each.run_id or "", dict(each.tags))
                for each in page
            ]
            if not (token := page.token or ""):
                return {each.version: each for each in sorted(found, key=lambda each: int(each.version))}

    def address(self, name: str, version: str) -> str:
        return str(self.client.get_model_version_download_uri(name, version))

    def metrics(self, run_id: str) -> dict[str, float]:
        return dict(self.client.get_run(run_id).data.metrics)


@dataclasses.dataclass(frozen=True)
class SqliteContent:
    """A registry read from its SQLite file, as MLflow reads it.

    Args:
        database: a connection that only reads; see `sqlite_content`.
    """

    database: sqlite3.Connection

    def names(self) -> list[str]:
        query = (
            "SELECT name FROM registered_models WHERE workspace = 'default' AND name NOT IN (SELECT name FROM "
            "registered_model_tags WHERE workspace = 'default' AND key = ? AND value = 'true')"
        )
        return sorted(name for (name,) in self.database.execute(query, (_PROMPT,)))

    def model(self, name: str) -> RegisteredModel | None:
        there = "SELECT 1 FROM registered_models WHERE workspace = 'default' AND name = ?"
        tags = "SELECT key, value FROM registered_model_tags WHERE workspace = 'default' AND name = ?"
        aliases = "SELECT alias, version FROM registered_model_aliases WHERE workspace = 'default' AND name = ?"
        if self.database.execute(there, (name,)).fetchone() is None:
            return None
        found = RegisteredModel(
            {alias: str(version) for alias, version in self.database.execute(aliases, (name,))},
            dict(self.database.execute(tags, (name,))),
        )
        return None if _PROMPT in found.tags else found

    def versions(self, name: str) -> dict[str, RegistryVersion]:
        query = (
            "SELECT version, creation_time, coalesce(run_id, '') FROM model_versions WHERE workspace = 'default' "
            "AND name = ? AND current_stage != 'Deleted_Internal' ORDER BY version"
        )
        tagged = "SELECT version, key, value FROM model_version_tags WHERE workspace = 'default' AND name = ?"
        rows = self.database.execute(query, (name,)).fetchall()
        tags: dict[int, dict[str, str]] = {version: {} for version, _, _ in rows}
        for version, key, value in self.database.execute(tagged, (name,)):
            if (key, value) == (_PROMPT, "true"):
                return {}
            tags.setdefault(version, {})[key] = value
        return {str(version): RegistryVersion(str(version), at, run, tags[version]) for version, at, run in rows}

    def address(self, name: str, version: str) -> str:
        query = (
            "SELECT storage_location, source FROM model_versions WHERE workspace = 'default' AND name = ? "
            "AND version = ?"
        )
        location, source = self.database.execute(query, (name, int(version))).fetchone()
        return str(location or source)

    def metrics(self, run_id: str) -> dict[str, float]:
        if self.database.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,)).fetchone() is None:
            raise sqlite3.DataError(f"Run with id={run_id} not found")
        query = "SELECT key, CASE WHEN is_nan THEN NULL ELSE value END FROM latest_metrics WHERE run_uuid = ?"
        found = self.database.execute(query, (run_id,))
        return {key: float("nan") if value is None else value for key, value in found}


@contextlib.contextmanager
def sqlite_content(path: Path) -> Iterator[SqliteContent | None]:
    """The content of a registry's file at one moment; None where MLflow has to read it.

    While the context is open, no other process can commit to the file.

    Raises:
        sqlite3.Error: the file cannot be read.
    """
    if not any(os.environ.get(name) for name in _ELSEWHERE):
        with contextlib.closing(open_sqlite(path, _WAIT)) as database:
            database.execute("PRAGMA query_only = ON")
            database.execute("BEGIN")
            if _readable(database):
                yield SqliteContent(database)
                return
    yield None


def _readable(database: sqlite3.Connection) -> bool:
    """Whether the tables are as `SqliteContent` expects them, and all that they hold is in the default workspace."""
    if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'").fetchone():
        return False
    schema = [revision for (revision,) in database.execute("SELECT version_num FROM alembic_version")]
    if len(schema) != 1 or schema[0] not in SCHEMAS:
        return False
    # MLflow refuses a file in which any of these is in another workspace, and a model that is a prompt by half.
    odd = [f"SELECT 1 FROM {table} WHERE workspace != 'default'" for table in _OWNED]
    odd += [f"SELECT 1 FROM {table} WHERE key = '{_PROMPT}' AND value IS NOT 'true'" for table in _TAGGED]
    return database.execute(" UNION ALL ".join(odd)).fetchone() is None
