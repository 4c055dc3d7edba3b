"""Stores manifests beside a feature table: written before the commit that names them, and read by the next run."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

import pyarrow as pa
from deltalake import DeltaTable

from schemas.errors import StoreError
from schemas.views import FeatureView
from transforms.features.column_reuse import OlderTable, description_after
from transforms.features.lifetime_snapshots import SnapshotFiles, left_for_later
from transforms.features.manifest import EMPTY, Manifest, continued, outdated
from transforms.features.source_digests import Current
from transforms.features.staleness import advance
from transforms.sources.tallies import SourceTally, digests_read
from transforms.storage.delta_log import commit_at, metadata_of
from transforms.storage.delta_tables import data_files, open_table, table_root, write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.paths import folders
from transforms.storage.stored_json import explain_damage, read_regular

log = logging.getLogger("millrace.features")

MANIFESTS_FOLDER = "_manifests"  # Delta ignores folders whose names start with an underscore


def read_manifest(table: DeltaTable | None) -> Manifest:
    """The manifest of the table's newest commit that has one; an empty one for a new table.

    Raises:
        StoreError: the manifest is missing or unreadable.
    """
    name = None if table is None else metadata_of(table, "manifest")
    if table is None or name is None:
        return EMPTY
    path = FileSystems.join(table_root(table), MANIFESTS_FOLDER, name)
    with explain_damage("A feature table's manifest can be read", path, "Restore it, or recompute with --full"):
        return Manifest.from_json(read_regular(path).decode())


def warn_of_outdated(view: FeatureView, table: DeltaTable) -> None:
    """Warns a reader of the table that an older version may have computed some of its days incorrectly."""
    try:
        days = outdated(continued(view, read_manifest(table)))
    except StoreError:  # the commands that need the manifest report the error
        return
    if days:
        log.warning(
            "%d days of %s were written when windows over all history could count events twice or too early: "
            "run millrace features, which computes them again, before you use them",
            len(days),
            table_root(table),
        )


def older_tables(store: str, view: FeatureView) -> list[OlderTable]:
    """Tables of the view's other fingerprints, newest first. A table that cannot be read is skipped with a warning."""
    found = []
    root = FileSystems.join(store, "features", view.name)
    for (fingerprint,) in folders(root, 1):
        uri = FileSystems.join(root, fingerprint)
        try:
            table = open_table(uri) if fingerprint != view.fingerprint else None
            if table is not None:
                at = commit_at(uri, table.version()).get("timestamp", 0)
                found.append(
                    (at, OlderTable(uri, int(table.version()), read_manifest(table), tuple(data_files(table))))
                )
        except StoreError as error:
            log.warning("nothing is copied from it: %s", error)
    return [older for _, older in sorted(found, key=lambda each: each[0], reverse=True)]


@dataclasses.dataclass(frozen=True)
class WriteManifest:
    """The metadata of a commit of `ranges` (µs): derives the manifest from the version it builds on, and writes it."""

    view: FeatureView
    uri: str
    run_id: str
    ranges: tuple[tuple[int, int], ...]
    current: Current
    everything: bool

    def __call__(
        self, table: DeltaTable | None, tallies: Mapping[str, SourceTally], snapshots: SnapshotFiles | None = None
    ) -> dict[str, str]:
        """Writes the manifest and returns its name as metadata.

        Args:
            snapshots: the files of the lifetime summaries that the run wrote.
        """
        before = EMPTY if self.everything else continued(self.view, read_manifest(table))
        left = left_for_later(snapshots or {})
        after = advance(self.view, before, self.current, digests_read(tallies), self.ranges, left)
        after = dataclasses.replace(after, about=description_after(self.view, before))
        name = f"{self.run_id}-{0 if table is None else table.version() + 1}.json"
        write_file_atomically(
            FileSystems.join(self.uri, MANIFESTS_FOLDER), name, pa.py_buffer(after.to_json().encode())
        )
        return {"manifest": name}
