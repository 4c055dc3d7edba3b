"""What is in a store, and where a row of it came from: read from tables, their logs, manifests and models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime

import polars as pl
from deltalake import DeltaTable

from schemas.errors import DataError, DefinitionError, StoreError
from schemas.views import FeatureView, lifetime_sources, reached_from
from transforms.features.manifest import MANIFEST_VERSION, Manifest
from transforms.features.manifest_store import read_manifest
from transforms.records.times import day_number
from transforms.sources.data_files import stamp_of
from transforms.sources.formats import format_of, without_suffix
from transforms.sources.listing import is_hidden
from transforms.storage.delta_log import CommitInfo, commit_at, commits, file_actions
from transforms.storage.delta_tables import DataFile, TableRow, data_files, dates_of, open_table, read_file, table_root
from transforms.storage.feature_tables import open_feature_table
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import present_path, tables_below
from transforms.storage.vacuum import files_below


@dataclasses.dataclass(frozen=True)
class TableSummary:
    """A summary of a table.  `version` is None for a folder of Parquet files, and for a table without a commit."""

    table: str
    version: int | None
    first: date | None
    last: date | None
    rows: int | None
    bytes: int
    files: int
    fingerprint: str
    run: str
    at: datetime | None


def describe_tables(store: str) -> list[TableSummary]:
    """Every table of the store, and sources that are Parquet files.

    Raises:
        StoreError: a table's log cannot be read.
    """
    tables = [_table(store, name) for name in tables_below(store)]
    known = {each.table for each in tables}
    return sorted(
        [*tables, *(each for each in _folders(store) if each.table not in known)], key=lambda each: each.table
    )


def _table(store: str, name: str) -> TableSummary:
    table = open_table(FileSystems.join(store, *name.split("/")))
    if table is None:
        return TableSummary(name, None, None, None, None, 0, 0, "", "", None)
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    first, last_date = dates_of(table) or (None, None)
    last = commit_at(table_root(table), table.version())
    parts = name.split("/")
    print_of = parts[2] if len(parts) == 3 else str(last.get("fingerprint", ""))
    at = datetime.fromtimestamp(last["timestamp"] / 1000, UTC) if "timestamp" in last else None
    return TableSummary(
        name,
        int(table.version()),
        first,
        last_date,
        int(actions["num_records"].sum()),
        int(actions["size_bytes"].sum()),
        len(actions),
        print_of,
        str(last.get("run_id", "")),
        at,
    )


def _folders(store: str) -> list[TableSummary]:
    """Sources that are folders of files, or one file."""
    held: dict[str, list[tuple[int, datetime]]] = {}
    root = FileSystems.join(store, "sources")
    for file in files_below(root):
        parts = file.path[len(root) + 1 :].split("/")
        if format_of(parts[-1]) is not None and not any(map(is_hidden, parts)):
            held.setdefault(without_suffix(parts[0]), []).append((file.bytes, file.changed))
    return [
        TableSummary(
            f"sources/{name}",
            None,
            None,
            None,
            None,
            sum(size for size, _ in files),
            len(files),
            "",
            "",
            max(at for _, at in files),
        )
        for name, files in held.items()
    ]


@dataclasses.dataclass(frozen=True)
class VisibleSource:
    """What a spine row could see of one source.

    Args:
        days: [(day since 1970, number of rows, digest)]; empty for a dimension.
        digest: digest of a dimension, as last used.
        files: path, stamp, and what has happened to the file since.
    """

    source: str
    days: tuple[tuple[int, int, int], ...]
    digest: int | None
    files: tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """The origin of a feature row."""

    row: TableRow
    table: str
    version: int
    file: DataFile
    commit: CommitInfo
    seen: tuple[VisibleSource, ...]
    outdated: bool = False  # whether it was written by a version whose lifetime windows may be wrong


def view_table(store: str, view: FeatureView, version: int | None = None, position: str = "features") -> DeltaTable:
    """The feature table of the view.

    Raises:
        StoreError: there is no such table; the error names tables with other fingerprints.
    """
    uri = FileSystems.join(store, position, view.name, view.fingerprint)
    return open_feature_table(uri, "millrace features", version, mismatch=StoreError)


def find_rows(
    table: DeltaTable, conditions: Mapping[str, object], day: date | None = None
) -> list[tuple[DataFile, TableRow]]:
    """Rows with these values, each with its file.  With `day`, files of other dates are not read."""
    found: list[tuple[DataFile, TableRow]] = []
    columns = list(dict.fromkeys(conditions))
    for file in data_files(table):
        if day is not None and file.date != day:
            continue
        part = pl.DataFrame(pl.from_arrow(read_file(file, columns)))
        hit = (
            part.select(pl.all_horizontal(pl.col(name) == value for name, value in conditions.items()))
            .to_series()
            .fill_null(False)
        )
        if hit.any():
            whole = pl.DataFrame(pl.from_arrow(read_file(file)))
            found += [(file, row) for row in whole.filter(hit).iter_rows(named=True)]
    return found


def parse_key(view: FeatureView, words: Sequence[str]) -> dict[str, object]:
    """Parses `["flight_id=123"]` as values of the key's columns.

    Raises:
        DefinitionError: a column is not part of the key, is missing, or has a value of another type.
    """
    example = " ".join(f"--key {name}=…" for name in view.key)
    given = dict(word.split("=", 1) for word in words if "=" in word)
    if len(given) != len(words) or set(given) != set(view.key):
        raise DefinitionError(
            f"A row of view {view.name!r} must be identified by {', '.join(view.key)}",
            f"given: {' '.join(words) or 'no --key'}",
            f"Write {example}",
        )
    values = {}
    for name, text in given.items():
        dtype = view.spine.schema[name]
        try:
            series = (
                pl.Series([text])
                if dtype == pl.String
                else pl.Series([text]).str.to_date()
                if dtype == pl.Date
                else None
            )
            if series is None:
                series = (
                    pl.Series([{"true": True, "false": False}[text.lower()]])
                    if dtype == pl.Boolean
                    else pl.Series([int(text)]).cast(dtype)
                )
        except (pl.exceptions.PolarsError, ValueError, KeyError):
            raise DefinitionError(f"{name!r} must be {dtype}", f"it is {text!r}", f"Write {example}") from None
        values[name] = series[0]
    return values


def origin_of(view: FeatureView, table: DeltaTable, file: DataFile, row: TableRow) -> Origin:
    """The origin of a row in a file: the commit that added the file, and what its run had read."""
    uri, entry = table_root(table), commit_of(table, file)
    made = open_table(uri, entry["version"]) if "version" in entry else None
    manifest = read_manifest(made) if made is not None else None
    store = uri.rsplit("/", 3)[0]
    seen = () if manifest is None else tuple(_seen(view, store, manifest, row[view.time]))
    old = manifest is not None and manifest.version < MANIFEST_VERSION and bool(lifetime_sources(view))
    return Origin(row, uri, int(table.version()), file, entry, seen, old)


def _seen(view: FeatureView, store: str, manifest: Manifest, moment: datetime) -> list[VisibleSource]:
    at = int(pl.Series([moment]).cast(pl.Datetime("us", "UTC")).to_physical()[0])
    result = []
    for name in (view.spine.name, *(name for name in view.sources if name != view.spine.name)):
        paths = manifest.files.get(name, {})
        if name in view.dimensions:
            result.append(VisibleSource(name, (), manifest.dimensions.get(name), _files(store, paths, None)))
            continue
        first, last = day_number(reached_from(view, name, at)), day_number(at)
        digests = manifest.digests.get(name, {})
        days = tuple((day, *digests[day]) for day in sorted(digests) if first <= day <= last)
        result.append(VisibleSource(name, days, None, _files(store, paths, (first, last))))
    return result


def _files(
    store: str, paths: Mapping[str, tuple[str, int, int]], days: tuple[int, int] | None
) -> tuple[tuple[str, str, str], ...]:
    wanted = {
        path: stamp
        for path, (stamp, low, high) in sorted(paths.items())
        if days is None or (low <= days[1] and high >= days[0])
    }
    there = {path: present_path(store, path, "sources") for path in wanted}
    return tuple((there[path], stamp, _since(there[path], stamp)) for path, stamp in wanted.items())


def _since(path: str, stamp: str) -> str:
    """What has happened to a file since it had this stamp."""
    try:
        return "unchanged" if stamp_of(path) == stamp else "changed since"
    except (OSError, ValueError):
        return "gone"


def find_prediction(
    store: str, prediction: int, model: str | None = None, day: date | None = None, live: bool = False
) -> tuple[str, DeltaTable, DataFile, TableRow]:
    """(Path and name of the table, table, file, row) of a prediction.

    A live prediction is found if `live` is set, or if no batch job made it.

    Raises:
        DataError: there is no such prediction.
    """
    looked = []
    positions = ("predictions_live",) if live else ("predictions", "predictions_live")
    for name in sorted(tables_below(store)):  # batch before live
        position, _, of = name.partition("/")
        mine = position in positions and model in (
            None,
            of,
            of.partition(".")[0],
        )  # a job with another alias writes to the table `<model>.<alias>`
        table = open_table(FileSystems.join(store, *name.split("/"))) if mine else None
        if table is None:
            continue
        looked.append(name)
        for file, row in find_rows(table, {"prediction_id": prediction}, day):
            return name, table, file, row
    raise DataError(
        "The prediction must be in the store",
        f"{prediction} is not in {', '.join(looked) or 'any table: there are no predictions'}",
        "See the tables with: millrace tables",
    )


def commit_of(table: DeltaTable, file: DataFile) -> CommitInfo:
    """The metadata of the commit of these rows; empty if the log does not have it any more.

    Rows that were copied into a file of another run belong to the commit of the file from which they were copied.
    """
    uri = table_root(table)
    inside = file.origin or file.path[len(uri) + 1 :]
    run_id = inside.rsplit("/", 1)[-1].rsplit("-", 1)[0]
    for entry in commits(uri, table.version()):
        if entry.get("run_id") == run_id and inside in file_actions(uri, entry["version"])[0]:
            return entry
    return {}
