"""Flags of `features`, which are also those of `plan`.  Nothing here imports Beam."""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence

from beam_pipelines.runtime.arguments import Arguments, finite_number, whole
from beam_pipelines.runtime.verify_arguments import VerifyFlags, add_verification
from schemas.errors import DefinitionError
from schemas.loading import Definition, load_project
from transforms.features.plan import BLOCK_ROWS, BROADCAST_BYTES, MOST_SHARDS
from transforms.features.preparation import FeaturesRequest
from transforms.storage.file_systems import FileSystems
from transforms.validation.publish_rules import PublishRules


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesOptions(FeaturesRequest):
    """The options of one run: what to compute, and how to run and check it.

    Args:
        run_id: id of the run, which commits once.
        rules: the rules of the publish check; None: there is no check.
        verify: how many rows are verified before the commit.
        beam_args: flags for Beam.
    """

    run_id: str
    rules: PublishRules | None
    verify: VerifyFlags
    beam_args: tuple[str, ...]

    @property
    def folder(self) -> str:
        """Folder of the run's report."""
        return FileSystems.join(self.store, "runs", self.run_id)

    @property
    def account(self) -> str:
        """File with the figures of the view's commit."""
        name = f"account-{self.view.name}.json" if self.definition.is_one_of_several else "account.json"
        return FileSystems.join(self.folder, name)


PLANS = {"auto": None, "slices": False, "shuffle": True}


def parse(argv: Sequence[str]) -> FeaturesOptions:
    """Parses the flags of `features` that mean one view: of several, the one that the definition calls `view`.

    Raises:
        DefinitionError: a flag or the definition is invalid, or several views are meant.
    """
    found = parse_each(argv)
    project = found[0].definition.project
    if len(found) > 1 and project is not None:
        chosen = project.definition().view.name
        found = [each for each in found if each.view.name == chosen] or found
    return found[0]


def parse_each(
    argv: Sequence[str],
    command: str = "features",
    purpose: str = "Compute the features of views and commit them to their tables.",
) -> list[FeaturesOptions]:
    """Parses the flags of `features`, which are also those of `plan`: the options of each view that is meant.

    Raises:
        DefinitionError: a flag or the definition is invalid.
    """
    arguments = Arguments(f"millrace {command}", purpose, every="view")
    arguments.add_interval("spine rows")
    arguments.add_argument("--sources", help="folder of the sources (default: <store>/sources)")
    add_choice_of_dates(arguments)
    add_division_of_work(arguments)
    add_checks(arguments)
    flags, rest = arguments.parse(argv)
    now = time.time_ns() // 1000
    definitions = load_project(flags.definition).each_view(flags.view, flags.model)
    if flags.schema and len(definitions) > 1:
        raise DefinitionError(
            "--schema needs one view",
            f"there are {', '.join(each.view.name for each in definitions)}",
            "Choose one with --view, or write <view>.schema.pbtxt beside the definition",
        )
    return [
        FeaturesOptions(
            definition=definition,
            store=flags.store,
            sources=flags.sources or FileSystems.join(flags.store, "sources"),
            run_id=flags.run_id,
            start=flags.start,
            end=flags.end,
            full=flags.full,
            refresh=flags.refresh,
            block_rows=flags.block_rows,
            shuffled=PLANS[flags.plan],
            key_shards=flags.key_shards,
            broadcast_bytes=flags.broadcast_mb * 1e6,
            rules=publish_rules(flags, definition),
            verify=VerifyFlags(flags.verify, flags.verify_share),
            now=now,
            beam_args=tuple(rest),
        )
        for definition in definitions
    ]


def add_choice_of_dates(arguments: Arguments) -> None:
    """Adds the flags that decide which dates are computed."""
    arguments.add_argument("--full", action="store_true", help="compute every date again")
    arguments.add_argument("--refresh", action="store_true", help="count dates as stale whose dimensions have changed")


def add_division_of_work(arguments: Arguments) -> None:
    """Adds the flags that decide how the work is divided."""
    arguments.add_argument(
        "--block_rows",
        type=whole(1, 2**31 - 1),
        default=BLOCK_ROWS,
        help=f"rows computed at once; bounds memory (default {BLOCK_ROWS})",
    )
    arguments.add_argument(
        "--plan",
        choices=PLANS,
        default="auto",
        help="slices: each block reads what it needs; shuffle: rows are sent to their blocks "
        "(default: whichever reads less)",
    )
    arguments.add_argument(
        "--key_shards",
        type=shards,
        default=None,
        help="parts into which a block's events are divided by key; auto: as many as memory needs (default)",
    )
    arguments.add_argument(
        "--broadcast_mb",
        type=finite_number,
        default=BROADCAST_BYTES / 1e6,
        help="a larger dimension is read through by each block instead of held by each worker "
        f"(default {BROADCAST_BYTES / 1e6:g})",
    )


def add_checks(arguments: Arguments) -> None:
    """Adds the flags that decide what is checked before the commit, and `--streaming`."""
    arguments.add_argument(
        "--statistics",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep statistics with the commit; check them against the schema, and the share of rejected rows against "
        "its limit (default: yes)",
    )
    arguments.add_argument(
        "--streaming",
        action="store_true",
        help="compute the same features live, from topics or a replay; has flags of its own",
    )
    add_verification(arguments)
    arguments.add_validation()


def publish_rules(flags: argparse.Namespace, definition: Definition) -> PublishRules | None:
    """Returns the rules of the publish check; None if `--no-statistics` turned it off."""
    if not flags.statistics:
        return None
    schema = flags.schema or definition.schema_path
    return PublishRules(schema, flags.schema is not None, flags.allow_anomalies, flags.max_dead_fraction)


def shards(text: str) -> int | None:
    """Parses a number of parts; None for "auto"."""
    if text == "auto":
        return None
    if not text.isdigit() or not 1 <= int(text) <= MOST_SHARDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a number from 1 to {MOST_SHARDS}")
    return int(text)
