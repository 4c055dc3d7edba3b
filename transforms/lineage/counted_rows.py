"""Aligns the rows of a live store with those of a batch job's sources: which rows each side counts, and why a row
counts on only one side.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from datetime import date, timedelta
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import polars as pl
from deltalake import DeltaTable

from schemas.live import repeats_by
from schemas.views import FeatureView
from transforms.features.block_inputs import dimension_rows, distinct_by_key
from transforms.lineage.erasure_records import Erased
from transforms.lineage.feature_parity import (
    _computed,
    accepted_spine_rows,
    pending,
    rejected_spine_rows,
    topic_dead_letters,
)
from transforms.lineage.visible_rows import VisibleRows, gone_at, memory_of, read_accepted, shown_at
from transforms.records.arrays import Bools, Ints
from transforms.records.row_hashing import row_ids
from transforms.sources.contracts import check_rows
from transforms.sources.inventory import Inventory, take_inventory
from transforms.sources.listing import require_unchanged
from transforms.sources.reader import read_raw, repeats_of, without_repeats
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import data_files, open_table, read_file, table_root
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import source_uri, sources_root
from transforms.streaming.fates import FATE_COLUMNS, known_columns
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.pending_spine_rows import about_spine_rows
from transforms.streaming.row_origin import ORIGIN_COLUMNS

# They are applied in this order, for a difference that several of them would explain.
LATE, HISTORY, BEFORE_START, CORRECTED, REPEAT, REJECTED, DIMENSION = (
    "late row",
    "history",
    "before_start",
    "corrected or erased row",
    "repeat beyond memory",
    "row rejected by one side only",
    "dimension version",
)
# These explain nothing: they are faults, even if a value differs because of them.
LOST, TWICE = "row that live never had", "repeat that live should have known"
CAUSES = (LATE, HISTORY, BEFORE_START, CORRECTED, REPEAT, REJECTED, DIMENSION, LOST, TWICE)
UNEXPLAINED = "unexplained"
_CODE = {cause: number for number, cause in enumerate(CAUSES, 1)}
_N = "__number"
Owner = TypeVar("Owner")
Result = TypeVar("Result")


def memo(method: Callable[[Owner, str], Result]) -> Callable[[Owner, str], Result]:
    """Makes a method whose argument is the name of a source keep its results in the object."""

    @functools.wraps(method)
    def kept_by(self: Owner, name: str) -> Result:
        held: dict[str, Result] = self.__dict__.setdefault(f"_{method.__name__}", {})
        if name not in held:
            held[name] = method(self, name)
        return held[name]

    return kept_by


@dataclasses.dataclass(frozen=True, eq=False)
class BatchSide:
    """The batch side.

    Args:
        view: the view that both sides compute.
        root: folder of the sources.
        table: the feature table; None: values are computed from the sources.
    """

    view: FeatureView
    root: str
    table: DeltaTable | None

    @classmethod
    def of(cls, view: FeatureView, store: str | None, root: str | None = None) -> BatchSide:
        """The table of a store with its sources, or those in the folder `root`; without a store, sources alone."""
        assert store is not None or root is not None
        table = None if store is None else open_table(FileSystems.join(store, "features", view.name, view.fingerprint))
        return cls(view, root or sources_root(str(store)), table)

    @property
    def name(self) -> str:
        if self.table is None:
            return f"computed from {self.root}: there is no table"
        return f"{table_root(self.table)} version {self.table.version()}"

    @functools.cached_property
    def inventory(self) -> Inventory:
        return take_inventory(self.view, self.root, time.time_ns() // 1000)

    def checked(self, found: Result) -> Result:
        """`found`, after a check that the sources that were read have not changed.

        Raises:
            DataError: a file was removed or replaced meanwhile.
        """
        return require_unchanged(found, self.inventory.listings if "inventory" in self.__dict__ else ())

    @memo
    def rows(self, name: str) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows of a source that satisfy the contract, with `__kept` (whether they count); and the others."""
        contract, slices = self.inventory.contract(name), self.inventory.slices[name]
        raw = read_raw(contract, slices)
        good, dead_letters = check_rows(contract, raw)
        bad = raw[dead_letters["place"].to_numpy()]
        if name == self.view.spine.name:
            counted = distinct_by_key(good, (self.view.time, *self.view.key))[0]
        elif contract.source.time is None:
            counted = good.unique()
        elif contract.source.unique:
            counted = without_repeats(contract.source, good, repeats_of(contract, slices).first)
        else:
            return good.with_columns(pl.lit(True).alias("__kept")), bad
        numbered = good.with_columns(pl.int_range(pl.len()).over(good.columns).alias(_N))
        counted = counted.unique().with_columns(pl.lit(0, pl.Int64).alias(_N), pl.lit(True).alias("__kept"))
        on = [*good.columns, _N]
        found = numbered.with_columns(pl.col(_N).cast(pl.Int64)).join(counted, on=on, how="left", nulls_equal=True)
        return found.drop(_N).with_columns(pl.col("__kept").fill_null(False)), bad

    @functools.cached_property
    def spine(self) -> pl.DataFrame:
        """The spine rows without repeats, with `row_id`."""
        rows = self.rows(self.view.spine.name)[0].filter("__kept").drop("__kept")
        return rows.with_columns(row_ids(self.view.name, [rows[name] for name in (*self.view.key, self.view.time)]))

    @functools.cached_property
    def dimensions(self) -> dict[str, pl.DataFrame]:
        result = {}
        for name in self.view.dimensions:
            rows = self.rows(name)[0].filter("__kept").drop("__kept")
            result[name] = dimension_rows(self.inventory.contract(name), rows)
        return result

    def values(self, first: date, last: date) -> pl.DataFrame:
        """The features of the spine rows with the dates `[first, last]`."""
        columns = ["row_id", self.view.time, *self.view.columns]
        if self.table is not None:
            files = data_files(self.table, first, last + timedelta(days=1))
            parts = [pl.DataFrame(pl.from_arrow(read_file(file, list(dict.fromkeys(columns))))) for file in files]
            empty = pl.DataFrame(pl.from_arrow(self.view.output_schema.empty_table())).select(
                list(dict.fromkeys(columns))
            )
            return pl.concat([empty, *parts])
        day = pl.col(self.view.time).dt.date()
        spine_rows = self.spine.filter((day >= first) & (day <= last))
        tables = {name: self.rows(name)[0].filter("__kept").drop("__kept") for name in self.view.events}
        found = _computed(self.view, spine_rows, {**tables}, self.dimensions)
        made = found.with_columns(spine_rows["row_id"])
        return made.with_columns(spine_rows[self.view.time]).select(list(dict.fromkeys(columns)))

    def dates(self) -> set[date]:
        """The dates of its rows."""
        if self.table is not None:
            return {file.date for file in data_files(self.table)}
        return set(self.spine[self.view.time].dt.date().unique())


@dataclasses.dataclass(frozen=True, eq=False)
class Aligned:
    """A source's rows on both sides.

    Args:
        rows: the columns that features read.
        moments: their times, µs.
        shown, gone: as in `VisibleRows`; a row that the live side does not count is never shown.
        batch: whether batch counts them.
        cause: number of the cause, if the sides differ by more than the time of arrival.
    """

    rows: pl.DataFrame
    moments: Ints
    shown: Ints
    gone: Ints
    batch: Bools
    cause: npt.NDArray[np.int8]

    @property
    def seen(self) -> VisibleRows:
        mine = self.shown < NEVER_REPEATED
        return VisibleRows(self.rows.filter(pl.Series(mine)), self.moments[mine], self.shown[mine], self.gone[mine])

    def at(self, cut: int, low: int, high: int, active: Sequence[str]) -> pl.DataFrame:
        """The rows of `[low, high)` that the live side sees at `cut`, with the differences of the `active` causes
        applied."""
        live = (self.shown <= cut) & (self.gone > cut)
        late = (self.shown < NEVER_REPEATED) & (self.shown > cut)
        cause = np.where(late | (self.cause == 0), _CODE[LATE], self.cause)
        applied = np.isin(cause, [_CODE[name] for name in active])
        inside = (self.moments >= low) & (self.moments < high)
        return self.rows.filter(pl.Series(np.where(applied, self.batch, live) & inside))


class Sides:
    """The rows of both sides.  They are read when they are needed, and then kept in memory."""

    def __init__(self, view: FeatureView, store: str, batch: BatchSide, cuts: Sequence[str]) -> None:
        self.view, self.store, self.batch, self.cuts = view, store, batch, cuts
        self.rank = {text: position for position, text in enumerate(cuts)}

    @functools.cached_property
    def dead_letters(self) -> pl.DataFrame:
        return topic_dead_letters(self.view, self.store)

    @functools.cached_property
    def erased(self) -> Erased:
        return Erased.of(self.store)

    @functools.cached_property
    def spine_rows(self) -> pl.DataFrame:
        """The spine rows that the live job accepted, from the topic or as history, with `row_id`."""
        view = self.view
        rows = read_accepted(view, self.store, view.spine.name, [*view.spine.schema, *ORIGIN_COLUMNS], None, None)
        return rows.with_columns(row_ids(view.name, [rows[name] for name in (*view.key, view.time)]))

    def started(self, name: str, live: pl.DataFrame) -> int:
        """The time before which the live side has no rows of a source from its topic: the start of the job, or its
        first row."""
        table = open_table(source_uri(sources_root(self.store), name))
        record = last_commit_record(table, application_of(name)) if table is not None else {}
        begin = (record.get("started") or {}).get(name)
        if begin is not None:
            return int(begin)
        time_column = str((self.view.events.get(name) or self.view.spine).time)
        first = live.filter(pl.col("__partition") >= 0)[time_column].min()
        return NEVER_REPEATED if first is None else int(pl.Series([first]).to_physical()[0])

    @memo
    def aligned(self, name: str) -> Aligned:
        view, repeats = self.view, list(repeats_by(self.view, name))
        columns = list(dict.fromkeys([*view.columns_held(name), *repeats]))
        known = [*known_columns(view, name), *FATE_COLUMNS] if repeats else []
        wanted = list(dict.fromkeys([*columns, *ORIGIN_COLUMNS, *known]))
        live = read_accepted(view, self.store, name, wanted, None, None)
        started = self.started(name, live)
        shown = shown_at(name, live, self.cuts)
        gone = np.full(len(live), NEVER_REPEATED, np.int64)
        counted = np.ones(len(live), np.bool_)
        if repeats:
            gone = gone_at(view, self.store, name, live, shown, self.cuts)
            counted = shown < gone
            gone = np.where(counted, gone, NEVER_REPEATED)
        ours = live.select(columns).with_columns(
            pl.Series("__shown", shown),
            pl.Series("__gone", gone),
            pl.Series("__counted", counted),
            (live["__uncompared"].fill_null(False) if repeats else pl.lit(False)).alias("__alone"),
        )
        good, bad = self.batch.rows(name)
        both = _joined(ours, good.select(*columns, "__kept"), columns)
        cause = self._causes(name, both, bad, repeats, started)
        mine = both["__live"].to_numpy() & both["__counted"].to_numpy()
        moments = both[str(view.events[name].time)].to_physical().to_numpy()
        return Aligned(
            both.select(view.columns_held(name)),
            moments,
            np.where(mine, both["__shown"].to_numpy(), NEVER_REPEATED),
            np.where(mine, both["__gone"].to_numpy(), 0),
            both["__kept"].to_numpy(),
            cause,
        )

    def _causes(
        self, name: str, both: pl.DataFrame, bad: pl.DataFrame, repeats: Sequence[str], started: int
    ) -> npt.NDArray[np.int8]:
        """Why one side counts a row that the other does not count, if the cut is not the reason."""
        cause = np.zeros(len(both), np.int8)
        time_column = str(self.view.events[name].time)
        identity = list(repeats) or [time_column]
        one_sided = both.filter(pl.col("__live") != pl.col("__batch"))
        live_alone = one_sided.filter("__live", "__counted")
        batch_alone = one_sided.filter("__batch", "__kept")
        for rows, others in ((live_alone, bad), (batch_alone, None)):
            if not len(rows):
                continue
            at = rows["__row"].to_numpy()
            if others is not None:
                rejected = rows["__row"].is_in(_like(rows, others, identity)["__row"].implode()).to_numpy()
                cause[at] = np.where(rejected, _CODE[REJECTED], _CODE[CORRECTED])
            else:
                cause[at] = self._why_batch_alone(name, rows, live_alone, identity, started)
        if repeats:
            self._repeats(name, both, cause, repeats)
        return cause

    def _why_batch_alone(
        self, name: str, rows: pl.DataFrame, live_alone: pl.DataFrame, identity: Sequence[str], started: int
    ) -> npt.NDArray[np.int8]:
        source = self.view.events.get(name) or self.view.spine
        early = (rows[str(source.time)].to_physical() < started).to_numpy()
        result = np.where(early, _CODE[HISTORY], _CODE[LOST]).astype(np.int8)
        # A row with the same identity, or with the same content except for the time.
        partners = set(_like(rows, live_alone, identity)["__row"])
        content = [column for column in rows.columns if column in source.schema and column != source.time]
        if content and not len(self.view.key if source is self.view.spine else source.unique or ()):
            partners |= set(_like(rows, live_alone, content)["__row"])
        result[rows["__row"].is_in(list(partners)).to_numpy()] = _CODE[CORRECTED]
        dead_letters = self.dead_letters.filter(source=name)
        about = pl.col("rule").str.contains("before_start")
        for cause, unknown, letters in (
            (BEFORE_START, HISTORY, dead_letters.filter(about)),
            (REJECTED, LOST, dead_letters.filter(~about & ~about_spine_rows())),
        ):
            exact = np.zeros(len(rows), np.bool_)
            for (field,), some in letters.group_by("field"):
                if field in rows.columns:
                    exact |= rows[str(field)].cast(pl.String).is_in(some["value"].implode()).fill_null(False).to_numpy()
            result[exact & (early | (cause == REJECTED))] = _CODE[cause]
            # A dead letter has only one value of its row, which may have been corrected since.  So the other rows get
            # this cause only if there are no more of them than dead letters that are left.
            rest = result == _CODE[unknown]
            if 0 < rest.sum() <= len(letters) - exact.sum():
                result[rest] = _CODE[cause]
        # Only the number of rows that were erased here is known.
        gone = result == _CODE[LOST]
        if 0 < gone.sum() <= self.erased.rows.get(name, 0):
            result[gone] = _CODE[CORRECTED]
        return result

    def _repeats(self, name: str, both: pl.DataFrame, cause: npt.NDArray[np.int8], repeats: Sequence[str]) -> None:
        """Rows that both sides have but only one counts get the cause of the row that the other side counts instead."""
        moment = pl.col(str(self.view.events[name].time)).to_physical()
        rows = both.with_columns(pl.Series("__cause", cause), moment.alias("__moment"))
        undecided = rows.filter(
            "__live",
            "__batch",
            (pl.col("__counted") != pl.col("__kept")) | (pl.col("__counted") & (pl.col("__gone") < NEVER_REPEATED)),
        )
        if not len(undecided):
            return
        instead = rows.filter(pl.col("__counted") | pl.col("__kept")).select(
            *repeats,
            pl.col("__cause").alias("__theirs"),
            pl.col("__row").alias("__other"),
            pl.col("__moment").alias("__first"),
        )
        found = (
            undecided.join(instead, on=repeats, how="left")
            .filter(pl.col("__row") != pl.col("__other"))
            .group_by("__row")
            .agg(pl.col("__theirs").max(), pl.col("__first").min())
        )
        undecided = undecided.join(found, on="__row", how="left")
        replaced = undecided["__gone"].to_numpy() < NEVER_REPEATED
        theirs = undecided["__theirs"].fill_null(0).to_numpy()
        far = undecided["__moment"].to_numpy() - memory_of(self.store, name).length
        expired = (undecided["__first"].fill_null(NEVER_REPEATED).to_numpy() < far) | undecided["__alone"].to_numpy()
        own_cause = np.where(replaced, _CODE[LATE], np.where(expired, _CODE[REPEAT], _CODE[TWICE]))
        # A row of history beyond this memory would have made no difference.
        own = (theirs == 0) | (expired & ~replaced & (theirs == _CODE[HISTORY]))
        cause[undecided["__row"].to_numpy()] = np.where(own, own_cause, theirs)

    def why_live_alone(self, feature_rows: pl.DataFrame) -> dict[str, int]:
        """Why the batch side lacks the spine rows of some live feature rows, as counts by cause."""
        if not len(feature_rows):
            return {}
        view = self.view
        _, bad = self.batch.rows(view.spine.name)
        here = feature_rows.join(self.batch.spine.select("row_id"), on="row_id", how="semi")
        rest = feature_rows.join(here, on="row_id", how="anti")
        identity = [*view.key, view.time]
        rejected = rest.join(bad.select(identity), on=identity, how="semi")
        # If batch's source has the spine row and its table does not, the table should have been computed again.
        counts = {UNEXPLAINED: len(here), REJECTED: len(rejected), CORRECTED: len(rest) - len(rejected)}
        return {name: number for name, number in counts.items() if number}

    def why_batch_alone(self, rows: pl.DataFrame) -> tuple[dict[str, int], int]:
        """Why the live side lacks some feature rows of the batch side, as counts by cause; and how many are pending."""
        view, spine = self.view, self.batch.spine
        positions = accepted_spine_rows(view, self.store)
        mine = rows.join(positions.select("row_id").unique(), on="row_id", how="semi")
        letters = (
            positions.join(rejected_spine_rows(view, self.store), on=ORIGIN_COLUMNS, how="semi")
            .select("row_id")
            .unique()
        )
        rejected = mine.join(letters, on="row_id", how="semi")
        gone = self.erased.has(rows.join(rejected, on="row_id", how="anti"))
        left = len(mine.join(gone, on="row_id", how="anti")) - len(rejected)
        waits = min(left, pending(view, self.store))
        counts = {REJECTED: len(rejected), CORRECTED: len(gone), UNEXPLAINED: left - waits}
        rows = rows.join(gone, on="row_id", how="anti")
        mine = mine.join(gone, on="row_id", how="anti")
        never = spine.join(rows.join(mine, on="row_id", how="anti"), on="row_id", how="semi")
        if len(never):
            alone = positions.join(spine, on="row_id", how="anti").with_row_index("__row")
            since = self.started(view.spine.name, positions)
            found = self._why_batch_alone(view.spine.name, never.with_row_index("__row"), alone, list(view.key), since)
            for code in found.tolist():
                cause = UNEXPLAINED if code >= _CODE[LOST] else CAUSES[code - 1]
                counts[cause] = counts.get(cause, 0) + 1
        # Rows of the table whose spine row is not in its source.
        counts[UNEXPLAINED] += len(rows) - len(mine) - len(never)
        return {name: number for name, number in counts.items() if number}, waits


def _joined(live: pl.DataFrame, batch: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The rows of both sides; rows with the same content become one row. `__live` and `__batch` show which sides have
    it.

    Args:
        live: with `__shown`, `__gone`, `__counted` and `__alone`.
        batch: with `__kept`.
        columns: the content.
    """
    ours = _numbered(live, columns, ["__counted", "__shown"], [True, False])
    theirs = _numbered(batch, columns, ["__kept"], [True])
    return (
        ours.with_columns(pl.lit(True).alias("__live"))
        .join(
            theirs.with_columns(pl.lit(True).alias("__batch")),
            on=[*columns, _N],
            how="full",
            coalesce=True,
            nulls_equal=True,
        )
        .with_columns(
            pl.col("__live", "__batch", "__counted", "__kept", "__alone").fill_null(False),
            pl.col("__shown", "__gone").fill_null(NEVER_REPEATED),
        )
        .with_row_index("__row")
    )


def _numbered(
    rows: pl.DataFrame, columns: Sequence[str], by: Sequence[str], descending: Sequence[bool]
) -> pl.DataFrame:
    """Numbers the rows with the same content; rows that count come first."""
    rows = rows.sort(by, descending=list(descending), maintain_order=True)
    return rows.with_columns(pl.int_range(pl.len()).over(columns).cast(pl.Int64).alias(_N))


def _like(rows: pl.DataFrame, others: pl.DataFrame, columns: Sequence[str]) -> pl.DataFrame:
    """The rows that are equal to one of `others` in some columns."""
    return rows.join(others.select(columns).unique(), on=list(columns), how="semi", nulls_equal=True)
