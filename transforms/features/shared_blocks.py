"""Computes several views over one spine block by block: each source is read once, and what they have in common is
computed once.

Shared are the reading of each source of events, the histories of equal (source, keys, condition), and columns of equal
meaning.  Dimensions, checks, tallies and statistics are each view's own.  A block in which a row breaks the contract of
a column that not all views read is read once, and computed view by view: the views may see different rows.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam import pvalue

from schemas.views import FeatureView
from transforms.features.block_features import BlockTables, compute_features, compute_stages, features_batch
from transforms.features.block_inputs import (
    BlockInput,
    deduplicate_events,
    deduplicate_spine,
    read_dimension,
    within_reach,
)
from transforms.features.column_reuse import Copies, reading_features, sources_needed
from transforms.features.kernel import KernelTables, kernel_pool
from transforms.features.plan import Block, FeaturePlan
from transforms.features.trailing_features import side_outputs
from transforms.features.window_statistics import Once
from transforms.records.prefetch import PrefetchDoFn
from transforms.sources.contracts import Contract
from transforms.sources.reader import ReadOptions, SourceRows, UncheckedRows, without_repeats
from transforms.sources.slices import Slices

log = logging.getLogger("millrace.features")


@dataclasses.dataclass(frozen=True, eq=False)
class ViewPart:
    """One of the views that are computed together.

    Args:
        view: the view.
        plan: its plan; all parts have blocks of the same times.
        copies: columns that are copied from an older table; such a view shares reading only.
    """

    view: FeatureView
    plan: FeaturePlan
    copies: Copies | None = None

    @property
    def alone(self) -> ViewPart:
        """The part without its blocks, which are elements of the graph."""
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, blocks=()))


@dataclasses.dataclass(frozen=True, eq=False)
class SharedInput:
    """What a block of all views reads.

    Args:
        spines: per view.
        events: per view and source.
        rows: sources of which all views see the same rows, with the columns of all.
    """

    spines: Sequence[BlockInput]
    events: Sequence[Mapping[str, BlockInput]]
    rows: Mapping[str, pl.DataFrame]


def read_together(parts: Sequence[ViewPart], blocks: Sequence[Block]) -> SharedInput:
    """The spine rows and events of one block of each view, from one read of each source."""
    pool, spine = kernel_pool(), parts[0].view.spine.name
    names = list(dict.fromkeys([spine, *(name for block in blocks for name in block.events)]))
    tasks = {name: pool.submit(_read_source, parts, blocks, name) for name in names}
    found = {name: task.result() for name, task in tasks.items()}
    return SharedInput(
        found[spine].spines,
        [{name: found[name].events[i] for name in block.events} for i, block in enumerate(blocks)],
        {name: each.rows for name, each in found.items() if each.rows is not None},
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _SourceInput:
    spines: Sequence[BlockInput]
    events: Mapping[int, BlockInput]
    rows: pl.DataFrame | None


def _read_source(parts: Sequence[ViewPart], blocks: Sequence[Block], name: str) -> _SourceInput:
    reading = [i for i, block in enumerate(blocks) if name in block.events]
    as_spine = name == parts[0].view.spine.name
    contracts = {i: parts[i].plan.contracts[name] for i in reading}
    contract = parts[0].plan.spine if as_spine else _union(list(contracts.values()))
    some = [blocks[i].events[name] for i in reading] + ([blocks[0].spine] if as_spine else [])
    slices = Slices(dict.fromkeys(each for slices in some for each in slices))
    raw = UncheckedRows.of(contract, slices)
    counted = False  # the rows that are read are counted once, for the first view that reads them

    def once(read: SourceRows) -> SourceRows:
        nonlocal counted
        loaded, counted = (0 if counted else len(raw.whole)), True
        return dataclasses.replace(read, loaded=loaded)

    spines: list[BlockInput] = []
    if as_spine:
        known: dict[ReadOptions, BlockInput] = {}
        for part, block in zip(parts, blocks, strict=True):
            span = None if name in part.view.events else block.spans.get(name)
            options = ReadOptions(block.start, block.end, own=block.own, span=span)
            if options not in known:
                read = once(raw.checked(part.plan.spine, options))
                known[options] = deduplicate_spine(part.view, part.plan, block, read)
            spines.append(known[options])
            if len(spines) > 1:
                spines[-1] = dataclasses.replace(spines[-1], tally=dataclasses.replace(spines[-1].tally, loaded=0))
    if not reading:
        return _SourceInput(spines, {}, None)
    wanted = {i: within_reach(parts[i].view, parts[i].plan, blocks[i], name) for i in reading}
    low, high = min(each.low for each in wanted.values()), max(each.high for each in wanted.values())
    every = raw.checked(contract, ReadOptions(low, high))
    alike = as_spine or not len(every.dead_letters) or all(each.read == contract.read for each in contracts.values())
    alike = alike and all(each.reads_times_as(contract) for each in contracts.values())
    repeats = [parts[i].plan.repeats.get(name) for i in reading]
    alike = alike and all(_equal(repeats[0], each) for each in repeats[1:])
    events: dict[int, BlockInput] = {}
    for i in reading:
        part, options = parts[i], wanted[i]
        if alike and not len(every.dead_letters):
            digests = raw.digests(contracts[i], options)
            moment = pl.col(str(contract.source.time)).to_physical()
            frame = every.frame if options.low <= low else every.frame.filter(moment >= options.low)
            read = SourceRows(frame, every.dead_letters, digests)
        else:
            read = raw.checked(contracts[i], options)
        events[i] = deduplicate_events(part.view, part.plan, blocks[i], name, once(read))
    rows: pl.DataFrame | None = None
    if alike:
        first = next(i for i in reading if wanted[i].low <= low)
        complete = set(events[first].frame.columns) == set(contract.read)
        rows = events[first].frame if complete else _without_repeats(contract, every.frame, repeats[0])
    return _SourceInput(spines, events, rows)


def _union(contracts: Sequence[Contract]) -> Contract:
    """A contract with the columns of all; of what only orders rows in one and is checked in another, it is checked."""
    source = contracts[0].source
    checked, read = ({name for each in contracts for name in getattr(each, kind)} for kind in ("columns", "read"))
    return dataclasses.replace(
        contracts[0],
        columns=tuple(name for name in source.schema if name in checked),
        ordering=tuple(name for name in source.schema if name in read - checked),
    )


def _without_repeats(contract: Contract, frame: pl.DataFrame, repeats: pl.DataFrame | None) -> pl.DataFrame:
    return without_repeats(contract.source, frame, repeats)


def _equal(one: pl.DataFrame | None, other: pl.DataFrame | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.height == other.height and one.sort(one.columns).equals(other.select(one.columns).sort(one.columns))


def compute_together(
    parts: Sequence[ViewPart], inputs: SharedInput, dimensions: Sequence[Mapping[str, BlockInput]]
) -> Iterator[pa.RecordBatch]:
    """The features of a block of each view, in turn; the same bits as when each view is computed alone."""
    shared, columns = Once(), dict[str, pl.Series]()
    for part, spine, events, own in zip(parts, inputs.spines, inputs.events, dimensions, strict=True):
        view = part.view
        alike = part.copies is None and set(events) <= set(inputs.rows)
        rows = {name: each.frame for name, each in (*own.items(), *events.items())}
        if not alike:
            tables = KernelTables(rows)
            yield compute_features(view, spine.frame, BlockTables(tables, part.plan), part.copies)
            continue
        same = _comparable(view)
        known = {name: columns[same[name]].alias(name) for name in same if same[name] in columns}
        tables = KernelTables(rows | {name: inputs.rows[name] for name in events}, columns=known, histories=shared)
        found = compute_stages(view, spine.frame, BlockTables(tables, part.plan))
        columns |= {meaning: found[name] for name, meaning in same.items()}
        yield features_batch(view, found)


def _comparable(view: FeatureView) -> dict[str, str]:
    """Per feature that is read from events alone its meaning: with equal rows, features of equal meaning are equal."""
    needs = sources_needed(view)
    return {
        name: view.meanings[name]
        for name in reading_features(view)
        if not any(source in view.dimensions for source, _ in needs[name])
    }


@dataclasses.dataclass(eq=False)  # Beam sets the label
class SharedFeatures(beam.PTransform):
    """PCollection of one `Block` per view → per view PCollections of features, dead letters and tallies.

    Args:
        parts: views over one spine; no plan is shuffled, has key shards or reads a snapshot.
    """

    parts: tuple[ViewPart, ...]

    def expand(self, blocks: beam.PCollection) -> list[tuple[beam.PCollection, beam.PCollection, beam.PCollection]]:
        numbers = range(len(self.parts))
        tags = [f"{kind}{i}" for i in numbers for kind in ("features", "dead_letters", "tallies")]
        count = len(self.parts[0].plan.blocks)
        compute = ComputeTogether(tuple(part.alone for part in self.parts), count)
        made = blocks | "Compute" >> beam.ParDo(compute).with_outputs(*tags)
        for i in numbers:
            made[f"features{i}"].element_type = made[f"dead_letters{i}"].element_type = pa.RecordBatch
        return [(made[f"features{i}"], made[f"dead_letters{i}"], made[f"tallies{i}"]) for i in numbers]


class ComputeTogether(PrefetchDoFn):
    """One block of each view → tagged outputs, whose tags end in the number of the view."""

    def __init__(self, parts: tuple[ViewPart, ...], blocks: int) -> None:
        self.parts, self.blocks = parts, blocks

    def setup(self) -> None:
        super().setup()
        self.dimensions = [
            {name: read_dimension(part.view, part.plan, name) for name in part.plan.dimensions} for part in self.parts
        ]

    def process(self, blocks: tuple[Block, ...]) -> Iterator[pvalue.TaggedOutput]:
        read = functools.partial(read_together, self.parts, blocks)
        yield from self.prefetch(read, lambda inputs: self._outputs(blocks, inputs))

    def _outputs(self, blocks: tuple[Block, ...], inputs: SharedInput) -> Iterator[pvalue.TaggedOutput]:
        computed = compute_together(self.parts, inputs, self.dimensions)
        for i, (part, block, features) in enumerate(zip(self.parts, blocks, computed, strict=True)):
            log.info("%s: block %d of %d: %d rows", part.view.name, block.index + 1, self.blocks, features.num_rows)
            if features.num_rows:
                yield pvalue.TaggedOutput(f"features{i}", features)
            read = [inputs.spines[i], *inputs.events[i].values()]
            if block.index == 0:
                read += self.dimensions[i].values()
            for each in side_outputs(part.view, read):
                yield pvalue.TaggedOutput(f"{each.tag}{i}", each.value)
