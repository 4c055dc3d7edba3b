"""Judges a scored test split: metrics overall and by slice, and the gates a model must pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa

from schemas import Gates, Model
from schemas.models import RISING
from schemas.tables import scores
from transforms.batches import frame
from transforms.fitting import LABEL
from transforms.metrics import Tally, auc_error, metrics
from transforms.scoring import carried_name

# (column, value as text or None) of each column of a slice; () is the whole.
Key = tuple[tuple[str, str | None], ...]
Tallies = dict[Key, Tally]


@dataclasses.dataclass(frozen=True)
class Report:
    """Metrics of a test split.

    Args:
        rows: examples.
        metrics: overall; None where undefined.
        slices: by value of each declared slice, the largest first.
        auc_error: the most by which binning may have moved the overall AUC.
    """

    rows: int
    metrics: Mapping[str, float | None]
    slices: tuple[Slice, ...] = ()
    auc_error: float = 0.0


@dataclasses.dataclass(frozen=True)
class Slice:
    """Metrics of the examples with one value of a slice's columns."""

    by: Key
    rows: int
    metrics: Mapping[str, float | None]

    @property
    def name(self) -> str:
        return ", ".join(f"{column}={'null' if value is None else value}" for column, value in self.by)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What one gate said.  `judged` is False where there was nothing to judge by; such a gate holds."""

    gate: str
    holds: bool
    reason: str
    judged: bool = True


def carried(gates: Gates) -> tuple[str, ...]:
    """Columns of the examples that `tally` needs beside the scores."""
    return tuple(dict.fromkeys([*(name for group in gates.slices for name in _group(group)), LABEL]))


def _group(group: str | tuple[str, ...]) -> tuple[str, ...]:
    return (group,) if isinstance(group, str) else tuple(group)


def tally(scored: pa.RecordBatch, objective: str, slices: Iterable[str | tuple[str, ...]] = ()) -> Tallies:
    """What `scored` adds to the metrics of the whole and of each slice.

    Args:
        scored: what `Score` makes of examples when it carries the columns named by `carried`.
    """
    rows = frame(scored)
    label = rows[carried_name(LABEL)].cast(pl.Float64).to_numpy()
    several = [name for name in scores(len(rows.columns)) if name in rows.columns]
    values = rows.select(several).to_numpy() if several else rows["score"].to_numpy()
    result: Tallies = {(): Tally.of(objective, label, values)} if len(label) else {}
    for group in slices:
        columns = _group(group)
        texts = rows.select(pl.col(carried_name(name)).cast(pl.String).alias(name) for name in columns)
        places = texts.with_row_index("__row").group_by(list(columns)).agg("__row")
        for *key, place in places.iter_rows():
            index = np.array(place)
            result[tuple(zip(columns, key))] = Tally.of(objective, label[index], values[index])
    return result


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class Tallying(beam.CombineFn):
    """RecordBatches of scored examples → `Report`."""

    objective: str
    slices: tuple[str | tuple[str, ...], ...] = ()

    def create_accumulator(self) -> Tallies:
        return {}

    def add_input(self, state: Tallies, scored: pa.RecordBatch) -> Tallies:
        return self.merge_accumulators([state, tally(scored, self.objective, self.slices)])

    def merge_accumulators(self, states: Iterable[Tallies]) -> Tallies:
        total: Tallies = {}
        for state in states:
            for key, part in state.items():
                total[key] = total[key] + part if key in total else part
        return total

    def extract_output(self, state: Tallies) -> Report:
        return report(self.objective, state)


def report(objective: str, state: Tallies) -> Report:
    """The metrics of everything tallied."""
    whole = state.get((), Tally())
    parts = [Slice(key, part.rows, metrics(objective, part)) for key, part in state.items() if key]
    parts.sort(key=lambda each: ([column for column, _ in each.by], -each.rows, each.name))
    return Report(whole.rows, metrics(objective, whole), tuple(parts), auc_error(whole.bins) if whole.bins else 0.0)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Evaluate(beam.PTransform):
    """PCollection[RecordBatch] of scored examples → one `Report`."""

    model: Model

    def expand(self, scored: beam.PCollection) -> beam.PCollection:
        tallying = Tallying(self.model.objective, self.model.gates.slices)
        return scored | "Tally" >> beam.CombineGlobally(tallying)


def verdicts(gates: Gates, report: Report) -> list[Verdict]:
    """What each gate says of `report`: floors first, then each slice's gap."""
    result = [_floor(metric, bound, report) for metric, bound in gates.at_least.items()]
    for metric, bound in gates.max_gap.items():
        result += [_gap(metric, bound, report, each, gates.min_slice_rows) for each in report.slices]
    return result


def _floor(metric: str, bound: float, report: Report) -> Verdict:
    value, rising = report.metrics[metric], metric in RISING
    gate = f"{metric} {'≥' if rising else '≤'} {bound:g}"
    if value is None:
        return Verdict(gate, False, f"{metric} is undefined on {report.rows} test rows")
    return Verdict(gate, value >= bound if rising else value <= bound, f"{metric} is {value:.4f}")


def _gap(metric: str, bound: float, report: Report, part: Slice, least: int) -> Verdict:
    gate = f"{metric} of {part.name} within {bound:g} of the whole"
    whole, value = report.metrics[metric], part.metrics[metric]
    if part.rows < least:
        return Verdict(gate, True, f"{part.rows} rows, fewer than {least}", judged=False)
    if whole is None or value is None:
        return Verdict(gate, True, f"{metric} is undefined there", judged=False)
    gap = whole - value if metric in RISING else value - whole
    return Verdict(gate, gap <= bound, f"{value:.4f} against {whole:.4f} overall, {part.rows} rows")


def as_json(report: Report, judged: Iterable[Verdict] = ()) -> dict[str, Any]:
    """A report and its verdicts as JSON values."""
    return {
        "rows": report.rows,
        "metrics": dict(report.metrics),
        "auc_error": report.auc_error,
        "slices": [{"by": dict(each.by), "rows": each.rows, "metrics": dict(each.metrics)} for each in report.slices],
        "gates": [dataclasses.asdict(each) for each in judged],
    }
