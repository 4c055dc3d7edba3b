"""Finds the dates of a feature table that are missing or stale, from digests of the sources, never from timestamps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from schemas.views import FeatureView, lifetime_sources
from transforms.features.manifest import OUTDATED, WRITTEN_BEFORE, Manifest
from transforms.features.source_digests import (
    WHOLE_HISTORY_DAYS,
    Current,
    Days,
    dimensions_digest,
    history_digest,
    input_digests,
    reaches,
)
from transforms.records.times import as_date, day_number, days_in, days_within, midnight
from transforms.sources.day_digests import Digests

MOST_SNAPSHOTS = 100


@dataclasses.dataclass(frozen=True)
class Stale:
    """Days to compute, each with the reason."""

    reasons: Mapping[int, str]
    notes: tuple[str, ...] = ()

    def ranges(self) -> list[tuple[int, int]]:
        """Ranges of neighbouring days as `[start, end)` µs."""
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
    present = set(current.digests[view.spine.name])
    now = input_digests(view, current.digests, dropped, present | set(manifest.dates))
    lookup = dimensions_digest(current.dimensions)
    reasons = {}
    for day in sorted(present | set(manifest.dates)):
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
        left: end of a summary of all history (µs) → its files.
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
    computed_days = inside & set(digests[view.spine.name])
    dates = {day: value for day, value in manifest.dates.items() if day not in inside}
    looked_up = {day: value for day, value in manifest.looked_up.items() if day not in inside}
    now = input_digests(view, digests, dropped, computed_days)
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
        {**looked_up, **dict.fromkeys(computed_days, lookup)},
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
