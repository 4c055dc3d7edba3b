"""The note of a live store: the views that its job serves, the versions that it has served, and the stream it reads.

A live store belongs to one job, which serves one or several views.  The job may serve other views after a restart, and
other versions of a view: they continue with the rows that are there, if these have the columns that they read, of the
types that they declare.  A view that was served and is not named any more must be dropped by name, so that no view ends
by mistake.  The first job on a store writes the note to a file there.  If the file is missing, the tables show which
views were served.

Offsets are only valid in their own stream: the flags and files of a replay decide its offsets, the topics of Kafka
theirs.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import pyarrow as pa

from schemas.errors import StoreError
from schemas.live import accepted, joined_sources
from schemas.views import FeatureView
from transforms.records.frame_packets import Head
from transforms.storage.delta_tables import delta_schema, open_table, write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import live_dead_letters_uri, source_uri, sources_root, tables_below
from transforms.storage.stored_json import explain_damage, parse_object, read_regular
from transforms.streaming.beginnings import of_topic
from transforms.streaming.live_tables import application_of, source_record
from transforms.streaming.view_contracts import contracts_of

NOTE = "live_view.json"
_FIX = "Give this job another --store (with its own offsets, accepted rows and feature rows)"


@dataclasses.dataclass(frozen=True)
class RecordedDefinition:
    """The texts of a definition (see `schemas.loading.Definition`)."""

    name: str
    source: str
    modules: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class JobNote:
    """The note of a live store.

    Args:
        served: by name of a view, the fingerprints of its versions that are served; the newest first.
        declared: by source, the type of each declared column.
        definitions: of the versions that were ever served, by `version_name`.
        stream: everything that the offsets depend on, by the names of flags; None: it is not known.
        rows: of a replay, digests of what its messages hold, by source and column; None: there are none.
    """

    served: Mapping[str, Sequence[str]]
    declared: Mapping[str, Mapping[str, str]]
    definitions: Mapping[str, RecordedDefinition] = dataclasses.field(default_factory=dict)
    stream: Mapping[str, object] | None = None
    rows: Mapping[str, Mapping[str, str]] | None = None

    @classmethod
    def of(
        cls,
        views: Sequence[FeatureView],
        stream: Mapping[str, object] | None,
        definitions: Mapping[str, RecordedDefinition],
    ) -> JobNote:
        served: dict[str, list[str]] = {}
        for view in views:
            served.setdefault(view.name, []).append(view.fingerprint)
        declared = {
            name: {column: str(dtype) for column, dtype in source.schema.items()}
            for name, source in joined_sources(views).items()
        }
        return cls(served, declared, dict(definitions), None if stream is None else dict(stream))

    def after(self, known: JobNote) -> JobNote:
        """This note, with what an earlier job recorded of other sources, other versions and the stream."""
        stream, rows = (self.stream, self.rows) if self.stream is not None else (known.stream, known.rows)
        if rows is not None and known.rows is not None:  # a source that no view reads now keeps its offsets
            rows = {**known.rows, **rows}
        return dataclasses.replace(
            self,
            declared={**known.declared, **self.declared},
            definitions={**known.definitions, **self.definitions},
            stream=stream,
            rows=rows,
        )

    def to_text(self) -> str:
        view, (fingerprint, *_) = next(iter(self.served.items()))
        stream = {} if self.stream is None else {"stream": self.stream}
        rows = {} if self.rows is None else {"rows": self.rows}
        note = {
            "view": view,  # these two are all that an earlier version needs
            "fingerprint": fingerprint,
            "served": {name: list(each) for name, each in self.served.items()},
            "declared": self.declared,
            "definitions": {name: dataclasses.asdict(each) for name, each in self.definitions.items()},
            **stream,
            **rows,
        }
        return json.dumps(note, indent=2) + "\n"

    @classmethod
    def of_text(cls, text: bytes) -> JobNote:
        """The note of `to_text`.  An earlier version wrote one view, and the columns that it checked."""
        note: Head = parse_object(text)
        served = note.get("served") or {note["view"]: [note["fingerprint"]]}
        definitions = {name: RecordedDefinition(**each) for name, each in note.get("definitions", {}).items()}
        rows = note.get("rows")
        digests = None if rows is None else {name: dict(each) for name, each in rows.items()}
        return cls(served, note.get("declared", {}), definitions, note.get("stream"), digests)


def claim(
    views: Sequence[FeatureView],
    store: str,
    stream: Mapping[str, object] | None = None,
    drop: Sequence[str] = (),
    definitions: Mapping[str, RecordedDefinition] = MappingProxyType({}),
    rows: Callable[[], Mapping[str, Mapping[str, str]]] | None = None,
) -> None:
    """Writes the note of a store, or checks that the job may continue with it.

    Args:
        views: the views that the job serves, the newest definition first.
        store: the folder of the tables.
        stream: everything on which the offsets depend; None: it is not checked.
        drop: names of views that were served and are not any more.
        definitions: of the views, by `version_name`.
        rows: of a replay, reads its files and digests what its messages hold, by source and column.

    Raises:
        StoreError: the store serves another view, or has read another stream, or its rows do not have the columns that
            a view reads.  Nothing was written.
    """
    mine = JobNote.of(views, stream, definitions)
    known = read_note(store)
    if known is None:
        _check_served(views, store, dict.fromkeys(_served_by_tables(store), store), drop)
        _check_columns(views, store, {})
        mine = mine if rows is None else dataclasses.replace(mine, rows=rows())
        if "://" not in store:
            os.makedirs(store, exist_ok=True)
            try:
                with open(os.path.join(store, NOTE), "x") as handle:
                    handle.write(mine.to_text())
                return
            except FileExistsError:  # another job started at the same time
                known = read_note(store) or mine
    if known is not None:
        _check_served(views, store, dict.fromkeys(known.served, FileSystems.join(store, NOTE)), drop)
        _check_stream(views, store, mine, known)
        _check_columns(views, store, known.declared)
        mine = mine if rows is None or mine.rows is not None else dataclasses.replace(mine, rows=rows())
        _check_replayed(views, store, mine, known)
        mine = mine.after(known)
    if mine != known:
        write_file_atomically(store, NOTE, pa.py_buffer(mine.to_text().encode()))


def read_note(store: str) -> JobNote | None:
    """The note of a live store; None if there is none.

    Raises:
        StoreError: it is damaged.
    """
    path = FileSystems.join(store, NOTE)
    if not FileSystems.exists(path):
        return None
    fix = "Remove that file: the tables show which views were served"
    with explain_damage("The note of a live store is JSON", path, fix):
        return JobNote.of_text(read_regular(path))


def _check_served(views: Sequence[FeatureView], store: str, served: Mapping[str, str], drop: Sequence[str]) -> None:
    """Checks that every view that was served is named or dropped; `served` has where each is recorded."""
    named = {view.name for view in views}
    for name, where in served.items():
        if name not in named and name not in drop:
            raise StoreError(
                "A live job serves every view that was served on its store, or drops it by name",
                f"view {name!r} on {store} ({where})",
                f"Add its --definition, or --drop {name}; or give this job another --store",
            )
    for name in drop:
        if name in named or name not in served:
            what = "this job serves it" if name in named else f"there are {', '.join(served) or 'none'}"
            raise StoreError("--drop names a view that was served and is not any more", f"{name!r}: {what}", "")


def _check_columns(views: Sequence[FeatureView], store: str, declared: Mapping[str, Mapping[str, str]]) -> None:
    """Checks that the rows of the store have the columns that the views read, of the declared types.

    Args:
        views: the views.
        store: the folder of the tables.
        declared: by source, the columns that the last job on the store declared: no row since has any others.
    """
    for view in views:
        for name, contract in contracts_of(view).items():
            table = open_table(source_uri(sources_root(store), name))
            if table is None:
                continue
            known = {field.name: field.type for field in table.schema().fields}
            held = {*contract.columns, *(view.columns_held(name) if name in view.events else ())}
            for field in delta_schema(accepted(view, name)).fields:
                if field.name not in contract.source.schema:
                    continue
                if field.name not in known or field.name not in declared.get(name, known):
                    if field.name in held:
                        _refuse_rows(view, store, name, f"the rows do not have the column {field.name!r}")
                elif field.type != known[field.name]:
                    types = f"{field.type} here and {known[field.name]} there"
                    _refuse_rows(view, store, name, f"column {field.name!r} is {types}")


def _check_stream(views: Sequence[FeatureView], store: str, mine: JobNote, known: JobNote) -> None:
    before, now = known.stream, mine.stream
    if before is None or now is None or before == now or not has_read(views, store):
        return
    names = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    shown = ["; ".join(f"{name} {each.get(name) or 'none'}" for name in names) for each in (before, now)]
    raise StoreError(
        "A live store must continue with the stream that it has read, because offsets depend on it",
        f"{shown[1]}, where {store} was written with {shown[0]}",
        "Use the same flags as before, or give this job another --store (rows before its --start are history)",
    )


def has_read(views: Sequence[FeatureView], store: str) -> bool:
    """Whether the store has offsets of a topic."""
    records = [source_record(store, name) for name in joined_sources(views)]
    return any(of_topic(offsets) for each in records if each is not None for offsets in each.next.values())


def _check_replayed(views: Sequence[FeatureView], store: str, mine: JobNote, known: JobNote) -> None:
    """Checks that the files of a replay hold the messages that the store has read, whenever they were written."""
    if known.rows is None or mine.rows is None or not has_read(views, store):
        return
    changed = sorted(
        name
        for name, columns in mine.rows.items()
        if any(known.rows.get(name, {}).get(column, digest) != digest for column, digest in columns.items())
    )
    if changed:
        raise StoreError(
            "A replay must continue with the rows that it began with, because offsets depend on them",
            f"files of {', '.join(changed)} that have changed since {store} was written",
            "Restore the files, or replay them into another --store",
        )


def _served_by_tables(store: str) -> list[str]:
    """The views whose live tables a store has, for a store without a note."""
    if "://" not in store and not os.path.isdir(store):
        return []
    names = tables_below(store)
    found = {name.split("/")[1] for name in names if name.startswith("features_live/")}
    for other in {name.removeprefix("dead_letters/live_") for name in names if name.startswith("dead_letters/live_")}:
        table = open_table(live_dead_letters_uri(store, other))
        version = None if table is None else table.transaction_version(application_of(f"{other}/letters"))
        found |= set() if version is None else {other}  # else a model's
    return sorted(found)


def _refuse_rows(view: FeatureView, store: str, source: str, value: str) -> None:
    raise StoreError(
        "A definition continues with the live rows of a store only if they have its columns: "
        f"view {view.name!r}, source {source!r}",
        f"{value}, in {source_uri(sources_root(store), source)}",
        _FIX,
    )
