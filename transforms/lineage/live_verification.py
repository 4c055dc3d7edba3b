"""Computes live feature rows again by plain code, each from the rows that its cut shows.

Which rows a feature row could see is decided by the same code as in `parity`.  The features are computed from them by
other code.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from datetime import date, timedelta

import polars as pl

from schemas.errors import DataError
from schemas.views import FeatureView
from transforms.lineage.visible_rows import VisibleRows, seen_of
from transforms.records.record_batches import frame
from transforms.sources.contracts import Contract
from transforms.sources.repeats import NEVER_REPEATED
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_live_uri, source_uri, sources_root
from transforms.streaming.live_dimensions import kept_version
from transforms.streaming.row_origin import ORIGIN_COLUMNS, cut_of
from transforms.verification.check import Verified, verify_rows
from transforms.verification.plain_sources import SourceFrames
from transforms.verification.sample import choose_files, choose_rows, every_row

# Feature rows whose sources are read together.
AT_ONCE = 5_000


def verify_live(
    view: FeatureView, store: str, rows: int | None, run_id: str, start: date | None = None, end: date | None = None
) -> Verified:
    """Verifies a number of live feature rows (None: all) of `[start, end)`.

    Raises:
        DataError: there are no feature rows.
    """
    began = time.perf_counter()
    table = open_table(features_live_uri(store, view.name, view.fingerprint))
    files = [] if table is None else data_files(table, start, end)
    if not files:
        raise DataError(
            f"View {view.name!r} has live feature rows to verify",
            f"none in {store}",
            "Run: millrace features --streaming",
        )
    total = sum(file.rows for file in files)
    if rows is None or rows >= total:
        parts = every_row(files, AT_ONCE)
    else:
        chosen, starts = choose_files(files, max(rows // 12, 1), run_id)
        parts = iter([choose_rows(view, chosen, starts, rows, run_id).rows])
    result = Verified(of=total)
    for feature_rows in parts:
        for (day,), some in feature_rows.group_by("date", maintain_order=True):
            assert isinstance(day, date)
            result += _verify_day(view, store, some, day)
    return dataclasses.replace(result, seconds=time.perf_counter() - began)


def _verify_day(view: FeatureView, store: str, feature_rows: pl.DataFrame, day: date) -> Verified:
    cuts = sorted(feature_rows["__cut"].unique().to_list(), key=lambda text: sum(cut_of(text).values()))
    seen = {name: seen_of(view, store, name, cuts, day, day) for name in view.events}
    spine = _spine_rows(view, store, feature_rows, day)
    result = Verified()
    for (cut, versions), some in feature_rows.with_row_index("__at").group_by(
        "__cut", "__dimensions", maintain_order=True
    ):
        tables = _as_of(view, store, seen, cuts.index(str(cut)), json.loads(str(versions)))
        result += verify_rows(view, some, spine[some["__at"]], tables)
    return result


def _spine_rows(view: FeatureView, store: str, feature_rows: pl.DataFrame, day: date) -> pl.DataFrame:
    """The accepted spine row of each feature row, in the same order."""
    columns = [*view.spine.schema, *ORIGIN_COLUMNS]
    table = open_table(source_uri(sources_root(store), view.spine.name))
    files = [] if table is None else data_files(table, day, day + timedelta(days=1))
    empty = pl.DataFrame(schema={**view.spine.schema, **{name: feature_rows.schema[name] for name in ORIGIN_COLUMNS}})
    rows = pl.concat([empty, *(frame(read_file(file, columns)) for file in files)]).unique(ORIGIN_COLUMNS)
    rows = rows.with_columns(pl.lit(True).alias("__found"))
    found = feature_rows.select(ORIGIN_COLUMNS).join(rows, on=ORIGIN_COLUMNS, how="left", maintain_order="left")
    return found.select(*view.spine.schema, "__found")


def _as_of(
    view: FeatureView, store: str, seen: Mapping[str, VisibleRows], cut: int, versions: Mapping[str, str]
) -> SourceFrames:
    """The sources as a feature row of the cut saw them."""
    frames = {name: each.at(cut, -NEVER_REPEATED, NEVER_REPEATED) for name, each in seen.items()}
    folder = FileSystems.join(store, "dimensions")
    frames |= {
        name: kept_version(folder, name, version) for name, version in versions.items() if name in view.dimensions
    }
    contracts = {name: Contract(source, _columns(view, name)) for name, source in view.sources.items()}
    return SourceFrames(contracts, frames)


def _columns(view: FeatureView, name: str) -> tuple[str, ...]:
    return tuple(view.columns_read(name))
