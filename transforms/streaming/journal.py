"""The journal: puts everything that arrives into one order, and decides when each spine row can be computed.

Micro-batches of all partitions arrive here.  In *turns* the journal admits them in order of offsets, drops repeats,
advances the completeness watermark, and sends the spine rows whose sources are complete to the shards.  Turns are
numbered.  The *cut* of a turn is the next offset of every partition: it shows what the turn could see, and is the same
for all features of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import polars as pl

from schemas.live import repeats_by
from schemas.sources import Source
from schemas.views import FeatureView, lifetime_sources
from transforms.records.columns import moments_of, with_series
from transforms.records.frame_packets import Head
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS, message_dead_letters
from transforms.streaming.beginnings import BEFORE_START, Beginnings
from transforms.streaming.completeness import Completeness, CompletenessRule, SourceCompleteness
from transforms.streaming.fates import RepeatMemory, comparison_span, known_columns, least_memory, remembered
from transforms.streaming.groups import GroupKeys, held_back, shard_groups
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.messages import ORIGIN_TYPES
from transforms.streaming.micro_batches import MicroBatch, NextAvailable, admissible, no_topic
from transforms.streaming.pending_spine_rows import PendingSpineRows
from transforms.streaming.progress import (
    CommitRecord,
    completeness_of_json,
    completeness_to_json,
    memory_of_json,
    memory_to_json,
    offsets_of_json,
    offsets_to_json,
)
from transforms.streaming.repeats import Deduplicated, RepeatFinder
from transforms.streaming.routing import TurnRouting
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, cut_text, row_identity
from transforms.streaming.step_messages import ReadySpineRows, ShardInput, TurnEntry
from transforms.streaming.time_buckets import TimeBuckets, size_of
from transforms.streaming.view_contracts import contracts_of, sort_rows

# Every shard gets an input at least every so many turns, with the horizon up to which it evicts rows.
HORIZON_EVERY = 16
# Counts the accepted rows that break the view's contract.  They are dead letters, and counted as such too.
REJECTED = "rejected"
_NO_DEAD_LETTERS = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
Key = TypeVar("Key", int, str)


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """The output of a turn.

    Args:
        number: number of the turn.
        shards: the inputs of the shards, by their number.
        spine_rows: the spine rows to compute, for the assembly; None if there are none.
        entry: what the turn accepted, for the tables.
    """

    number: int
    shards: Mapping[int, ShardInput]
    spine_rows: ReadySpineRows | None
    entry: TurnEntry


@dataclasses.dataclass(frozen=True)
class JournalCheckpoint:
    """The state of a journal apart from its `stores`.

    Args:
        turn: number of the last turn.
        began: number of the first turn of this launch.
        sent: number of inputs that were sent to each shard.
        completeness: the state of completeness, by source.
        horizon: µs; see `Journal.advance`.
        counts: counts of rows by source and by what became of them.
        next: next offset by source and partition.
        beginnings: the times from which the store has the rows of each source.
        first: µs of the first rows of each partition, by source, while the beginning of the source is not known.
        memory: for how long repeats are recognised, by source with `unique`.
    """

    turn: int
    began: int
    sent: tuple[int, ...]
    completeness: Mapping[str, SourceCompleteness]
    horizon: int
    counts: Mapping[str, Mapping[str, int]]
    next: Mapping[str, Mapping[int, int]]
    beginnings: Beginnings
    first: Mapping[str, Mapping[int, int]]
    memory: Mapping[str, RepeatMemory] = dataclasses.field(default_factory=dict)

    def to_json(self) -> Head:
        return {
            "turn": self.turn,
            "began": self.began,
            "sent": list(self.sent),
            "clock": completeness_to_json(self.completeness),
            "horizon": self.horizon,
            "counts": self.counts,
            "next": offsets_to_json(self.next),
            "beginnings": self.beginnings.to_json(),
            "first": offsets_to_json(self.first),
            **memory_to_json(self.memory),
        }

    @classmethod
    def of_json(cls, value: Head) -> JournalCheckpoint:
        """The checkpoint of `to_json`, also of an earlier version."""
        return cls(
            value["turn"],
            value["began"],
            tuple(value["sent"]),
            completeness_of_json(value["clock"]),
            value["horizon"],
            value["counts"],
            offsets_of_json(value["next"]),
            Beginnings.of_json(value.get("beginnings")),
            offsets_of_json(value.get("first", {})),
            memory_of_json(value.get("memory", {})),
        )


class Journal:
    """See the module.  A plain Python object: `checkpoint` and `stores` are its state.

    Args:
        view: the view.
        shards: number of shards.
        keep: for how long (µs) after the watermark of the spine features are still computed for late spine rows.
    """

    def __init__(self, view: FeatureView, shards: int, keep: int) -> None:
        self.view, self.shards, self.keep = view, shards, keep
        self.next_available: NextAvailable = no_topic
        self.groups, self.lifetime = shard_groups(view), lifetime_sources(view)
        self.keys = GroupKeys.of(view)
        self.dimensions: Dimensions | None = None  # it is needed if some key comes from a Lookup
        self.sources: dict[str, Source] = {view.spine.name: view.spine, **view.events}
        self.contracts = contracts_of(view)
        self.completeness = Completeness({name: CompletenessRule.of(source) for name, source in self.sources.items()})
        self.turn_number, self.began = 0, 1
        self.sent = [0] * shards
        self.next: dict[str, dict[int, int]] = {name: {} for name in self.sources}
        self.horizon = ALWAYS
        self.beginnings = Beginnings()
        self.first: dict[str, dict[int, int]] = {}
        self.counts: dict[str, dict[str, int]] = {name: {} for name in self.sources}
        self.spine_rows = PendingSpineRows(view, keep, self._count)
        self.repeats = {name: RepeatFinder(view, name, 0) for name in view.events if repeats_by(view, name)}
        self.memory: dict[str, RepeatMemory] = {}
        self.remember({}, {})

    # -- state to checkpoint -------------------------------------------------------------------------------------

    @property
    def stores(self) -> dict[str, TimeBuckets]:
        """All rows that it holds."""
        return {**self.spine_rows.stores, **{name: each.store for name, each in self.repeats.items()}}

    def checkpoint(self) -> JournalCheckpoint:
        return JournalCheckpoint(
            turn=self.turn_number,
            began=self.began,
            sent=tuple(self.sent),
            completeness=self.completeness.state(),
            horizon=self.horizon,
            counts=_copied(self.counts),
            next=_copied(self.next),
            beginnings=self.beginnings,
            first=_copied(self.first),
            memory=self.memory,
        )

    def load(self, checkpoint: JournalCheckpoint) -> None:
        """Restores the state of `checkpoint`."""
        self.turn_number, self.began, self.horizon = checkpoint.turn, checkpoint.began, checkpoint.horizon
        self.sent = list(checkpoint.sent)
        self.completeness.restore(checkpoint.completeness)
        self.counts, self.next = _copied(checkpoint.counts), _copied(checkpoint.next)
        self.beginnings, self.first = checkpoint.beginnings, _copied(checkpoint.first)
        self.remember(checkpoint.memory, self.next)

    def remember(self, recorded: Mapping[str, RepeatMemory], offsets: Mapping[str, Mapping[int, int]]) -> None:
        """Recognises repeats for as long as the view needs, and at least for as long as before.

        Args:
            recorded: the memory of earlier jobs, by source.
            offsets: next offset by source and partition: from there on rows have a longer memory.
        """
        for name, each in self.repeats.items():
            least = least_memory(self.view, name, self.keep)
            self.memory[name] = recorded.get(name, RepeatMemory()).grown(least, offsets.get(name, {}))
            each.memory = self.memory[name].length

    def held_back(self, name: str) -> int:
        """For how long (µs) before the horizon shards hold the events of a source."""
        return held_back(self.view, name, self.memory[name].length if name in self.memory else 0)

    # -- turns ---------------------------------------------------------------------------------------------------

    def admit(self, inbox: Sequence[MicroBatch], now: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """Micro-batches that are due, in order of offsets, and those that wait for an earlier one."""
        return admissible(inbox, self.next, now, self._count, self.next_available)

    def turn(self, admitted: Sequence[MicroBatch], now: int) -> Turn:
        """Applies the `admit`ted micro-batches, decides which spine rows can be computed, and numbers the turn."""
        self.turn_number += 1
        watermarks = {name: self.completeness.watermark(name, now) for name in self.sources}
        accepted, dead_letters = self._accept(admitted, now)
        accepted = {name: self._compared(name, rows) for name, rows in accepted.items()}
        keeping = dict[str, pl.DataFrame]()
        for name, rows in accepted.items():
            keeping[name], broken = sort_rows(self.contracts[name], rows)
            dead_letters += broken
            for each in broken:
                self._count(name, "dead", len(each))
                self._count(name, REJECTED, len(each))
        routing = self._routing()
        for name in self.view.events:
            if name in keeping:
                fates = self._route_events(name, keeping[name], watermarks[name], routing)
                if fates is not None:
                    accepted[name] = _with_fates(accepted[name], fates)
        spine_rows = keeping.get(self.view.spine.name)
        if spine_rows is not None:
            watermark = watermarks[self.view.spine.name]
            asked = spine_rows[[*self.view.spine.schema, *ORIGIN_TYPES]]
            dead_letters += self.spine_rows.add(asked, watermark, self._oldest_allowed(watermark))
        for name in self.sources:
            self.completeness.watermark(name, now)
            self._find_beginning(name)
        ready = self.spine_rows.take_until(self.bound(now))
        self.advance(now)
        return self._output(routing, ready, accepted, pl.concat([_NO_DEAD_LETTERS, *dead_letters]))

    def seed(self, name: str, rows: pl.DataFrame) -> Turn:
        """A turn that sends rows accepted earlier to the shards; it counts nothing and moves no watermark."""
        self.turn_number += 1
        routing = self._routing()
        routing.add_events(name, rows)
        return self._output(routing)

    def seed_compacted(self, group: int, reduced: pl.DataFrame) -> Turn:
        """As `seed`, for the compacted older events of a group."""
        self.turn_number += 1
        routing = self._routing()
        routing.add_compacted(group, reduced)
        return self._output(routing)

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
        for name in self.view.events:
            if name in accepted and name != self.view.spine.name:
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
        if start is None or repeats_by(self.view, name):
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
        if name in self.repeats and self.horizon > ALWAYS:
            bound = self.horizon - comparison_span(self.view, name, self.memory[name].length)
            uncompared = moments_of(rows, str(self.sources[name].time)) < bound
        return with_series(rows, [pl.Series("__uncompared", uncompared)])

    def _route_events(self, name: str, rows: pl.DataFrame, watermark: int, routing: TurnRouting) -> Deduplicated | None:
        """Sends the new events of a source to the shards, and retracts events that a repeat replaces.

        Returns:
            The fates of the rows of a source with `unique`; None of another source.
        """
        fates = None
        late = int((moments_of(rows, str(self.sources[name].time)) < watermark).sum())
        if late:
            self._count(name, "late", late)
        if name in self.repeats:
            columns = list(dict.fromkeys([*known_columns(self.view, name), *ORIGIN_COLUMNS]))
            rows = rows[columns].hstack([row_identity(rows)])
            fates = self.repeats[name].deduplicate(rows, self.horizon)
            if self.sources[name] is not self.view.spine and fates.repeated:  # spine rows are counted elsewhere
                self._count(name, "repeated", fates.repeated)
            rows = fates.counted[[*self.view.columns_held(name), RID]]
            if len(fates.replaced):
                routing.add_replaced(name, fates.replaced["__instead"].alias(RID))
        else:
            rows = rows[self.view.columns_held(name)]
        if self.horizon > ALWAYS:
            rows = self._route_old_events(name, rows, routing)
        routing.add_events(name, rows)
        return fates

    def _route_old_events(self, name: str, rows: pl.DataFrame, routing: TurnRouting) -> pl.DataFrame:
        """Sends events that are too old for time buckets to be compacted, or counts them as outside every window.

        Returns:
            The other events.
        """
        reached = moments_of(rows, str(self.sources[name].time)) >= self.horizon - self.held_back(name)
        if reached.all():
            return rows
        old = rows.filter(pl.Series(~reached))
        if name in self.lifetime:
            routing.add_old_events(name, old)
        else:
            self._count(name, "beyond", len(old))
        return rows.filter(pl.Series(reached))

    def _route_spine_rows(self, ready: pl.DataFrame, routing: TurnRouting) -> ReadySpineRows:
        """Sends spine rows that can be computed to the shards.  Returns them for the assembly.

        If keys come from dimensions, the assembly uses the same versions of the dimensions.
        """
        frames, versions = dict[str, pl.DataFrame](), None
        if self.keys.dimensions:
            assert self.dimensions is not None
            self.dimensions.refresh()
            frames, versions = self.dimensions.frames, dict(self.dimensions.versions)
        shards = routing.add_spine_rows(self.keys.added_to(ready, frames))
        cold = pl.Series("__cold", moments_of(ready, self.view.time) < self.beginnings.filled(self.view))
        rows = ready[[*self.view.spine.schema, "row_id", "__late", *ORIGIN_TYPES]].hstack([cold])
        return ReadySpineRows(self.turn_number, shards, cut_text(self.next), rows, versions)

    def _output(
        self,
        routing: TurnRouting,
        ready: pl.DataFrame | None = None,
        accepted: Mapping[str, pl.DataFrame] | None = None,
        dead_letters: pl.DataFrame | None = None,
    ) -> Turn:
        spine_rows = None if ready is None else self._route_spine_rows(ready, routing)
        rejected = [_NO_DEAD_LETTERS if dead_letters is None else dead_letters]
        if self.dimensions is not None:
            rejected.append(self.dimensions.take_dead_letters())
        shards = {}
        for number, each in enumerate(routing.tables):
            if not each.empty or self.turn_number % HORIZON_EVERY == 0:
                memory = {name: memory.length for name, memory in self.memory.items()}
                shards[number] = ShardInput(self.turn_number, self.sent[number], self.horizon, each, memory)
                self.sent[number] += 1
        entry = TurnEntry(
            record=self._record(),
            began=self.began,
            spine_rows=0 if ready is None else len(ready),
            state=size_of(self.stores.values()),
            accepted=accepted or {},
            dead_letters=rejected[0] if len(rejected) == 1 else pl.concat(rejected),
        )
        return Turn(self.turn_number, shards, spine_rows, entry)

    def _record(self) -> CommitRecord:
        return CommitRecord(
            turn=self.turn_number,
            last=self.last,
            next=_copied(self.next),
            completeness=self.completeness.state(),
            pending=len(self.spine_rows),
            oldest_pending=self.spine_rows.oldest(),
            horizon=self.horizon,
            counts=_copied(self.counts),
            beginnings=self.beginnings,
            memory=dict(self.memory),
        )

    def _routing(self) -> TurnRouting:
        return TurnRouting(self.view, self.groups, self.shards)

    # -- what can be computed, and what is still needed ----------------------------------------------------------

    @property
    def last(self) -> bool:
        """Whether every partition has reported its end."""
        return self.completeness.ended

    def bound(self, now: int) -> int:
        """Spine rows up to this time (µs) can be computed."""
        return min([FOREVER, *(self.completeness.complete(name, now) for name in self.view.events)])

    def answerable(self, now: int) -> bool:
        """Whether some pending spine row can be computed now."""
        oldest = self.spine_rows.oldest()
        return oldest is not None and oldest <= self.bound(now)

    def _oldest_allowed(self, watermark: int) -> int:
        """Spine rows before this time (µs) are too late to be computed; ALWAYS: none is.

        It is later than `keep` requires if an earlier launch had a shorter `keep`, because the horizon never goes back.
        """
        return self.horizon if watermark == ALWAYS else max(watermark - self.keep, self.horizon)

    def advance(self, now: int) -> None:
        """Moves the horizon, and evicts what neither a pending spine row nor a future one can reach.

        No spine row from before the horizon will be computed.
        """
        watermark = self.completeness.watermark(self.view.spine.name, now)
        if watermark == ALWAYS:
            self.horizon = max(self.horizon, self.beginnings.horizon)
            return
        oldest = self.spine_rows.oldest()
        needed = min(watermark - self.keep, FOREVER if oldest is None else oldest)
        self.horizon = max(self.horizon, self.beginnings.horizon, needed)
        self.spine_rows.evict(watermark - self.keep)
        for name, each in self.repeats.items():
            each.store.evict(self.horizon - remembered(self.view, name, each.memory))

    def _count(self, source: str, what: str, number: int) -> None:
        counts = self.counts[source]
        counts[what] = counts.get(what, 0) + number


def _with_fates(rows: pl.DataFrame, fates: Deduplicated) -> pl.DataFrame:
    """Accepted rows with columns that say whether each counts and which row it replaces."""
    identities = row_identity(rows)
    replaced = fates.replaced.unique(RID, keep="first", maintain_order=True)  # a row can name only one
    return rows.with_columns(
        identities.is_in(fates.counted[RID].implode()).alias("__counted"),
        identities.to_frame().join(replaced, on=RID, how="left", maintain_order="left")["__instead"],
    )


def _copied(by_source: Mapping[str, Mapping[Key, int]]) -> dict[str, dict[Key, int]]:
    return {name: dict(each) for name, each in by_source.items()}
