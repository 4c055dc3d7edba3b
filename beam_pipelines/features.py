"""features: computes features exactly as of each spine row's time, and commits them to the feature table."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import uuid
from collections.abc import Sequence
from datetime import date
from typing import TypeVar

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsSingleton

from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.features_arguments import FeaturesOptions, parse_each
from beam_pipelines.runtime.features_arguments import parse as parse
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.plan_text import prepared_lines
from beam_pipelines.runtime.run_report import Run, execute, log, read_json, write_json
from beam_pipelines.runtime.trained_models import models_trained_on
from transforms.features.history_snapshots import HistorySnapshots
from transforms.features.manifest_store import WriteManifest
from transforms.features.preparation import PreparedRun, computed_together, prepare_features
from transforms.features.shared_blocks import SharedFeatures, ViewPart
from transforms.features.trailing_features import TrailingFeatures
from transforms.records.times import day_of
from transforms.sources.dead_letters import DEAD_LETTERS, UNDATED
from transforms.sources.listing import require_unchanged
from transforms.sources.tallies import SourceTally, add_tallies, require_conserved, rows_loaded
from transforms.storage.date_spans import partition_days
from transforms.storage.delta_tables import (
    CommitTarget,
    Committed,
    commit,
    data_files,
    newest_version,
    open_table,
    write_files,
)
from transforms.storage.feature_tables import lost_commit
from transforms.storage.paths import dead_letters_uri
from transforms.storage.table_transforms import CommitFiles, WriteFiles, WriteTable
from transforms.validation.publish_check import AlsoChecked, CheckedRun, PublishCheck, Validate, make_check
from transforms.validation.statistics import Statistics, view_columns
from transforms.verification.check import Verification, Verified, verify_written

Written = TypeVar("Written")


def prepare(options: FeaturesOptions) -> PreparedRun:
    """Decides what the run computes; see `transforms.features.preparation`."""
    return prepare_features(options)


@dataclasses.dataclass(frozen=True, eq=False)
class Targets:
    """The commits of one run's features and dead letters, and their metadata."""

    features: CommitTarget
    dead_letters: CommitTarget
    manifest: WriteManifest

    @staticmethod
    def of(options: FeaturesOptions, work: PreparedRun) -> Targets:
        view, plan = options.view, work.required_plan
        metadata = {
            "pipeline": "features",
            "view": view.name,
            "fingerprint": view.fingerprint,
            "definition_sha256": options.definition.digest,
        }
        if work.copies is not None:
            metadata |= {"copied_from": f"{work.copies.uri}@{work.copies.version}"}
        features = CommitTarget(
            options.table,
            view.output_schema,
            plan.dates,
            options.run_id,
            work.base,
            None,
            metadata,
            work.partition_days,
        )
        dead_letters = dead_letters_target(options, work, plan.dates, metadata)
        manifest = WriteManifest(view, options.table, options.run_id, plan.ranges, work.current, plan.dates is None)
        return Targets(features, dead_letters, manifest)


def dead_letters_target(
    options: FeaturesOptions, work: PreparedRun, days: tuple[date, ...] | None, metadata: dict[str, str]
) -> CommitTarget:
    """The commit of the dead letters of `days` (None: of all) and of the days that `work.carried` replaces.

    A run that is stopped because of its dead letters has committed them, and their rows may be corrected before the run
    is resumed. So every launch commits its dead letters under its own id.
    """
    uri, carried = dead_letters_uri(options.store, "features"), work.carried
    return CommitTarget(
        uri=uri,
        schema=DEAD_LETTERS,
        dates=None if days is None else tuple(sorted({*days, *carried.dates})),
        run_id=f"{options.run_id}-{uuid.uuid4().hex[:6]}",
        base=newest_version(uri) if days is None else carried.version,
        extra={"view": options.view.name},
        metadata=metadata,
        days=partition_days(uri, open_table(uri), 0, None),
        shared=(UNDATED,),
        compares=True,  # runs that see the same files find the same dead letters, even those of days of another run
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Computed:
    """The PCollections of a run's feature rows, dead letters and tallies, and the lifetime snapshots as side inputs."""

    features: beam.PCollection
    dead_letters: beam.PCollection
    tallies: beam.PCollection
    history: tuple[AsSingleton, ...] = ()


def build(pipeline: beam.Pipeline, options: FeaturesOptions, work: PreparedRun) -> None:
    """Builds the graph: blocks → features, dead letters and tallies → files → one commit each."""
    publish(pipeline, options, work, compute(pipeline, options, work))


def build_together(pipeline: beam.Pipeline, works: Sequence[tuple[FeaturesOptions, PreparedRun]]) -> None:
    """Builds the graph of several views that are computed together; the labels of a view's steps begin with its name.

    Args:
        works: views with their prepared runs, as `computed_together` groups them.
    """
    parts = tuple(ViewPart(options.view, work.required_plan, work.copies) for options, work in works)
    blocks = pipeline | "Blocks" >> beam.Create(list(zip(*(part.plan.blocks for part in parts), strict=True)))
    computed = blocks | "Features" >> SharedFeatures(parts)
    for (options, work), outputs in zip(works, computed, strict=True):
        publish(pipeline, options, work, Computed(*outputs), f"{options.view.name}: ")


def publish(
    pipeline: beam.Pipeline, options: FeaturesOptions, work: PreparedRun, computed: Computed, label: str = ""
) -> None:
    """Adds the steps from feature rows to the commit.

    Args:
        label: the beginning of the steps' labels.
    """
    view, targets = options.view, Targets.of(options, work)
    tallied = AsSingleton(computed.tallies | f"{label}Tally" >> beam.CombineGlobally(add_tallies))
    write = WriteFiles(targets.features.uri, targets.features.run_id, days=targets.features.days)
    files = computed.features | f"{label}Write" >> write
    counted = files | f"{label}Conserve" >> beam.Map(require_conserved, tallied, view.spine.name)
    verified = AsSingleton(counted | f"{label}Verify" >> beam.Map(verify_written, verification(options, work)))
    counted = counted | f"{label}AfterVerify" >> beam.Map(first_of, verified)
    carried = pipeline | f"{label}Carried" >> beam.Create([work.carried.batch] if len(work.carried.rows) else [])
    carried.element_type = pa.RecordBatch
    dead_letters = (computed.dead_letters, carried) | f"{label}WithCarried" >> beam.Flatten()
    rejected = AsSingleton(dead_letters | f"{label}DeadLetters" >> WriteTable(targets.dead_letters))
    # Dead letters are committed first: a run that is killed in between is repeated, but dates that were committed
    # would not be computed again for their dead letters.
    counted = counted | f"{label}AfterLetters" >> beam.Map(first_of, rejected)
    counted = counted | f"{label}SourcesUnchanged" >> beam.Map(require_unchanged, work.required_inventory.listings)
    sides, manifest = (tallied, *computed.history), targets.manifest
    if options.rules is None:
        committed = counted | f"{label}Commit" >> CommitFiles(targets.features, manifest, sides)
    else:
        statistics = computed.features | f"{label}Statistics" >> Statistics(view_columns(view))
        checked = AsSingleton(
            statistics | f"{label}Validate" >> Validate(publish_check(options, work), tallied, rejected)
        )
        committed = counted | f"{label}Commit" >> CommitFiles(
            targets.features, AlsoChecked(manifest), (*sides, checked)
        )
    carried_rows = len(work.carried.rows)
    _ = committed | f"{label}Account" >> beam.Map(
        write_account, tallied, rejected, verified, options.account, carried_rows
    )


def compute(pipeline: beam.Pipeline, options: FeaturesOptions, work: PreparedRun) -> Computed:
    """Adds the steps from blocks to feature rows, with the lifetime snapshots that their windows need."""
    view, plan = options.view, work.required_plan
    blocks = pipeline | "Blocks" >> beam.Create(list(plan.blocks))
    if not work.chains:
        return Computed(*(blocks | "Features" >> TrailingFeatures(view, plan, copies=work.copies)))
    summarise = HistorySnapshots(view, plan, options.table, options.run_id, work.chains)
    segments = pipeline | "Segments" >> beam.Create(list(work.segments))
    snapshots, old_dead_letters, old_tallies = segments | "History" >> summarise
    history = AsSingleton(snapshots)
    features, dead_letters, tallies = blocks | "Features" >> TrailingFeatures(
        view, plan, history, options.table, work.copies
    )
    dead_letters = (dead_letters, old_dead_letters) | "AllLetters" >> beam.Flatten()
    tallies = (tallies, old_tallies) | "AllTallies" >> beam.Flatten()
    return Computed(features, dead_letters, tallies, (history,))


def first_of(written: Written, _: object) -> Written:
    """Returns `written` once the side input is ready."""
    return written


def publish_check(options: FeaturesOptions, work: PreparedRun) -> PublishCheck:
    """The check before the commit: statistics against the schema, and the share of dead letters."""
    assert options.rules is not None
    plan = work.required_plan
    run = CheckedRun(
        table=options.table,
        base=work.base,
        run_id=options.run_id,
        ranges=tuple((day_of(first), day_of(last - 1)) for first, last in plan.ranges),
        dead_letters=dead_letters_uri(options.store, "features"),
        command=f"{options.definition.flags} --store {options.store}",
    )
    return make_check(options.rules, run)


def verification(options: FeaturesOptions, work: PreparedRun) -> Verification | None:
    """The verification of the run's rows before they are committed; None if `--verify 0` turned it off."""
    amount = options.verify.amount(options.now, work.everything)
    if amount is None:
        return None
    view, inventory = options.view, work.required_inventory
    contracts = {view.spine.name: inventory.spine, **inventory.contracts}
    return Verification(view, contracts, inventory.slices, amount, options.run_id)


def write_account(
    committed: Committed,
    tallies: dict[str, SourceTally],
    rejected: Committed,
    verified: Verified | None,
    path: str,
    carried: int = 0,
) -> None:
    """Writes the run's figures where the launcher finds them from any machine.

    Args:
        carried: number of committed dead letters of days that the run did not compute.
    """
    days = {"first": str(committed.dates[0]), "last": str(committed.dates[-1])} if committed.dates else {}
    write_json(
        path,
        {
            "rows_in": sum(each.read for each in tallies.values()),
            "rows_out": committed.rows,
            "set_aside": rejected.rows - carried,
            "sources": {name: tally.counts for name, tally in tallies.items()},
            "rows_read": rows_loaded(tallies),
            "files": committed.files,
            "dates": len(committed.dates),
            "commit_version": committed.version,
            **days,
            **({} if verified is None else {"verified": str(verified), "verification": verified.figures}),
        },
    )


def main(argv: Sequence[str]) -> int:
    """Runs the pipeline and returns 0 when the features are committed. For `--streaming` see `features_streaming`."""
    if "--streaming" in argv:
        return int(importlib.import_module("beam_pipelines.features_streaming").main(argv))
    every = parse_each(argv)
    one = every[0]
    with Run("features", one.run_id, one.folder) as run:
        run.where = one.table if len(every) == 1 else f"views {', '.join(each.view.name for each in every)}"
        log.info("listing the sources under %s", one.sources)
        figures: dict[str, dict[str, object]] = {}
        for group in computed_together([(options, prepare_view(options)) for options in every]):
            figures |= compute_views(run, group)
        if len(every) == 1:
            run.update(figures[one.view.name])
        else:
            for name in ("rows_in", "rows_out", "set_aside", "dates"):
                run[name] = sum(int(str(each[name])) for each in figures.values())
            run["views"] = {options.view.name: figures[options.view.name] for options in every}
    return 0


def prepare_view(options: FeaturesOptions) -> PreparedRun:
    """Decides what to compute of one view, and warns of what was found."""
    work = prepare(options)
    if work.base is not None and (lost := lost_commit(options.table, work.base)):
        log.warning("the log of %s has lost its newest commits: %s", options.table, lost)
    for note in work.stale.notes:
        log.warning(note)
    return work


def compute_views(run: Run, works: Sequence[tuple[FeaturesOptions, PreparedRun]]) -> dict[str, dict[str, object]]:
    """Computes the features of views in one pipeline, if there is anything to compute, and returns their figures."""
    run.where = ", ".join(options.table for options, _ in works)
    found = {
        options.view.name: warn_of_outdated_models(options, work) if work.outdated else {} for options, work in works
    }
    options, work = works[0]
    if work.plan is None:
        commit_carried(options, work)
        found[options.view.name] |= nothing_to_do(work)
    else:
        run.where += f", dates {day_of(work.plan.start)} to {day_of(work.plan.end - 1)}"
        if len(works) > 1:
            log.info("computed together: %s", ", ".join(each.view.name for each, _ in works))
        for line in prepared_lines(options.view, work):
            log.info(line)
        pipeline = batch_pipeline(options.beam_args)
        if len(works) == 1:
            build(pipeline, options, work)
        else:
            build_together(pipeline, works)
        execute(pipeline)
        for each, _ in works:
            found[each.view.name] |= read_json(each.account)
    for each, _ in works:
        table = open_table(each.table)
        rows = 0 if table is None else sum(file.rows for file in data_files(table))
        found[each.view.name] |= {"table": each.table, "table_rows": rows, "fingerprint": each.view.fingerprint}
        if len(works) > 1:
            found[each.view.name]["computed_with"] = [other.view.name for other, _ in works if other is not each]
    return found


def commit_carried(options: FeaturesOptions, work: PreparedRun) -> None:
    """Commits the dead letters that have changed, of a run that computes no day."""
    carried, view = work.carried, options.view
    if not carried.dates:
        return
    metadata = {"pipeline": "features", "view": view.name, "fingerprint": view.fingerprint}
    target = dead_letters_target(options, work, (), metadata)
    commit(target, write_files(carried.batch, target.uri, target.run_id, target.extra, target.days))
    log.info("dead letters of %d dates outside the run's days are as the files are now", len(carried.dates))


def warn_of_outdated_models(options: FeaturesOptions, work: PreparedRun) -> dict[str, object]:
    """Names the models that were trained on days that an older version may have computed incorrectly."""
    models = models_trained_on(options.store, options.table, work.base)
    for model in models:
        log.warning("trained on such days, so train it again: %s", model)
    return {"outdated_days": len(work.outdated), "models_trained_on_outdated_days": models}


def nothing_to_do(work: PreparedRun) -> dict[str, object]:
    """Figures of a run that has nothing to compute."""
    counts = {"rows_in": 0, "rows_out": 0, "set_aside": 0, "dates": 0}
    return {**counts, "commit_version": work.base, "nothing_to_do": "no date is missing or stale"}


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
