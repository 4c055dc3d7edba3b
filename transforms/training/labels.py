"""Labels of spine rows, and the split that each labelled row enters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pyarrow as pa

from schemas import Label
from schemas.durations import microseconds
from schemas.errors import DataError
from schemas.sources import Source
from schemas.splits import LABEL, LABEL_TIME, SPLITS, GroupSplit, Split
from transforms.models.stored_records import SplitCounts
from transforms.records.row_hashing import row_ids

# XGBoost builds a tree per round, and a score per row, for every class up to the greatest.  A label that is not a class
# number would take all memory.
MOST_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class LabelCounts:
    """Counts of what became of the rows of one split: rows = waiting + dropped + entered.

    Args:
        rows: rows whose time is in the split.
        waiting: rows whose horizon ends after the split, with or without a label.
        absent: other rows that received no label within the horizon.
        dropped: the absent rows if `absent="drop"`, else 0.
        entered: examples of the split.
    """

    rows: int = 0
    waiting: int = 0
    absent: int = 0
    dropped: int = 0
    entered: int = 0

    def __add__(self, other: LabelCounts) -> LabelCounts:
        return LabelCounts(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other))))

    def as_json(self) -> SplitCounts:
        return {
            "rows": self.rows,
            "waiting": self.waiting,
            "absent": self.absent,
            "dropped": self.dropped,
            "entered": self.entered,
        }


def attach(rows: pl.DataFrame, events: pl.DataFrame, label: Label, time: str) -> pl.DataFrame:
    """Add `__label` (float64), `__label_time` and `__came`, whether a label was received, to `rows`.

    The label of a spine row at time *t* is `label.value` of the first of `events` with its key and
    `t ≤ time < t + within`; of several at the same time, it is the first by the source's `order`, or by all columns.
    If there is none, or if that value is null or not finite, `__label` is `label.absent`, null for `"drop"`, and
    `__label_time` is `t + within`.

    Args:
        rows: rows with the label's spine columns and `time`; their order is kept.
        events: clean rows of the label's source, in any order.
    """
    found = _first_event_of_each_row(rows, _values(events, label), label, time)
    horizon = pl.col("__at") + horizon_of(label)
    received = (pl.col("__known") < horizon) & pl.col("__value").is_not_null()
    absent = None if label.absent == "drop" else float(label.absent)
    return rows.with_columns(
        found.select(
            pl.when(received).then("__value").otherwise(pl.lit(absent, pl.Float64)).alias(LABEL),
            pl.when(received).then("__known").otherwise(horizon).alias(LABEL_TIME),
            received.fill_null(False).alias("__came"),
        )
    )


def _key_names(label: Label) -> list[str]:
    return [f"__key{i}" for i in range(len(label.keys))]


def _values(events: pl.DataFrame, label: Label) -> pl.DataFrame:
    """Key columns, `__known` and `__value` of the first event of each key and time, sorted by `__known`."""
    value = label.computed.cast(pl.Float64)
    return (
        _first_of_each_moment(events, [column for _, column in label.keys], label.source)
        .select(
            *(_key(events, column).alias(key) for key, (_, column) in zip(_key_names(label), label.keys)),
            pl.col(str(label.source.time)).alias("__known"),
            pl.when(value.cast(pl.Float32).is_finite()).then(value).alias("__value"),
        )
        .sort("__known")
    )


def _first_event_of_each_row(rows: pl.DataFrame, values: pl.DataFrame, label: Label, time: str) -> pl.DataFrame:
    """`__at`, `__known` and `__value` of each row, in the rows' order; the last two are null if no event follows."""
    keys = _key_names(label)
    spine = rows.select(
        *(_key(rows, column).alias(key) for key, (column, _) in zip(keys, label.keys)),
        pl.col(time).alias("__at"),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("__place"),
    )
    return (
        spine.sort("__at")
        .join_asof(
            values,
            left_on="__at",
            right_on="__known",
            by=keys,
            strategy="forward",
            coalesce=False,
            check_sortedness=False,
        )
        .sort("__place")
    )


def examples(
    labelled: pl.DataFrame, label: Label, split: Split, time: str
) -> tuple[dict[str, pl.DataFrame], dict[str, LabelCounts]]:
    """Divide labelled rows into the examples of each split, and count what became of its rows.

    A row enters a split if its time lies in it, its horizon ends by the split's end, and it has a label.
    """
    parts, counts = {}, {}
    part_of = None if split.groups is None else split_by_group(labelled, split.groups)
    for name, (start, end) in split.bounds.items():
        inside = pl.col(time) < end if start is None else (pl.col(time) >= start) & (pl.col(time) < end)
        part = labelled.filter(inside if part_of is None else inside & (part_of == name))
        ripe = part.filter(pl.col(time) + horizon_of(label) <= end)
        entered = ripe.filter(pl.col(LABEL).is_not_null())
        absent = int((~ripe["__came"]).sum())
        counts[name] = LabelCounts(len(part), len(part) - len(ripe), absent, len(ripe) - len(entered), len(entered))
        parts[name] = entered.drop("__came")
    return parts, counts


def split_by_group(rows: pl.DataFrame, split: GroupSplit) -> pl.Series:
    """The split of each row, by a hash of its group."""
    salt = f"GroupSplit {split.salt}"
    hashed = row_ids(salt, [rows[name] for name in split.by]).to_numpy().view(np.uint64)
    share = hashed / 2.0**64
    names = np.where(share < split.test, "test", np.where(share < split.test + split.validate, "validate", "train"))
    return pl.Series("part", names, pl.String)


def mature(label: Label, times: pa.Array, start: datetime | None, end: datetime) -> pa.Array:
    """Whether each of `times` lies in `[start, end)` and its label's horizon ends by `end`."""
    stamps = pl.Series("time", pl.from_arrow(times))
    done = stamps + timedelta(microseconds=microseconds(label.within)) <= end
    return (done if start is None else done & (stamps >= start)).to_arrow()


def check_splits(objective: str, counts: Mapping[str, LabelCounts], labels: Mapping[str, Mapping[float, int]]) -> None:
    """Refuse splits that a model cannot be trained on or evaluated with.

    Args:
        objective: XGBoost's objective.
        counts: counts by split.
        labels: number of examples by split and label; for classes only.

    Raises:
        DataError: a split has no examples, labels are not classes, or there is only one class.
    """
    for name in SPLITS:
        _require_examples(name, counts.get(name, LabelCounts()))
    if objective in ("binary:logistic", "multi:softprob"):
        _require_classes(objective, labels)
        for name in ("train", "validate"):
            _require_two_classes(name, counts[name], labels[name])


def _require_examples(name: str, count: LabelCounts) -> None:
    if not count.rows:
        raise DataError(
            f"The {name} split has rows", "none", "Move its dates, change --cutoff, or compute more features"
        )
    if not count.entered:
        reason = f"{count.rows} rows: {count.waiting} wait for their label's horizon, {count.absent} have no label"
        raise DataError(
            f"The {name} split has examples",
            reason,
            "Check the label's key and value, shorten `within`, or set `absent`",
        )


def _require_classes(objective: str, labels: Mapping[str, Mapping[float, int]]) -> None:
    binary = objective == "binary:logistic"
    for name in SPLITS:
        wrong = [value for value in labels[name] if value < 0 or value != int(value) or (binary and value > 1)]
        if wrong:
            raise DataError(
                f"A label of {objective} is {'0 or 1' if binary else 'a class, numbered from 0'}",
                f"{wrong[0]:g} in the {name} split",
                "Correct the label's value expression",
            )
    if (most := max((max(each) for each in labels.values() if each), default=0.0)) >= MOST_CLASSES:
        raise DataError(
            f"Classes are numbered from 0, at most {MOST_CLASSES} of them",
            f"class {most:g}",
            "Number them without gaps in the label's value expression",
        )


def _require_two_classes(name: str, count: LabelCounts, labels: Mapping[float, int]) -> None:
    if len(labels) < 2:
        (only,) = labels
        raise DataError(
            f"The {name} split has examples of two classes",
            f"{count.entered} of class {only:g} only",
            "Check the label's value expression, or move the split's dates",
        )


def horizon_of(label: Label) -> pl.Expr:
    return pl.lit(microseconds(label.within), pl.Int64).cast(pl.Duration("us"))


def _key(frame: pl.DataFrame, column: str) -> pl.Expr:
    """A key column; integers of any width are cast to one type."""
    return pl.col(column).cast(pl.Int64) if frame.schema[column].is_integer() else pl.col(column)


def _first_of_each_moment(events: pl.DataFrame, keys: Sequence[str], source: Source) -> pl.DataFrame:
    """The first event of each key and time, by the order that breaks ties; events without a key are dropped."""
    events = events.drop_nulls(keys)
    moment = [*keys, str(source.time)]
    again = events.select(pl.struct(moment).is_duplicated()).to_series()
    if not again.any():
        return events
    first = events.filter(again).sort(source.ties(events.columns)).unique(moment, keep="first", maintain_order=True)
    return pl.concat([events.filter(~again), first])
