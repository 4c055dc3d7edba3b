"""trace: follow a feature row or a prediction back to its sources."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import cast

import polars as pl
from deltalake import DeltaTable
from deltalake.schema import PrimitiveType

from beam_pipelines.commands.trace_live import print_scored, print_seen
from beam_pipelines.runtime.arguments import Arguments, whole
from beam_pipelines.runtime.terminal import columns, many, wrapped
from schemas.durations import instant
from schemas.errors import DataError, StoreError
from schemas.loading import Definition, Project, load_project
from transforms.features.manifest_store import read_manifest
from transforms.lineage.erasure_records import ErasureRecord, erased_row, erasure_of, erasures
from transforms.lineage.trace import (
    Origin,
    VisibleSource,
    commit_of,
    find_prediction,
    find_rows,
    origin_of,
    parse_key,
    view_table,
)
from transforms.models.bundle import model_manifest
from transforms.models.registry import Registry, registry_uri
from transforms.models.stored_records import ModelManifest, TableVersion
from transforms.records.times import as_date
from transforms.records.value_text import format_value
from transforms.storage.delta_log import CommitInfo
from transforms.storage.delta_log import root_of as root_of_uri
from transforms.storage.delta_tables import TableRow, open_table, table_root
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import features_live_uri, present_path, table_path_in_store
from transforms.storage.vacuum import tables_of

DAYS_SHOWN = 8


def trace(argv: Sequence[str]) -> int:
    """Follow a feature row or a prediction back to what it was made from."""
    arguments = Arguments("millrace trace", trace.__doc__ or "", definition=False, beam=False)
    arguments.add_argument(
        "--key", action="append", metavar="COLUMN=VALUE", help="key of the spine row; once for each of its columns"
    )
    arguments.add_argument("--time", help="time of the spine row, or its UTC day (default: every time of the key)")
    arguments.add_argument(
        "--prediction", type=whole(-(2**63), 2**63 - 1), metavar="ID", help="a prediction_id instead of a key"
    )
    arguments.add_argument("--live", action="store_true", help="search only the live tables")
    arguments.add_argument("--registry", help="MLflow tracking URI (default: SQLite under <store>/registry)")
    arguments.add_argument(
        "--days", action="store_true", help=f"list the days a row could see, however many (default: up to {DAYS_SHOWN})"
    )
    flags = arguments.parse_all(argv)
    project = load_project(flags.definition) if flags.definition else None
    if (flags.prediction is None) == (not flags.key):
        arguments.error("name a row with --key COLUMN=VALUE, or a prediction with --prediction ID")
    moment = None if flags.time is None else instant(flags.time, "--time")
    if flags.prediction is not None:
        only = next(iter(project.models)) if project is not None and len(project.models) == 1 else None
        _trace_prediction(flags, project, flags.model or only, None if moment is None else moment.date())
        return 0
    if project is None:
        arguments.error("a feature row is traced with its --definition")
    _trace_row(flags, project.definition(flags.view, flags.model), moment)
    return 0


def _trace_row(flags: argparse.Namespace, definition: Definition, moment: datetime | None) -> None:
    view = definition.view
    key = parse_key(view, flags.key)
    whole_day = moment is not None and len(flags.time) == 10
    exact = {} if moment is None or whole_day else {view.time: moment}
    erased = erased_row(flags.store, view, {**key, **exact}, flags.live) if exact else None
    try:
        table = view_table(flags.store, view, position="features_live" if flags.live else "features")
    except StoreError:
        if erased is None:
            raise
        _print_erased(erased, "row")
        return
    found = find_rows(table, {**key, **exact}, None if moment is None else moment.date())
    if not found and erased is not None:
        _print_erased(erased, "row")
        return
    if not found:
        fix = "See its dates with: millrace tables"
        if not exact and any(each.source == view.spine.name for each in erasures(flags.store)):
            fix += f". Rows of {view.spine.name} were erased: an exact --time shows whether this was one of them"
        value = ", ".join(
            f"{name} = {value}" for name, value in {**key, **({view.time: flags.time} if moment else {})}.items()
        )
        raise DataError(
            "The row is in the feature table",
            f"{value}: not in version {table.version()} of {table_root(table)}",
            fix,
        )
    found.sort(key=lambda each: each[1][view.time])
    if len(found) > 1:
        print(f"{len(found)} rows of this key, the last of them below; choose one with --time")
        for _, row in found[-DAYS_SHOWN - 1 : -1]:
            print(f"  {row[view.time].isoformat()}")
        print()
    file, row = found[-1]
    _print_origin(origin_of(view, table, file, row), definition, flags)


def _print_erased(record: ErasureRecord, what: str) -> None:
    print(f"this {what} was erased on {record.at[:10]} ({record.at}, erasure {record.erasure_id})")


def _print_origin(found: Origin, definition: Definition, flags: argparse.Namespace) -> None:
    view, row = definition.view, found.row
    key = ", ".join(f"{name} = {format_value(row[name], view.spine.schema[name])}" for name in view.key)
    print(f"{view.name}: {key} at {row[view.time].isoformat()}, row_id {row['row_id']}")
    print(
        columns(
            ("feature", "value"),
            [(name, format_value(row[name], dtype)) for name, dtype in view.columns.items()],
            ("value",),
        )
    )
    print("\ntable")
    print(wrapped(f"{found.table} version {found.version}", hanging=2))
    print(wrapped(f"file {found.file.path}", hanging=2))
    if found.commit:
        print(
            wrapped(
                f"committed as version {found.commit['version']} {_when(found.commit)} by run "
                f"{found.commit.get('run_id')}",
                hanging=2,
            )
        )
    if found.outdated:
        text = (
            "its windows over all history may be wrong: it was written by a version that could count events twice or "
            "too early; millrace features recomputes it"
        )
        print(wrapped(text, hanging=2))
    if "__cut" in row:
        print_seen(view, flags.store, row, flags.days, DAYS_SHOWN)
    else:
        _print_sources(found.seen, flags.days)
    print("\ndefinition")
    _print_definition(definition, str(found.commit.get("definition_sha256", "")))


def _print_definition(definition: Definition, recorded: str) -> None:
    digest = definition.digest
    text = (
        ""
        if not recorded
        else ", as when it was computed"
        if recorded == digest
        else f", changed since it was computed (then {recorded[:16]})"
    )
    print(wrapped(f"{definition.path}, SHA-256 {digest[:16]}{text}", hanging=2))
    print(wrapped(f"view {definition.view.name}, fingerprint {definition.view.fingerprint}", hanging=2))


def _print_sources(seen: Sequence[VisibleSource], days: bool) -> None:
    print("\nsources, as that run had read them" if seen else "\nno manifest records what was read")
    for each in seen:
        if each.digest is not None:
            print(f"  {each.source}: dimension, digest {each.digest % 2**64:016x}")
        elif len(each.days) > DAYS_SHOWN and not days:
            rows = sum(count for _, count, _ in each.days)
            total = sum(digest for _, _, digest in each.days) % 2**64
            print(
                wrapped(
                    f"{each.source}: {as_date(each.days[0][0])} to {as_date(each.days[-1][0])}, "
                    f"{many(rows, 'row')} in {many(len(each.days), 'day')}, digests add up to {total:016x} "
                    "(--days lists them)",
                    hanging=2,
                )
            )
        else:
            print(f"  {each.source}:{'' if each.days else ' no rows in reach'}")
            for day, count, digest in each.days:
                print(f"    {as_date(day)}  {count:>9,} rows  digest {digest % 2**64:016x}")
        for path, stamp, since in each.files[:DAYS_SHOWN]:
            print(wrapped(f"{path}  {since} (stamp {stamp})", 4, hanging=2))
        if len(each.files) > DAYS_SHOWN:
            print(
                f"    and {many(len(each.files) - DAYS_SHOWN, 'more file')}, "
                f"{sum(since != 'unchanged' for _, _, since in each.files[DAYS_SHOWN:])} of them changed or gone since"
            )


def _trace_prediction(flags: argparse.Namespace, project: Project | None, model: str | None, day: date | None) -> None:
    try:
        where, table, file, row = find_prediction(flags.store, flags.prediction, model, day, flags.live)
    except DataError:
        erased = erasure_of(flags.store, prediction_ids=[flags.prediction])
        if erased is None:
            raise
        _print_erased(erased, "prediction")
        return
    entry, live = commit_of(table, file), where.startswith("predictions_live/")
    _print_prediction(table, row, entry, live)
    version, folder = Registry(registry_uri(flags.store, flags.registry)).resolve(row["model"], row["model_version"])
    manifest = model_manifest(folder)
    registry = flags.registry or "the registry of the store"
    about = f"version {version} of {row['model']} in {registry}, {folder}"
    _print_model(about, flags.store, folder, manifest)
    _print_label_files(flags.store, manifest.get("label_files", []))
    for trained in tables_of(manifest):
        _print_trained(flags.store, cast(TableVersion, trained))
    if project is None:
        return
    named = row["model"] if row["model"] in project.models else None
    definition = project.definition(flags.view if named is None else None, named)
    if live:
        _print_feature_row(flags, definition, row)
    else:
        _print_scored(flags, str(entry.get("features", "")), definition, row)


def _print_prediction(table: DeltaTable, row: TableRow, entry: CommitInfo, live: bool) -> None:
    """Prints a prediction, its table, and the commit that added it."""
    types = {field.name: pl.Float32() for field in table.schema().fields if field.type == PrimitiveType("float")}
    print(f"prediction {row['prediction_id']} of {row['model']}{', live' if live else ''}")
    print(
        columns(
            ("column", "value"),
            [
                (column, format_value(value, types.get(column)))
                for column, value in row.items()
                if column != "prediction_id"
            ],
        )
    )
    print("\ntable")
    print(wrapped(f"{table_root(table)} version {table.version()}", hanging=2))
    if entry:
        store = table_root(table).rsplit("/", 2)[0]
        origin = "" if live else f", from {_here(store, str(entry.get('features', 'unknown features')))}"
        commit = f"committed as version {entry['version']} {_when(entry)} by run {entry.get('run_id')}{origin}"
        print(wrapped(commit, hanging=2))


def _print_model(name: str, store: str, folder: str, manifest: ModelManifest) -> None:
    """Prints a model version, the feature tables that it was trained on, and its definition."""
    made_by = manifest.get("definition", {})
    split = ", ".join(f"{part} {value}" for part, value in manifest.get("split", {}).items())
    print("\nmodel")
    print(wrapped(name, hanging=2))
    code = f"code {manifest.get('code_version')}"
    print(wrapped(f"trained by run {manifest.get('run_id')}, {code}, split {split}", hanging=2))
    for trained in tables_of(manifest) or [{}]:
        table = f"{_here(store, root_of_uri(str(trained.get('uri'))))} version {trained.get('version')}"
        print(wrapped(f"on {table}, fingerprint {trained.get('fingerprint', manifest['fingerprint'])}", hanging=2))
    print("\ndefinition")
    kept = os.path.join(os.path.dirname(folder.rstrip("/")), "definition.py")
    where = kept if os.path.exists(kept) else made_by.get("name")
    print(wrapped(f"{where}, SHA-256 {str(made_by.get('sha256'))[:16]}", hanging=2))


def _here(store: str, table: str) -> str:
    """Feature tables, perhaps with @ and a version, where they lie now: stores may be moved."""
    if len(several := _versions(table)) > 1:
        return ", ".join(_here(store, f"{uri}@{version}") for uri, version in several)
    uri, at, version = table.rpartition("@") if "@" in table.rsplit("/", 1)[-1] else (table, "", "")
    return present_path(store, uri, "features") + at + version


def _versions(features: str) -> list[tuple[str, str]]:
    """Addresses and versions of the feature tables that a commit of predictions names."""
    return re.findall(r"(.+?)@(\d+)(?:, |$)", features)


def _print_label_files(store: str, files: Sequence[str]) -> None:
    if files:
        print("\nlabels")
        for each in files[:DAYS_SHOWN]:
            stamp, _, path = each.partition(" ")
            print(wrapped(f"{present_path(store, path, 'sources')} (stamp {stamp})", hanging=2))
        if len(files) > DAYS_SHOWN:
            print(f"  and {many(len(files) - DAYS_SHOWN, 'more file')}")


def _print_trained(store: str, trained: TableVersion) -> None:
    """What the training table was made from."""
    uri = FileSystems.join(store, *table_path_in_store(trained["uri"]).split("/")) if trained else ""
    table = open_table(uri, trained["version"]) if trained else None
    if table is None:
        return
    manifest = read_manifest(table)
    print("\nsources of the training features")
    for source, files in sorted(manifest.files.items()):
        rows = sum(count for count, _ in manifest.digests.get(source, {}).values())
        print(f"  {source}: {many(rows, 'row') + ', ' if rows else ''}{many(len(files), 'file')}")
        for path, (stamp, _, _) in sorted(files.items())[:DAYS_SHOWN]:
            print(wrapped(f"{present_path(store, path, 'sources')} (stamp {stamp})", 4, hanging=2))
        if len(files) > DAYS_SHOWN:
            print(f"    and {many(len(files) - DAYS_SHOWN, 'more file')}")


def _print_feature_row(flags: argparse.Namespace, definition: Definition, row: TableRow) -> None:
    """Prints the feature row of a live prediction, and its origin if the store has it."""
    view = definition.view
    print("\nthe feature row that was scored")
    print_scored(view, row)
    table = open_table(features_live_uri(flags.store, view.name, view.fingerprint))
    found = [] if table is None else find_rows(table, {"row_id": row["row_id"]}, row["date"])
    if table is None or not found:
        print("  it is not in the live feature table of this store and definition")
        return
    _print_origin(origin_of(view, table, *found[0]), definition, flags)


def _print_scored(flags: argparse.Namespace, features: str, definition: Definition, row: TableRow) -> None:
    """Prints where the scored row came from, as `_print_scored_of` does, of each view of the model."""
    versions = dict(_versions(features))
    model = definition.model
    for view in (definition.view,) if model is None else model.views:
        if view is definition.view:
            conditions = {"row_id": row["row_id"]}
        else:  # the prediction has the row id of the first view
            conditions = {name: row[name] for name in (*view.key, view.time)}
        of = definition if view is definition.view else dataclasses.replace(definition, view=view)
        _print_scored_of(flags, versions, of, row, conditions)


def _print_scored_of(
    flags: argparse.Namespace,
    versions: Mapping[str, str],
    definition: Definition,
    row: TableRow,
    conditions: Mapping[str, object],
) -> None:
    """Prints where a row of one view came from, in the version of its table that was scored if that is still there."""
    view, table = definition.view, None
    for uri, version in versions.items():
        if table_path_in_store(uri).startswith(f"features/{view.name}/{view.fingerprint}"):
            with contextlib.suppress(StoreError):
                table = view_table(flags.store, view, int(version))
    print(f"\nthe row that was scored{'' if table else ', as the feature table has it now'}")
    table = table or view_table(flags.store, view)
    for file, found in find_rows(table, conditions, row["date"]):
        _print_origin(origin_of(view, table, file, found), definition, flags)


def _when(entry: CommitInfo) -> str:
    return (
        f"on {datetime.fromtimestamp(entry['timestamp'] / 1000, UTC):%Y-%m-%d %H:%M:%S} UTC"
        if "timestamp" in entry
        else ""
    )
