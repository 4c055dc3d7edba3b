"""The files of a source, their row groups and times, and the stamps by which a changed file is noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections import Counter
from collections.abc import Iterable, Mapping

import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from schemas.errors import ContractError, DataError, IncompleteLogError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.times import day_number, midnight
from transforms.sources.contracts import READ_ERRORS, Contract, Mismatch, Partitions, refused
from transforms.sources.conversions import LocalTimes, Twice
from transforms.sources.data_files import open_file
from transforms.sources.formats import SUFFIXES, is_text
from transforms.sources.listing import LOG, Listing, list_files
from transforms.sources.slices import Slice, Slices
from transforms.sources.surveying import survey_batch, wrong_columns
from transforms.storage.delta_log import path_within
from transforms.storage.delta_tables import file_pool, open_table, paths_of, table_root
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import place_of

# Primitive types of Delta tables.
_ARROW = {
    "byte": pa.int8(),
    "short": pa.int16(),
    "integer": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "string": pa.string(),
    "boolean": pa.bool_(),
    "binary": pa.binary(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "timestamp_ntz": pa.timestamp("us"),
}
# Number of files that a thread takes at a time.
FILES_AT_ONCE = 64
# Ends the rule of the error where a source has none.
HAS_FILES = "must have files"


def version_of(root: str, source: Source) -> int | None:
    """The newest version of a source that is a Delta table; None for files."""
    table = _delta_table(source, place_of(root, source))
    return None if table is None else int(table.version())


def source_files(root: str, source: Source, version: int | None = None) -> list[str]:
    """The source's files under `<root>/<name>` or its `path=`, sorted; of a Delta table those of `version`, None its
    newest.

    Raises:
        DataError: there are none, or a folder cannot be listed.
        ContractError: an entry of the folder is neither read nor skipped, see `listing`.
        StoreError: the log of a Delta table cannot be read.
    """
    folder = place_of(root, source)
    table = _delta_table(source, folder, version)
    return paths_of(table) if table is not None else list(listing_of(root, source).files)


def listing_of(root: str, source: Source) -> Listing:
    """The files of a source that is not a Delta table.

    Raises:
        DataError, ContractError: as `source_files`.
    """
    folder = place_of(root, source)
    listing = list_files(source.name, folder, source.path is not None)
    if not listing.files:
        raise DataError(
            f"Source {source.name!r} {HAS_FILES}",
            f"there are none under {folder}",
            "Write its rows there, name another folder with --sources, or say where they are with path=… in the "
            "definition",
        )
    return listing


def _delta_table(source: Source, folder: str, version: int | None = None) -> DeltaTable | None:
    """The source's Delta table; None if there is no log.

    Raises:
        ContractError: the log has no commit, or there are files beside the table's folder.
        StoreError: the log cannot be read.
    """
    if not _has_log(folder):
        return None
    try:
        table = open_table(folder, version)
    except IncompleteLogError as error:
        raise ContractError(
            f"Source {source.name!r}: every commit of a Delta table must be complete",
            str(error.value),
            "Restore the file, or restore the table to the version before it",
        ) from None
    log = FileSystems.join(folder, LOG)
    if table is None:
        # Without the log, it is unknown which files hold rows that were replaced.
        raise ContractError(
            f"Source {source.name!r}: a Delta table must have a log",
            f"there is no commit in {log}",
            f"Restore the log, or remove {log} if every Parquet file under {folder} is to be read",
        )
    for beside in (folder + suffix for suffix in SUFFIXES):
        if "://" not in folder and os.path.lexists(beside):
            raise ContractError(
                f"Source {source.name!r} must be either a Delta table or files",
                f"there are {folder} and {beside}",
                "Move one of them away",
            )
    return table


def _has_log(folder: str) -> bool:
    return (
        os.path.lexists(os.path.join(folder, LOG))
        if "://" not in folder
        else bool(FileSystems.match([f"{folder}/{LOG}/*"])[0].metadata_list)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Surveyed:
    """A source as it lies there: the contract by which to read it, its row groups, and its files; None of a Delta
    table, whose log lists the files of a version.

    Args:
        local: by file, its local times that occur twice or do not exist, if there are any.
    """

    contract: Contract
    slices: Slices
    listing: Listing | None
    local: Mapping[str, LocalTimes] = dataclasses.field(default_factory=dict)

    @property
    def listings(self) -> tuple[Listing, ...]:
        """The listings that must still be the same when the source has been read."""
        return () if self.listing is None else (self.listing,)


def survey_source(root: str, contract: Contract, version: int | None = None) -> tuple[Contract, list[Slice]]:
    """The contract by which to read a source, and its row groups, from the footers of its files.

    Of a Delta table, they are those of `version` (None: its newest), and the contract has the columns of the log.

    Raises:
        ContractError: a file is not Parquet, is truncated, or does not have the declared columns; or a Delta table uses
            a feature without which it cannot be read correctly.
    """
    found = survey_files(root, contract, version)
    return found.contract, list(found.slices)


def survey_files(root: str, contract: Contract, version: int | None = None) -> Surveyed:
    """As `survey_source`, with the listing by which to check at the end that no file was removed or replaced meanwhile.

    Raises:
        ContractError: as `survey`; one for everything that is wrong with the files.
    """
    found = look_at(root, contract, version)
    if not isinstance(found, Surveyed):
        raise refused(found)
    return found


def look_at(root: str, contract: Contract, version: int | None = None) -> Surveyed | list[Mismatch | ContractError]:
    """`survey_files`, or everything that is wrong with the files."""
    table = _delta_table(contract.source, place_of(root, contract.source), version)
    listing = None
    if table is not None:
        contract = dataclasses.replace(contract, partitions=_partitions(table, contract))
        paths = paths_of(table)
    else:
        listing = listing_of(root, contract.source)
        paths = list(listing.files)
    batches = [paths[i : i + FILES_AT_ONCE] for i in range(0, len(paths), FILES_AT_ONCE)]
    parts = list(file_pool().map(functools.partial(survey_batch, contract), batches))
    wrong = [each for part in parts for each in part.wrong] or wrong_columns(contract, parts)
    if wrong:
        return _by_both(contract, paths, wrong)
    local = {path: count for part in parts for path, count in part.local.items()}
    slices = Slices(each for part in parts for each in part.slices)
    if table is not None:
        _require_logged_rows(contract.source, table, slices)
    return Surveyed(contract, slices, listing, local)


def _require_logged_rows(source: Source, table: DeltaTable, slices: Iterable[Slice]) -> None:
    """Checks that each file of a Delta source has as many rows as its log says, where it says so."""
    root, known = table_root(table), pl.DataFrame(table.get_add_actions(flatten=True))
    if "num_records" not in known.columns:
        return
    found = Counter[str]()
    for each in slices:
        found[each.path] += each.rows
    for logged, rows in known.select("path", "num_records").iter_rows():
        path = FileSystems.join(root, path_within(root, logged))
        if rows is not None and found[path] != rows:
            raise ContractError(
                f"Source {source.name!r}: a file of a Delta table must have the rows that were committed with it",
                f"{path} has {found[path]} rows, and {rows} by the table's log",
                "Restore the file, or have the table's owner write the rows again",
            )


def _by_both(
    contract: Contract, paths: list[str], wrong: list[Mismatch | ContractError]
) -> list[Mismatch | ContractError]:
    """What is wrong; of a column that some files hold as it is declared and others do not, by one of each."""
    mismatches = [each for each in wrong if isinstance(each, Mismatch)]
    if len(mismatches) < len(wrong) or len({each.column for each in mismatches}) > 1 or "missing" in mismatches[0].kind:
        return wrong
    name, bad = mismatches[0].column, {each.file for each in mismatches}
    with contextlib.suppress(ContractError, *READ_ERRORS):  # the first error is the one to report
        for path in paths:
            schema = open_file(path, contract.source).schema
            if path not in bad and name in schema.names and not is_text(path):
                right = schema.field(name).type
                return [mismatches[0].beside(path, str(right))]
    return wrong


def _partitions(table: DeltaTable, contract: Contract) -> Partitions:
    """Declared columns of a Delta source, and the values of its partition columns."""
    what, uri = f"Source {contract.source.name!r}", table_root(table)
    features = table.protocol().reader_features or []
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise ContractError(
            f"{what}: the files of a Delta table must have the names of its columns",
            f"{uri} uses column mapping",
            "Write the table again without delta.columnMapping.mode",
        )
    if "deletionVectors" in features and _deleted(table):
        raise ContractError(
            f"{what}: the files of a Delta table must have its rows and no others",
            f"{uri} uses deletion vectors",
            "Ask its owner to rewrite the files: REORG TABLE … APPLY (PURGE) in Spark, and "
            "delta.enableDeletionVectors=false",
        )
    columns = [name for name in table.metadata().partition_columns if name in contract.read]
    if contract.source.time in columns:
        raise ContractError(
            f"{what}: the time of its rows must be in its files",
            f"{contract.source.time!r} partitions {uri}",
            "Partition it by the date of the time instead",
        )
    others = {
        field.name: _ARROW.get(str(getattr(field.type, "type", "")), pa.null())
        for field in table.schema().fields
        if field.name in contract.source.schema and field.name not in columns
    }
    if not columns:
        return Partitions({}, {}, others)
    known = pl.DataFrame(table.get_add_actions(flatten=True))
    values = known.select(pl.col(f"partition.{name}").alias(name) for name in columns)
    paths = (FileSystems.join(uri, path_within(uri, path)) for path in known["path"])
    return Partitions(
        {field.name: field.type for field in values.to_arrow().schema},
        dict(zip(paths, values.to_dicts(), strict=True)),
        others,
    )


def _deleted(table: DeltaTable) -> bool:
    try:
        return len(pl.DataFrame(table.deletion_vectors())) > 0
    except Exception:  # delta-rs cannot read them either
        return True


@dataclasses.dataclass(frozen=True, eq=False)
class Inventory:
    """Everything that a view reads, as it is now: contracts and slices by source (the spine under its own name), and
    the files of the sources that are not Delta tables."""

    spine: Contract
    contracts: Mapping[str, Contract]
    slices: Mapping[str, Slices]
    listings: tuple[Listing, ...] = ()
    local: Mapping[str, Mapping[str, LocalTimes]] = dataclasses.field(default_factory=dict)

    def contract(self, source: str) -> Contract:
        return self.spine if source == self.spine.source.name else self.contracts[source]

    def timeless(self, source: str) -> Slices:
        """Row groups in which no time is plausible: no interval contains them, but their rows must be accounted for."""
        contract = self.contract(source)
        return Slices(
            each for each in self.slices[source] if each.high < contract.earliest or each.low >= contract.latest
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run of some dates cannot account for: rows that belong to no date; and how local times were taken."""
        result = [
            note
            for name, counts in self.local.items()
            for path, count in counts.items()
            for note in _local_notes(self.contract(name), path, count)
        ]
        for name in self.slices:
            lost = self.timeless(name) if self.contract(name).source.time is not None else ()
            if lost:
                rows, paths = sum(each.rows for each in lost), sorted({each.path for each in lost})
                more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
                result.append(
                    f"{name}: {rows:,} rows lie in row groups without any plausible time, so in no date "
                    f"({paths[0]}{more}); --full sets them aside"
                )
        return tuple(result)

    @functools.cached_property
    def extent(self) -> tuple[int, int]:
        """The span of whole days that contains every plausible spine row, µs; (0, 0) if there is none."""
        spine, earliest, latest = self.slices[self.spine.source.name], self.spine.earliest, self.spine.latest
        lows = [max(each.low, earliest) for each in spine if each.high >= earliest and each.low < latest]
        highs = [min(each.high, latest - 1) for each in spine if each.high >= earliest and each.low < latest]
        return (midnight(day_number(min(lows))), midnight(day_number(max(highs)) + 1)) if lows else (0, 0)


def spine_contract(view: FeatureView, now: int = 2**62) -> Contract:
    """The rules of the spine's rows.  A local time that occurs twice is the earlier instant, so that a row sees less;
    where the spine is a source of events too it is neither."""
    twice: Twice = None if view.spine.name in view.events else "earliest"
    return Contract(view.spine, tuple(view.spine.schema), tuple(view.key), now, twice=twice)


def take_inventory(view: FeatureView, root: str, now: int) -> Inventory:
    """The sources of `view` under `root`, from footers alone; `now` (µs) is for the check of times in the future.

    The spine as a source of events is read under the rules of the spine: a row is good or bad, not both.

    Raises:
        DataError: a source without files.
        ContractError: files that cannot be read as declared.
    """
    spine = spine_contract(view, now)
    contracts = {
        name: spine
        if source is view.spine
        else Contract(source, tuple(view.columns_read(name)), now=now, ordering=view.columns_ordering(name))
        for name, source in view.sources.items()
    }
    looked = {name: look_at(root, contract) for name, contract in {view.spine.name: spine, **contracts}.items()}
    wrong = [each for found in looked.values() if not isinstance(found, Surveyed) for each in found]
    if wrong:
        raise refused(wrong)
    surveyed = {name: found for name, found in looked.items() if isinstance(found, Surveyed)}
    return Inventory(
        surveyed[view.spine.name].contract,
        {name: surveyed[name].contract for name in contracts},
        {name: each.slices for name, each in surveyed.items()},
        tuple(listing for each in surveyed.values() for listing in each.listings),
        {name: each.local for name, each in surveyed.items() if each.local},
    )


def _local_notes(contract: Contract, path: str, count: LocalTimes) -> list[str]:
    name, zone, result = contract.source.name, contract.source.zone, []
    if count.twice:
        how = {"latest": "taken as the later instant", "earliest": "taken as the earlier instant"}
        what = how.get(str(contract.twice), "set aside: rows that are spine rows and events need an offset")
        result.append(f"{name}: {count.twice:,} local times occur twice in {zone} ({path}); {what}")
    if count.absent:
        result.append(f"{name}: {count.absent:,} local times do not exist in {zone} ({path}); set aside")
    return result
