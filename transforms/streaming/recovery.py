"""Recovery: a job continues from the tables alone, which show what was accepted and computed, and where to continue
reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import polars as pl

from schemas.live import joined_sources
from schemas.views import FeatureView
from transforms.records.times import ALWAYS, FOREVER
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.accepted_rows import SEED_ROWS, AcceptedRows, first_date
from transforms.streaming.beginnings import HISTORY_PARTITION, Beginnings, of_topic
from transforms.streaming.completeness import SourceCompleteness
from transforms.streaming.fates import RepeatMemory
from transforms.streaming.history import checked_record, recorded_beginnings
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.lifetime_store import LifetimeStore
from transforms.streaming.live_tables import (
    features_record,
    features_table,
    of_version,
    read_dead_letters,
    source_record,
)
from transforms.streaming.messages import ORIGIN_TYPES
from transforms.streaming.pending_spine_rows import about_spine_rows, identified
from transforms.streaming.progress import RecoveryPoint, version_name
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, row_identity
from transforms.streaming.view_journal import REJECTED, ViewJournal


def find_recovery_point(
    views: Sequence[FeatureView],
    store: str,
    begin: Mapping[str, Mapping[int, int]],
    beginnings: Beginnings | None = None,
) -> RecoveryPoint:
    """The point from which a job continues: after the last commit of each source.

    Args:
        views: the views of the job.
        store: the folder of the tables.
        begin: first offset by source and partition, for sources without a commit.
        beginnings: the times from which the store has the rows of each source; None: as the tables record them.
    """
    sources = joined_sources(views)
    if beginnings is None:
        beginnings = recorded_beginnings(sources, store, {name: checked_record(store, name) for name in sources})
    tables = {version_name(view): features_table(view, store) for view in views}
    records = [features_record(view, store) for view in views]
    turn, offsets = max((each.turn for each in records if each is not None), default=0), dict[str, dict[int, int]]()
    completeness, counts = dict[str, SourceCompleteness](), dict[str, Mapping[str, int]]()
    versions, memory = dict[str, int](), dict[str, RepeatMemory]()
    by_view = {version_name(view): dict[str, Mapping[str, int]]() for view in views}
    for name in sources:
        record, committed = source_record(store, name), dict[int, int]()
        if record is not None:
            table = open_table(source_uri(sources_root(store), name))
            assert table is not None
            versions[name] = int(table.version())
            completeness[name], counts[name] = record.completeness[name], record.counts_of(name)
            for view in views:
                by_view[version_name(view)][name] = record.of_view(view).counts.get(name, {})
            if name in record.memory:
                memory[name] = record.memory[name]
            committed, turn = dict(record.next_of(name)), max(turn, record.turn)
        offsets[name] = {number: committed.get(number, first) for number, first in begin[name].items()}
        if HISTORY_PARTITION in committed:
            offsets[name][HISTORY_PARTITION] = committed[HISTORY_PARTITION]
    features = {name: int(table.version()) for name, table in tables.items() if table is not None}
    return RecoveryPoint(turn, offsets, completeness, counts, versions, beginnings, features, memory, by_view)


def restore_journal(journal: Journal, store: str, start: RecoveryPoint, now: int) -> list[Turn]:
    """Brings a new journal to the state of the tables.

    Returns:
        Turns that send the shards the events that they hold.
    """
    journal.turn_number, journal.began = start.turn, start.turn + 1
    journal.next = {name: dict(each) for name, each in start.next.items()}
    journal.completeness.restore(start.completeness)
    journal.counts.update({name: dict(each) for name, each in start.counts.items()})
    journal.beginnings = start.beginnings
    journal.remember(start.memory, start.next)
    for name, partitions in journal.next.items():
        for number in of_topic(partitions):  # history is never waited for
            journal.completeness.expect(name, number, now)
            journal.completeness.partitions[name][number].heard = now
    for part in journal.parts:
        counts = start.views.get(version_name(part.view), {})
        part.counts.update({name: dict(each) for name, each in counts.items()})
        if part.view.spine.name in start.versions:
            _restore_spine_rows(journal, part, store, start, now)
    journal.advance(now)
    return _seed_shards(journal, store, start)


def hand_over(journal: Journal, store: str, start: RecoveryPoint) -> list[Turn]:
    """As `restore_journal`, but with the rows of history alone: a replay sends all others again."""
    journal.beginnings = start.beginnings
    journal.next = {
        name: {HISTORY_PARTITION: each[HISTORY_PARTITION]} if HISTORY_PARTITION in each else {}
        for name, each in start.next.items()
    }
    journal.remember(start.memory, start.next)
    journal.advance(0)
    versions = {name: version for name, version in start.versions.items() if journal.next.get(name)}
    return _seed_shards(journal, store, dataclasses.replace(start, versions=versions), partition=HISTORY_PARTITION)


# -- spine rows --------------------------------------------------------------------------------------------------


def _restore_spine_rows(journal: Journal, part: ViewJournal, store: str, start: RecoveryPoint, now: int) -> None:
    """Spine rows without a feature row are pending again; those with one are known."""
    view, spine = part.view, part.view.spine.name
    watermark = journal.completeness.watermark(spine, now)
    low = _oldest_needed(part, store, watermark)
    spine_rows = AcceptedRows(view, store, spine, start.versions[spine]).since(low)
    spine_rows = spine_rows.filter(pl.col("__partition") >= 0)  # no features are computed for rows of history
    if low == ALWAYS:
        part.counts[spine] = {REJECTED: _topic_rows(journal, store, spine, start) - len(spine_rows)}
    if not len(spine_rows):
        return
    spine_rows = identified(view, spine_rows).with_columns(
        (pl.col(view.time).to_physical() < watermark).alias("__late"), pl.col("__arrived").to_physical()
    )
    kept = spine_rows.join(_rejected(store, view), on=ORIGIN_COLUMNS, how="anti")
    distinct = kept.sort(["row_id", *view.spine.schema, *ORIGIN_COLUMNS]).unique(
        "row_id", keep="first", maintain_order=True
    )
    if low == ALWAYS:  # the view has no feature rows yet, so it may be new to the store
        part.counts[spine] |= {"too_late": len(spine_rows) - len(kept), "repeated": len(kept) - len(distinct)}
    pending = distinct.join(_computed_ids(store, view, start, low), on="row_id", how="anti")
    part.spine_rows.restore(pending.select(*view.spine.schema, *ORIGIN_TYPES, "row_id", "__digest", "__late"), distinct)


def _topic_rows(journal: Journal, store: str, name: str, start: RecoveryPoint) -> int:
    """Number of rows that were accepted from the topic of a source."""
    table = open_table(source_uri(sources_root(store), name), start.versions[name])
    assert table is not None
    return sum(file.rows for file in data_files(table)) - journal.next[name].get(HISTORY_PARTITION, 0)


def _oldest_needed(part: ViewJournal, store: str, watermark: int) -> int:
    """The time (µs) before which no spine row was pending when feature rows were last committed."""
    record = features_record(part.view, store)
    if record is None:
        return ALWAYS
    pending = record.of_view(part.view).oldest_pending
    oldest = FOREVER if pending is None else pending
    committed_watermark = record.completeness[part.view.spine.name].watermark
    return min(oldest, committed_watermark - part.keep, watermark - part.keep)


def _rejected(store: str, view: FeatureView) -> pl.DataFrame:
    """The origins of spine rows that kept the contract and were rejected all the same."""
    rejected = [pl.DataFrame(schema={name: ORIGIN_TYPES[name] for name in ORIGIN_COLUMNS})]
    table = open_table(live_dead_letters_uri(store, view.name))
    for file in () if table is None else data_files(table):
        rows = read_dead_letters(file).filter(about_spine_rows(), of_version(view), source=view.spine.name)
        rejected.append(rows.select(pl.col(name.removeprefix("__")).alias(name) for name in ORIGIN_COLUMNS))
    return pl.concat(rejected)


def _computed_ids(store: str, view: FeatureView, start: RecoveryPoint, low: int) -> pl.DataFrame:
    """The ids of feature rows from `low` µs on."""
    ids = [pl.DataFrame(schema={"row_id": pl.Int64})]
    version = start.features.get(version_name(view))
    if version is not None:
        table = open_table(features_live_uri(store, view.name, view.fingerprint), version)
        assert table is not None
        files = data_files(table, first_date(low))
        ids += [pl.DataFrame(pl.from_arrow(read_file(file, ["row_id"]))) for file in files]
    return pl.concat(ids)


# -- events ------------------------------------------------------------------------------------------------------


def _seed_shards(journal: Journal, store: str, start: RecoveryPoint, partition: int | None = None) -> list[Turn]:
    """Turns that send the shards every event that a window can still reach, and compacted older ones.

    Args:
        journal: the journal; it also receives the events that a repeat may replace.
        store: the folder of the tables.
        start: only sources with a version are sent.
        partition: only events of this partition are sent; None: of all partitions.
    """
    turns: list[Turn] = []
    for part in journal.parts:
        for name in part.view.events:
            if name in start.versions:
                rows = AcceptedRows(part.view, store, name, start.versions[name], partition)
                turns += _seed_source(journal, part, rows)
    return turns


def _seed_source(journal: Journal, part: ViewJournal, accepted: AcceptedRows) -> Iterator[Turn]:
    view, name, reach = part.view, accepted.source, journal.reach[accepted.source]
    known = journal.horizon > ALWAYS
    held = journal.horizon - journal.context.held_back(name) if known else ALWAYS
    low, replaced = held, pl.Series([], dtype=pl.Int64)
    if accepted.repeats:
        memory = journal.memory[name]
        low = journal.horizon - reach.remembered(memory.length) if known else ALWAYS
        everything = name in part.lifetime or not known
        replaced = accepted.replaced(ALWAYS if everything else low - memory.length, memory)
    rows = accepted.since(low)
    columns = view.columns_held(name)
    if accepted.repeats:
        rows, columns = rows.with_columns(row_identity(rows)), [*columns, RID]
        counts = accepted.counts(rows, journal.memory[name], replaced)
        compared = ~rows["__uncompared"].fill_null(False)
        part.repeats[name].restore(rows.filter(compared), counts.filter(compared))
        rows = rows.filter(counts)
    time = pl.col(str(view.events[name].time)).to_physical()
    rows = rows.select(columns).filter(time >= held)
    for begin in range(0, len(rows), SEED_ROWS):
        yield journal.seed(part, name, rows.slice(begin, SEED_ROWS))
    if name in part.lifetime and known:
        yield from _seed_compacted(journal, part, accepted, held, replaced)


def _seed_compacted(
    journal: Journal, part: ViewJournal, accepted: AcceptedRows, until: int, replaced: pl.Series
) -> Iterator[Turn]:
    """Turns that send the shards a source's events from before `until` µs, compacted.

    Args:
        journal: the journal.
        part: its part for the view.
        accepted: the accepted rows of the source, which are read date by date.
        until: see above.
        replaced: identities of events that an earlier version of Millrace replaced.
    """
    view, name = part.view, accepted.source
    compacted = {
        i: LifetimeStore(view, group.features, group.kind, i)
        for i, group in enumerate(part.groups)
        if group.source == name and group.kind != "none"
    }
    time = pl.col(str(view.events[name].time)).to_physical()
    for rows in accepted.counted(until, journal.memory.get(name, RepeatMemory()), replaced):
        older = rows.filter(time < until)
        for i, each in compacted.items():
            each.restore(i, each.reduced(older))
    for i, each in compacted.items():
        whole = each.whole()
        for begin in range(0, len(whole), SEED_ROWS):
            yield journal.seed_compacted(part, i, whole.slice(begin, SEED_ROWS))
