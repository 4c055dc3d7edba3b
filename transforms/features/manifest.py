"""Manifests: what a feature table was computed from, stored with its commits; and which part of it a run may use."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict, cast

from schemas.errors import StoreError
from schemas.features import Derived
from schemas.views import FeatureView, lifetime_sources
from transforms.sources.day_digests import Digests
from transforms.storage.stored_json import DAMAGE, parse_object, reason_of

# Manifests of version 1 have no version. They may name lifetime summaries that contain events twice or too early, days
# that were computed from such summaries, and digests of rows that no longer existed when they were last read.
MANIFEST_VERSION = 2
# A digest that no inputs have: a day with this digest is always computed again.
OUTDATED = -1
WRITTEN_BEFORE = (
    f"written before manifests of version {MANIFEST_VERSION}, "
    "when windows over all history could count events twice or too early: recomputed"
)


class SourceDescription(TypedDict):
    """Everything that decides which rows of a source count, such as (name, type) of its columns.

    Args:
        ordering: columns that are read only to choose between rows.
    """

    name: str
    time: str | None
    event_time: str | None
    unique: list[str] | None
    order: list[str] | None
    not_before: str
    columns: list[list[str]]
    ordering: NotRequired[list[str]]


class SpineDescription(SourceDescription):
    """As `SourceDescription`, for the spine, with its key."""

    key: list[str]


class ViewDescription(TypedDict, total=False):
    """A view in terms that can be compared with another view; empty if it must not be compared.

    Args:
        meanings: the meaning of each column.
        reaches: (source, how far back it is read in µs).
    """

    spine: SpineDescription
    meanings: dict[str, str]
    sources: dict[str, SourceDescription]
    reaches: list[tuple[str, int]]


class StoredManifest(TypedDict):
    """A manifest as JSON: days and ends of summaries are text, being keys of objects; see `Manifest`.

    Args:
        about, version: not in manifests of version 1.
    """

    files: dict[str, dict[str, tuple[str, int, int]]]
    covered: dict[str, list[tuple[int, int]]]
    digests: dict[str, dict[str, tuple[int, int]]]
    dropped: dict[str, dict[str, tuple[int, int]]]
    dates: dict[str, int]
    dimensions: dict[str, int]
    looked_up: dict[str, int]
    snapshots: dict[str, tuple[list[str], int]]
    about: NotRequired[ViewDescription]
    version: NotRequired[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """What a feature table was computed from; stored with its commits.

    Args:
        files: per source, path to (stamp, first day, last day).
        covered: per source, the spans of days that have been digested.
        digests: per source, the digests of its rows by day, as last read.
        dropped: per source with `unique`, the digests of its repeats by day.
        dates: the digest of all inputs of each computed day of the spine.
        dimensions: the digest of each dimension as last used; `looked_up` has it for each computed day.
        snapshots: end of a summary of all history (µs) → its files and the digest of that history.
        about: the view in terms that can be compared with another view (`column_reuse.describe_view`).
        version: the version of the rules by which it was made (`MANIFEST_VERSION`).
    """

    files: Mapping[str, Mapping[str, tuple[str, int, int]]]
    covered: Mapping[str, Sequence[tuple[int, int]]]
    digests: Mapping[str, Digests]
    dropped: Mapping[str, Digests]
    dates: Mapping[int, int]
    dimensions: Mapping[str, int]
    looked_up: Mapping[int, int]
    snapshots: Mapping[int, tuple[Sequence[str], int]] = dataclasses.field(default_factory=dict)
    about: ViewDescription = dataclasses.field(default_factory=lambda: ViewDescription())
    version: int = MANIFEST_VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """
        Raises:
            StoreError: not a manifest.
        """
        try:
            stored = cast(StoredManifest, parse_object(text))
            return cls(
                files={
                    source: {path: (stamp, first, last) for path, (stamp, first, last) in paths.items()}
                    for source, paths in stored["files"].items()
                },
                covered={source: [(low, high) for low, high in spans] for source, spans in stored["covered"].items()},
                digests={source: _by_day(days) for source, days in stored["digests"].items()},
                dropped={source: _by_day(days) for source, days in stored["dropped"].items()},
                dates=_ints(stored["dates"]),
                dimensions=stored["dimensions"],
                looked_up=_ints(stored["looked_up"]),
                snapshots={int(end): (tuple(names), digest) for end, (names, digest) in stored["snapshots"].items()},
                about=stored.get("about", ViewDescription()),
                version=int(stored.get("version", 1)),
            )
        except DAMAGE as error:
            raise StoreError(
                "A feature table's manifest can be read", reason_of(error), "Recompute with --full"
            ) from None


def _by_day(days: Mapping[str, tuple[int, int]]) -> Digests:
    return {int(day): (rows, total) for day, (rows, total) in days.items()}


def _ints(values: Mapping[str, int]) -> dict[int, int]:
    return {int(day): value for day, value in values.items()}


EMPTY = Manifest({}, {}, {}, {}, {}, {}, {})


def continued(view: FeatureView, manifest: Manifest) -> Manifest:
    """Returns the part of a manifest, of any version, that a run may use.

    If the manifest has an older version and the view has lifetime windows, only the days are kept, so that they are
    computed again. If the sources chose rows by another order (`reordered`), nothing is kept.
    """
    if reordered(view, manifest):
        return EMPTY
    if manifest.version >= MANIFEST_VERSION or not lifetime_sources(view):
        return manifest
    return dataclasses.replace(manifest, dates=dict.fromkeys(manifest.dates, OUTDATED), snapshots={})


def reordered(view: FeatureView, manifest: Manifest) -> list[str]:
    """Sources whose columns were declared in another order when the table was written.

    Such a source may have chosen other rows among ties.
    """
    if not manifest.about:
        return []
    then = {view.spine.name: manifest.about["spine"], **manifest.about["sources"]}
    now = {view.spine.name: list(view.spine.schema)}
    for name, source in view.sources.items():
        if any(
            feature.chooses()
            for feature in view.features
            if not isinstance(feature, Derived) and feature.source is source
        ):
            now.setdefault(name, view.columns_held(name))
    return [
        name
        for name, columns in now.items()
        if name in then and not _in_step([each for each, _ in then[name]["columns"]], columns)
    ]


def _in_step(before: Sequence[str], now: Sequence[str]) -> bool:
    return [name for name in before if name in set(now)] == [name for name in now if name in set(before)]


def outdated(manifest: Manifest) -> list[int]:
    """Days of a `continued` manifest whose rows were written by an older version."""
    return sorted(day for day, digest in manifest.dates.items() if digest == OUTDATED)


def read_anew(manifest: Manifest) -> Manifest:
    """`manifest` as if no file had been digested."""
    return dataclasses.replace(manifest, files={}, covered={}, digests={})
