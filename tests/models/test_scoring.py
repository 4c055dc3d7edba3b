"""Scoring: the booster's own numbers, to the bit, however rows are batched; and who may be scored by what."""

import dataclasses
import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xgboost
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that
from hypothesis import given
from hypothesis import strategies as st

from schemas import encoders
from schemas.errors import DefinitionError, MillraceError, MismatchError, StoreError
from schemas.tables import predictions
from transforms.models import scoring
from transforms.models.bundle import Bundle, bundle_digest, save_bundle
from transforms.models.encoders import Encoding, Fitted
from transforms.models.scoring import (
    PinnedModel,
    RecordBatchHandler,
    Score,
    Scorer,
    columns_read,
    open_scorer,
    predict,
    score,
)
from transforms.records.row_hashing import prediction_ids
from transforms.storage.paths import BOOSTER

CARRIERS = ["AA", "UA", "ZZ"]
ENCODINGS = (
    Encoding("x", "float"),
    Encoding("n", "int64"),
    Encoding("late", "bool"),
    Encoding("carrier", "string", encoders.Native(), {"categories": CARRIERS}),
    Encoding("origin", "string", encoders.OneHot(), {"categories": ["EWR", "JFK"]}),
)


def rows(count: int, seed: int = 0) -> pa.RecordBatch:
    """Feature rows with nulls, NaN-free as the store keeps them, and an unseen category."""
    random = np.random.default_rng(seed)

    def holes(values: np.ndarray) -> pa.Array:
        return pa.array(values.tolist(), mask=random.random(count) < 0.1)

    names = np.array([*CARRIERS, "new"])
    moments = np.arange(count, dtype=np.int64) * 3_600_000_000
    columns = {
        "id": pa.array(np.arange(count)),
        "asked_at": pa.array(moments, pa.timestamp("us", "UTC")),
        "x": holes(random.normal(size=count)).cast(pa.float32()),
        "n": holes(random.integers(0, 50, count)).cast(pa.int64()),
        "late": holes(random.random(count) < 0.5).cast(pa.bool_()),
        "carrier": holes(names[random.integers(0, 4, count)]).cast(pa.string()),
        "origin": holes(np.array(["EWR", "JFK", "LGA"])[random.integers(0, 3, count)]).cast(pa.string()),
        "row_id": pa.array(random.integers(-(2**62), 2**62, count)),
        "date": pa.array((moments // 86_400_000_000).astype(np.int32), pa.date32()),
    }
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def bundle(objective: str, classes: int = 1) -> Bundle:
    batch, fitted = rows(2_000, seed=9), Fitted(ENCODINGS)
    matrix = fitted.apply(batch)
    signal = np.nan_to_num(matrix[:, 0]) + np.nan_to_num(matrix[:, 3]) / 4 + np.random.default_rng(3).normal(size=2_000)
    labels = (signal > 0).astype(int) + (signal > 0.8) if classes > 1 else (signal > 0)
    params = {"objective": objective, "max_depth": 4, "eta": 0.3, "seed": 1, "nthread": 1}
    if classes > 1:
        params["num_class"] = classes
    data = xgboost.DMatrix(
        matrix, labels, feature_names=fitted.names, feature_types=fitted.types, enable_categorical=True
    )
    manifest = {
        "model": "delay",
        "objective": objective,
        "classes": classes,
        "fingerprint": "f" * 16,
        "view": "delay",
        "key": ["id"],
        "time": "asked_at",
        "inputs": fitted.inputs,
    }
    return Bundle(bytes(xgboost.train(params, data, 12).save_raw("ubj")), fitted, manifest)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    root = tmp_path_factory.mktemp("models")
    kinds = {"binary:logistic": 1, "reg:squarederror": 1, "multi:softprob": 3}
    for kind, classes in kinds.items():
        save_bundle(bundle(kind, classes), root / kind.split(":")[0])
    return {kind: str(root / kind.split(":")[0]) for kind in kinds}


@pytest.fixture(scope="module")
def scorers(folders: dict[str, str]) -> dict[str, Scorer]:
    # One thread: on busy cores the threads of tiny calls wait for each other far longer than they work.
    return {kind: open_scorer(PinnedModel(folder, "7"), threads=1) for kind, folder in folders.items()}


def oracle(scorer: Scorer, batch: pa.RecordBatch) -> np.ndarray:
    """XGBoost by its other road: a DMatrix and `predict`, one thread."""
    booster = xgboost.Booster({"nthread": 1}, model_file=bytearray(scorer.bundle.booster))
    fitted = scorer.bundle.encoders
    data = xgboost.DMatrix(
        fitted.apply(batch), feature_names=fitted.names, feature_types=fitted.types, enable_categorical=True
    )
    return booster.predict(data)


@pytest.mark.parametrize("kind", ["binary:logistic", "reg:squarederror", "multi:softprob"])
def test_scores_are_the_boosters_own(scorers: dict[str, Scorer], kind: str) -> None:
    batch = rows(3_000)
    found = score(scorers[kind], batch)
    assert (found.dtype, found.shape) == (np.float32, (3_000, 3) if kind.startswith("multi") else (3_000,))
    assert found.tobytes() == oracle(scorers[kind], batch).tobytes()
    assert len(np.unique(found)) > 20


@given(st.lists(st.integers(0, 400), max_size=6), st.sampled_from([63, 64, 199, 1 << 16]))
def test_a_score_does_not_depend_on_how_rows_are_batched(
    scorers: dict[str, Scorer], cuts: list[int], chunk: int
) -> None:
    batch = WHOLE.slice(5, 400)
    edges = [0, *sorted(cuts), batch.num_rows]
    before, scoring.CHUNK = scoring.CHUNK, chunk
    try:
        for kind in ("binary:logistic", "multi:softprob"):
            parts = [score(scorers[kind], batch.slice(a, b - a)) for a, b in itertools.pairwise(edges)]
            assert np.concatenate(parts).tobytes() == oracle(scorers[kind], batch).tobytes()
    finally:
        scoring.CHUNK = before


WHOLE = rows(3_000)


def test_a_score_does_not_depend_on_threads(folders: dict[str, str], scorers: dict[str, Scorer]) -> None:
    for kind, folder in folders.items():
        many = open_scorer(PinnedModel(folder), threads=4)
        assert score(many, WHOLE).tobytes() == score(scorers[kind], WHOLE).tobytes()


def test_row_by_row_equals_all_at_once(scorers: dict[str, Scorer]) -> None:
    scorer, batch = scorers["binary:logistic"], rows(60)
    singly = [score(scorer, batch.slice(i, 1))[0] for i in range(60)]
    assert np.array(singly).tobytes() == score(scorer, batch).tobytes()


def test_a_prediction_carries_its_feature_row_and_its_model(scorers: dict[str, Scorer]) -> None:
    batch = rows(50)
    found = predict(scorers["binary:logistic"], batch)
    assert found.schema == predictions(batch.schema, ("id",), "asked_at")
    for name in ("id", "asked_at", "row_id", "date"):
        assert found[found.schema.get_field_index(name)] == batch[batch.schema.get_field_index(name)]
    frame = pl.from_arrow(found)
    assert frame.select("model", "model_version", "arm", "fingerprint").unique().rows() == [
        ("delay", "7", "main", "f" * 16)
    ]
    assert frame["score"].to_numpy().tobytes() == score(scorers["binary:logistic"], batch).tobytes()
    assert frame["prediction_id"].n_unique() == 50
    expected = prediction_ids("delay", pl.Series(["main"] * 50), frame["row_id"])
    assert frame["prediction_id"].equals(expected)
    assert predict(scorers["binary:logistic"], batch, "b").column(3) != found.column(
        3
    )  # another arm, another prediction


def test_a_prediction_id_never_changes(scorers: dict[str, Scorer]) -> None:
    """Written down once: tables of other years are joined by it."""
    batch = with_ids(rows(2), [0, -1])
    assert predict(scorers["binary:logistic"], batch).column(3).to_pylist() == [
        -2721928507245668478,
        -2813520111854464546,
    ]


def with_ids(batch: pa.RecordBatch, ids: list[int]) -> pa.RecordBatch:
    columns = [pa.array(ids) if name == "row_id" else batch.column(i) for i, name in enumerate(batch.schema.names)]
    return pa.RecordBatch.from_arrays(columns, schema=batch.schema)


def test_classes_have_a_score_each(scorers: dict[str, Scorer]) -> None:
    frame = pl.from_arrow(predict(scorers["multi:softprob"], WHOLE))
    assert frame.columns[3:7] == ["prediction_id", "score_0", "score_1", "score_2"]
    assert frame.select(pl.sum_horizontal("^score_.$")).to_series().to_numpy() == pytest.approx(
        np.ones(3_000), abs=1e-5
    )


def test_no_rows_give_no_predictions(scorers: dict[str, Scorer]) -> None:
    for scorer in scorers.values():
        found = predict(scorer, WHOLE.slice(0, 0))
        assert found.num_rows == 0
        assert found.schema == predict(scorer, WHOLE).schema


def test_only_needed_columns_are_read(scorers: dict[str, Scorer]) -> None:
    expected = ("id", "asked_at", "x", "n", "late", "carrier", "origin", "row_id", "date")
    assert columns_read(scorers["binary:logistic"].bundle) == expected


def test_a_missing_or_retyped_input_is_refused(scorers: dict[str, Scorer]) -> None:
    table = pa.Table.from_batches([rows(5)])
    (without,) = table.drop(["carrier"]).to_batches()
    with pytest.raises(MismatchError, match="'carrier'"):
        predict(scorers["binary:logistic"], without)
    position = table.schema.get_field_index("n")
    (retyped,) = table.set_column(position, "n", table["n"].cast(pa.float32())).to_batches()
    with pytest.raises(MismatchError, match=r"Input 'n' has the type.*int64.*float"):
        predict(scorers["binary:logistic"], retyped)


def test_key_columns_do_not_hide_a_predictions_own(scorers: dict[str, Scorer]) -> None:
    with pytest.raises(DefinitionError, match=r"Got model\. Rename"):
        predictions(pa.schema([("model", pa.string())]), ("model",), "asked_at")


def test_a_model_altered_on_disk_scores_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    folder = Path(folders["binary:logistic"])
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    content = bytearray((tmp_path / BOOSTER).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / BOOSTER).write_bytes(content)
    with pytest.raises(StoreError, match="SHA-256"):
        open_scorer(PinnedModel(str(tmp_path), digest=bundle_digest(folder)))


def test_a_booster_that_is_none_and_one_of_other_columns_are_refused(tmp_path: Path) -> None:
    whole = bundle("binary:logistic")
    save_bundle(dataclasses.replace(whole, booster=b"{L\x00"), tmp_path / "garbage")
    with pytest.raises(StoreError, match="this XGBoost reads"):
        open_scorer(PinnedModel(str(tmp_path / "garbage")))
    save_bundle(dataclasses.replace(whole, encoders=Fitted(ENCODINGS[:3])), tmp_path / "narrow")
    with pytest.raises(MismatchError, match="7 and 3 columns"):
        open_scorer(PinnedModel(str(tmp_path / "narrow")))
    save_bundle(dataclasses.replace(whole, manifest={**whole.manifest, "classes": 3}), tmp_path / "classes")
    with pytest.raises(MismatchError, match="1 scores a row, 3 in the manifest"):
        open_scorer(PinnedModel(str(tmp_path / "classes")))


def test_an_unregistered_model_signs_with_its_digest(folders: dict[str, str]) -> None:
    folder = folders["binary:logistic"]
    assert open_scorer(PinnedModel(folder)).version == bundle_digest(folder)[:12]


def test_score_in_a_pipeline_scores_every_batch_once(folders: dict[str, str], scorers: dict[str, Scorer]) -> None:
    parts = [WHOLE.slice(a, 700) for a in range(0, 3_000, 700)]
    expected = pl.from_arrow(predict(scorers["binary:logistic"], WHOLE)).sort("id")

    def same(found: list[pa.RecordBatch]) -> None:
        assert sorted(each.num_rows for each in found) == [200, 700, 700, 700, 700]
        assert pl.from_arrow(pa.Table.from_batches(found)).sort("id").equals(expected)

    with Pipeline() as pipeline:
        scored = pipeline | beam.Create(parts) | Score(PinnedModel(folders["binary:logistic"], "7"))
        assert_that(scored, same)


def test_a_mistake_in_a_pipeline_names_itself(folders: dict[str, str]) -> None:
    from beam_pipelines.runtime.errors import recovered

    (wrong,) = pa.Table.from_batches([rows(5)]).drop(["x"]).to_batches()
    with (
        pytest.raises((MillraceError, RuntimeError), match="every input of the model") as caught,
        Pipeline() as pipeline,
    ):
        _ = pipeline | beam.Create([wrong]) | Score(PinnedModel(folders["binary:logistic"]))
    assert isinstance(recovered(caught.value), MillraceError)


def test_the_handler_travels_and_takes_another_model(folders: dict[str, str]) -> None:
    handler = pickle.loads(pickle.dumps(RecordBatchHandler(PinnedModel(folders["binary:logistic"], "7"), "b", 1)))
    batch = rows(10)
    (first,) = handler.run_inference(batch, handler.load_model())
    assert set(first.column(first.schema.get_field_index("arm")).to_pylist()) == {"b"}
    handler.update_model_path(None)
    handler.update_model_path(folders["binary:logistic"])
    assert handler.model.version == "7"
    handler.update_model_path(folders["reg:squarederror"])
    (second,) = handler.run_inference(batch, handler.load_model())
    version = bundle_digest(folders["reg:squarederror"])[:12]
    assert set(second.column(second.schema.get_field_index("model_version")).to_pylist()) == {version}
