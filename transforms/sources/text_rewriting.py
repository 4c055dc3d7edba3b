"""Rows removed from text files: all other bytes stay as they are."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Callable
from io import BufferedIOBase

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from schemas.sources import Source
from transforms.sources.contracts import Contract
from transforms.sources.formats import GZIP
from transforms.sources.text_files import TextFile
from transforms.storage.rewriting import written_aside


def rewrite_text(path: str, source: Source, matches: Callable[[pa.Table], npt.NDArray[np.bool_]]) -> int:
    """Writes a CSV file or JSON lines again without the rows that match, aside and renamed.

    Args:
        path: the file.
        source: its source.
        matches: the declared columns of some rows → whether each of them is removed.

    Returns:
        How many were removed.

    Raises:
        StoreError: the folder cannot be written.
    """
    file, removed = TextFile(path, source), 0
    reading = Contract(source, ()).reading
    with contextlib.ExitStack() as stack:
        target: BufferedIOBase = stack.enter_context(open(stack.enter_context(written_aside(path)), "wb"))
        if path.casefold().endswith(GZIP):
            target = stack.enter_context(gzip.GzipFile(fileobj=target, mode="wb", filename="", mtime=0))
        target.write(file.head())
        for _, data in file.pieces():
            names = [name for name in source.schema if name in file.names(data)]
            gone = matches(file.table(data, names or [*source.schema], reading))
            removed += int(gone.sum())
            for start, end in _kept(file, data, gone):
                target.write(data[start:end])
    return removed


def _kept(file: TextFile, data: bytes, gone: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Spans of the bytes of a piece that stay: a row that is removed takes its line end along."""
    starts, _ = file.bounds(data)
    ends = np.append(starts[1:], len(data))
    spans, at = [], 0
    for start, end in zip(starts[gone].tolist(), ends[gone].tolist(), strict=True):
        spans.append((at, start))
        at = end
    return [*spans, (at, len(data))]
