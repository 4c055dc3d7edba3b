"""vacuum: remove what no commit names and no kept version needs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.terminal import columns, format_size, wrapped
from beam_pipelines.runtime.trained_models import trained
from schemas.durations import microseconds
from schemas.errors import DefinitionError
from transforms.storage.paths import tables_below
from transforms.storage.run_markers import require_no_erasure, running_runs
from transforms.storage.vacuum import VacuumRules, Waste, at_work, pins_of, remove_waste, waste_of, waste_of_runs

HOUR = timedelta(hours=1)


def vacuum(argv: Sequence[str]) -> int:
    """Remove what no commit names and no kept version needs."""
    arguments = Arguments("millrace vacuum", vacuum.__doc__ or "", definition=None, beam=False)
    arguments.add_argument(
        "--older_than",
        default="2d",
        help="how long a run may take: younger files stay, whoever wrote them (default 2d)",
    )
    arguments.add_argument(
        "--retention",
        default="7d",
        help="how long replaced versions stay readable (default 7d); those that a registered model was trained "
        "on always do",
    )
    arguments.add_argument("--dry_run", action="store_true", help="list what would be removed, and remove nothing")
    arguments.add_argument("--force", action="store_true", help="allow --older_than under an hour")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    flags = arguments.parse_all(argv)
    longest = timedelta(microseconds=microseconds(flags.older_than, "--older_than", zero=True))
    retention = max(longest, timedelta(microseconds=microseconds(flags.retention, "--retention", zero=True)))
    if longest < HOUR and not flags.force:
        raise DefinitionError(
            "--older_than is at least 1h: a run's files are not committed until it ends",
            flags.older_than,
            "If no run is at work, repeat it with --force",
        )
    require_no_erasure(flags.store, "vacuum")
    now = datetime.now(UTC)
    marks = tuple(running_runs(flags.store))
    busy = at_work(marks, now, longest)
    pins = pins_of(trained(flags.store, flags.registry))
    rules = VacuumRules(now, longest, retention, pins, busy, marks)
    names = tables_below(flags.store)
    waste = [each for name in names for each in waste_of(flags.store, name, rules)] + waste_of_runs(flags.store, rules)
    _print_waste(waste, names, rules, flags.dry_run)
    if not flags.dry_run:
        count, total = remove_waste(waste)
        print(f"removed {count:,} files, {format_size(total)}")
    return 0


def _print_waste(waste: Sequence[Waste], names: Sequence[str], rules: VacuumRules, dry: bool) -> None:
    kinds = {
        "orphan": "orphans",
        "expired": "expired",
        "aside": "half-written",
        "manifest": "manifests",
        "statistics": "statistics",
        "summary": "summaries",
        "mark": "killed runs",
    }
    rows = []
    for name in sorted({*names, *(each.table for each in waste)}):
        mine = [each for each in waste if each.table == name]
        slots = [str(sum(each.kind == kind for each in mine) or "") for kind in kinds]
        rows.append((name, *slots, format_size(sum(each.file.bytes for each in mine)) if mine else ""))
    print(columns(("table", *kinds.values(), "bytes"), rows, [*kinds.values(), "bytes"], indent=0))
    kept = sorted({(pin.table, pin.version) for pin in rules.pins})
    for table, version in kept:
        models = sorted({pin.reason for pin in rules.pins if (pin.table, pin.version) == (table, version)})
        print(wrapped(f"kept: version {version} of {table}, on which {', '.join(models)} was trained", 0, hanging=2))
    for run in rules.at_work:
        print(
            wrapped(
                f"kept: files of run {run.run_id} ({run.pipeline}), started {run.started:%Y-%m-%d %H:%M} UTC and "
                "not ended",
                0,
                hanging=2,
            )
        )
    if dry:
        for each in waste:
            print(f"would remove {each.kind} {each.file.path}")
        print(f"would remove {len(waste):,} files, {format_size(sum(each.file.bytes for each in waste))}")
