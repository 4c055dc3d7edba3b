"""Dimensions of a live job: read again when their files have changed, each content kept under its version."""

from __future__ import annotations

import hashlib
import io
import time

import polars as pl
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from schemas.views import FeatureView
from transforms.contracts import Contract
from transforms.inventory import survey
from transforms.sources import read_slices
from transforms.tables import write_aside


class Dimensions:
    """The view's dimensions as of now; looks for changes at most once per `every` µs."""

    def __init__(self, view: FeatureView, root: str, kept: str, every: int) -> None:
        self.view, self.root, self.kept, self.every = view, root, kept, every
        self.looked = 0
        self.versions: dict[str, str] = {}
        self._stamps: dict[str, str] = {}
        self.frames: dict[str, pl.DataFrame] = {}

    def refresh(self) -> None:
        """Read again what has changed."""
        now = time.monotonic_ns() // 1000
        if self.looked and now - self.looked < self.every:
            return
        self.looked = now
        for name, source in self.view.dimensions.items():
            contract = Contract(source, tuple(self.view.columns_read(name)))
            contract, slices = survey(self.root, contract)
            stamp = repr([(each.path, each.stamp) for each in slices])
            if self._stamps.get(name) == stamp:
                continue
            frame = read_slices(contract, slices).frame.unique()
            self.frames[name] = frame.sort(frame.columns)
            self.versions[name] = keep(self.kept, name, self.frames[name])
            self._stamps[name] = stamp


def keep(folder: str, name: str, frame: pl.DataFrame) -> str:
    """Store a dimension's content under its digest, which is its version."""
    sink = io.BytesIO()
    frame.write_ipc(sink, compression="lz4")
    version = hashlib.blake2b(sink.getvalue(), digest_size=8).hexdigest()
    path = FileSystems.join(folder, name, f"{version}.arrow")
    if not FileSystems.exists(path):
        write_aside(FileSystems.join(folder, name), f"{version}.arrow", pa.py_buffer(sink.getvalue()))
    return version


def kept(folder: str, name: str, version: str) -> pl.DataFrame:
    """A dimension's content of that version."""
    with FileSystems.open(
        FileSystems.join(folder, name, f"{version}.arrow"), compression_type="uncompressed"
    ) as handle:
        return pl.read_ipc(io.BytesIO(handle.read()))
