"""SHAP contributions of a model's inputs (TreeSHAP, Lundberg et al. 2020) on a bounded sample of test rows."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from datetime import date

import apache_beam as beam
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas import Model
from schemas.splits import LABEL
from transforms.models.encoders import as_categories, as_doubles, input_column
from transforms.models.scoring import PinnedModel, Scorer, open_scorer, score
from transforms.models.stored_records import InputPoints, InputShare, RequestExample
from transforms.records.arrays import Floats, UInt64s
from transforms.records.row_hashing import mix_bits

# The most rows that are sampled, and the work that limits how many of them are explained: a row costs leaves × depth².
SAMPLE_ROWS = 2000
WORK = 400_000_000
# At least so many rows are explained, whatever the cost: fewer do not make a useful chart.
LEAST = 200
# Inputs whose contributions are stored row by row.
SHOWN = 12
# Rows of the example of a request.
EXAMPLE = 5
# Unit of the margin that contributions add up to; other objectives use the label's unit.
UNITS = {"binary:logistic": "log odds", "multi:softprob": "log odds", "count:poisson": "log of the rate"}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Contributions of inputs to a model's margin, beyond its base.

    Args:
        rows: number of explained rows, which are those whose row ids have the least hashes.
        unit: unit of the contributions.
        base: the margin before any contribution, by class.
        inputs: by falling mean absolute contribution (summed over the columns that its encoder makes of an input and,
            of a multi-class model, over classes): `input`, `mean_abs` and, of a multi-class model, `by_class`.
        points: the first inputs' `input`, `values`, `contributions` and `class` (None of one score), row by row.
        scores, labels: scores and labels of all sampled rows; empty for a multi-class model.
        example: raw rows in the form of a request (`columns`, `data`).
        reason: why no rows are explained.
    """

    rows: int
    unit: str = ""
    base: tuple[float, ...] = ()
    inputs: tuple[InputShare, ...] = ()
    points: tuple[InputPoints, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[float, ...] = ()
    example: RequestExample = dataclasses.field(default_factory=lambda: RequestExample())
    reason: str = ""


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class ExplainedSample(beam.CombineFn):
    """RecordBatches with `row_id` → the `rows` rows with the least hashes, in order of hash."""

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
        # `take` copies, so that the larger buffer is freed.
        return batch.take(pa.array(np.argsort(_hashes(batch), kind="stable")[: self.rows]))

    def extract_output(self, state: pa.RecordBatch | None) -> pa.RecordBatch | None:
        return state


def _hashes(batch: pa.RecordBatch) -> UInt64s:
    ids = batch.column(batch.schema.get_field_index("row_id")).to_numpy(zero_copy_only=False)
    return mix_bits(ids.view(np.uint64))


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Explain(beam.PTransform):
    """PCollection[RecordBatch] of test examples → one `Explanation`.

    Args:
        model: the declared model, whose objective decides the unit.
        bundle: the trained model.
        threads: XGBoost's threads; 0 means every core.
    """

    model: Model
    bundle: PinnedModel
    threads: int = 0

    def expand(self, rows: beam.PCollection) -> beam.PCollection:
        sampled = rows | "Sample" >> beam.CombineGlobally(ExplainedSample())
        return sampled | "Contributions" >> beam.Map(explain, self.bundle, self.model.objective, self.threads)


def explain(sample: pa.RecordBatch | None, bundle: PinnedModel, objective: str, threads: int = 0) -> Explanation:
    """Explain as many rows of `sample` as `WORK` allows."""
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
    moved, base = by_input(scorer, found), found[:, :, -1].astype(np.float64).mean(axis=0)
    means = np.abs(moved).mean(axis=0)  # [classes, inputs]
    names = list(scorer.bundle.encoders.inputs)
    order = sorted(range(len(names)), key=lambda i: (-means[:, i].sum(), names[i]))
    single = scorer.bundle.classes == 1
    return Explanation(
        rows=len(rows),
        unit=UNITS.get(objective, "units of the label"),
        base=tuple(base.tolist()),
        inputs=tuple(_importance(names[i], means[:, i]) for i in order),
        points=tuple(_points(scorer, rows, i, moved[:, :, i], means[:, i]) for i in order[:SHOWN]),
        scores=tuple(score(scorer, sample).tolist()) if single else (),
        labels=tuple(sample.column(sample.schema.get_field_index(LABEL)).to_pylist()) if single else (),
        example=example,
    )


def _importance(name: str, means: Floats) -> InputShare:
    """An entry of `Explanation.inputs`; `means` are the input's mean absolute contributions [classes]."""
    share: InputShare = {"input": name, "mean_abs": float(means.sum())}
    if len(means) > 1:
        share["by_class"] = means.tolist()
    return share


def _points(scorer: Scorer, rows: pa.RecordBatch, i: int, moved: Floats, means: Floats) -> InputPoints:
    """An entry of `Explanation.points` for input number `i`, whose contributions are `moved` [rows, classes]."""
    chosen = int(means.argmax())
    encoding = scorer.bundle.encoders.encodings[i]
    return {
        "input": encoding.input,
        "values": _raw(input_column(rows, encoding), encoding.encoder is not None),
        "contributions": [float(f"{value:.5g}") for value in moved[:, chosen].tolist()],
        "class": chosen if len(means) > 1 else None,
    }


def affordable(scorer: Scorer, rows: int) -> int:
    """How many of `rows` are explained.  Only the booster decides, so that a repeated run explains the same rows."""
    trees = scorer.booster.get_dump() if len(scorer.bundle.booster) < 1 << 28 else []
    leaves = sum(text.count("leaf=") for text in trees)
    depth = max((len(tabs) for text in trees for tabs in re.findall(r"^\t*", text, re.MULTILINE)), default=0)
    if not trees:
        return min(rows, LEAST)
    return min(rows, max(LEAST, WORK // max(1, leaves * depth * depth)))


def contributions(scorer: Scorer, rows: pa.RecordBatch) -> npt.NDArray[np.float32]:
    """Contributions [rows, classes, columns + 1]; the last column is the base, and their sum is the margin."""
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


def by_input(scorer: Scorer, found: npt.NDArray[np.float32]) -> Floats:
    """Contributions [rows, classes, inputs] in doubles, summed over the columns that an encoder makes of one input."""
    widths = [len(each.names) for each in scorer.bundle.encoders.encodings]
    first = np.concatenate([[0], np.cumsum(widths)[:-1]]).astype(int)
    return np.add.reduceat(found[:, :, :-1].astype(np.float64), first, axis=2)


def _raw(column: pa.Array, encoded: bool) -> list[float | str | None]:
    """A column's values for a chart: numbers, or texts if its type is not numeric."""
    kind = column.type
    if pa.types.is_integer(kind):
        whole: list[float | str | None] = column.to_pylist()
        return whole
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return [None if np.isnan(value) else float(f"{value:.6g}") for value in as_doubles(column).tolist()]
    shown: list[float | str | None] = (as_categories(column) if encoded else column.cast(pa.string())).to_pylist()
    return shown


def _example(scorer: Scorer, rows: pa.RecordBatch) -> RequestExample:
    """Inputs of `rows` in MLflow's format `dataframe_split`."""
    columns = [input_column(rows, each) for each in scorer.bundle.encoders.encodings]
    return {"columns": list(scorer.bundle.encoders.inputs), "data": _records(columns)}


def _records(columns: Sequence[pa.Array]) -> list[list[object]]:
    whole = [[_plain(value) for value in column.to_pylist()] for column in columns]
    return [list(row) for row in zip(*whole)]


def _plain(value: date | float | str | None) -> object:
    """A JSON value: dates and times as text, null for a number that is not finite."""
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else value.isoformat()
