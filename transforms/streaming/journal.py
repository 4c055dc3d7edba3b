"""The journal: one order for everything that arrives, and the decision which spine rows can be computed when.

Micro-batches of all partitions arrive here.  In *turns* the journal admits them in order of offsets, accepts their
rows, advances the completeness watermark, and has each view sort the rows and send its shards what they need (see
`view_journal`).  Turns are numbered.  The *cut* of a turn is the next offset of every partition: it shows what the turn
could see, and is the same for all features of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import polars as pl

from schemas.live import joined_sources, repeats_by
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.columns import moments_of, with_series
from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS, message_dead_letters
from transforms.streaming.beginnings import BEFORE_START, Beginnings
from transforms.streaming.completeness import Completeness, CompletenessRule, SourceCompleteness
from transforms.streaming.fates import RepeatMemory, WindowReach
from transforms.streaming.micro_batches import MicroBatch, NextAvailable, admissible, no_topic
from transforms.streaming.progress import (
    CommitRecord,
    ViewRecord,
    completeness_of_json,
    completeness_to_json,
    memory_of_json,
    memory_to_json,
    offsets_of_json,
    offsets_to_json,
    version_name,
)
from transforms.streaming.repeats import Deduplicated
from transforms.streaming.row_origin import RID, row_identity
from transforms.streaming.step_messages import TurnEntry
from transforms.streaming.time_buckets import TimeBuckets, size_of
from transforms.streaming.view_journal import TurnContext, ViewJournal, ViewTurn

_NO_DEAD_LETTERS = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
Key = TypeVar("Key", int, str)


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """The output of a turn.

    Args:
        number: number of the turn.
        views: what it sends for the views, for one or for all of them.
        entry: what the turn accepted, for the tables.
    """

    number: int
    views: tuple[ViewTurn, ...]
    entry: TurnEntry


@dataclasses.dataclass(frozen=True)
class JournalCheckpoint:
    """The state of a journal apart from its `stores`.

    Args:
        turn: number of the last turn.
        began: number of the first turn of this launch.
        sent: by view, number of inputs that were sent to each shard.
        completeness: the state of completeness, by source.
        horizon: µs; see `Journal.advance`.
        counts: counts of rows by source and by what became of them.
        next: next offset by source and partition.
        beginnings: the times from which the store has the rows of each source.
        first: µs of the first rows of each partition, by source, while the beginning of the source is not known.
        memory: for how long repeats are recognised, by source with `unique`.
        views: by view, the rows that are counted for it (see `version_name`).
    """

    turn: int
    began: int
    sent: tuple[tuple[int, ...], ...]
    completeness: Mapping[str, SourceCompleteness]
    horizon: int
    counts: Mapping[str, Mapping[str, int]]
    next: Mapping[str, Mapping[int, int]]
    beginnings: Beginnings
    first: Mapping[str, Mapping[int, int]]
    memory: Mapping[str, RepeatMemory] = dataclasses.field(default_factory=dict)
    views: Mapping[str, Mapping[str, Mapping[str, int]]] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Head:
        return {
            "turn": self.turn,
            "began": self.began,
            "sent": [list(each) for each in self.sent] if len(self.sent) > 1 else list(self.sent[0]),
            "clock": completeness_to_json(self.completeness),
            "horizon": self.horizon,
            "counts": self.counts,
            "next": offsets_to_json(self.next),
            "beginnings": self.beginnings.to_json(),
            "first": offsets_to_json(self.first),
            **({"views": self.views} if self.views else {}),
            **memory_to_json(self.memory),
        }

    @classmethod
    def of_json(cls, value: Head) -> JournalCheckpoint:
        """The checkpoint of `to_json`, also of an earlier version, which had one view."""
        sent = value["sent"]
        return cls(
            value["turn"],
            value["began"],
            tuple(map(tuple, sent if sent and isinstance(sent[0], list) else [sent])),
            completeness_of_json(value["clock"]),
            value["horizon"],
            value["counts"],
            offsets_of_json(value["next"]),
            Beginnings.of_json(value.get("beginnings")),
            offsets_of_json(value.get("first", {})),
            memory_of_json(value.get("memory", {})),
            value.get("views", {}),
        )


class Journal:
    """See the module.  A plain Python object: `checkpoint` and `stores` are its state.

    Args:
        views: the views, the newest definition first.
        shards: number of shards of each view.
        keep: for how long (µs) after the watermark of the spine features are still computed for late spine rows.
    """

    def __init__(self, views: Sequence[FeatureView], shards: int, keep: int) -> None:
        self.views, self.keep = tuple(views), keep
        self.next_available: NextAvailable = no_topic
        self.sources: dict[str, Source] = joined_sources(self.views)
        self.completeness = Completeness({name: CompletenessRule.of(source) for name, source in self.sources.items()})
        self.turn_number, self.began = 0, 1
        self.next: dict[str, dict[int, int]] = {name: {} for name in self.sources}
        self.horizon = ALWAYS
        self.beginnings = Beginnings()
        self.first: dict[str, dict[int, int]] = {}
        self.counts: dict[str, dict[str, int]] = {name: {} for name in self.sources}
        self.reach = {name: WindowReach.of(self.views, name) for name in self.sources}
        self.parts = [
            ViewJournal(number, view, shards, keep, self.reach, self._count) for number, view in enumerate(self.views)
        ]
        self.memory: dict[str, RepeatMemory] = {}
        self.remember({}, {})

    # -- state to checkpoint -------------------------------------------------------------------------------------

    @property
    def stores(self) -> dict[str, TimeBuckets]:
        """All rows that it holds."""
        several = len(self.parts) > 1
        return {
            f"{part.number} {name}" if several else name: store
            for part in self.parts
            for name, store in part.stores.items()
        }

    def checkpoint(self) -> JournalCheckpoint:
        return JournalCheckpoint(
            turn=self.turn_number,
            began=self.began,
            sent=tuple(tuple(part.sent) for part in self.parts),
            completeness=self.completeness.state(),
            horizon=self.horizon,
            counts=_copied(self.counts),
            next=_copied(self.next),
            beginnings=self.beginnings,
            first=_copied(self.first),
            memory=self.memory,
            views={name: each.counts for name, each in self._view_records().items()},
        )

    def load(self, checkpoint: JournalCheckpoint) -> None:
        """Restores the state of `checkpoint`."""
        self.turn_number, self.began, self.horizon = checkpoint.turn, checkpoint.began, checkpoint.horizon
        for part, sent in zip(self.parts, checkpoint.sent, strict=True):
            part.sent = list(sent)
        self.completeness.restore(checkpoint.completeness)
        self.counts, self.next = _copied(checkpoint.counts), _copied(checkpoint.next)
        self.beginnings, self.first = checkpoint.beginnings, _copied(checkpoint.first)
        self.remember(checkpoint.memory, self.next)
        for part in self.parts:
            counts = checkpoint.views.get(version_name(part.view), checkpoint.counts)
            part.counts.update(_copied({name: each for name, each in counts.items() if name in part.counts}))

    def remember(self, recorded: Mapping[str, RepeatMemory], offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Recognises repeats for as long as the views need, and at least for as long as before.

        Args:
            recorded: the memory that earlier jobs recorded, by source.
            offsets: next offset by source and partition: from there on rows have a longer memory.
        """
        for name in dict.fromkeys(name for part in self.parts for name in part.repeats):
            least = self.reach[name].least_memory(self.keep)
            self.memory[name] = recorded.get(name, RepeatMemory()).grown(least, offsets.get(name, {}))
            for part in self.parts:
                if name in part.repeats:
                    part.repeats[name].memory = self.memory[name].length

    @property
    def context(self) -> TurnContext:
        """What the views need to know of the turn as it stands."""
        return TurnContext(self.turn_number, self.horizon, self.next, self.memory, self.reach, self.beginnings)

    # -- turns ---------------------------------------------------------------------------------------------------

    def admit(self, inbox: Sequence[MicroBatch], now: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """Micro-batches that are due, in order of offsets, and those that wait for an earlier one."""
        return admissible(inbox, self.next, now, self._count, self.next_available)

    def turn(self, admitted: Sequence[MicroBatch], now: int) -> Turn:
        """Applies the `admit`ted micro-batches, decides which spine rows can be computed, and numbers the turn."""
        self.turn_number += 1
        watermarks = {name: self.completeness.watermark(name, now) for name in self.sources}
        accepted, unreadable = self._accept(admitted, now)
        accepted = {name: self._compared(name, rows) for name, rows in accepted.items()}
        added = [part.add(accepted, watermarks, self.context) for part in self.parts]
        for _, _, fates in reversed(added):  # those of the newest definition are shown
            accepted |= {name: _with_fates(accepted[name], each) for name, each in fates.items()}
        for name in self.sources:
            self.completeness.watermark(name, now)
            self._find_beginning(name)
        ready = [part.spine_rows.take_until(part.bound(self.completeness, now)) for part in self.parts]
        self.advance(now)
        turns = [
            part.output(routing, self.context, some, dead_letters)
            for part, (routing, dead_letters, _), some in zip(self.parts, added, ready, strict=True)
        ]
        return self._output(turns, accepted, pl.concat([_NO_DEAD_LETTERS, *unreadable]))

    def seed(self, part: ViewJournal, name: str, rows: pl.DataFrame) -> Turn:
        """A turn that sends rows accepted earlier to the shards of a view; it counts nothing and moves no watermark."""
        self.turn_number += 1
        routing = part.routing()
        routing.add_events(name, rows)
        return self._output([part.output(routing, self.context)])

    def seed_compacted(self, part: ViewJournal, group: int, reduced: pl.DataFrame) -> Turn:
        """As `seed`, for the compacted older events of a group."""
        self.turn_number += 1
        routing = part.routing()
        routing.add_compacted(group, reduced)
        return self._output([part.output(routing, self.context)])

    # -- the steps of a turn -------------------------------------------------------------------------------------

    def _accept(self, admitted: Sequence[MicroBatch], now: int) -> tuple[dict[str, pl.DataFrame], list[pl.DataFrame]]:
        """Counts the rows of micro-batches, and records the promises of their partitions.

        Returns:
            The accepted rows by source, and dead letters.
        """
        rows: dict[str, list[pl.DataFrame]] = {name: [] for name in self.sources}
        dead_letters: list[pl.DataFrame] = []
        for micro_batch in admitted:
            fresh, bad = self._fresh(micro_batch)
            self._advance_partition(micro_batch, fresh, now)
            if len(fresh):
                rows[micro_batch.source].append(fresh)
                self._count(micro_batch.source, "rows", len(fresh))
            if len(bad):
                dead_letters.append(bad)
                self._count(micro_batch.source, "dead", len(bad))
        accepted = {
            name: parts[0].rechunk() if len(parts) == 1 else pl.concat(parts, rechunk=True)
            for name, parts in rows.items()
            if parts
        }
        for name in accepted:
            if not any(name == view.spine.name or repeats_by(view, name) for view in self.views):
                accepted[name], early = self._since_start(name, accepted[name])
                dead_letters += early
        return accepted, dead_letters

    def _fresh(self, micro_batch: MicroBatch) -> tuple[pl.DataFrame, pl.DataFrame]:
        """The rows and dead letters of a micro-batch that were not delivered before."""
        due = self.next[micro_batch.source].get(micro_batch.partition, micro_batch.first)
        if due <= micro_batch.first:
            return micro_batch.rows, micro_batch.dead_letters
        return micro_batch.rows.filter(pl.col("__offset") >= due), micro_batch.dead_letters.filter(
            pl.col("offset") >= due
        )

    def _advance_partition(self, micro_batch: MicroBatch, fresh: pl.DataFrame, now: int) -> None:
        """Records the next offset of a partition, and its promise."""
        source, partition = micro_batch.source, micro_batch.partition
        self.next[source][partition] = micro_batch.next
        self._count(source, "messages", micro_batch.messages)
        self.completeness.expect(source, partition, now)
        if len(fresh):
            times = moments_of(fresh, str(self.sources[source].time))
            self.completeness.observe(source, partition, int(times.max()), now)
            self._record_first(micro_batch, int(times.min()))
        if micro_batch.heartbeat is not None:
            self.completeness.promise(source, partition, micro_batch.heartbeat, now)
            if micro_batch.heartbeat < FOREVER:
                self._record_first(micro_batch, micro_batch.heartbeat)

    def _record_first(self, micro_batch: MicroBatch, moment: int) -> None:
        """Records the time of a partition's first rows, while the beginning of its source is not known."""
        if self.beginnings.of(micro_batch.source).since == FOREVER:
            self.first.setdefault(micro_batch.source, {}).setdefault(micro_batch.partition, moment)

    def _find_beginning(self, name: str) -> None:
        """Once all partitions of a source have sent a message, records the time from which none of its rows is
        missing."""
        beginning, first = self.beginnings.of(name), self.first.get(name)
        if beginning.since == FOREVER and first and self.completeness.known(name) > ALWAYS:
            since = max(*first.values(), ALWAYS) + self.completeness.rules[name].lateness
            since = since if beginning.start is None else max(since, beginning.start)
            self.beginnings = self.beginnings.with_source(name, dataclasses.replace(beginning, since=since))
            del self.first[name]

    def _since_start(self, name: str, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
        """The rows of a topic from the start of its source on, and dead letters for the others.

        Without `unique`, it cannot be known whether history also has the others.
        """
        start = self.beginnings.of(name).start
        if start is None:
            return rows, []
        time = str(self.sources[name].time)
        early = pl.col(time).to_physical() < start
        old = rows.filter(early)
        if not len(old):
            return rows, []
        self._count(name, BEFORE_START, len(old))
        rule = f"{BEFORE_START}: a source without unique takes rows from before its start from its history alone"
        return rows.filter(~early), [message_dead_letters(name, old, time, rule, pl.col(time).cast(pl.String))]

    def _compared(self, name: str, rows: pl.DataFrame) -> pl.DataFrame:
        """Accepted rows, with whether they come too late to be compared with others."""
        uncompared = np.zeros(len(rows), np.bool_)
        if name in self.memory and self.horizon > ALWAYS:
            bound = self.horizon - self.reach[name].comparison_span(self.memory[name].length)
            uncompared = moments_of(rows, str(self.sources[name].time)) < bound
        return with_series(rows, [pl.Series("__uncompared", uncompared)])

    def _output(
        self,
        turns: Sequence[ViewTurn],
        accepted: Mapping[str, pl.DataFrame] | None = None,
        unreadable: pl.DataFrame = _NO_DEAD_LETTERS,
    ) -> Turn:
        entry = TurnEntry(
            record=self._record(),
            began=self.began,
            spine_rows={each.view: len(each.spine_rows.rows) for each in turns if each.spine_rows is not None},
            state=size_of(self.stores.values()),
            accepted=accepted or {},
            unreadable=unreadable,
            dead_letters={each.view: each.dead_letters for each in turns if len(each.dead_letters)},
        )
        return Turn(self.turn_number, tuple(turns), entry)

    def _record(self) -> CommitRecord:
        views = self._view_records()
        oldest = [each.oldest_pending for each in views.values() if each.oldest_pending is not None]
        return CommitRecord(
            turn=self.turn_number,
            last=self.last,
            next=_copied(self.next),
            completeness=self.completeness.state(),
            pending=sum(each.pending for each in views.values()),
            oldest_pending=min(oldest, default=None),
            horizon=self.horizon,
            counts=_copied(self.counts),
            beginnings=self.beginnings,
            memory=dict(self.memory),
            views=views,
        )

    def _view_records(self) -> dict[str, ViewRecord]:
        return {version_name(part.view): part.record() for part in self.parts}

    # -- what can be computed, and what is still needed ----------------------------------------------------------

    @property
    def last(self) -> bool:
        """Whether every partition has reported its end."""
        return self.completeness.ended

    def answerable(self, now: int) -> bool:
        """Whether some pending spine row can be computed now."""
        return any(part.answerable(self.completeness, now) for part in self.parts)

    def advance(self, now: int) -> None:
        """Moves the horizon, and evicts what neither a pending spine row nor a future one can reach.

        No spine row from before the horizon will be computed.  It is that of the view that needs most.
        """
        watermarks = [self.completeness.watermark(part.view.spine.name, now) for part in self.parts]
        needed = min(part.needed(each) for part, each in zip(self.parts, watermarks, strict=True))
        self.horizon = max(self.horizon, self.beginnings.horizon, needed)
        for part, watermark in zip(self.parts, watermarks, strict=True):
            if watermark == ALWAYS:
                continue
            part.spine_rows.evict(watermark - self.keep)
            for name, each in part.repeats.items():
                each.store.evict(self.horizon - self.reach[name].remembered(each.memory))

    def _count(self, source: str, what: str, number: int) -> None:
        counts = self.counts[source]
        counts[what] = counts.get(what, 0) + number


def _with_fates(rows: pl.DataFrame, fates: Deduplicated) -> pl.DataFrame:
    """Accepted rows with columns that say whether each counts and which row it replaces."""
    if not fates.repeated and len(fates.counted) == len(rows):  # all of them count
        return with_series(
            rows,
            [
                pl.Series("__counted", [True]).new_from_index(0, len(rows)),
                pl.Series("__instead", [None], pl.Int64).new_from_index(0, len(rows)),
            ],
        )
    identities = row_identity(rows)
    replaced = fates.replaced.unique(RID, keep="first", maintain_order=True)  # a row can name only one
    return rows.with_columns(
        identities.is_in(fates.counted[RID].implode()).alias("__counted"),
        identities.to_frame().join(replaced, on=RID, how="left", maintain_order="left")["__instead"],
    )


def _copied(by_source: Mapping[str, Mapping[Key, int]]) -> dict[str, dict[Key, int]]:
    return {name: dict(each) for name, each in by_source.items()}
