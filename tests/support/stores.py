"""Stores that earlier versions wrote, as `data/stores` keeps them: unpacked into a folder of the test's own."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sqlite3
import tarfile
from pathlib import Path
from typing import Any

import polars as pl

from beam_pipelines import cli
from schemas import FeatureView, load_definition
from schemas.live import live_sources
from tests.support.tables import figures_of, rows_of
from tests.support.turns import Job, JobOptions, unread
from transforms.models.registry import Registry, registry_uri
from transforms.storage.paths import features_live_uri, features_uri
from transforms.streaming.messages import Message

ARCHIVES = Path(__file__).parents[1] / "data" / "stores"
# Where `make_stores.py` made them, as their registries still say.
MADE_IN = "/tmp/millrace-stores"
# What of MLflow's database is an absolute address: table → columns.
ADDRESSES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "model_versions": ["source", "storage_location"],
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """An unpacked store with its definitions.

    Args:
        name: of the archive.
        folder: holds `store/`, definitions, and whatever else the archive has.
    """

    name: str
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def expected(self) -> dict[str, Any]:
        """What was recorded when it was made."""
        return dict(json.loads((ARCHIVES / f"{self.name}.json").read_text()))

    @property
    def registry(self) -> Registry:
        return Registry(registry_uri(str(self.store)))

    def view(self, definition: str = "definition.py") -> FeatureView:
        return load_definition(str(self.folder / definition)).view

    def millrace(self, command: str, *flags: str, definition: str = "definition.py") -> None:
        where = ["--definition", str(self.folder / definition), "--store", str(self.store)]
        assert cli.main([command, *where, *flags]) == 0

    def run(self, run_id: str) -> dict[str, Any]:
        """What a run said of itself."""
        return figures_of(self.store, run_id)

    def features(self, view: str, fingerprint: str) -> pl.DataFrame:
        return rows_of(features_uri(str(self.store), view, fingerprint))

    def feature_rows(self) -> pl.DataFrame:
        """The live feature table."""
        view = self.view()
        return rows_of(features_live_uri(str(self.store), view.name, view.fingerprint)).sort("row_id")

    def messages(self, when: str) -> list[list[Message]]:
        """Of the live store's topics, chunk by chunk in order of arrival: what came `before`, what was `to_come`."""
        parts = pl.read_parquet(self.folder / f"messages_{when}.parquet").partition_by("chunk", maintain_order=True)
        return [[Message(*row) for row in part.drop("chunk").iter_rows()] for part in parts]

    def go_on(self, chunks: list[list[Message]], run_id: str = "went-on") -> Job:
        """A live job that starts where the tables stand and takes these messages, committing after each chunk."""
        view = self.view()
        begin = {name: {0: 0, 1: 0} for name in live_sources(view)}
        keep = 12 * 3_600_000_000
        job = Job(view, self.store, self.folder / "sources", begin, JobOptions(run_id, shards=1, keep=keep))
        for chunk in chunks:
            job.take(unread(chunk, job.start))
            job.commit()
        return job


def restored(name: str, folder: Path) -> Stored:
    """Unpack a store; its registry, which names absolute paths, names those of the new place."""
    target = folder / name
    target.mkdir(parents=True)
    with tarfile.open(ARCHIVES / f"{name}.tar.gz") as archive:
        archive.extractall(target, filter="data")
    database = target / "store" / "registry" / "mlflow.db"
    if database.exists():
        with contextlib.closing(sqlite3.connect(database)) as connection, connection:
            for table, columns in ADDRESSES.items():
                for column in columns:
                    connection.execute(
                        f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (f"{MADE_IN}/{name}", str(target))
                    )
    return Stored(name, target)
