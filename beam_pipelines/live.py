"""Live features: topics (or files replayed as such) → features exactly as of each question's time → topic and tables.

`millrace features --streaming`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from beam_pipelines.options import Arguments
from beam_pipelines.reporting import Run, execute, write_json
from schemas.durations import microseconds
from schemas.errors import DefinitionError
from schemas.loading import Definition, load_definition
from transforms.contracts import EPOCH, MICROSECOND
from transforms.live import DecodeChunks, Live, LiveFeatures
from transforms.live_tables import features_live_uri, last_told, sources_root
from transforms.replay import Replay, SendChunks
from transforms.shards import groups_of
from transforms.tables import open_table


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one live job does."""

    definition: Definition
    run_id: str
    live: Live
    replay: Replay | None
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        return os.path.join(self.live.store, "runs", self.run_id)

    @property
    def table(self) -> str:
        view = self.definition.view
        return features_live_uri(self.live.store, view.name, view.fingerprint)


def parse(argv: Sequence[str]) -> Options:
    """Options from flags.

    Raises:
        DefinitionError: a flag or the definition is refused.
    """
    arguments = Arguments("millrace features --streaming", "Answer questions as they arrive.")
    arguments.add_interval("messages (replay only)")
    arguments.add_argument("--streaming", action="store_true", help="live: this pipeline")
    arguments.add_argument("--source", choices=("kafka", "replay"), default="replay", help="where messages come from (default: replay)")
    arguments.add_argument("--sources", help="replay: folder of the files to send; dimensions are read there too")
    arguments.add_argument("--bootstrap", help="kafka: HOST:PORT of a broker")
    arguments.add_argument("--expansion_service", help="kafka: HOST:PORT of Beam's KafkaIO expansion service (default: Beam fetches one)")
    arguments.add_argument("--topic_prefix", default="", help="before the name of every topic")
    arguments.add_argument("--sink", choices=("table", "topic", "both"), help="where answers go (default: both with kafka, table with replay)")
    arguments.add_argument("--shards", type=int, default=2, help="parallel shards of keys (default 2)")
    for name, value, text in (
        ("pace", "200ms", "least time between turns"), ("commit_every", "10s", "least time between commits"),
        ("keep", "1h", "late questions are answered for this long"), ("dimension_every", "60s", "how often dimensions are looked at"),
        ("chunk", "1h", "replay: what arrives within this long comes together"), ("disorder", "0s", "replay: rows arrive up to this late"),
    ):  # fmt: skip
        arguments.add_argument(f"--{name}", default=value, help=f"{text} (default {value})")
    arguments.add_argument("--partitions", type=int, default=2, help="replay: partitions of every topic (default 2)")
    arguments.add_argument("--seed", type=int, default=0, help="replay: of the disorder")
    flags, rest = arguments.parse(argv)
    definition = load_definition(flags.definition)
    lengths = {name: microseconds(getattr(flags, name), f"--{name}", zero=True) for name in ("pace", "commit_every", "keep", "dimension_every", "chunk", "disorder")}
    replaying = flags.source == "replay"
    sources = os.path.abspath(flags.sources) if flags.sources and "://" not in flags.sources else flags.sources
    if replaying and (sources is None or sources == sources_root(flags.store)):
        raise DefinitionError(
            "A replay reads its files from another place than it writes to",
            f"--sources {sources or 'left out'}, --store {flags.store}",
            "Name the folder of the files with --sources, and a store of the live job's own",
        )
    sink = flags.sink or ("table" if replaying else "both")
    live = Live(
        store=flags.store, run_id=flags.run_id, dimensions=sources or sources_root(flags.store), shards=max(flags.shards, 1),
        keep=lengths["keep"], pace=0 if replaying else max(lengths["pace"], 1000), commit_every=lengths["commit_every"],
        dimension_every=lengths["dimension_every"], prefix=flags.topic_prefix, table=sink != "topic",
    )  # fmt: skip
    span = {name: (day - EPOCH.date()) // MICROSECOND for name in ("start", "end") if (day := getattr(flags, name)) is not None}
    replay = Replay(sources, **span, partitions=max(flags.partitions, 1), disorder=lengths["disorder"], seed=flags.seed, chunk=max(lengths["chunk"], 1)) if replaying else None
    groups_of(definition.view)
    return Options(definition, flags.run_id, live, replay, tuple(rest))


def build(pipeline: beam.Pipeline, options: Options) -> None:
    """The graph: messages → packets → turns → answers → tables."""
    view = options.definition.view
    assert options.replay is not None
    packets = (
        pipeline
        | "Start" >> beam.Impulse()
        | "Replay" >> beam.ParDo(SendChunks(view, options.replay))
        | "Decode" >> beam.ParDo(DecodeChunks(view)).with_output_types(bytes)
    )
    made = packets | "Live" >> LiveFeatures(view, options.live)
    _ = made["commits"] | "Status" >> beam.Map(write_status, os.path.join(options.folder, "status.json"))


def write_status(commit: tuple[bytes, bytes], path: str) -> None:
    write_json(path, json.loads(commit[1]))


def main(argv: Sequence[str]) -> int:
    """Run the job until it ends."""
    options = parse(argv)
    with Run("features --streaming", options.run_id, options.folder) as run:
        pipeline = beam.Pipeline(options=PipelineOptions(list(options.beam_args)))
        build(pipeline, options)
        execute(pipeline)
        run.update(summary(options))
    return 0


def summary(options: Options) -> dict[str, object]:
    """What the closing table says."""
    table = open_table(options.table)
    told = last_told(table)
    counts = told.get("counts", {})
    spine = counts.get(options.definition.view.spine.name, {})
    return {
        "rows_in": sum(each.get("rows", 0) for each in counts.values()), "rows_out": spine.get("answered", 0), "pending": told.get("pending"),
        "turns": told.get("turn"), "counts": counts, "table": options.table, "fingerprint": options.definition.view.fingerprint,
        "commit_version": None if table is None else table.version(),
    }  # fmt: skip
