"""Feature tables of a view: the one with the definition's fingerprint is read; an error names those with other
fingerprints."""

from __future__ import annotations

from deltalake import DeltaTable

from schemas.errors import MillraceError, MismatchError, StoreError
from transforms.storage.delta_tables import open_table
from transforms.storage.file_systems import FileSystems


def open_feature_table(
    uri: str,
    command: str,
    version: int | None = None,
    missing: type[MillraceError] = StoreError,
    mismatch: type[MillraceError] = MismatchError,
) -> DeltaTable:
    """The feature table at `uri`, whose last two folders are the view's name and its fingerprint.

    Args:
        uri: the table (see `paths.features_uri` and `paths.features_live_uri`).
        command: the command that computes the features, for the message.
        version: the table's version; None: the newest.
        missing: the error if the view has no feature table.
        mismatch: the error if the view has feature tables of other fingerprints only.

    Raises:
        MillraceError: there is no table at `uri`, or no such version of it.
    """
    table = open_table(uri, version)
    if table is not None:
        return table
    root, fingerprint = FileSystems.split(uri)
    if others := fingerprints_in(root):
        raise mismatch(
            f"Features are read under the definition's own fingerprint, {fingerprint}",
            f"{', '.join(others)} in {root}",
            f"Run: {command}",
        )
    view = FileSystems.split(root)[1]
    raise missing(f"View {view!r} has a feature table", f"none at {uri}", f"Run: {command}")


def fingerprints_in(root: str) -> list[str]:
    """The fingerprints of the tables in `root`, the folder of a view, sorted."""
    (match,) = FileSystems.match([FileSystems.join(root, "*", "_delta_log", "*.json")])
    return sorted({each.path.replace("\\", "/").split("/")[-3] for each in match.metadata_list})
