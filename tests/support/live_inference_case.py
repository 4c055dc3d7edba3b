"""Helpers and fixtures for: `millrace inference --streaming` without a broker: the live feature table replayed through
the same graph."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from beam_pipelines import features, inference
from beam_pipelines.runtime.errors import guard
from schemas.loading import load_definition
from tests.support.inference_case import DEFINITION, train, write_sources
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, predict
from transforms.records.times import FOREVER
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import features_live_uri
from transforms.streaming.messages import Message, heartbeat, to_arrow

ROWS = 2400


@dataclasses.dataclass(frozen=True)
class House:
    """A store with answers in its live table and three registered versions; 1 is the champion."""

    definition: str
    store: Path

    def run(self, *flags: str) -> int:
        common = ["--streaming", "--definition", self.definition, "--store", str(self.store)]
        return guard(inference.main)([*common, *flags])

    @property
    def registry(self) -> Registry:
        return Registry(registry_uri(str(self.store)))

    def status(self, run_id: str) -> dict[str, Any]:
        return json.loads((self.store / "runs" / run_id / "status.json").read_text())

    def table(self, *position: str) -> pl.DataFrame:
        table = open_table(str(self.store.joinpath(*position)))
        assert table is not None
        return pl.DataFrame(pl.from_arrow(read_group(data_files(table))))

    @property
    def predictions(self) -> pl.DataFrame:
        return self.table("predictions_live", "orders")

    def feature_rows(self) -> pa.RecordBatch:
        view = load_definition(self.definition).view
        table = open_table(features_live_uri(str(self.store), view.name, view.fingerprint))
        assert table is not None
        return read_group(data_files(table))

    def folder(self, version: str) -> Path:
        return Path(self.registry.locate("orders", version)[1])

    def expected(self, version: str) -> pl.DataFrame:
        """What a batch job with this version says of the live answers."""
        made = predict(open_scorer(PinnedModel(str(self.folder(version)), version)), self.feature_rows())
        return pl.DataFrame(pl.from_arrow(made)).sort("row_id")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> House:
    root = tmp_path_factory.mktemp("built")
    definition, store = root / "definition.py", root / "store"
    definition.write_text(DEFINITION)
    source = root / "source"
    write_sources(source)
    assert guard(features.main)(["--definition", str(definition), "--store", str(source)]) == 0
    live = ["--streaming", "--definition", str(definition), "--store", str(store), "--sources", str(source / "sources")]
    assert guard(features.main)([*live, "--run_id", "live"]) == 0
    house = House(str(definition), store)
    for seed in range(3):
        house.registry.register(train(str(definition), source, seed), f"run-{seed}")
    house.registry.promote("orders", "1", "a test")
    return house


@pytest.fixture
def house(built: House, tmp_path: Path) -> Iterator[House]:
    """A copy with version 1 as champion.  The registry is shared: a copy would still name the files of the first."""
    shutil.copytree(built.store / "features_live", tmp_path / "store" / "features_live")
    os.symlink(built.store / "registry", tmp_path / "store" / "registry")
    shutil.copy(built.definition, tmp_path / "definition.py")
    house = House(str(tmp_path / "definition.py"), tmp_path / "store")
    kept = {path: path.read_bytes() for version in "123" for path in house.folder(version).iterdir()}
    house.registry.promote("orders", "1", "a test")
    yield house
    for path, content in kept.items():
        path.write_bytes(content)


def messages_of(house: House, size: int, partitions: int = 2) -> list[Message]:
    """The answers as messages of a topic, dealt to its partitions in turn."""
    view, rows, made, offsets = load_definition(house.definition).view, house.feature_rows(), [], [0] * partitions
    for number, start in enumerate(range(0, rows.num_rows, size)):
        partition = number % partitions
        value = to_arrow(rows.slice(start, size))
        made.append(
            Message("orders.features", partition, offsets[partition], 2**50, f"{view.fingerprint}:1".encode(), value)
        )
        offsets[partition] += 1
    ends = [
        Message("orders.features", number, offset, 2**50, *heartbeat(FOREVER)) for number, offset in enumerate(offsets)
    ]
    return [*made, *ends]
