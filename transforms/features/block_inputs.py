"""A block's inputs: spine rows, the events that they can see, and dimensions; with the tallies of all rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import polars as pl

from schemas.features import Lookup
from schemas.views import FeatureView
from transforms.features.plan import Block, FeaturePlan
from transforms.sources.contracts import Contract
from transforms.sources.day_digests import add_digests
from transforms.sources.dead_letters import concat_dead_letters
from transforms.sources.inventory import Slice
from transforms.sources.reader import ReadOptions, SourceRows, locate_rows, read_slices, stream_slices, without_repeats
from transforms.sources.tallies import AS_EVENTS, SourceTally

ONE_ROW = "one key has one row (the smallest was kept)"
ONE_SPINE_ROW = "one key asks one question at one time (the smallest row was kept)"


@dataclasses.dataclass(frozen=True, eq=False)
class BlockInput:
    """The rows to use, the dead letters (with the schema of `read_slices`), and the tally of both."""

    frame: pl.DataFrame
    dead_letters: pl.DataFrame
    tally: SourceTally


def read_spine(view: FeatureView, plan: FeaturePlan, block: Block) -> BlockInput:
    """The block's spine rows without repeats, sorted by time and key."""
    # A spine that is also a source of events is digested once, as a source of events.
    span = None if view.spine.name in view.events else block.spans.get(view.spine.name)
    reads = stream_slices(plan.spine, block.spine, ReadOptions(block.start, block.end, own=block.own, span=span))
    return deduplicate_spine(view, plan, block, concat_reads(reads))


def concat_reads(reads: Iterable[SourceRows]) -> SourceRows:
    """Concatenates the pieces of a source."""
    reads = list(reads)
    dead_letters = concat_dead_letters([each.dead_letters for each in reads])
    return SourceRows(
        pl.concat([each.frame for each in reads]),
        dead_letters,
        add_digests([each.digests for each in reads]),
        sum(each.loaded for each in reads),
    )


def deduplicate_spine(view: FeatureView, plan: FeaturePlan, block: Block, read: SourceRows) -> BlockInput:
    """The spine rows in `read` without repeats. Contradictory rows become dead letters."""
    spine, conflicts = distinct_by_key(read.frame, (view.time, *view.key))
    conflicting = locate_rows(plan.spine, block.spine, conflicts, view.key, ONE_SPINE_ROW)
    dead_letters = concat_dead_letters([read.dead_letters, conflicting])
    total = len(read.frame) + len(read.dead_letters)
    tally = SourceTally(
        view.spine.name,
        total,
        len(spine),
        0,
        total - len(spine) - len(dead_letters),
        len(dead_letters),
        read.digests,
        read.loaded,
    )
    return BlockInput(spine, dead_letters, tally)


def read_events(view: FeatureView, plan: FeaturePlan, block: Block, name: str) -> BlockInput:
    """Reads the events that the block's windows can reach, without repeats.

    Dead letters and tallies are those of the events that the block owns.
    """
    return deduplicate_events(
        view,
        plan,
        block,
        name,
        read_slices(plan.contracts[name], block.events[name], within_reach(view, plan, block, name)),
    )


def reads_alike(view: FeatureView, plan: FeaturePlan, block: Block) -> bool:
    """Whether the spine is also a source of events, and the block reads the same slices of it for both."""
    name = view.spine.name
    return plan.contracts.get(name) is plan.spine and set(block.events[name]) == set(block.spine)


def read_spine_and_events(view: FeatureView, plan: FeaturePlan, block: Block) -> tuple[BlockInput, BlockInput]:
    """`read_spine`, and `read_events` of the spine as a source of events, from one read of the files."""
    name = view.spine.name
    options = dataclasses.replace(within_reach(view, plan, block, name), own=None)
    read = read_slices(plan.spine, block.spine, options)
    moment = pl.col(view.time).to_physical()
    spine = SourceRows(
        read.frame.filter((moment >= block.start) & (moment < block.end)),
        read.dead_letters.filter(pl.col("time").is_between(*block.own, closed="left")),
    )
    events = SourceRows(read.frame, read.dead_letters.clear(), read.digests, read.loaded)
    return deduplicate_spine(view, plan, block, spine), deduplicate_events(view, plan, block, name, events)


def stream_events(view: FeatureView, plan: FeaturePlan, block: Block, name: str) -> Iterator[SourceRows]:
    """Like `read_events`, but in chunks and with repeats."""
    return stream_slices(plan.contracts[name], block.events[name], within_reach(view, plan, block, name))


def within_reach(view: FeatureView, plan: FeaturePlan, block: Block, name: str) -> ReadOptions:
    """What to read of `name` for a block."""
    contract, span = plan.contracts[name], block.spans.get(name)
    # The dead letters of the spine are emitted where it is read as the spine.
    own = (0, 0) if contract is plan.spine else block.owns(name)
    low = min(block.start - view.reach(name), block.owns(name)[0], span[0] if span else block.start)
    return ReadOptions(low, block.end, own=own, span=span)


def deduplicate_events(view: FeatureView, plan: FeaturePlan, block: Block, name: str, read: SourceRows) -> BlockInput:
    """The events in `read` without repeats, and the tally of those that the block owns."""
    contract = plan.contracts[name]
    if contract is plan.spine:  # a key has at most one spine row at any time
        kept, _ = distinct_by_key(read.frame, (view.time, *view.key))
    else:
        kept = without_repeats(contract.source, read.frame, plan.repeats.get(name))
    moment = pl.col(str(contract.source.time)).to_physical()
    start, end = block.owns(name)
    owned = (moment >= start) & (moment < end)
    first, last = plan.reached
    reached = owned & (moment >= first - view.reach(name)) & (moment < last)
    good = int(read.frame.select(owned.sum()).item())
    counts = kept.select(owned.sum().alias("owned"), reached.sum().alias("reached")).row(0)
    dead = len(read.dead_letters)
    tally = SourceTally(
        label(plan, name),
        good + dead,
        counts[1],
        counts[0] - counts[1],
        good - counts[0],
        dead,
        read.digests,
        read.loaded,
    )
    return BlockInput(kept, read.dead_letters, tally)


def label(plan: FeaturePlan, name: str) -> str:
    """The name of the tally of the events of `name`. A spine that is also a source of events is read twice."""
    return name + AS_EVENTS if plan.contracts[name] is plan.spine else name


def read_dimension(view: FeatureView, plan: FeaturePlan, name: str) -> BlockInput:
    """Reads a dimension, one row per key of each `Lookup`. Its dead letters have no time."""
    contract, slices = plan.contracts[name], plan.dimensions[name]
    read = read_slices(contract, slices)
    frame = dimension_rows(contract, read.frame)
    dead_letters, refused = contradictions(view, contract, slices, frame)
    used = len(frame) - refused
    # A row that loses for one Lookup may serve another with other keys, so it stays in the frame, after the winner.
    return BlockInput(
        frame,
        *tally_dimension(name, len(read.frame) + len(read.dead_letters), used, [read.dead_letters, *dead_letters]),
    )


def dimension_rows(contract: Contract, frame: pl.DataFrame) -> pl.DataFrame:
    """Returns a dimension's rows, each once and in order, without the columns that only order them.

    Of several rows with one key the first is looked up.
    """
    order = contract.source.ties(frame.columns)
    if not contract.ordering:
        return frame.unique().sort(order)
    columns = list(contract.columns)
    return frame.sort(order).unique(columns, keep="first", maintain_order=True).select(columns)


def losing(frame: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Rows of a dimension (`dimension_rows`) that come after another row with the same key."""
    several = frame.filter(frame.select(pl.struct(key).is_duplicated()).to_series())
    return several.join(
        several.unique(key, keep="first", maintain_order=True), on=frame.columns, how="anti", nulls_equal=True
    )


def contradictions(
    view: FeatureView, contract: Contract, slices: Sequence[Slice], frame: pl.DataFrame
) -> tuple[list[pl.DataFrame], int]:
    """Returns the dead letters, per `Lookup`, of rows that lose to another row of their key, and how many they are."""
    dead_letters, refused = [], []
    for feature in view.features:
        if isinstance(feature, Lookup) and feature.source.name == contract.source.name:
            key = tuple(column for _, column in feature.keys)
            conflicts = losing(frame, key)
            refused.append(conflicts)
            dead_letters.append(locate_rows(contract, slices, conflicts, key, ONE_ROW))
    return dead_letters, len(pl.concat(refused).unique())


def tally_dimension(
    name: str, total: int, used: int, dead_letters: Sequence[pl.DataFrame]
) -> tuple[pl.DataFrame, SourceTally]:
    """A dimension's dead letters, without a time, and the tally of its `total` rows.

    Every run reads all of a dimension, so dead letters dated by the run would be repeated by each run.
    """
    dead = (
        concat_dead_letters(dead_letters)
        .unique(["file", "row"], keep="first", maintain_order=True)
        .with_columns(pl.lit(0, pl.Int64).alias("time"))
    )
    return dead, SourceTally(name, total, used, 0, total - used - len(dead), len(dead), loaded=total)


def distinct_by_key(frame: pl.DataFrame, by: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Returns one row per value of `by`, sorted by it, and the rows that contradict them.

    Identical rows count once. Of different rows the smallest by all columns is kept.
    """
    frame = frame.sort(by, maintain_order=True)
    if len(frame) < 2:
        return frame, frame.clear()
    same = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in by)
    if not frame.select(same.slice(1).any()).item():
        return frame, frame.clear()
    frame = frame.unique().sort([*by, *(name for name in frame.columns if name not in by)])
    kept = frame.unique(by, keep="first", maintain_order=True)
    return kept, frame.join(kept, on=frame.columns, how="anti", nulls_equal=True)
