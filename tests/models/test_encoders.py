"""Every encoder against scikit-learn or a few lines of Python; nothing depends on how rows are cut or merged."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from datetime import UTC, date, datetime
from typing import Any

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import xxhash
from apache_beam.testing import test_pipeline
from apache_beam.testing.util import assert_that, equal_to
from hypothesis import given
from hypothesis import strategies as st
from sklearn import preprocessing
from sklearn.impute import SimpleImputer

from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, encoders
from schemas.errors import MismatchError
from schemas.splits import LABEL
from transforms.models.encoders import Encoding, Fitted
from transforms.training.fit_encoders import FitEncoders, Fitting, declared_inputs, fit

ALL = {
    "ordinal": encoders.Ordinal(max_size=2),
    "rare": encoders.Ordinal(min_count=2),
    "onehot": encoders.OneHot(),
    "native": encoders.Native(),
    "hashed": encoders.Hashing(7),
    "target": encoders.Target(2.0),
    "standard": encoders.Standardize(),
    "minmax": encoders.MinMax(),
    "robust": encoders.Robust(),
    "bucket": encoders.Bucketize(4),
    "log": encoders.Log(),
    "mean": encoders.Impute("mean"),
    "median": encoders.Impute("median"),
    "seven": encoders.Impute(7),
    "plain": None,
    "whole": None,
    "flag": None,
}
TEXTS = {name for name, each in ALL.items() if isinstance(each, encoders.CATEGORICAL)}


def kind(name: str) -> pa.DataType:
    return pa.string() if name in TEXTS else {"whole": pa.int64(), "flag": pa.bool_()}.get(name, pa.float32())


ENCODINGS = tuple(Encoding(name, str(kind(name)), each) for name, each in ALL.items())
SCHEMA = pa.schema([*((name, kind(name)) for name in ALL), (LABEL, pa.float32())])

words = st.sampled_from([None, "", "a", "b", "c", "é[1]", "a" * 40])
numbers = st.one_of(st.none(), st.floats(width=32), st.sampled_from([0.0, -0.0, 1.5, 3e38, -1.0]))
cell = {"whole": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)), "flag": st.sampled_from([None, True, False])}
row = st.fixed_dictionaries(
    {
        **{name: words if name in TEXTS else cell.get(name, numbers) for name in ALL},
        LABEL: st.sampled_from([0.0, 1.0, 0.1, 2.5]),
    }
)


def batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([each[n] for each in rows], SCHEMA.field(n).type) for n in SCHEMA.names], schema=SCHEMA
    )


def cuts(whole: pa.RecordBatch, positions: list[int]) -> list[pa.RecordBatch]:
    bounds = sorted({0, whole.num_rows, *(min(position, whole.num_rows) for position in positions)})
    return [whole.slice(low, high - low) for low, high in itertools.pairwise(bounds)]


@given(st.lists(row, max_size=25), st.lists(st.integers(0, 25), max_size=3), st.randoms())
def test_fitting_does_not_depend_on_cuts_or_order(rows: list[Any], positions: list[int], random: Any) -> None:
    whole = batch(rows)
    fitting = Fitting(ENCODINGS)
    parts = [fitting.of(part) for part in cuts(whole, positions)]
    random.shuffle(parts)
    several = fitting.merge_accumulators(
        [fitting.merge_accumulators(parts[:1]), fitting.create_accumulator(), *parts[1:]]
    )
    assert fitting.extract_output(several).to_json() == fitting.extract_output(fitting.of(whole)).to_json()


@given(st.lists(row, max_size=25), st.lists(row, min_size=1, max_size=25), st.lists(st.integers(0, 25), max_size=3))
def test_applying_does_not_depend_on_cuts(known: list[Any], rows: list[Any], positions: list[int]) -> None:
    fitting = Fitting(ENCODINGS)
    fitted = fitting.extract_output(fitting.of(batch(known)))
    whole = fitted.apply(batch(rows))
    again = Fitted.from_json(fitted.to_json())
    assert again == fitted
    parts = np.concatenate([again.apply(part) for part in cuts(batch(rows), positions)])
    assert whole.dtype == np.float32
    assert whole.flags.c_contiguous
    assert whole.shape == (len(rows), len(fitted.names))
    assert len(set(fitted.names)) == len(fitted.names) == len(fitted.types)
    assert whole.tobytes() == parts.tobytes() or np.array_equal(whole, parts, equal_nan=True)
    assert not np.isinf(whole).any()


def fitted_on(encoder: encoders.Encoder | None, values: pa.Array, labels: list[float] | None = None) -> Fitted:
    columns = {"x": values} | ({LABEL: pa.array(labels, pa.float32())} if labels is not None else {})
    fitting = Fitting((Encoding("x", str(values.type), encoder),))
    return fitting.extract_output(fitting.of(pa.RecordBatch.from_pydict(columns)))


def applied(fitted: Fitted, values: pa.Array) -> np.ndarray[Any, Any]:
    return fitted.apply(pa.RecordBatch.from_arrays([values], ["x"]))


def sample(n: int = 500) -> np.ndarray[Any, Any]:
    random = np.random.default_rng(3)
    return np.where(random.random(n) < 0.1, np.nan, random.lognormal(size=n) * 10).astype(np.float32)


@pytest.mark.parametrize(
    ("encoder", "theirs"),
    [
        (encoders.Standardize(), preprocessing.StandardScaler()),
        (encoders.MinMax(), preprocessing.MinMaxScaler()),
        (encoders.Robust(), preprocessing.RobustScaler()),
        (encoders.Impute("mean"), SimpleImputer(strategy="mean")),
        (encoders.Impute("median"), SimpleImputer(strategy="median")),
        (encoders.Impute(7), SimpleImputer(strategy="constant", fill_value=7)),
        (encoders.Log(), preprocessing.FunctionTransformer(np.log1p)),
    ],
)
def test_numbers_come_out_as_in_scikit_learn(encoder: encoders.Encoder, theirs: Any) -> None:
    values = sample()
    found = applied(fitted_on(encoder, pa.array(values, from_pandas=True)), pa.array(values, from_pandas=True))
    expected = theirs.fit_transform(values.astype(np.float64)[:, None])
    np.testing.assert_allclose(found, expected, rtol=3e-7, atol=1e-7, equal_nan=True)


def test_buckets_hold_equal_shares() -> None:
    values = sample()
    known = values[~np.isnan(values)].astype(np.float64)
    found = applied(
        fitted_on(encoders.Bucketize(5), pa.array(values, from_pandas=True)), pa.array(known.astype(np.float32))
    )
    theirs = preprocessing.KBinsDiscretizer(5, encode="ordinal", quantile_method="linear").fit(known[:, None])
    assert found[:, 0].tolist() == theirs.transform(known[:, None])[:, 0].tolist()


def test_target_means_are_smoothed_as_in_scikit_learn() -> None:
    random = np.random.default_rng(4)
    words, labels = (
        random.choice(["a", "b", "c", "d"], 300, p=[0.7, 0.2, 0.09, 0.01]),
        random.integers(0, 2, 300).astype(float),
    )
    found = applied(fitted_on(encoders.Target(20), pa.array(words), labels.tolist()), pa.array([*"abcdz", None]))
    theirs = preprocessing.TargetEncoder(smooth=20.0, target_type="continuous").fit(words[:, None], labels)
    np.testing.assert_allclose(found[:5, 0], theirs.transform(np.array([*"abcdz"])[:, None])[:, 0], rtol=1e-6)
    assert math.isnan(found[5, 0])


@given(st.lists(words, max_size=30), st.lists(words, min_size=1, max_size=10), st.integers(1, 3), st.integers(1, 3))
def test_ranks_are_by_falling_count(known: list[str | None], asked: list[str | None], size: int, least: int) -> None:
    counts = Counter(each for each in known if each is not None)
    ranked = sorted((each for each in counts if counts[each] >= least), key=lambda each: (-counts[each], each))[:size]
    expected = [math.nan if each is None else ranked.index(each) if each in ranked else len(ranked) for each in asked]
    values, asked_values = pa.array(known, pa.string()), pa.array(asked, pa.string())
    for encoder in (encoders.Ordinal(size, least), encoders.Native(size, least)):
        found = applied(fitted_on(encoder, values), asked_values)[:, 0].tolist()
        assert np.array_equal(found, expected, equal_nan=True)
    ones = applied(fitted_on(encoders.OneHot(size, least), values), asked_values)
    assert ones.tolist() == [[float(code == i) for i in range(len(ranked) + 1)] for code in expected]


def test_hashing_is_the_same_everywhere() -> None:
    found = applied(fitted_on(encoders.Hashing(1000), pa.array(["x"])), pa.array(["JFK", "", None, "JFK", "é"]))[:, 0]
    assert found[0] == found[3]
    assert math.isnan(found[2])
    assert [found[i] for i in (0, 1, 4)] == [hashed(text) % 1000 for text in ("JFK", "", "é")]
    words = pa.array([f"N{i}" for i in range(20_000)])
    counts = np.bincount(applied(fitted_on(encoders.Hashing(16), words), words)[:, 0].astype(int), minlength=16)
    assert counts.min() > 1100


def hashed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@pytest.mark.parametrize(
    ("values", "kind", "text"),
    [
        ([3, 3, -1], pa.int64(), ["3", "-1"]),
        ([True, True, False], pa.bool_(), ["true", "false"]),
        ([date(2024, 1, 2)] * 2 + [date(1969, 12, 31)], pa.date32(), ["2024-01-02", "1969-12-31"]),
        ([datetime(1970, 1, 1, 0, 0, 1, tzinfo=UTC)] * 2, pa.timestamp("us", "UTC"), ["1000000"]),
        ([0.5, -0.0, 0.0, math.nan], pa.float32(), ["0", "0.5"]),
    ],
)
def test_categories_of_any_type(values: list[Any], kind: pa.DataType, text: list[str]) -> None:
    column = pa.array(values, kind)
    fitted = fitted_on(encoders.Ordinal(), column)
    assert fitted.encodings[0].state["categories"] == text
    found = applied(fitted, column)[:, 0]
    codes = [
        list(dict.fromkeys(found[~np.isnan(found)].tolist())).index(code) for code in found if not math.isnan(code)
    ]
    assert codes[0] == 0
    assert len(set(codes)) == len(text)


def test_what_float32_cannot_hold_is_missing() -> None:
    values = pa.array([1e39, -math.inf, 2.0, None], pa.float64())
    assert np.array_equal(
        applied(fitted_on(None, values), values)[:, 0], [math.nan, math.nan, 2, math.nan], equal_nan=True
    )


def test_a_constant_or_unknown_column_is_encoded_without_a_warning() -> None:
    for values in ([5.0, 5.0], [None, None]):
        column = pa.array(values, pa.float32())
        for encoder in (encoders.Standardize(), encoders.MinMax(), encoders.Robust(), encoders.Bucketize()):
            assert not (applied(fitted_on(encoder, column), column) > 1).any()


def test_strings_may_come_large_or_coded_but_no_other_type() -> None:
    fitted = fitted_on(encoders.Ordinal(), pa.array(["a", "b", "a"]))
    for column in (pa.array(["b"], pa.large_string()), pa.array(["b"]).dictionary_encode()):
        assert applied(fitted, column).tolist() == [[1.0]]
    with pytest.raises(MismatchError, match=r"'x' has the type it was trained with, string\. Got int64"):
        applied(fitted, pa.array([1]))
    with pytest.raises(MismatchError, match="Did you mean 'xy'"):
        fitted.apply(pa.RecordBatch.from_pydict({"xy": ["a"]}))
    with pytest.raises(MismatchError, match="format 1 or 2"):
        Fitted.from_json('{"format": 3}')


def test_names_are_ones_that_xgboost_takes() -> None:
    import xgboost

    fitted = fitted_on(encoders.OneHot(), pa.array(["[a]", "(a)", "<", "*"]))
    matrix = applied(fitted, pa.array(["<"]))
    assert xgboost.DMatrix(matrix, feature_names=fitted.names, feature_types=fitted.types).num_col() == 5


def view_and_model() -> Model:
    spine = Source("spine", time="t", columns={"k": pl.Int64, "word": pl.String, "x": pl.Float32})
    view = FeatureView("v", spine=spine, key="k", features=[Derived(double=pl.col("x") * 2)])
    label = Label(
        Source("events", time="at", columns={"k": pl.Int64, "y": pl.Int64}), on="k", value=pl.col("y"), within="1d"
    )
    return Model(
        view, label, TimeSplit("1d", "1d"), encode={"word": encoders.Ordinal(), "double": encoders.Standardize()}
    )


def test_a_beam_pipeline_fits_what_one_call_fits() -> None:
    model = view_and_model()
    rows = pl.DataFrame({"double": np.arange(20, dtype=np.float32), "word": ["a", "b", "b", "c"] * 5}).to_arrow()
    rows = rows.cast(pa.schema([("double", pa.float32()), ("word", pa.string())])).combine_chunks().to_batches()[0]
    fitted = fit(model, [rows.slice(0, 3), rows.slice(3)])
    assert fitted.inputs == {"double": "float", "word": "string"}
    with test_pipeline.TestPipeline() as pipeline:
        found = (
            pipeline
            | beam.Create([rows.slice(0, 7), rows.slice(7)])
            | FitEncoders(declared_inputs(model))
            | beam.Map(Fitted.to_json)
        )
        assert_that(found, equal_to([fitted.to_json()]))
