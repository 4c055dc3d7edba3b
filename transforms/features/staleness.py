"""Finds the dates of a feature table that are missing or stale, from digests of the sources, never from timestamps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from schemas.errors import StoreError
from schemas.features import Derived
from schemas.views import FeatureView, lifetime_sources
from transforms.records.row_hashing import combine, hash_column, hash_text
from transforms.records.times import as_date, day_number, days_in, days_within, midnight
from transforms.sources.contracts import Contract
from transforms.sources.day_digests import Digests, add
from transforms.sources.inventory import Inventory, Slice
from transforms.sources.reader import Repeats, read_slices, repeats_of, stream_slices

_MASK = 2**64 - 1
# Days back of a window over all history.
WHOLE_HISTORY_DAYS = 1_000_000
MOST_SNAPSHOTS = 100
# Manifests of version 1 have no version. They may name lifetime summaries that contain events twice or too early, days
# that were computed from such summaries, and digests of rows that no longer existed when they were last read.
VERSION = 2
# The digest of a day's inputs that no inputs have: the day is computed again whatever it was computed from.
OUTDATED = -1
WRITTEN_BEFORE = (
    f"written before manifests of version {VERSION}, "
    "when windows over all history could count events twice or too early: recomputed"
)


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
        about: the view in terms that another view can be compared with (`evolution.about`).
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
    about: Mapping[str, Any] = dataclasses.field(default_factory=dict)
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
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(
                "A feature table's manifest can be read", f"{type(error).__name__}: {error}", "Recompute with --full"
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


# What `Current` was looked up in: rows digested, and rows whose unique columns were looked through for repeats.
DIGESTED, REPEATS = "digested", "repeats"


@dataclasses.dataclass(frozen=True, eq=False)
class Current:
    """The sources as they are now.

    Args:
        digests: by day, if `digested`; then they cover all days.
        whole: per source the last day that is entirely before the run's clock. Of a later day some rows may have been
            rejected that the next run accepts, so it does not count as covered.
        looked: rows that were read for digests (`DIGESTED`) and to find repeats (`REPEATS`), per source.
    """

    files: Mapping[str, Mapping[str, tuple[str, int, int]]]
    digests: Mapping[str, Digests]
    repeats: Mapping[str, Repeats]
    dimensions: Mapping[str, int]
    whole: Mapping[str, int] = dataclasses.field(default_factory=dict)
    digested: bool = False
    looked: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)


def examine(inventory: Inventory, manifest: Manifest, everything: bool = False) -> Current:
    """Digests by day the files that are new, changed or gone since `manifest`, and no others.

    Args:
        everything: digest all files, whatever the manifest knows of them.
    """
    known = read_anew(manifest) if everything or manifest.version < VERSION else manifest
    files, digests, repeats, dimensions, whole = {}, {}, {}, {}, {}
    looked: dict[str, dict[str, int]] = {DIGESTED: {}, REPEATS: {}}
    for name, slices in inventory.slices.items():
        contract = inventory.contract(name)
        files[name] = _spans(slices, contract)
        if contract.source.time is None:
            dimensions[name] = _dimension_digest(contract, slices)
            looked[DIGESTED][name] = sum(each.rows for each in slices)
            continue
        if contract.source.unique is not None:
            repeats[name] = repeats_of(contract, slices)
            looked[REPEATS][name] = sum(each.rows for each in slices)
        whole[name] = day_number(contract.latest) - 1
        digests[name] = digests_now(name, contract, slices, files[name], known) if manifest.dates else {}
        if manifest.dates:
            unread = _unread(name, slices, files[name], known)[1]
            looked[DIGESTED][name] = sum(each.rows for each, _, _ in unread)
    return Current(files, digests, repeats, dimensions, whole, bool(manifest.dates), looked)


def read_anew(manifest: Manifest) -> Manifest:
    """`manifest` as if no file had been digested."""
    return dataclasses.replace(manifest, files={}, covered={}, digests={})


def _spans(slices: Iterable[Slice], contract: Contract) -> dict[str, tuple[str, int, int]]:
    """Per file its stamp and the days it may hold."""
    spans: dict[str, tuple[str, int, int]] = {}
    for each in slices:
        low, high = day_number(max(each.low, contract.earliest)), day_number(min(each.high, contract.latest))
        held = spans.get(each.path)
        spans[each.path] = (
            (each.stamp, low, high) if held is None else (each.stamp, min(held[1], low), max(held[2], high))
        )
    return spans


def digests_now(
    name: str, contract: Contract, slices: Sequence[Slice], now: Mapping[str, tuple[str, int, int]], manifest: Manifest
) -> Digests:
    """Digests of a source by day; what has not changed since `manifest` is taken from there."""
    known = manifest.digests.get(name, {})
    days, unread = _unread(name, slices, now, manifest)
    parts = [
        read_slices(contract, [each], own=(0, 0), span=(midnight(low), midnight(high + 1))).digests
        for each, low, high in unread
    ]
    return {**{day: value for day, value in known.items() if day not in days}, **add(parts)}


def _unread(
    name: str, slices: Sequence[Slice], now: Mapping[str, tuple[str, int, int]], manifest: Manifest
) -> tuple[Days, list[tuple[Slice, int, int]]]:
    """Returns the days whose digests `manifest` lacks, and the slices to read for them with first and last day."""
    before, covered = manifest.files.get(name, {}), Days(manifest.covered.get(name, ()))
    unread: list[tuple[int, int]] = []
    for path, (stamp, low, high) in now.items():
        unread += [(low, high)] if before.get(path, ("",))[0] != stamp else covered.missing(low, high)
    unread += [(low, high) for path, (stamp, low, high) in before.items() if now.get(path, ("",))[0] != stamp]
    days = Days(unread)
    return days, [
        (each, low, high)
        for each in slices
        for low, high in days.overlapping(day_number(each.low), day_number(each.high))
    ]


class Days:
    """A union of spans of days, both ends included."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.spans: list[list[int]] = []
        for low, high in sorted(spans):
            if self.spans and low <= self.spans[-1][1] + 1:
                self.spans[-1][1] = max(self.spans[-1][1], high)
            else:
                self.spans.append([low, high])

    def __contains__(self, day: int) -> bool:
        return any(low <= day <= high for low, high in self.spans)

    def missing(self, low: int, high: int) -> list[tuple[int, int]]:
        """The parts of `[low, high]` outside the union."""
        result = []
        for a, b in self.overlapping(low, high):
            if low < a:
                result.append((low, a - 1))
            low = b + 1
        return [*result, (low, high)] if low <= high else result

    def overlapping(self, low: int, high: int) -> list[tuple[int, int]]:
        return [(a, b) for a, b in self.spans if a <= high and b >= low]


def _dimension_digest(contract: Contract, slices: Sequence[Slice]) -> int:
    """Sum of the hashes of a dimension's good rows mod 2**64, read in pieces."""
    total = 0
    for read in stream_slices(contract, slices):
        if len(read.frame):
            total += int(np.add.reduce(combine([hash_column(read.frame[name]) for name in contract.read])))
    return total & _MASK


def input_digests(
    view: FeatureView, digests: Mapping[str, Digests], dropped: Mapping[str, Digests], days: Iterable[int]
) -> dict[int, int]:
    """Returns per day of the spine the digest of its spine rows and of all events within reach of them."""
    return digests_within(reaches(view), digests, dropped, days)


def digests_within(
    back: Mapping[str, int], digests: Mapping[str, Digests], dropped: Mapping[str, Digests], days: Iterable[int]
) -> dict[int, int]:
    """Per day the digest of each source's days from so many days before."""
    wanted = sorted(days)
    if not wanted:
        return {}
    total = dict.fromkeys(wanted, 0)
    for name, reach in back.items():
        seen = sorted({*digests.get(name, {}), *dropped.get(name, {})})
        raw, gone = digests.get(name, {}), dropped.get(name, {})
        # One number per day of this source; a window's is their sum, so prefix sums give every window's.
        columns = [
            seen,
            *zip(*(_signed(raw.get(day, (0, 0))) + _signed(gone.get(day, (0, 0))) for day in seen), strict=True),
        ]
        mixed = (
            combine([hash_text(name), *(np.array(column, np.int64).view(np.uint64) for column in columns)])
            if seen
            else np.zeros(0, np.uint64)
        )
        prefix = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
        position = np.array(seen, np.int64)
        first = np.searchsorted(position, np.array(wanted) - reach, "left")
        last = np.searchsorted(position, np.array(wanted), "right")
        with np.errstate(over="ignore"):
            sums = prefix[last] - prefix[first]
        for day, value in zip(wanted, sums, strict=True):
            total[day] = (total[day] * 31 + int(value)) & _MASK
    return total


def _signed(value: tuple[int, int]) -> tuple[int, int]:
    return value[0], value[1] - 2**64 if value[1] >= 2**63 else value[1]


def history_digest(
    sources: Sequence[str], digests: Mapping[str, Digests], dropped: Mapping[str, Digests], until: int
) -> int:
    """Digest of everything known of `sources` before `until` (µs, a midnight)."""
    day = day_number(until)
    parts = [
        f"{name} {each} {value}"
        for name in sources
        for known in (digests.get(name, {}), dropped.get(name, {}))
        for each, value in sorted(known.items())
        if each < day
    ]
    return int.from_bytes(hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest(), "big")


def reaches(view: FeatureView) -> dict[str, int]:
    """Per source the number of days before its own that a day's features see; the spine at least its own."""
    lifetime = lifetime_sources(view)
    return {
        view.spine.name: 0,
        **{name: WHOLE_HISTORY_DAYS if name in lifetime else days_in(view.reach(name)) for name in view.events},
    }


@dataclasses.dataclass(frozen=True)
class Stale:
    """Days to compute, each with the reason."""

    reasons: Mapping[int, str]
    notes: tuple[str, ...] = ()

    def ranges(self) -> list[tuple[int, int]]:
        """Runs of neighbouring days as `[start, end)` µs."""
        result: list[tuple[int, int]] = []
        for day in sorted(self.reasons):
            start, end = midnight(day), midnight(day + 1)
            if result and result[-1][1] == start:
                result[-1] = (result[-1][0], end)
            else:
                result.append((start, end))
        return result


def find_stale(view: FeatureView, manifest: Manifest, current: Current, refresh: bool = False) -> Stale:
    """Finds the days that were never computed, or whose inputs have changed since."""
    dropped = {name: each.dropped for name, each in current.repeats.items()}
    asked = set(current.digests[view.spine.name])
    now = input_digests(view, current.digests, dropped, asked | set(manifest.dates))
    lookup = dimensions_digest(current.dimensions)
    reasons = {}
    for day in sorted(asked | set(manifest.dates)):
        if day not in manifest.dates:
            reasons[day] = "never computed"
        elif manifest.dates[day] == OUTDATED:
            reasons[day] = WRITTEN_BEFORE
        elif now[day] != manifest.dates[day]:
            reasons[day] = _why(view, manifest, current.digests, dropped, day)
        elif refresh and manifest.looked_up.get(day) != lookup:
            reasons[day] = "a dimension changed (--refresh)"
    notes = tuple(
        f"{name} changed; features computed before keep its old rows (--refresh recomputes them)"
        for name, digest in current.dimensions.items()
        if not refresh and manifest.dates and manifest.dimensions.get(name, digest) != digest
    )
    return Stale(reasons, notes)


def dimensions_digest(dimensions: Mapping[str, int]) -> int:
    """One number for the content of all dimensions."""
    return int(combine([hash_text(f"{name}={digest}") for name, digest in sorted(dimensions.items())])[0])


def _why(
    view: FeatureView, manifest: Manifest, digests: Mapping[str, Digests], dropped: Mapping[str, Digests], day: int
) -> str:
    causes = []
    for name, back in reaches(view).items():
        for kind, now, before in (
            ("", digests.get(name, {}), manifest.digests.get(name, {})),
            ("repeats in ", dropped.get(name, {}), manifest.dropped.get(name, {})),
        ):
            changed = sorted(
                each for each in {*now, *before} if day - back <= each <= day and now.get(each) != before.get(each)
            )
            if changed:
                more = f" and {len(changed) - 1} more days" if len(changed) > 1 else ""
                causes.append(f"{kind}{name} changed on {as_date(changed[0])}{more}")
    return "; ".join(causes) or "its inputs changed before the last run, which did not compute it"


def advance(
    view: FeatureView,
    manifest: Manifest,
    current: Current,
    read: Mapping[str, Digests],
    computed: Sequence[tuple[int, int]],
    left: Mapping[int, Sequence[str]] | None = None,
) -> Manifest:
    """The manifest after a run that computed the `[start, end)` ranges (µs).

    Args:
        read: for the first run, which has no manifest to start from, the digests of what it read.
        left: files of summaries of all history per µs until which they reach.
    """
    if current.digested:
        digests = {name: dict(each) for name, each in current.digests.items()}
        covered = {name: [(low, high) for _, low, high in files.values()] for name, files in current.files.items()}
    else:
        digests, covered = _digested(view, manifest, current, read, computed)
    covered = {
        name: [(low, min(high, whole)) for low, high in Days(spans).spans if low <= whole]
        for name, spans in covered.items()
        for whole in [current.whole.get(name, WHOLE_HISTORY_DAYS)]
    }
    dropped = {name: each.dropped for name, each in current.repeats.items()}
    inside = set(days_within(computed))
    answered = inside & set(digests[view.spine.name])
    dates = {day: value for day, value in manifest.dates.items() if day not in inside}
    looked_up = {day: value for day, value in manifest.looked_up.items() if day not in inside}
    now = input_digests(view, digests, dropped, answered)
    lookup = dimensions_digest(current.dimensions)
    sources = lifetime_sources(view)
    made = {
        until: (tuple(files), history_digest(sources, digests, dropped, until)) for until, files in (left or {}).items()
    }
    snapshots = dict(sorted({**manifest.snapshots, **made}.items())[-MOST_SNAPSHOTS:])
    return Manifest(
        current.files,
        covered,
        digests,
        dropped,
        {**dates, **now},
        current.dimensions,
        {**looked_up, **dict.fromkeys(answered, lookup)},
        snapshots,
    )


def _digested(
    view: FeatureView,
    manifest: Manifest,
    current: Current,
    read: Mapping[str, Digests],
    computed: Sequence[tuple[int, int]],
) -> tuple[dict[str, Digests], dict[str, list[tuple[int, int]]]]:
    """Returns the digests and covered spans after a first run, which digested only what it read.

    Another first run may have committed in the meantime. Its digests of other days are valid unless their files have
    changed since.
    """
    first, last = day_number(computed[0][0]), days_in(computed[-1][1]) - 1
    digests, covered = {}, {}
    for name, back in reaches(view).items():
        mine, now, before = (first - back, last), current.files.get(name, {}), manifest.files.get(name, {})
        changed = [
            each.get(path, ("", 0, -1))[1:]
            for path in {*now, *before}
            if now.get(path, ("",))[0] != before.get(path, ("",))[0]
            for each in (now, before)
        ]
        anew = Days([mine, *((low, high) for low, high in changed if low <= high)])
        kept = {day: value for day, value in manifest.digests.get(name, {}).items() if day not in anew}
        digests[name] = {**kept, **read.get(name, {})}
        covered[name] = [mine]
        for low, high in manifest.covered.get(name, ()):
            covered[name] += anew.missing(low, high)
    return digests, covered


def usable_snapshots(
    view: FeatureView, manifest: Manifest, current: Current, before: int
) -> Iterator[tuple[int, Sequence[str]]]:
    """Snapshots (µs, files) not after `before` µs whose history is still as it was, the newest first."""
    sources = lifetime_sources(view)
    dropped = {name: each.dropped for name, each in current.repeats.items()}
    for until, (files, digest) in sorted(manifest.snapshots.items(), reverse=True):
        if until <= before and current.digested and history_digest(sources, current.digests, dropped, until) == digest:
            yield until, files
