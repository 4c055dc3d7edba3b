"""One live view per store, and one stream.

Accepted rows, offsets and each row's fate are kept by source, and rows are judged by the columns that one view reads.  A
second view's job on the same store would go on from the first one's offsets, with rows judged for another purpose.  The
view that owns a store is written down there when its first job starts; in stores without such a note their tables tell.

Offsets mean nothing in another stream: those of a replay are numbered by its flags, those of Kafka by its topics.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import polars as pl
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from schemas.errors import StoreError
from schemas.live import repeats_by
from schemas.views import FeatureView
from transforms.sources.contracts import check_rows
from transforms.storage.delta_tables import data_files, open_table, read_file, write_aside
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root, tables_below
from transforms.streaming.beginnings import of_topic
from transforms.streaming.live_features import contracts_of
from transforms.streaming.live_tables import application_of, last_commit_record

OWNER = "live_view.json"
_FIX = "Give this job another --store (offsets, accepted rows and answers of its own)"


def claim(view: FeatureView, store: str, stream: Mapping[str, Any] | None = None) -> None:
    """Note that the store's live jobs are this view's, and what they read (`stream`: all that its offsets depend on).

    Raises:
        StoreError: they are another view's, were of a definition of it that read other columns, or have read another stream;
            nothing was written.
    """
    mine = _note(view)
    if stream is not None:
        mine["stream"] = dict(stream)
    known = _read(store)
    if known is None:
        _check_tables(view, store)
        if "://" not in store:
            os.makedirs(store, exist_ok=True)
            try:
                with open(os.path.join(store, OWNER), "x") as handle:
                    handle.write(json.dumps(mine, indent=2) + "\n")
                return
            except FileExistsError:  # another job started at the same moment
                known = _read(store) or mine
    if known is not None:
        _check_note(view, store, mine, known)
        _check_stream(view, store, mine, known)
        mine = {**known, **mine, "sources": {**known["sources"], **mine["sources"]}}
    if mine != known:
        write_aside(store, OWNER, pa.py_buffer((json.dumps(mine, indent=2) + "\n").encode()))


def _note(view: FeatureView) -> dict[str, Any]:
    return {
        "view": view.name,
        "fingerprint": view.fingerprint,
        "sources": {
            name: {"columns": sorted(contract.columns), "repeats_by": sorted(repeats_by(view, name))}
            for name, contract in contracts_of(view).items()
        },
    }


def _read(store: str) -> dict[str, Any] | None:
    path = FileSystems.join(store, OWNER)
    if not FileSystems.exists(path):
        return None
    with FileSystems.open(path, compression_type="uncompressed") as handle:
        try:
            return dict(json.loads(handle.read()))
        except ValueError:
            raise StoreError(
                "A store tells whose live jobs write to it",
                f"{path} is not JSON",
                "Remove that file: the tables tell as well",
            ) from None


def _check_note(view: FeatureView, store: str, mine: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if known["view"] != view.name:
        _refuse_view(view, store, str(known["view"]), FileSystems.join(store, OWNER))
    for name, each in mine["sources"].items():
        before = known["sources"].get(name, each)
        if before == each:
            continue
        other = sorted(set(each["columns"]) ^ set(before["columns"])) or ["the columns by which repeats count once"]
        _refuse_rows(view, store, name, f"{', '.join(other)} read by one of the two only")


def _check_stream(view: FeatureView, store: str, mine: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    before, now = known.get("stream"), mine.get("stream")
    if before is None or now is None or before == now or not _has_read(view, store):
        return
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    shown = ["; ".join(f"{name} {each.get(name) or 'none'}" for name in names) for each in (before, now)]
    raise StoreError(
        "A live store goes on with the stream that it has read: offsets of another one mean other rows",
        f"{shown[1]}, where {store} was written with {shown[0]}",
        "Repeat the flags of before, or give this job another --store (what comes before its --start is history)",
    )


def _has_read(view: FeatureView, store: str) -> bool:
    """Whether offsets of a topic are in the store."""
    told = (
        last_commit_record(open_table(source_uri(sources_root(store), name)), application_of(name))
        for name in contracts_of(view)
    )
    return any(of_topic(offsets) for each in told for offsets in each.get("next", {}).values())


def _check_tables(view: FeatureView, store: str) -> None:
    """As `_check_note`, of a store without a note."""
    if "://" not in store and not os.path.isdir(store):
        return
    names = tables_below(store)
    answered = {tuple(name.split("/")[1:]) for name in names if name.startswith("features_live/")}
    dead_letters = {name.removeprefix("dead_letters/live_") for name in names if name.startswith("dead_letters/live_")}
    for other in sorted({name for name, _ in answered} - {view.name}):
        _refuse_view(view, store, other, FileSystems.join(store, "features_live", other))
    for other in sorted(dead_letters - {view.name}):
        table = open_table(live_dead_letters_uri(store, other))
        if (
            table is not None and table.transaction_version(application_of(f"{other}/letters")) is not None
        ):  # not a model's
            _refuse_view(view, store, other, live_dead_letters_uri(store, other))
    if answered and open_table(features_live_uri(store, view.name, view.fingerprint)) is None:
        _check_rows(view, store)


def _check_rows(view: FeatureView, store: str) -> None:
    """See that the rows which a job of another definition of the view has taken in are those that this one would have."""
    contracts = contracts_of(view)
    table = open_table(live_dead_letters_uri(store, view.name))
    for file in [] if table is None else data_files(table):
        told = pl.DataFrame(pl.from_arrow(read_file(file, ["source", "partition", "place", "field"])))
        told = told.filter(pl.col("partition") >= 0, pl.col("place") >= 0)
        for name, field in told.select("source", "field").unique().sort("source", "field").iter_rows():
            known = [*contracts[name].columns, str(contracts[name].source.event_time)] if name in contracts else []
            if known and field and not set(field.split(", ")) & set(known):
                _refuse_rows(
                    view, store, name, f"rows were dead letters for their {field!r}, which this view does not read"
                )
    for name, contract in contracts.items():
        table = open_table(source_uri(sources_root(store), name))
        if table is None:
            continue
        columns = {field.name for field in table.schema().fields}
        if ("__counted" in columns) != bool(repeats_by(view, name)):
            _refuse_rows(view, store, name, "repeats count once for one of the two only")
        for file in data_files(table):
            rows = pl.DataFrame(pl.from_arrow(read_file(file, list(contract.columns))))
            _, bad = check_rows(contract, rows.select(contract.columns))
            if len(bad):
                value = f"an accepted row breaks this view's rule: {bad['field'][0]}, {bad['rule'][0]}"
                _refuse_rows(view, store, name, value)


def _refuse_view(view: FeatureView, store: str, other: str, where: str) -> None:
    raise StoreError(
        "A store holds the live jobs of one view",
        f"view {view.name!r} on {store}, which is view {other!r}'s ({where})",
        _FIX,
    )


def _refuse_rows(view: FeatureView, store: str, source: str, value: str) -> None:
    raise StoreError(
        f"A definition goes on with a store's live rows if it judges them as the one that took them in: view {view.name!r}, "
        f"source {source!r}",
        f"{value}, in {store}",
        _FIX,
    )
