"""features: sources → features exactly as of each question's time → one commit to the feature table."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from datetime import date

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.options import Arguments
from beam_pipelines.reporting import Run, execute, guard, read_json, write_json
from schemas.loading import Definition, load_definition
from schemas.tables import DEAD_LETTERS
from transforms.contracts import day_of
from transforms.inputs import Tally, add_tallies, conserve
from transforms.plan import BLOCK_ROWS, Plan, make_plan
from transforms.tables import (
    CommitFiles,
    Committed,
    Target,
    WriteFiles,
    WriteTable,
    dead_letters_uri,
    features_uri,
    newest,
)
from transforms.trailing import TrailingFeatures


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one run of the features pipeline does.  `now` is µs since 1970, the clock by which stamps are judged."""

    definition: Definition
    store: str
    sources: str
    run_id: str
    start: date | None
    end: date | None
    block_rows: int
    now: int
    beam_args: tuple[str, ...]

    @property
    def table(self) -> str:
        return features_uri(self.store, self.definition.view.name, self.definition.view.fingerprint)

    @property
    def folder(self) -> str:
        """Where the run's own account goes."""
        return FileSystems.join(self.store, "runs", self.run_id)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments("millrace features", "Compute a view's features and commit them to its table.")
    arguments.add_interval("questions")
    arguments.add_argument("--sources", help="folder of the sources (default: <store>/sources)")
    arguments.add_argument(
        "--block_rows",
        type=int,
        default=BLOCK_ROWS,
        help=f"rows computed at once; bounds memory (default {BLOCK_ROWS})",
    )
    flags, rest = arguments.parse(argv)
    return Options(
        definition=load_definition(flags.definition), store=flags.store, sources=flags.sources or FileSystems.join(flags.store, "sources"),
        run_id=flags.run_id, start=flags.start, end=flags.end, block_rows=max(flags.block_rows, 1), now=time.time_ns() // 1000, beam_args=tuple(rest),
    )  # fmt: skip


def build(pipeline: beam.Pipeline, options: Options, plan: Plan) -> None:
    """The graph: blocks → features, dead letters and accounts → files → one commit each."""
    view, dead = options.definition.view, dead_letters_uri(options.store, "features")
    metadata = {"pipeline": "features", "view": view.name, "fingerprint": view.fingerprint}
    table = Target(options.table, view.output_schema, plan.dates, options.run_id, newest(options.table), None, metadata)
    of_letters = Target(dead, DEAD_LETTERS, plan.dates, options.run_id, newest(dead), {"view": view.name}, metadata)

    blocks = pipeline | "Blocks" >> beam.Create(list(plan.blocks))
    features, letters, tallies = blocks | "Features" >> TrailingFeatures(view, plan)
    tallied = tallies | "Tally" >> beam.CombineGlobally(add_tallies)
    files = features | "Write" >> WriteFiles(table.uri, table.run_id)
    counted = files | "Conserve" >> beam.Map(conserve, beam.pvalue.AsSingleton(tallied), view.spine.name)
    committed = counted | "Commit" >> CommitFiles(table)
    buried = letters | "DeadLetters" >> WriteTable(of_letters)
    account = FileSystems.join(options.folder, "account.json")
    _ = committed | "Account" >> beam.Map(
        write_account, beam.pvalue.AsSingleton(tallied), beam.pvalue.AsSingleton(buried), account
    )


def write_account(committed: Committed, tallies: dict[str, Tally], buried: Committed, path: str) -> None:
    """Leave the run's figures where the launcher, on whatever machine, finds them."""
    rows = tallies.values()
    write_json(path, {
        "rows_in": sum(each.read for each in rows), "rows_out": committed.rows, "set_aside": buried.rows,
        "sources": {name: {field: count for field, count in dataclasses.asdict(tally).items() if field != "source"} for name, tally in tallies.items()},
        "files": committed.files, "dates": len(committed.dates), "commit_version": committed.version,
    })  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the pipeline; 0 when the features are committed."""
    options = parse(argv)
    view = options.definition.view
    with Run("features", options.run_id, options.folder) as run:
        plan = make_plan(view, options.sources, options.start, options.end, options.now, options.block_rows)
        pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
        build(pipeline, options, plan)
        execute(pipeline)
        run.update(read_json(FileSystems.join(options.folder, "account.json")))
        run.update(
            {
                "table": options.table,
                "fingerprint": view.fingerprint,
                "first": str(day_of(plan.start)),
                "last": str(day_of(plan.end - 1)),
            }
        )
    return 0


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
