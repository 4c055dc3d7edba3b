"""Files of a source, of any format, as columns of rows: Parquet by row groups, text by pieces."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from io import BufferedIOBase, BytesIO
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import ContractError
from schemas.sources import Source
from transforms.sources.contracts import READ_ERRORS, TEXT, Contract, not_whole
from transforms.sources.formats import is_text
from transforms.sources.slices import Slice
from transforms.sources.text_files import BROKEN, TextFile
from transforms.storage.file_systems import FileSystems, open_regular, require_regular

Ints = npt.NDArray[np.int64]
# Bytes at both ends of a text file that its stamp digests.
_SAMPLED = 1 << 16
# A file of at most so many bytes is read with one call: Arrow reads as many of any file for its footer.
READ_AT_ONCE = 65_536


def open_file(path: str, source: Source) -> DataFile:
    """A file of `source`, in the format that its name tells.

    Raises:
        ContractError: it cannot be opened.
    """
    return TextData(path, source) if is_text(path) else ParquetData(path, source)


class ParquetData:
    """A Parquet file.  Times of the old type INT96 are instants in UTC, as Spark writes them."""

    def __init__(self, path: str, source: Source) -> None:
        self.path = path
        # The stamp of what will be read; None: it must be taken when the rows have been read.
        self.file, self.stamp = open_stamped(path, source)

    @functools.cached_property
    def _old_times(self) -> set[str]:
        schema = self.file.schema
        columns = (schema.column(i) for i in range(len(schema.names)))
        return {each.path for each in columns if each.physical_type == "INT96"}

    @functools.cached_property
    def schema(self) -> pa.Schema:
        schema = self.file.schema_arrow
        for i, field in enumerate(schema) if self._old_times else ():
            if field.name in self._old_times:
                schema = schema.set(i, field.with_type(pa.timestamp("us", "UTC")))
        return schema

    def read(self, slices: Sequence[Slice], columns: Sequence[str], threads: bool = True) -> pa.Table:
        """Columns of some row groups; those that the file lacks are left out."""
        return self.zoned(
            self.file.read_row_groups([each.group for each in slices], list(columns), use_threads=threads)
        )

    def parts(self, piece: Slice, rows: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """A row group in parts of at most so many rows."""
        for batch in self.file.iter_batches(rows, [piece.group], list(columns)):
            yield self.zoned(pa.Table.from_batches([batch]))

    def rows(self, piece: Slice) -> int:
        return int(self.file.metadata.row_group(piece.group).num_rows)

    def numbers(self, piece: Slice) -> Ints:
        """The number of each row of a row group in the file."""
        return np.arange(piece.first, piece.first + piece.rows)

    def groups(self) -> Iterator[pa.Table]:
        """All columns, row group by row group."""
        for number in range(self.file.num_row_groups):
            yield self.zoned(self.file.read_row_group(number))

    def zoned(self, table: pa.Table) -> pa.Table:
        """Columns as the file has them, with the zone of times of the old type."""
        for name in self._old_times & {*table.schema.names}:
            column = table.column(name).cast(pa.timestamp("us")).cast(pa.timestamp("us", "UTC"))
            table = table.set_column(table.schema.get_field_index(name), name, column)
        return table


class TextData:
    """CSV or JSON lines."""

    stamp: str | None = None

    def __init__(self, path: str, source: Source) -> None:
        self.path, self.source = path, source
        if "://" not in path:
            try:
                require_regular(path)
            except OSError as error:
                raise _unreadable(source, path, error) from None
        self.file = TextFile(path, source)

    @functools.cached_property
    def schema(self) -> pa.Schema:
        """Of a CSV file its names; JSON lines may have any declared column."""
        names = self.file.names() if self.file.is_csv else [*self.source.schema]
        return pa.schema([(name, pa.string()) for name in names], metadata=TEXT)

    def read(self, slices: Sequence[Slice], columns: Sequence[str], threads: bool = True) -> pa.Table:
        """Columns of some pieces; those that the file lacks are left out, and `PROBLEM` is there if it is needed."""
        del threads
        tables = [self._table(each, columns) for each in slices]
        return tables[0] if len(tables) == 1 else pa.concat_tables(_of_one_type(tables), promote=True)

    def _table(self, piece: Slice, columns: Sequence[str]) -> pa.Table:
        try:
            data = self.file.read(piece.offset, piece.size)
        except BROKEN as error:
            raise not_whole(self.source, self.path, error) from None
        reading = Contract(self.source, ()).reading
        return self.file.table(data, columns, reading)

    def groups(self) -> Iterator[pa.Table]:
        """The declared columns, piece by piece."""
        for _, data in self.file.pieces():
            names = [name for name in self.source.schema if name in self.file.names(data)]
            yield self.file.table(data, names or [*self.source.schema], Contract(self.source, ()).reading)

    def parts(self, piece: Slice, rows: int, columns: Sequence[str]) -> Iterator[pa.Table]:
        """A piece in parts of at most so many rows."""
        table = self._table(piece, columns)
        for start in range(0, table.num_rows, rows):
            yield table.slice(start, rows)

    def rows(self, piece: Slice) -> int:
        return piece.rows

    def numbers(self, piece: Slice) -> Ints:
        """The number of the line at which each row of a piece begins."""
        try:
            return piece.first + self.file.lines(self.file.read(piece.offset, piece.size))
        except BROKEN as error:
            raise not_whole(self.source, self.path, error) from None


DataFile = ParquetData | TextData


def _of_one_type(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Tables whose times are numbers in one and text in another, all as text."""
    kinds: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for field in table.schema:
            kinds.setdefault(field.name, set()).add(field.type)
    several = [name for name, found in kinds.items() if len(found) > 1]
    result = []
    for table in tables:
        for name in several:
            place = table.schema.get_field_index(name)
            if place >= 0 and not pa.types.is_string(table.schema.field(place).type):
                table = table.set_column(place, name, table.column(place).cast(pa.string()))
        result.append(table)
    return result


def _unreadable(source: Source, path: str, error: BaseException) -> ContractError:
    if isinstance(error, PermissionError):
        return ContractError(
            f"Source {source.name!r}: it must be possible to read every file", str(error), "Grant access"
        )
    return not_whole(source, path, error)


def open_parquet(path: str, source: Source) -> pq.ParquetFile:
    """A Parquet file of `source`, local or on any Beam filesystem."""
    return open_stamped(path, source)[0]


def open_stamped(path: str, source: Source) -> tuple[pq.ParquetFile, str | None]:
    """As `open_parquet`, and the stamp of the content if the file is so small that it was read at once.

    The stamp of a larger file must be taken when its rows have been read.
    """
    stamp: str | None = None

    def opened() -> str | BufferedIOBase | pa.BufferReader:
        nonlocal stamp
        if "://" in path:
            return FileSystems.open(path, compression_type="uncompressed")
        with open_regular(path) as handle:
            status = os.fstat(handle.fileno())
            if status.st_size > READ_AT_ONCE:
                return path
            content = handle.read()
        stamp = _stamp(status, BytesIO(content), path)
        return pa.BufferReader(content)

    try:
        # Nanoseconds, which times of INT96 else become, end in the year 2262.
        try:
            return pq.ParquetFile(opened(), coerce_int96_timestamp_unit="us"), stamp
        except pa.ArrowInvalid:
            with contextlib.suppress(OSError, pa.ArrowException):  # the first error is the one to report
                metadata = _metadata(opened())
                return pq.ParquetFile(opened(), metadata=metadata, coerce_int96_timestamp_unit="us"), stamp
            raise
    except (*READ_ERRORS, RuntimeError) as error:  # RuntimeError: of pyarrow_hotfix
        raise _unreadable(source, path, error) from None


def _metadata(file: str | BufferedIOBase | pa.BufferReader) -> pq.FileMetaData:
    """A file's metadata without the Arrow types that its writer noted beside Parquet's own: newer writers (delta-rs for
    Polars) have types there that the Arrow of this environment does not know, such as views of strings."""
    with open(file, "rb") if isinstance(file, str) else file as handle:
        handle.seek(-8, os.SEEK_END)
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(-8 - length, os.SEEK_END)
        footer = handle.read(length).replace(b"ARROW:schema", b"ARROW:unused")
    return pq.read_metadata(pa.BufferReader(b"PAR1" + footer + length.to_bytes(4, "little") + b"PAR1"))


def stamp_of(path: str) -> str:
    """Changes whenever the file's content does: its size, its time of change and a digest of its footer, or of both
    ends of a text."""
    if "://" in path:
        (match,) = FileSystems.match([path])
        (meta,) = match.metadata_list
        return f"{meta.size_in_bytes}-{meta.last_updated_in_seconds}"
    status = os.stat(path)
    with open(path, "rb") as handle:
        return _stamp(status, handle, path)


def _stamp(status: os.stat_result, handle: BinaryIO, path: str) -> str:
    if is_text(path):
        content = handle.read(_SAMPLED)
        handle.seek(max(status.st_size - _SAMPLED, 0))
        content += handle.read(_SAMPLED)
    else:
        handle.seek(max(status.st_size - 8, 0))
        length = int.from_bytes(handle.read(4), "little")
        handle.seek(max(status.st_size - 8 - length, 0))
        content = handle.read(length)
    return f"{status.st_size}-{status.st_mtime_ns}-{hashlib.blake2b(content, digest_size=8).hexdigest()}"
