"""Scoring: feature rows → encoded matrix → booster → predictions, through Beam's RunInference."""

from __future__ import annotations

import dataclasses
import resource
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from apache_beam.ml.inference import base
from apache_beam.ml.inference.base import ModelHandler, RunInference

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import MismatchError, StoreError
from schemas.tables import predictions, scores
from transforms.models.bundle import Bundle, bundle_digest, load_bundle
from transforms.records.row_hashing import prediction_ids

if TYPE_CHECKING:
    from xgboost import Booster

# Beam imports the standard module `resource` in one `try` with its ModelManager, which needs torch.  Without torch it
# therefore has no `resource`, and warns that it cannot measure memory whenever it loads a model.  No Beam issue is
# known for this; `tests/beam_pipelines/runtime/test_beam_workers.py` fails once Beam separates the two imports.
base.resource = base.resource or resource

Scores = npt.NDArray[np.float32]
ARM = "main"
# Rows encoded and scored at a time: bounds the matrix, and keeps it near the caches.
CHUNK = 1 << 16


@dataclasses.dataclass(frozen=True)
class PinnedModel:
    """A model that is fixed at launch.

    Args:
        folder: a bundle's folder, readable from every worker.
        version: `model_version` of its predictions; by default the first 12 digits of the digest.
        digest: SHA-256 of its manifest; None accepts the manifest in the folder.
    """

    folder: str
    version: str = ""
    digest: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Scorer:
    """A model in memory, ready to score.  Threads may share it."""

    bundle: Bundle
    booster: Booster
    version: str


def open_scorer(model: PinnedModel, threads: int = 0) -> Scorer:
    """Load and check a model, and make a first prediction.

    Args:
        model: the model.
        threads: XGBoost's threads; 0 means every core.

    Raises:
        StoreError: a file is missing or was altered.
        MismatchError: booster and encoders do not have the same columns.
    """
    import xgboost

    digest = model.digest or bundle_digest(model.folder)
    bundle = load_bundle(model.folder, digest)
    booster = xgboost.Booster({"nthread": threads})
    try:
        booster.load_model(bytearray(bundle.booster))
    except xgboost.core.XGBoostError as error:
        value = f"{model.folder}: {str(error).splitlines()[-1]}"
        raise StoreError("A booster is one that this XGBoost reads", value, "Use the XGBoost that trained it") from None
    if booster.num_features() != len(bundle.encoders.names):
        value = f"{booster.num_features()} and {len(bundle.encoders.names)} columns"
        raise MismatchError("A booster takes the columns that its encoders make", value, "Train and register it again")
    scorer = Scorer(bundle, booster, model.version or digest[:12])
    _predict(scorer, np.zeros((1, booster.num_features()), np.float32))
    return scorer


def score(scorer: Scorer, batch: pa.RecordBatch) -> Scores:
    """Scores of feature rows: float32, [rows], or [rows, classes] of a multi-class model.

    A row's score is the same to the last bit however rows are batched and however many threads work.

    Raises:
        MismatchError: an input is missing or has another type.
    """
    result = np.empty((batch.num_rows, scorer.bundle.classes), np.float32)
    for start in range(0, batch.num_rows, CHUNK):
        part = batch.slice(start, CHUNK)
        result[start : start + CHUNK] = _predict(scorer, scorer.bundle.encoders.apply(part))
    return result[:, 0] if scorer.bundle.classes == 1 else result


def _predict(scorer: Scorer, matrix: Scores) -> Scores:
    found = scorer.booster.inplace_predict(matrix).reshape(len(matrix), -1)
    if found.shape[1] != scorer.bundle.classes:
        value = f"{found.shape[1]} scores a row, {scorer.bundle.classes} in the manifest"
        raise MismatchError(
            "A booster gives the scores that its manifest declares", value, "Train and register it again"
        )
    return found


def predict(scorer: Scorer, batch: pa.RecordBatch, arm: str = ARM, carry: Sequence[str] = ()) -> pa.RecordBatch:
    """Predictions for feature rows, in their order: schema `schemas.tables.predictions`.

    Args:
        scorer: the model.
        batch: the model's inputs, its key and time columns, `row_id` and `date`.
        arm: arm of an experiment; a part of `prediction_id`, as are model and row.
        carry: columns of `batch` that are appended unchanged, under their `carried_name`.
    """
    manifest, rows = scorer.bundle.manifest, batch.num_rows
    row_id = pl.Series(_column(batch, "row_id"), dtype=pl.Int64)
    values = score(scorer, batch).reshape(rows, scorer.bundle.classes)
    known = {
        "prediction_id": prediction_ids(scorer.bundle.name, pl.repeat(arm, rows, eager=True), row_id).to_arrow(),
        **{name: pa.array(values[:, k]) for k, name in enumerate(scores(scorer.bundle.classes))},
        "model": pa.repeat(scorer.bundle.name, rows),
        "model_version": pa.repeat(scorer.version, rows),
        "arm": pa.repeat(arm, rows),
        "fingerprint": pa.repeat(scorer.bundle.fingerprint, rows),
    }
    schema = predictions(batch.schema, tuple(manifest["key"]), str(manifest["time"]), scorer.bundle.classes)
    columns = [known[name] if name in known else _column(batch, name) for name in schema.names]
    columns += [_column(batch, name) for name in carry]
    carried = [batch.schema.field(name).with_name(carried_name(name)) for name in carry]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema([*schema, *carried]))


def carried_name(column: str) -> str:
    """Name of a carried column, which no column of a view or of a prediction can have."""
    return column if column.startswith("__") else f"__{column}"


def _column(batch: pa.RecordBatch, name: str) -> pa.Array:
    return batch.column(batch.schema.get_field_index(name))


def columns_read(bundle: Bundle) -> tuple[str, ...]:
    """Columns of a feature table that `predict` needs."""
    manifest = bundle.manifest
    return tuple(dict.fromkeys([*manifest["key"], manifest["time"], *bundle.encoders.inputs, "row_id", "date"]))


class RecordBatchHandler(ModelHandler[pa.RecordBatch, pa.RecordBatch, Scorer]):
    """RunInference over RecordBatches.  Each element is a batch, so RunInference does no batching of its own.

    Each worker process has one model; `update_model_path` replaces it by that of another folder.
    """

    def __init__(self, model: PinnedModel, arm: str = ARM, threads: int = 0, carry: Sequence[str] = ()) -> None:
        super().__init__()
        self.model, self.arm, self.threads, self.carry = model, arm, threads, tuple(carry)

    def load_model(self) -> Scorer:
        return open_scorer(self.model, self.threads)

    def run_inference(
        self, batch: Sequence[pa.RecordBatch], model: Scorer, inference_args: dict[str, object] | None = None
    ) -> Iterable[pa.RecordBatch]:
        return [predict(model, batch, self.arm, self.carry)]

    def update_model_path(self, model_path: str | None = None) -> None:
        if model_path and model_path != self.model.folder:
            self.model = PinnedModel(model_path)

    def should_skip_batching(self) -> bool:
        return True

    def get_num_bytes(self, batch: Sequence[pa.RecordBatch]) -> int:
        return int(batch.nbytes)  # type: ignore[attr-defined]

    def get_metrics_namespace(self) -> str:
        return "millrace.scoring"


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Score(beam.PTransform):
    """PCollection[RecordBatch] of feature rows → PCollection[RecordBatch] of predictions, one for each.

    Args:
        model: pinned at launch.
        arm: part of every prediction's identity.
        threads: XGBoost's threads in each worker; 0 means every core.
        carry: columns of the rows that are appended to their predictions, such as labels.
    """

    model: PinnedModel
    arm: str = ARM
    threads: int = 0
    carry: tuple[str, ...] = ()

    def expand(self, features: beam.PCollection) -> beam.PCollection:
        handler = RecordBatchHandler(self.model, self.arm, self.threads, self.carry)
        return features | "Predict" >> RunInference(handler).with_output_types(pa.RecordBatch)
