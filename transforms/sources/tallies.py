"""The account of a source's rows: each is counted in exactly one place."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from schemas.errors import DataError
from transforms.sources.day_digests import Digests, add
from transforms.storage.delta_tables import WrittenFiles

COUNTS = ("read", "used", "outside", "repeated", "dead")
AS_EVENTS = " (as events)"


@dataclasses.dataclass(frozen=True)
class SourceTally:
    """Rows of one source, each counted in exactly one place: read = used + outside + repeated + dead.

    Of a spine `used` rows were answered; of events they lie within some window's reach; `outside` lie beyond all.
    `digests` are those of its days where a block was asked for them.
    """

    source: str
    read: int = 0
    used: int = 0
    outside: int = 0
    repeated: int = 0
    dead: int = 0
    digests: Digests = dataclasses.field(default_factory=dict)

    def __add__(self, other: SourceTally) -> SourceTally:
        return SourceTally(
            self.source,
            **{name: getattr(self, name) + getattr(other, name) for name in COUNTS},
            digests=add([self.digests, other.digests]),
        )

    @property
    def counts(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in COUNTS}

    @property
    def conserved(self) -> bool:
        return self.read == self.used + self.outside + self.repeated + self.dead


def add_tallies(tallies: Iterable[SourceTally | Mapping[str, SourceTally]]) -> dict[str, SourceTally]:
    """Sums per source, in any order of merging."""
    result: dict[str, SourceTally] = {}
    for each in tallies:
        for tally in [each] if isinstance(each, SourceTally) else each.values():
            result[tally.source] = result[tally.source] + tally if tally.source in result else tally
    return result


def conserve(files: WrittenFiles, tallies: Mapping[str, SourceTally], spine: str) -> WrittenFiles:
    """`files` if every row read is accounted for and every question is answered in them.

    Raises:
        DataError: nothing is committed then.
    """
    lost = [tally for tally in tallies.values() if not tally.conserved]
    answered = sum(file.rows for file, _ in {file.path: (file, values) for file, values in files}.values())
    if lost or answered != tallies.get(spine, SourceTally(spine)).used:
        raise DataError("Rows are conserved: read = used + outside + repeated + dead, and every question is answered once",
                        f"{answered} answers to {tallies.get(spine, SourceTally(spine)).used} questions; {lost or 'accounts balance'}",
                        "Nothing was committed; a source may have changed while it was read: run the same command again")  # fmt: skip
    return files


def digests_read(tallies: Mapping[str, SourceTally]) -> dict[str, Digests]:
    """Digests by day per source."""
    return {label.removesuffix(AS_EVENTS): tally.digests for label, tally in tallies.items() if tally.digests}
