"""The files of a source, their row groups and times, and the stamps by which a changed file is noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from io import BufferedIOBase
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from schemas.errors import ContractError, DataError, IncompleteLogError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.pickled_once import PickledOnce
from transforms.records.times import ALWAYS, day_number, midnight
from transforms.sources.contracts import READ_ERRORS, Contract, Partitions, as_frame, fits, not_whole, readable
from transforms.sources.listing import LOG, SUFFIX, Listing, list_files
from transforms.storage.delta_log import path_within
from transforms.storage.delta_tables import file_pool, open_table, paths_of, table_root
from transforms.storage.file_systems import FileSystems, require_regular
from transforms.storage.paths import source_uri

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


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row group of a file: the number of its first row in the file, its number of rows, its first and last time in
    µs, and the file's stamp, which changes with the content."""

    path: str
    group: int
    first: int
    rows: int
    low: int
    high: int
    stamp: str = ""


class Slices(PickledOnce, tuple[Slice, ...]):
    """Row groups of a source."""

    def overlapping(self, low: int, high: int) -> Slices:
        """The row groups that may have rows in `[low, high)` µs."""
        found = Slices(each for each in self if each.low < high and each.high >= low)
        return self if len(found) == len(self) else found

    def joined(self, more: Sequence[Slice]) -> Slices:
        """These row groups, and those of `more` that are not among them."""
        return Slices(dict.fromkeys([*self, *more])) if more else self

    def pickled_state(self) -> object:
        return [list(map(operator.attrgetter(name), self)) for name in _FIELDS]

    @classmethod
    def from_state(cls, state: Sequence[Sequence[Any]]) -> Slices:
        return cls(map(Slice, *state))


_FIELDS = tuple(field.name for field in dataclasses.fields(Slice))


def version_of(root: str, source: Source) -> int | None:
    """The newest version of a source that is a Delta table; None if it is a folder of Parquet files."""
    table = _delta_table(source, source_uri(root, source.name))
    return None if table is None else int(table.version())


def source_files(root: str, source: Source, version: int | None = None) -> list[str]:
    """The source's Parquet files under `<root>/<name>`, sorted; for a Delta table, those of `version` (None: its
    newest).

    Raises:
        DataError: there are none, or a folder cannot be listed.
        ContractError: an entry of the folder is neither read nor skipped, see `listing`.
        StoreError: the log of a Delta table cannot be read.
    """
    folder = source_uri(root, source.name)
    table = _delta_table(source, folder, version)
    return paths_of(table) if table is not None else list(listing_of(root, source).files)


def listing_of(root: str, source: Source) -> Listing:
    """The files of a source that is not a Delta table.

    Raises:
        DataError, ContractError: as `source_files`.
    """
    folder = source_uri(root, source.name)
    listing = list_files(source.name, folder)
    if not listing.files:
        raise DataError(
            f"Source {source.name!r} has Parquet files",
            f"none under {folder}",
            "Write its rows there, or name another folder with --sources",
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
            f"Source {source.name!r}: every commit of a Delta table is whole",
            str(error.value),
            "Restore the file, or restore the table to the version before it",
        ) from None
    log = FileSystems.join(folder, LOG)
    if table is None:
        # Without the log, it is unknown which files hold rows that were replaced.
        raise ContractError(
            f"Source {source.name!r}: a Delta table has a log",
            f"no commit in {log}",
            f"Restore the log, or remove {log} if every Parquet file under {folder} is to be read",
        )
    if "://" not in folder and os.path.lexists(folder + SUFFIX):
        raise ContractError(
            f"Source {source.name!r} is a Delta table or Parquet files, not both",
            f"{folder} and {folder}{SUFFIX}",
            "Move one of them away",
        )
    return table


def _has_log(folder: str) -> bool:
    return (
        os.path.lexists(os.path.join(folder, LOG))
        if "://" not in folder
        else bool(FileSystems.match([f"{folder}/{LOG}/*"])[0].metadata_list)
    )


def stamp_of(path: str) -> str:
    """The file's size, its time of modification and a digest of its footer. It changes whenever the content does."""
    if "://" in path:
        (match,) = FileSystems.match([path])
        (meta,) = match.metadata_list
        return f"{meta.size_in_bytes}-{meta.last_updated_in_seconds}"
    status = os.stat(path)
    with open(path, "rb") as handle:
        handle.seek(max(status.st_size - 8, 0))
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(max(status.st_size - 8 - length, 0))
        footer = hashlib.blake2b(handle.read(length), digest_size=8).hexdigest()
    return f"{status.st_size}-{status.st_mtime_ns}-{footer}"


@dataclasses.dataclass(frozen=True, eq=False)
class Surveyed:
    """What a survey found: the contract by which to read the source, its row groups, and its files (None for a Delta
    table, whose log lists the files of a version)."""

    contract: Contract
    slices: Slices
    listing: Listing | None

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
        ContractError: as `survey_source`.
    """
    table = _delta_table(contract.source, source_uri(root, contract.source.name), version)
    listing = None
    if table is not None:
        contract = dataclasses.replace(contract, partitions=_partitions(table, contract))
        paths = paths_of(table)
    else:
        listing = listing_of(root, contract.source)
        paths = list(listing.files)
    try:
        batches = [paths[i : i + FILES_AT_ONCE] for i in range(0, len(paths), FILES_AT_ONCE)]
        parts = list(file_pool().map(_Footers(contract).slices, batches))
    except ContractError:
        with contextlib.suppress(*READ_ERRORS):  # the first error is the one to report
            _of_one_type(contract, paths)
        raise
    slices = Slices(each for part in parts for each in part)
    if table is not None:
        _require_logged_rows(contract.source, table, slices)
    return Surveyed(contract, slices, listing)


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
                f"Source {source.name!r}: a file of a Delta table has the rows that were committed with it",
                f"{path}: {found[path]} rows, and {rows} by the table's log",
                "Restore the file, or have the table's owner write the rows again",
            )


def _of_one_type(contract: Contract, paths: list[str]) -> None:
    """Refuses files if a column has the declared type in some and another type in others; the error names one of
    each."""
    schemas = ((path, open_parquet(path, contract.source).schema_arrow) for path in paths)
    seen: dict[str, dict[bool, tuple[str, pa.DataType]]] = {name: {} for name in contract.read}
    for path, schema in schemas:
        for name, found in seen.items():
            if schema.names.count(name) != 1:
                continue
            kind, declared = schema.field(name).type, contract.source.schema[name]
            found.setdefault(fits(declared, kind), (path, kind))
            if len(found) == 2:
                (good, right), (bad, wrong) = found[True], found[False]
                raise ContractError(
                    f"Source {contract.source.name!r}: column {name!r} has one type in every file, declared {declared}",
                    f"{right} in {good}, and {wrong} in {bad}",
                    f"Write {bad} again with {name!r} as {right}, or move it away",
                )


def _partitions(table: DeltaTable, contract: Contract) -> Partitions:
    """Declared columns of a Delta source, and the values of its partition columns."""
    what, uri = f"Source {contract.source.name!r}", table_root(table)
    features = table.protocol().reader_features or []
    if table.metadata().configuration.get("delta.columnMapping.mode", "none") != "none":
        raise ContractError(
            f"{what}: the files of a Delta table name its columns",
            f"column mapping in {uri}",
            "Write the table again without delta.columnMapping.mode",
        )
    if "deletionVectors" in features and _deleted(table):
        raise ContractError(
            f"{what}: the files of a Delta table hold its rows and no others",
            f"deletion vectors in {uri}",
            "Have its owner rewrite the files: REORG TABLE … APPLY (PURGE) in Spark, and "
            "delta.enableDeletionVectors=false",
        )
    columns = [name for name in table.metadata().partition_columns if name in contract.read]
    if contract.source.time in columns:
        raise ContractError(
            f"{what}: the time of its rows is in its files",
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


class _Footers:
    """Reads the footers of a source's files."""

    def __init__(self, contract: Contract) -> None:
        self.contract = contract
        # The schema that was checked last: most files of a source have the same.
        self.checked: pa.Schema | None = None

    def slices(self, paths: Sequence[str]) -> list[Slice]:
        """The row groups of some files.

        Raises:
            ContractError: a file cannot be read, or does not have the declared columns.
        """
        result: list[Slice] = []
        for path in paths:
            try:
                result += self._slices_of(path)
            except READ_ERRORS as error:
                raise not_whole(self.contract.source, path, error) from None
        return result

    def _slices_of(self, path: str) -> list[Slice]:
        contract = self.contract
        file, stamp = open_parquet(path, contract.source), stamp_of(path)
        schema, metadata = file.schema_arrow, file.metadata
        if self.checked is None or not schema.equals(self.checked):
            contract.check(schema, path)
            self.checked = schema
        time = contract.source.time
        result, first = [], 0
        for group in range(metadata.num_row_groups):
            rows = metadata.row_group(group).num_rows
            low, high = ALWAYS, 2**62
            if time is not None and time not in schema.names:  # added to a Delta table later
                low, high = ALWAYS, ALWAYS
            elif time is not None:
                low, high = _bounds(file, group, time) or (ALWAYS, 2**62)
                if low < contract.earliest or high >= contract.latest:
                    low, high = _plausible(file, group, time, contract)
            result.append(Slice(path, group, first, rows, low, high, stamp))
            first += rows
        return [each for each in result if each.rows]


def _plausible(file: pq.ParquetFile, group: int, time: str, contract: Contract) -> tuple[int, int]:
    """Bounds of a row group's plausible times. They are read from the rows if its footer has no bounds, or implausible
    ones."""
    times = readable(as_frame(file.read_row_group(group, [time])))[time].dt.epoch("us")
    times = times.filter((times >= contract.earliest) & (times < contract.latest))
    return (int(times.min()), int(times.max())) if len(times) else (ALWAYS, ALWAYS)  # type: ignore[arg-type]


# How many units of a Parquet timestamp make a µs, or how many µs make a unit.
_UNITS = {"milliseconds": (1000, 1), "microseconds": (1, 1), "nanoseconds": (1, 1000)}


def _bounds(file: pq.ParquetFile, group: int, time: str) -> tuple[int, int] | None:
    """The smallest and largest time of a row group in µs, from the footer; None if it has none.

    They are integers, because the times that a writer records may be beyond Python's datetime.
    """
    meta = file.metadata.row_group(group)
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema == time and column.is_stats_set and column.statistics.has_min_max:
            kind = json.loads(file.schema.column(i).logical_type.to_json())
            if column.physical_type != "INT64" or kind.get("timeUnit") not in _UNITS:
                return None
            times, parts = _UNITS[kind["timeUnit"]]
            low, high = column.statistics.min_raw, column.statistics.max_raw
            return low * times // parts, high * times // parts
    return None


def open_parquet(path: str, source: Source) -> pq.ParquetFile:
    """Opens a Parquet file of `source`, local or on any Beam filesystem."""

    def opened() -> str | BufferedIOBase:
        if "://" not in path:
            require_regular(path)
        return path if "://" not in path else FileSystems.open(path, compression_type="uncompressed")

    try:
        try:
            return pq.ParquetFile(opened())
        except pa.ArrowInvalid:
            with contextlib.suppress(OSError, pa.ArrowException):  # the first error is the one to report
                return pq.ParquetFile(opened(), metadata=_metadata(opened()))
            raise
    except (*READ_ERRORS, RuntimeError) as error:  # RuntimeError: of pyarrow_hotfix
        reason = (str(error).splitlines() or ["unreadable"])[0]
        if isinstance(error, PermissionError):
            raise ContractError(f"Source {source.name!r}: every file can be read", reason, "Grant access") from None
        raise ContractError(
            f"Source {source.name!r}: every file is whole Parquet",
            f"{path}: {reason}",
            "Write the file again (aside, then rename), or remove it",
        ) from None


def _metadata(file: str | BufferedIOBase) -> pq.FileMetaData:
    """A file's metadata without the Arrow types that its writer stored beside Parquet's own. Newer writers (delta-rs
    for Polars) store types that this environment's Arrow does not know, such as string views."""
    with open(file, "rb") if isinstance(file, str) else file as handle:
        handle.seek(-8, os.SEEK_END)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, os.SEEK_END)
        footer = handle.read(length).replace(b"ARROW:schema", b"ARROW:unused")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + length.to_bytes(4, "little") + b"PAR1"))


@dataclasses.dataclass(frozen=True, eq=False)
class Inventory:
    """Everything that a view reads, as it is now: contracts and slices by source (the spine under its own name), and
    the files of the sources that are not Delta tables."""

    spine: Contract
    contracts: Mapping[str, Contract]
    slices: Mapping[str, Slices]
    listings: tuple[Listing, ...] = ()

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
        """Notes on rows that belong to no date, so that a run over some dates does not count them."""
        result = []
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


def take_inventory(view: FeatureView, root: str, now: int) -> Inventory:
    """The sources of `view` under `root`, from footers alone; `now` (µs) is for the check of times in the future.

    The spine as a source of events is read under the rules of the spine: a row is good or bad, not both.

    Raises:
        DataError: a source without files.
        ContractError: files that cannot be read as declared.
    """
    spine = Contract(view.spine, tuple(view.spine.schema), tuple(view.key), now)
    contracts = {
        name: spine
        if source is view.spine
        else Contract(source, tuple(view.columns_read(name)), now=now, ordering=view.columns_ordering(name))
        for name, source in view.sources.items()
    }
    surveyed = {name: survey_files(root, contract) for name, contract in {view.spine.name: spine, **contracts}.items()}
    return Inventory(
        surveyed[view.spine.name].contract,
        {name: surveyed[name].contract for name in contracts},
        {name: each.slices for name, each in surveyed.items()},
        tuple(listing for each in surveyed.values() for listing in each.listings),
    )
