"""Rows on local disk, partitioned by the hash of a key, so that one partition can be read at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl

from schemas.errors import DataError
from transforms.records.arrays import Ints
from transforms.records.record_batches import frame, from_ipc, to_ipc
from transforms.records.row_hashing import combine_hashes, hash_column


def partition_of(rows: pl.DataFrame, keys: Sequence[str], parts: int) -> Ints:
    """The partition of each row, 0 … parts − 1, by the hash of its `keys`.

    Equal keys get the same partition, even if their integer types differ.
    """
    if parts == 1:
        return np.zeros(len(rows), np.int64)
    return (combine_hashes([hash_column(rows[key]) for key in keys]) % np.uint64(parts)).astype(np.int64)


def positions_by_partition(part: Ints, parts: int) -> list[Ints]:
    """The positions of the rows of each partition, in ascending order."""
    order = np.argsort(part, kind="stable")
    return np.split(order, np.searchsorted(part[order], np.arange(1, parts)))


class DiskPartitions:
    """Rows in `parts` partitions by the hash of `keys`. A single partition stays in memory.

    Args:
        folder: a folder on local disk. The file is deleted with the folder.

    Raises:
        DataError: the disk is full or cannot be written.
    """

    def __init__(self, folder: str, keys: Sequence[str], parts: int) -> None:
        self.keys, self.parts = tuple(keys), parts
        self.rows = np.zeros(parts, np.int64)
        self._held: list[pl.DataFrame] = []
        self._positions: list[list[tuple[int, int]]] = [[] for _ in range(parts)]
        self._path, self._end = "", 0
        if parts > 1:
            handle, self._path = tempfile.mkstemp(".arrows", dir=folder)
            os.close(handle)

    def add(self, rows: pl.DataFrame) -> None:
        if not len(rows):
            return
        if self.parts == 1:
            self._held.append(rows)
            self.rows[0] += len(rows)
            return
        try:
            with open(self._path, "ab") as file:
                for part, positions in enumerate(
                    positions_by_partition(partition_of(rows, self.keys, self.parts), self.parts)
                ):
                    if len(positions):
                        self._write(file, part, rows[positions])
        except OSError as error:
            raise DataError(
                "Rows of a block that is too large for memory are written to local disk",
                f"{self._path}: {error.strerror or error}",
                "Free space there, point TMPDIR at a larger disk, or choose a larger --block_rows if there is memory",
            ) from None

    def _write(self, file: object, part: int, rows: pl.DataFrame) -> None:
        (batch,) = rows.rechunk().to_arrow().combine_chunks().to_batches()
        data = to_ipc(batch, "lz4")
        file.write(data)  # type: ignore[attr-defined]
        self._positions[part].append((self._end, len(data)))
        self._end += len(data)
        self.rows[part] += len(rows)

    def read(self, part: int, chunk: int) -> Iterator[pl.DataFrame]:
        """Yields the rows of one partition in frames of about `chunk` rows."""
        waiting: list[pl.DataFrame] = []
        for rows in self._held if self.parts == 1 else self._read(part):
            waiting.append(rows)
            if sum(map(len, waiting)) >= chunk:
                yield pl.concat(waiting)
                waiting = []
        if waiting:
            yield pl.concat(waiting)

    def _read(self, part: int) -> Iterator[pl.DataFrame]:
        with open(self._path, "rb") as file:
            for start, length in self._positions[part]:
                file.seek(start)
                yield frame(from_ipc(file.read(length)))
