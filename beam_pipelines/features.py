"""features: sources → features exactly as of each question's time → one commit to the feature table."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from datetime import date

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from deltalake import DeltaTable

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.local_runner import batch_pipeline
from beam_pipelines.runtime.plan_text import plan_lines
from beam_pipelines.runtime.run_report import Run, execute, log, read_json, write_json
from beam_pipelines.runtime.terminal import many
from beam_pipelines.runtime.trained_models import trained
from beam_pipelines.runtime.verify_flags import VerifyFlags, add_verification
from schemas.durations import DAY
from schemas.errors import StoreError
from schemas.loading import Definition, load_definition
from schemas.tables import DEAD_LETTERS
from schemas.views import FeatureView, lifetime_sources
from transforms.features.column_reuse import Copies, find_copies
from transforms.features.history_snapshots import Chain, HistorySnapshots, Segment, chains, segments, usable_snapshot
from transforms.features.manifest_store import WriteManifest, older_tables, read_manifest
from transforms.features.plan import BLOCK_ROWS, BROADCAST_BYTES, MOST_SHARDS, FeaturePlan, interval, plan_blocks
from transforms.features.staleness import (
    EMPTY,
    WRITTEN_BEFORE,
    Current,
    Manifest,
    Stale,
    continued,
    examine,
    find_stale,
    outdated,
    usable_snapshots,
)
from transforms.features.trailing_features import TrailingFeatures
from transforms.records.times import ALWAYS, as_date, day_of
from transforms.sources.inventory import Inventory, take_inventory
from transforms.sources.tallies import SourceTally, add_tallies, conserve
from transforms.storage.delta_tables import (
    CommitFiles,
    CommitTarget,
    Committed,
    WriteFiles,
    WriteTable,
    data_files,
    newest_version,
    open_table,
)
from transforms.storage.paths import dead_letters_uri, features_uri, path_in_store
from transforms.storage.vacuum import pins_of
from transforms.validation.publish_check import AlsoChecked, PublishRules, Validate, make_check
from transforms.validation.statistics import Statistics, view_columns
from transforms.verification.check import Verification, Verified, verify_written

PLANS = {"auto": None, "slices": False, "shuffle": True}


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one run of the features pipeline does.  `now` is µs since 1970, the clock by which stamps are judged."""

    definition: Definition
    store: str
    sources: str
    run_id: str
    start: date | None
    end: date | None
    full: bool
    refresh: bool
    block_rows: int
    shuffled: bool | None
    key_shards: int | None
    broadcast_mb: float
    rules: PublishRules | None
    verify: VerifyFlags
    now: int
    beam_args: tuple[str, ...]

    @property
    def table(self) -> str:
        return features_uri(self.store, self.definition.view.name, self.definition.view.fingerprint)

    @property
    def folder(self) -> str:
        """Where the run's own account goes."""
        return FileSystems.join(self.store, "runs", self.run_id)


def parse(
    argv: Sequence[str],
    command: str = "features",
    purpose: str = "Compute a view's features and commit them to its table.",
) -> Options:
    """Options from flags; `plan` has the same.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments(f"millrace {command}", purpose)
    arguments.add_interval("questions")
    arguments.add_argument("--sources", help="folder of the sources (default: <store>/sources)")
    arguments.add_argument("--full", action="store_true", help="compute every date again")
    arguments.add_argument("--refresh", action="store_true", help="count dates as stale whose dimensions have changed")
    arguments.add_argument(
        "--block_rows",
        type=int,
        default=BLOCK_ROWS,
        help=f"rows computed at once; bounds memory (default {BLOCK_ROWS})",
    )
    arguments.add_argument(
        "--plan",
        choices=PLANS,
        default="auto",
        help="slices: each block reads what it needs; shuffle: rows are sent to their blocks (default: whichever reads less)",
    )
    arguments.add_argument(
        "--key_shards",
        type=shards,
        default=None,
        help="parts that a block's events are cut into by key; auto: where it reads too much for memory (default)",
    )
    arguments.add_argument(
        "--broadcast_mb",
        type=float,
        default=BROADCAST_BYTES / 1e6,
        help=f"a larger dimension is not held by every worker but read past by each block (default {BROADCAST_BYTES / 1e6:g})",
    )
    arguments.add_argument(
        "--statistics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep statistics with the commit, check them against the schema, and dead rows against their most (default: yes)",
    )
    arguments.add_argument(
        "--streaming",
        action="store_true",
        help="compute the same features live, from topics or a replay; has flags of its own",
    )
    add_verification(arguments)
    arguments.add_validation()
    flags, rest = arguments.parse(argv)
    definition = load_definition(flags.definition)
    rules = PublishRules(
        flags.schema or definition.schema_path, flags.schema is not None, flags.allow_anomalies, flags.max_dead_fraction
    )
    if not flags.statistics:
        rules = None
    return Options(
        definition=definition, store=flags.store, sources=flags.sources or FileSystems.join(flags.store, "sources"),
        run_id=flags.run_id, start=flags.start, end=flags.end, full=flags.full, refresh=flags.refresh,
        block_rows=max(flags.block_rows, 1), shuffled=PLANS[flags.plan], key_shards=flags.key_shards,
        broadcast_mb=flags.broadcast_mb, rules=rules, verify=VerifyFlags(flags.verify, flags.verify_share),
        now=time.time_ns() // 1000, beam_args=tuple(rest),
    )  # fmt: skip


def shards(text: str) -> int | None:
    """A number of parts; None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1 to {MOST_SHARDS}")
    return int(text)


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedRun:
    """What there is to do: the plan (None: nothing), why per date, and the snapshot that this was decided on."""

    plan: FeaturePlan | None
    stale: Stale
    current: Current
    base: int | None
    copies: Copies | None = None
    inventory: Inventory | None = None
    everything: bool = False
    segments: tuple[Segment, ...] = ()
    chains: tuple[Chain, ...] = ()
    outdated: tuple[int, ...] = ()  # days of the table that an older version wrote, and may have got wrong

    def plan_lines(self, view: FeatureView) -> Iterator[str]:
        """The plan in sentences."""
        if self.plan is not None:
            yield from plan_lines(view, self.plan, self.chains, self.segments, self.current.looked)


def prepare(options: Options) -> PreparedRun:
    """Decide what to compute: the interval asked for, everything, or what is missing or stale.

    Raises:
        DataError, ContractError, StoreError: sources or table are not as they must be.
    """
    view = options.definition.view
    inventory, table = take_inventory(view, options.sources, options.now), open_table(options.table)
    bounded = options.start is not None or options.end is not None
    # A run of some days builds on what is known of the others, also where it computes its own from nothing.
    manifest = EMPTY if options.full and not bounded else continued(view, read_manifest(table))
    current, base = examine(inventory, manifest, options.full), None if table is None else int(table.version())
    everything = False
    if bounded:
        stale = Stale({})
        ranges = [interval(view, inventory, options.start, options.end)]
    elif options.full or not manifest.dates:
        stale, everything = Stale({}), True
        ranges = [interval(view, inventory, None, None)]
    else:
        stale = find_stale(view, manifest, current, options.refresh)
        ranges = stale.ranges()
    old = outdated(_read_if_whole(view, table) if everything else manifest)
    notes = outdated_notes(old, [(ALWAYS, -ALWAYS)]) if everything else [*outdated_notes(old, ranges), *inventory.notes]
    stale = dataclasses.replace(stale, notes=(*stale.notes, *notes))
    if not ranges:
        return PreparedRun(None, stale, current, base)
    repeats = {name: each.first for name, each in current.repeats.items()}
    plan = plan_blocks(
        view,
        inventory,
        ranges,
        repeats,
        everything,
        digest=not current.digested,
        block_rows=options.block_rows,
        shuffled=options.shuffled,
        summarised=lifetime_sources(view),
        key_shards=options.key_shards,
        broadcast_bytes=options.broadcast_mb * 1e6,
    )
    days = [day for first, last in ranges for day in range(first // DAY, -(-last // DAY))]
    older = [] if options.full else older_tables(options.store, view)
    copies = find_copies(view, inventory, current, older, days)
    if not lifetime_sources(view):
        return PreparedRun(plan, stale, current, base, copies, inventory, everything)
    found = {
        first: None
        if options.full
        else usable_snapshot(options.table, usable_snapshots(view, manifest, current, first))
        for first, _ in ranges
    }
    over = chains(plan, found)
    timeless = {name: inventory.timeless(name) for name in view.events if everything}
    summarised = segments(view, plan, over, inventory.slices, timeless)
    return PreparedRun(plan, stale, current, base, copies, inventory, everything, summarised, over, tuple(old))


def _read_if_whole(view: FeatureView, table: DeltaTable | None) -> Manifest:
    """The manifest that a run over everything does without."""
    try:
        return continued(view, read_manifest(table))
    except StoreError:
        return EMPTY


def outdated_notes(days: Sequence[int], ranges: Sequence[tuple[int, int]]) -> Iterator[str]:
    """What a run over `ranges` (µs) does about `days` that an older version may have got wrong, and what it leaves as it is."""
    left = [day for day in days if not any(first <= day * DAY < last for first, last in ranges)]
    if len(days) > len(left):
        yield f"rows of {many(len(days) - len(left), 'day')} {WRITTEN_BEFORE}"
    if left:
        yield (
            f"rows of {many(len(left), 'more day')}, from {as_date(left[0])} to {as_date(left[-1])}, were written before that "
            "and may be wrong in the same way: a run without --start and --end recomputes them"
        )


def models_trained_on(store: str, table: str, version: int | None) -> list[str]:
    """Models, by name and version or by their run, that were trained on the table up to this version."""
    every = trained(store, None, whole=False)
    # A registered model is found again in the folder of the run that trained it.
    registered = {manifest.get("run_id") for name, manifest in every.items() if not name.startswith("run ")} - {None}
    return [
        f"{name} (table version {pin.version})"
        for name, manifest in every.items()
        if not (name.startswith("run ") and manifest.get("run_id") in registered)
        for pin in pins_of({name: manifest})
        if pin.table == path_in_store(table) and version is not None and pin.version <= version
    ]


def build(pipeline: beam.Pipeline, options: Options, work: PreparedRun) -> None:
    """The graph: blocks → features, dead letters and accounts → files → one commit each."""
    view, plan, dead = options.definition.view, work.plan, dead_letters_uri(options.store, "features")
    assert plan is not None
    metadata = {"pipeline": "features", "view": view.name, "fingerprint": view.fingerprint, "definition_sha256": options.definition.digest}  # fmt: skip
    if work.copies is not None:
        metadata |= {"copied_from": f"{work.copies.uri}@{work.copies.version}"}
    table = CommitTarget(options.table, view.output_schema, plan.dates, options.run_id, work.base, None, metadata)
    # A run that was stopped over its dead rows and is resumed has told of rows that may be mended since: each launch tells anew.
    launch = f"{options.run_id}-{uuid.uuid4().hex[:6]}"
    dead_letter_target = CommitTarget(
        dead, DEAD_LETTERS, plan.dates, launch, newest_version(dead), {"view": view.name}, metadata
    )
    manifest = WriteManifest(view, options.table, options.run_id, plan.ranges, work.current, plan.dates is None)

    blocks = pipeline | "Blocks" >> beam.Create(list(plan.blocks))
    history: tuple[beam.pvalue.AsSingleton, ...] = ()
    if work.chains:
        summarise = HistorySnapshots(view, plan, options.table, options.run_id, work.chains)
        carried, old_dead_letters, old_tallies = (
            pipeline | "Segments" >> beam.Create(list(work.segments)) | "History" >> summarise
        )
        history = (beam.pvalue.AsSingleton(carried),)
        compute = TrailingFeatures(view, plan, history[0], options.table, work.copies)
        features, dead_letters, tallies = blocks | "Features" >> compute
        dead_letters = (dead_letters, old_dead_letters) | "AllLetters" >> beam.Flatten()
        tallies = (tallies, old_tallies) | "AllTallies" >> beam.Flatten()
    else:
        features, dead_letters, tallies = blocks | "Features" >> TrailingFeatures(view, plan, copies=work.copies)
    tallied = beam.pvalue.AsSingleton(tallies | "Tally" >> beam.CombineGlobally(add_tallies))
    files = features | "Write" >> WriteFiles(table.uri, table.run_id)
    counted = files | "Conserve" >> beam.Map(conserve, tallied, view.spine.name)
    verified = beam.pvalue.AsSingleton(counted | "Verify" >> beam.Map(verify_written, verification(options, work)))
    counted = counted | "AfterVerify" >> beam.Map(lambda written, _: written, verified)
    buried = beam.pvalue.AsSingleton(dead_letters | "DeadLetters" >> WriteTable(dead_letter_target))
    # Letters first: killed in between, a run is repeated, while dates once committed are not computed again for their letters.
    counted = counted | "AfterLetters" >> beam.Map(lambda written, _: written, buried)
    if options.rules is None:
        committed = counted | "Commit" >> CommitFiles(table, manifest, (tallied, *history))
    else:
        command = f"--definition {options.definition.name} --store {options.store}"
        check = make_check(
            options.rules, table.uri, work.base, table.run_id, day_of(plan.start), day_of(plan.end - 1), dead, command,
            tuple((day_of(first), day_of(last - 1)) for first, last in plan.ranges),
        )  # fmt: skip
        statistics = features | "Statistics" >> Statistics(view_columns(view))
        judged = statistics | "Validate" >> Validate(check, tallied, buried)
        committed = counted | "Commit" >> CommitFiles(
            table, AlsoChecked(manifest), (tallied, *history, beam.pvalue.AsSingleton(judged))
        )
    account = FileSystems.join(options.folder, "account.json")
    _ = committed | "Account" >> beam.Map(write_account, tallied, buried, verified, account)


def verification(options: Options, work: PreparedRun) -> Verification | None:
    """What verifies rows of the run before they are committed; None where `--verify 0` turned it off."""
    assert work.inventory is not None
    amount = options.verify.amount(options.now, work.everything)
    if amount is None:
        return None
    view, inventory = options.definition.view, work.inventory
    contracts = {view.spine.name: inventory.spine, **inventory.contracts}
    return Verification(view, contracts, inventory.slices, amount, options.run_id)


def write_account(
    committed: Committed, tallies: dict[str, SourceTally], buried: Committed, verified: Verified | None, path: str
) -> None:
    """Leave the run's figures where the launcher, on whatever machine, finds them."""
    days = {"first": str(committed.dates[0]), "last": str(committed.dates[-1])} if committed.dates else {}
    write_json(path, {
        "rows_in": sum(each.read for each in tallies.values()), "rows_out": committed.rows, "set_aside": buried.rows,
        "sources": {name: tally.counts for name, tally in tallies.items()},
        "files": committed.files, "dates": len(committed.dates), "commit_version": committed.version, **days,
        **({} if verified is None else {"verified": str(verified), "verification": verified.figures}),
    })  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the pipeline; 0 when the features are committed.  With --streaming the same features, live: see `beam_pipelines.features_streaming`."""
    if "--streaming" in argv:
        return int(importlib.import_module("beam_pipelines.features_streaming").main(argv))
    options = parse(argv)
    view = options.definition.view
    with Run("features", options.run_id, options.folder) as run:
        run.where = options.table
        work = prepare(options)
        for note in work.stale.notes:
            log.warning(note)
        if work.outdated:
            models = models_trained_on(options.store, options.table, work.base)
            for model in models:
                log.warning("trained on such days, so train it again: %s", model)
            run.update({"outdated_days": len(work.outdated), "models_trained_on_outdated_days": models})
        if work.plan is None:
            run.update(
                {
                    "rows_in": 0,
                    "rows_out": 0,
                    "set_aside": 0,
                    "dates": 0,
                    "commit_version": work.base,
                    "nothing_to_do": "no date is missing or stale",
                }
            )
        else:
            run.where += f", dates {day_of(work.plan.start)} to {day_of(work.plan.end - 1)}"
            for line in work.plan_lines(view):
                log.info(line)
            pipeline = batch_pipeline(options.beam_args)
            build(pipeline, options, work)
            execute(pipeline)
            run.update(read_json(FileSystems.join(options.folder, "account.json")))
        table = open_table(options.table)
        rows = 0 if table is None else sum(file.rows for file in data_files(table))
        run.update({"table": options.table, "table_rows": rows, "fingerprint": view.fingerprint})
    return 0


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
