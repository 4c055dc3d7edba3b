"""verify: computes rows of a feature table again, by plain code, from all rows of the sources."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.run_report import Run
from beam_pipelines.runtime.verify_arguments import ALL, some_or_all
from schemas.errors import DataError
from schemas.loading import load_project
from schemas.views import FeatureView
from transforms.sources.inventory import take_inventory
from transforms.sources.listing import require_unchanged
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_uri
from transforms.verification.check import VERIFIED_ROWS, SampleSize, Verification, Verified


def main(argv: Sequence[str]) -> int:
    """Returns 0 if no value differs, else 5; prints a row that differs, its feature and both values."""
    arguments = Arguments(
        "millrace verify",
        "Compute rows of a feature table again by plain code, from all rows of the sources.",
        every="view",
    )
    arguments.add_interval("spine rows")
    arguments.add_argument("--sources", help="folder of the sources (default: <store>/sources)")
    arguments.add_argument(
        "--rows", type=some_or_all, default=VERIFIED_ROWS, metavar="N|all", help=f"how many (default {VERIFIED_ROWS})"
    )
    arguments.add_argument(
        "--live", action="store_true", help="live feature rows, each from the rows that it could see"
    )
    arguments.add_argument("--json", action="store_true", help="print the result as JSON")
    flags, rest = arguments.parse(argv)
    if rest:
        arguments.error(f"unknown flag {rest[0]}; verify runs here, not on Beam")
    views = [each.view for each in load_project(flags.definition).each_view(flags.view, flags.model)]
    rows = None if flags.rows == ALL else flags.rows
    results: dict[str, Verified] = {}
    with Run("verify", flags.run_id, FileSystems.join(flags.store, "runs", flags.run_id), quiet=flags.json) as run:
        for view in views:
            if flags.live:
                from transforms.lineage.live_verification import verify_live

                results[view.name] = verify_live(view, flags.store, rows, flags.run_id, flags.start, flags.end)
            else:
                results[view.name] = verify_table(view, flags, rows)
        reports = {name: {"verified": str(each), "verification": each.figures} for name, each in results.items()}
        run.update(reports[views[0].name] if len(views) == 1 else {"views": reports})
        if flags.json:
            figures = {name: each.figures for name, each in results.items()}
            shown = figures[views[0].name] if len(views) == 1 else figures
            print(json.dumps(shown, indent=2, default=str), flush=True)
    kind = "--live " if flags.live else ""
    for found in results.values():
        found.require_equal(
            "Published rows equal those that plain code computes by the definition, from all rows of the sources",
            "If the sources have not changed since (millrace plan shows which dates are stale), please "
            "report it, "
            f"with run.json: millrace verify {kind}--run_id {flags.run_id}",
        )
    return 0


def verify_table(view: FeatureView, flags: argparse.Namespace, rows: int | None) -> Verified:
    """Verifies rows of the view's batch table.

    Raises:
        DataError: it has no rows in the interval.
    """
    table = open_table(features_uri(flags.store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table, flags.start, flags.end)
    if not files:
        raise DataError(f"View {view.name!r} has rows to verify", f"none in {flags.store}", "Run: millrace features")
    inventory = take_inventory(view, flags.sources or FileSystems.join(flags.store, "sources"), time.time_ns() // 1000)
    contracts = {view.spine.name: inventory.spine, **inventory.contracts}
    found = Verification(view, contracts, inventory.slices, SampleSize(rows), flags.run_id).of_files(files)
    return require_unchanged(found, inventory.listings)


if __name__ == "__main__":
    sys.exit(guard(main)(sys.argv[1:]))
