"""Summaries of all that came before a block, made by the run itself or taken from the snapshot that an earlier run left.

Every span of time between a snapshot and the last block is summarised on its own, in parallel; one small step then merges
them in order of time, so that each block finds the summary of everything before it.  No run reads what a snapshot covers.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import apache_beam as beam
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam import pvalue
from apache_beam.io.filesystems import FileSystems

from schemas.durations import DAY
from schemas.expressions import canonical
from schemas.features import Derived, Latest, Lookup, Trailing
from schemas.views import FeatureView
from transforms.inputs import Input, letters_batch, settle_events
from transforms.inventory import ALWAYS, Slice
from transforms.lifetime import Summary, is_lifetime, merge, summarise, summary_name
from transforms.plan import Block, Plan
from transforms.sources import CHUNK, read_slices
from transforms.staleness import lifetime_sources
from transforms.tables import write_aside

FOLDER = "_summaries"
Groups = dict[str, tuple[Trailing | Latest, ...]]


@dataclasses.dataclass(frozen=True)
class Segment:
    """A span of time `[start, end)` µs to summarise; `accounts` if its events are accounted for nowhere else."""

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


def lifetime_groups(view: FeatureView) -> Groups:
    """Features with windows over all history by source, key and condition, under the name of their summary."""
    groups: dict[str, list[Trailing | Latest]] = {}
    for feature in view.features:
        if isinstance(feature, Derived | Lookup):
            continue
        where = None if feature.where is None else canonical(feature.where)
        groups.setdefault(summary_name(feature.source.name, feature.keys, where), []).append(feature)
    return {name: tuple(group) for name, group in groups.items() if any(map(is_lifetime, group))}


def segments(
    view: FeatureView,
    plan: Plan,
    since: Mapping[int, Snapshot | None],
    slices: Mapping[str, Sequence[Slice]],
    timeless: Mapping[str, Sequence[Slice]],
) -> tuple[Segment, ...]:
    """Spans from each range's snapshot (`since`, by the range's start) to its last block's end, cut where blocks are cut."""
    sources = lifetime_sources(view)
    result: list[Segment] = []
    for first, last in plan.ranges:
        base = since.get(first)
        begin = ALWAYS if base is None else base.until
        cuts = [begin, *(block.start for block in plan.blocks if first <= block.start < last), last]
        for low, high in itertools.pairwise(dict.fromkeys(cuts)):
            run_in = high <= first
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
            result.append(Segment(len(result), low, high, run_in and plan.dates is None, run_in, inside))
    return tuple(result)


@dataclasses.dataclass(eq=False)
class CarrySummaries(beam.PTransform):
    """PCollection[Segment] → (PCollection of one dict: block index → file name per group; dead letters; tallies)."""

    view: FeatureView
    plan: Plan
    uri: str
    run_id: str
    since: Mapping[int, Snapshot | None]

    def expand(self, spans: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        step = Summarise(self.view, dataclasses.replace(self.plan, blocks=()), self.uri, self.run_id)
        outputs = (
            spans
            | "Spread" >> beam.Reshuffle()
            | "Summarise" >> beam.ParDo(step).with_outputs("letters", "tallies", main="parts")
        )
        outputs.letters.element_type = pa.RecordBatch
        carried = (
            outputs.parts
            | "Gather" >> beam.combiners.ToList()
            | "Merge" >> beam.Map(merge_in_order, self.view, self.plan, self.uri, self.run_id, self.since)
        )
        return carried, outputs.letters, outputs.tallies


class Summarise(beam.DoFn):
    """Segment → (start, file name per group); tagged: letters and tallies where it accounts for its events."""

    def __init__(self, view: FeatureView, plan: Plan, uri: str, run_id: str) -> None:
        self.view, self.plan, self.uri, self.run_id = view, plan, uri, run_id

    def process(self, segment: Segment) -> Iterator[tuple[int, tuple[str, ...]] | pvalue.TaggedOutput]:
        inputs = {name: read_segment(self.view, self.plan, segment, name) for name in segment.events}
        files = []
        for i, group in enumerate(lifetime_groups(self.view).values()):
            name = f"{self.run_id}-part-{segment.index}-{i}.parquet"
            write_summary(self.uri, name, summarise(group, inputs[group[0].source.name].frame))
            files.append(name)
        yield segment.start, tuple(files)
        if segment.accounts:
            letters = letters_batch(self.view, [each.letters for each in inputs.values()])
            if letters.num_rows:
                yield pvalue.TaggedOutput("letters", letters)
        for each in inputs.values():
            yield pvalue.TaggedOutput("tallies", each.tally)


def read_segment(view: FeatureView, plan: Plan, segment: Segment, name: str) -> Input:
    """Events known in the segment, without repeats; letters and account only if it accounts for them."""
    contract = plan.contracts[name]
    own = (segment.start, segment.end) if segment.accounts and contract is not plan.spine else (0, 0)
    span = (segment.start, segment.end) if segment.digests else None
    read = read_slices(contract, segment.events[name], segment.start, segment.end, own=own, span=span)
    block = Block(0, segment.start, segment.end, (segment.start, segment.end), (), {})
    settled = settle_events(view, plan, block, name, read)
    counted = dataclasses.replace(settled.tally, used=settled.tally.used + settled.tally.outside, outside=0)
    nothing = dataclasses.replace(counted, read=0, used=0, repeated=0, dead=0)
    return dataclasses.replace(settled, tally=counted if segment.accounts else nothing)


def merge_in_order(
    parts: Iterable[tuple[int, tuple[str, ...]]],
    view: FeatureView,
    plan: Plan,
    uri: str,
    run_id: str,
    since: Mapping[int, Snapshot | None],
) -> dict[int, tuple[str, ...]]:
    """Per block the files of its summaries; the last merged summary of each range stays as a snapshot for later runs."""
    groups = list(lifetime_groups(view).values())
    by_start = dict(parts)
    result: dict[int, tuple[str, ...]] = {}
    for first, last in plan.ranges:
        base = since.get(first)
        held: list[pl.DataFrame | None] = (
            [read_summary(uri, name) for name in base.files] if base else [None] * len(groups)
        )
        starts = sorted(start for start in by_start if (ALWAYS if base is None else base.until) <= start < last)
        blocks = {block.start: block.index for block in plan.blocks if first <= block.start < last}
        for start in starts:
            if start in blocks:
                result[blocks[start]] = _write_all(uri, run_id, start, held, groups)
            for i, name in enumerate(by_start[start]):
                held[i] = merge(held[i], read_summary(uri, name), [column for _, column in groups[i][0].keys])
        _write_all(uri, run_id, last, held, groups)
    for names in by_start.values():
        FileSystems.delete([FileSystems.join(uri, FOLDER, name) for name in names])
    return result


def _write_all(
    uri: str,
    run_id: str,
    until: int,
    held: Sequence[pl.DataFrame | None],
    groups: Sequence[tuple[Trailing | Latest, ...]],
) -> tuple[str, ...]:
    names = snapshot_files(run_id, until, len(groups))
    for name, summary, group in zip(names, held, groups, strict=True):
        write_summary(uri, name, summarise(group, _no_events(group)) if summary is None else summary)
    return names


def _no_events(group: Sequence[Trailing | Latest]) -> pl.DataFrame:
    return pl.DataFrame(schema=group[0].source.schema)


def snapshot_files(run_id: str, until: int, groups: int) -> tuple[str, ...]:
    return tuple(f"{run_id}-{until}-{i}.parquet" for i in range(groups))


def snapshots(view: FeatureView, plan: Plan, run_id: str) -> tuple[Snapshot, ...]:
    """What a run leaves behind: a snapshot at each midnight where a block starts, and at its ends."""
    moments = sorted({block.start for block in plan.blocks} | {last for _, last in plan.ranges})
    count = len(lifetime_groups(view))
    return (
        tuple(Snapshot(until, snapshot_files(run_id, until, count)) for until in moments if until % DAY == 0)
        if count
        else ()
    )


def write_summary(uri: str, name: str, summary: pl.DataFrame) -> None:
    sink = io.BytesIO()
    summary.write_parquet(sink, compression="lz4")
    write_aside(FileSystems.join(uri, FOLDER), name, pa.py_buffer(sink.getvalue()))


def read_summary(uri: str, name: str) -> pl.DataFrame:
    with FileSystems.open(FileSystems.join(uri, FOLDER, name)) as handle:
        return pl.read_parquet(io.BytesIO(handle.read()))


def stream_summaries(
    view: FeatureView, uri: str, block: Block, files: Mapping[int, tuple[str, ...]]
) -> Iterator[tuple[str, pl.DataFrame]]:
    """As `load_summaries`, a few rows at a time, each with the name of its summary."""
    for name, file in zip(lifetime_groups(view), files[block.index], strict=True):
        with FileSystems.open(FileSystems.join(uri, FOLDER, file), compression_type="uncompressed") as handle:
            read = pq.ParquetFile(handle)
            yield name, pl.from_arrow(read.schema_arrow.empty_table())  # type: ignore[misc]
            for batch in read.iter_batches(CHUNK):
                yield name, pl.from_arrow(batch)  # type: ignore[misc]


def load_summaries(
    view: FeatureView, uri: str, block: Block, files: Mapping[int, tuple[str, ...]]
) -> dict[str, Summary]:
    """The summaries of everything before the block, by the names a kernel looks for."""
    return {
        name: Summary(read_summary(uri, file), block.start)
        for name, file in zip(lifetime_groups(view), files[block.index], strict=True)
    }
