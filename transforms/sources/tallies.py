"""Tallies of a source's rows: each row is counted exactly once."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from schemas.errors import DataError
from transforms.sources.day_digests import Digests, add_digests
from transforms.storage.delta_tables import WrittenFiles

COUNTS = ("read", "used", "outside", "repeated", "dead")
AS_EVENTS = " (as events)"


@dataclasses.dataclass(frozen=True)
class SourceTally:
    """Counts of the rows of one source, each row counted exactly once: read = used + outside + repeated + dead.

    The `used` rows of a spine have a feature row; the `used` rows of events are within reach of some window, and the
    `outside` rows are not. `digests` are the digests by day, if a block computes them. `loaded` is the number of rows
    that were read from files for them, some of them by several blocks.
    """

    source: str
    read: int = 0
    used: int = 0
    outside: int = 0
    repeated: int = 0
    dead: int = 0
    digests: Digests = dataclasses.field(default_factory=dict)
    loaded: int = dataclasses.field(default=0, compare=False)

    def __add__(self, other: SourceTally) -> SourceTally:
        return SourceTally(
            self.source,
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            digests=add_digests([self.digests, other.digests]),
            loaded=self.loaded + other.loaded,
        )

    @property
    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTS}

    @property
    def conserved(self) -> bool:
        return self.read == self.used + self.outside + self.repeated + self.dead


def add_tallies(tallies: Iterable[SourceTally | Mapping[str, SourceTally]]) -> dict[str, SourceTally]:
    """Sums the tallies of each source. The order does not matter."""
    result: dict[str, SourceTally] = {}
    for each in tallies:
        for tally in [each] if isinstance(each, SourceTally) else each.values():
            result[tally.source] = result[tally.source] + tally if tally.source in result else tally
    return result


def require_conserved(files: WrittenFiles, tallies: Mapping[str, SourceTally], spine: str) -> WrittenFiles:
    """Returns `files` if every row read is counted exactly once and every spine row has a feature row in them.

    Raises:
        DataError: a row is missing or counted twice. Nothing is committed then.
    """
    lost = [tally for tally in tallies.values() if not tally.conserved]
    computed = sum(file.rows for file in {file for file, _ in files})
    if lost or computed != tallies.get(spine, SourceTally(spine)).used:
        raise DataError(
            "Rows are conserved: read = used + outside + repeated + dead, and every spine row is computed once",
            f"{computed} feature rows of {tallies.get(spine, SourceTally(spine)).used} spine rows; "
            f"{lost or 'accounts balance'}",
            "Nothing was committed; a source may have changed while it was read: run the same command again",
        )
    return files


def digests_read(tallies: Mapping[str, SourceTally]) -> dict[str, Digests]:
    """The digests by day of each source that has any."""
    return {label.removesuffix(AS_EVENTS): tally.digests for label, tally in tallies.items() if tally.digests}


def rows_loaded(tallies: Mapping[str, SourceTally]) -> dict[str, int]:
    """Per source the number of rows that were read from its files."""
    result: dict[str, int] = {}
    for label, tally in tallies.items():
        name = label.removesuffix(AS_EVENTS)
        result[name] = result.get(name, 0) + tally.loaded
    return result
