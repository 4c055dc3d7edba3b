"""tables: list every table of a store."""

from __future__ import annotations

from collections.abc import Sequence

from beam_pipelines.runtime.arguments import Arguments
from beam_pipelines.runtime.terminal import columns, format_size
from schemas.errors import DataError
from transforms.lineage.trace import (
    describe_tables,
)


def tables(argv: Sequence[str]) -> int:
    """List every table of a store."""
    arguments = Arguments("millrace tables", tables.__doc__ or "", definition=None, beam=False)
    flags = arguments.parse_all(argv)
    rows = []
    for each in describe_tables(flags.store):
        dates = f"{each.first}–{each.last}" if each.first else ""
        run = f"{each.run} {each.at:%Y-%m-%d %H:%M}".strip() if each.at and each.version is not None else each.run
        folder = "Parquet" if each.table.startswith("sources/") else "none"
        version = folder if each.version is None else str(each.version)
        count = "" if each.rows is None else f"{each.rows:,}"
        rows.append(
            (each.table, version, dates, count, format_size(each.bytes), f"{each.files:,}", each.fingerprint, run)
        )
    if not rows:
        raise DataError(
            "A store has tables", f"none in {flags.store}", "Write sources there, then run: millrace features"
        )
    print(
        columns(
            ("table", "version", "dates", "rows", "bytes", "files", "fingerprint", "last run (UTC)"),
            rows,
            ("version", "rows", "bytes", "files"),
            indent=0,
        )
    )
    return 0
