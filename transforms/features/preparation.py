"""Decides what a features run computes, before its graph is built.

Each step uses what the steps before it returned: inventory of the sources → manifest of the table → digests of the
sources → stale dates and snapshots to start from → columns to copy from older tables → plan of blocks → history before
the blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from datetime import date
from typing import TypeVar

from deltalake import DeltaTable

from schemas.durations import DAY
from schemas.errors import StoreError
from schemas.loading import Definition
from schemas.views import FeatureView, lifetime_sources
from transforms.features.carried_dead_letters import (
    CarriedDeadLetters,
    Carrying,
    carry,
    dimensions_changed,
    read_dimensions,
)
from transforms.features.column_reuse import Copies, find_copies
from transforms.features.lifetime_snapshots import Chain, Snapshot, SnapshotSegment, chains, segments, usable_snapshot
from transforms.features.manifest import EMPTY, WRITTEN_BEFORE, Manifest, continued, outdated
from transforms.features.manifest_store import older_tables, read_manifest
from transforms.features.plan import (
    FeaturePlan,
    PlanOptions,
    block_cuts,
    plan_blocks,
    resolve_interval,
    rows_within,
)
from transforms.features.source_digests import Current, digest_changes
from transforms.features.staleness import Stale, find_stale, usable_snapshots
from transforms.records.times import ALWAYS, FOREVER, as_date, day_number, days_within, midnight
from transforms.sources.inventory import Inventory, take_inventory
from transforms.storage.date_spans import partition_days
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import dead_letters_uri, features_uri

Ranges = list[tuple[int, int]]
Request = TypeVar("Request", bound="FeaturesRequest")


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesRequest:
    """Which features to compute, from which sources, and how the work may be divided.

    Args:
        definition: name of the definition.
        store: address of the store.
        sources: folder of the sources.
        now: µs since 1970; rows with a later time are not known yet.
        start: first day to compute; None: the first day of the data.
        end: the day after the last; None: the day after the last day of the data.
        full: compute every date again, whatever the table has.
        refresh: also count dates as stale whose dimensions have changed.
        block_rows: rows computed at once.
        shuffled: send rows to their blocks instead of letting each block read; None: whichever reads less.
        key_shards: parts into which a block's events are divided by key; None: as many as memory needs.
        broadcast_bytes: a larger dimension is read by each block instead of being sent to every worker.
    """

    definition: Definition
    store: str
    sources: str
    now: int
    start: date | None
    end: date | None
    full: bool
    refresh: bool
    block_rows: int
    shuffled: bool | None
    key_shards: int | None
    broadcast_bytes: float

    @property
    def view(self) -> FeatureView:
        return self.definition.view

    @property
    def table(self) -> str:
        """Address of the feature table."""
        return features_uri(self.store, self.view.name, self.view.fingerprint)

    @property
    def bounded(self) -> bool:
        """Whether only some days are to be computed."""
        return self.start is not None or self.end is not None


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """What to compute, why, and the state of the sources and of the table on which this was decided.

    Args:
        plan: the blocks; None: there is nothing to compute.
        stale: reasons per date, and notes for the user.
        current: digests of the sources.
        base: version of the feature table; None: there is no table yet.
        copies: columns that are copied from an older table.
        inventory: the inventory of the sources.
        everything: whether all dates are computed.
        segments: segments of the history, which are summarised for lifetime windows.
        chains: chains of those segments, each with the snapshot that it starts from.
        outdated: days of the table that an older version wrote, and whose values may be wrong.
        partition_days: how many days a partition of the feature table spans.
        carried: dead letters of days that the run does not compute.
    """

    plan: FeaturePlan | None
    stale: Stale
    current: Current
    base: int | None
    copies: Copies | None = None
    inventory: Inventory | None = None
    everything: bool = False
    segments: tuple[SnapshotSegment, ...] = ()
    chains: tuple[Chain, ...] = ()
    outdated: tuple[int, ...] = ()
    partition_days: int = 1
    carried: CarriedDeadLetters = dataclasses.field(default_factory=CarriedDeadLetters)

    @property
    def required_plan(self) -> FeaturePlan:
        """The plan of a run that has something to compute."""
        assert self.plan is not None, "a run with nothing to compute has no graph"
        return self.plan

    @property
    def required_inventory(self) -> Inventory:
        """The inventory of a run that has something to compute."""
        assert self.inventory is not None, "a run with nothing to compute has no graph"
        return self.inventory


def prepare_features(request: FeaturesRequest) -> PreparedRun:
    """Decides what to compute: the days that were requested, all days, or those that are missing or stale.

    Raises:
        DataError: there are no spine rows in the interval, or a source has no files.
        ContractError: a file cannot be read as its source declares.
        StoreError: the table or its manifest cannot be read.
    """
    view = request.view
    inventory, table = take_inventory(view, request.sources, request.now), open_table(request.table)
    base = None if table is None else int(table.version())
    # A run over some days keeps the record of the others, even if it computes its own days again.
    # If no spine row is left, `--full` also uses the days of the table: their rows must be removed.
    empty = inventory.extent[0] >= inventory.extent[1]
    anew = request.full and not request.bounded and not empty
    manifest = EMPTY if anew else continued(view, read_manifest(table))
    everything = not request.bounded and (anew or not manifest.dates)
    old_days = outdated(_readable_manifest(view, table) if anew else manifest)
    current = digest_changes(inventory, manifest, request.full)
    stale, ranges = _stale_ranges(request, inventory, manifest, current, everything)
    stale = _with_notes(stale, old_days, ranges, inventory, everything)
    carried = CarriedDeadLetters()
    if not everything:
        carried = carried_dead_letters(request, inventory, manifest, current, ranges)
    if not ranges:
        return PreparedRun(None, stale, current, base, carried=carried)
    snapshots = _snapshots(request, manifest, current, ranges) if lifetime_sources(view) else {}
    older = [] if request.full else older_tables(request.store, view)
    copies = find_copies(view, inventory, current, older, days_within(ranges))
    plan = _plan(request, inventory, current, ranges, everything)
    low, high = plan.reached
    rows = rows_within(inventory.slices[view.spine.name], low, high)
    days = partition_days(
        request.table, table, rows, (as_date(day_number(low)), as_date(day_number(max(high - 1, low))))
    )
    prepared = PreparedRun(
        plan, stale, current, base, copies, inventory, everything, partition_days=days, carried=carried
    )
    if not lifetime_sources(view):
        return prepared
    history = chains(plan, snapshots)
    timeless = {name: inventory.timeless(name) for name in view.events if everything}
    return dataclasses.replace(
        prepared,
        segments=segments(view, plan, history, inventory.slices, timeless),
        chains=history,
        outdated=tuple(old_days),
    )


def carried_dead_letters(
    request: FeaturesRequest, inventory: Inventory, manifest: Manifest, current: Current, ranges: Ranges
) -> CarriedDeadLetters:
    """Returns the dead letters of days outside the ranges, as the run leaves them."""
    dimensions = None
    if not ranges and dimensions_changed(request.view, manifest, current):  # with ranges, the first block reads them
        dimensions = read_dimensions(request.view, inventory, request.broadcast_bytes)
    uri = dead_letters_uri(request.store, "features")
    return carry(Carrying(request.view, uri, inventory, manifest, current), ranges, dimensions)


def _stale_ranges(
    request: FeaturesRequest, inventory: Inventory, manifest: Manifest, current: Current, everything: bool
) -> tuple[Stale, Ranges]:
    """Returns why dates are stale, and the `[start, end)` ranges of µs to compute."""
    if request.bounded or everything:
        return Stale({}), [_requested(request, inventory, manifest)]
    stale = find_stale(request.view, manifest, current, request.refresh)
    return stale, list(stale.ranges())


def _requested(request: FeaturesRequest, inventory: Inventory, manifest: Manifest) -> tuple[int, int]:
    """Returns the requested `[start, end)` in µs. It includes days of the table whose spine rows are all gone.

    Raises:
        DataError: neither the spine nor the table has rows there.
    """
    computed = [midnight(day) for day in manifest.dates]
    low, high = (None if each is None else midnight(each) for each in (request.start, request.end))
    inside = [each for each in computed if (low is None or each >= low) and (high is None or each < high)]
    if not inside:
        return resolve_interval(request.view, inventory, request.start, request.end)
    first, last = inventory.extent if inventory.extent[0] < inventory.extent[1] else (FOREVER, ALWAYS)
    return (
        min(first, min(inside)) if low is None else low,
        max(last, max(inside) + DAY) if high is None else high,
    )


def _with_notes(stale: Stale, days: Sequence[int], ranges: Ranges, inventory: Inventory, everything: bool) -> Stale:
    """Returns `stale` with notes on days that an older version wrote, and on the sources."""
    if everything:
        notes = list(outdated_notes(days, [(ALWAYS, -ALWAYS)]))
    else:
        notes = [*outdated_notes(days, ranges), *inventory.notes]
    return dataclasses.replace(stale, notes=(*stale.notes, *notes))


def _snapshots(
    request: FeaturesRequest, manifest: Manifest, current: Current, ranges: Ranges
) -> dict[int, Snapshot | None]:
    """Returns the newest usable snapshot before the start of each range.

    There is none if everything is computed again.
    """
    if request.full:
        return {first: None for first, _ in ranges}
    return {
        first: usable_snapshot(request.table, usable_snapshots(request.view, manifest, current, first))
        for first, _ in ranges
    }


def _plan(
    request: FeaturesRequest, inventory: Inventory, current: Current, ranges: Ranges, everything: bool
) -> FeaturePlan:
    """Divides the ranges into blocks."""
    repeats = {name: each.first for name, each in current.repeats.items()}
    return plan_blocks(request.view, inventory, ranges, repeats, _plan_options(request, current, everything))


def _plan_options(request: FeaturesRequest, current: Current, everything: bool) -> PlanOptions:
    return PlanOptions(
        everything=everything,
        digest=not current.digested,
        summarised=lifetime_sources(request.view),
        block_rows=request.block_rows,
        shuffled=request.shuffled,
        key_shards=request.key_shards,
        broadcast_bytes=request.broadcast_bytes,
    )


def computed_together(works: Sequence[tuple[Request, PreparedRun]]) -> list[list[tuple[Request, PreparedRun]]]:
    """Divides prepared runs into groups whose views are computed together, block by block; a group may have one view.

    Views of a group have one spine and one key, compute the same ranges, and read slices into memory: none has windows
    over all history, a shuffle, key shards, or a dimension too large to broadcast.  The plans of a group have blocks of
    the same times.
    """
    groups: list[list[tuple[Request, PreparedRun]]] = []
    for request, work in works:
        for group in groups:
            if _fit_together(group[0], (request, work)):
                group.append((request, work))
                break
        else:
            groups.append([(request, work)])
    result: list[list[tuple[Request, PreparedRun]]] = []
    for group in groups:
        replanned = _with_common_blocks(group) if len(group) > 1 else None
        result += [[each] for each in group] if replanned is None else [replanned]
    return result


def _fit_together(one: tuple[FeaturesRequest, PreparedRun], other: tuple[FeaturesRequest, PreparedRun]) -> bool:
    """Whether two views can be computed together."""
    (first, mine), (second, theirs) = one, other
    if mine.plan is None or theirs.plan is None:
        return False
    return (
        first.view.spine is second.view.spine
        and first.view.key == second.view.key
        and (mine.plan.ranges, mine.everything) == (theirs.plan.ranges, theirs.everything)
        and not (mine.chains or theirs.chains)
        and _in_memory(mine.plan)
        and _in_memory(theirs.plan)
    )


def _in_memory(plan: FeaturePlan) -> bool:
    """Whether each block reads its slices, and holds them and all dimensions in memory."""
    return not plan.shuffled and not plan.routed and not any(block.shards for block in plan.blocks)


def _with_common_blocks(group: Sequence[tuple[Request, PreparedRun]]) -> list[tuple[Request, PreparedRun]] | None:
    """The runs with blocks of the same times; None if these would not fit in memory."""
    request, first = group[0]
    ranges = list(first.required_plan.ranges)
    # A first run digests what it reads, so the cuts look at all of it.
    digest = any(not work.current.digested for _, work in group)
    options = dataclasses.replace(_plan_options(request, first.current, first.everything), digest=digest)
    cuts = block_cuts([(each.view, work.required_inventory) for each, work in group], ranges, options)
    result = []
    for each, work in group:
        own = dataclasses.replace(_plan_options(each, work.current, work.everything), cuts=cuts)
        repeats = {name: found.first for name, found in work.current.repeats.items()}
        plan = plan_blocks(each.view, work.required_inventory, ranges, repeats, own)
        if not _in_memory(plan):
            return None
        result.append((each, dataclasses.replace(work, plan=plan)))
    return result


def _readable_manifest(view: FeatureView, table: DeltaTable | None) -> Manifest:
    """The table's manifest; an empty one if it cannot be read, because a run over everything does not need it."""
    try:
        return continued(view, read_manifest(table))
    except StoreError:
        return EMPTY


def outdated_notes(days: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Iterator[str]:
    """Yields notes on days that an older version may have computed incorrectly: those recomputed, and the others.

    Args:
        days: numbers of days since 1970.
        ranges: `[start, end)` in µs that the run computes.
    """
    left = [day for day in days if not any(first <= midnight(day) < last for first, last in ranges)]
    if len(days) > len(left):
        yield f"rows of {_days(len(days) - len(left))} {WRITTEN_BEFORE}"
    if left:
        yield (
            f"rows of {_days(len(left), 'more ')}, from {as_date(left[0])} to {as_date(left[-1])}, "
            "were written before that and may be wrong in the same way: a run without --start and --end recomputes them"
        )


def _days(count: int, which: str = "") -> str:
    return f"{count:,} {which}day{'' if count == 1 else 's'}"
