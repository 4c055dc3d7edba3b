"""What a feature table was computed from, as stored with its commits, and which part of it a run may build upon."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict

from schemas.errors import StoreError
from schemas.features import Derived
from schemas.views import FeatureView, lifetime_sources
from transforms.sources.day_digests import Digests
from transforms.storage.stored_json import DAMAGE, reason_of

# Manifests of version 1 have no version. They may name lifetime summaries that contain events twice or too early, days
# that were computed from such summaries, and digests of rows that no longer existed when they were last read.
VERSION = 2
# The digest of a day's inputs that no inputs have: the day is computed again whatever it was computed from.
OUTDATED = -1
WRITTEN_BEFORE = (
    f"written before manifests of version {VERSION}, "
    "when windows over all history could count events twice or too early: recomputed"
)


class SourceDescription(TypedDict):
    """What decides which rows of a source count: (name, type) of its columns among it.

    Args:
        ordering: columns that are read only to choose between rows.
        reading: `Source.reading`, if any.
    """

    name: str
    time: str | None
    event_time: str | None
    unique: list[str] | None
    order: list[str] | None
    not_before: str
    columns: list[list[str]]
    ordering: NotRequired[list[str]]
    reading: NotRequired[dict[str, object]]


class SpineDescription(SourceDescription):
    """The same of the spine, and its key."""

    key: list[str]


class ViewDescription(TypedDict, total=False):
    """A view in terms that another view can be compared with; empty where it must not be.

    Args:
        meanings: of each column.
        reaches: (source, µs that it is read back).
    """

    spine: SpineDescription
    meanings: dict[str, str]
    sources: dict[str, SourceDescription]
    reaches: list[tuple[str, int]]


@dataclasses.dataclass(frozen=True, eq=False)
class Manifest:
    """What a feature table was computed from; kept with its commits.

    Args:
        files: per source, path to (stamp, first day, last day).
        covered: per source, the spans of days that have been digested.
        digests: per source, its rows by day, as last read.
        dropped: per source with `unique`, its repeats by day.
        dates: per computed day of the spine, the digest of all its inputs.
        dimensions: digest per dimension as last used; `looked_up` has it per computed day.
        snapshots: per µs until which it reaches, the files of a summary of all history and the digest of that history.
        about: the view in terms that another view can be compared with (`column_reuse.describe`).
        version: of the rules by which it was made (`VERSION`).
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
    version: int = VERSION

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """
        Raises:
            StoreError: not a manifest.
        """
        try:
            raw = json.loads(text)
            by_day = {
                name: {
                    source: {int(day): tuple(value) for day, value in days.items()}
                    for source, days in raw[name].items()
                }
                for name in ("digests", "dropped")
            }
            files = {
                source: {path: tuple(value) for path, value in paths.items()} for source, paths in raw["files"].items()
            }
            covered = {source: [(low, high) for low, high in spans] for source, spans in raw["covered"].items()}
            return cls(
                files,
                covered,
                by_day["digests"],
                by_day["dropped"],
                _ints(raw["dates"]),
                raw["dimensions"],
                _ints(raw["looked_up"]),
                {int(until): (tuple(files), digest) for until, (files, digest) in raw["snapshots"].items()},
                raw.get("about", {}),
                int(raw.get("version", 1)),
            )
        except DAMAGE as error:
            raise StoreError(
                "A feature table's manifest can be read", reason_of(error), "Recompute with --full"
            ) from None


def _ints(values: Mapping[str, int]) -> dict[int, int]:
    return {int(day): value for day, value in values.items()}


EMPTY = Manifest({}, {}, {}, {}, {}, {}, {})


def continued(view: FeatureView, manifest: Manifest) -> Manifest:
    """Returns the part of a manifest, of any version, that a run may build upon.

    Of an older version and a view with lifetime windows, these are the names of the days, so that they are computed
    again. Of a manifest whose sources chose rows by another order (`reordered`), nothing.
    """
    if reordered(view, manifest):
        return EMPTY
    if manifest.version >= VERSION or not lifetime_sources(view):
        return manifest
    return dataclasses.replace(manifest, dates=dict.fromkeys(manifest.dates, OUTDATED), snapshots={})


def reordered(view: FeatureView, manifest: Manifest) -> list[str]:
    """Sources whose columns were declared in another order when the table was written.

    Of rows that tie, such a source may then have chosen others.
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
    """Days of a `continued` manifest whose rows are as an older version wrote them."""
    return sorted(day for day, digest in manifest.dates.items() if digest == OUTDATED)


def read_anew(manifest: Manifest) -> Manifest:
    """`manifest` as if no file had been digested."""
    return dataclasses.replace(manifest, files={}, covered={}, digests={})
