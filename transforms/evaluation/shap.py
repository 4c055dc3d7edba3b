"""What a model goes by: XGBoost's own contributions (TreeSHAP, Lundberg et al. 2020) on a bounded sample of test rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas import Model
from schemas.splits import LABEL
from transforms.models.encoders import column_of, numbers, texts
from transforms.models.scoring import Pinned, Scorer, open_scorer, score
from transforms.records.row_hashing import mix

# Most rows sampled, and the work for which as many of them are explained as it allows: a row costs leaves × depth².
SAMPLE_ROWS = 2000
WORK = 400_000_000
# Fewer are not worth a picture, whatever they cost.
LEAST = 200
# Inputs whose single rows are kept.
SHOWN = 12
# How many rows of a sample an input needs as an example of a request.
EXAMPLE = 5
# What contributions add up to, before the link that makes a score of it.
UNITS = {"binary:logistic": "log odds", "multi:softprob": "log odds", "count:poisson": "log of the rate"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """How inputs move a model's margin away from its base.

    Args:
        rows: explained, those of the least hashes of their row ids.
        unit: of the contributions.
        base: the margin before any input, per class of a multi-class model.
        inputs: by falling mean absolute contribution (summed over the columns that its encoder makes of an input and,
            of a multi-class model, over classes): `input`, `mean_abs` and, of a multi-class model, `by_class`.
        points: the first inputs' `input`, `values`, `contributions` and `class` (None of one score), row by row.
        scores, labels: of all sampled rows, whether explained or not; of a model with one score.
        example: raw rows as a request has them: `columns`, `data`.
        reason: why there is none.
    """

    rows: int
    unit: str = ""
    base: tuple[float, ...] = ()
    inputs: tuple[dict[str, Any], ...] = ()
    points: tuple[dict[str, Any], ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()
    example: dict[str, Any] = dataclasses.field(default_factory=dict)
    reason: str = ""


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class Sample(beam.CombineFn):
    """RecordBatches with `row_id` → the `rows` rows of the least hashes, in their order: the same however they were cut."""

    rows: int = SAMPLE_ROWS

    def create_accumulator(self) -> pa.RecordBatch | None:
        return None

    def add_input(self, state: pa.RecordBatch | None, batch: pa.RecordBatch) -> pa.RecordBatch | None:
        if state is not None and state.num_rows == self.rows:
            batch = batch.filter(pa.array(_hashes(batch) < _hashes(state)[-1]))
        return self.merge_accumulators([state, batch])

    def merge_accumulators(self, states: Iterable[pa.RecordBatch | None]) -> pa.RecordBatch | None:
        found = [each for each in states if each is not None]
        if not found:
            return None
        whole = pa.Table.from_batches(found).combine_chunks()
        batch = whole.to_batches()[0] if len(whole) else found[0].slice(0, 0)
        # `take` leaves no view of a larger buffer behind.
        return batch.take(pa.array(np.argsort(_hashes(batch), kind="stable")[: self.rows]))

    def extract_output(self, state: pa.RecordBatch | None) -> pa.RecordBatch | None:
        return state


def _hashes(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    ids = batch.column(batch.schema.get_field_index("row_id")).to_numpy(zero_copy_only=False)
    return mix(ids.view(np.uint64))


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Explain(beam.PTransform):
    """PCollection[RecordBatch] of test examples → one `Explanation`.

    Args:
        model: whose objective says what contributions add up to.
        bundle: the trained model.
        threads: of XGBoost; 0 takes every core.
    """

    model: Model
    bundle: Pinned
    threads: int = 0

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        sampled = rows | "Sample" >> beam.CombineGlobally(Sample())
        return sampled | "Contributions" >> beam.Map(explain, self.bundle, self.model.objective, self.threads)


def explain(sample: pa.RecordBatch | None, bundle: Pinned, objective: str, threads: int = 0) -> Explanation:
    """The explanation of as many rows of `sample` as `WORK` allows."""
    import xgboost

    if sample is None or not sample.num_rows:
        return Explanation(0, reason="there are no test rows")
    scorer = open_scorer(bundle, threads)
    rows = sample.slice(0, affordable(scorer, sample.num_rows))
    example = _example(scorer, sample.slice(0, EXAMPLE))
    try:
        found = contributions(scorer, rows)
    except xgboost.core.XGBoostError as error:
        return Explanation(0, example=example, reason=(str(error).splitlines() or ["XGBoost refused"])[-1].strip())
    inputs, base = by_input(scorer, found), found[:, :, -1].astype(np.float64).mean(axis=0)
    means = np.abs(inputs).mean(axis=0)  # [classes, inputs]
    names, several = list(scorer.bundle.encoders.inputs), len(means) > 1
    order = sorted(range(len(names)), key=lambda i: (-means[:, i].sum(), names[i]))
    shown = [
        {
            "input": names[i],
            "mean_abs": float(means[:, i].sum()),
            **({"by_class": means[:, i].tolist()} if several else {}),
        }
        for i in order
    ]
    points = []
    for i in order[:SHOWN]:
        chosen = int(means[:, i].argmax())
        encoding = scorer.bundle.encoders.encodings[i]
        moved = [float(f"{value:.5g}") for value in inputs[:, chosen, i].tolist()]
        values = _raw(column_of(rows, encoding), encoding.encoder is not None)
        points.append(
            {"input": names[i], "values": values, "contributions": moved, "class": chosen if several else None}
        )
    single = scorer.bundle.classes == 1
    scores = score(scorer, sample).tolist() if single else []
    labels = sample.column(sample.schema.get_field_index(LABEL)).to_pylist() if single else []
    return Explanation(
        len(rows),
        UNITS.get(objective, "units of the label"),
        tuple(base.tolist()),
        tuple(shown),
        tuple(points),
        tuple(scores),
        tuple(labels),
        example,
    )


def affordable(scorer: Scorer, rows: int) -> int:
    """How many of `rows` are explained: decided by the booster alone, so that a repeated run explains the same."""
    trees = scorer.booster.get_dump() if len(scorer.bundle.booster) < 1 << 28 else []
    leaves = sum(text.count("leaf=") for text in trees)
    depth = max((len(tabs) for text in trees for tabs in re.findall(r"^\t*", text, re.MULTILINE)), default=0)
    if not trees:
        return min(rows, LEAST)
    return min(rows, max(LEAST, WORK // max(1, leaves * depth * depth)))


def contributions(scorer: Scorer, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
    """[rows, classes, columns + 1]; the last is the base, and the sum over the last axis is the margin."""
    import xgboost

    encoders = scorer.bundle.encoders
    matrix = xgboost.DMatrix(
        encoders.apply(rows),
        feature_names=encoders.names,
        feature_types=encoders.types,
        enable_categorical="c" in encoders.types,
    )
    found: npt.NDArray[np.float32] = scorer.booster.predict(matrix, pred_contribs=True)
    return found.reshape(rows.num_rows, scorer.bundle.classes, len(encoders.names) + 1)


def by_input(scorer: Scorer, found: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Contributions [rows, classes, inputs] in doubles: the columns that an encoder makes of one input are added up."""
    widths = [len(each.names) for each in scorer.bundle.encoders.encodings]
    first = np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(int)
    return np.add.reduceat(found[:, :, :-1].astype(np.float64), first, axis=2)


def _raw(column: pa.Array, encoded: bool) -> list[Any]:
    """A column's values for a picture: numbers, or texts where its type is no number."""
    kind = column.type
    if pa.types.is_integer(kind):
        whole: list[Any] = column.to_pylist()
        return whole
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return [None if np.isnan(value) else float(f"{value:.6g}") for value in numbers(column).tolist()]
    shown: list[Any] = (texts(column) if encoded else column.cast(pa.string())).to_pylist()
    return shown


def _example(scorer: Scorer, rows: pa.RecordBatch) -> dict[str, Any]:
    """Inputs of `rows` as MLflow's `dataframe_split` has them."""
    columns = [column_of(rows, each) for each in scorer.bundle.encoders.encodings]
    return {"columns": list(scorer.bundle.encoders.inputs), "data": _records(columns)}


def _records(columns: Sequence[pa.Array]) -> list[list[Any]]:
    whole = [[_plain(value) for value in column.to_pylist()] for column in columns]
    return [list(row) for row in zip(*whole)]


def _plain(value: Any) -> Any:
    """As JSON has it: moments as text, what is not finite as missing."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else value.isoformat()
