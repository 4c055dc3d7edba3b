"""`millrace inference --streaming` without a broker: the live feature table replayed through the same graph."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from test_inference_pipeline import DEFINITION, train, write_sources

from beam_pipelines import features, inference
from beam_pipelines.reporting import guard
from schemas.loading import load_definition
from transforms.live_tables import features_live_uri
from transforms.registry import Registry, registry_uri
from transforms.scoring import Pinned, open_scorer, predict
from transforms.tables import data_files, open_table, read_group

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

    def table(self, *place: str) -> pl.DataFrame:
        table = open_table(str(self.store.joinpath(*place)))
        assert table is not None
        return pl.DataFrame(pl.from_arrow(read_group(data_files(table))))

    @property
    def predictions(self) -> pl.DataFrame:
        return self.table("predictions_live", "orders")

    def answers(self) -> pa.RecordBatch:
        view = load_definition(self.definition).view
        table = open_table(features_live_uri(str(self.store), view.name, view.fingerprint))
        assert table is not None
        return read_group(data_files(table))

    def folder(self, version: str) -> Path:
        return Path(self.registry.locate("orders", version)[1])

    def expected(self, version: str) -> pl.DataFrame:
        """What a batch job with this version says of the live answers."""
        made = predict(open_scorer(Pinned(str(self.folder(version)), version)), self.answers())
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


class At(logging.Handler):
    """Does something when the replay comes to a row."""

    def __init__(self, row: int, what: Callable[[], Any]) -> None:
        super().__init__()
        self.row, self.what, self.done = row, what, False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.done and record.msg.startswith("replay: at row") and record.args[0] >= self.row:  # type: ignore[index,operator]
            self.done = True
            self.what()


@pytest.fixture
def at() -> Iterator[Callable[[int, Callable[[], Any]], None]]:
    log, handlers = logging.getLogger("millrace.serving"), []

    def add(row: int, what: Callable[[], Any]) -> None:
        handlers.append(At(row, what))
        log.addHandler(handlers[-1])

    yield add
    for handler in handlers:
        log.removeHandler(handler)


def test_every_answer_is_scored_once_as_a_batch_job_would(house: House) -> None:
    assert house.run("--run_id", "one") == 0
    found, expected = house.predictions.sort("row_id"), house.expected("1")
    assert found.select(expected.columns).equals(expected)
    assert len(found) == ROWS
    status = house.status("one")
    assert status["rows"] == {"read": ROWS, "predicted": ROWS, "repeated": 0, "letters": 0}
    assert (status["version"], status["last"], status["by_version"]) == ("1", True, {"1": ROWS})
    seen = pl.DataFrame(pl.from_arrow(house.answers())).sort("row_id")
    assert found.select("__cut", "__late", "__answered").equals(seen.select("__cut", "__late", "__answered"))
    assert house.run("--run_id", "again") == 0  # nothing is left to do
    assert len(house.predictions) == ROWS
