"""Fitting of encoders on the training split, by a Beam combiner whose result does not depend on the order of
merging."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas import Model, encoders
from schemas.splits import LABEL
from transforms.models.encoders import (
    EXACT,
    EncoderState,
    Encoding,
    Fitted,
    as_categories,
    as_doubles,
    as_int64,
    columns_needed,
    input_column,
    is_whole,
)
from transforms.records.arrays import Floats, Ints
from transforms.records.exact_sums import Bins, Moments, as_fraction, exact_sum, group_sums

# The most distinct values for which quantiles are exact; with more, values are rounded to about 11 leading bits.
QUANTILE_BINS = 1 << 16


def declared_inputs(model: Model) -> tuple[Encoding, ...]:
    """The model's inputs in order, before fitting."""
    schema = model.rows.schema
    return tuple(Encoding(name, str(schema.field(name).type), model.encode.get(name)) for name in model.inputs)


def fit(model: Model, batches: Iterable[pa.RecordBatch]) -> Fitted:
    """Fit the model's encoders on `batches` of its training split."""
    fitting = Fitting(declared_inputs(model))
    state = fitting.create_accumulator()
    for batch in batches:
        state = fitting.add_input(state, batch)
    return fitting.extract_output(state)


@dataclasses.dataclass(eq=False)  # Beam sets the label
class FitEncoders(beam.PTransform):
    """PCollection of RecordBatches of training examples → one `Fitted`.

    Batches have the model's inputs, and the column `__label` if an encoder is fitted to labels.
    """

    encodings: tuple[Encoding, ...]

    def expand(self, examples: beam.PCollection) -> beam.PCollection:
        return examples | "FitEncoders" >> beam.CombineGlobally(Fitting(self.encodings))


# Accumulators of an input, by its type and encoder; each class has `+`.
PartialFit = Any
State = dict[str, PartialFit]


@dataclasses.dataclass(eq=False)  # Beam sets its type hints
class Fitting(beam.CombineFn):
    """RecordBatches → `Fitted`.  Accumulators have only integers and extremes, so that any order gives equal JSON."""

    encodings: tuple[Encoding, ...]

    def create_accumulator(self) -> State:
        return {}

    def add_input(self, state: State, batch: pa.RecordBatch) -> State:
        return self.merge_accumulators([state, self.of(batch)])

    def of(self, batch: pa.RecordBatch) -> State:
        """The accumulator of one batch."""
        parts = ((each, _part(each, batch)) for each in self.encodings)
        return {each.input: part for each, part in parts if part is not None}

    def merge_accumulators(self, states: Iterable[State]) -> State:
        total: State = {}
        for state in states:
            for name, part in state.items():
                total[name] = total[name] + part if name in total else part
        return total

    def extract_output(self, state: State) -> Fitted:
        return Fitted(
            tuple(dataclasses.replace(each, state=_finished(each, state.get(each.input))) for each in self.encodings)
        )


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """How often each category occurred and, for `Target`, the exact sum of its labels."""

    counts: Mapping[str, int] = dataclasses.field(default_factory=dict)
    sums: Mapping[str, int] = dataclasses.field(default_factory=dict)
    rows: int = 0
    total: int = 0

    @classmethod
    def of(cls, texts: pa.Array, labels: Floats | None = None) -> Vocabulary:
        coded = texts.dictionary_encode()
        known = coded.is_valid().to_numpy(zero_copy_only=False)
        codes = coded.indices.to_numpy(zero_copy_only=False)[known].astype(np.int64)
        names = coded.dictionary.to_pylist()
        counts = dict(zip(names, np.bincount(codes, minlength=len(names)).tolist()))
        if labels is None:
            return cls(counts)
        return cls(
            counts, dict(zip(names, group_sums(labels[known], codes, len(names)))), len(labels), exact_sum(labels)
        )

    def __add__(self, other: Vocabulary) -> Vocabulary:
        return Vocabulary(
            _added(self.counts, other.counts),
            _added(self.sums, other.sums),
            self.rows + other.rows,
            self.total + other.total,
        )

    def ranked(self, min_count: int, max_size: int) -> list[str]:
        """Categories by descending count, ties by name."""
        frequent = (name for name, count in self.counts.items() if count >= min_count)
        return sorted(frequent, key=lambda name: (-self.counts[name], name))[:max_size]


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Histograms from which quantiles of integers are computed.

    Args:
        moments: least and greatest integer.
        bins: histogram of the integers as doubles.
        whole: histogram of the integers themselves; None once it would have to round them; this depends on their number
            and not on the order of merging.
    """

    moments: Moments
    bins: Bins
    whole: Bins | None

    @classmethod
    def of(cls, values: Ints) -> Ranks:
        whole = Bins.of_integers(values, QUANTILE_BINS)
        moments = (
            Moments(len(values), least=int(values.min()), greatest=int(values.max())) if len(values) else Moments()
        )
        return cls(moments, Bins.of(values.astype(np.float64), QUANTILE_BINS), None if whole.shift else whole)

    def __add__(self, other: Ranks) -> Ranks:
        whole = None if self.whole is None or other.whole is None else self.whole + other.whole
        whole = None if whole is None or whole.shift else whole
        return Ranks(self.moments + other.moments, self.bins + other.bins, whole)

    def quantiles(self, at: Iterable[float]) -> list[Fraction]:
        if self.whole is not None:
            return self.whole.integer_quantiles(at)
        return [Fraction(value) for value in self.bins.quantiles(at)]


@dataclasses.dataclass(frozen=True)
class Doubles:
    """Moments and distinct values of doubles that are imputed."""

    moments: Moments
    bins: Bins

    def __add__(self, other: Doubles) -> Doubles:
        return Doubles(self.moments + other.moments, self.bins + other.bins)

    @property
    def columns(self) -> int:
        """How many float32 columns keep the values distinct."""
        values = self.bins.values
        return next((count for count in (1, 2) if not _merged(values, count)), 3)


def _merged(values: Floats, columns: int) -> bool:
    """Whether any two of the ascending `values` become equal in so many float32 columns."""
    same = np.ones(max(len(values) - 1, 0), bool)
    for _ in range(columns):
        single = values.astype(np.float32)
        same &= single[1:] == single[:-1]
        values = values - single
    return bool(same.any())


def _added(left: Mapping[str, int], right: Mapping[str, int]) -> dict[str, int]:
    total = dict(left)
    for name, count in right.items():
        total[name] = total.get(name, 0) + count
    return total


def _part(each: Encoding, batch: pa.RecordBatch) -> PartialFit | None:
    """The accumulator of one input for `batch`; None if nothing is fitted."""
    encoder = each.encoder
    if isinstance(encoder, encoders.Hashing | encoders.Log):
        return None
    passed = encoder is None or _given(encoder)
    if passed and not is_whole(each.type) and (encoder is None or each.type != "double"):
        return None
    column = input_column(batch, each)
    if isinstance(encoder, encoders.Target):
        return Vocabulary.of(as_categories(column), as_doubles(batch.column(batch.schema.get_field_index(LABEL))))
    if isinstance(encoder, encoders.Ordinal):
        return Vocabulary.of(as_categories(column))
    ranked = isinstance(encoder, encoders.Robust | encoders.Bucketize) or encoder == encoders.Impute("median")
    if is_whole(each.type):
        whole, known = as_int64(column)
        whole = whole if known.all() else whole[known]
        if passed:
            return Moments(len(whole), least=int(whole.min()), greatest=int(whole.max())) if len(whole) else None
        return Ranks.of(whole) if ranked else Moments.of_integers(whole)
    values = as_doubles(column)
    if isinstance(encoder, encoders.Impute) and each.type == "double":
        return Doubles(Moments.of(values), Bins.of(values, QUANTILE_BINS))
    return Bins.of(values, QUANTILE_BINS) if ranked else Moments.of(values)


def _given(encoder: encoders.Encoder | None) -> bool:
    return isinstance(encoder, encoders.Impute) and not isinstance(encoder.value, str)


def _finished(each: Encoding, part: PartialFit | None) -> EncoderState:
    """The fitted state of one input; `part` is None if there was no row or nothing is fitted."""
    encoder = each.encoder
    if isinstance(encoder, encoders.Target):
        return _target(encoder, part or Vocabulary())
    if isinstance(encoder, encoders.Ordinal):
        return {"categories": (part or Vocabulary()).ranked(encoder.min_count, encoder.max_size)}
    if is_whole(each.type) and part is not None:
        moments = part.moments if isinstance(part, Ranks) else part
        if moments.count and (moments.least < -EXACT or moments.greatest > EXACT):
            return _whole(encoder, part, int(moments.least), int(moments.greatest))
        part = part.bins if isinstance(part, Ranks) else part
    if isinstance(encoder, encoders.Standardize):
        moments = part or Moments()
        state: EncoderState = {"offset": moments.mean, "scale": moments.deviation or 1.0}
        rest = float(moments.exact_mean - Fraction(moments.mean)) if each.type == "double" else 0.0
        return {**state, "rest": rest} if rest else state
    if isinstance(encoder, encoders.MinMax):
        moments = part if part and part.count else Moments(least=0.0, greatest=0.0)
        return {"offset": moments.least, "scale": moments.greatest - moments.least or 1.0}
    columns: EncoderState = {}
    if isinstance(part, Doubles):
        columns = {"columns": part.columns} if part.columns > 1 else {}
        part = part.bins if encoder == encoders.Impute("median") else part.moments
    bins = part if isinstance(part, Bins) else Bins.empty(QUANTILE_BINS)
    if isinstance(encoder, encoders.Robust):
        low, interior, high = bins.quantiles((0.25, 0.5, 0.75))
        return {"offset": interior, "scale": high - low or 1.0}
    if isinstance(encoder, encoders.Bucketize):
        cuts = bins.quantiles([i / encoder.buckets for i in range(1, encoder.buckets)])
        return {"boundaries": sorted(set(cuts)) if len(bins.keys) else []}
    if isinstance(encoder, encoders.Impute):
        if isinstance(encoder.value, str):
            moments = part if isinstance(part, Moments) else Moments()
            value = bins.quantiles([0.5])[0] if encoder.value == "median" else moments.mean
            return {"value": value, **columns}
        return {"value": float(encoder.value), **columns}
    return {}


def _whole(encoder: encoders.Encoder | None, part: Moments | Ranks, least: int, greatest: int) -> EncoderState:
    """The state of an integer input with values beyond 2^24: an integer is subtracted before the conversion to a
    float."""
    if isinstance(encoder, encoders.Standardize) and isinstance(part, Moments):
        return _around(part.exact_mean, part.deviation)
    if isinstance(encoder, encoders.MinMax):
        return _around(Fraction(least), float(greatest - least))
    if isinstance(encoder, encoders.Robust) and isinstance(part, Ranks):
        low, interior, high = part.quantiles((0.25, 0.5, 0.75))
        return _around(interior, float(high - low))
    if isinstance(encoder, encoders.Bucketize) and isinstance(part, Ranks):
        # As many integers lie below a boundary as below the next integer.
        cuts = part.quantiles([i / encoder.buckets for i in range(1, encoder.buckets)])
        return {"boundaries": sorted({math.ceil(cut) for cut in cuts}), "whole": True}
    state: EncoderState = {"base": least, "columns": columns_needed(least, greatest)}
    if isinstance(encoder, encoders.Impute):
        if isinstance(part, Ranks):
            (value,) = part.quantiles([0.5])
        else:
            value = Fraction(encoder.value) if not isinstance(encoder.value, str) else part.exact_mean
        return {**state, "value": float(value - least)}
    return state


def _around(interior: Fraction, scale: float) -> EncoderState:
    base = round(interior)
    return {"base": base, "offset": float(interior - base), "scale": scale or 1.0}


def _target(encoder: encoders.Target, part: Vocabulary) -> EncoderState:
    prior = float(as_fraction(part.total) / part.rows) if part.rows else 0.0
    names = sorted(part.counts)
    means = [
        (float(as_fraction(part.sums[name])) + encoder.smoothing * prior) / (part.counts[name] + encoder.smoothing)
        for name in names
    ]
    return {"categories": names, "means": means, "prior": prior}
