"""Describes a plan in sentences: how the work is divided, what is in memory at once, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from beam_pipelines.runtime.terminal import many
from schemas.features import COMPACT, ORDERED, Latest, Trailing
from schemas.views import FeatureView
from transforms.features.lifetime_snapshots import Chain, SnapshotSegment
from transforms.features.long_windows import LONG
from transforms.features.plan import MOST_BLOCKS, Block, FeaturePlan, amplification, events_reached
from transforms.features.preparation import PreparedRun
from transforms.features.source_digests import DIGESTED, REPEATS
from transforms.records.times import ALWAYS, day_of
from transforms.sources.slices import Slice


def prepared_lines(view: FeatureView, work: PreparedRun) -> Iterator[str]:
    """Describes the plan of a prepared run; yields nothing if there is nothing to compute."""
    if work.plan is not None:
        yield from plan_lines(view, work.plan, work.chains, work.segments, work.current.looked)


def plan_lines(
    view: FeatureView,
    plan: FeaturePlan,
    chains: Sequence[Chain] = (),
    segments: Sequence[SnapshotSegment] = (),
    looked: Mapping[str, Mapping[str, int]] | None = None,
) -> Iterator[str]:
    """Describes the blocks, their sizes and key shards, the history before them, and each dimension.

    Args:
        chains, segments: the history that lifetime windows see.
        looked: rows that were read to find stale dates (`source_digests.Current`).
    """
    how = (
        "each slice is read once and its rows are sent to their blocks"
        if plan.shuffled
        else "each block reads the slices it needs"
    )
    times = 1 if plan.shuffled else amplification(plan.blocks)
    yield f"{many(len(plan.blocks), 'block')}, {how}; a row is read {times:.2g} times on average"
    sizes = [_rows(each) for each in plan.blocks]
    yield f"the largest block's slices hold {many(max(sizes, default=0), 'row')}, {many(sum(sizes), 'row')} together"
    yield from _shards(view, plan)
    yield from _history(chains, segments)
    for name, slices in plan.dimensions.items():
        how = "routed: blocks read past it and keep what they look up" if name in plan.routed else "broadcast"
        yield f"{name}: {how} ({many(sum(each.rows for each in slices), 'row')})"
    yield from looked_lines(looked or {})


def _history(chains: Sequence[Chain], segments: Sequence[SnapshotSegment]) -> Iterator[str]:
    """Describes what lifetime windows read in addition to the blocks: each source, from when, and how many rows."""
    starts = [chain.start for chain in chains]
    beginnings = [
        *(["its first row (there is no snapshot to start from)"] if ALWAYS in starts else []),
        *(f"the snapshot of {day_of(start)}" for start in starts if start != ALWAYS),
    ]
    for name in dict.fromkeys(name for each in segments for name in each.events):
        rows = sum(piece.rows for each in segments for piece in each.events.get(name, ()))
        yield (
            f'windows over all history ("all", "forever"): {name} is summarised from {", ".join(beginnings)} on; '
            f"slices of {many(rows, 'row')} are read for it, beside those of the blocks"
        )


def steps(work: PreparedRun, checked: bool) -> dict[str, tuple[str, ...]]:
    """Labels of the steps that `features.build` adds, with the steps directly below them.

    They are listed here because building the graph imports Beam; a test compares the list with the graph.

    Args:
        checked: whether there is a publish check.
    """
    shuffled = work.required_plan.shuffled
    history: dict[str, tuple[str, ...]] = {
        "Segments": (),
        "History": ("Spread", "Summarise", "Gather", "Merge", "Remove"),
    }
    routed = ("Slices", "Spread", "Route", "Gather", "Compute", "DeadLetters", "Tallies")
    return {
        "Blocks": (),
        **(history if work.chains else {}),
        "Features": routed if shuffled else ("Compute",),
        **({"AllLetters": (), "AllTallies": ()} if work.chains else {}),
        "Tally": (),
        "Write": ("Files", "Gather"),
        "Conserve": (),
        "Verify": (),
        "AfterVerify": (),
        "Carried": (),
        "WithCarried": (),
        "DeadLetters": ("Write", "CommitFiles"),
        "AfterLetters": (),
        "SourcesUnchanged": (),
        **({"Statistics": ("Describe", "Proto"), "Validate": ("Check",)} if checked else {}),
        "Commit": ("Commit",),
        "Account": (),
    }


def looked_lines(looked: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Describes what a run reads beforehand to find out what it has to do."""
    digested, repeats = looked.get(DIGESTED, {}), looked.get(REPEATS, {})
    if any(digested.values()):
        counts = ", ".join(f"{many(rows, 'row')} of {name}" for name, rows in digested.items() if rows)
        yield f"read before the run, to see what has changed: {counts}"
    if any(repeats.values()):
        counts = ", ".join(f"{many(rows, 'row')} of {name}" for name, rows in repeats.items() if rows)
        yield f"read before the run, unique columns alone, to find repeats: {counts}"


def _shards(view: FeatureView, plan: FeaturePlan) -> Iterator[str]:
    cut = [block for block in plan.blocks if block.shards]
    if not cut:
        return
    block = max(cut, key=lambda each: (max(each.shards.values(), default=1), _rows(each)))
    shards, limit = max(block.shards.values(), default=1), MOST_BLOCKS * block.part_rows
    some = "" if len(cut) == len(plan.blocks) else f" of {len(cut)} of them"
    name = max(block.events, key=lambda each: events_reached(view, block, each, unknown=1.0), default="")
    rows = events_reached(view, block, name, unknown=1.0) if name else 0
    window = max(windows(view, name), default=(0, ""))[1] if name else ""
    if rows > limit and window:
        why = f"the {window} window of {name} reaches {many(rows, 'row')}, more than {limit:,}"
    elif _rows(block) > limit:
        why = f"its slices hold {many(_rows(block), 'row')}, more than {limit:,}"
    else:
        why = "requested (--key_shards)"
    yield (
        f"key shards {shards} per block{some}: {why}; "
        "rows wait on local disk, and one shard of one key is in memory at a time"
    )
    span = min(each.end - each.start for each in cut)
    long = {
        (name, window, stat in COMPACT and (stat in ORDERED or view.events[name].event_time is None))
        for name in block.events
        for length, window, stat in _statistics(view, name)
        if length is not None and length > LONG * span
    }
    reduced = sorted({f"{window} of {name}" for name, window, fits in long if fits})
    if reduced:
        yield f"of what all windows of a block share one row per key is kept: {', '.join(reduced)}"
    whole = sorted({f"{window} of {name}" for name, window, fits in long if not fits})
    if whole:
        yield (
            "medians, quantiles, n_unique, and sums by event_time hold all events of a key at once, however many: "
            + ", ".join(whole)
        )


def windows(view: FeatureView, source: str) -> Iterator[tuple[int, str]]:
    """(length in µs, length as written) of each bounded window over `source`."""
    yield from {(length, window) for length, window, _ in _statistics(view, source) if length is not None}


def _statistics(view: FeatureView, source: str) -> Iterator[tuple[int | None, str, str]]:
    for feature in view.features:
        if isinstance(feature, Trailing) and feature.source.name == source:
            yield from ((each.length, each.window, each.stat) for each in feature.statistics)
        elif isinstance(feature, Latest) and feature.source.name == source:
            yield feature.length, str(feature.max_age), "last"


def _rows(block: Block) -> int:
    slices: list[Slice] = [*block.spine, *(each for some in block.events.values() for each in some)]
    return sum(each.rows for each in slices)
