"""Ids are the same everywhere and for ever, and differ where rows differ."""

import subprocess
import sys
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from transforms.records.row_hashing import combine_hashes, hash_column, hash_text, mix_bits, prediction_ids, row_ids

ROOT = Path(__file__).parents[2]
WORD = 2**64


def slow_mix(value: int) -> int:
    """splitmix64 in plain integers."""
    z = (value + 0x9E3779B97F4A7C15) % WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def slow_text(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


@given(values=st.lists(st.integers(0, WORD - 1), min_size=1, max_size=20))
def test_the_mixer_is_splitmix64(values: list[int]) -> None:
    assert mix_bits(np.array(values, np.uint64)).tolist() == [slow_mix(value) for value in values]


def test_the_mixer_gives_the_published_values() -> None:
    # The first outputs of splitmix64 seeded with 0 (its state is the seed plus the golden ratio's multiples).
    states = np.array([0, 0x9E3779B97F4A7C15, 0x3C6EF372FE94F82A], np.uint64)
    assert mix_bits(states).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@given(texts=st.lists(st.text(max_size=300), min_size=1, max_size=20))
def test_strings_are_hashed_by_xxh3(texts: list[str]) -> None:
    assert hash_column(pl.Series(texts, dtype=pl.String)).tolist() == [slow_text(text) for text in texts]


@given(texts=st.lists(st.none() | st.text(max_size=12), min_size=1, max_size=5))
def test_long_columns_are_hashed_as_short_ones(texts: list[str | None]) -> None:
    times = (1 << 15) // len(texts) + 1
    short = hash_column(pl.Series(texts, dtype=pl.String))
    assert hash_column(pl.Series(texts * times, dtype=pl.String)).tolist() == short.tolist() * times


def test_a_slice_is_hashed_as_its_own_values() -> None:
    whole = pl.Series(["a", "bb", None, "ccc", "é", ""])
    assert hash_column(whole[2:5]).tolist() == hash_column(pl.Series([None, "ccc", "é"])).tolist()
    assert hash_column(pl.Series([1, 2, 3])[1:]).tolist() == hash_column(pl.Series([2, 3])).tolist()


@pytest.mark.parametrize(
    "column",
    [
        pl.Series([], dtype=pl.String),
        pl.Series([], dtype=pl.Int64),
        pl.Series([], dtype=pl.Boolean),
        pl.Series([], dtype=pl.Float32),
    ],
)
def test_no_rows_have_no_ids(column: pl.Series) -> None:
    assert len(hash_column(column)) == 0
    assert len(row_ids("v", [column, column])) == 0


def test_a_number_is_the_same_in_every_width() -> None:
    widths = [
        hash_column(pl.Series([-5, 7], dtype=dtype)).tolist() for dtype in (pl.Int8, pl.Int16, pl.Int32, pl.Int64)
    ]
    assert widths == [widths[0]] * 4
    floats = [hash_column(pl.Series([-0.5, 7.0], dtype=dtype)).tolist() for dtype in (pl.Float32, pl.Float64)]
    assert floats[0] == floats[1]


def test_the_two_zeros_are_one_and_so_are_all_nans() -> None:
    assert len(set(hash_column(pl.Series([0.0, -0.0])).tolist())) == 1
    nans = np.array([0x7FF8000000000000, 0xFFF8000000000001], np.uint64).view(np.float64)
    assert len(set(hash_column(pl.Series(nans)).tolist())) == 1


@pytest.mark.parametrize(
    "values",
    [
        [None, 0, 1, -1],
        [None, "", "0", "null"],
        [None, True, False],
        [None, date(1970, 1, 1), date(1970, 1, 2)],
        [None, datetime(1970, 1, 1, tzinfo=UTC)],
        [None, 0.0, 1.0],
    ],
)
def test_null_is_like_no_value(values: list[Any]) -> None:
    assert len(set(hash_column(pl.Series(values)).tolist())) == len(values)


def test_the_order_of_parts_matters_and_parts_do_not_run_together() -> None:
    def one(*parts: str) -> int:
        return int(row_ids("v", [pl.Series([part]) for part in parts])[0])

    assert one("a", "b") != one("b", "a")
    assert len({one("a", "bc"), one("ab", "c"), one("abc", ""), one("", "abc")}) == 4


def test_a_row_has_another_id_in_another_view() -> None:
    rows = [pl.Series([1, 2]), pl.Series(["a", "b"])]
    assert not set(row_ids("v", rows)) & set(row_ids("w", rows))
    assert row_ids("v", rows).dtype == pl.Int64


def test_a_million_rows_have_a_million_ids() -> None:
    rows = 1_000_000
    ids = row_ids("v", [pl.Series(np.arange(rows)), pl.Series(np.full(rows, 1_577_836_800_000_000))])
    assert ids.n_unique() == rows
    # Each bit is set in about half of them.
    bits = np.unpackbits(ids.to_numpy().view(np.uint8)).reshape(rows, 64).mean(0)
    assert abs(bits - 0.5).max() < 0.005


def test_a_prediction_adds_model_and_arm() -> None:
    row_id, arm = pl.Series([5, 5]), pl.Series(["a", "b"])
    ids = [*prediction_ids("m", arm, row_id), *prediction_ids("n", arm, row_id)]
    assert len(set(ids)) == 4


def test_ids_never_change() -> None:
    """Pinned: tables hold them."""
    rows = [pl.Series([1, None]), pl.Series(["JFK", "é"]), pl.Series([datetime(2013, 1, 1, tzinfo=UTC), None])]
    expected = [combine_hashes([hash_text("v")])]
    for a, b, c in ((1, "JFK", 1_356_998_400_000_000), (None, "é", None)):
        parts = [
            slow_text("v"),
            *(
                0x6E756C6C6E756C6C if part is None else slow_text(part) if isinstance(part, str) else slow_mix(part)
                for part in (a, b, c)
            ),
        ]
        state = 0
        for part in parts:
            state = slow_mix((state * 31 + part) % WORD)
        expected.append(np.array([state], np.uint64))
    assert row_ids("v", rows).to_list() == [int(each.view(np.int64)[0]) for each in expected[1:]]
    assert row_ids("departure_delay", [pl.Series([42])]).to_list() == [PINNED]


PINNED = 1333383494967372881


def test_ids_are_the_same_in_every_process() -> None:
    program = (
        "import polars as pl; from transforms.records.row_hashing import row_ids; "
        "print(row_ids('v', [pl.Series(['a', 'b'])]).to_list())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("0", "7")
    }
    assert found == {f"{row_ids('v', [pl.Series(['a', 'b'])]).to_list()}\n"}
