"""Snapshots of all history: which of them a run makes, from which segments of time, and the files that store them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import StoreError
from schemas.feature_groups import EventFeature, HistoryKey, group_key
from schemas.features import is_lifetime
from schemas.views import FeatureView, lifetime_sources
from transforms.features.lifetime_summaries import Summary
from transforms.features.plan import Block, FeaturePlan
from transforms.records.times import ALWAYS, day_number, midnight
from transforms.sources.reader import READ_CHUNK_ROWS
from transforms.sources.slices import Slices
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import explain_damage, read_regular, reason_of

_RULE, _FIX = "A summary of all history must be readable", "Restore it, or recompute with --full"
SUMMARIES_FOLDER = "_summaries"


@dataclasses.dataclass(frozen=True)
class SnapshotSegment:
    """A span of time `[start, end)` in µs to summarise.

    Args:
        accounts: whether its events must be accounted for here, because no block does it.
        digests: whether its events are digested by day.
    """

    index: int
    start: int
    end: int
    accounts: bool
    digests: bool
    events: Mapping[str, Slices]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The summaries of everything before `until` µs: file name per group, in the order of `lifetime_groups`."""

    until: int
    files: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Chain:
    """The time `[start, end)` in µs, summarised without gaps.

    Args:
        base: the snapshot that it starts from; None: it starts with the first event.
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
    """The features of each history that lifetime windows see, in the order of a snapshot's files."""
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
        found: the newest usable snapshot before the start of each range.
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
    slices: Mapping[str, Slices],
    timeless: Mapping[str, Slices],
) -> tuple[SnapshotSegment, ...]:
    """Divides each chain into segments, at the starts and ends of blocks and ranges."""
    sources = lifetime_sources(view)
    result: list[SnapshotSegment] = []
    for chain in over:
        cuts = sorted({chain.start, *chain.wanted})
        for low, high in itertools.pairwise(cuts):
            before = high <= plan.start
            inside = {
                name: slices[name].overlapping(low, high).joined(timeless.get(name, ()) if low == ALWAYS else ())
                for name in sources
            }
            result.append(SnapshotSegment(len(result), low, high, before and plan.dates is None, before, inside))
    return tuple(result)


def left_for_later(snapshots: SnapshotFiles) -> dict[int, tuple[str, ...]]:
    """Returns the summaries that later runs may start from.

    They reach until a midnight, because history is digested by day.
    """
    return {until: files for until, files in sorted(snapshots.items()) if until == midnight(day_number(until))}


def usable_snapshot(uri: str, candidates: Iterable[tuple[int, Sequence[str]]]) -> Snapshot | None:
    """Returns the first candidate whose files all exist."""
    for until, files in candidates:
        if all(FileSystems.exists(FileSystems.join(uri, SUMMARIES_FOLDER, name)) for name in files):
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
    write_file_atomically(FileSystems.join(uri, SUMMARIES_FOLDER), file, pa.py_buffer(content))
    return file


def read_summary(uri: str, name: str) -> pl.DataFrame:
    with _summary_read(FileSystems.join(uri, SUMMARIES_FOLDER, name)) as path:
        return pl.read_parquet(io.BytesIO(read_regular(path)))


@contextlib.contextmanager
def _summary_read(path: str) -> Iterator[str]:
    """Turns an error of reading a summary into one that names it."""
    try:
        with explain_damage(_RULE, path, _FIX):
            yield path
    except (pl.exceptions.PolarsError, pa.ArrowException, RuntimeError) as error:  # RuntimeError: of pyarrow_hotfix
        raise StoreError(_RULE, f"{path}: {reason_of(error)}", _FIX) from None


def stream_summaries(
    view: FeatureView, uri: str, block: Block, files: SnapshotFiles
) -> Iterator[tuple[HistoryKey, pl.DataFrame]]:
    """Like `load_summaries`, but yields a few rows at a time, each with the key of its summary."""
    for key, file in zip(lifetime_groups(view), files[block.start], strict=True):
        path = FileSystems.join(uri, SUMMARIES_FOLDER, file)
        with _summary_read(path), FileSystems.open(path, compression_type="uncompressed") as handle:
            read = pq.ParquetFile(handle)
            yield key, pl.from_arrow(read.schema_arrow.empty_table())  # type: ignore[misc]
            for batch in read.iter_batches(READ_CHUNK_ROWS):
                yield key, pl.from_arrow(batch)  # type: ignore[misc]


def load_summaries(view: FeatureView, uri: str, block: Block, files: SnapshotFiles) -> dict[HistoryKey, Summary]:
    """The summaries of everything before the block."""
    return {
        key: Summary(read_summary(uri, file), block.start)
        for key, file in zip(lifetime_groups(view), files[block.start], strict=True)
    }
