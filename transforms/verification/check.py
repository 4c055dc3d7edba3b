"""Compares published rows with the same rows computed by plain code."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl

from schemas.durations import DAY
from schemas.errors import MismatchError
from schemas.features import Latest, Trailing
from schemas.views import FeatureView
from transforms.records.times import midnight
from transforms.sources.contracts import Contract
from transforms.sources.slices import Slice
from transforms.storage.delta_tables import DataFile
from transforms.verification.plain_features import recompute
from transforms.verification.plain_sources import EVER, Files, Tables, TooManyRows, spine_rows
from transforms.verification.sample import ROWS_PER_FILE, choose_files, choose_rows, every_row

# Rows verified by default, and the share of a run's time that this may take: for a run over everything, and for any
# other run.
VERIFIED_ROWS = 100
VERIFIED_SHARE_OF_EVERYTHING, VERIFIED_SHARE = 0.05, 0.25
# For estimates of time: values of a source that are read per second; seconds per row group of a source, and per value
# of a feature row.
VALUES_PER_SECOND = 12e6
SECONDS_PER_GROUP, SECONDS_PER_VALUE = 0.002, 4e-5
# The part of the allowed time that an estimate may fill: the machine may be busy with other work.
FILLED = 0.7
# Rows recomputed in one pass over the sources if every row is to be verified.
AT_ONCE = 20_000
EXAMPLES = 3


@dataclasses.dataclass(frozen=True)
class SampleSize:
    """How many rows to verify.

    Args:
        rows: the most rows to verify; None: all.
        share: the share of the run's time so far that verification may take. One row, and one for each lifetime group,
            is verified even if this takes longer. None: no limit.
        began: when the run began, µs since 1970.
    """

    rows: int | None = VERIFIED_ROWS
    share: float | None = None
    began: int = 0

    @property
    def seconds(self) -> float | None:
        """The seconds that an estimate may come to, as of now."""
        return None if self.share is None else max(time.time() - self.began / 1e6, 0.0) * self.share * FILLED


@dataclasses.dataclass(frozen=True)
class Difference:
    """A value that differs from the recomputed one; `row` has the spine row's key and time."""

    row: Mapping[str, object]
    feature: str
    published: object
    recomputed: object

    def __str__(self) -> str:
        row = ", ".join(f"{name}={value}" for name, value in self.row.items())
        return f"{self.feature!r} of {row} is {self.published!r}, recomputed {self.recomputed!r}"


@dataclasses.dataclass(frozen=True)
class Verified:
    """How many rows were verified, and of how many; how many values were compared, and how many differ, with examples;
    the seconds that this took."""

    rows: int = 0
    of: int = 0
    values: int = 0
    differing: int = 0
    seconds: float = 0.0
    examples: tuple[Difference, ...] = ()

    def __str__(self) -> str:
        return f"{self.rows:,} rows (of {self.of:,}), {self.differing:,} differing, {self.seconds:.1f} s"

    def __add__(self, other: Verified) -> Verified:
        return Verified(
            self.rows + other.rows,
            max(self.of, other.of),
            self.values + other.values,
            self.differing + other.differing,
            self.seconds + other.seconds,
            (*self.examples, *other.examples)[:EXAMPLES],
        )

    @property
    def figures(self) -> dict[str, object]:
        """The figures as JSON values."""
        return {
            "rows": self.rows,
            "of": self.of,
            "values": self.values,
            "differing": self.differing,
            "seconds": round(self.seconds, 3),
            "examples": [dataclasses.asdict(each) for each in self.examples],
        }

    def require_equal(self, what: str, fix: str) -> None:
        """Checks that no value differs.

        Raises:
            MismatchError: names a row, its feature and both values.
        """
        if self.differing:
            raise MismatchError(
                what,
                f"{self.differing:,} of {self.values:,} values of {self.rows:,} rows differ: "
                f"{'; '.join(map(str, self.examples))}",
                fix,
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Verification:
    """Verifies rows of a view's feature table from all rows of its sources.

    Args:
        view: the view.
        contracts: by source (the spine under its own name), the rules by which its rows count.
        slices: by source, its row groups as the run listed them.
        amount: how many rows.
        run_id: decides, with the ids of the rows, which rows are chosen.
    """

    view: FeatureView
    contracts: Mapping[str, Contract]
    slices: Mapping[str, Sequence[Slice]]
    amount: SampleSize
    run_id: str

    def of_files(self, files: Sequence[DataFile]) -> Verified:
        """Verifies rows of `files`, which are published or about to be."""
        began = time.perf_counter()
        total = sum(file.rows for file in set(files))
        result = Verified(of=total)
        tables = Files(self.contracts, self.slices)
        if self.amount.rows is None or (self.amount.share is None and self.amount.rows >= total):
            for rows in every_row(files, AT_ONCE):
                result += self._rows(rows, tables, len(rows))
        elif self.amount.rows and total:
            count, chosen, starts, skip = self._affordable(files)
            sample = choose_rows(self.view, chosen, starts, count, self.run_id)
            result += self._rows(sample.rows, dataclasses.replace(tables, skip=skip), sample.least)
        return dataclasses.replace(result, seconds=time.perf_counter() - began)

    def _affordable(self, files: Sequence[DataFile]) -> tuple[int, list[DataFile], list[DataFile], bool]:
        """What the time allows by estimate, and at least one row: (number of rows, files to take them from, which of
        these begin a range, whether row groups out of reach are skipped)."""
        rows, seconds = int(self.amount.rows or 1), self.amount.seconds
        most, each = max(rows // ROWS_PER_FILE, 1), SECONDS_PER_VALUE * len(self.view.columns)
        chosen, starts = choose_files(files, most, self.run_id)
        if seconds is None:
            return rows, chosen, starts, False
        whole = self._seconds(None)
        if whole + rows * each <= seconds:
            return rows, chosen, starts, False
        # Each date costs reading, each row computing: as many rows are verified as time allows, and not all of one
        # date.
        count, few = 1, 1
        for dates in range(1, most + 1):
            left = seconds - self._seconds(choose_files(files, dates, self.run_id)[0])
            if (rows_left := min(int(left / each), 2 * ROWS_PER_FILE * dates, rows)) >= count:
                count, few = rows_left, dates
        return count, *choose_files(files, few, self.run_id), True

    def _seconds(self, files: Sequence[DataFile] | None) -> float:
        """The approximate seconds to read what the spine rows of `files` can see (None: all rows of the sources)."""
        total = 0.0
        days = None if files is None else np.array([midnight(file.date) for file in files])
        for name, slices in self.slices.items():
            source, reach = self.contracts[name].source, self._reaches.get(name, 0)
            rows, low, high = (np.array([getattr(each, field) for each in slices]) for field in ("rows", "low", "high"))
            near = np.ones(len(rows), np.bool_)
            if days is not None and source.time is not None:
                seen = low[:, None] < days + DAY
                if reach is not None:
                    seen &= high[:, None] >= days - reach
                near = seen.any(axis=1)
            total += near.sum() * SECONDS_PER_GROUP + rows[near].sum() * len(source.schema) / VALUES_PER_SECOND
            total += rows.sum() * len(source.unique or ()) / VALUES_PER_SECOND
        return float(total)

    @functools.cached_property
    def _reaches(self) -> dict[str, int | None]:
        """How far back the view sees each source, µs; None: without limit."""
        ever = {
            feature.source.name
            for feature in self.view.features
            if (isinstance(feature, Trailing) and "all" in feature.over)
            or (isinstance(feature, Latest) and feature.length is None)
        }
        return {name: None if name in ever else self.view.reach(name) for name in self.view.events}

    def _rows(self, rows: pl.DataFrame, tables: Files, least: int) -> Verified:
        """Verifies `rows`; if there are more than `least`, only as many as fit in memory."""
        try:
            return verify_rows(self.view, rows, spine_rows(self.view, tables, rows), tables)
        except TooManyRows:
            half = len(rows) // 2
            if len(rows) == 1:
                return self._rows(rows, dataclasses.replace(tables, most=EVER), 1)
            if half >= max(least, 1):
                return self._rows(rows[:half], tables, least)
            return self._rows(rows[:half], tables, half) + self._rows(rows[half:], tables, len(rows) - half)


def verify_written(
    written: Sequence[tuple[DataFile, Mapping[str, str]]], verification: Verification | None
) -> Verified | None:
    """Verifies some of the rows in files that are about to be committed.

    Raises:
        MismatchError: a value differs.
    """
    if verification is None:
        return None
    found = verification.of_files([file for file, _ in written])
    found.require_equal(
        "Rows to publish equal those that plain code computes by the definition, from all rows of the sources",
        "Nothing was committed.  Compute everything again with --full; if it differs still, please report it",
    )
    return found


def verify_rows(view: FeatureView, published: pl.DataFrame, spine: pl.DataFrame, tables: Tables) -> Verified:
    """Compares published rows with those that plain code computes.

    Args:
        spine: the spine rows of the published rows, in their order; `__found` is null where the source has none.
    """
    found = spine["__found"].fill_null(False)
    differences = [
        Difference(_row(view, row), "the spine row", "published", "not in its source")
        for row in published.filter(~found).iter_rows(named=True)
    ]
    published, spine = published.filter(found), spine.filter(found).drop("__found")
    own = recompute(view, spine, tables, published)
    count = len(differences)
    for name in own.columns:
        positions = differ(published[name], own[name]).arg_true().to_list()
        count += len(positions)
        for position in positions[: max(EXAMPLES - len(differences), 0)]:
            row = _row(view, published.row(position, named=True))
            differences.append(Difference(row, name, published[name][position], own[name][position]))
    return Verified(len(found), 0, len(found) * len(view.columns), count, 0.0, tuple(differences[:EXAMPLES]))


def differ(left: pl.Series, right: pl.Series) -> pl.Series:
    """Where two columns differ in at least one bit; nulls are equal."""
    if left.dtype == pl.Float32:
        left, right = (side.reinterpret(signed=False) for side in (left, right.cast(pl.Float32)))
    return left.ne_missing(right)


def _row(view: FeatureView, row: Mapping[str, object]) -> dict[str, object]:
    return {name: row[name] for name in (*view.key, view.time)}
