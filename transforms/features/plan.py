"""Divides a run into time blocks. Each block has spine rows, and every event that their windows can reach.

A plan decides where rows are computed. It never changes a value.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from datetime import date

import numpy as np
import polars as pl

from schemas.durations import DAY
from schemas.errors import DataError
from schemas.views import FeatureView, lifetime_sources
from transforms.records.times import ALWAYS, FOREVER, as_date, day_number, day_of, days_in, days_within, midnight
from transforms.sources.contracts import Contract
from transforms.sources.inventory import Inventory, Slice, Slices, take_inventory
from transforms.sources.reader import repeats_of

# Rows (spine and events) of one block: large enough for the kernel, small enough for memory.
BLOCK_ROWS = 800_000
# A row can be read this often before reading costs more than sending it once; reading fewer rows than this costs less
# than preparing to send them.
MOST_READS = 6.0
FEW_ROWS = 200_000
# A block that reads more than this multiple of its own rows is partitioned by key hash; a partition has as many rows as
# a block.
MOST_BLOCKS = 3
MOST_SHARDS = 1000
# Bytes of a dimension that every worker may hold.
BROADCAST_BYTES = 64_000_000

# Per range of a plan the bounds of its blocks, µs.
Cuts = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """The spine rows of `[start, end)` µs, and the slices that contain them and the events they can see.

    Args:
        own: the span whose events and dead letters this block accounts for. Own spans of blocks do not overlap.
        spans: per source, the span of time to digest by day.
        summarised: sources that have a summary of the events before the block.
        shards: per source of events, the number of partitions by key hash; empty if the block is computed at once.
        part_rows: about how many rows a partition has.
    """

    index: int
    start: int
    end: int
    own: tuple[int, int]
    spine: Slices
    events: Mapping[str, Slices]
    spans: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    summarised: tuple[str, ...] = ()
    shards: Mapping[str, int] = dataclasses.field(default_factory=dict)
    part_rows: int = BLOCK_ROWS

    def owns(self, source: str) -> tuple[int, int]:
        """The span of events of `source` that this block accounts for. Summaries account for earlier events."""
        return (self.start, self.own[1]) if source in self.summarised else self.own


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturePlan:
    """Blocks that cover the ranges of a run.

    Args:
        ranges: `[start, end)` in µs, in order.
        dates: the dates that the run replaces; None: all dates.
        reached: the span of time that any window can see.
        shuffled: whether each slice is read once and its rows are sent to their blocks. Otherwise each block reads the
            slices it needs.
        routed: dimensions too large for memory. Their rows are read when they are looked up.
    """

    ranges: tuple[tuple[int, int], ...]
    dates: tuple[date, ...] | None
    reached: tuple[int, int]
    blocks: tuple[Block, ...]
    dimensions: Mapping[str, Slices]
    repeats: Mapping[str, pl.DataFrame]
    contracts: Mapping[str, Contract]
    spine: Contract
    shuffled: bool = False
    routed: tuple[str, ...] = ()

    @property
    def start(self) -> int:
        return self.ranges[0][0]

    @property
    def end(self) -> int:
        return self.ranges[-1][1]


def plan_features(
    view: FeatureView, root: str, start: date | None, end: date | None, now: int, block_rows: int = BLOCK_ROWS
) -> FeaturePlan:
    """Divides the interval `[start, end)` of the spine in `root` (None: everything) into blocks, from footers alone.

    Raises:
        DataError: there are no spine rows in the interval, or a source has no files.
        ContractError: files cannot be read as declared.
    """
    inventory = take_inventory(view, root, now)
    repeats = {
        name: repeats_of(inventory.contracts[name], inventory.slices[name]).first
        for name, source in view.events.items()
        if source.unique
    }
    return plan_blocks(
        view,
        inventory,
        [resolve_interval(view, inventory, start, end)],
        repeats,
        PlanOptions(everything=start is None and end is None, block_rows=block_rows),
    )


def resolve_interval(view: FeatureView, inventory: Inventory, start: date | None, end: date | None) -> tuple[int, int]:
    """`[start, end)` in µs; open ends are taken from the data.

    Raises:
        DataError: there are no spine rows in it.
    """
    low, high = inventory.extent
    first = low if start is None else midnight(start)
    last = high if end is None else midnight(end)
    if first >= last or not inventory.slices[view.spine.name].overlapping(first, last):
        where = f"[{day_of(first)}, {day_of(max(last, first))})"
        there = (
            f"none in {where}; there are rows from {day_of(low)} to {day_of(high - 1)}"
            if low < high
            else "no row with a plausible time"
        )
        raise DataError(
            f"Source {view.spine.name!r} has rows in the interval",
            there,
            "Choose another --start and --end, or write the rows first",
        )
    return first, last


@dataclasses.dataclass(frozen=True)
class PlanOptions:
    """How the work of a run is divided.

    Args:
        everything: the ranges contain all rows, so rows without a plausible time also belong to this run.
        digest: blocks digest what they read, for all of each day that the windows of the ranges reach.
        summarised: sources whose past is summarised and digested separately (see `history_snapshots`).
        block_rows: rows (spine and events) of one block.
        shuffled: whether rows are sent to their blocks; None chooses by how many rows would otherwise be read in vain.
        key_shards: partitions by key hash of each block; None: only blocks that would read too many rows have
            partitions.
        broadcast_bytes: a larger dimension is routed.
        cuts: per range the bounds of its blocks; None: they follow from the rows.
    """

    everything: bool = False
    digest: bool = False
    summarised: tuple[str, ...] = ()
    block_rows: int = BLOCK_ROWS
    shuffled: bool | None = None
    key_shards: int | None = None
    broadcast_bytes: float = BROADCAST_BYTES
    cuts: Cuts | None = None


def plan_blocks(
    view: FeatureView,
    inventory: Inventory,
    ranges: Sequence[tuple[int, int]],
    repeats: Mapping[str, pl.DataFrame],
    options: PlanOptions = PlanOptions(),
) -> FeaturePlan:
    """Divides the `[start, end)` ranges of µs into blocks.

    Args:
        repeats: per source, the rows that are kept of its repeats.
    """
    blocks = _time_blocks(view, inventory, ranges, options)
    shuffled = options.shuffled
    if shuffled is None:
        shuffled = sum(map(_rows, blocks)) > FEW_ROWS and in_vain(view, blocks) > MOST_READS
    dimensions = {name: inventory.slices[name] for name in view.dimensions}
    return FeaturePlan(
        ranges=tuple(ranges),
        dates=None if options.everything else tuple(as_date(day) for day in days_within(ranges)),
        reached=_reached_span(inventory.slices[view.spine.name], ranges),
        blocks=tuple(with_shards(view, block, options.block_rows, shuffled, options.key_shards) for block in blocks),
        dimensions=dimensions,
        repeats=repeats,
        contracts=inventory.contracts,
        spine=inventory.spine,
        shuffled=shuffled,
        routed=tuple(
            name
            for name, slices in dimensions.items()
            if memory_bytes(inventory.contracts[name], slices) > options.broadcast_bytes
        ),
    )


def _time_blocks(
    view: FeatureView, inventory: Inventory, ranges: Sequence[tuple[int, int]], options: PlanOptions
) -> list[Block]:
    """Returns the blocks of all ranges, without key shards."""
    spine, events = inventory.slices[view.spine.name], _events_in_sight(view, inventory, options)
    every = options.cuts or block_cuts([(view, inventory)], ranges, options)
    blocks: list[Block] = []
    for (first, last), cuts in zip(ranges, every, strict=True):
        for start, end in itertools.pairwise(cuts):
            spans = _digested_spans(view, start, end, start == first, options) if options.digest else {}
            lows = {name: start - view.reach(name) for name in events}
            lows = {name: min(spans[name][0], low) if name in spans else low for name, low in lows.items()}
            block = Block(
                index=len(blocks),
                start=start,
                end=end,
                own=(
                    ALWAYS if options.everything and start == first else start,
                    FOREVER if options.everything and end == last else end,
                ),
                spine=spine.overlapping(start, end),
                events={name: events[name].overlapping(low, end) for name, low in lows.items()},
                spans=spans,
                summarised=options.summarised,
            )
            blocks.append(block)
    if blocks and options.everything:
        blocks[0] = _with_timeless_rows(view, inventory, blocks[0])
    return blocks


def _events_in_sight(view: FeatureView, inventory: Inventory, options: PlanOptions) -> dict[str, Slices]:
    """The slices of each source of events that are read or digested."""
    if options.digest:  # a first run digests everything in its interval
        return {name: inventory.slices[name] for name in view.events}
    return {name: within_sight(view, inventory, name, *inventory.extent) for name in view.events}


def block_cuts(
    views: Sequence[tuple[FeatureView, Inventory]], ranges: Sequence[tuple[int, int]], options: PlanOptions
) -> Cuts:
    """Per range the bounds of the blocks in which the views, which have one spine, are computed together."""
    events: dict[str, Slices] = {}
    for view, inventory in views:
        for name, slices in _events_in_sight(view, inventory, options).items():
            events[name] = max(events.get(name, slices), slices, key=len)
    view, inventory = views[0]
    spine = inventory.slices[view.spine.name]
    return tuple(
        tuple(_cuts(spine.overlapping(first, last), events, first, last, options.block_rows)) for first, last in ranges
    )


def within_sight(view: FeatureView, inventory: Inventory, name: str, start: int, end: int) -> Slices:
    """The row groups of `name` that the windows of spine rows in `[start, end)` µs can see, by whole days."""
    if start >= end:
        return Slices()
    low = ALWAYS if name in lifetime_sources(view) else midnight(day_number(start - view.reach(name)))
    return inventory.slices[name].overlapping(low, end)


def _digested_spans(
    view: FeatureView, start: int, end: int, first: bool, options: PlanOptions
) -> dict[str, tuple[int, int]]:
    """Returns per source the span that a block digests.

    A day is digested whole or not at all, so the first block of a range reads from the midnight before its reach.
    """
    spans = {
        name: (
            midnight(day_number(start - view.reach(name))) if first and name not in options.summarised else start,
            end,
        )
        for name in view.events
    }
    return spans | {view.spine.name: (spans.get(view.spine.name, (start, end))[0], end)}


def _with_timeless_rows(view: FeatureView, inventory: Inventory, block: Block) -> Block:
    """Adds to the first block the slices whose rows have no plausible time, unless their source is summarised."""
    events = {
        name: slices if name in block.summarised else slices.joined(inventory.timeless(name))
        for name, slices in block.events.items()
    }
    return dataclasses.replace(block, spine=block.spine.joined(inventory.timeless(view.spine.name)), events=events)


def _reached_span(spine: Slices, ranges: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Returns the span of the spine rows in `ranges`."""
    inside = [each for first, last in ranges for each in spine.overlapping(first, last)]
    first, last = ranges[0][0], ranges[-1][1]
    return (
        max(first, min((each.low for each in inside), default=first)),
        min(last, max((each.high for each in inside), default=first) + 1),
    )


def with_shards(
    view: FeatureView, block: Block, block_rows: int, shuffled: bool, key_shards: int | None = None
) -> Block:
    """`block`, partitioned by key hash if it would have too many rows in memory: those that it reads, or those that are
    sent to it."""
    needed = {name: events_reached(view, block, name, unknown=1.0) for name in block.events}
    in_memory = events_reached(view, block) + sum(needed.values()) if shuffled else _rows(block)
    if key_shards == 1 or (key_shards is None and in_memory <= MOST_BLOCKS * block_rows):
        return block
    shards = {name: key_shards or min(-(-rows // block_rows) or 1, MOST_SHARDS) for name, rows in needed.items()}
    return dataclasses.replace(block, shards=shards, part_rows=block_rows)


def events_reached(view: FeatureView, block: Block, source: str | None = None, unknown: float = 0.0) -> int:
    """The approximate number of events of `source` that the block can see; without a source, the number of its spine
    rows."""
    if source is None:
        return rows_within(block.spine, block.start, block.end, unknown)
    return rows_within(block.events[source], block.start - view.reach(source), block.end, unknown)


def rows_within(slices: Sequence[Slice], low: int, high: int, unknown: float = 0.0) -> int:
    """The approximate number of rows of `slices` in `[low, high)` µs, on the assumption that row groups are evenly
    filled.

    Args:
        unknown: the share to assume of row groups whose times are not in the footer.
    """
    total = 0.0
    for each in slices:
        share = max(min(each.high + 1, high) - max(each.low, low), 0) / (each.high + 1 - each.low)
        total += each.rows * (share if each.high < 2**62 else unknown)
    return round(total)


def memory_bytes(contract: Contract, slices: Sequence[Slice]) -> int:
    """The approximate number of bytes that the columns of `slices` take in memory."""
    width = sum(32 if contract.source.schema[name] == pl.String else 8 for name in contract.columns)
    return width * sum(each.rows for each in slices)


def _rows(block: Block) -> int:
    return sum(each.rows for slices in (block.spine, *block.events.values()) for each in slices)


def in_vain(view: FeatureView, blocks: Sequence[Block]) -> float:
    """The number of rows read per row that a block needs: little more than 1 for sources sorted by time."""
    read = sum(map(_rows, blocks))
    needed = sum(
        events_reached(view, block) + sum(events_reached(view, block, name) for name in block.events)
        for block in blocks
    )
    return read / max(needed, 1)


def amplification(blocks: Sequence[Block]) -> float:
    """How often a row is read on average if each block reads its own slices: little more than 1 if sorted by time."""
    read = [
        (name, each)
        for block in blocks
        for name, slices in [("", block.spine), *block.events.items()]
        for each in slices
    ]
    return sum(each.rows for _, each in read) / max(sum(each.rows for _, each in set(read)), 1)


def _cuts(
    spine: Sequence[Slice], events: Mapping[str, Sequence[Slice]], first: int, last: int, block_rows: int
) -> list[int]:
    """Bounds of blocks of about `block_rows` rows, at midnights unless one day alone has too many rows.

    Rows are assumed to be spread evenly over the span of their row group.
    """
    days = midnight(np.arange(day_number(first), days_in(last) + 1))
    rows = np.zeros(len(days) - 1)
    slices = [*spine, *(each for some in events.values() for each in some)]
    lows = np.array([max(each.low, ALWAYS) for each in slices], np.int64)
    highs = np.array([max(each.high, each.low) + 1 for each in slices], np.int64)
    counts = np.array([each.rows for each in slices], np.int64)
    begin, end = (np.searchsorted(days, times, "right") - 1 for times in (lows, highs - 1))
    whole = (begin == end) & (begin >= 0) & (begin < len(rows))  # within one day: all of its rows, if there are many
    rows += np.bincount(begin[whole], counts[whole], len(rows))
    for low, high, count in zip(lows[begin != end], highs[begin != end], counts[begin != end], strict=True):
        share = np.clip(np.minimum(days[1:], high) - np.maximum(days[:-1], low), 0, None) / (high - low)
        rows += share * count
    cuts, block_size = [first], 0.0
    for i, day_rows in enumerate(rows):
        if block_size and block_size + day_rows > block_rows:
            cuts.append(int(days[i]))
            block_size = 0.0
        pieces = int(day_rows // block_rows)
        for piece in range(1, pieces + 1) if pieces else ():
            cut = int(days[i]) + DAY * piece // (pieces + 1)
            if first < cut < last:
                cuts.append(cut)
        block_size = day_rows / (pieces + 1) if pieces else block_size + day_rows
    return [*dict.fromkeys(cut for cut in cuts if cut < last), last]
