"""Computes features from events and spine rows, block by block."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam import pvalue, typehints

from schemas.views import FeatureView
from transforms.features.block_features import BlockTables, compute_features
from transforms.features.block_inputs import (
    BlockInput,
    deduplicate_events,
    deduplicate_spine,
    read_dimension,
    read_events,
    read_spine,
    read_spine_and_events,
    reads_alike,
    stream_events,
)
from transforms.features.column_reuse import Copies
from transforms.features.kernel import KernelTables, kernel_pool
from transforms.features.key_partitions import KeyedEvents
from transforms.features.lifetime_snapshots import SnapshotFiles, load_summaries, stream_summaries
from transforms.features.plan import Block, FeaturePlan
from transforms.features.routed_dimensions import account
from transforms.features.shuffle import SPINE, Route, received, received_read, routes
from transforms.records.prefetch import PrefetchDoFn
from transforms.sources.dead_letters import dead_letters_batch

log = logging.getLogger("millrace.features")


@dataclasses.dataclass(eq=False)  # Beam sets the label
class TrailingFeatures(beam.PTransform):
    """PCollection[Block] → PCollections of features, dead letters and tallies.

    Features are RecordBatches of `view.output_schema`, sorted by time and key. Dead letters are RecordBatches of
    `DEAD_LETTERS`. Tallies are `tallies.SourceTally`.

    A block is computed at once. It reads the slices it needs, and nothing is shuffled. In a shuffled plan each slice is
    read once, and its rows are sent to the blocks that need them.

    Args:
        snapshots: per block, the files of the lifetime summaries that `history_snapshots` wrote under `uri`.
        copies: columns that are copied instead of computed.
    """

    view: FeatureView
    plan: FeaturePlan
    snapshots: pvalue.AsSingleton | None = None
    uri: str = ""
    copies: Copies | None = None

    def expand(self, blocks: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        rules, count = dataclasses.replace(self.plan, blocks=()), len(self.plan.blocks)
        side = () if self.snapshots is None else (self.snapshots,)
        if not self.plan.shuffled:
            compute_block = ComputeBlock(self.view, rules, count, self.uri, self.copies)
            return typed(blocks | "Compute" >> beam.ParDo(compute_block, *side).with_outputs(*TAGS, main=FEATURES))
        slices = blocks.pipeline | "Slices" >> beam.Create(list(routes(self.plan))) | "Spread" >> beam.Reshuffle()
        routed = slices | "Route" >> beam.ParDo(Route(self.view, self.plan)).with_outputs(*TAGS, main=FEATURES)
        routed[FEATURES].element_type = typehints.Tuple[int, typehints.Tuple[str, bytes]]
        gathered = routed[FEATURES] | "Gather" >> beam.GroupByKey()
        gather = ComputeGathered(self.view, rules, self.plan.blocks, self.uri, self.copies)
        features, dead_letters, tallies = typed(
            gathered | "Compute" >> beam.ParDo(gather, *side).with_outputs(*TAGS, main=FEATURES)
        )
        routed.dead_letters.element_type = pa.RecordBatch
        return (
            features,
            (dead_letters, routed.dead_letters) | "DeadLetters" >> beam.Flatten(),
            (tallies, routed.tallies) | "Tallies" >> beam.Flatten(),
        )


FEATURES, TAGS = "features", ("dead_letters", "tallies")


def typed(outputs: pvalue.DoOutputsTuple) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
    """Features, dead letters and tallies. The first two have RecordBatch type hints."""
    features, dead_letters = outputs[FEATURES], outputs.dead_letters
    features.element_type = dead_letters.element_type = pa.RecordBatch
    return features, dead_letters, outputs.tallies


class ComputeBlock(PrefetchDoFn):
    """Block → its features; tagged outputs are its dead letters and tallies.  The first block accounts for the
    dimensions."""

    def __init__(
        self, view: FeatureView, plan: FeaturePlan, blocks: int, uri: str = "", copies: Copies | None = None
    ) -> None:
        self.view, self.plan, self.blocks, self.uri, self.copies = view, plan, blocks, uri, copies

    def setup(self) -> None:
        super().setup()
        broadcast = [name for name in self.plan.dimensions if name not in self.plan.routed]
        self.dimensions = {name: read_dimension(self.view, self.plan, name) for name in broadcast}

    def process(
        self, block: Block, snapshots: SnapshotFiles | None = None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        if block.shards:
            yield from self.prefetch(lambda: block, lambda _: self.compute_from_disk(block, snapshots))
        else:
            read = functools.partial(read_block, self.view, self.plan, block)
            yield from self.prefetch(read, lambda inputs: self.outputs(block, *inputs, snapshots))

    def compute_from_disk(
        self, block: Block, snapshots: SnapshotFiles | None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        """Writes the block's events to disk as they are read, and yields the block's outputs."""
        with spill_events(self.view, self.plan, block) as events:
            for name in block.events:
                for read in stream_events(self.view, self.plan, block, name):
                    events.add(name, read)
            yield from self.outputs_from_disk(block, read_spine(self.view, self.plan, block), events, snapshots)

    def outputs(
        self, block: Block, spine: BlockInput, events: Mapping[str, BlockInput], snapshots: SnapshotFiles | None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        """Yields the outputs of a block whose events are in memory."""
        summaries = {} if snapshots is None else load_summaries(self.view, self.uri, block, snapshots)
        rows = {name: each.frame for name, each in (*self.dimensions.items(), *events.items())}
        inputs = BlockTables(KernelTables(rows, summaries), self.plan)
        yield from self._outputs(block, spine, inputs, list(events.values()))

    def outputs_from_disk(
        self, block: Block, spine: BlockInput, events: KeyedEvents, snapshots: SnapshotFiles | None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        """Yields the outputs of a block whose events are on disk, partitioned by the hash of their keys."""
        read = list(events.finish().values())
        for key, rows in stream_summaries(self.view, self.uri, block, snapshots) if snapshots is not None else ():
            events.add_summary(key, rows)
        dimensions = {name: each.frame for name, each in self.dimensions.items()}
        yield from self._outputs(block, spine, BlockTables(KernelTables(dimensions), self.plan, events), read)

    def _outputs(
        self, block: Block, spine: BlockInput, inputs: BlockTables, events: list[BlockInput]
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        features = compute_features(self.view, spine.frame, inputs, self.copies)
        log.info("block %d of %d: %d rows", block.index + 1, self.blocks, features.num_rows)
        if features.num_rows:
            yield features
        read = [spine, *events]
        if block.index == 0:
            read += [*self.dimensions.values(), *(account(self.view, self.plan, name) for name in self.plan.routed)]
        yield from side_outputs(self.view, read)


class ComputeGathered(ComputeBlock):
    """(index of a block, the rows that were sent to it) → the outputs of `ComputeBlock`."""

    def __init__(
        self, view: FeatureView, plan: FeaturePlan, blocks: Sequence[Block], uri: str = "", copies: Copies | None = None
    ) -> None:
        super().__init__(view, plan, len(blocks), uri, copies)
        self.by_index = {block.index: block for block in blocks}

    def process(  # type: ignore[override]
        self, element: tuple[int, Iterable[tuple[str, bytes]]], snapshots: SnapshotFiles | None = None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        block = self.by_index[element[0]]
        parts: dict[str, list[bytes]] = {name: [] for name in (SPINE, *block.events)}
        if block.shards:
            # A block too large for memory is written to disk as it is read, so no other block may be in memory.
            yield from self.rest()
            yield from self._spilled(block, element[1], snapshots)
            return
        for name, rows in element[1]:
            parts[name].append(rows)
        read = functools.partial(self._read_gathered, block, parts)
        yield from self.prefetch(read, lambda inputs: self.outputs(block, *inputs, snapshots))

    def _read_gathered(self, block: Block, parts: dict[str, list[bytes]]) -> tuple[BlockInput, dict[str, BlockInput]]:
        loaded = {name: [received(rows) for rows in each] for name, each in parts.items()}
        spine = self._spine(block, loaded.pop(SPINE))
        reads = {name: received_read(self.plan, name, each) for name, each in loaded.items()}
        return spine, {
            name: deduplicate_events(self.view, self.plan, block, name, read) for name, read in reads.items()
        }

    def _spilled(
        self, block: Block, rows_of: Iterable[tuple[str, bytes]], snapshots: SnapshotFiles | None
    ) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        spine: list[pl.DataFrame] = []
        with spill_events(self.view, self.plan, block) as events:
            for name, rows in rows_of:
                if name == SPINE:
                    spine.append(received(rows))
                else:
                    events.add(name, received_read(self.plan, name, [received(rows)]))
            yield from self.outputs_from_disk(block, self._spine(block, spine), events, snapshots)

    def _spine(self, block: Block, parts: Sequence[pl.DataFrame]) -> BlockInput:
        return deduplicate_spine(self.view, self.plan, block, received_read(self.plan, SPINE, parts))


@contextlib.contextmanager
def spill_events(view: FeatureView, plan: FeaturePlan, block: Block) -> Iterator[KeyedEvents]:
    """A temporary folder on local disk for a block's events, deleted when its features are computed."""
    with tempfile.TemporaryDirectory(prefix="millrace-", ignore_cleanup_errors=True) as folder:
        yield KeyedEvents(view, plan, block, folder)


def read_block(view: FeatureView, plan: FeaturePlan, block: Block) -> tuple[BlockInput, dict[str, BlockInput]]:
    """The block's spine rows and, per source, the events they can see. Sources are read in parallel."""
    pool, name = kernel_pool(), view.spine.name
    if not reads_alike(view, plan, block):
        spine = pool.submit(read_spine, view, plan, block)
        events = {each: pool.submit(read_events, view, plan, block, each) for each in block.events}
        return spine.result(), {each: task.result() for each, task in events.items()}
    both = pool.submit(read_spine_and_events, view, plan, block)
    others = {each: pool.submit(read_events, view, plan, block, each) for each in block.events if each != name}
    asked, known = both.result()
    return asked, {each: known if each == name else others[each].result() for each in block.events}


def side_outputs(view: FeatureView, inputs: Iterable[BlockInput]) -> Iterator[pvalue.TaggedOutput]:
    """The dead letters and tallies of what was read, as tagged outputs."""
    inputs = list(inputs)
    dead_letters = dead_letters_batch(view, [each.dead_letters for each in inputs])
    if dead_letters.num_rows:
        yield pvalue.TaggedOutput("dead_letters", dead_letters)
    for each in inputs:
        yield pvalue.TaggedOutput("tallies", each.tally)


def compute_block(
    view: FeatureView, plan: FeaturePlan, block: Block, dimensions: Mapping[str, BlockInput]
) -> tuple[pa.RecordBatch, list[BlockInput]]:
    """The block's features, and the inputs they were computed from, all in memory."""
    spine, events = read_block(view, plan, block)
    tables = KernelTables({name: each.frame for name, each in (*dimensions.items(), *events.items())})
    return compute_features(view, spine.frame, BlockTables(tables, plan)), [spine, *events.values()]
