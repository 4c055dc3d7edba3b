"""XGBoost's histogram bins from example files, read one row group at a time."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from schemas import Model
from schemas.errors import DataError
from schemas.splits import LABEL, Fold
from transforms.models.encoders import Fitted, Matrix
from transforms.training.examples import ExamplesAccount, ExampleShard, read_shard
from transforms.training.labels import mature
from transforms.training.target_encoding import TargetEncoding, target_encoding

if TYPE_CHECKING:
    from xgboost import DMatrix

# Most bytes of encoded rows that are cached between XGBoost's passes over the examples; beyond, each pass encodes
# again.
KEPT_BYTES = 256 << 20
# Encoded values of a split above which its bins go to disk, and of a page on disk.  Measured in docs/training.md.
EXTERNAL = 250_000_000
PAGE = 1 << 24

Labels = npt.NDArray[np.float32]
Encoded = tuple[Matrix, Labels]


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
    """The matrices of a trial, which the trials of one process share, since training only reads them.

    Args:
        train, validate: XGBoost's matrices of the train and the validate split.
    """

    train: DMatrix
    validate: DMatrix


@dataclasses.dataclass(frozen=True)
class DataPart:
    """The rows of some shards in `[start, end)` whose label's horizon ends by `end`; without bounds all rows."""

    shards: tuple[ExampleShard, ...]
    start: datetime | None = None
    end: datetime | None = None


def parts_of(model: Model, account: ExamplesAccount, fold: Fold | None = None) -> tuple[DataPart, DataPart]:
    """The rows to train on and to validate with; for `fold` None they are the train and the validate split."""
    train = tuple(account.of("train"))
    if fold is None:
        return DataPart(train), DataPart(tuple(account.of("validate")))
    return DataPart(train, None, fold.train_end), DataPart(train, fold.validate_start, fold.validate_end)


def matrices(
    model: Model,
    fitted: Fitted,
    account: ExamplesAccount,
    threads: int,
    max_bin: int | None = None,
    fold: Fold | None = None,
) -> Matrices:
    """The binned rows of train and validate.

    Args:
        threads: number of threads that bin.
        max_bin: XGBoost's parameter; None means its default.
    """
    training, validation = parts_of(model, account, fold)
    columns: dict[str, object] = {"enable_categorical": "c" in fitted.types, "nthread": threads}
    if max_bin is not None:
        columns["max_bin"] = max_bin
    for part in (training, validation) if fold is not None else ():
        if next(batches(model, part, [LABEL]), None) is None:
            raise DataError(
                "Every fold has examples to learn from and to be validated on",
                f"none before {part.end:%Y-%m-%d %H:%M}",
                "Take fewer or shorter folds, or compute more features",
            )
    external = is_external(fitted, account)
    folder = tempfile.mkdtemp(prefix="millrace-bins-") if external else None
    known = target_encoding(model, fitted, batches(model, training, _ledger(model, fitted)))
    train = _matrix(model, fitted, training, known, folder and f"{folder}/train", **columns)
    validate = _matrix(model, fitted, validation, None, folder and f"{folder}/validate", ref=train, **columns)
    if folder is not None:
        # XGBoost deletes its pages with a matrix, and fails if they are missing, so the folder is deleted after both.
        train.pages = validate.pages = _Pages()
        weakref.finalize(train.pages, shutil.rmtree, folder, ignore_errors=True)
    return Matrices(train, validate)


class _Pages:
    """Exists as long as a matrix that reads from disk."""


def is_external(fitted: Fitted, account: ExamplesAccount) -> bool:
    """Whether the bins of the training split go to disk."""
    return sum(each.rows for each in account.of("train")) * len(fitted.names) > EXTERNAL


def _ledger(model: Model, fitted: Fitted) -> list[str]:
    return list(dict.fromkeys([*fitted.inputs, LABEL, "__label_time"]))


def _matrix(
    model: Model, fitted: Fitted, part: DataPart, known: TargetEncoding | None, cache: str | None, **options: object
) -> DMatrix:
    import xgboost

    class Rows(xgboost.DataIter):
        """XGBoost reads all rows several times; rows that fit into `KEPT_BYTES` are encoded once."""

        def __init__(self) -> None:
            self.kept: list[Encoded] = []
            self.keeps = sum(each.rows for each in part.shards) * 4 * (len(fitted.names) + 1) <= KEPT_BYTES
            self.complete = False
            self.source: Iterator[Encoded] = iter(())
            super().__init__(cache_prefix=cache)

        def reset(self) -> None:
            if not self.complete:
                self.kept.clear()
            found = encoded(model, fitted, part, known)
            self.source = iter(self.kept) if self.complete else _pages(found) if cache else found

        def next(self, input_data: Callable[..., None]) -> bool:
            rows = next(self.source, None)
            if rows is None:
                self.complete = self.keeps
                return False
            if self.keeps and not self.complete:
                self.kept.append(rows)
            matrix, label = rows
            input_data(data=matrix, label=label, feature_names=fitted.names, feature_types=fitted.types)
            return True

    rows = Rows()
    matrix = (xgboost.ExtMemQuantileDMatrix if cache else xgboost.QuantileDMatrix)(rows, **options)
    rows.kept.clear()
    return matrix


def batches(model: Model, part: DataPart, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """`columns` of the part's rows."""
    if part.end is None:
        for shard in part.shards:
            yield from read_shard(shard, columns)
        return
    time = model.view.time
    for shard in part.shards:
        for batch in read_shard(shard, list(dict.fromkeys([*columns, time]))):
            inside = mature(model.label, batch.column(batch.schema.get_field_index(time)), part.start, part.end)
            if pc.any(inside).as_py():
                found = [batch.column(batch.schema.get_field_index(name)).filter(inside) for name in columns]
                yield pa.RecordBatch.from_arrays(found, list(columns))


def examples_of_fold(batch: pa.RecordBatch, model: Model, fold: Fold) -> pa.RecordBatch:
    """The training examples that a fold is trained on."""
    times = batch.column(batch.schema.get_field_index(model.view.time))
    inside = mature(model.label, times, None, fold.train_end)
    return pa.RecordBatch.from_arrays([column.filter(inside) for column in batch.columns], schema=batch.schema)


def encoded(model: Model, fitted: Fitted, part: DataPart, known: TargetEncoding | None = None) -> Iterator[Encoded]:
    """Encode the part: (matrix float32 [rows, columns], labels float32 [rows]) of each row group."""
    time = [model.view.time] if known is not None else []
    for batch in batches(model, part, list(dict.fromkeys([*fitted.inputs, *time, LABEL]))):
        matrix = fitted.apply(batch)
        if known is not None:
            known.write(batch, matrix)
        yield matrix, batch.column(batch.schema.get_field_index(LABEL)).to_numpy(zero_copy_only=False)


def _pages(rows: Iterable[Encoded]) -> Iterator[Encoded]:
    """Join neighbouring groups to pages of about `PAGE` values, since every level of every tree reads every page."""
    groups: list[Encoded] = []
    for each in rows:
        groups.append(each)
        if sum(matrix.size for matrix, _ in groups) >= PAGE:
            yield _joined(groups)
            groups.clear()
    if groups:
        yield _joined(groups)


def _joined(groups: list[Encoded]) -> Encoded:
    return np.concatenate([matrix for matrix, _ in groups]), np.concatenate([label for _, label in groups])
