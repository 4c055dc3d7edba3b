"""Statistics: equal to TFDV's where both are exact, within the stated error elsewhere; the same however rows are cut
and merged."""

import itertools
import random
import subprocess
import sys
from fractions import Fraction

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from apache_beam.testing.util import assert_that
from hypothesis import given
from hypothesis import strategies as st

from transforms.records.exact_sums import UNIT, as_fraction
from transforms.records.record_batches import frame
from transforms.validation import statistics
from transforms.validation.numeric_sketch import NumericSketch
from transforms.validation.statistics import (
    Describe,
    Statistics,
    StringSketch,
    columns_described,
    describe_batch,
    describe_nothing,
    statistics_proto,
)

ROWS = 20_000
SCHEMA = pa.schema([("x", pa.float32()), ("i", pa.int64()), ("b", pa.bool_()), ("s", pa.string())])


def example(rows: int = ROWS) -> pa.RecordBatch:
    """Columns that features have: smooth, skewed, mostly zero, constant, huge, missing, integers, booleans, strings."""
    rng = np.random.default_rng(7)
    missing = rng.random(rows) < 0.15
    strings = rng.choice(["AA", "Ünïted", "", "B6", "DL"], rows, p=[0.4, 0.3, 0.1, 0.1, 0.1])
    return pa.RecordBatch.from_pydict(
        {
            "smooth": pa.array(rng.normal(10, 40, rows).astype(np.float32), mask=missing),
            "skewed": pa.array(rng.exponential(3, rows) ** 3, pa.float32()),
            "outlier": pa.array(np.append(rng.exponential(10, rows - 1), 1e6), pa.float32()),
            "zeros": pa.array(np.where(rng.random(rows) < 0.7, 0, rng.integers(-3, 10, rows)), pa.float32()),
            "constant": pa.array(np.full(rows, 0.1), pa.float32()),
            "double": pa.array(rng.lognormal(0, 20, rows)),
            "missing": pa.nulls(rows, pa.float32()),
            "hour": pa.array(rng.integers(0, 24, rows)),
            "large": pa.array(rng.integers(-(2**52), 2**52, rows)),
            "narrow": pa.array(rng.integers(-5, 5, rows), pa.int32()),
            "flag": pa.array(rng.random(rows) < 0.3),
            "carrier": pa.array(strings, mask=missing),
            "tail": pa.array([f"N{i}" for i in rng.integers(0, 800, rows)]),  # past 1 000 TFDV sketches
            "nothing": pa.nulls(rows, pa.string()),
        }
    )


BATCH = example()
ALL = columns_described(BATCH.schema, BATCH.schema.names)


def features(statistics: object) -> dict[str, object]:
    (dataset,) = statistics.datasets  # type: ignore[attr-defined]
    return {feature.path.step[0]: feature for feature in dataset.features}


@pytest.fixture(scope="module")
def both() -> tuple[object, object]:
    import tensorflow_data_validation as tfdv

    data = BATCH.to_pandas()
    data["flag"] = data["flag"].astype("int64")  # TFDV would count true and false as categories
    for name in ("missing", "nothing"):
        data[name] = data[name].astype("float32" if name == "missing" else "object")
    return statistics_proto(describe_batch(BATCH, ALL)), tfdv.generate_statistics_from_dataframe(data)


@pytest.mark.parametrize("name", BATCH.schema.names)
def test_agrees_with_tfdv(both: tuple[object, object], name: str) -> None:
    ours, theirs = (features(each)[name] for each in both)
    assert both[0].datasets[0].num_examples == both[1].datasets[0].num_examples == ROWS
    assert ours.type == theirs.type
    if ours.HasField("string_stats"):
        assert ours == theirs  # every count, rank, label and length
        return
    mine, other = ours.num_stats, theirs.num_stats
    assert mine.common_stats == other.common_stats
    assert (mine.num_zeros, mine.min, mine.max) == (other.num_zeros, other.min, other.max)
    assert mine.mean == pytest.approx(other.mean, rel=1e-12, abs=1e-13 * max(abs(other.min), abs(other.max)))
    assert mine.std_dev == pytest.approx(other.std_dev, rel=1e-6 if name == "constant" else 1e-9, abs=1e-9)
    assert [each.type for each in mine.histograms] == [each.type for each in other.histograms]
    if not mine.histograms:
        return
    widths, quantiles = mine.histograms
    values = np.sort(BATCH.column(BATCH.schema.get_field_index(name)).cast("float64").drop_null().to_numpy())
    for a, b in zip(widths.buckets, other.histograms[0].buckets, strict=True):
        assert (a.low_value, a.high_value) == pytest.approx((b.low_value, b.high_value), rel=1e-12)
        assert a.sample_count == pytest.approx(b.sample_count, abs=0.01 * len(values) + 1)  # TFDV's error
        exact = (values <= a.high_value).sum() - ((values <= a.low_value).sum() if a.low_value > values[0] else 0)
        assert a.sample_count == pytest.approx(exact, abs=0.004 * len(values) + 1)  # ours: the cells on the bounds
    for at, (a, b) in enumerate(zip(quantiles.buckets, other.histograms[1].buckets, strict=True), 1):
        assert a.high_value == pytest.approx(values[-(-at * len(values) // 10) - 1], rel=2**-9)
        spread = abs(b.high_value) * 2**-9
        low, high = (
            np.searchsorted(values, b.high_value + shift, side)
            for shift, side in ((-spread, "left"), (spread, "right"))
        )
        assert low - 0.01 * len(values) - 1 <= at * len(values) / 10 <= high + 0.01 * len(values) + 1
    assert mine.median == pytest.approx(float(np.median(values)), rel=2**-9)


numbers = st.one_of(
    st.none(),
    st.floats(width=32, allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 0.1, 1e-40, -1e-45, 3.4e38, -3.4e38, 1.17e-38]),
    st.integers(-2000, 2000).map(float),
)
rows = st.lists(
    st.tuples(
        numbers,
        st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(-9, 9)),
        st.one_of(st.none(), st.booleans()),
        st.one_of(st.none(), st.text(max_size=3)),
    ),
    max_size=60,
)


def of_rows(values: list[tuple[object, ...]]) -> pa.RecordBatch:
    columns = list(zip(*values, strict=True)) or [()] * 4
    return pa.RecordBatch.from_arrays(
        [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA
    )


@given(rows, st.lists(st.integers(0, 60), max_size=6), st.randoms(use_true_random=False), st.sampled_from([3, 100]))
def test_result_does_not_depend_on_cuts_nor_on_the_order_of_merging(
    values: list[tuple[object, ...]], cuts: list[int], chance: random.Random, levels: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "LEVELS", levels)
        whole = describe_batch(of_rows(values), SCHEMA)
        bounds = [0, *sorted(min(cut, len(values)) for cut in cuts), len(values)]
        parts = [describe_batch(of_rows(values[a:b]), SCHEMA) for a, b in itertools.pairwise(bounds)]
        while len(parts) > 1:
            chance.shuffle(parts)
            parts = [parts.pop() + parts.pop(), *parts]
        assert parts[0] == whole
        assert statistics_proto(parts[0]).SerializeToString(deterministic=True) == statistics_proto(
            whole
        ).SerializeToString(deterministic=True)
        combine = Describe(SCHEMA)
        state = combine.merge_accumulators(
            [combine.add_input(combine.create_accumulator(), of_rows(values)), combine.create_accumulator()]
        )
        assert combine.extract_output(state) == whole


@given(st.lists(numbers, max_size=80))
def test_numbers_are_counted_and_summed_without_rounding(values: list[float | None]) -> None:
    column = pa.array(values, pa.float32())
    known = [float(value) for value in column.to_pylist() if value is not None and np.isfinite(value)]
    found = NumericSketch.of(column)
    assert (found.rows, found.missing, found.values) == (len(values), values.count(None), len(known))
    assert found.zeros == known.count(0.0)
    assert as_fraction(found.total) == sum(map(Fraction, known))
    assert Fraction(found.squares, 1 << 2 * UNIT) == sum(Fraction(value) ** 2 for value in known)
    if known:
        assert (found.least, found.greatest) == (min(known), max(known))
        exact = np.sort(known)
        np.testing.assert_allclose(found.ranked(np.arange(len(known))), exact, rtol=2**-9, atol=2.0**-135)


@given(st.lists(st.none() | st.integers(-3, 300) | st.integers(-(1 << 24), 1 << 24), max_size=60))
def test_integers_that_are_counted_by_value_give_what_the_same_floats_give(values: list[int | None]) -> None:
    """Whether they lie close together, which decides how they are counted, or not."""
    floats = NumericSketch.of(pa.array(values, pa.float32()))
    for kind in (pa.int32(), pa.int64()):
        assert NumericSketch.of(pa.array(values, kind)) == floats


def test_a_slice_counts_only_its_rows() -> None:
    column = pa.array([1.0, None, 2.0, None, 3.0], pa.float32()).slice(2, 2)
    found = NumericSketch.of(column)
    assert (found.rows, found.missing, found.mean) == (2, 1, 2.0)
    assert StringSketch.of(pa.array(["a", "bb", None, "bb"]).slice(1)).bytes == 4


def test_integers_up_to_1024_have_exact_quantiles() -> None:
    values = np.random.default_rng(1).integers(-1024, 1025, 999)
    np.testing.assert_array_equal(NumericSketch.of(pa.array(values)).ranked(np.arange(999)), np.sort(values))


def test_of_very_many_strings_the_same_sample_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "LEVELS", 4000)
    column = pa.array([f"id-{i}" for i in range(60_000)] * 2)
    found = StringSketch.of(column)
    assert found.partial
    assert len(found.levels) == 4000
    assert found.levels["count"].unique().to_list() == [2]  # whichever is kept is counted exactly
    assert found.unique == pytest.approx(60_000, rel=3 / 4000**0.5)
    assert StringSketch.of(column.slice(0, 50_000)) + StringSketch.of(column.slice(50_000)) == found


def test_statistics_of_a_pcollection_are_one_proto() -> None:
    parts = [BATCH.slice(start, 3_000) for start in range(0, ROWS, 3_000)]
    expected = statistics_proto(describe_batch(BATCH, ALL))

    def same(found: list[object]) -> None:
        assert found == [expected]

    with beam.Pipeline() as pipeline:
        assert_that(pipeline | beam.Create(parts) | Statistics(ALL), same)


def test_statistics_of_no_rows_name_every_column() -> None:
    def empty(found: list[object]) -> None:
        assert found == [statistics_proto(describe_nothing(ALL))]
        assert list(features(found[0])) == ALL.names

    with beam.Pipeline() as pipeline:
        assert_that(pipeline | beam.Create([], reshuffle=False) | Statistics(ALL), empty)


def test_only_numbers_booleans_and_strings_are_described() -> None:
    schema = pa.schema(
        [("a", pa.float32()), ("when", pa.timestamp("us", "UTC")), ("day", pa.date32()), ("s", pa.string())]
    )
    assert columns_described(schema, schema.names).names == ["a", "s"]


def test_strings_from_polars_count_like_those_from_arrow() -> None:
    column = BATCH.column(BATCH.schema.get_field_index("carrier"))
    again = pl.from_arrow(column).to_arrow()
    assert StringSketch.of(again) == StringSketch.of(column)
    assert frame(BATCH)["carrier"].drop_nulls().n_unique() == StringSketch.of(column).unique


def test_statistics_need_no_tensorflow() -> None:
    program = (
        "import sys, transforms.validation.statistics, transforms.validation.tfdv_schema as v; "
        "v.tfdv(); print('tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True)
    assert out.stdout.strip() == "False"
