"""Which row groups a verification reads."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms.records.times import ALWAYS
from transforms.sources.inventory import Slice
from transforms.verification.plain_sources import EVER, Wanted, overlapping

EDGES = st.sampled_from((ALWAYS, 0, 2**62)) | st.integers(-5, 25)
WANTED = st.builds(
    lambda moments, length: Wanted(("k",), pl.DataFrame({"k": moments}), np.array(moments, np.int64), length),
    st.lists(st.integers(0, 20), max_size=4),
    st.none() | st.integers(1, 8),
)


@given(spans=st.lists(st.tuples(EDGES, EDGES).map(sorted), max_size=5), wanted=st.lists(WANTED, max_size=3))
def test_a_row_group_overlaps_if_a_row_between_its_bounds_may_be_seen(
    spans: list[tuple[int, int]], wanted: list[Wanted]
) -> None:
    """A row that is known at `low` may be placed anywhere up to `high`; the first moment after it decides."""

    def may_be_seen(low: int, high: int, one: Wanted) -> bool:
        later = [int(moment) for moment in one.moments if moment > low]
        return bool(later) and (one.length is None or min(later) - high <= one.length)

    slices = [Slice(f"{i}.parquet", 0, 0, 1, low, high) for i, (low, high) in enumerate(spans)]
    expected = [any(may_be_seen(low, high, one) for one in wanted) for low, high in spans]
    assert overlapping(slices, wanted).tolist() == expected
    assert overlapping(slices, None).all()


@pytest.mark.parametrize("low", [ALWAYS, 0, EVER])
def test_bounds_that_a_footer_does_not_give_do_not_overflow(low: int) -> None:
    moments = np.array([1_700_000_000_000_000])
    one = Wanted(("k",), pl.DataFrame({"k": [1]}), moments, 1)
    assert overlapping([Slice("a", 0, 0, 1, low, 2**62)], [one]).tolist() == [low < moments[0]]
