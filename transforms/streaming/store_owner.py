"""The owner of a live store: one view, and one stream of messages.

A store has offsets and dead letters of one view's job.  The job of a second view on the same store would continue from
the offsets of the first one.  Another definition of the view continues with the rows that are there, if they have the
columns that it reads, of the types that it declares.  The first job on a store writes the owner to a file there.  If
the file is missing, the tables show it.

Offsets are only valid in their own stream: the flags and files of a replay decide its offsets, the topics of Kafka
theirs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping

import pyarrow as pa

from schemas.errors import StoreError
from schemas.live import accepted, live_sources
from schemas.views import FeatureView
from transforms.records.frame_packets import Head
from transforms.storage.delta_tables import delta_schema, open_table, write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import live_dead_letters_uri, source_uri, sources_root, tables_below
from transforms.storage.stored_json import explain_damage, parse_object, read_regular
from transforms.streaming.beginnings import of_topic
from transforms.streaming.live_tables import application_of, source_record
from transforms.streaming.view_contracts import contracts_of

OWNER = "live_view.json"
_FIX = "Give this job another --store (with its own offsets, accepted rows and feature rows)"


@dataclasses.dataclass(frozen=True)
class Owner:
    """The owner of a live store.

    Args:
        view: name of the view.
        fingerprint: of the view.
        declared: by source, the type of each declared column.
        stream: everything that the offsets depend on, by the names of flags; None: it is not known.
        rows: of a replay, digests of what its messages hold, by source; None: there are none.
    """

    view: str
    fingerprint: str
    declared: Mapping[str, Mapping[str, str]]
    stream: Mapping[str, object] | None = None
    rows: Mapping[str, str] | None = None

    @classmethod
    def of(cls, view: FeatureView, stream: Mapping[str, object] | None, rows: Mapping[str, str] | None = None) -> Owner:
        declared = {
            name: {column: str(dtype) for column, dtype in source.schema.items()}
            for name, source in live_sources(view).items()
        }
        return cls(view.name, view.fingerprint, declared, None if stream is None else dict(stream), rows)

    def after(self, known: Owner) -> Owner:
        """This owner, with other sources and the stream that an earlier job recorded."""
        stream, rows = (self.stream, self.rows) if self.stream is not None else (known.stream, known.rows)
        return dataclasses.replace(self, declared={**known.declared, **self.declared}, stream=stream, rows=rows)

    def to_text(self) -> str:
        stream = {} if self.stream is None else {"stream": self.stream}
        rows = {} if self.rows is None else {"rows": self.rows}
        note = {"view": self.view, "fingerprint": self.fingerprint, "declared": self.declared, **stream, **rows}
        return json.dumps(note, indent=2) + "\n"

    @classmethod
    def of_text(cls, text: bytes) -> Owner:
        """The owner of `to_text`.  An earlier version wrote the columns that it checked instead of declared ones."""
        note: Head = parse_object(text)
        rows = note.get("rows")
        digests = None if rows is None else {str(name): str(each) for name, each in rows.items()}
        return cls(note["view"], note["fingerprint"], note.get("declared", {}), note.get("stream"), digests)


def claim(
    view: FeatureView,
    store: str,
    stream: Mapping[str, object] | None = None,
    rows: Mapping[str, str] | None = None,
) -> None:
    """Writes the owner of a store, or checks that it is this view and stream.

    Args:
        view: the view.
        store: the folder of the tables.
        stream: everything on which the offsets depend; None: it is not checked.
        rows: of a replay, digests of what its messages hold, by source.

    Raises:
        StoreError: the store belongs to another view or to another stream, or its rows do not have the columns that
            this definition of the view reads.  Nothing was written.
    """
    mine = Owner.of(view, stream, rows)
    known = _read(store)
    if known is None:
        _check_tables(view, store)
        _check_columns(view, store)
        if "://" not in store:
            os.makedirs(store, exist_ok=True)
            try:
                with open(os.path.join(store, OWNER), "x") as handle:
                    handle.write(mine.to_text())
                return
            except FileExistsError:  # another job started at the same time
                known = _read(store) or mine
    if known is not None:
        _check_note(view, store, known)
        _check_stream(view, store, mine, known)
        _check_replayed(view, store, mine, known)
        _check_columns(view, store)
        mine = mine.after(known)
    if mine != known:
        write_file_atomically(store, OWNER, pa.py_buffer(mine.to_text().encode()))


def _read(store: str) -> Owner | None:
    path = FileSystems.join(store, OWNER)
    if not FileSystems.exists(path):
        return None
    fix = "Remove that file: the tables show the owner too"
    with explain_damage("The owner of a live store is written down as JSON", path, fix):
        return Owner.of_text(read_regular(path))


def _check_note(view: FeatureView, store: str, known: Owner) -> None:
    if known.view != view.name:
        _refuse_view(view, store, known.view, FileSystems.join(store, OWNER))


def _check_columns(view: FeatureView, store: str) -> None:
    """Checks that the rows of the store have the columns that the view reads, of the declared types."""
    for name, contract in contracts_of(view).items():
        table = open_table(source_uri(sources_root(store), name))
        if table is None:
            continue
        known = {field.name: field.type for field in table.schema().fields}
        held = {*contract.columns, *(view.columns_held(name) if name in view.events else ())}
        for field in delta_schema(accepted(view, name)).fields:
            if field.name not in contract.source.schema:
                continue
            if field.name not in known:
                if field.name in held:
                    _refuse_rows(view, store, name, f"the rows do not have the column {field.name!r}")
            elif field.type != known[field.name]:
                types = f"{field.type} here and {known[field.name]} there"
                _refuse_rows(view, store, name, f"column {field.name!r} is {types}")


def _check_stream(view: FeatureView, store: str, mine: Owner, known: Owner) -> None:
    before, now = known.stream, mine.stream
    if before is None or now is None or before == now or not has_read(view, store):
        return
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    shown = ["; ".join(f"{name} {each.get(name) or 'none'}" for name in names) for each in (before, now)]
    raise StoreError(
        "A live store continues with the stream that it has read: the offsets of another stream mean other rows",
        f"{shown[1]}, where {store} was written with {shown[0]}",
        "Use the same flags as before, or give this job another --store (rows before its --start are history)",
    )


def has_read(view: FeatureView, store: str) -> bool:
    """Whether the store has offsets of a topic."""
    records = [source_record(store, name) for name in live_sources(view)]
    return any(of_topic(offsets) for each in records if each is not None for offsets in each.next.values())


def _check_replayed(view: FeatureView, store: str, mine: Owner, known: Owner) -> None:
    """Checks that the files of a replay hold the messages that the store has read, whenever they were written."""
    if known.rows is None or mine.rows is None or not has_read(view, store):
        return
    changed = sorted(name for name, digest in mine.rows.items() if known.rows.get(name, digest) != digest)
    if changed:
        raise StoreError(
            "A replay continues with the rows that it began with: with other rows the same offsets mean other messages",
            f"files of {', '.join(changed)} that have changed since {store} was written",
            "Restore the files, or replay them into another --store",
        )


def _check_tables(view: FeatureView, store: str) -> None:
    """Like `_check_note`, for a store without the file."""
    if "://" not in store and not os.path.isdir(store):
        return
    names = tables_below(store)
    computed = {tuple(name.split("/")[1:]) for name in names if name.startswith("features_live/")}
    dead_letters = {name.removeprefix("dead_letters/live_") for name in names if name.startswith("dead_letters/live_")}
    for other in sorted({name for name, _ in computed} - {view.name}):
        _refuse_view(view, store, other, FileSystems.join(store, "features_live", other))
    for other in sorted(dead_letters - {view.name}):
        table = open_table(live_dead_letters_uri(store, other))
        if (
            table is not None and table.transaction_version(application_of(f"{other}/letters")) is not None
        ):  # the table is not that of a model
            _refuse_view(view, store, other, live_dead_letters_uri(store, other))


def _refuse_view(view: FeatureView, store: str, other: str, where: str) -> None:
    raise StoreError(
        "A store holds the live jobs of one view",
        f"view {view.name!r} on {store}, which is view {other!r}'s ({where})",
        _FIX,
    )


def _refuse_rows(view: FeatureView, store: str, source: str, value: str) -> None:
    raise StoreError(
        "A definition continues with the live rows of a store only if they have its columns: "
        f"view {view.name!r}, source {source!r}",
        f"{value}, in {source_uri(sources_root(store), source)}",
        _FIX,
    )
