"""Compares live feature rows with the full batch table, and names the cause of every difference.

A live feature row could see the rows that had arrived by its cut; the batch table sees every row that its sources hold
now.  The rows of both sides are aligned by content, and each row that counts on one side alone gets a cause.  Which
causes a difference has is then computed, not guessed.  From the live rows, the kernel must compute the bits of the live
feature row; with all causes applied, it must compute those of the batch table.  A cause is named if leaving out only
this cause changes the bits.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np
import polars as pl

from schemas.views import FeatureView, reached_from
from transforms.lineage.counted_rows import (
    CAUSES,
    CORRECTED,
    DIMENSION,
    LATE,
    LOST,
    TWICE,
    UNEXPLAINED,
    BatchSide,
    Sides,
)
from transforms.lineage.feature_parity import _by_dates, _computed, _differ, cuts_of, disturbed_by
from transforms.records.arrays import Bools, Ints
from transforms.records.times import day_of
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_live_uri
from transforms.streaming.live_dimensions import kept_version
from transforms.streaming.live_tables import read_feature_rows
from transforms.streaming.row_origin import ORIGIN_COLUMNS

EXAMPLES = 3
# Feature rows that are explained at a time: for each set of causes, a frame of features is in memory.
AT_ONCE = 50_000


@dataclasses.dataclass
class ParityDifference:
    """The values and feature rows that differ because of one cause, or of several together, and the first of them."""

    values: int = 0
    feature_rows: int = 0
    examples: list[dict[str, object]] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        return {"values": self.values, "answers": self.feature_rows, "examples": self.examples}


@dataclasses.dataclass
class FullComparison:
    """The result of a comparison with the full batch table.

    Args:
        batch: the table and its version, or the sources that the values were computed from.
        feature_rows: number of rows compared, which are those that both sides have.
        values: number of values compared.
        causes: what differs, by the names of the causes.
        only_live: feature rows that the batch side lacks, by cause.
        only_batch: rows of the batch side without a live feature row, between the first and the last live spine row, by
            cause.
        pending: how many of these the live job has accepted but not computed yet; they are not a difference.
        not_computed: live feature rows on dates without a row in the batch table; they are not a difference.
    """

    batch: str
    feature_rows: int = 0
    values: int = 0
    causes: dict[str, ParityDifference] = dataclasses.field(default_factory=dict)
    only_live: dict[str, int] = dataclasses.field(default_factory=dict)
    only_batch: dict[str, int] = dataclasses.field(default_factory=dict)
    pending: int = 0
    not_computed: int = 0

    @property
    def differing(self) -> int:
        return sum(each.values for each in self.causes.values())

    @property
    def unexplained(self) -> int:
        """Values and rows that no cause explains."""
        values = sum(each.values for name, each in self.causes.items() if name.startswith(UNEXPLAINED))
        return values + self.only_live.get(UNEXPLAINED, 0) + self.only_batch.get(UNEXPLAINED, 0)


def compare_with_full(
    view: FeatureView, store: str, batch: BatchSide, start: date | None = None, end: date | None = None
) -> FullComparison:
    """Compares the live feature rows of `[start, end)` with those of the batch side."""
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table, start, end)
    cuts = cuts_of(files)
    result, sides, covered, span = (
        FullComparison(batch.name),
        Sides(view, store, batch, cuts),
        batch.dates(),
        list[int](),
    )
    computed = []
    for group in _by_dates(files) if files else ():
        feature_rows = pl.concat([read_feature_rows(view, file) for file in group])
        moments = feature_rows[view.time].to_physical().to_numpy()
        span += [int(moments.min()), int(moments.max())]
        computed.append(feature_rows["row_id"])
        values = batch.values(*_days(feature_rows)).unique("row_id", keep="first")
        missing = feature_rows.join(values, on="row_id", how="anti")
        unknown = ~missing["date"].is_in(list(covered))
        result.not_computed += int(unknown.sum())
        _add_counts(result.only_live, sides.why_live_alone(missing.filter(~unknown)))
        both = feature_rows.join(values.select("row_id"), on="row_id", how="semi", maintain_order="left")
        theirs = both.select("row_id").join(values, on="row_id", how="left", maintain_order="left")
        result.feature_rows += len(both)
        result.values += len(both) * len(view.columns)
        wrong = {name: _differ(both[name], theirs[name]) for name in view.columns}
        differ = np.logical_or.reduce(list(wrong.values())) if len(both) else np.zeros(0, np.bool_)
        where = np.flatnonzero(differ)
        for (versions,), part in (
            both[where].with_columns(pl.Series("__at", where)).group_by("__dimensions", maintain_order=True)
        ):
            for some in part.iter_slices(AT_ONCE):
                _explain(result, sides, some, theirs[some["__at"].to_numpy()], str(versions))
    if span:
        known = pl.concat(computed)
        _add_batch_alone(result, sides, known, (min(span), max(span)))
    return batch.checked(result)


def _days(rows: pl.DataFrame) -> tuple[date, date]:
    first, last = rows["date"].min(), rows["date"].max()
    assert isinstance(first, date)
    assert isinstance(last, date)
    return first, last


def _add_counts(counts: dict[str, int], more: Mapping[str, int]) -> None:
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


def _explain(
    result: FullComparison, sides: Sides, feature_rows: pl.DataFrame, theirs: pl.DataFrame, versions: str
) -> None:
    """Names the causes of every value in which some feature rows differ from those of the batch side.

    Args:
        versions: the versions of the dimensions that all these feature rows used, as JSON.
    """
    view, variant = sides.view, _Variants(sides, feature_rows, versions)
    touched: dict[str, set[int]] = {}
    for name in view.columns:
        live, batch = feature_rows[name], theirs[name]
        wrong = _differ(live, batch)
        if not wrong.any():
            continue
        known = ~_differ(variant(0)[name], live) & ~_differ(variant(variant.all)[name], batch)
        needed = _needed(variant, name, batch, wrong & known)
        for mask in np.unique(needed[wrong]).tolist():
            rows = np.flatnonzero(wrong & (needed == mask))
            causes = variant.named(mask)
            label = ", ".join(causes) or UNEXPLAINED
            label = f"{UNEXPLAINED}: {label}" if {LOST, TWICE} & set(causes) else label
            each = result.causes.setdefault(label, ParityDifference())
            each.values += len(rows)
            touched.setdefault(label, set()).update(rows.tolist())
            for row in rows[: max(EXAMPLES - len(each.examples), 0)].tolist():
                about = {key: feature_rows[key][row] for key in (*view.key, view.time)}
                each.examples.append({**about, "feature": name, "live": live[row], "batch": batch[row]})
    for label, rows_of in touched.items():
        result.causes[label].feature_rows += len(rows_of)


def _needed(variant: _Variants, name: str, batch: pl.Series, rows: Bools) -> Ints:
    """For each of some rows, as bits, a minimal set of causes that gives the value of the batch side."""
    needed = np.where(rows, variant.all, 0).astype(np.int64)
    for number in reversed(range(len(variant.causes))):
        bit = 1 << number
        for mask in np.unique(needed[rows]).tolist():
            same = ~_differ(variant(mask & ~bit)[name], batch)
            needed[rows & (needed == mask) & same] = mask & ~bit
    return needed


class _Variants:
    """Features of some feature rows over the live rows, with the differences of some causes applied."""

    def __init__(self, sides: Sides, feature_rows: pl.DataFrame, versions: str) -> None:
        self.sides, view = sides, sides.view
        self.tables = {name: sides.aligned(name) for name in view.events}
        content = list(view.spine.schema)
        spine_rows = sides.spine_rows.unique(ORIGIN_COLUMNS)
        self.live = (
            feature_rows.select(*ORIGIN_COLUMNS)
            .join(spine_rows, on=ORIGIN_COLUMNS, how="left", maintain_order="left")
            .select(content)
        )
        mine = feature_rows.select("row_id").join(sides.batch.spine, on="row_id", how="left", maintain_order="left")
        theirs = pl.DataFrame(
            {name: mine[name].zip_with(mine[view.time].is_not_null(), self.live[name]) for name in content}
        )
        # Of two spine rows with the same key and time, batch keeps the smaller, and a live job the one that it had
        # computed when the other arrived.
        positions = pl.int_range(pl.len()).alias("__at")
        other = theirs.with_columns(positions).join(
            self.live.with_columns(positions), on=[*content, "__at"], how="anti", nulls_equal=True
        )
        late = other.join(sides.spine_rows.select(content), on=content, how="semi", nulls_equal=True)["__at"]
        corrected = other.filter(~pl.col("__at").is_in(late.implode()))["__at"]
        self.other_content = {LATE: late.to_numpy(), CORRECTED: corrected.to_numpy()}
        self.batch = theirs
        root = FileSystems.join(sides.store, "dimensions")
        self.known = {name: kept_version(root, name, version) for name, version in json.loads(versions).items()}
        self.now = sides.batch.dimensions
        rank = feature_rows["__cut"].replace_strict(sides.rank, return_dtype=pl.Int64).to_numpy()
        moments = self.live[view.time].to_physical().to_numpy()
        disturbed = disturbed_by([each.seen for each in self.tables.values()], moments, rank)
        self.parts: list[tuple[Ints, int, int | None, int]] = []
        if (~disturbed).any():
            self.parts.append((np.flatnonzero(~disturbed), NEVER_REPEATED - 1, None, NEVER_REPEATED))
        for cut in np.unique(rank[disturbed]).tolist():
            rows = np.flatnonzero(disturbed & (rank == cut))
            self.parts.append((rows, cut, int(moments[rows].min()), int(moments[rows].max())))
        there = {int(code) for each in self.tables.values() for code in np.unique(each.cause)}
        causes = {CAUSES[code - 1] for code in there if code}
        causes |= {LATE} if disturbed.any() else set()
        causes |= {cause for cause, rows in self.other_content.items() if len(rows)}
        if any(not _same(self.known[name], frame) for name, frame in self.now.items()):
            causes.add(DIMENSION)
        self.causes = [cause for cause in CAUSES if cause in causes]

        self._made: dict[int, pl.DataFrame] = {}

    @property
    def all(self) -> int:
        """All causes, as bits."""
        return (1 << len(self.causes)) - 1

    def named(self, mask: int) -> list[str]:
        return [cause for number, cause in enumerate(self.causes) if mask >> number & 1]

    def __call__(self, mask: int) -> pl.DataFrame:
        """The features with the causes of these bits applied."""
        if mask not in self._made:
            active = self.named(mask)
            spine_rows = self._spine_rows(active)
            dimensions = self.now if DIMENSION in active else self.known
            parts = [self._part(part, spine_rows, dimensions, active) for part in self.parts]
            order = np.argsort(np.concatenate([rows for rows, *_ in self.parts]), kind="stable")
            self._made[mask] = pl.concat(parts)[order].select(list(self.sides.view.columns))
        return self._made[mask]

    def _spine_rows(self, active: Sequence[str]) -> pl.DataFrame:
        """The spine rows.  A spine row that differs in batch is replaced by the batch row if the cause of this is
        applied."""
        none = np.zeros(0, np.int64)
        rows = np.concatenate(
            [none, *(positions for cause, positions in self.other_content.items() if cause in active)]
        )
        if not len(rows):
            return self.live
        theirs = np.zeros(len(self.live), np.bool_)
        theirs[rows] = True
        flags = pl.Series(theirs)
        return pl.DataFrame({name: self.batch[name].zip_with(flags, self.live[name]) for name in self.live.columns})

    def _part(
        self,
        part: tuple[Ints, int, int | None, int],
        spine_rows: pl.DataFrame,
        dimensions: Mapping[str, pl.DataFrame],
        active: Sequence[str],
    ) -> pl.DataFrame:
        rows, cut, first, high = part
        view = self.sides.view
        low = {name: -NEVER_REPEATED if first is None else reached_from(view, name, first) for name in self.tables}
        tables = {name: each.at(cut, low[name], high, active) for name, each in self.tables.items()}
        return _computed(view, spine_rows[rows], tables, dimensions)


def _same(a: pl.DataFrame, b: pl.DataFrame) -> bool:
    """Whether they have the same rows in the same order: a lookup uses the first row of a key."""
    return a.select(b.columns).equals(b)


def _add_batch_alone(result: FullComparison, sides: Sides, computed: pl.Series, span: tuple[int, int]) -> None:
    view, batch = sides.view, sides.batch
    days = [day_of(each) for each in span]
    moment = pl.col(view.time).to_physical()
    rows = batch.values(days[0], days[1]).filter((moment >= span[0]) & (moment <= span[1])).select("row_id", view.time)
    rows = rows.filter(~pl.col("row_id").is_in(computed.implode())).select("row_id").unique()
    if len(rows):
        counts, waits = sides.why_batch_alone(rows)
        _add_counts(result.only_batch, counts)
        result.pending += waits
