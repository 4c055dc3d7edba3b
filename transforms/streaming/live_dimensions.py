"""Dimensions of a live job: they are read again when their files change, and each content is stored as a version.

If a dimension cannot be read, because it is half written or lacks a column, the previous version stays in use, even in
a worker that starts meanwhile.  An error is logged at every check until the dimension is repaired.  If it can be read,
rows that break its contract become dead letters, once per version.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl
import pyarrow as pa
from apache_beam.metrics import Metrics

from schemas.errors import MillraceError, StoreError
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.features.block_inputs import contradictions, dimension_rows
from transforms.sources.contracts import Contract
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS, as_message_dead_letters, concat_dead_letters
from transforms.sources.inventory import survey_files
from transforms.sources.listing import require_unchanged
from transforms.sources.reader import read_slices
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import explain_damage, parse_object, read_regular
from transforms.storage.vacuum import TEMPORARY_FILE

log = logging.getLogger("millrace.live")
# File, beside a dimension's versions, that names the version in use.
SERVING = "serving.json"


class Dimensions:
    """The current dimensions of a view.  Files are checked for changes at most once per `every` µs."""

    def __init__(self, view: FeatureView, root: str, kept: str, every: int) -> None:
        self.view, self.root, self.kept, self.every = view, root, kept, every
        self.checked = 0
        self.versions: dict[str, str] = {}
        self._stamps: dict[str, str] = {}
        self.frames: dict[str, pl.DataFrame] = {}
        self._dead_letters: list[pl.DataFrame] = []
        self.refused = Metrics.counter("millrace.live", "dimensions_refused")

    def refresh(self) -> None:
        """Reads the dimensions whose files have changed.

        Raises:
            MillraceError: a dimension cannot be read, and there is no previous version.
        """
        now = time.monotonic_ns() // 1000
        if self.checked and now - self.checked < self.every:
            return
        self.checked = now
        for name, source in self.view.dimensions.items():
            try:
                self._read(name, self._contract(name, source))
            except MillraceError as error:
                if name not in self.frames and not self._as_before(name):
                    raise
                self.refused.inc()
                log.error("dimension %s is broken; version %s serves on: %s", name, self.versions[name], error)

    def _contract(self, name: str, source: Source) -> Contract:
        return Contract(source, tuple(self.view.columns_read(name)), ordering=self.view.columns_ordering(name))

    def _read(self, name: str, contract: Contract) -> None:
        found = survey_files(self.root, contract)
        contract, slices = found.contract, found.slices
        stamp = repr([(each.path, each.stamp) for each in slices])
        if self._stamps.get(name) == stamp:
            return
        read = read_slices(contract, slices)
        frame = dimension_rows(contract, read.frame)
        dead_letters, _ = contradictions(self.view, contract, slices, frame)
        require_unchanged(frame, found.listings)
        version = keep(self.kept, name, frame)
        self._reject(
            name, version, [each.path for each in slices], concat_dead_letters([read.dead_letters, *dead_letters])
        )
        if name in self.versions and version != self.versions[name]:
            log.info("dimension %s: version %s serves instead of %s", name, version, self.versions[name])
        self.frames[name], self.versions[name], self._stamps[name] = frame, version, stamp

    def use(self, versions: Mapping[str, str]) -> None:
        """Makes certain stored versions the current ones."""
        for name, version in versions.items():
            if self.versions.get(name) != version:
                self.frames[name], self.versions[name] = kept_version(self.kept, name, version), version
                self._stamps.pop(name, None)

    def take_dead_letters(self) -> pl.DataFrame:
        """Dead letters of the versions that were read since the last call.

        Their `partition` is −1, their `offset` is a row of file number `place`.
        """
        collected, self._dead_letters = self._dead_letters, []
        return pl.concat([pl.DataFrame(schema=MESSAGE_DEAD_LETTERS), *collected])

    def _reject(self, name: str, version: str, files: list[str], dead_letters: pl.DataFrame) -> None:
        if not len(dead_letters):
            return
        arrived = pl.lit(time.time_ns() // 1000, pl.Int64).alias("arrived")
        collected = as_message_dead_letters(dead_letters, -1, files, f"version {version}", arrived)
        self._dead_letters.append(collected)
        log.warning(
            "dimension %s, version %s: rows rejected: %d; the first is row %d of %s: %s",
            name,
            version,
            len(collected),
            dead_letters["row"][0],
            dead_letters["file"][0],
            dead_letters["rule"][0],
        )

    def _as_before(self, name: str) -> bool:
        """Loads the version that this job or an earlier one used last.

        Returns:
            Whether there is such a version and it has the columns that the view reads.
        """
        path = FileSystems.join(self.kept, name, SERVING)
        if not FileSystems.exists(path):
            return False
        with explain_damage("A live job's note of a dimension can be read", path, "Restore it, or remove it"):
            version = str(parse_object(read_regular(path))["version"])
        frame = kept_version(self.kept, name, version)
        schema = self.view.dimensions[name].schema
        if dict(frame.schema) != {column: schema[column] for column in self.view.columns_read(name)}:
            return False
        self.frames[name], self.versions[name] = frame, version
        return True


def keep(folder: str, name: str, frame: pl.DataFrame) -> str:
    """Stores a dimension's content as a version, named by its digest, and records that it is in use."""
    content = _content(frame)
    for number in itertools.count():
        # A version from which rows were erased keeps its name, so the same rows get another one if they come again.
        salt = b"" if number == 0 else number.to_bytes(8, "little")
        version = hashlib.blake2b(content, digest_size=8, salt=salt).hexdigest()
        path = FileSystems.join(folder, name, f"{version}.arrow")
        if not FileSystems.exists(path):
            write_file_atomically(FileSystems.join(folder, name), f"{version}.arrow", pa.py_buffer(content))
            break
        if read_regular(path) == content:
            break
    in_use = pa.py_buffer(json.dumps({"version": version}).encode())
    write_file_atomically(FileSystems.join(folder, name), SERVING, in_use)
    return version


def _content(frame: pl.DataFrame) -> bytes:
    sink = io.BytesIO()
    frame.write_ipc(sink, compression="lz4")
    return sink.getvalue()


def kept_version(folder: str, name: str, version: str) -> pl.DataFrame:
    """The content of a version of a dimension."""
    path = FileSystems.join(folder, name, f"{version}.arrow")
    try:
        return pl.read_ipc(io.BytesIO(read_regular(path)))
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StoreError("A kept version of a dimension can be read", f"{path}: {error}", "Restore the file") from None


def rewrite_versions(folder: str, matches: Callable[[pl.DataFrame], pl.Series], dry_run: bool = False) -> int:
    """Removes rows from all versions of a dimension, which keep their names: feature rows name them.

    Args:
        folder: of the versions.
        matches: whether each row is removed.
        dry_run: count, and change nothing.

    Returns:
        How many match.
    """
    count = 0
    for path in sorted(Path(folder).glob("*")):
        if TEMPORARY_FILE.fullmatch(path.name):
            if not dry_run:
                path.unlink()
        elif path.suffix == ".arrow":
            rows = pl.read_ipc(io.BytesIO(path.read_bytes()))
            hit = matches(rows)
            count += int(hit.sum())
            if hit.any() and not dry_run:
                write_file_atomically(folder, path.name, pa.py_buffer(_content(rows.filter(~hit))))
    return count
