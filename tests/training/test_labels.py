"""Labels against a scan of every event, and the rules of entering a split."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from schemas import Label, Source, TimeSplit
from schemas.errors import DataError
from schemas.splits import SPLITS
from transforms.training import labels

START = datetime(2024, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("us", "UTC")


def source(order: str | None = None) -> Source:
    columns = {"key": pl.Int32, "side": pl.String, "value": pl.Float64, "rank": pl.Int64}
    return Source("events", columns=columns, time="known", order=order)


def oracle(rows: pl.DataFrame, events: pl.DataFrame, label: Label, within: timedelta) -> list[tuple[Any, Any]]:
    """(label, time) of each row by scanning every event."""
    order = [*(label.source.order or ()), *events.columns]
    values = events.with_columns(label.value.cast(pl.Float64).alias("__value")).to_dicts()
    result = []
    for row in rows.to_dicts():
        matching = [
            event
            for event in values
            if all(row[mine] is not None and row[mine] == event[its] for mine, its in label.keys)
            and row["asked"] <= event["known"] < row["asked"] + within
        ]
        matching.sort(
            key=lambda event: [
                event["known"],
                *(
                    (event[name] is not None, event[name] or 0)
                    if name != "side"
                    else (event[name] is not None, event[name] or "")
                    for name in order
                ),
            ]
        )
        value = matching[0]["__value"] if matching else None
        if value is not None and abs(value) < float("inf"):
            result.append((value, matching[0]["known"]))
        else:
            result.append((None if label.absent == "drop" else float(label.absent), row["asked"] + within))
    return result


moments = st.integers(0, 12).map(lambda hours: START + timedelta(hours=hours))
keys = st.one_of(st.none(), st.integers(0, 2))
sides = st.sampled_from([None, "a", "b"])
event = st.fixed_dictionaries(
    {
        "key": keys,
        "side": sides,
        "known": moments,
        "value": st.sampled_from([None, 0.0, 1.0, 2.5, float("nan"), float("inf")]),
        "rank": st.one_of(st.none(), st.integers(0, 2)),
    }
)
spine_row = st.fixed_dictionaries({"key": keys, "other": sides, "asked": moments})
EVENTS = {"key": pl.Int32, "side": pl.String, "known": TIME, "value": pl.Float64, "rank": pl.Int64}
ROWS = {"key": pl.Int64, "other": pl.String, "asked": TIME}


@given(
    st.lists(spine_row, max_size=8),
    st.lists(event, max_size=12),
    st.sampled_from(["drop", 0, 7.5]),
    st.sampled_from([None, "rank"]),
    st.booleans(),
)
def test_the_first_known_row_labels(
    rows: list[Any], events: list[Any], absent: Any, order: str | None, two: bool
) -> None:
    on = {"key": "key", "other": "side"} if two else "key"
    label = Label(source(order), on=on, value=pl.col("value"), within="3h", absent=absent)
    spine_rows, known = (
        pl.DataFrame(rows, ROWS, orient="row"),
        pl.DataFrame(events, EVENTS, orient="row").fill_nan(None),
    )
    found = labels.attach(spine_rows, known, label, "asked")
    assert_frame_equal(found.select(spine_rows.columns), spine_rows, check_exact=True)
    got = list(zip(found["__label"].to_list(), found["__label_time"].to_list()))
    assert got == oracle(spine_rows, known, label, timedelta(hours=3))


def test_an_event_at_the_spine_row_counts_and_one_at_the_horizon_does_not() -> None:
    label = Label(source(), on="key", value=pl.col("value") > 1, within="1h")
    spine_rows = pl.DataFrame({"key": [1, 2], "asked": [START, START]}, {"key": pl.Int64, "asked": TIME})
    known = pl.DataFrame(
        {
            "key": [1, 2],
            "side": ["", ""],
            "known": [START, START + timedelta(hours=1)],
            "value": [2.0, 2.0],
            "rank": [0, 0],
        },
        EVENTS,
    )
    assert labels.attach(spine_rows, known, label, "asked")["__label"].to_list() == [1.0, None]


def test_no_label_enters_before_its_horizon_has_passed() -> None:
    label = Label(source(), on="key", value=pl.col("value"), within="1d")
    split = TimeSplit(validate="4d", test="4d", embargo="1d").resolve(START + timedelta(days=20))
    times = [START + timedelta(days=d / 2) for d in range(42)]
    spine_rows = pl.DataFrame({"key": list(range(len(times))), "asked": times}, {"key": pl.Int64, "asked": TIME})
    # Every label but that of row 2 comes a second after its spine row: quick ones wait like slow ones.
    known = (
        pl.DataFrame(
            {
                "key": spine_rows["key"].cast(pl.Int32),
                "known": spine_rows["asked"].dt.offset_by("1s"),
                "value": [1.0] * len(times),
            }
        )
        .with_columns(side=pl.lit(""), rank=pl.lit(0, pl.Int64))
        .select(list(EVENTS))
        .filter(pl.col("key") != 2)
    )
    parts, counts = labels.examples(labels.attach(spine_rows, known, label, "asked"), label, split, "asked")
    for name, (start, end) in split.bounds.items():
        inside = [t for t in times if (start is None or t >= start) and t < end]
        ripe = [t for t in inside if t + timedelta(days=1) <= end]
        missing = 1 if name == "train" else 0
        assert counts[name] == labels.LabelCounts(
            len(inside), len(inside) - len(ripe), missing, missing, len(ripe) - missing
        )
        assert parts[name]["asked"].to_list() == [t for t in ripe if t != times[2]]
    assert counts["train"].waiting == 1
    joined = [t for part in parts.values() for t in part["asked"].to_list()]
    assert len(joined) == len(set(joined))


def test_an_absent_label_may_have_a_value() -> None:
    label = Label(source(), on="key", value=pl.col("value"), within="1h", absent=0)
    split = TimeSplit(validate="1d", test="1d").resolve(START + timedelta(days=4))
    spine_rows = pl.DataFrame({"key": [1], "asked": [START]}, {"key": pl.Int64, "asked": TIME})
    parts, counts = labels.examples(
        labels.attach(spine_rows, pl.DataFrame(schema=EVENTS), label, "asked"), label, split, "asked"
    )
    assert counts["train"] == labels.LabelCounts(1, 0, 1, 0, 1)
    assert parts["train"]["__label"].to_list() == [0.0]


@pytest.mark.parametrize(
    ("objective", "counts", "seen", "words"),
    [
        ("binary:logistic", {}, {}, "The train split has rows"),
        ("binary:logistic", {"train": labels.LabelCounts(9, 9)}, {}, "9 wait for their label's horizon"),
        ("binary:logistic", None, {"train": {0.0: 5}}, "5 of class 0 only"),
        ("binary:logistic", None, {"train": {0.0: 1, 3.0: 4}}, "is 0 or 1. Got 3"),
        ("multi:softprob", None, {"train": {0.5: 1, 3.0: 4}}, "numbered from 0"),
        ("multi:softprob", None, {"test": {0.0: 1, 2013.0: 4}}, "at most 1000 of them. Got class 2013"),
    ],
)
def test_what_cannot_be_learnt_is_refused(objective: str, counts: Any, seen: Any, words: str) -> None:
    if counts is None:
        counts = {name: labels.LabelCounts(5, 0, 0, 0, 5) for name in SPLITS}
        seen = {name: {0.0: 1, 1.0: 4} for name in SPLITS} | seen
    with pytest.raises(DataError, match=words):
        labels.check_splits(objective, counts, seen)
