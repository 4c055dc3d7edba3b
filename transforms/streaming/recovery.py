"""Going on after a stop, with nothing but the tables: what was accepted, what was answered, and where to read on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import polars as pl

from schemas.live import accepted, repeats_by
from schemas.views import FeatureView
from transforms.records.row_hashing import row_ids
from transforms.records.times import ALWAYS, FOREVER, day_of
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY, Beginnings, of_topic
from transforms.streaming.history import batch_record, recorded
from transforms.streaming.journal import KNOWN_SPINE_ROWS, PENDING, Journal, Turn
from transforms.streaming.lifetime_store import LifetimeStore
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.messages import ORIGIN
from transforms.streaming.micro_batches import ORIGIN_COLUMNS, digest, known_columns, row_identity
from transforms.streaming.replay import sources_of
from transforms.streaming.shards import RID

# Rows given to the shards in one turn.
SEED_ROWS = 200_000
# Times beyond these (the years 1899 and 9999) have no date in Python.
EARLIEST, LATEST = -(2**51), 253_402_214_400_000_000


@dataclasses.dataclass(frozen=True)
class RecoveryPoint:
    """Where a job begins: the last turn, next offset per source and partition, and what the tables said of the clock."""

    turn: int
    next: dict[str, dict[str, int]]
    completeness: dict[str, Any]
    counts: dict[str, dict[str, int]]
    versions: dict[str, int]
    beginnings: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find_recovery_point(
    view: FeatureView, store: str, begin: Mapping[str, Mapping[int, int]], beginnings: Beginnings | None = None
) -> RecoveryPoint:
    """Where to go on: after the last commit of each source, or at `begin` (first offsets of the partitions) where there is none.

    What was handed over as history is there as partition −1.  `beginnings`: where the sources' rows begin, None: as the tables say.
    """
    if beginnings is None:
        beginnings = recorded(view, store, {name: batch_record(view, store, name) for name in sources_of(view)})
    turn, offsets, completeness, counts, versions = 0, {}, {}, {}, {}
    for name in sources_of(view):
        table = open_table(source_uri(sources_root(store), name))
        record = last_commit_record(table, application_of(name))
        done = record.get("next", {}).get(name, {})
        offsets[name] = {str(number): int(done.get(str(number), first)) for number, first in begin[name].items()}
        if str(HISTORY) in done:
            offsets[name][str(HISTORY)] = int(done[str(HISTORY)])
        if record:
            assert table is not None
            versions[name] = int(table.version())
            completeness[name], counts[name] = record["clock"][name], record["counts"][name]
        turn = max(turn, record.get("turn", 0))
    answers = open_table(features_live_uri(store, view.name, view.fingerprint))
    turn = max(turn, last_commit_record(answers, application_of(view.name)).get("turn", 0))
    if answers is not None:
        versions["?answers"] = int(answers.version())
    return RecoveryPoint(turn, offsets, completeness, counts, versions, beginnings.to_json())


def restore_journal(journal: Journal, store: str, start: RecoveryPoint, now: int) -> list[Turn]:
    """Bring a new journal to where the tables stand; turns that give the shards what they need to know."""
    view = journal.view
    journal.turn_number, journal.began = start.turn, start.turn + 1
    journal.next = {name: {int(number): offset for number, offset in each.items()} for name, each in start.next.items()}
    journal.completeness.load(start.completeness)
    journal.counts.update({name: dict(each) for name, each in start.counts.items()})
    journal.beginnings = Beginnings.of_json(start.beginnings)
    for name, partitions in journal.next.items():
        for number in of_topic(partitions):  # nothing more is waited for of history
            journal.completeness.expect(name, number, now)
            journal.completeness.partitions[name][number].heard = now
    if view.spine.name in start.versions:
        _restore_pending(journal, store, start, now)
    journal.advance(now)
    return _seed(journal, store, start)


def hand_over(journal: Journal, store: str, start: RecoveryPoint) -> list[Turn]:
    """As `restore_journal`, of history alone: a replay sends all else again."""
    journal.beginnings = Beginnings.of_json(start.beginnings)
    journal.next = {
        name: {HISTORY: each[str(HISTORY)]} if str(HISTORY) in each else {} for name, each in start.next.items()
    }
    journal.advance(0)
    taken = {name: version for name, version in start.versions.items() if journal.next.get(name)}
    return _seed(journal, store, dataclasses.replace(start, versions=taken), only=HISTORY)


def _restore_pending(journal: Journal, store: str, start: RecoveryPoint, now: int) -> None:
    """Questions without an answer wait again; those with one are remembered."""
    view = journal.view
    watermark = journal.completeness.watermark(view.spine.name, now)
    record = last_commit_record(
        open_table(features_live_uri(store, view.name, view.fingerprint)), application_of(view.name)
    )
    # Before this no question was waiting when the answers were last committed.
    low = ALWAYS
    if record:
        oldest = record["oldest_pending"]
        committed_watermark = record["clock"][view.spine.name]["settled"]
        low = min(FOREVER if oldest is None else oldest, committed_watermark - journal.keep, watermark - journal.keep)
    spine_rows = rows_from(store, view, view.spine.name, start.versions[view.spine.name], low)
    spine_rows = spine_rows.filter(pl.col("__partition") >= 0)  # history asks nothing
    if not len(spine_rows):
        return
    spine_rows = spine_rows.with_columns(
        row_ids(view.name, [spine_rows[name] for name in (*view.key, view.time)]),
        digest(spine_rows, list(view.spine.schema)),
        (pl.col(view.time).to_physical() < watermark).alias("__late"),
        pl.col("__arrived").to_physical(),
    )
    refused = _dead_letters(store, view)
    spine_rows = (
        spine_rows.join(refused, on=ORIGIN_COLUMNS, how="anti")
        .sort(["row_id", *view.spine.schema, *ORIGIN_COLUMNS])
        .unique("row_id", keep="first", maintain_order=True)
    )
    waiting = spine_rows.join(_computed_ids(store, view, start, low), on="row_id", how="anti")
    columns = [*view.spine.schema, *ORIGIN, "row_id", "__digest", "__late"]
    journal.stores[PENDING].add(waiting.select(columns))
    journal.stores[KNOWN_SPINE_ROWS].add(
        spine_rows.select("row_id", pl.col(view.time).to_physical().alias("time"), "__digest")
    )


def _seed(journal: Journal, store: str, start: RecoveryPoint, only: int | None = None) -> list[Turn]:
    """Turns that give the shards every event that a window can still reach; what is older and still counts, compacted.

    `only`: of this partition.
    """
    view, turns = journal.view, []
    for name in view.events:
        if name not in start.versions:
            continue
        known = journal.horizon > ALWAYS
        low = journal.horizon - journal.remembered[name] if known else ALWAYS
        held = journal.horizon - journal.held_back[name] if known else ALWAYS
        rows, gone = rows_from(store, view, name, start.versions[name], low), pl.Series([], dtype=pl.Int64)
        if only is not None:
            rows = rows.filter(pl.col("__partition") == only)
        columns = view.columns_held(name)
        if repeats_by(view, name):
            far = ALWAYS if name in journal.lifetime or not known else low - journal.remembered[name]
            gone = _replaced(store, view, name, start.versions[name], far)
            rows = _counted(rows, gone)
            columns = [*columns, RID]
            journal.stores[name].add(rows.select(*known_columns(view, name), RID))
        moment = pl.col(str(view.events[name].time)).to_physical()
        rows = rows.select(columns).filter(moment >= held)
        turns += [journal.seed(name, rows.slice(begin, SEED_ROWS)) for begin in range(0, len(rows), SEED_ROWS)]
        if name in journal.lifetime and known:
            turns += _seed_compacted(journal, store, name, start.versions[name], held, gone, only)
    return turns


def _seed_compacted(
    journal: Journal, store: str, name: str, version: int, until: int, gone: pl.Series, only: int | None = None
) -> Iterator[Turn]:
    """Turns that give the shards what they keep of all a source's events before `until` µs, read date by date."""
    view = journal.view
    found = {
        i: LifetimeStore(view, group.features, group.kind, i)
        for i, group in enumerate(journal.groups)
        if group.source == name and group.kind != "none"
    }
    moment, columns = pl.col(str(view.events[name].time)).to_physical(), view.columns_held(name)
    if repeats_by(view, name):
        columns = [*columns, "__counted"]
    columns = [*columns, *ORIGIN_COLUMNS]
    for rows in pieces_from(store, view, name, version, end=until, columns=columns):
        older = rows.filter(moment < until)
        if only is not None:
            older = older.filter(pl.col("__partition") == only)
        if repeats_by(view, name):
            older = _counted(older, gone)
        for i, each in found.items():
            each.restore(i, each.reduced(older))
    for i, each in found.items():
        whole = each.whole()
        for begin in range(0, len(whole), SEED_ROWS):
            yield journal.seed_compacted(i, whole.slice(begin, SEED_ROWS))


def _counted(rows: pl.DataFrame, gone: pl.Series) -> pl.DataFrame:
    """Those rows that counted and still do, with their identity."""
    return rows.with_columns(row_identity(rows)).filter(pl.col("__counted") & ~pl.col(RID).is_in(gone.implode()))


def _replaced(store: str, view: FeatureView, source: str, version: int, low: int) -> pl.Series:
    """Identities of rows that counted until a repeat came, however late, that was known earlier, though not before `low` µs."""
    parts = pieces_from(store, view, source, version, low, columns=["__instead"])
    found = [part["__instead"].drop_nulls() for part in parts]
    return pl.concat([pl.Series("__instead", [], pl.Int64), *found])


def rows_from(store: str, view: FeatureView, source: str, version: int, low: int) -> pl.DataFrame:
    """Accepted rows of a source known from `low` µs on, as of a version of its table."""
    time = str(sources_of(view)[source].time)
    parts = pieces_from(store, view, source, version, low)
    empty = pl.DataFrame(pl.from_arrow(accepted(view, source).empty_table())).drop("date")
    return pl.concat([empty, *(part.filter(pl.col(time).to_physical() >= low) for part in parts)])


def pieces_from(
    store: str,
    view: FeatureView,
    source: str,
    version: int,
    low: int = ALWAYS,
    end: int = FOREVER,
    columns: Sequence[str] | None = None,
) -> Iterator[pl.DataFrame]:
    """Accepted rows of the dates that have times in `[low, end)` µs, by date, some `SEED_ROWS` at once.

    Args:
        store, view, source: whose.
        version: of the source's table.
        low, end: see above.
        columns: None: all but the date.
    """
    table = open_table(source_uri(sources_root(store), source), version)
    assert table is not None
    wanted = list(columns or [name for name in accepted(view, source).names if name != "date"])
    after = None if end > LATEST else day_of(max(end, EARLIEST)) + timedelta(days=1)
    held: list[pl.DataFrame] = []
    for file in data_files(table, _day(low), after):
        held.append(pl.DataFrame(pl.from_arrow(read_file(file, wanted))).select(wanted))
        if sum(map(len, held)) >= SEED_ROWS:
            yield pl.concat(held)
            held = []
    if held:
        yield pl.concat(held)


def _computed_ids(store: str, view: FeatureView, start: RecoveryPoint, low: int) -> pl.DataFrame:
    """Ids of the answers in the table."""
    none = pl.DataFrame(schema={"row_id": pl.Int64})
    if "?answers" not in start.versions:
        return none
    table = open_table(features_live_uri(store, view.name, view.fingerprint), start.versions["?answers"])
    assert table is not None
    files = data_files(table, _day(low))
    return pl.concat([none, *(pl.DataFrame(pl.from_arrow(read_file(file, ["row_id"]))) for file in files)])


def _dead_letters(store: str, view: FeatureView) -> pl.DataFrame:
    """Places of the questions that were set aside."""
    none = pl.DataFrame(schema={name: ORIGIN[name] for name in ORIGIN_COLUMNS})
    table = open_table(live_dead_letters_uri(store, view.name))
    if table is None:
        return none
    read = [
        pl.DataFrame(pl.from_arrow(read_file(file, ["source", "partition", "offset", "place"])))
        for file in data_files(table)
    ]
    return pl.concat(
        [
            none,
            *(
                part.filter(pl.col("source") == view.spine.name).select(
                    pl.col(name[2:]).alias(name) for name in ORIGIN_COLUMNS
                )
                for part in read
            ),
        ]
    )


def _day(low: int) -> date | None:
    """The date to read from; None: all there are."""
    return None if low <= EARLIEST else day_of(min(low, LATEST))


def start_of(head: Mapping[str, Any]) -> RecoveryPoint:
    """`RecoveryPoint` of what `to_json` gave."""
    return RecoveryPoint(**json.loads(json.dumps(head)))
