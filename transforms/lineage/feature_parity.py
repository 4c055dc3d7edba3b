"""Computes every live feature row again, from exactly the events that it could see, and compares the bits.

The cut of a feature row has, for each partition, the offset up to which it could see events.  Cuts only grow, so they
are ordered, and each event has a first cut that shows it (and, if a repeat that was known earlier replaced it, a first
cut that no longer does).  If no event that was known before a spine row arrived after its cut, the features over all
events equal those over the cut.  All such spine rows are computed at once, and the others cut by cut.  For the latter,
the feature rows that later arrivals would change are also counted.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl

from schemas.errors import DataError
from schemas.views import FeatureView, reached_from
from transforms.features.kernel import KernelTables, compute
from transforms.lineage.erasure_records import ERASURES_FOLDER, Erased
from transforms.lineage.visible_rows import VisibleRows, read_accepted, seen_of
from transforms.records.arrays import Bools, Ints
from transforms.records.row_hashing import row_ids
from transforms.sources.dead_letters import VIEW_DEAD_LETTERS
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import DataFile, data_files, open_table, read_file
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.live_dimensions import kept_version
from transforms.streaming.live_tables import (
    application_of,
    last_commit_record,
    of_version,
    read_dead_letters,
    read_feature_rows,
)
from transforms.streaming.pending_spine_rows import about_spine_rows
from transforms.streaming.progress import CommitRecord
from transforms.streaming.row_origin import ORIGIN_COLUMNS, cut_of

EXAMPLES = 3
# Feature rows computed at a time.
ROWS_AT_ONCE = 500_000


@dataclasses.dataclass
class Compared:
    """One feature: values compared, nulls on each side, values that differ or that later arrivals would change."""

    rows: int = 0
    nulls_live: int = 0
    nulls_batch: int = 0
    differing: int = 0
    changed_later: int = 0
    examples: list[dict[str, object]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Parity:
    """The result of a comparison.

    Args:
        features: the comparison of each feature.
        feature_rows: rows compared.
        cuts: distinct cuts among them.
        by_cut: feature rows that were computed by their own cut, since an event arrived after it.
        changed_later: how many of these have a value that later arrivals would change.
        uncomputed: spine rows that were accepted and have no feature row.
        unaccounted: how many of these are neither repeats nor dead letters, and were not pending at the last commit.
        erased: how many of these could see a row that was erased, so that their feature rows were erased too.
    """

    features: dict[str, Compared]
    feature_rows: int = 0
    cuts: int = 0
    by_cut: int = 0
    changed_later: int = 0
    uncomputed: int = 0
    unaccounted: int = 0
    erased: int = 0

    @property
    def differing(self) -> int:
        return sum(each.differing for each in self.features.values())


def check_parity(view: FeatureView, store: str, start: date | None = None, end: date | None = None) -> Parity:
    """Compares the live feature rows of `[start, end)` with batch.

    Raises:
        DataError: there are no feature rows.
    """
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table, start, end)
    if not files:
        raise DataError(
            f"View {view.name!r} must have live feature rows to compare",
            f"there are none in {store}",
            "Run: millrace features --streaming",
        )
    cuts = cuts_of(files)
    result = Parity({name: Compared() for name in view.columns}, cuts=len(cuts))
    for some in _by_dates(files):
        feature_rows = pl.concat([read_feature_rows(view, file) for file in some])
        for (versions,), part in feature_rows.group_by("__dimensions"):
            dimensions = {
                name: kept_version(FileSystems.join(store, "dimensions"), name, version)
                for name, version in json.loads(str(versions)).items()
            }
            _check_rows(view, store, part, cuts, dimensions, result)
    spine_rows = accepted_spine_rows(view, store, start, end)
    result.uncomputed = len(spine_rows.unique(ORIGIN_COLUMNS)) - result.feature_rows
    result.erased, result.unaccounted = uncomputed_spine_rows(view, store, spine_rows, files)
    return result


def uncomputed_spine_rows(
    view: FeatureView, store: str, spine_rows: pl.DataFrame, files: Sequence[DataFile]
) -> tuple[int, int]:
    """Of accepted spine rows without a feature row that are no repeats and not rejected: how many had one that was
    erased, and how many of the others were not pending at the last commit.

    Args:
        view: the view.
        store: the live store.
        spine_rows: see `accepted_spine_rows`.
        files: of the live feature table.
    """
    parts = [pl.DataFrame(pl.from_arrow(read_file(file, ["row_id"]))) for file in files]
    computed = pl.concat([pl.DataFrame(schema={"row_id": pl.Int64}), *parts])
    left = spine_rows.join(computed, on="row_id", how="anti").join(
        rejected_spine_rows(view, store), on=ORIGIN_COLUMNS, how="anti"
    )
    gone = Erased.of(store).has(left)
    left = left.join(gone, on="row_id", how="anti")
    return gone["row_id"].n_unique(), max(left["row_id"].n_unique() - pending(view, store), 0)


def unaccounted_after_erasures(view: FeatureView, store: str) -> int | None:
    """The number of spine rows that a live job has lost, where rows were erased from its store, so that its counts do
    not add up any more; None: nothing was erased.
    """
    if not os.path.isdir(os.path.join(store, ERASURES_FOLDER)):
        return None
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table)
    return uncomputed_spine_rows(view, store, accepted_spine_rows(view, store), files)[1]


def accepted_spine_rows(
    view: FeatureView, store: str, start: date | None = None, end: date | None = None
) -> pl.DataFrame:
    """The spine rows of `[start, end)` that a live job accepted from its topic and that keep the contract, with
    `row_id`.  Rows of its history are left out.
    """
    rows = read_accepted(view, store, view.spine.name, [*view.spine.schema, *ORIGIN_COLUMNS], start, end)
    rows = rows.filter(pl.col("__partition") >= 0)
    return rows.with_columns(row_ids(view.name, [rows[name] for name in (*view.key, view.time)]))


def topic_dead_letters(view: FeatureView, store: str) -> pl.DataFrame:
    """A live job's dead letters of rows that came from topics."""
    table = open_table(live_dead_letters_uri(store, view.name))
    files = [] if table is None else data_files(table)
    empty = pl.DataFrame(pl.from_arrow(VIEW_DEAD_LETTERS.empty_table()))
    return pl.concat([empty, *map(read_dead_letters, files)]).filter(pl.col("partition") >= 0, of_version(view))


def rejected_spine_rows(view: FeatureView, store: str) -> pl.DataFrame:
    """Origins of the spine rows that kept the contract and were then rejected."""
    dead_letters = topic_dead_letters(view, store).filter(about_spine_rows(), source=view.spine.name)
    return dead_letters.select(pl.col(name[2:]).alias(name) for name in ORIGIN_COLUMNS)


def pending(view: FeatureView, store: str) -> int:
    """The number of spine rows that were pending at the last commit."""
    tables = [(features_live_uri(store, view.name, view.fingerprint), view.name)]
    tables += [(source_uri(sources_root(store), name), name) for name in (view.spine.name, *view.events)]
    records = [last_commit_record(open_table(uri), application_of(name)) for uri, name in tables]
    newest = max(records, key=lambda each: int(each.get("turn", -1)))
    return CommitRecord.of_json(newest).of_view(view).pending


def cuts_of(files: Sequence[DataFile]) -> list[str]:
    """The distinct cuts of the feature rows in some files, in order."""
    parts = [pl.DataFrame(pl.from_arrow(read_file(file, ["__cut"]))) for file in files]
    texts = pl.concat(parts)["__cut"].unique().to_list() if parts else []
    return sorted(texts, key=lambda text: sum(cut_of(text).values()))


def _by_dates(files: Sequence[DataFile]) -> Iterator[list[DataFile]]:
    """Files in groups of whole dates of about `ROWS_AT_ONCE` rows."""
    group: list[DataFile] = []
    for file in files:
        if group and file.date != group[-1].date and sum(each.rows for each in group) >= ROWS_AT_ONCE:
            yield group
            group = []
        group.append(file)
    yield group


def _check_rows(
    view: FeatureView,
    store: str,
    feature_rows: pl.DataFrame,
    cuts: Sequence[str],
    dimensions: Mapping[str, pl.DataFrame],
    result: Parity,
) -> None:
    rank = {text: position for position, text in enumerate(cuts)}
    days = feature_rows["date"]
    first, last = days.min(), days.max()
    assert isinstance(first, date)
    assert isinstance(last, date)
    spine = read_accepted(
        view, store, view.spine.name, [*view.spine.schema, *ORIGIN_COLUMNS], first, last + timedelta(days=1)
    ).unique(ORIGIN_COLUMNS)
    spine_rows = feature_rows.select(*ORIGIN_COLUMNS, "__cut").join(
        spine, on=ORIGIN_COLUMNS, how="left", maintain_order="left"
    )
    if spine_rows[view.time].null_count():
        raise DataError(
            "The spine row of every feature row must be in its source's table",
            f"{spine_rows[view.time].null_count()} are not",
            "Was the table cleaned up?",
        )
    seen = {name: seen_of(view, store, name, cuts, first, last) for name in view.events}
    of_row = spine_rows["__cut"].replace_strict(rank, return_dtype=pl.Int64).to_numpy()
    moments = spine_rows[view.time].to_physical().to_numpy()
    disturbed = disturbed_by(seen.values(), moments, of_row)
    whole = _computed(
        view,
        spine_rows,
        {name: each.at(NEVER_REPEATED - 1, -NEVER_REPEATED, NEVER_REPEATED) for name, each in seen.items()},
        dimensions,
    )
    batch = whole
    if disturbed.any():
        parts, positions = [whole.filter(pl.Series(~disturbed))], [np.flatnonzero(~disturbed)]
        for cut in np.unique(of_row[disturbed]).tolist():
            rows = np.flatnonzero(disturbed & (of_row == cut))
            low, high = int(moments[rows].min()), int(moments[rows].max())
            tables = {name: each.at(cut, reached_from(view, name, low), high) for name, each in seen.items()}
            parts.append(_computed(view, spine_rows[rows], tables, dimensions))
            positions.append(rows)
        batch = pl.concat(parts)[np.argsort(np.concatenate(positions))]
    result.feature_rows += len(feature_rows)
    result.by_cut += int(disturbed.sum())
    changed = np.zeros(len(feature_rows), np.bool_)
    for name, compared in result.features.items():
        _compare(view, name, feature_rows, batch, compared)
        later = _differ(batch[name], whole[name])
        compared.changed_later += int(later.sum())
        changed |= later
    result.changed_later += int(changed.sum())


def disturbed_by(seen: Iterable[VisibleRows], moments: Ints, cuts: Ints) -> Bools:
    """Spine rows for which an event before their time began or ceased to count after their cut."""
    result = np.zeros(len(moments), np.bool_)
    for each in seen:
        if not len(each.moments):
            continue
        order = np.argsort(each.moments, kind="stable")
        latest = np.maximum.accumulate(each.latest[order])
        before = np.searchsorted(each.moments[order], moments, "left")
        result |= (before > 0) & (latest[np.maximum(before - 1, 0)] > cuts)
    return result


def _computed(
    view: FeatureView,
    spine_rows: pl.DataFrame,
    tables: Mapping[str, pl.DataFrame],
    dimensions: Mapping[str, pl.DataFrame],
) -> pl.DataFrame:
    return compute(view, spine_rows.select(list(view.spine.schema)), KernelTables({**dimensions, **tables}))


def _differ(left: pl.Series, right: pl.Series) -> Bools:
    """Where two columns differ in any bit; nulls are equal."""
    if left.dtype == pl.Float32:
        a, b = (side.fill_null(0).to_numpy().view(np.int32) for side in (left, right))
        return (a != b) | (left.is_null() != right.is_null()).to_numpy()
    return left.ne_missing(right).to_numpy()


def _compare(view: FeatureView, name: str, feature_rows: pl.DataFrame, batch: pl.DataFrame, result: Compared) -> None:
    live = feature_rows[name]
    wrong = _differ(live, batch[name])
    result.rows += len(live)
    result.nulls_live += live.null_count()
    result.nulls_batch += batch[name].null_count()
    result.differing += int(wrong.sum())
    for row in np.flatnonzero(wrong)[: max(EXAMPLES - len(result.examples), 0)].tolist():
        spine_row = {key: feature_rows[key][row] for key in (*view.key, view.time, "__cut")}
        result.examples.append({**spine_row, "live": live[row], "batch": batch[name][row]})
