"""compact: merge the many small files that a live job's commits leave, while jobs run."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import uuid
from collections.abc import Iterator, Sequence

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.terminal import columns, format_size, wrapped
from schemas.errors import DefinitionError, StoreError
from transforms.storage.compaction import MOST_FILES, Compaction, compact_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import tables_below
from transforms.storage.run_markers import begin_run, remove_marker
from transforms.streaming.live_tables import is_of_live_job

PIPELINE = "compact"


def compact(argv: Sequence[str]) -> int:
    """Merge the many small files that a live job's commits leave, while jobs run."""
    arguments = Arguments("millrace compact", compact.__doc__ or "", definition=None, beam=False)
    arguments.add_argument(
        "tables",
        nargs="*",
        default=["*"],
        metavar="TABLE",
        help="tables as `millrace tables` names them, like 'sources/*' (default: all)",
    )
    arguments.add_argument(
        "--most_files",
        type=int,
        default=MOST_FILES,
        help=f"dates with more files are compacted (default {MOST_FILES})",
    )
    flags = arguments.parse_all(argv)
    if "://" in flags.store:
        raise StoreError(
            "compact works on folders", flags.store, "Use delta-rs's optimize.compact for tables of an object store"
        )
    if flags.most_files < 1:
        raise DefinitionError(
            "--most_files is at least 1", str(flags.most_files), f"Leave it out: the default is {MOST_FILES}"
        )
    names = _matching(flags.store, flags.tables)
    run_id = f"compact-{uuid.uuid4().hex[:12]}"
    with _marked(flags.store, run_id):
        done = {
            name: compact_table(FileSystems.join(flags.store, *name.split("/")), run_id, flags.most_files)
            for name in names
        }
    _print(done)
    return 0


def _matching(store: str, patterns: Sequence[str]) -> list[str]:
    """Tables whose names match; the table of a source only if a live job writes it.

    Raises:
        DefinitionError: a name without * is not that of a table.
    """
    names = [name for name in tables_below(store) if not name.startswith("sources/") or is_of_live_job(store, name)]
    for pattern in patterns:
        if "*" not in pattern and pattern not in names:
            raise DefinitionError(
                f"{store} has a table that a live or batch run writes, of this name",
                repr(pattern),
                "List the tables with: millrace tables",
            )
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


@contextlib.contextmanager
def _marked(store: str, run_id: str) -> Iterator[None]:
    """Writes the marker of the run, so that vacuum spares its files and no erasure runs at the same time.  It leaves no
    report."""
    folder = os.path.join(store, "runs", run_id)
    begin_run(folder, PIPELINE, run_id)
    try:
        yield
    finally:
        remove_marker(folder)
        with contextlib.suppress(OSError):
            os.rmdir(folder)


def _print(done: dict[str, Compaction]) -> None:
    changed = {name: each for name, each in done.items() if each.after < each.before}
    rows = [
        (name, f"{each.before:,}", f"{each.after:,}", f"{each.rows:,}", format_size(each.bytes))
        for name, each in changed.items()
    ]
    if rows:
        heads = ("table", "files before", "after", "rows merged", "bytes written")
        print(columns(heads, rows, list(heads[1:]), indent=0))
    print(wrapped(f"{len(done) - len(changed)} of {len(done)} tables had nothing to merge", 0, hanging=2))
    if changed:
        print("next: millrace vacuum deletes the merged files when no version that must stay readable names them")
