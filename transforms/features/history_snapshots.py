"""Summaries of all events before a block, for windows over all history.

A run starts from the snapshot that an earlier run committed, and never reads the events before it. The time between the
snapshot and the last block is divided into segments, which are summarised in parallel. Then one small step merges the
summaries in order of time and writes, for each block, the summary of everything before it.

The segments of a run cover the time after each snapshot without gaps (`Chain`). Ranges of days with other days between
them share one chain, so that no event enters a summary twice.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam import pvalue
from apache_beam.io.filesystems import FileSystems

from schemas.errors import StoreError
from schemas.feature_groups import EventFeature, HistoryKey, group_key
from schemas.features import is_lifetime
from schemas.views import FeatureView, lifetime_sources
from transforms.features.block_inputs import BlockInput, deduplicate_events
from transforms.features.lifetime_summaries import Summary, merge, summarise
from transforms.features.plan import Block, FeaturePlan
from transforms.records.times import ALWAYS, day_number, midnight
from transforms.sources.dead_letters import dead_letters_batch
from transforms.sources.inventory import Slice
from transforms.sources.reader import CHUNK_ROWS, read_slices
from transforms.storage.delta_tables import write_aside

FOLDER = "_summaries"


@dataclasses.dataclass(frozen=True)
class Segment:
    """A span of time `[start, end)` in µs to summarise.

    Args:
        accounts: whether its events are accounted for nowhere else.
        digests: whether its events are digested by day.
    """

    index: int
    start: int
    end: int
    accounts: bool
    digests: bool
    events: Mapping[str, tuple[Slice, ...]]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The summaries of everything before `until` µs: file name per group, in the order of `lifetime_groups`."""

    until: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """The time `[start, end)` in µs, summarised without gaps.

    Args:
        base: the snapshot it starts from; None: it starts with the first event there is.
        wanted: the times (µs) at which it writes the summary of everything before.
    """

    base: Snapshot | None
    end: int
    wanted: tuple[int, ...]

    @property
    def start(self) -> int:
        return ALWAYS if self.base is None else self.base.until


# A summarised segment: its start and end, and the files of its summaries.
Part = tuple[int, int, tuple[str, ...]]
# Per time (µs) the files of the summaries of everything before it.
SnapshotFiles = Mapping[int, tuple[str, ...]]


def lifetime_groups(view: FeatureView) -> dict[HistoryKey, tuple[EventFeature, ...]]:
    """The features of each history that some lifetime window sees, in the order of a snapshot's files."""
    groups: dict[HistoryKey, list[EventFeature]] = {}
    for feature in view.features:
        if isinstance(feature, EventFeature):
            groups.setdefault(group_key(feature).history, []).append(feature)
    return {key: tuple(group) for key, group in groups.items() if any(map(is_lifetime, group))}


def chains(plan: FeaturePlan, found: Mapping[int, Snapshot | None]) -> tuple[Chain, ...]:
    """Plans how the summaries before every block are made.

    Chains do not overlap. A range continues the chain of the range before it, through the time between them, unless its
    snapshot is later than that.

    Args:
        found: per start of a range, the newest usable snapshot before it.
    """
    made: list[Chain] = []
    for first, last in plan.ranges:
        wanted = (*(block.start for block in plan.blocks if first <= block.start < last), last)
        base = found.get(first)
        if made and (base is None or base.until <= made[-1].end):
            made[-1] = dataclasses.replace(made[-1], end=last, wanted=(*made[-1].wanted, *wanted))
        else:
            made.append(Chain(base, last, wanted))
    return tuple(made)


def segments(
    view: FeatureView,
    plan: FeaturePlan,
    over: Sequence[Chain],
    slices: Mapping[str, Sequence[Slice]],
    timeless: Mapping[str, Sequence[Slice]],
) -> tuple[Segment, ...]:
    """Divides each chain into segments, at the starts and ends of blocks and ranges."""
    sources = lifetime_sources(view)
    result: list[Segment] = []
    for chain in over:
        cuts = sorted({chain.start, *chain.wanted})
        for low, high in itertools.pairwise(cuts):
            before = high <= plan.start
            inside = {
                name: tuple(
                    dict.fromkeys(
                        [
                            *(each for each in slices[name] if each.low < high and each.high >= low),
                            *(timeless.get(name, ()) if low == ALWAYS else ()),
                        ]
                    )
                )
                for name in sources
            }
            result.append(Segment(len(result), low, high, before and plan.dates is None, before, inside))
    return tuple(result)


@dataclasses.dataclass(eq=False)
class HistorySnapshots(beam.PTransform):
    """PCollection[Segment] → (PCollection of one `SnapshotFiles`; dead letters; tallies)."""

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

    def process(self, segment: Segment) -> Iterator[Part | pvalue.TaggedOutput]:
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


def read_segment(view: FeatureView, plan: FeaturePlan, segment: Segment, name: str) -> BlockInput:
    """Events known in the segment, without repeats; with dead letters and a tally only if it accounts for them."""
    contract = plan.contracts[name]
    own = (segment.start, segment.end) if segment.accounts and contract is not plan.spine else (0, 0)
    span = (segment.start, segment.end) if segment.digests else None
    read = read_slices(contract, segment.events[name], segment.start, segment.end, own=own, span=span)
    block = Block(0, segment.start, segment.end, (segment.start, segment.end), (), {})
    events = deduplicate_events(view, plan, block, name, read)
    counted = dataclasses.replace(events.tally, used=events.tally.used + events.tally.outside, outside=0)
    nothing = dataclasses.replace(counted, read=0, used=0, repeated=0, dead=0)
    return dataclasses.replace(events, tally=counted if segment.accounts else nothing)


def merge_in_order(
    parts: Iterable[Part], view: FeatureView, uri: str, run_id: str, over: Sequence[Chain]
) -> dict[int, tuple[str, ...]]:
    """Writes the summary of everything before each time that a chain wants, and returns the file names.

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
                        "Summaries of a source's past follow each other without a gap",
                        f"what follows {until} begins at {start} and ends at {end}, on the way to {moment}",
                        "Nothing was committed; this is a defect of Millrace: please report it",
                    )
                until = end
                for i, (name, group) in enumerate(zip(names, groups, strict=True)):
                    part, keys = read_summary(uri, name), [column for _, column in group[0].keys]
                    merged[i] = merge(merged[i], part, keys) if len(merged[i]) else part
            result[moment] = (
                chain.base.files
                if chain.base is not None and moment == chain.start
                else tuple(write_summary(uri, f"{run_id}-{moment}-{i}", summary) for i, summary in enumerate(merged))
            )
    return result


def remove_parts(parts: Iterable[Part], snapshots: SnapshotFiles, uri: str) -> None:
    """Deletes the summaries of segments after the merged ones have been written."""
    paths = [FileSystems.join(uri, FOLDER, name) for _, _, names in parts for name in names]
    FileSystems.delete([path for path in paths if FileSystems.exists(path)])


def left_for_later(snapshots: SnapshotFiles) -> dict[int, tuple[str, ...]]:
    """Returns the summaries that later runs may start from.

    They reach until a midnight, because history is digested by day.
    """
    return {until: files for until, files in sorted(snapshots.items()) if until == midnight(day_number(until))}


def usable_snapshot(uri: str, candidates: Iterable[tuple[int, Sequence[str]]]) -> Snapshot | None:
    """Returns the first candidate whose files all exist."""
    for until, files in candidates:
        if all(FileSystems.exists(FileSystems.join(uri, FOLDER, name)) for name in files):
            return Snapshot(until, tuple(files))
    return None


def write_summary(uri: str, name: str, summary: pl.DataFrame) -> str:
    """Writes a summary and returns the name of its file.

    The name ends with a digest of the content, so that a later launch under the same run id never overwrites a file
    that a manifest names with other content.
    """
    sink = io.BytesIO()
    summary.write_parquet(sink, compression="lz4")
    content = sink.getvalue()
    file = f"{name}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    write_aside(FileSystems.join(uri, FOLDER), file, pa.py_buffer(content))
    return file


def read_summary(uri: str, name: str) -> pl.DataFrame:
    with FileSystems.open(FileSystems.join(uri, FOLDER, name)) as handle:
        return pl.read_parquet(io.BytesIO(handle.read()))


def stream_summaries(
    view: FeatureView, uri: str, block: Block, files: SnapshotFiles
) -> Iterator[tuple[HistoryKey, pl.DataFrame]]:
    """Like `load_summaries`, but yields a few rows at a time, each with the key of its summary."""
    for key, file in zip(lifetime_groups(view), files[block.start], strict=True):
        with FileSystems.open(FileSystems.join(uri, FOLDER, file), compression_type="uncompressed") as handle:
            read = pq.ParquetFile(handle)
            yield key, pl.from_arrow(read.schema_arrow.empty_table())  # type: ignore[misc]
            for batch in read.iter_batches(CHUNK_ROWS):
                yield key, pl.from_arrow(batch)  # type: ignore[misc]


def load_summaries(view: FeatureView, uri: str, block: Block, files: SnapshotFiles) -> dict[HistoryKey, Summary]:
    """The summaries of everything before the block."""
    return {
        key: Summary(read_summary(uri, file), block.start)
        for key, file in zip(lifetime_groups(view), files[block.start], strict=True)
    }
