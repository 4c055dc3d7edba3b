"""The journal: one order for everything that arrives, and the decision which spine rows can be computed when.

Micro-batches of all partitions arrive here.  In *turns* the journal admits them in order of offsets, drops repeats,
advances the completeness watermark, and sends the spine rows whose sources are complete to the shards.  Turns are
numbered.  The *cut* of a turn is the next offset of every partition: it says what the turn could see, and is the same
for all features of a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from schemas.live import repeats_by
from schemas.sources import Source
from schemas.views import FeatureView, lifetime_sources
from transforms.records.frame_packets import Frames, pack
from transforms.records.row_hashing import row_ids
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS, message_dead_letters
from transforms.streaming.beginnings import BEFORE_START, Beginnings
from transforms.streaming.completeness import Completeness, CompletenessRule
from transforms.streaming.messages import ORIGIN
from transforms.streaming.micro_batches import (
    ORIGIN_COLUMNS,
    MicroBatch,
    NextAvailable,
    digest,
    in_order,
    known_columns,
    no_topic,
    row_identity,
)
from transforms.streaming.pane_store import SLOTS, TimeBuckets, key_hashes, size_of
from transforms.streaming.shards import (
    MINUTE,
    RID,
    groups_of,
    held_back,
    route_compacted,
    route_events,
    route_spine_rows,
    with_group_keys,
)

PENDING, KNOWN_SPINE_ROWS = "?pending", "?asked"


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """The output of a turn: an envelope per shard concerned, the spine rows for the assembler, the entry for the
    tables."""

    number: int
    shards: Mapping[int, bytes]
    spine_rows: bytes | None
    entry: bytes


class Journal:
    """See the module.  A plain Python object: `head` and `stores` are the state to checkpoint."""

    def __init__(self, view: FeatureView, shards: int, keep: int) -> None:
        self.view, self.shards, self.keep = view, shards, keep
        self.next_available: NextAvailable = no_topic
        self.groups, self.lifetime = groups_of(view), lifetime_sources(view)
        self.sources: dict[str, Source] = {view.spine.name: view.spine, **view.events}
        self.completeness = Completeness({name: CompletenessRule.of(source) for name, source in self.sources.items()})
        self.turn_number, self.began = 0, 1
        self.sent = [0] * shards
        self.next: dict[str, dict[int, int]] = {name: {} for name in self.sources}
        self.horizon = ALWAYS
        self.beginnings = Beginnings()
        self.first: dict[
            str, dict[int, int]
        ] = {}  # µs of the first rows of each partition, while a source's beginning is not known
        self.counts: dict[str, dict[str, int]] = {name: {} for name in self.sources}
        # How long, in µs, shards hold events of a source, and the journal those that a repeat may replace.
        self.held_back = {name: held_back(view, name) for name in view.events}
        self.remembered = {name: 2 * view.reach(name) for name in view.events}
        reach = max([0, *(view.reach(name) for name in view.events)])
        self.stores: dict[str, TimeBuckets] = {
            PENDING: TimeBuckets(view.time, MINUTE * 10),
            KNOWN_SPINE_ROWS: TimeBuckets("time", max(self.keep // 4, MINUTE)),
        }
        for name, source in view.events.items():
            if repeats_by(view, name):
                self.stores[name] = TimeBuckets(str(source.time), max(2 * reach // (SLOTS - 2), MINUTE))

    # -- state to checkpoint -------------------------------------------------------------------------------------

    def head(self) -> dict[str, Any]:
        return {
            "turn": self.turn_number,
            "began": self.began,
            "sent": self.sent,
            "clock": self.completeness.to_json(),
            "horizon": self.horizon,
            "counts": self.counts,
            "next": {name: {str(k): v for k, v in each.items()} for name, each in self.next.items()},
            "beginnings": self.beginnings.to_json(),
            "first": {name: {str(k): v for k, v in each.items()} for name, each in self.first.items()},
        }

    def load(self, head: Mapping[str, Any]) -> None:
        self.turn_number, self.began, self.horizon = head["turn"], head["began"], head["horizon"]
        self.sent = list(head["sent"])
        self.completeness.load(head["clock"])
        self.counts = {name: dict(each) for name, each in head["counts"].items()}
        self.next = {name: {int(k): v for k, v in each.items()} for name, each in head["next"].items()}
        self.beginnings = Beginnings.of_json(head.get("beginnings"))
        self.first = {name: {int(k): v for k, v in each.items()} for name, each in head.get("first", {}).items()}

    # -- turns ---------------------------------------------------------------------------------------------------

    def admit(self, inbox: Sequence[MicroBatch], now: int) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """(Micro-batches that are due, in order of offsets; those that wait for an earlier one.)"""
        return in_order(inbox, self.next, now, self._count, self.next_available)

    def turn(self, admitted: Sequence[MicroBatch], now: int) -> Turn:
        """Apply the `admit`ted micro-batches, decide which spine rows can be computed, and number the turn."""
        self.turn_number += 1
        dead_letters = [pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)]
        rows: dict[str, list[pl.DataFrame]] = {name: [] for name in self.sources}
        watermarks = {name: self.completeness.watermark(name, now) for name in self.sources}
        for micro_batch in admitted:
            self._admit_one(micro_batch, rows, dead_letters, now)
        accepted = {name: pl.concat(parts) for name, parts in rows.items() if parts}
        for name in self.view.events:
            if name in accepted and name != self.view.spine.name:
                accepted[name], early = self._since_start(name, accepted[name])
                dead_letters += early
        return self._turn(accepted, dead_letters, watermarks, now)

    def seed(self, name: str, rows: pl.DataFrame) -> Turn:
        """A turn that sends rows accepted earlier to the shards; it counts nothing and moves no watermark."""
        self.turn_number += 1
        to_shards: list[Frames] = [{} for _ in range(self.shards)]
        self._send(f"rows:{name}", name, rows, to_shards)
        return self._envelopes(pl.DataFrame(), to_shards, {}, pl.DataFrame(schema=MESSAGE_DEAD_LETTERS))

    def seed_compacted(self, group: int, reduced: pl.DataFrame) -> Turn:
        """As `seed`, for the compacted older events of a group."""
        self.turn_number += 1
        to_shards: list[Frames] = [{} for _ in range(self.shards)]
        mine = route_compacted(self.groups[group], reduced, self.shards)
        for frames, some in zip(to_shards, mine, strict=True):
            if some.any():
                frames[f"compacted:{group}"] = reduced.filter(pl.Series(some))
        return self._envelopes(pl.DataFrame(), to_shards, {}, pl.DataFrame(schema=MESSAGE_DEAD_LETTERS))

    def _admit_one(
        self, micro_batch: MicroBatch, rows: dict[str, list[pl.DataFrame]], dead_letters: list[pl.DataFrame], now: int
    ) -> None:
        due = self.next[micro_batch.source].get(micro_batch.partition, micro_batch.first)
        fresh, bad = micro_batch.rows, micro_batch.dead_letters
        if due > micro_batch.first:  # delivered again in part
            fresh = fresh.filter(pl.col("__offset") >= due)
            bad = bad.filter(pl.col("offset") >= due)
        self.next[micro_batch.source][micro_batch.partition] = micro_batch.next
        self._count(micro_batch.source, "messages", micro_batch.messages)
        self.completeness.expect(micro_batch.source, micro_batch.partition, now)
        if len(fresh):
            time = str(self.sources[micro_batch.source].time)
            greatest = int(fresh[time].to_physical().max())  # type: ignore[arg-type]
            self.completeness.observe(micro_batch.source, micro_batch.partition, greatest, now)
            self._first(micro_batch, int(fresh[time].to_physical().min()))  # type: ignore[arg-type]
            rows[micro_batch.source].append(fresh)
            self._count(micro_batch.source, "rows", len(fresh))
        if micro_batch.heartbeat is not None:
            self.completeness.promise(micro_batch.source, micro_batch.partition, micro_batch.heartbeat, now)
            if micro_batch.heartbeat < FOREVER:
                self._first(micro_batch, micro_batch.heartbeat)
        if len(bad):
            dead_letters.append(bad)
            self._count(micro_batch.source, "dead", len(bad))

    def _first(self, micro_batch: MicroBatch, moment: int) -> None:
        if self.beginnings.of(micro_batch.source).since == FOREVER:
            self.first.setdefault(micro_batch.source, {}).setdefault(micro_batch.partition, moment)

    def _since_start(self, name: str, rows: pl.DataFrame) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
        """Rows of a topic that are not history; dead letters for rows of which it is unknown whether history has them
        too."""
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

    def _begun(self, name: str) -> None:
        """Once every partition of a source has sent something, record the time from which none of its rows is
        missing."""
        beginning, first = self.beginnings.of(name), self.first.get(name)
        if beginning.since == FOREVER and first and self.completeness.known(name) > ALWAYS:
            since = max(*first.values(), ALWAYS) + self.completeness.rules[name].lateness
            since = since if beginning.start is None else max(since, beginning.start)
            self.beginnings = self.beginnings.with_source(name, dataclasses.replace(beginning, since=since))
            del self.first[name]

    def _turn(
        self,
        accepted: dict[str, pl.DataFrame],
        dead_letters: list[pl.DataFrame],
        watermarks: Mapping[str, int],
        now: int,
    ) -> Turn:
        to_shards: list[Frames] = [{} for _ in range(self.shards)]
        spine_rows_in = accepted.get(self.view.spine.name)
        for name in self.view.events:
            if name in accepted:
                accepted[name] = self._events(name, accepted[name], watermarks[name], to_shards)
        if spine_rows_in is not None:
            dead_letters += self._spine_rows(spine_rows_in, watermarks[self.view.spine.name])
        for name in self.sources:
            self.completeness.watermark(name, now)
            self._begun(name)
        ready = self._ready(now)
        self.advance(now)
        return self._envelopes(ready, to_shards, accepted, pl.concat(dead_letters))

    def _events(self, name: str, rows: pl.DataFrame, watermark: int, to_shards: list[Frames]) -> pl.DataFrame:
        """Route a source's new rows without repeats, and retract rows that are replaced by a repeat known earlier.

        Returns:
            All the rows; for a source with `unique`, with columns that say whether each counted and which row it
            replaced.
        """
        source, whole = self.sources[name], rows
        time = pl.col(str(source.time)).to_physical()
        late = int(rows.select((time < watermark).sum()).item())
        if late:
            self._count(name, "late", late)
        columns = self.view.columns_held(name)
        if repeats_by(self.view, name):
            rows = rows.select(*known_columns(self.view, name), row_identity(rows))
            counted, retracted = self._without_repeats(source, rows)
            whole = whole.with_columns(
                rows[RID].is_in(counted[RID].implode()).alias("__counted"),
                rows.join(retracted, on=RID, how="left", maintain_order="left")["__instead"],
            )
            rows = counted.select(*columns, RID)
            if len(retracted):
                for frames in to_shards:
                    frames[f"retract:{name}"] = retracted.select(pl.col("__instead").alias(RID))
        else:
            rows = rows.select(columns)
        if self.horizon > ALWAYS:
            reached = time >= self.horizon - self.held_back[name]
            old = rows.filter(~reached)
            if len(old):
                rows = rows.filter(reached)
                if name in self.lifetime:
                    self._send(f"old:{name}", name, old, to_shards)
                else:
                    self._count(name, "beyond", len(old))
        self._send(f"rows:{name}", name, rows, to_shards)
        return whole

    def _send(self, frame: str, name: str, rows: pl.DataFrame, to_shards: Sequence[Frames]) -> None:
        for frames, mine in zip(to_shards, route_events(self.groups, name, rows, self.shards), strict=True):
            if mine.any():
                frames[frame] = rows if mine.all() else rows.filter(pl.Series(mine))

    def _without_repeats(self, source: Source, rows: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """(Rows that count, row ids that replace those in `__instead`): of rows with one `unique` value, the first
        known counts."""
        store, unique = self.stores[source.name], list(repeats_by(self.view, source.name))
        hashes = key_hashes(rows, unique)
        # To the microsecond, since a row that the shards compacted earlier cannot be retracted.
        remembered = pl.lit(True)
        if self.horizon > ALWAYS:
            remembered = pl.col(str(source.time)).to_physical() >= self.horizon - self.remembered[source.name]
        before = [each.filter(remembered) for each in store.take(tuple(unique), hashes, ALWAYS, FOREVER)]
        nothing = pl.DataFrame(schema={RID: pl.Int64, "__instead": pl.Int64})
        if not any(map(len, before)) and len(np.unique(hashes)) == len(hashes):
            store.add(rows.filter(remembered))
            return rows, nothing
        old = pl.concat(before).join(rows, on=unique, how="semi") if before else rows.clear()
        order = [*unique, str(source.time), *source.ties(rows.columns)]
        both = pl.concat([old, rows])
        first = both.sort(list(dict.fromkeys(order)), maintain_order=True).unique(
            unique, keep="first", maintain_order=True
        )
        kept = rows.filter(pl.col(RID).is_in(first[RID].implode()))
        # Of several that count, since their job remembered less far, one alone: a row names one row that it replaces.
        oldest = old.sort(list(dict.fromkeys(order)), maintain_order=True).unique(
            unique, keep="first", maintain_order=True
        )
        gone = oldest.filter(~pl.col(RID).is_in(first[RID].implode()))
        if source.name not in self.lifetime:  # a restart reads back this far, and so finds what replaced each row
            time, since = pl.col(str(source.time)), pl.col("__since").dt.offset_by(f"{self.remembered[source.name]}us")
            since_first = first.select(*unique, pl.col(str(source.time)).alias("__since"))
            gone = gone.join(since_first, on=unique).filter(time <= since)
        gone = gone.select(*unique, pl.col(RID).alias("__instead"))
        if source is not self.view.spine:  # spine rows are counted elsewhere
            self._count(source.name, "repeated", len(rows) - len(kept) + len(gone))
        if len(gone):
            store.drop(RID, gone["__instead"].to_numpy())
        gone = first.join(gone, on=unique).select(RID, "__instead")
        store.add(kept.filter(remembered))
        return kept, gone

    def _spine_rows(self, rows: pl.DataFrame, watermark: int) -> list[pl.DataFrame]:
        """Add new spine rows; dead letters for those that contradict an earlier one or are too old to be computed."""
        view, spine = self.view, self.view.spine.name
        moment = pl.col(view.time).to_physical()
        rows = rows.with_columns(
            row_ids(view.name, [rows[name] for name in (*view.key, view.time)]), digest(rows, list(view.spine.schema))
        )
        dead_letters = []
        if watermark > ALWAYS or self.horizon > ALWAYS:
            since = max(watermark - self.keep, self.horizon)  # later than the horizon if `keep` was shorter before
            old = rows.filter(moment < since)
            if len(old):
                rule = "a question comes no later than the spine's lateness and --keep allow"
                dead_letters.append(
                    message_dead_letters(view.spine.name, old, view.time, rule, pl.col(view.time).cast(pl.String))
                )
                self._count(spine, "too_late", len(old))
                rows = rows.filter(moment >= since)
        rows = rows.with_columns((moment < watermark).alias("__late"))
        spine_rows_in = self.stores[KNOWN_SPINE_ROWS].take(("row_id",), key_hashes(rows, ["row_id"]), ALWAYS, FOREVER)
        if spine_rows_in or rows["row_id"].n_unique() < len(rows):
            rows, conflicts = self._distinct(rows, spine_rows_in)
            dead_letters += conflicts
        if late := int(rows["__late"].sum()):
            self._count(spine, "late_questions", late)
        self.stores[PENDING].add(rows)
        self.stores[KNOWN_SPINE_ROWS].add(rows.select("row_id", moment.alias("time"), "__digest"))
        return dead_letters

    def _distinct(
        self, rows: pl.DataFrame, spine_rows_in: list[pl.DataFrame]
    ) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
        """New spine rows, each once.  Identical ones count once; of conflicting ones the smallest stays, unless one was
        computed."""
        view = self.view
        before = (
            pl.concat(spine_rows_in).join(rows, on="row_id", how="semi")
            if spine_rows_in
            else pl.DataFrame(schema={"row_id": pl.Int64, "time": pl.Int64, "__digest": pl.UInt64})
        )
        pending = self.stores[PENDING].drop("row_id", before["row_id"].to_numpy()) if len(before) else None
        answered = before if pending is None else before.join(pending, on="row_id", how="anti")
        again = rows.join(answered, on="row_id", how="semi")
        rest = rows.join(answered, on="row_id", how="anti")
        if pending is not None:
            rest = pl.concat([pending.select(rest.columns), rest])
        order = ["row_id", *view.spine.schema, *ORIGIN_COLUMNS]
        kept = rest.sort(order).unique("row_id", keep="first", maintain_order=True)
        lost = rest.join(kept, on=["row_id", *ORIGIN_COLUMNS], how="anti")
        same = pl.concat(
            [
                lost.join(kept, on=["row_id", "__digest"], how="semi"),
                again.join(answered, on=["row_id", "__digest"], how="semi"),
            ]
        )
        self._count(view.spine.name, "repeated", len(same))
        conflicts = pl.concat([lost, again]).join(same, on=["row_id", *ORIGIN_COLUMNS], how="anti")
        self.stores[KNOWN_SPINE_ROWS].drop("row_id", kept["row_id"].to_numpy())
        dead_letters = []
        if len(conflicts):
            key = pl.concat_str([pl.col(name).cast(pl.String) for name in view.key], separator=", ")
            dead_letters.append(
                message_dead_letters(
                    view.spine.name,
                    conflicts,
                    ", ".join(view.key),
                    "one key asks one question at one time (the smallest, or the answered one, was kept)",
                    key,
                )
            )
            self._count(view.spine.name, "conflicting", len(conflicts))
        return kept, dead_letters

    def bound(self, now: int) -> int:
        """Spine rows up to this time can be computed."""
        return min([FOREVER, *(self.completeness.complete(name, now) for name in self.view.events)])

    def answerable(self, now: int) -> bool:
        """Whether some pending spine row can be computed now."""
        oldest = self.oldest_pending()
        return oldest is not None and oldest <= self.bound(now)

    def _ready(self, now: int) -> pl.DataFrame:
        taken = self.stores[PENDING].take_before(self.bound(now))
        if not taken:
            return pl.DataFrame()
        ready = pl.concat(taken).sort(self.view.time, "row_id")
        self._count(self.view.spine.name, "answered", len(ready))
        return ready

    def advance(self, now: int) -> None:
        """Evict what neither a pending spine row nor a future one can reach."""
        watermark = self.completeness.watermark(self.view.spine.name, now)
        if watermark == ALWAYS:
            self.horizon = max(self.horizon, self.beginnings.horizon)
            return
        oldest = self.oldest_pending()
        self.horizon = max(
            self.horizon, self.beginnings.horizon, min(watermark - self.keep, FOREVER if oldest is None else oldest)
        )
        self.stores[KNOWN_SPINE_ROWS].evict(watermark - self.keep)
        for name in self.view.events:
            if name in self.stores:
                self.stores[name].evict(self.horizon - self.remembered[name])

    def oldest_pending(self) -> int | None:
        oldest = [int(frame[self.view.time].to_physical().min()) for frame in self.stores[PENDING].all()]  # type: ignore[arg-type]
        return min(oldest, default=None)

    @property
    def last(self) -> bool:
        """Whether every partition has reported its end."""
        return self.completeness.ended

    def cut(self) -> str:
        """Next offset per partition, `source/partition:offset` in order, as text."""
        return ",".join(
            f"{name}/{partition}:{self.next[name][partition]}"
            for name in sorted(self.next)
            for partition in sorted(self.next[name])
        )

    def _envelopes(
        self,
        ready: pl.DataFrame,
        to_shards: list[Frames],
        accepted: Mapping[str, pl.DataFrame],
        dead_letters: pl.DataFrame,
    ) -> Turn:
        spine_rows, parts = None, 0
        if len(ready):
            ready = with_group_keys(self.view, self.groups, ready).with_columns(
                pl.int_range(len(ready), dtype=pl.Int64).alias("__position")
            )
            spine_rows_in = [
                "__position",
                *dict.fromkeys([self.view.time, *(name for group in self.groups for name in group.spine_columns)]),
            ]
            for frames, mine in zip(to_shards, route_spine_rows(self.groups, ready, self.shards), strict=True):
                if mine.any():
                    frames["questions"] = ready.select(spine_rows_in).filter(pl.Series(mine))
                    parts += 1
            context = ready.select(
                *self.view.spine.schema,
                "row_id",
                "__late",
                *ORIGIN,
                (pl.col(self.view.time).to_physical() < self.beginnings.filled(self.view)).alias("__cold"),
            )
            spine_rows = pack({"turn": self.turn_number, "parts": parts, "cut": self.cut()}, {"questions": context})
        shards = {}
        for number, frames in enumerate(to_shards):
            if (
                frames or self.turn_number % 16 == 0
            ):  # now and then, so that all shards learn the horizon up to which they evict
                shards[number] = pack(
                    {"turn": self.turn_number, "number": self.sent[number], "horizon": self.horizon}, frames
                )
                self.sent[number] += 1
        entry = pack(
            {
                "turn": self.turn_number,
                "began": self.began,
                "last": self.last,
                "questions": len(ready),
                "letters": len(dead_letters),
                "next": self.head()["next"],
                "clock": self.completeness.to_json(),
                "pending": len(self.stores[PENDING]),
                "oldest_pending": self.oldest_pending(),
                "horizon": self.horizon,
                "counts": self.counts,
                "state": size_of(self.stores),
                "started": self.beginnings.starts,
                "beginnings": self.beginnings.to_json(),
            },
            {
                **{f"rows:{name}": rows for name, rows in accepted.items()},
                **({"letters": dead_letters} if len(dead_letters) else {}),
            },
        )
        return Turn(self.turn_number, shards, spine_rows, entry)

    def _count(self, source: str, what: str, number: int) -> None:
        counts = self.counts[source]
        counts[what] = counts.get(what, 0) + number
