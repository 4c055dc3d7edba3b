"""The steps of the features pipeline called one after the other, as its graph joins them: for tests of very many
runs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from apache_beam import pvalue

from beam_pipelines import features
from beam_pipelines.features import FeaturesOptions
from schemas import FeatureView
from transforms.features.column_reuse import Copies
from transforms.features.history_snapshots import Summarise, merge_in_order, remove_parts
from transforms.features.lifetime_snapshots import Chain, SnapshotFiles, SnapshotSegment
from transforms.features.manifest_store import WriteManifest
from transforms.features.plan import FeaturePlan
from transforms.features.preparation import PreparedRun
from transforms.features.shuffle import Route, routes
from transforms.features.trailing_features import ComputeBlock, ComputeGathered
from transforms.sources.tallies import SourceTally, add_tallies, require_conserved
from transforms.storage.delta_tables import CommitTarget, commit, write_files


@dataclasses.dataclass(frozen=True, eq=False)
class Outputs:
    """What the steps gave: features, dead letters, accounts, and the summaries of all history that they left."""

    features: Sequence[pa.RecordBatch]
    dead_letters: Sequence[pa.RecordBatch]
    tallies: Mapping[str, SourceTally]
    carried: SnapshotFiles | None


def outputs_of(
    view: FeatureView,
    plan: FeaturePlan,
    uri: str,
    segments: Sequence[SnapshotSegment] = (),
    chains: Sequence[Chain] = (),
    copies: Copies | None = None,
) -> Outputs:
    """All that a plan's blocks and segments give."""
    out: list[Any] = []
    carried: SnapshotFiles | None = None
    if chains:
        reported = [each for span in segments for each in Summarise(view, plan, uri, "run").process(span)]
        out += [each for each in reported if isinstance(each, pvalue.TaggedOutput)]
        parts = [each for each in reported if not isinstance(each, pvalue.TaggedOutput)]
        carried = merge_in_order(parts[::-1], view, uri, "run", chains)
        remove_parts(parts, carried, uri)
    if plan.shuffled:
        sent = defaultdict(list)
        route = Route(view, plan)
        route.setup()
        route.start_bundle()
        for each in (*(each for piece in routes(plan) for each in route.process(piece)), *route.rest()):
            if isinstance(each, pvalue.TaggedOutput):
                out.append(each)
            else:
                sent[each[0]].append(each[1])
        gather = ComputeGathered(view, plan, plan.blocks, uri, copies)
        gather.setup()
        gather.start_bundle()
        out += [each for block in sent.items() for each in gather.process(block, carried)]
        out += gather.rest()
    else:
        step = ComputeBlock(view, plan, len(plan.blocks), uri, copies)
        step.setup()
        step.start_bundle()
        out += [each for block in plan.blocks for each in step.process(block, carried)]
        out += step.rest()
    tagged: dict[str, list[Any]] = defaultdict(list)
    for each in out:
        tagged[each.tag if isinstance(each, pvalue.TaggedOutput) else "features"].append(getattr(each, "value", each))
    return Outputs(tagged["features"], tagged["dead_letters"], add_tallies(tagged["tallies"]), carried)


def perform(options: FeaturesOptions) -> PreparedRun:
    """One run, committed."""
    view, work = options.definition.view, features.prepare(options)
    if work.plan is None:
        return work
    made = outputs_of(view, work.plan, options.table, work.segments, work.chains, work.copies)
    days = work.partition_days
    files = [file for each in made.features for file in write_files(each, options.table, options.run_id, None, days)]
    manifest = WriteManifest(
        view, options.table, options.run_id, work.plan.ranges, work.current, work.plan.dates is None
    )
    target = CommitTarget(options.table, view.output_schema, work.plan.dates, options.run_id, work.base, days=days)
    commit(target, require_conserved(files, made.tallies, view.spine.name), manifest, (made.tallies, made.carried))
    return work
