"""What the journal does for one view: which accepted rows count for it, where they go, and which of its spine rows are
computed.

The journal accepts rows, moves the completeness watermark and the horizon, and numbers turns, once for all views of a
job.  Each view then sorts the accepted rows by its own contract, finds repeats among them, and has spine rows and
shards of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import polars as pl

from schemas.live import live_sources, repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.features.packed_events import PackedRows
from transforms.records.columns import moments_of
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.streaming.beginnings import Beginnings
from transforms.streaming.completeness import Completeness
from transforms.streaming.fates import RepeatMemory, WindowReach, known_columns
from transforms.streaming.groups import GroupKeys, shard_groups
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.messages import ORIGIN_TYPES
from transforms.streaming.pending_spine_rows import PendingSpineRows
from transforms.streaming.progress import ViewRecord
from transforms.streaming.repeats import Deduplicated, RepeatFinder
from transforms.streaming.routing import TurnRouting
from transforms.streaming.row_origin import ORIGIN_COLUMNS, RID, cut_text, row_identity
from transforms.streaming.step_messages import ReadySpineRows, ShardInput
from transforms.streaming.time_buckets import TimeBuckets
from transforms.streaming.view_contracts import contracts_of, sort_rows

# Every shard gets an input at least every so many turns, with the horizon up to which it evicts rows.
HORIZON_EVERY = 16
# Counts the accepted rows that break the view's contract.  They are dead letters, and counted as such too.
REJECTED = "rejected"
_NO_DEAD_LETTERS = pl.DataFrame(schema=MESSAGE_DEAD_LETTERS)
# Called with (source, what, number) of rows that are counted.
Count = Callable[[str, str, int], None]


@dataclasses.dataclass(frozen=True, eq=False)
class TurnContext:
    """What a turn is for every view of the job.

    Args:
        number: number of the turn.
        horizon: µs; see `Journal.advance`.
        next: next offset by source and partition.
        memory: for how long repeats are recognised, by source.
        reach: how far the windows of all views reach back, by source.
        beginnings: the times from which the store has the rows of each source.
    """

    number: int
    horizon: int
    next: Mapping[str, Mapping[int, int]]
    memory: Mapping[str, RepeatMemory]
    reach: Mapping[str, WindowReach]
    beginnings: Beginnings

    def held_back(self, name: str) -> int:
        """For how long (µs) before the horizon shards hold the events of a source."""
        return self.reach[name].held_back(self.memory[name].length if name in self.memory else 0)


@dataclasses.dataclass(frozen=True, eq=False)
class ViewTurn:
    """The output of a turn for one view.

    Args:
        view: number of the view.
        shards: the inputs of the view's shards, by their number.
        spine_rows: the spine rows to compute, for the assembly; None if there are none.
        dead_letters: with the columns `MESSAGE_DEAD_LETTERS`.
    """

    view: int
    shards: Mapping[int, ShardInput]
    spine_rows: ReadySpineRows | None = None
    dead_letters: pl.DataFrame = dataclasses.field(default_factory=lambda: _NO_DEAD_LETTERS)


class ViewJournal:
    """See the module.

    Args:
        number: number of the view among those of the job.
        view: the view.
        shards: number of its shards.
        keep: for how long (µs) after the watermark of the spine features are still computed for late spine rows.
        reach: how far the windows of all views of the job reach back, by source.
        count: counts rows for the job.
    """

    def __init__(
        self, number: int, view: FeatureView, shards: int, keep: int, reach: Mapping[str, WindowReach], count: Count
    ) -> None:
        self.number, self.view, self.shards, self.keep, self.reach = number, view, shards, keep, reach
        self.contracts = contracts_of(view)
        self.groups, self.lifetime = shard_groups(view), lifetime_sources(view)
        self.keys = GroupKeys.of(view)
        self.dimensions: Dimensions | None = None  # needed if some key comes from a Lookup
        self.sent = [0] * shards
        self.counts: dict[str, dict[str, int]] = {name: {} for name in live_sources(view)}
        self._count_for_job = count
        self.spine_rows = PendingSpineRows(view, keep, self.count)
        self.repeats = {
            name: RepeatFinder(view, name, 0, reach[name]) for name in view.events if repeats_by(view, name)
        }

    @property
    def stores(self) -> dict[str, TimeBuckets]:
        """All rows that it holds."""
        return {**self.spine_rows.stores, **{name: each.store for name, each in self.repeats.items()}}

    def count(self, source: str, what: str, number: int) -> None:
        """Counts rows of a source, for the view and for the job."""
        counts = self.counts[source]
        counts[what] = counts.get(what, 0) + number
        self._count_for_job(source, what, number)

    def record(self) -> ViewRecord:
        """Its part of a commit's record."""
        counts = {name: dict(each) for name, each in self.counts.items()}
        return ViewRecord(len(self.spine_rows), self.spine_rows.oldest(), counts)

    # -- the steps of a turn -------------------------------------------------------------------------------------

    def add(
        self, accepted: Mapping[str, pl.DataFrame], watermarks: Mapping[str, int], context: TurnContext
    ) -> tuple[TurnRouting, pl.DataFrame, dict[str, Deduplicated]]:
        """Sorts the rows that a turn accepted by the view's contract and routes those that keep it.

        Args:
            accepted: rows by source.
            watermarks: by source (µs), before the turn.
            context: of the turn, with the horizon before it.

        Returns:
            The rows for the shards, dead letters, and the fates of the rows of sources with `unique`.
        """
        keeping, dead_letters = dict[str, pl.DataFrame](), [_NO_DEAD_LETTERS]
        for name, rows in accepted.items():
            if name in self.contracts:
                keeping[name], broken = sort_rows(self.contracts[name], rows)
                dead_letters += broken
                for each in broken:
                    self.count(name, "dead", len(each))
                    self.count(name, REJECTED, len(each))
        routing, fates = TurnRouting(self.view, self.groups, self.shards), dict[str, Deduplicated]()
        for name in self.view.events:
            if name in keeping:
                found = self._route_events(name, keeping[name], watermarks[name], routing, context)
                fates |= {} if found is None else {name: found}
        spine_rows = keeping.get(self.view.spine.name)
        if spine_rows is not None:
            watermark = watermarks[self.view.spine.name]
            asked = spine_rows[[*self.view.spine.schema, *ORIGIN_TYPES]]
            since = context.horizon if watermark == ALWAYS else max(watermark - self.keep, context.horizon)
            dead_letters += self.spine_rows.add(asked, watermark, since)
        return routing, pl.concat(dead_letters), fates

    def output(
        self,
        routing: TurnRouting,
        context: TurnContext,
        ready: pl.DataFrame | None = None,
        dead_letters: pl.DataFrame = _NO_DEAD_LETTERS,
    ) -> ViewTurn:
        """What a turn sends for the view.

        Args:
            routing: the rows for the shards.
            context: of the turn, with the horizon after it.
            ready: spine rows to compute.
            dead_letters: of rows.
        """
        spine_rows = None if ready is None else self._route_spine_rows(ready, routing, context)
        if self.dimensions is not None:
            dead_letters = pl.concat([dead_letters, self.dimensions.take_dead_letters()])
        shards = {}
        for number, each in enumerate(routing.tables):
            if not each.empty or context.number % HORIZON_EVERY == 0:
                held = {name: context.held_back(name) for name in self.view.events}
                shards[number] = ShardInput(context.number, self.sent[number], context.horizon, each, held, self.number)
                self.sent[number] += 1
        return ViewTurn(self.number, shards, spine_rows, dead_letters)

    def routing(self) -> TurnRouting:
        """No rows yet for any shard."""
        return TurnRouting(self.view, self.groups, self.shards)

    def _route_events(
        self, name: str, rows: pl.DataFrame, watermark: int, routing: TurnRouting, context: TurnContext
    ) -> Deduplicated | None:
        """Sends the new events of a source to the shards, and retracts events that a repeat replaces.

        Returns:
            The fates of the rows of a source with `unique`; None for another source.
        """
        fates = None
        late = int((moments_of(rows, str(self.view.events[name].time)) < watermark).sum())
        if late:
            self.count(name, "late", late)
        if name in self.repeats:
            columns = list(dict.fromkeys([*known_columns(self.view, name), *ORIGIN_COLUMNS]))
            fates = self.repeats[name].deduplicate(rows[columns].hstack([row_identity(rows)]), context.horizon)
            if self.view.events[name] is not self.view.spine and fates.repeated:  # spine rows are counted elsewhere
                self.count(name, "repeated", fates.repeated)
            rows = fates.counted[[*self.view.columns_held(name), RID]]
            if len(fates.replaced):
                routing.add_replaced(name, fates.replaced["__instead"].alias(RID))
        else:
            rows = rows[self.view.columns_held(name)]
        if context.horizon > ALWAYS:
            rows = self._route_old_events(name, rows, routing, context)
        routing.add_events(name, rows)
        return fates

    def _route_old_events(
        self, name: str, rows: pl.DataFrame, routing: TurnRouting, context: TurnContext
    ) -> pl.DataFrame:
        """Sends events that shards no longer hold to be compacted, or counts them as beyond every window.

        Returns:
            The other events.
        """
        reached = moments_of(rows, str(self.view.events[name].time)) >= context.horizon - context.held_back(name)
        if reached.all():
            return rows
        old = rows.filter(pl.Series(~reached))
        if name in self.lifetime:
            routing.add_old_events(name, old)
        else:
            self.count(name, "beyond", len(old))
        return rows.filter(pl.Series(reached))

    def _route_spine_rows(self, ready: pl.DataFrame, routing: TurnRouting, context: TurnContext) -> ReadySpineRows:
        """Sends spine rows that can be computed to the shards.  Returns them for the assembly.

        Where keys come from dimensions, the assembly looks up in the same versions of these.
        """
        looked_up, versions = dict[str, PackedRows](), None
        if self.keys.dimensions:
            assert self.dimensions is not None
            self.dimensions.refresh()
            looked_up, versions = dict(self.dimensions.packed), dict(self.dimensions.versions)
        shards = routing.add_spine_rows(self.keys.added_to(ready, looked_up))
        cold = pl.Series("__cold", moments_of(ready, self.view.time) < context.beginnings.filled(self.view))
        rows = ready[[*self.view.spine.schema, "row_id", "__late", *ORIGIN_TYPES]].hstack([cold])
        cut = cut_text({name: context.next[name] for name in live_sources(self.view)})
        return ReadySpineRows(context.number, shards, cut, rows, versions, self.number)

    # -- what can be computed, and what is still needed ----------------------------------------------------------

    def bound(self, completeness: Completeness, now: int) -> int:
        """Spine rows up to this time (µs) can be computed."""
        return min([FOREVER, *(completeness.complete(name, now) for name in self.view.events)])

    def answerable(self, completeness: Completeness, now: int) -> bool:
        """Whether some pending spine row can be computed now."""
        oldest = self.spine_rows.oldest()
        return oldest is not None and oldest <= self.bound(completeness, now)

    def needed(self, watermark: int) -> int:
        """The time (µs) before which no spine row of the view will be computed; ALWAYS if it is not known.

        Args:
            watermark: of the spine.
        """
        if watermark == ALWAYS:
            return ALWAYS
        oldest = self.spine_rows.oldest()
        return min(watermark - self.keep, FOREVER if oldest is None else oldest)
