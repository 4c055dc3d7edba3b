"""Checks of the training data: statistics, drift, and inputs that leak the label."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import TYPE_CHECKING

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa

from schemas import Model
from schemas.splits import LABEL
from transforms.evaluation.gates import Verdict
from transforms.models.encoders import Encoding, as_distinct_values, as_doubles, input_column
from transforms.records.arrays import Floats
from transforms.records.exact_sums import UNIT, exact_squares, exact_sum, integer_sums
from transforms.training.examples import schema_of
from transforms.training.fit_encoders import declared_inputs
from transforms.validation.statistics import columns_described
from transforms.validation.tfdv_schema import infer_schema, measure_drift, parse_statistics, schema_text

if TYPE_CHECKING:
    from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList

log = logging.getLogger("millrace.training")

# Files of a bundle beside the model.
STATISTICS, SCHEMA = "statistics.pb", "schema.pbtxt"
# An input leaks the label if it has at most `FEW` values, with at least `LEAST_ROWS` rows on average, and each value
# occurs with only one label.
FEW, LEAST_ROWS = 20, 5
# It also does if more than this share of the label's variance lies between its values.
MOST = 0.8
_SMALL = 1 << 24
_FIRST = 1000


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the checks of a run's data found.

    Args:
        drift: distance, 0 … 1, of each column of the training split from the champion's: the Jensen–Shannon divergence
            of numbers, the greatest change of a value's share of strings; empty without a champion.
        skew: the same distance between the test split and the training split.
        champion: version whose training data were compared.
        warnings: sentences, each naming an input.
    """

    drift: Mapping[str, float]
    skew: Mapping[str, float]
    champion: str | None
    warnings: tuple[str, ...]

    def verdicts(self, most: float | None) -> list[Verdict]:
        """The verdict of the gate `max_drift`; none if it is not declared."""
        if most is None:
            return []
        gate = f"drift from the champion's training data ≤ {most:g}"
        if not self.drift:
            return [Verdict(gate, True, "there is no champion to compare with", judged=False)]
        name = max(self.drift, key=lambda each: (self.drift[each], each))
        return [Verdict(gate, self.drift[name] <= most, f"{name} moved most, by {self.drift[name]:.4f}")]


def model_columns(model: Model) -> pa.Schema:
    """The columns of which statistics are computed: inputs and label."""
    return columns_described(schema_of(model), [*model.inputs, LABEL])


def bundle_files(statistics: DatasetFeatureStatisticsList, model: Model) -> dict[str, bytes]:
    """Files of the bundle with statistics and schema of the training split, in TFDV's formats."""
    schema = schema_text(infer_schema(statistics, model_columns(model)))
    return {STATISTICS: statistics.SerializeToString(deterministic=True), SCHEMA: schema.encode()}


def distances(
    now: DatasetFeatureStatisticsList, before: DatasetFeatureStatisticsList, columns: pa.Schema
) -> dict[str, float]:
    """Distance, 0 … 1, of each column that both statistics have."""
    shared = {feature.path.step[0] for feature in before.datasets[0].features}
    found = measure_drift(infer_schema(now, columns), now, before)
    return {name: value for name, value in sorted(found.items()) if name in shared}


def check_data(
    learnt: DatasetFeatureStatisticsList,
    tested: DatasetFeatureStatisticsList,
    leaks: Mapping[str, str],
    model: Model,
    champion: tuple[str, bytes] | None,
) -> Findings:
    """Checks the data; warnings are logged too.

    Args:
        learnt, tested: statistics of the training and of the test split.
        leaks: see `FindLeaks`.
        champion: its version and its training data's statistics, serialised.
    """
    columns = model_columns(model)
    drift = {} if champion is None else distances(learnt, parse_statistics(champion[1]), columns)
    warnings = tuple(leaks.values()) + tuple(_dull(learnt))
    for each in warnings:
        log.warning(each)
    return Findings(drift, distances(tested, learnt, columns), champion and champion[0], warnings)


def _dull(statistics: DatasetFeatureStatisticsList) -> Iterable[str]:
    """Warnings about inputs with no value or only one, and about a constant label."""
    for feature in statistics.datasets[0].features:
        name = feature.path.step[0]
        number = feature.WhichOneof("stats") == "num_stats"
        stats = feature.num_stats if number else feature.string_stats
        # Minimum and maximum are not sufficient: they are doubles, and different integers beyond 2^53 may be the same
        # double.
        constant = (stats.std_dev == 0) if number else stats.unique == 1
        if name == LABEL:
            if constant:
                yield f"The label is {stats.min:g} in every training example: there is nothing to learn"
            continue
        if not stats.common_stats.num_non_missing:
            yield f"Input {name!r} is null in every training example: it teaches nothing"
        elif constant and not stats.common_stats.num_missing:
            yield f"Input {name!r} has one value in all training examples: it teaches nothing"


@dataclasses.dataclass(frozen=True)
class Level:
    """The labels of one value of an input: least, greatest, number, exact sum and sum of squares.

    `sum` counts in 2^−1126 and `squares` in 2^−2252 (see `transforms.records.exact_sums`).
    """

    least: float
    most: float
    rows: int
    sum: int
    squares: int

    @classmethod
    def of(cls, labels: Floats) -> Level:
        least, most = float(labels.min()), float(labels.max())
        if (
            max(-least, most) <= _SMALL and (labels == np.floor(labels)).all()
        ):  # such as classes: integers are exact, and faster
            total, squares = integer_sums(labels.astype(np.int64))
            return cls(least, most, len(labels), total << UNIT, squares << 2 * UNIT)
        return cls(least, most, len(labels), exact_sum(labels), exact_squares(labels))

    def __add__(self, other: Level) -> Level:
        return Level(
            min(self.least, other.least),
            max(self.most, other.most),
            self.rows + other.rows,
            self.sum + other.sum,
            self.squares + other.squares,
        )


@dataclasses.dataclass(frozen=True)
class Suspect:
    """Counts of an input's values, and of the labels of each.

    Args:
        rows: rows with a value.
        equal: rows whose value is the label.
        levels: labels by value; None once there are more than `FEW` values.
    """

    rows: int
    equal: int
    levels: Mapping[object, Level] | None

    @classmethod
    def of(cls, each: Encoding, column: pa.Array, label: pl.Series) -> Suspect:
        strings = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        values = None if strings or pa.types.is_temporal(column.type) else as_doubles(column)
        rows = pl.DataFrame({"x": pl.from_arrow(as_distinct_values(column)), "y": label.cast(pl.Float64)}).drop_nulls()
        equal = 0 if values is None else int(np.count_nonzero(values.astype(np.float32) == label.to_numpy()))
        # Most inputs have more values than `FEW` among their first rows.
        if rows["x"].head(_FIRST).n_unique() > FEW or rows["x"].n_unique() > FEW:
            return cls(len(rows), equal, None)
        groups = rows.group_by("x").agg("y")
        parts = zip(groups["x"].to_list(), groups["y"], strict=True)
        return cls(len(rows), equal, {x: Level.of(labels.to_numpy()) for x, labels in parts})

    def __add__(self, other: Suspect) -> Suspect:
        levels: dict[object, Level] | None = None
        if self.levels is not None and other.levels is not None:
            levels = dict(self.levels)
            for value, level in other.levels.items():
                levels[value] = levels[value] + level if value in levels else level
        few = levels if levels is not None and len(levels) <= FEW else None
        return Suspect(self.rows + other.rows, self.equal + other.equal, few)

    def verdict(self, name: str) -> str | None:
        fix = "Is it known at the time of the prediction? If so, correct its `time`; if not, leave it out"
        if self.rows and self.equal == self.rows and (self.levels is None or len(self.levels) > 1):
            return f"Input {name!r} equals the label in all {self.rows} training examples. {fix}"
        if self.levels and self.rows >= LEAST_ROWS * len(self.levels):
            labels = {each.least for each in self.levels.values()}
            if len(labels) > 1 and all(each.least == each.most for each in self.levels.values()):
                return (
                    f"Input {name!r} gives the label away: each of its {len(self.levels)} values goes with one label "
                    f"only. {fix}"
                )
            if (explained := self.explained) > MOST:
                return (
                    f"Input {name!r} all but gives the label away: {explained:.0%} of the label's variance lies "
                    f"between its {len(self.levels)} values. {fix}"
                )
        return None

    @property
    def explained(self) -> float:
        """Share of the label's variance that lies between the input's values (Pearson's correlation ratio, squared)."""
        levels = list((self.levels or {}).values())
        rows, total = sum(each.rows for each in levels), sum(each.sum for each in levels)
        # Both are multiplied by the number of rows, as integers: with doubles, labels far from 0 would cancel.
        whole = rows * sum(each.squares for each in levels) - total * total
        between = sum(Fraction(rows * each.sum**2, each.rows) for each in levels) - total * total
        return float(between / whole) if whole > 0 else 0.0


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class FindLeaks(beam.CombineFn):
    """RecordBatches of training examples → a warning for each input that equals or determines the label."""

    encodings: tuple[Encoding, ...]

    @classmethod
    def of(cls, model: Model) -> FindLeaks:
        return cls(declared_inputs(model))

    def create_accumulator(self) -> dict[str, Suspect]:
        return {}

    def add_input(self, state: dict[str, Suspect], batch: pa.RecordBatch) -> dict[str, Suspect]:
        label = pl.Series("y", pl.from_arrow(batch.column(batch.schema.get_field_index(LABEL))))
        found = {each.input: Suspect.of(each, input_column(batch, each), label) for each in self._open(state)}
        return self.merge_accumulators([state, found])

    def _open(self, state: dict[str, Suspect]) -> list[Encoding]:
        """Inputs that may still leak the label."""
        return [
            each
            for each in self.encodings
            if not (
                each.input in state
                and state[each.input].levels is None
                and state[each.input].equal < state[each.input].rows
            )
        ]

    def merge_accumulators(self, states: Iterable[dict[str, Suspect]]) -> dict[str, Suspect]:
        total: dict[str, Suspect] = {}
        for state in states:
            for name, part in state.items():
                total[name] = total[name] + part if name in total else part
        return total

    def extract_output(self, state: dict[str, Suspect]) -> dict[str, str]:
        found = {name: part.verdict(name) for name, part in sorted(state.items())}
        return {name: text for name, text in found.items() if text is not None}
