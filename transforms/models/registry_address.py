"""Addresses of a model registry: where its database is, and where a local registry keeps its files.

A registry in SQLite is one folder: the database and `artifacts/` beside it.  Addresses of files are therefore derived
from where the database is now; the address that MLflow recorded when it wrote them may be another one (docs/adr/0014).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sqlite3
import stat
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from schemas.errors import StoreError

__all__ = [
    "artifacts_folder",
    "file_uri",
    "follow_move",
    "open_sqlite",
    "registry_uri",
    "relative_address",
    "sqlite_path",
    "without_password",
]

log = logging.getLogger("millrace.registry")
SQLITE, ARTIFACTS = "sqlite:///", "artifacts"
# Characters that SQLAlchemy or MLflow would not read as part of a path.
_SAFE = "/ !$&'()*+,;=:@~[]{}^`|<>\""
_SERVERS = ("http", "https", "databricks", "postgresql", "mysql", "mssql")
_KNOWN = "an MLflow server (https://…), a database (postgresql://…) or a SQLite file (sqlite:////folder/mlflow.db)"


def registry_uri(store: str, uri: str | None = None) -> str:
    """The tracking URI to use: `uri`, or SQLite under `<store>/registry`.

    Raises:
        StoreError: the store is not a local folder, and SQLite needs one; or `uri` cannot be a registry.
    """
    if uri:
        return absolute_address(uri)
    if "://" in store:
        raise StoreError(
            "A registry in SQLite lives on a local disk", store, "Name an MLflow server: --registry https://…"
        )
    return sqlite_uri(os.path.join(os.path.abspath(store), "registry", "mlflow.db"))


def sqlite_uri(path: str) -> str:
    """The address of a SQLite file; characters that SQLAlchemy or MLflow would interpret are quoted."""
    return SQLITE + "".join(letter if letter.isalnum() or letter in _SAFE + "_.-" else quote(letter) for letter in path)


def sqlite_path(uri: str) -> Path | None:
    """The file of a SQLite registry, as SQLAlchemy reads its address; None for any other registry."""
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0])) if uri.startswith(SQLITE) else None


def absolute_address(uri: str) -> str:
    """`uri`, with the path of a SQLite file made absolute.

    Raises:
        StoreError: it does not name a registry that can be used.
    """
    rule, fix = "A model registry is an MLflow server or a database", f"Name {_KNOWN}"
    try:
        urlsplit(uri)
    except ValueError as error:
        raise StoreError(rule, f"{without_password(uri)}: {error}", fix) from None
    scheme = uri.partition(":")[0].partition("+")[0].lower() if ":" in uri else ""
    if scheme in ("", "file") and uri not in ("databricks", "uc"):
        path = os.path.abspath(unquote(urlsplit(uri).path) if scheme else uri)
        raise StoreError(
            "A model registry is a SQLite file rather than a folder",
            without_password(uri),
            f"Write --registry {sqlite_uri(os.path.join(path, 'mlflow.db'))}",
        )
    if scheme == "sqlite":
        path, _, query = uri.removeprefix(SQLITE).partition("?")
        if not uri.startswith(SQLITE) or unquote(path) in ("", ":memory:") or unquote(path).startswith("file:"):
            raise StoreError(
                "A registry in SQLite is a file that is named by its path",
                uri,
                "Write --registry sqlite:////folder/mlflow.db, with four slashes before an absolute path",
            )
        if query and not re.fullmatch(r"\w+=[^/&]*(&\w+=[^/&]*)*", query):
            raise StoreError("A question mark in the path of a registry is written %3F", uri, "Write %3F instead of ?")
        return sqlite_uri(os.path.abspath(unquote(path))) + (f"?{query}" if query else "")
    if scheme not in _SERVERS and uri not in ("databricks", "uc"):
        raise StoreError(rule, without_password(uri), fix)
    if scheme not in ("databricks", "") and not re.match(r"[\w+]+://[^/]", uri):
        raise StoreError(rule, without_password(uri), fix)
    return uri


def without_password(uri: str) -> str:
    """The address without its password, for messages."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:…@", uri)


def file_uri(path: Path) -> str:
    """The address of a folder in MLflow's form: a plain path, or a quoted `file:` address if the path would be
    misread."""
    text = str(path)
    return text if re.fullmatch(r"[\w./ -]*", text, re.ASCII) else path.as_uri()


def relative_address(recorded: str, run: str) -> str | None:
    """The part of a recorded address that stays the same when a store is moved:
    `artifacts/<experiment>/<run>/artifacts/…`.

    None means that the files are not kept beside the database.
    """
    scheme = urlsplit(recorded).scheme if recorded.startswith("file:") else ""
    path = unquote(urlsplit(recorded).path) if scheme else recorded
    if "://" in path or not run:
        return None
    found = re.search(rf"(?:^|/)({ARTIFACTS}/[^/]+/{re.escape(run)}/artifacts(?:/.*)?)$", path, re.DOTALL)
    return found[1] if found and ".." not in found[1].split("/") else None


def artifacts_folder(database: Path, location: str, name: str) -> Path | None:
    """The folder of an experiment's files beside the database; None if its recorded location is somewhere else.

    Args:
        database: the SQLite file.
        location: MLflow's artifact location of the experiment.
        name: name of the experiment.
    """
    ours = "://" not in location.removeprefix("file://") and location.endswith(f"/{ARTIFACTS}/{name}")
    return database.parent / ARTIFACTS / name if ours else None


def open_sqlite(path: Path, wait: float = 5.0) -> sqlite3.Connection:
    """A connection to a SQLite file that exists, in autocommit mode.

    It is opened for writing where that is allowed, since SQLite then undoes what a killed process had begun to write;
    a connection that can only read is refused there.

    Args:
        path: the file.
        wait: seconds to wait for another process's commit.

    Raises:
        sqlite3.Error: it cannot be opened.
    """
    return sqlite3.connect(f"file:{quote(str(path))}?mode=rw", timeout=wait, isolation_level=None, uri=True)


def require_sqlite(path: Path, write: bool) -> bool:
    """Refuses a path that cannot be written, or a file that is not a database; MLflow would retry ten times.

    Returns:
        Whether the database exists.

    Raises:
        StoreError: the file cannot be a registry.
    """
    fix = "Grant access, restore the file, or name another registry with --registry"
    try:
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.access(path if path.exists() else path.parent, os.W_OK):
                raise PermissionError(f"{path} cannot be written")
        if not path.exists():
            return False
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is not a regular file")
        with contextlib.closing(open_sqlite(path)) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            if tables and "alembic_version" not in tables:
                raise OSError(f"it is a database of something else, with {', '.join(sorted(tables)[:3])}")
        return True
    except (OSError, sqlite3.Error) as error:
        raise StoreError("The model registry is a SQLite file that can be used", f"{path}: {error}", fix) from None


def follow_move(path: Path) -> None:
    """Corrects the addresses that MLflow recorded before a store was moved, so that MLflow's own tools find the files.

    Millrace itself derives them from the location of the database.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=30)) as database:
        moved = {}
        for number, name, location in database.execute(
            "SELECT experiment_id, name, artifact_location FROM experiments"
        ):
            folder = artifacts_folder(path, location or "", name)
            if folder is not None and location != file_uri(folder):
                moved[number] = location, file_uri(folder)
        if not moved:
            return
        database.execute("BEGIN IMMEDIATE")
        for number, (before, now) in moved.items():
            change = "substr({0}, 1, ?) = ? AND {1}"
            runs = "run_id IN (SELECT run_uuid FROM runs WHERE experiment_id = ?)"
            for table, column, which in (
                ("experiments", "artifact_location", "experiment_id = ?"),
                ("runs", "artifact_uri", "experiment_id = ?"),
                ("model_versions", "source", runs),
                ("model_versions", "storage_location", runs),
            ):
                where = change.format(column, which)
                database.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE {where}",
                    (now, len(before) + 1, len(before), before, number),
                )
        database.commit()
        log.info("the registry %s was moved: its %d experiments have their new addresses", path, len(moved))
