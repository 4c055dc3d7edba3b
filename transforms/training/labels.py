"""What became of each spine row, and which split may know it."""

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
from transforms.records.row_hashing import row_ids

# A tree a round for each class up to the greatest, and a score a row: a number that is no class would take all memory.
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Counts:
    """What became of the rows of one split.  `rows = waiting + dropped + entered`.

    Args:
        rows: whose time is in the split.
        waiting: whose horizon ends after the split does, label or no label.
        absent: of the others, those for which no label came within the horizon.
        dropped: the absent ones, where `absent="drop"`; else 0.
        entered: the split's examples.
    """

    rows: int = 0
    waiting: int = 0
    absent: int = 0
    dropped: int = 0
    entered: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(dataclasses.astuple(self), dataclasses.astuple(other))))


def attach(rows: pl.DataFrame, events: pl.DataFrame, label: Label, time: str) -> pl.DataFrame:
    """`rows` with `__label` (float64) and `__label_time`.

    The label of a row asked at *t* is `label.value` of the first of `events` with its key and `t ≤ time < t + within`;
    of one moment the first by the source's `order`, else by all columns.  Where none came, or that value is null or not
    finite, `__label` is `label.absent`, null for `"drop"`, and `__label_time` is `t + within`.

    Args:
        rows: with the label's spine columns and `time`; their order is kept.
        events: clean rows of the label's source, any order.
    """
    source, known = label.source, str(label.source.time)
    keys = [f"__key{i}" for i in range(len(label.keys))]
    value = label.computed.cast(pl.Float64)
    first = (
        _first_of_each_moment(events, [column for _, column in label.keys], source)
        .select(
            *(_key(events, column).alias(key) for key, (_, column) in zip(keys, label.keys)),
            pl.col(known).alias("__known"),
            pl.when(value.cast(pl.Float32).is_finite()).then(value).alias("__value"),
        )
        .sort("__known")
    )
    asked = rows.select(
        *(_key(rows, column).alias(key) for key, (column, _) in zip(keys, label.keys)),
        pl.col(time).alias("__asked"),
        pl.int_range(pl.len(), dtype=pl.UInt32).alias("__place"),
    )
    found = (
        asked.sort("__asked")
        .join_asof(
            first,
            left_on="__asked",
            right_on="__known",
            by=keys,
            strategy="forward",
            coalesce=False,
            check_sortedness=False,
        )
        .sort("__place")
    )
    horizon = pl.col("__asked") + horizon_of(label)
    received = (pl.col("__known") < horizon) & pl.col("__value").is_not_null()
    absent = None if label.absent == "drop" else float(label.absent)
    return rows.with_columns(
        found.select(
            pl.when(received).then("__value").otherwise(pl.lit(absent, pl.Float64)).alias(LABEL),
            pl.when(received).then("__known").otherwise(horizon).alias(LABEL_TIME),
            received.fill_null(False).alias("__came"),
        )
    )


def examples(
    labelled: pl.DataFrame, label: Label, split: Split, time: str
) -> tuple[dict[str, pl.DataFrame], dict[str, Counts]]:
    """The examples of each split, and what became of its rows.

    A row enters a split when its time lies in it, its horizon has passed by the split's end, and it has a label.
    """
    parts, counts = {}, {}
    part_of = None if split.groups is None else groups_of(labelled, split.groups)
    for name, (start, end) in split.bounds.items():
        inside = pl.col(time) < end if start is None else (pl.col(time) >= start) & (pl.col(time) < end)
        part = labelled.filter(inside if part_of is None else inside & (part_of == name))
        ripe = part.filter(pl.col(time) + horizon_of(label) <= end)
        entered = ripe.filter(pl.col(LABEL).is_not_null())
        absent = int((~ripe["__came"]).sum())
        counts[name] = Counts(len(part), len(part) - len(ripe), absent, len(ripe) - len(entered), len(entered))
        parts[name] = entered.drop("__came")
    return parts, counts


def groups_of(rows: pl.DataFrame, split: GroupSplit) -> pl.Series:
    """Part of each row by a hash of its group."""
    salt = f"GroupSplit {split.salt}"
    hashed = row_ids(salt, [rows[name] for name in split.by]).to_numpy().view(np.uint64)
    share = hashed / 2.0**64
    names = np.where(share < split.test, "test", np.where(share < split.test + split.validate, "validate", "train"))
    return pl.Series("part", names, pl.String)


def mature(label: Label, times: pa.Array, start: datetime | None, end: datetime) -> pa.Array:
    """Whether each of `times` lies in `[start, end)` and its label's horizon has passed by `end`."""
    stamps = pl.Series("time", pl.from_arrow(times))
    done = stamps + timedelta(microseconds=microseconds(label.within)) <= end
    return (done if start is None else done & (stamps >= start)).to_arrow()


def check(objective: str, counts: Mapping[str, Counts], labels: Mapping[str, Mapping[float, int]]) -> None:
    """Refuse splits that nothing can be learnt from or judged by.

    Args:
        labels: split to label to number of examples; for classes only.

    Raises:
        DataError: a split without examples, labels that are not classes, or one class only.
    """
    for name in SPLITS:
        each = counts.get(name, Counts())
        if not each.rows:
            raise DataError(
                f"The {name} split has rows", "none", "Move its dates, change --cutoff, or compute more features"
            )
        if not each.entered:
            reason = f"{each.rows} rows: {each.waiting} wait for their label's horizon, {each.absent} have no label"
            raise DataError(
                f"The {name} split has examples",
                reason,
                "Check the label's key and value, shorten `within`, or set `absent`",
            )
    if objective not in ("binary:logistic", "multi:softprob"):
        return
    for name in SPLITS:
        wrong = [
            value
            for value in labels[name]
            if value < 0 or value != int(value) or (objective.startswith("binary") and value > 1)
        ]
        if wrong:
            rule = "0 or 1" if objective.startswith("binary") else "a class, numbered from 0"
            raise DataError(
                f"A label of {objective} is {rule}",
                f"{wrong[0]:g} in the {name} split",
                "Correct the label's value expression",
            )
    if (most := max((max(each) for each in labels.values() if each), default=0.0)) >= CLASSES:
        raise DataError(
            f"Classes are numbered from 0, at most {CLASSES} of them",
            f"class {most:g}",
            "Number them without gaps in the label's value expression",
        )
    for name in ("train", "validate"):
        if len(labels[name]) < 2:
            (only,) = labels[name]
            raise DataError(
                f"The {name} split has examples of two classes",
                f"{counts[name].entered} of class {only:g} only",
                "Check the label's value expression, or move the split's dates",
            )


def horizon_of(label: Label) -> pl.Expr:
    return pl.lit(microseconds(label.within), pl.Int64).cast(pl.Duration("us"))


def _key(frame: pl.DataFrame, column: str) -> pl.Expr:
    """A key column, integers of any width as one type."""
    return pl.col(column).cast(pl.Int64) if frame.schema[column].is_integer() else pl.col(column)


def _first_of_each_moment(events: pl.DataFrame, keys: Sequence[str], source: Source) -> pl.DataFrame:
    """Of events of one key and moment the first by what breaks their source's ties; events without a key left out."""
    events = events.drop_nulls(keys)
    moment = [*keys, str(source.time)]
    again = events.select(pl.struct(moment).is_duplicated()).to_series()
    if not again.any():
        return events
    first = events.filter(again).sort(source.ties(events.columns)).unique(moment, keep="first", maintain_order=True)
    return pl.concat([events.filter(~again), first])
