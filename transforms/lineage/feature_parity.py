"""Batch and live agree to the bit: every live answer computed again, from exactly the events that it could see.

An answer's cut names, per partition, the offset it saw up to.  Cuts grow, so they have an order, and every event has a
first cut that shows it (and, if an earlier known repeat replaced it, a first one that no longer does).  Where nothing
known before a question came after its cut, the answer over everything is the answer over the cut, and one computation
serves all such questions; the others are computed cut by cut.  Those also tell which answers later arrivals would
change.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl

from schemas.errors import DataError
from schemas.views import FeatureView, reached_from
from transforms.features.kernel import KernelTables, compute
from transforms.lineage.visible_rows import NEVER, Bools, Ints, VisibleRows, read_accepted, seen_of
from transforms.records.row_hashing import row_ids
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS
from transforms.storage.delta_tables import DataFile, data_files, open_table, read_file
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.live_dimensions import kept
from transforms.streaming.live_tables import application_of, last_commit_record, read_answers
from transforms.streaming.row_origin import ORIGIN_COLUMNS, cut_of

EXAMPLES = 3
# Answers computed at a time.
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
    """What came of comparing.

    Args:
        features: per feature.
        answers: rows compared.
        cuts: distinct cuts among them.
        by_cut: answers that were computed by their own cut, since something came after it.
        changed_later: of these, answers of which later arrivals would change a value.
        unanswered: questions accepted but without an answer.
        unaccounted: of these, such as are no repeat, no dead letter, and did not wait when the job committed last.
    """

    features: dict[str, Compared]
    answers: int = 0
    cuts: int = 0
    by_cut: int = 0
    changed_later: int = 0
    unanswered: int = 0
    unaccounted: int = 0

    @property
    def differing(self) -> int:
        return sum(each.differing for each in self.features.values())


def check(view: FeatureView, store: str, start: date | None = None, end: date | None = None) -> Parity:
    """Compare the live answers to questions of `[start, end)` with batch.

    Raises:
        DataError: there are no answers.
    """
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table, start, end)
    if not files:
        raise DataError(
            f"View {view.name!r} has live answers to compare", f"none in {store}", "Run: millrace features --streaming"
        )
    cuts = cuts_of(files)
    result = Parity({name: Compared() for name in view.columns}, cuts=len(cuts))
    for some in _by_dates(files):
        answers = pl.concat([read_answers(view, file) for file in some])
        for (versions,), part in answers.group_by("__dimensions"):
            dimensions = {
                name: kept(FileSystems.join(store, "dimensions"), name, version)
                for name, version in json.loads(str(versions)).items()
            }
            _check_some(view, store, part, cuts, dimensions, result)
    asked = questions_of(view, store, start, end)
    result.unanswered = len(asked.unique(ORIGIN_COLUMNS)) - result.answers
    answered = pl.concat([pl.DataFrame(pl.from_arrow(read_file(file, ["row_id"]))) for file in files])
    left = asked.join(answered, on="row_id", how="anti").join(refused(view, store), on=ORIGIN_COLUMNS, how="anti")
    result.unaccounted = max(left["row_id"].n_unique() - pending(view, store), 0)
    return result


def questions_of(view: FeatureView, store: str, start: date | None = None, end: date | None = None) -> pl.DataFrame:
    """The questions of `[start, end)` that a live job took in from its topic, with `row_id`; what it was handed as
    history is none.
    """
    rows = read_accepted(view, store, view.spine.name, [*view.spine.schema, *ORIGIN_COLUMNS], start, end)
    rows = rows.filter(pl.col("__partition") >= 0)
    return rows.with_columns(row_ids(view.name, [rows[name] for name in (*view.key, view.time)]))


def letters_of(view: FeatureView, store: str) -> pl.DataFrame:
    """A live job's dead letters of rows that came from topics."""
    table = open_table(live_dead_letters_uri(store, view.name))
    files = [] if table is None else data_files(table)
    empty = pl.DataFrame(pl.from_arrow(LIVE_DEAD_LETTERS.empty_table()))
    parts = [
        pl.DataFrame(pl.from_arrow(read_file(file, LIVE_DEAD_LETTERS.names))).select(empty.columns) for file in files
    ]
    return pl.concat([empty, *parts]).filter(pl.col("partition") >= 0)


def of_questions() -> pl.Expr:
    """Letters about accepted rows of the spine that were not asked."""
    return pl.col("rule").str.contains("one key asks one question|no later than the spine's lateness")


def refused(view: FeatureView, store: str) -> pl.DataFrame:
    """Places of the questions that were accepted and set aside."""
    dead_letters = letters_of(view, store).filter(of_questions(), source=view.spine.name)
    return dead_letters.select(pl.col(name[2:]).alias(name) for name in ORIGIN_COLUMNS)


def pending(view: FeatureView, store: str) -> int:
    """Questions that waited when the job committed last."""
    tables = [(features_live_uri(store, view.name, view.fingerprint), view.name)]
    tables += [(source_uri(sources_root(store), name), name) for name in (view.spine.name, *view.events)]
    told = [last_commit_record(open_table(uri), application_of(name)) for uri, name in tables]
    newest = max(told, key=lambda each: int(each.get("turn", -1)))
    return int(newest.get("pending") or 0)


def cuts_of(files: Sequence[DataFile]) -> list[str]:
    """The distinct cuts of the answers in some files, in their order."""
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


def _check_some(
    view: FeatureView,
    store: str,
    answers: pl.DataFrame,
    cuts: Sequence[str],
    dimensions: Mapping[str, pl.DataFrame],
    result: Parity,
) -> None:
    rank = {text: position for position, text in enumerate(cuts)}
    days = answers["date"]
    first, last = days.min(), days.max()
    assert isinstance(first, date)
    assert isinstance(last, date)
    spine = read_accepted(
        view, store, view.spine.name, [*view.spine.schema, *ORIGIN_COLUMNS], first, last + timedelta(days=1)
    ).unique(ORIGIN_COLUMNS)
    asked = answers.select(*ORIGIN_COLUMNS, "__cut").join(spine, on=ORIGIN_COLUMNS, how="left", maintain_order="left")
    if asked[view.time].null_count():
        raise DataError(
            "Every answer's question is in its source's table",
            f"{asked[view.time].null_count()} are not",
            "Was the table cleaned up?",
        )
    seen = {name: seen_of(view, store, name, cuts, first, last) for name in view.events}
    of_row = asked["__cut"].replace_strict(rank, return_dtype=pl.Int64).to_numpy()
    moments = asked[view.time].to_physical().to_numpy()
    disturbed = disturbed_by(seen.values(), moments, of_row)
    whole = _computed(view, asked, {name: each.at(NEVER - 1, -NEVER, NEVER) for name, each in seen.items()}, dimensions)
    batch = whole
    if disturbed.any():
        parts, positions = [whole.filter(pl.Series(~disturbed))], [np.flatnonzero(~disturbed)]
        for cut in np.unique(of_row[disturbed]).tolist():
            rows = np.flatnonzero(disturbed & (of_row == cut))
            low, high = int(moments[rows].min()), int(moments[rows].max())
            tables = {name: each.at(cut, reached_from(view, name, low), high) for name, each in seen.items()}
            parts.append(_computed(view, asked[rows], tables, dimensions))
            positions.append(rows)
        batch = pl.concat(parts)[np.argsort(np.concatenate(positions))]
    result.answers += len(answers)
    result.by_cut += int(disturbed.sum())
    changed = np.zeros(len(answers), np.bool_)
    for name, compared in result.features.items():
        _compare(view, name, answers, batch, compared)
        later = _differ(batch[name], whole[name])
        compared.changed_later += int(later.sum())
        changed |= later
    result.changed_later += int(changed.sum())


def disturbed_by(seen: Iterable[VisibleRows], moments: Ints, cuts: Ints) -> Bools:
    """Questions before whose time an event lies whose standing changed after their cut."""
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
    view: FeatureView, asked: pl.DataFrame, tables: Mapping[str, pl.DataFrame], dimensions: Mapping[str, pl.DataFrame]
) -> pl.DataFrame:
    return compute(view, asked.select(list(view.spine.schema)), KernelTables({**dimensions, **tables}))


def _differ(left: pl.Series, right: pl.Series) -> Bools:
    """Where two columns differ in a bit; nulls are equal."""
    if left.dtype == pl.Float32:
        a, b = (side.fill_null(0).to_numpy().view(np.int32) for side in (left, right))
        return (a != b) | (left.is_null() != right.is_null()).to_numpy()
    return left.ne_missing(right).to_numpy()


def _compare(view: FeatureView, name: str, answers: pl.DataFrame, batch: pl.DataFrame, result: Compared) -> None:
    live = answers[name]
    wrong = _differ(live, batch[name])
    result.rows += len(live)
    result.nulls_live += live.null_count()
    result.nulls_batch += batch[name].null_count()
    result.differing += int(wrong.sum())
    for row in np.flatnonzero(wrong)[: max(EXAMPLES - len(result.examples), 0)].tolist():
        spine_row = {key: answers[key][row] for key in (*view.key, view.time, "__cut")}
        result.examples.append({**spine_row, "live": live[row], "batch": batch[name][row]})
