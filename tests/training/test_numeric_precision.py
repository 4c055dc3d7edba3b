"""What a model is fed keeps its digits, and every fitted figure is that of exact arithmetic, however rows are cut and
merged."""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines import features, training
from schemas import encoders
from schemas.splits import LABEL
from transforms.models.encoders import Encoding, Fitted, columns_needed
from transforms.models.mlflow_pyfunc import PyfuncModel
from transforms.models.registry import Registry, registry_uri
from transforms.models.scoring import PinnedModel, open_scorer, score
from transforms.records.exact_sums import UNIT, Moments, exact_squares, integer_sums, root
from transforms.training.data_checks import Level, Suspect
from transforms.training.fit_encoders import Fitting
from transforms.validation.numeric_sketch import NumericSketch

LOW, HIGH = -(2**63), 2**63 - 1
# Close together far from 0, few far apart, and everything between.
clusters = st.tuples(
    st.integers(LOW + 2**20, HIGH - 2**20), st.lists(st.integers(-60, 60), min_size=1, max_size=40)
).map(lambda found: [found[0] + each for each in found[1]])
whole = st.one_of(
    clusters,
    st.tuples(clusters, st.lists(st.sampled_from([-1, 0, 99999999, LOW, HIGH]), max_size=3)).map(
        lambda found: found[0] + found[1]
    ),
    st.lists(st.integers(LOW, HIGH), min_size=1, max_size=30),
    st.lists(st.integers(-(2**25), 2**25), min_size=1, max_size=30),
)
doubles = st.one_of(
    st.tuples(
        st.floats(-1e15, 1e15), st.floats(1e-6, 1e3), st.lists(st.integers(-50, 50), min_size=1, max_size=40)
    ).map(lambda found: [found[0] + found[1] * each for each in found[2]]),
    st.lists(st.floats(-1e30, 1e30), min_size=1, max_size=30),
    st.lists(st.sampled_from([1e-300, 1e-30, 1.0, 1e8, 1e8 + 1e-7, -1e30]), min_size=1, max_size=30),
)


def fit(encoder: encoders.Encoder | None, column: pa.Array, cuts: list[int], chance: Any) -> Fitted:
    """Fitted on the parts that `cuts` make of `column`, merged in a random tree."""
    fitting = Fitting((Encoding("x", str(column.type), encoder),))
    bounds = sorted({0, len(column), *(cut % (len(column) + 1) for cut in cuts)})
    parts = [
        fitting.of(pa.RecordBatch.from_arrays([column.slice(low, high - low)], ["x"]))
        for low, high in itertools.pairwise(bounds)
    ]
    while len(parts) > 1:
        chance.shuffle(parts)
        parts = [fitting.merge_accumulators([parts.pop(), parts.pop()]), *parts]
    return Fitted.from_json(fitting.extract_output(parts[0] if parts else {}).to_json())


def apply(fitted: Fitted, column: pa.Array) -> np.ndarray[Any, Any]:
    return fitted.apply(pa.RecordBatch.from_arrays([column], ["x"]))


def moments(values: list[Any]) -> tuple[Fraction, float]:
    exact = [Fraction(value) for value in values]
    mean = sum(exact) / len(exact)
    return mean, root(sum((value - mean) ** 2 for value in exact) / len(exact))


def quantile(values: list[Any], share: Fraction) -> Fraction:
    ordered = sorted(Fraction(value) for value in values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (position - low)


def scaled(values: list[Any], offset: Fraction, scale: float) -> list[float]:
    """(x − offset) / scale, in fractions until the last step."""
    return [float((Fraction(value) - offset) / Fraction(scale or 1.0)) for value in values]


def near(found: np.ndarray[Any, Any], expected: list[float]) -> None:
    """Equal to the rounding of a float32, and of the few doubles on the way."""
    np.testing.assert_allclose(found[:, 0], np.array(expected, np.float32), rtol=1.3e-7, atol=1e-12)


@given(
    whole,
    st.lists(st.integers(0, 50), max_size=3),
    st.randoms(),
    st.sampled_from([None, encoders.Impute(), encoders.Impute("mean"), encoders.Impute(7)]),
)
def test_integers_are_the_sum_of_their_columns(values: list[int], cuts: list[int], chance: Any, encoder: Any) -> None:
    column = pa.array([*values, None], pa.int64())
    fitted = fit(encoder, column, cuts, chance)
    matrix, state = apply(fitted, column), fitted.encodings[0].state
    assert matrix.shape[1] == len(fitted.names) == len(fitted.types) == state.get("columns", 1)
    base = state.get("base", 0)
    found = [base + sum(int(part) for part in row) for row in matrix[:-1].tolist()]
    assert found == values
    if encoder is None:
        assert np.isnan(matrix[-1]).all()
    else:
        number = {"median": quantile(values, Fraction(1, 2)), "mean": moments(values)[0], 7: Fraction(7)}[encoder.value]
        exact = Fraction(base) + sum(Fraction(part) for part in matrix[-1].tolist())
        assert abs(exact - number) <= max(abs(number - base), abs(number)) * Fraction(1, 2**24)
    if max(map(abs, values)) <= 2**24:
        assert json.loads(fitted.to_json())["format"] == 1
        assert state.keys() <= {"value"}


@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0]), min_size=1, max_size=6),
    st.lists(st.integers(0, 5), max_size=3),
    st.randoms(),
    st.sampled_from(
        [encoders.MinMax(), encoders.Standardize(), encoders.Robust(), encoders.Bucketize(3), encoders.Impute("median")]
    ),
    st.sampled_from([pa.float32(), pa.float64()]),
)
def test_the_sign_of_zero_does_not_depend_on_the_order_of_rows(
    values: list[float], cuts: list[int], chance: Any, encoder: Any, kind: pa.DataType
) -> None:
    expected = fit(encoder, pa.array(values, kind), [], chance).to_json()
    shuffled = chance.sample(values, len(values))
    assert fit(encoder, pa.array(shuffled, kind), cuts, chance).to_json() == expected


@given(st.integers(LOW, HIGH), st.integers(0, 2**64 - 1))
def test_enough_columns_are_made_for_any_range(least: int, span: int) -> None:
    greatest = min(least + span, HIGH)
    fitted = Fitted((Encoding("x", "int64", None, {"base": least, "columns": columns_needed(least, greatest)}),))
    values = sorted({least, greatest, min(least + 1, greatest), (least + greatest) // 2, max(greatest - 1, least)})
    rows = apply(fitted, pa.array(values, pa.int64())).tolist()
    assert [least + sum(int(part) for part in row) for row in rows] == values
    assert len({tuple(row) for row in rows}) == len(values)


@given(whole, st.lists(st.integers(0, 50), max_size=3), st.randoms())
def test_scaled_integers_are_those_of_exact_arithmetic(values: list[int], cuts: list[int], chance: Any) -> None:
    column = pa.array(values, pa.int64())
    mean, deviation = moments(values)
    found = fit(encoders.Standardize(), column, cuts, chance)
    assert found.encodings[0].state["scale"] == (deviation or 1.0)
    near(apply(found, column), scaled(values, mean, deviation))
    near(
        apply(fit(encoders.MinMax(), column, cuts, chance), column),
        scaled(values, Fraction(min(values)), float(max(values) - min(values))),
    )
    low, interior, high = (quantile(values, Fraction(part, 4)) for part in (1, 2, 3))
    near(apply(fit(encoders.Robust(), column, cuts, chance), column), scaled(values, interior, float(high - low)))
    bounds = sorted({quantile(values, Fraction(part, 4)) for part in (1, 2, 3)})
    buckets = apply(fit(encoders.Bucketize(4), column, cuts, chance), column)[:, 0]
    # Boundaries between two integers are one: what counts is that the buckets divide rows as the quantiles do.
    expected = [sum(bound <= value for bound in {math.ceil(each) for each in bounds}) for value in values]
    if max(map(abs, values)) > 2**24:
        assert buckets.tolist() == expected
    by_value = dict(zip(values, buckets.tolist()))
    assert all(
        (by_value[a] < by_value[b]) == any(a < bound <= b for bound in bounds)
        for a in by_value
        for b in by_value
        if a < b
    )


@given(doubles, st.lists(st.integers(0, 50), max_size=3), st.randoms())
def test_scaled_doubles_are_those_of_exact_arithmetic(values: list[float], cuts: list[int], chance: Any) -> None:
    column = pa.array(values, pa.float64())
    mean, deviation = moments(values)
    found = fit(encoders.Standardize(), column, cuts, chance)
    assert found.encodings[0].state["scale"] == (deviation or 1.0)
    expected = np.array(scaled(values, mean, deviation), np.float32)
    np.testing.assert_allclose(apply(found, column)[:, 0], expected, rtol=1.3e-7, atol=3e-16 * len(values))
    low, interior, high = (quantile(values, Fraction(part, 4)) for part in (1, 2, 3))
    robust = fit(encoders.Robust(), column, cuts, chance).encodings[0].state
    assert robust["offset"] == pytest.approx(float(interior), rel=1e-15, abs=1e-300)
    assert robust["scale"] == pytest.approx(float(high - low) or 1.0, rel=1e-9, abs=4e-16 * max(map(abs, values)))


@given(doubles, st.lists(st.integers(0, 50), max_size=3), st.randoms())
def test_doubles_that_are_imputed_stay_apart(values: list[float], cuts: list[int], chance: Any) -> None:
    column = pa.array([*values, None], pa.float64())
    fitted = fit(encoders.Impute("median"), column, cuts, chance)
    rows = apply(fitted, column)[:-1]
    # Below float32's own range nothing is promised.
    kept = [value if abs(value) > 1e-20 else 0.0 for value in values]
    assert len({tuple(row) for row in rows.tolist()}) >= len(set(kept))
    np.testing.assert_array_equal(rows[:, 0], np.array(values).astype(np.float32))


def test_the_figures_of_the_report() -> None:
    stamps = [1_700_000_000_000_000 + 1_000_000 * (i % 9) for i in range(90)]
    ids = [9_999_999_999_999_900 + i for i in range(50)]
    for values, right in ((stamps, 2_581_989), (ids, 14.43)):
        for column in (pa.array(values, pa.int64()), *([pa.array(values, pa.float64())] if values is stamps else [])):
            fitted = fit(encoders.Standardize(), column, [7], random.Random(1))
            assert fitted.encodings[0].state["scale"] == pytest.approx(right, rel=1e-3)
            found = apply(fitted, column)[:, 0].astype(float)
            assert (found.mean(), found.std()) == (pytest.approx(0, abs=1e-6), pytest.approx(1))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30))
def test_squares_are_exact(values: list[float]) -> None:
    squares = Fraction(exact_squares(np.array(values, np.float64)), 1 << 2 * UNIT)
    assert squares == sum(Fraction(value) ** 2 for value in values)


@given(st.lists(st.integers(LOW, HIGH), max_size=30))
def test_integers_are_summed_without_overflow(values: list[int]) -> None:
    assert integer_sums(np.array(values, np.int64)) == (sum(values), sum(value * value for value in values))
    found = Moments.of_integers(np.array(values, np.int64))
    if values:
        assert found.exact_mean == Fraction(sum(values), len(values))
        assert found.deviation == moments(values)[1]


@given(
    st.fractions(min_value=0)
    | st.tuples(st.integers(0, 2**300), st.integers(-900, 900)).map(
        lambda each: Fraction(each[0]) * Fraction(2) ** each[1]
    )
)
def test_a_root_is_the_nearest_double(value: Fraction) -> None:
    found = Fraction(root(value))
    below, above = (Fraction(math.nextafter(float(found), to)) for to in (0.0, math.inf))
    assert ((found + below) / 2) ** 2 <= value <= ((found + above) / 2) ** 2 or value == 0 == found


@given(
    st.one_of(
        whole.map(lambda values: pa.array([*values, None], pa.int64())),
        doubles.map(lambda values: pa.array([None, *values], pa.float64())),
    ),
    st.integers(0, 50),
)
def test_statistics_of_training_data_are_those_of_exact_arithmetic(column: pa.Array, cut: int) -> None:
    values = [each for each in column.to_pylist() if each is not None]
    mean, deviation = moments(values)
    for found in (
        NumericSketch.of(column),
        NumericSketch.of(column.slice(0, cut)) + NumericSketch.of(column.slice(cut)),
    ):
        assert (found.values, found.mean, found.deviation) == (len(values), float(mean), deviation)
        assert (found.least, found.greatest) == (float(min(values)), float(max(values)))


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(-3, 3)), min_size=2, max_size=30),
    st.floats(-1e7, 1e7, width=32),
    st.integers(0, 30),
)
def test_the_share_of_the_labels_variance_is_exact(rows: list[tuple[str, int]], far: float, cut: int) -> None:
    labels = np.array([np.float32(far) + np.float32(value) for _, value in rows], np.float32)
    words = pa.array([word for word, _ in rows])
    each = Encoding("x", "string", encoders.Ordinal())
    parts = [
        Suspect.of(each, words.slice(low, high - low), pl.Series("y", labels[low:high]))
        for low, high in ((0, cut), (cut, len(rows)))
        if labels[low:high].size
    ]
    found = parts[0] if len(parts) == 1 else parts[0] + parts[1]
    known: dict[str, list[Fraction]] = {}
    for (word, _), label in zip(rows, labels.tolist()):
        known.setdefault(word, []).append(Fraction(label))
    everything = [label for level in known.values() for label in level]
    mean = sum(everything) / len(everything)
    total = sum((label - mean) ** 2 for label in everything)
    between = sum(len(level) * (sum(level) / len(level) - mean) ** 2 for level in known.values())
    assert found.explained == (float(between / total) if total else 0.0)
    assert isinstance(next(iter((found.levels or {}).values())), Level)


def test_models_of_earlier_versions_score_as_before() -> None:
    """Their encoders have no base: an int64 becomes the nearest float32, also of two neighbours."""
    text = json.dumps(
        {
            "format": 1,
            "inputs": [
                {"input": "x", "type": "int64", "encoder": None, "state": {}},
                {
                    "input": "y",
                    "type": "int64",
                    "encoder": {"kind": "Standardize"},
                    "state": {"offset": 20240128.5, "scale": 0.5},
                },
                {
                    "input": "z",
                    "type": "int64",
                    "encoder": {"kind": "Impute", "value": "median"},
                    "state": {"value": 3.0},
                },
                {
                    "input": "b",
                    "type": "int64",
                    "encoder": {"kind": "Bucketize", "buckets": 3},
                    "state": {"boundaries": [1.5, 20240128.5]},
                },
            ],
        }
    )
    fitted = Fitted.from_json(text)
    assert fitted.names == ["x", "y", "z", "b"]
    column = pa.array([20240128, 20240129, None], pa.int64())
    found = fitted.apply(pa.RecordBatch.from_arrays([column] * 4, ["x", "y", "z", "b"]))
    nan = math.nan
    expected = [[20240128, -1, 20240128, 1], [20240128, 1, 20240128, 2], [nan, nan, 3, nan]]
    assert np.array_equal(found, np.array(expected, np.float32), equal_nan=True)
    assert json.loads(fitted.to_json()) == json.loads(text)


def test_what_lies_too_far_outside_the_training_split_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    fitted = fit(None, pa.array([20240128, 20240229], pa.int64()), [], None)
    assert fitted.names == ["x"]
    near_by = pa.array([20240128 - 2**24, 20240129 + 2**23, 20240130], pa.int64())
    assert len(set(apply(fitted, near_by)[:, 0].tolist())) == 3
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        apply(fitted, pa.array([10**15 + 1, 10**15, 20240128], pa.int64()))
        apply(fitted, pa.array([10**15 + 1], pa.int64()))
    (record,) = caplog.records
    assert "input 'x' has" in record.getMessage()


DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, encoders
ev = Source("ev", time="at",
            columns={{"id": pl.Int64, "day": pl.Int64, "far": pl.Int64, "stamp": pl.Float64, "y": pl.Int64}})
view = FeatureView("{view}", spine=ev, key="id", features=[Derived({features})])
model = Model(view, label=Label(ev, on="id", value=pl.col("y"), within="1h", absent=0),
              split=TimeSplit(validate="20d", test="20d"),
    encode={{{encode}}}, params={{"max_depth": 2}}, rounds=10, {more})
"""
START = datetime(2024, 1, 1, tzinfo=UTC)
PARITY = [(i * i // 3) % 2 for i in range(700)]
# Inputs each of which tells the labels, by one digit that float32 does not have.
TELLING = {
    "plain": ('day=pl.col("day")', ""),
    "imputed": ('day=pl.col("day")', '"day": encoders.Impute(), '),
    "scaled": ('day=pl.col("day")', '"day": encoders.Standardize(), '),
    "double": ("one=pl.lit(1)", '"stamp": encoders.Impute(), '),
}


def trained(root: Path, run_id: str, definition: str, rows: dict[str, list[Any]]) -> dict[str, Any]:
    folder = root / "store/sources/ev"
    if not folder.exists():
        folder.mkdir(parents=True)
        times = pl.Series("at", [START + timedelta(hours=3 * i) for i in range(700)], pl.Datetime("us", "UTC"))
        pl.DataFrame({"at": times, "id": range(700), **rows}).write_parquet(folder / "part.parquet")
    path = root / "definition.py"
    path.write_text(definition)
    words = ["--definition", str(path), "--store", str(root / "store")]
    assert features.main([*words, "--run_id", f"f-{run_id}"]) == 0
    assert training.main([*words, "--run_id", f"t-{run_id}", "--threads=1"]) == 0
    reported: dict[str, Any] = json.loads((root / f"store/runs/t-{run_id}/training.json").read_text())
    return reported


def test_a_model_learns_from_digits_that_float32_does_not_have_and_names_what_loses_them(tmp_path: Path) -> None:
    rows = {
        "day": [20240128 + each for each in PARITY],
        "far": [10**16 * (i % 3) + each for i, each in enumerate(PARITY)],
        "stamp": [1.7e9 + each for each in PARITY],
        "y": PARITY,
    }
    for name, (feature, encoder) in TELLING.items():
        text = DEFINITION.format(
            view=f"vw_{name}",
            features=f'{feature}, far=pl.col("far")',
            encode=f'{encoder}"far": encoders.MinMax()',
            more="",
        )
        reported = trained(tmp_path, name, text, rows)
        assert reported["metrics"]["auc"] == 1.0, name
        (warning,) = (each for each in reported["data"]["warnings"] if "2^24" in each)
        assert warning.startswith("Input 'far'")
        assert "MinMax()" in warning
    # Behind MLflow's function the same code encodes.
    scorer = open_scorer(PinnedModel(Registry(registry_uri(str(tmp_path / "store"))).resolve("vw_plain")[1]))
    rows_to_score = pl.DataFrame({"day": [20240128, 20240129, None], "far": [0, 1, None]})
    frame = rows_to_score.to_pandas().astype(object)
    (batch,) = rows_to_score.to_arrow().combine_chunks().to_batches()
    expected = score(scorer, batch)
    assert expected[0] < 0.5 < expected[1]
    assert PyfuncModel(scorer).predict(frame)["score"].to_numpy().tolist() == expected.tolist()
    assert LABEL not in rows_to_score.columns


def test_labels_that_float32_rounds_are_reported(tmp_path: Path) -> None:
    labels = [20240128 + i % 7 for i in range(700)]
    rows = {"day": [i % 7 for i in range(700)], "far": [0] * 700, "stamp": [0.0] * 700, "y": labels}
    text = DEFINITION.format(
        view="vw", features='day=pl.col("day")', encode="", more='objective="reg:squarederror", metric="rmse"'
    )
    reported = trained(tmp_path, "label", text, rows)
    (warning,) = (each for each in reported["data"]["warnings"] if each.startswith("The label is a whole number"))
    count = int(warning.split(" rounds, in ")[1].split()[0])
    entered = sum(each["entered"] for each in reported["splits"].values())
    assert count == pytest.approx(entered * 3 / 7, abs=10)
    assert sum(float(np.float32(label)) != label for label in labels[:7]) == 3
