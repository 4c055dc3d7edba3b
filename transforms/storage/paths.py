"""Where tables lie in a store."""

from __future__ import annotations

import os

from schemas.sources import Source
from transforms.storage.delta_log import logged_versions, root_of
from transforms.storage.file_systems import FileSystems

BOOSTER, ENCODERS, MANIFEST = "booster.ubj", "encoders.json", "manifest.json"

# Maps a folder to how many levels below it its tables are.
TABLE_DEPTHS = {
    "features": 2,
    "features_live": 2,
    "predictions": 1,
    "predictions_live": 1,
    "dead_letters": 1,
    "sources": 1,
}


def tables_below(store: str) -> list[str]:
    """Folders of tables, as paths within the store; of the sources, only those that are Delta tables.  Some may have no
    commit yet."""
    return [
        f"{position}/{'/'.join(parts)}"
        for position, depth in TABLE_DEPTHS.items()
        for parts in folders(FileSystems.join(store, position), depth)
        if position != "sources" or logged_versions(FileSystems.join(store, position, *parts))
    ]


def folders(folder: str, depth: int) -> list[tuple[str, ...]]:
    """Paths of the folders that are so many levels below `folder`, without hidden ones."""
    if "://" in folder:
        found = (each.path[len(folder) + 1 :] for each in FileSystems.match([f"{folder}/**"])[0].metadata_list)
        return sorted({tuple(path.split("/")[:depth]) for path in found if path.count("/") >= depth})
    if not os.path.isdir(folder):
        return []
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if depth == 1:
        return [(name,) for name in names]
    return [(name, *rest) for name in names for rest in folders(os.path.join(folder, name), depth - 1)]


def table_path_in_store(uri: str) -> str:
    """A feature table's path within its store: stores may be moved."""
    return "/".join(root_of(uri).split("/")[-3:])


def present_path(store: str, recorded: str, position: str) -> str:
    """Where something is now that a store recorded by its whole path: stores are moved and copied.

    A path in another store is looked up in `store`, so that a copy never reads the original.  A folder that belongs to
    no store is read where it is.
    """
    root, below, inside = recorded.rpartition(f"/{position}/")
    if not below or "://" in recorded or os.path.abspath(root) == os.path.abspath(store):
        return recorded
    moved = os.path.join(store, position, inside)
    if os.path.exists(moved):
        return moved
    of_a_store = os.path.isdir(os.path.join(store, position, inside.split("/")[0])) and any(
        os.path.isdir(os.path.join(root, each)) for each in ("features", "features_live")
    )
    return moved if of_a_store else recorded


def features_uri(store: str, view: str, fingerprint: str) -> str:
    return FileSystems.join(store, "features", view, fingerprint)


def predictions_uri(store: str, model: str) -> str:
    return FileSystems.join(store, "predictions", model)


def dead_letters_uri(store: str, pipeline: str) -> str:
    return FileSystems.join(store, "dead_letters", pipeline)


def features_live_uri(store: str, view: str, fingerprint: str) -> str:
    return FileSystems.join(store, "features_live", view, fingerprint)


def live_dead_letters_uri(store: str, view: str) -> str:
    return FileSystems.join(store, "dead_letters", f"live_{view}")


def sources_root(store: str) -> str:
    return FileSystems.join(store, "sources")


def source_uri(root: str, source: str) -> str:
    return FileSystems.join(root, source)


def place_of(root: str, source: Source) -> str:
    """Where a source's rows are for batch: `path=` of the definition, or the folder of its name."""
    if source.path is None:
        return source_uri(root, source.name)
    path = source.path.rstrip("/")
    return path if "://" in path or os.path.isabs(path) else FileSystems.join(root, path)
