"""The model that serves: swapped between batches, never for a broken one, and whatever the registry does."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xgboost

from schemas.errors import MismatchError, StoreError
from schemas.live import SEEN, live_predictions, scorable
from schemas.loading import load_definition
from schemas.views import FeatureView
from transforms.inference.champion_model import Champion, ChampionHandler, Serving, open_checked
from transforms.models.bundle import Bundle
from transforms.models.registry import Registry
from transforms.models.scoring import PinnedModel, open_scorer, predict
from transforms.storage.paths import BOOSTER, ENCODERS, MANIFEST
from transforms.training.fit_encoders import fit

DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, encoders

asks = Source("asks", time="at", columns={"id": pl.Int64, "shop": pl.String, "amount": pl.Float32})
view = FeatureView("asks", spine=asks, key="id", features=[Derived(amount=pl.col("amount"), half=pl.col("amount") / 2)])
model = Model(view, label=Label(asks, on="id", value=pl.col("amount") > 20, within="1d"),
              split=TimeSplit(validate="1d", test="1d"), encode={"shop": encoders.Ordinal()})
"""


def rows_of(view: FeatureView, count: int, first: int = 0) -> pa.RecordBatch:
    """Feature rows for a model."""
    random, numbers = np.random.default_rng(first), np.arange(first, first + count)
    amount = random.normal(20, 10, count).astype(np.float32)
    columns: dict[str, Any] = {
        "id": numbers,
        "at": numbers * 1_000_000,
        "shop": random.choice(["a", "b"], count),
        "amount": amount,
        "half": amount / 2,
        "row_id": numbers * 7919,
        "date": np.zeros(count, np.int32),
        "__cut": ["asks/0:1"] * count,
        "__late": [False] * count,
        "__answered": numbers,
        "__partition": np.zeros(count, np.int32),
        "__offset": numbers,
        "__place": np.zeros(count, np.int32),
        "__arrived": numbers,
    }
    schema = scorable(view)
    return pa.RecordBatch.from_arrays([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema)


def bundle_of(definition: str, seed: int, **changes: Any) -> Bundle:
    model = load_definition(definition).require_model()
    batch = rows_of(model.view, 500)
    fitted = fit(model, [batch])
    data = xgboost.DMatrix(
        fitted.apply(batch), (np.arange(500) % 3 == 0).astype(np.float32), feature_names=fitted.names
    )
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 3, "seed": seed, "base_score": 0.2 + seed / 100, "nthread": 1},
        data,
        4,
    )
    view = model.view
    manifest = {
        "model": model.name,
        "objective": "binary:logistic",
        "classes": 1,
        "fingerprint": view.fingerprint,
        "view": view.name,
        "key": list(view.key),
        "time": view.time,
        "inputs": fitted.inputs,
        **changes,
    }
    return Bundle(bytes(booster.save_raw("ubj")), fitted, manifest)


@dataclasses.dataclass(frozen=True)
class Shop:
    definition: str
    registry: Registry
    view: FeatureView

    def serving(self, **changes: Any) -> Serving:
        _, folder, digest = self.registry.locate("asks", "1")
        return dataclasses.replace(
            Serving(self.registry.uri, "asks", self.view, PinnedModel(folder, "1", digest), poll=20_000), **changes
        )

    def promote(self, version: str) -> None:
        self.registry.promote("asks", version, "a test")

    def register(self, seed: int, **changes: Any) -> str:
        return self.registry.register(bundle_of(self.definition, seed, **changes), f"run-{seed}")

    def folder(self, version: str) -> Path:
        return Path(self.registry.locate("asks", version)[1])


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Versions 1 to 3, good ones."""
    root = tmp_path_factory.mktemp("shop")
    (root / "definition.py").write_text(DEFINITION)
    definition = str(root / "definition.py")
    made = Shop(definition, Registry(f"sqlite:///{root}/mlflow.db"), load_definition(definition).view)
    for seed in range(3):
        made.register(seed)
    return made


@pytest.fixture
def champion(shop: Shop) -> Iterator[Champion]:
    shop.promote("1")
    made = Champion(shop.serving(), watch=False)
    yield made
    made.close()
    shop.promote("1")


def test_under_load_every_row_is_scored_by_the_version_it_names(shop: Shop) -> None:
    """Four workers score while the alias moves; a batch is never scored by two models, no row is lost or comes
    twice."""
    shop.promote("1")
    handler = ChampionHandler(shop.serving(poll=1_000))
    champion, stop = handler.load_model(), threading.Event()
    made: list[list[pa.RecordBatch]] = [[] for _ in range(4)]

    def work(worker: int) -> None:
        number = 0
        while not stop.is_set():
            made[worker] += handler.run_inference(rows_of(shop.view, 20, (number * 4 + worker) * 20), champion)  # type: ignore[arg-type]
            number += 1

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(4)]
    for thread in threads:
        thread.start()
    for version in "23123":
        shop.promote(version)
        deadline = time.monotonic() + 10
        while champion.current.version != version and time.monotonic() < deadline:
            time.sleep(0.005)
    stop.set()
    for thread in threads:
        thread.join()
    champion.close()
    assert [each.after for each in champion.swaps] == list("23123")
    scorers = {version: open_scorer(PinnedModel(str(shop.folder(version)), version)) for version in "123"}
    for worker, batches in enumerate(made):
        for number, batch in enumerate(batches):
            rows = rows_of(shop.view, 20, (number * 4 + worker) * 20)
            (version,) = set(batch.column("model_version").to_pylist())
            whole = predict(scorers[version], rows, carry=SEEN.names)
            assert batch.schema.equals(live_predictions(shop.view), check_metadata=False)
            assert [batch.column(name).equals(whole.column(name)) for name in whole.schema.names] == [
                True
            ] * whole.num_columns
            at = batch.column("__scored").cast(pa.int64())[0].as_py()
            serving = [each.after for each in champion.swaps if each.at <= at]
            assert version == (serving[-1] if serving else "1")


def spoiled(name: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(bytes(content))

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [spoiled(BOOSTER), spoiled(ENCODERS), spoiled(MANIFEST), lambda folder: (folder / BOOSTER).unlink(), shutil.rmtree],
    ids=["booster", "encoders", "manifest", "missing", "gone"],
)
def test_altered_files_are_refused_once_and_taken_when_they_are_restored(
    shop: Shop, champion: Champion, spoil: Callable[[Path], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, kept = shop.folder("2"), tmp_path / "kept"
    shutil.copytree(folder, kept)
    spoil(folder)
    shop.promote("2")
    for _ in range(3):
        champion.look()
    assert champion.current.version == "1"
    (refused,) = champion.refused
    assert refused.version == "2"
    assert champion.take_counts() == {"swaps": 0, "refused": 1}
    (printed,) = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert "version 2 of 'asks' is refused, version 1 serves on" in printed
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(kept, folder)
    champion.look()
    assert champion.current.version == "2"


@pytest.mark.parametrize(
    ("number", "changes", "rule"),
    [
        (10, {"fingerprint": "0123456789abcdef"}, "A model scores the features it was trained on"),
        (11, {"classes": 3}, "A booster gives the scores that its manifest declares"),
        (12, {"view": "another"}, "A model scores the features it was trained on"),
    ],
)
def test_a_model_made_for_something_else_is_refused(
    shop: Shop, champion: Champion, number: int, changes: dict[str, Any], rule: str
) -> None:
    version = shop.register(number, **changes)
    shop.promote(version)
    champion.look()
    champion.look()
    assert champion.current.version == "1"
    (refused,) = champion.refused
    assert refused.version == version
    assert refused.rule.startswith(rule)


def test_a_model_that_reads_an_unknown_feature_is_refused(shop: Shop, champion: Champion) -> None:
    bundle = bundle_of(shop.definition, 20)
    reported = json.loads(bundle.encoders.to_json().replace('"half"', '"third"'))
    bundle = dataclasses.replace(bundle, encoders=type(bundle.encoders).from_json(json.dumps(reported)))
    shop.promote(shop.registry.register(bundle, "run-20"))
    champion.look()
    assert champion.current.version == "1"
    assert "third" in champion.refused[0].value + champion.refused[0].rule


def test_a_refused_model_is_tried_again_when_the_alias_moves_back_and_forth(shop: Shop, champion: Champion) -> None:
    version = shop.register(30, fingerprint="0123456789abcdef")
    for bearer in (version, "1", version, "2"):
        shop.promote(bearer)
        champion.look()
    assert [each.version for each in champion.refused] == [version, version]
    assert champion.current.version == "2"


def test_a_registry_that_goes_away_is_reported_once_and_missed_by_no_row(
    shop: Shop, champion: Champion, caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(shop.registry.uri.removeprefix("sqlite:///"))
    os.rename(path, f"{path}.away")
    try:
        for _ in range(3):
            champion.look()
        assert champion.current.version == "1"
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "version 1 continues to serve while the registry is tried again" in caplog.text
    finally:
        os.rename(f"{path}.away", path)
    shop.promote("3")
    champion.look()
    assert champion.current.version == "3"
    assert "the registry can be reached again" in caplog.text
    assert not champion.refused


def test_a_worker_that_starts_while_the_champion_is_broken_begins_with_the_launch_version(shop: Shop) -> None:
    version = shop.register(40, fingerprint="0123456789abcdef")
    shop.promote(version)
    champion = Champion(shop.serving(), watch=False)
    assert champion.current.version == "1"
    assert champion.refused[0].version == version
    shop.promote("1")


def test_nothing_serves_when_even_the_launch_version_is_gone(shop: Shop, tmp_path: Path) -> None:
    serving = shop.serving(
        registry=f"sqlite:///{tmp_path}/none.db", first=PinnedModel(str(tmp_path / "none"), "9", "0")
    )
    with pytest.raises(StoreError, match="files can be read"):
        Champion(serving, watch=False)
    with pytest.raises(MismatchError, match="same columns throughout"):
        open_checked(shop.serving(classes=3), shop.serving().first)


def test_a_champion_that_is_no_longer_used_ends_its_thread(shop: Shop) -> None:
    shop.promote("1")
    before = threading.active_count()
    champion = Champion(shop.serving(poll=5_000))
    assert threading.active_count() == before + 1
    del champion
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_empty_batch_passes_through(shop: Shop, champion: Champion) -> None:
    handler = ChampionHandler(shop.serving())
    (made,) = handler.run_inference(rows_of(shop.view, 0), champion)  # type: ignore[arg-type]
    assert made.num_rows == 0
    assert made.schema.equals(live_predictions(shop.view), check_metadata=False)
    assert pl.DataFrame(pl.from_arrow(made.replace_schema_metadata(None))).is_empty()
