"""What a source is made of: its files, their row groups and times, and how to tell that a file has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystems import FileSystems
from deltalake import DeltaTable

from schemas.errors import ContractError, DataError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.times import ALWAYS, EPOCH, MICROSECOND, day_number, midnight
from transforms.sources.contracts import Contract, Partitions, fits
from transforms.storage.delta_log import path_within
from transforms.storage.delta_tables import file_pool, open_table, paths_of, table_root
from transforms.storage.paths import source_uri


@dataclasses.dataclass(frozen=True)
class Slice:
    """A row group of a file: its first row's number in the file, rows, bounds of its times in µs (both inclusive), and the
    file's stamp, which changes with its content."""

    path: str
    group: int
    first: int
    rows: int
    low: int
    high: int
    stamp: str = ""


def version_of(root: str, source: Source) -> int | None:
    """The newest version of a source that is a Delta table; None for Parquet files."""
    table = _delta_table(source_uri(root, source.name))
    return None if table is None else int(table.version())


def files_of(root: str, source: Source, version: int | None = None) -> list[str]:
    """The source's Parquet files under `<root>/<name>`, sorted; of a Delta table those of `version`, None its newest.

    Raises:
        DataError: there are none, or a folder cannot be looked into.
    """
    folder = source_uri(root, source.name)
    table = _delta_table(folder, version)
    if table is not None:
        return paths_of(table)
    paths = sorted(
        path
        for path in _parquet_files(folder)
        if not any(part.startswith((".", "_")) for part in path[len(folder) :].split("/")[1:])
    )
    if not paths:
        raise DataError(
            f"Source {source.name!r} has Parquet files",
            f"none under {folder}",
            "Write its rows there, or name another folder with --sources",
        )
    return paths


def _delta_table(folder: str, version: int | None = None) -> DeltaTable | None:
    return open_table(folder, version) if _has_log(folder) else None


def _parquet_files(folder: str) -> Iterator[str]:
    if "://" not in folder:  # whose name may hold what Beam would take for a pattern
        for inside, _, names in os.walk(folder, onerror=_closed):
            yield from (os.path.join(inside, name) for name in names if name.endswith(".parquet"))
        if os.path.isfile(f"{folder}.parquet"):
            yield f"{folder}.parquet"
        return
    for match in FileSystems.match([f"{folder}/**.parquet", f"{folder}.parquet"]):
        yield from (each.path for each in match.metadata_list)


def _closed(error: OSError) -> None:
    """Files that cannot be listed are not passed over: their rows would be missing without a word."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise DataError(
            "Every folder of a source can be looked into", f"{error.filename}: {error.strerror}", "Grant access"
        )


def _has_log(folder: str) -> bool:
    return (
        os.path.isdir(os.path.join(folder, "_delta_log"))
        if "://" not in folder
        else bool(FileSystems.match([f"{folder}/_delta_log/*"])[0].metadata_list)
    )


def stamp_of(path: str) -> str:
    """Changes whenever the file's content does: its size, its time of change and a digest of its footer."""
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


def slices_of(root: str, contract: Contract, version: int | None = None) -> list[Slice]:
    """Every row group of a source, from the files' footers; of a Delta table those of `version`, None its newest.

    Raises:
        ContractError: a file is not Parquet or truncated, or its columns are not those declared.
    """
    return survey(root, contract, version)[1]


def survey(root: str, contract: Contract, version: int | None = None) -> tuple[Contract, list[Slice]]:
    """`slices_of`, and the contract by which to read them: of a Delta table it knows the columns that its log holds.

    Raises:
        ContractError: as `slices_of`; a Delta table needs more than its files and partitions to be read right.
    """
    table = _delta_table(source_uri(root, contract.source.name), version)
    if table is not None:
        version = int(table.version())
        contract = dataclasses.replace(contract, partitions=_partitions(table, contract))
    paths = files_of(root, contract.source, version)
    try:
        return contract, [
            each for part in file_pool().map(lambda path: _slices(path, contract), paths) for each in part
        ]
    except ContractError:
        _of_one_type(contract, paths)
        raise


def _of_one_type(contract: Contract, paths: list[str]) -> None:
    """Refuse files of which some hold a column as it is declared and others do not, by one of each."""
    schemas = ((path, open_parquet(path, contract.source).schema_arrow) for path in paths)
    seen: dict[str, dict[bool, tuple[str, pa.DataType]]] = {name: {} for name in contract.read}
    for path, schema in schemas:
        for name, found in seen.items():
            if name not in schema.names:
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


def _partitions(table: DeltaTable, contract: Contract) -> Partitions | None:
    """Declared columns by which a Delta source is partitioned."""
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
            "Have its owner rewrite the files: REORG TABLE … APPLY (PURGE) in Spark, and delta.enableDeletionVectors=false",
        )
    columns = [name for name in table.metadata().partition_columns if name in contract.read]
    if contract.source.time in columns:
        raise ContractError(
            f"{what}: the time of its rows is in its files",
            f"{contract.source.time!r} partitions {uri}",
            "Partition it by the date of the time instead",
        )
    if not columns:
        return None
    known = pl.DataFrame(table.get_add_actions(flatten=True))
    values = known.select(pl.col(f"partition.{name}").alias(name) for name in columns)
    paths = (FileSystems.join(uri, path_within(uri, path)) for path in known["path"])
    return Partitions(
        {field.name: field.type for field in values.to_arrow().schema}, dict(zip(paths, values.to_dicts(), strict=True))
    )


def _deleted(table: DeltaTable) -> bool:
    try:
        return len(pl.DataFrame(table.deletion_vectors())) > 0
    except Exception:  # delta-rs cannot read them either
        return True


def _slices(path: str, contract: Contract) -> list[Slice]:
    file, stamp = open_parquet(path, contract.source), stamp_of(path)
    contract.check(file.schema_arrow, path)
    time = contract.source.time
    column = file.schema_arrow.names.index(time) if time is not None else None
    result, first = [], 0
    for group in range(file.num_row_groups):
        meta = file.metadata.row_group(group)
        low, high = ALWAYS, 2**62
        if column is not None and time is not None:
            bounds = _bounds(meta, time)
            low, high = (_epoch(bound) for bound in bounds) if bounds is not None else (ALWAYS, 2**62)
            if low < contract.earliest or high >= contract.latest:
                low, high = _plausible(file, group, time, contract)
        result.append(Slice(path, group, first, meta.num_rows, low, high, stamp))
        first += meta.num_rows
    return [each for each in result if each.rows]


def _plausible(file: pq.ParquetFile, group: int, time: str, contract: Contract) -> tuple[int, int]:
    """Bounds of a row group's plausible times, where its footer gives none or those of a clock that was wrong."""
    times = pl.Series(pl.from_arrow(file.read_row_group(group, [time]))[time]).dt.epoch("us")  # type: ignore[index]
    times = times.filter((times >= contract.earliest) & (times < contract.latest))
    return (int(times.min()), int(times.max())) if len(times) else (ALWAYS, ALWAYS)  # type: ignore[arg-type]


def _bounds(meta: pq.RowGroupMetaData, time: str) -> tuple[datetime, datetime] | None:
    for i in range(meta.num_columns):
        column = meta.column(i)
        if column.path_in_schema == time and column.is_stats_set and column.statistics.has_min_max:
            return column.statistics.min, column.statistics.max
    return None


def _epoch(moment: datetime) -> int:
    whole = moment.to_pydatetime(warn=False) if hasattr(moment, "to_pydatetime") else moment
    return ((whole if whole.tzinfo else whole.replace(tzinfo=UTC)).astimezone(UTC) - EPOCH) // MICROSECOND


def open_parquet(path: str, source: Source) -> pq.ParquetFile:
    """A Parquet file of `source`, local or on any Beam filesystem."""

    def opened() -> Any:
        return path if "://" not in path else FileSystems.open(path, compression_type="uncompressed")

    try:
        try:
            return pq.ParquetFile(opened())
        except pa.ArrowInvalid:
            with contextlib.suppress(OSError, pa.ArrowException):  # the first error is the one to report
                return pq.ParquetFile(opened(), metadata=_metadata(opened()))
            raise
    except (OSError, pa.ArrowException, RuntimeError) as error:  # RuntimeError: of pyarrow_hotfix
        reason = (str(error).splitlines() or ["unreadable"])[0]
        if isinstance(error, PermissionError):
            raise ContractError(f"Source {source.name!r}: every file can be read", reason, "Grant access") from None
        raise ContractError(
            f"Source {source.name!r}: every file is whole Parquet",
            f"{path}: {reason}",
            "Write the file again (aside, then rename), or remove it",
        ) from None


def _metadata(file: Any) -> pq.FileMetaData:
    """A file's metadata without the Arrow types that its writer noted beside Parquet's own: newer writers (delta-rs for
    Polars) have types there that the Arrow of this environment does not know, such as views of strings."""
    with open(file, "rb") if isinstance(file, str) else file as handle:
        handle.seek(-8, os.SEEK_END)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, os.SEEK_END)
        footer = handle.read(length).replace(b"ARROW:schema", b"ARROW:unused")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + length.to_bytes(4, "little") + b"PAR1"))


@dataclasses.dataclass(frozen=True, eq=False)
class Inventory:
    """Everything a view reads, as it lies there now: contracts and slices per source, the spine's under its own name."""

    spine: Contract
    contracts: Mapping[str, Contract]
    slices: Mapping[str, tuple[Slice, ...]]

    def contract(self, source: str) -> Contract:
        return self.spine if source == self.spine.source.name else self.contracts[source]

    def timeless(self, source: str) -> tuple[Slice, ...]:
        """Row groups in which no time is plausible: no interval reaches them, and yet their rows are to be accounted for."""
        contract = self.contract(source)
        return tuple(
            each for each in self.slices[source] if each.high < contract.earliest or each.low >= contract.latest
        )

    @property
    def notes(self) -> tuple[str, ...]:
        """What a run of some dates cannot account for: rows that belong to no date."""
        result = []
        for name in self.slices:
            lost = self.timeless(name) if self.contract(name).source.time is not None else ()
            if lost:
                rows, paths = sum(each.rows for each in lost), sorted({each.path for each in lost})
                more = f" and {len(paths) - 1} more files" if len(paths) > 1 else ""
                result.append(
                    f"{name}: {rows:,} rows lie in row groups without any plausible time, so in no date ({paths[0]}{more}); --full sets them aside"
                )
        return tuple(result)

    @functools.cached_property
    def extent(self) -> tuple[int, int]:
        """Whole days that hold every plausible spine row, µs; (0, 0) without any."""
        spine, earliest, latest = self.slices[self.spine.source.name], self.spine.earliest, self.spine.latest
        lows = [max(each.low, earliest) for each in spine if each.high >= earliest and each.low < latest]
        highs = [min(each.high, latest - 1) for each in spine if each.high >= earliest and each.low < latest]
        return (midnight(day_number(min(lows))), midnight(day_number(max(highs)) + 1)) if lows else (0, 0)


def take_inventory(view: FeatureView, root: str, now: int) -> Inventory:
    """The sources of `view` under `root`, from footers alone; `now` in µs judges stamps of the future.

    The spine as a source of events is read under the very rules of the spine: a row is good or bad, not both.

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
    surveyed = {name: survey(root, contract) for name, contract in {view.spine.name: spine, **contracts}.items()}
    return Inventory(
        surveyed[view.spine.name][0],
        {name: surveyed[name][0] for name in contracts},
        {name: tuple(slices) for name, (_, slices) in surveyed.items()},
    )
