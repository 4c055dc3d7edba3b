"""Recovery: a job continues from the tables alone, which show what was accepted and computed, and where to continue
reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import polars as pl

from schemas.live import live_sources
from schemas.views import FeatureView
from transforms.records.times import ALWAYS, FOREVER
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.accepted_rows import SEED_ROWS, AcceptedRows, first_date
from transforms.streaming.beginnings import HISTORY_PARTITION, Beginnings, of_topic
from transforms.streaming.completeness import SourceCompleteness
from transforms.streaming.fates import RepeatMemory, remembered
from transforms.streaming.history import checked_record, recorded_beginnings
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.lifetime_store import LifetimeStore
from transforms.streaming.live_tables import features_record, source_record
from transforms.streaming.messages import ORIGIN_TYPES
from transforms.streaming.pending_spine_rows import about_spine_rows, identified
from transforms.streaming.progress import RecoveryPoint
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, row_identity


def find_recovery_point(
    view: FeatureView, store: str, begin: Mapping[str, Mapping[int, int]], beginnings: Beginnings | None = None
) -> RecoveryPoint:
    """Finds where a job continues: after the last commit of each source.

    Args:
        view: the view.
        store: the folder of the tables.
        begin: first offset by source and partition, for sources without a commit.
        beginnings: the times from which the store has the rows of each source; None: as the tables record them.
    """
    if beginnings is None:
        beginnings = recorded_beginnings(
            view, store, {name: checked_record(view, store, name) for name in live_sources(view)}
        )
    features = features_record(view, store)
    turn, offsets = 0 if features is None else features.turn, dict[str, dict[int, int]]()
    completeness, counts = dict[str, SourceCompleteness](), dict[str, Mapping[str, int]]()
    versions, memory = dict[str, int](), dict[str, RepeatMemory]()
    for name in live_sources(view):
        record, committed = source_record(store, name), dict[int, int]()
        if record is not None:
            table = open_table(source_uri(sources_root(store), name))
            assert table is not None
            versions[name] = int(table.version())
            completeness[name], counts[name] = record.completeness[name], record.counts_of(name)
            if name in record.memory:
                memory[name] = record.memory[name]
            committed, turn = dict(record.next_of(name)), max(turn, record.turn)
        offsets[name] = {number: committed.get(number, first) for number, first in begin[name].items()}
        if HISTORY_PARTITION in committed:
            offsets[name][HISTORY_PARTITION] = committed[HISTORY_PARTITION]
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    features_version = None if table is None else int(table.version())
    return RecoveryPoint(turn, offsets, completeness, counts, versions, beginnings, features_version, memory)


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
        for number in of_topic(partitions):  # a job never waits for history
            journal.completeness.expect(name, number, now)
            journal.completeness.partitions[name][number].heard = now
    if journal.view.spine.name in start.versions:
        _restore_spine_rows(journal, store, start, now)
    journal.advance(now)
    return _seed_shards(journal, store, start)


def hand_over(journal: Journal, store: str, start: RecoveryPoint) -> list[Turn]:
    """As `restore_journal`, but only with the rows of history: a replay sends all others again."""
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


def _restore_spine_rows(journal: Journal, store: str, start: RecoveryPoint, now: int) -> None:
    """Spine rows without a feature row are pending again; those with one are known."""
    view, spine = journal.view, journal.view.spine.name
    watermark = journal.completeness.watermark(spine, now)
    low = _oldest_needed(journal, store, watermark)
    spine_rows = AcceptedRows(view, store, spine, start.versions[spine]).since(low)
    spine_rows = spine_rows.filter(pl.col("__partition") >= 0)  # no features are computed for rows of history
    if not len(spine_rows):
        return
    spine_rows = identified(view, spine_rows).with_columns(
        (pl.col(view.time).to_physical() < watermark).alias("__late"), pl.col("__arrived").to_physical()
    )
    spine_rows = (
        spine_rows.join(_rejected(store, view), on=ORIGIN_COLUMNS, how="anti")
        .sort(["row_id", *view.spine.schema, *ORIGIN_COLUMNS])
        .unique("row_id", keep="first", maintain_order=True)
    )
    pending = spine_rows.join(_computed_ids(store, view, start, low), on="row_id", how="anti")
    journal.spine_rows.restore(
        pending.select(*view.spine.schema, *ORIGIN_TYPES, "row_id", "__digest", "__late"), spine_rows
    )


def _oldest_needed(journal: Journal, store: str, watermark: int) -> int:
    """The time (µs) before which no spine row was pending when feature rows were last committed."""
    record = features_record(journal.view, store)
    if record is None:
        return ALWAYS
    oldest = FOREVER if record.oldest_pending is None else record.oldest_pending
    committed_watermark = record.completeness[journal.view.spine.name].watermark
    return min(oldest, committed_watermark - journal.keep, watermark - journal.keep)


def _rejected(store: str, view: FeatureView) -> pl.DataFrame:
    """The origins of spine rows that kept the contract and were rejected all the same."""
    rejected = [pl.DataFrame(schema={name: ORIGIN_TYPES[name] for name in ORIGIN_COLUMNS})]
    table = open_table(live_dead_letters_uri(store, view.name))
    for file in () if table is None else data_files(table):
        rows = pl.DataFrame(pl.from_arrow(read_file(file, ["source", "partition", "offset", "place", "rule"])))
        rows = rows.filter(about_spine_rows(), source=view.spine.name)
        rejected.append(rows.select(pl.col(name.removeprefix("__")).alias(name) for name in ORIGIN_COLUMNS))
    return pl.concat(rejected)


def _computed_ids(store: str, view: FeatureView, start: RecoveryPoint, low: int) -> pl.DataFrame:
    """The ids of feature rows from `low` µs on."""
    ids = [pl.DataFrame(schema={"row_id": pl.Int64})]
    if start.features_version is not None:
        table = open_table(features_live_uri(store, view.name, view.fingerprint), start.features_version)
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
    for name in journal.view.events:
        if name in start.versions:
            rows = AcceptedRows(journal.view, store, name, start.versions[name], partition)
            turns += _seed_source(journal, rows)
    return turns


def _seed_source(journal: Journal, accepted: AcceptedRows) -> Iterator[Turn]:
    view, name = journal.view, accepted.source
    known = journal.horizon > ALWAYS
    held = journal.horizon - journal.held_back(name) if known else ALWAYS
    low, replaced = held, pl.Series([], dtype=pl.Int64)
    if accepted.repeats:
        memory = journal.memory[name]
        low = journal.horizon - remembered(view, name, memory.length) if known else ALWAYS
        everything = name in journal.lifetime or not known
        replaced = accepted.replaced(ALWAYS if everything else low - memory.length, memory)
    rows = accepted.since(low)
    columns = view.columns_held(name)
    if accepted.repeats:
        rows, columns = rows.with_columns(row_identity(rows)), [*columns, RID]
        counts = accepted.counts(rows, journal.memory[name], replaced)
        compared = ~rows["__uncompared"].fill_null(False)
        journal.repeats[name].restore(rows.filter(compared), counts.filter(compared))
        rows = rows.filter(counts)
    time = pl.col(str(view.events[name].time)).to_physical()
    rows = rows.select(columns).filter(time >= held)
    for begin in range(0, len(rows), SEED_ROWS):
        yield journal.seed(name, rows.slice(begin, SEED_ROWS))
    if name in journal.lifetime and known:
        yield from _seed_compacted(journal, accepted, held, replaced)


def _seed_compacted(journal: Journal, accepted: AcceptedRows, until: int, replaced: pl.Series) -> Iterator[Turn]:
    """Turns that send the shards a source's events from before `until` µs, compacted.

    Args:
        journal: the journal.
        accepted: the accepted rows of the source, which are read date by date.
        until: see above.
        replaced: identities of events that an earlier version of Millrace replaced.
    """
    view, name = journal.view, accepted.source
    compacted = {
        i: LifetimeStore(view, group.features, group.kind, i)
        for i, group in enumerate(journal.groups)
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
            yield journal.seed_compacted(i, whole.slice(begin, SEED_ROWS))
