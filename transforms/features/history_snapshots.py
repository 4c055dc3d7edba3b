"""Summaries of all events before a block, for windows over all history.

A run starts from the snapshot that an earlier run committed, and never reads the events before it. The time between the
snapshot and the last block is divided into segments, which are summarised in parallel. Then one small step merges the
summaries in order of time and writes, for each block, the summary of everything before it.

The segments of a run cover the time after each snapshot without gaps (`Chain`). Ranges of days with other days between
them share one chain, so that no event enters a summary twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam import pvalue

import transforms.records.record_batch_coder  # noqa: F401  registers the coder of RecordBatches
from schemas.errors import StoreError
from schemas.views import FeatureView
from transforms.features.block_inputs import BlockInput, deduplicate_events
from transforms.features.lifetime_snapshots import (
    SUMMARIES_FOLDER,
    Chain,
    Part,
    SnapshotFiles,
    SnapshotSegment,
    lifetime_groups,
    read_summary,
    write_summary,
)
from transforms.features.lifetime_summaries import merge_summaries, summarise
from transforms.features.plan import Block, FeaturePlan
from transforms.sources.dead_letters import dead_letters_batch
from transforms.sources.reader import ReadOptions, read_slices
from transforms.sources.slices import Slices
from transforms.storage.file_systems import FileSystems


@dataclasses.dataclass(eq=False)
class HistorySnapshots(beam.PTransform):
    """PCollection[SnapshotSegment] → (PCollection of one `SnapshotFiles`; dead letters; tallies)."""

    view: FeatureView
    plan: FeaturePlan
    uri: str
    run_id: str
    chains: tuple[Chain, ...]

    def expand(self, spans: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        step = Summarise(self.view, dataclasses.replace(self.plan, blocks=()), self.uri, self.run_id)
        outputs = (
            spans
            | "Spread" >> beam.Reshuffle()
            | "Summarise" >> beam.ParDo(step).with_outputs("dead_letters", "tallies", main="parts")
        )
        outputs.dead_letters.element_type = pa.RecordBatch
        parts = outputs.parts | "Gather" >> beam.combiners.ToList()
        snapshots = parts | "Merge" >> beam.Map(merge_in_order, self.view, self.uri, self.run_id, self.chains)
        # A runner may repeat the merge, so the parts are removed only after its output is final.
        _ = parts | "Remove" >> beam.Map(remove_parts, beam.pvalue.AsSingleton(snapshots), self.uri)
        return snapshots, outputs.dead_letters, outputs.tallies


class Summarise(beam.DoFn):
    """Segment → `Part`; tagged: dead letters and tallies, if it accounts for its events."""

    def __init__(self, view: FeatureView, plan: FeaturePlan, uri: str, run_id: str) -> None:
        self.view, self.plan, self.uri, self.run_id = view, plan, uri, run_id

    def process(self, segment: SnapshotSegment) -> Iterator[Part | pvalue.TaggedOutput]:
        inputs = {name: read_segment(self.view, self.plan, segment, name) for name in segment.events}
        files = []
        for i, group in enumerate(lifetime_groups(self.view).values()):
            summary = summarise(group, inputs[group[0].source.name].frame)
            files.append(write_summary(self.uri, f"{self.run_id}-part-{segment.index}-{i}", summary))
        yield segment.start, segment.end, tuple(files)
        if segment.accounts:
            dead_letters = dead_letters_batch(self.view, [each.dead_letters for each in inputs.values()])
            if dead_letters.num_rows:
                yield pvalue.TaggedOutput("dead_letters", dead_letters)
        for each in inputs.values():
            yield pvalue.TaggedOutput("tallies", each.tally)


def read_segment(view: FeatureView, plan: FeaturePlan, segment: SnapshotSegment, name: str) -> BlockInput:
    """Events known in the segment, without repeats; with dead letters and a tally only if the segment accounts for
    them."""
    contract = plan.contracts[name]
    own = (segment.start, segment.end) if segment.accounts and contract is not plan.spine else (0, 0)
    span = (segment.start, segment.end) if segment.digests else None
    read = read_slices(contract, segment.events[name], ReadOptions(segment.start, segment.end, own=own, span=span))
    block = Block(0, segment.start, segment.end, (segment.start, segment.end), Slices(), {})
    events = deduplicate_events(view, plan, block, name, read)
    counted = dataclasses.replace(events.tally, used=events.tally.used + events.tally.outside, outside=0)
    nothing = dataclasses.replace(counted, read=0, used=0, repeated=0, dead=0)
    return dataclasses.replace(events, tally=counted if segment.accounts else nothing)


def merge_in_order(
    parts: Iterable[Part], view: FeatureView, uri: str, run_id: str, over: Sequence[Chain]
) -> dict[int, tuple[str, ...]]:
    """Writes the summary of everything before each time in a chain's `wanted`, and returns the file names.

    Raises:
        StoreError: the segments leave a gap or overlap, so that an event would be missed or counted twice.
    """
    groups = list(lifetime_groups(view).values())
    waiting = sorted(parts, reverse=True)
    result: dict[int, tuple[str, ...]] = {}
    for chain in over:
        merged: list[pl.DataFrame] = (
            [read_summary(uri, name) for name in chain.base.files]
            if chain.base is not None
            else [summarise(group, pl.DataFrame(schema=group[0].source.schema)) for group in groups]
        )
        until = chain.start
        for moment in sorted(chain.wanted):
            while until < moment:
                start, end, names = waiting.pop() if waiting else (moment, moment, ())
                if start != until or end > moment:
                    raise StoreError(
                        "Summaries of a source's past must follow each other without a gap",
                        f"what follows {until} begins at {start} and ends at {end}, on the way to {moment}",
                        "Nothing was committed; this is a defect of Millrace: please report it",
                    )
                until = end
                for i, (name, group) in enumerate(zip(names, groups, strict=True)):
                    part, keys = read_summary(uri, name), [column for _, column in group[0].keys]
                    merged[i] = merge_summaries(merged[i], part, keys) if len(merged[i]) else part
            result[moment] = (
                chain.base.files
                if chain.base is not None and moment == chain.start
                else tuple(write_summary(uri, f"{run_id}-{moment}-{i}", summary) for i, summary in enumerate(merged))
            )
    return result


def remove_parts(parts: Iterable[Part], snapshots: SnapshotFiles, uri: str) -> None:
    """Deletes the summaries of segments after the merged ones have been written."""
    paths = [FileSystems.join(uri, SUMMARIES_FOLDER, name) for _, _, names in parts for name in names]
    FileSystems.delete([path for path in paths if FileSystems.exists(path)])
