"""Digests of the sources by day: for files that have changed since a manifest, and for the inputs of each day's
features."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from schemas.views import FeatureView, lifetime_sources
from transforms.features.manifest import MANIFEST_VERSION, Manifest, read_anew
from transforms.records.pickled_once import PickledOnce
from transforms.records.row_hashing import combine_hashes, hash_column, hash_text
from transforms.records.times import day_number, days_in, midnight
from transforms.sources.contracts import Contract
from transforms.sources.day_digests import Digests, add_digests
from transforms.sources.dead_letters import concat_dead_letters
from transforms.sources.inventory import Inventory
from transforms.sources.reader import ReadOptions, RepeatedKeys, repeats_of, stream_slices
from transforms.sources.slices import Slice

_MASK = 2**64 - 1
# The number of days back of a window over all history.
WHOLE_HISTORY_DAYS = 1_000_000


# Keys of `Current.looked`: rows that were read for digests, and rows whose unique columns were searched for repeats.
DIGESTED, REPEATS = "digested", "repeats"


@dataclasses.dataclass(frozen=True, eq=False)
class Current(PickledOnce):
    """The sources as they are now.

    Args:
        digests: the digests by day, if `digested`; then they cover all days.
        whole: per source the last day that is entirely before the run's clock. Of a later day some rows may have been
            rejected that the next run accepts, so it does not count as covered.
        dead_letters: of all rows of the time sources' files that are new or have changed, of `SOURCE_DEAD_LETTERS`.
        looked: rows that were read for digests (`DIGESTED`) and to find repeats (`REPEATS`), per source.
    """

    files: Mapping[str, Mapping[str, tuple[str, int, int]]]
    digests: Mapping[str, Digests]
    repeats: Mapping[str, RepeatedKeys]
    dimensions: Mapping[str, int]
    whole: Mapping[str, int] = dataclasses.field(default_factory=dict)
    digested: bool = False
    looked: Mapping[str, Mapping[str, int]] = dataclasses.field(default_factory=dict)
    dead_letters: pl.DataFrame = dataclasses.field(default_factory=lambda: concat_dead_letters([]))


def digest_changes(inventory: Inventory, manifest: Manifest, everything: bool = False) -> Current:
    """Digests by day the files that are new, changed or gone since `manifest`, and no others.

    Args:
        everything: digest all files, whatever the manifest has.
    """
    known = read_anew(manifest) if everything or manifest.version < MANIFEST_VERSION else manifest
    files, repeats, dimensions, whole = {}, {}, {}, {}
    digests: dict[str, Digests] = {}
    looked: dict[str, dict[str, int]] = {DIGESTED: {}, REPEATS: {}}
    dead_letters: list[pl.DataFrame] = []
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
        digests[name] = {}
        if manifest.dates:
            digests[name] = digests_now(name, contract, slices, files[name], known, dead_letters)
            unread = _unread(name, slices, files[name], known)[1]
            looked[DIGESTED][name] = sum(each.rows for each, _, _ in unread)
    found = concat_dead_letters(dead_letters).unique(["file", "row"], keep="first", maintain_order=True)
    return Current(files, digests, repeats, dimensions, whole, bool(manifest.dates), looked, found)


def _spans(slices: Iterable[Slice], contract: Contract) -> dict[str, tuple[str, int, int]]:
    """For each file, its stamp and the first and last day that it may contain."""
    spans: dict[str, tuple[str, int, int]] = {}
    for each in slices:
        low, high = day_number(max(each.low, contract.earliest)), day_number(min(each.high, contract.latest))
        span = spans.get(each.path)
        spans[each.path] = (
            (each.stamp, low, high) if span is None else (each.stamp, min(span[1], low), max(span[2], high))
        )
    return spans


def digests_now(
    name: str,
    contract: Contract,
    slices: Sequence[Slice],
    now: Mapping[str, tuple[str, int, int]],
    manifest: Manifest,
    dead_letters: list[pl.DataFrame] | None = None,
) -> Digests:
    """Digests of a source by day; for unchanged files they are taken from `manifest`.

    Args:
        dead_letters: those of the files that are new or have changed are added, some perhaps twice.
    """
    known, before = manifest.digests.get(name, {}), manifest.files.get(name, {})
    days, unread = _unread(name, slices, now, manifest)
    changed = {path for path in now if dead_letters is not None and before.get(path, ("",))[0] != now[path][0]}
    together: dict[tuple[int, int, bool], list[Slice]] = {}
    for each, low, high in unread:
        together.setdefault((low, high, each.path in changed), []).append(each)
    parts = []
    for (low, high, anew), some in together.items():
        options = ReadOptions(own=None if anew else (0, 0), span=(midnight(low), midnight(high + 1)))
        for read in stream_slices(contract, some, options):
            parts.append(read.digests)
            if dead_letters is not None and len(read.dead_letters):
                dead_letters.append(read.dead_letters)
    timeless = [each for each in slices if each.path in changed and _timeless(contract, each)]
    if dead_letters is not None and timeless:
        dead_letters += [read.dead_letters for read in stream_slices(contract, timeless)]
    return {**{day: value for day, value in known.items() if day not in days}, **add_digests(parts)}


def _timeless(contract: Contract, each: Slice) -> bool:
    return each.high < contract.earliest or each.low >= contract.latest


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
            total += int(np.add.reduce(combine_hashes([hash_column(read.frame[name]) for name in contract.read])))
    return total & _MASK


def input_digests(
    view: FeatureView, digests: Mapping[str, Digests], dropped: Mapping[str, Digests], days: Iterable[int]
) -> dict[int, int]:
    """For each day of the spine, the digest of its spine rows and of all events within reach of them."""
    return digests_within(reaches(view), digests, dropped, days)


def digests_within(
    back: Mapping[str, int], digests: Mapping[str, Digests], dropped: Mapping[str, Digests], days: Iterable[int]
) -> dict[int, int]:
    """For each day, the digest of each source over that day and so many days before it."""
    wanted = sorted(days)
    if not wanted:
        return {}
    total = dict.fromkeys(wanted, 0)
    for name, reach in back.items():
        seen = sorted({*digests.get(name, {}), *dropped.get(name, {})})
        raw, gone = digests.get(name, {}), dropped.get(name, {})
        # One number per day of this source; that of a window is their sum, so prefix sums give it for every window.
        columns = [
            seen,
            *zip(*(_signed(raw.get(day, (0, 0))) + _signed(gone.get(day, (0, 0))) for day in seen), strict=True),
        ]
        mixed = (
            combine_hashes([hash_text(name), *(np.array(column, np.int64).view(np.uint64) for column in columns)])
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
    """Digest of all rows of `sources` that were known before `until` (µs, a midnight)."""
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
    """For each source, the number of earlier days that a day's features see; the spine is always included with the day
    itself."""
    lifetime = lifetime_sources(view)
    return {
        view.spine.name: 0,
        **{name: WHOLE_HISTORY_DAYS if name in lifetime else days_in(view.reach(name)) for name in view.events},
    }


def dimensions_digest(dimensions: Mapping[str, int]) -> int:
    """One number for the content of all dimensions."""
    return int(combine_hashes([hash_text(f"{name}={digest}") for name, digest in sorted(dimensions.items())])[0])
