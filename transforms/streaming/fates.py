"""Fates: which of a live job's accepted rows count, as a function of the rows below a cut (ADR 16).

`KnownOrder` decides what a repeat is.  The journal applies it to rows as they arrive.  Recovery and parity decide
again, by `repeated_from`, from the accepted rows alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import polars as pl

from schemas.live import repeats_by
from schemas.views import FeatureView, lifetime_sources
from transforms.records.arrays import Ints
from transforms.sources.repeats import NEVER_REPEATED, KnownOrder
from transforms.streaming.beginnings import HISTORY_PARTITION
from transforms.streaming.row_origin import ORIGIN_COLUMNS

# What a live job stores of the fates of rows: whether a row counted when it was accepted, the row that counted until
# then, and whether it came too late to be compared.
FATE_COLUMNS = ("__counted", "__instead", "__uncompared")


@dataclasses.dataclass(frozen=True)
class RepeatMemory:
    """For how long (µs) repeats of a source's rows are recognised.  It only grows.

    Args:
        spans: each length, with the offset in each partition from which on rows have it.  For two rows, the length of
            the later span applies.
    """

    spans: tuple[tuple[int, Mapping[int, int]], ...] = ()

    @property
    def length(self) -> int:
        return self.spans[-1][0] if self.spans else 0

    def grown(self, length: int, offsets: Mapping[int, int]) -> RepeatMemory:
        """This memory, of at least `length` for rows from `offsets` on."""
        if self.spans and length <= self.length:
            return self
        return RepeatMemory((*self.spans, (length, dict(offsets) if self.spans else {})))

    def span_of(self, rows: pl.DataFrame) -> Ints:
        """The number of each row's span; 0 for a row that was accepted before memory was recorded."""
        result = np.ones(len(rows), np.int64)
        partitions, offsets = rows["__partition"].to_numpy(), rows["__offset"].to_numpy()
        for number, (_, first) in enumerate(self.spans[1:], 2):
            least = np.zeros(len(rows), np.int64)
            for partition, offset in first.items():
                least[partitions == partition] = offset
            result[offsets >= least] = number
        result[rows["__uncompared"].is_null().to_numpy()] = 0
        return result

    def to_json(self) -> list[list[object]]:
        return [[length, {str(number): offset for number, offset in first.items()}] for length, first in self.spans]

    @classmethod
    def of_json(cls, value: Sequence[tuple[int, Mapping[str, int]]]) -> RepeatMemory:
        return cls(tuple((int(length), {int(key): int(at) for key, at in first.items()}) for length, first in value))


@dataclasses.dataclass(frozen=True)
class WindowReach:
    """How far the windows of a job's views reach back over one source.

    Args:
        bounded: the longest bounded window, µs; 0: there is none.
        lifetime: whether some window is a lifetime window.
    """

    bounded: int
    lifetime: bool

    @classmethod
    def of(cls, views: Iterable[FeatureView], name: str) -> WindowReach:
        """The reach over the source `name`.  Views that do not read it have none."""
        some = [view for view in views if name in view.events]
        bounded = max((view.reach(name) for view in some), default=0)
        return cls(bounded, any(name in lifetime_sources(view) for view in some))

    def least_memory(self, keep: int) -> int:
        """The memory (µs) that is needed at least: twice the longest bounded window, or `keep` if there is none."""
        return 2 * self.bounded or keep

    def comparison_span(self, memory: int) -> int:
        """For how long (µs) before the journal's horizon a new row is compared with others.  An older row counts."""
        return self.bounded + memory

    def remembered(self, memory: int) -> int:
        """For how long (µs) before the journal's horizon rows are remembered, to find repeats.

        No bounded window reaches a row at the edge of what is compared.  A lifetime window does, so its fate must be
        right: it may repeat a row that is older by up to `memory`.
        """
        return self.comparison_span(memory) + (memory if self.lifetime else 0)

    def held_back(self, memory: int) -> int:
        """For how long (µs) before the journal's horizon shards hold events as they are.

        A compacted event cannot be retracted.  It is therefore held until no new event is compared with it any more.

        Args:
            memory: for how long (µs) repeats are recognised; 0 if there are none.
        """
        return self.comparison_span(memory) if self.lifetime else self.bounded


def known_columns(view: FeatureView, name: str) -> list[str]:
    """The columns that are needed to find repeats among a source's events: they decide ties."""
    return list(view.spine.schema) if view.events[name] is view.spine else view.columns_held(name)


def known_order(view: FeatureView, name: str) -> KnownOrder:
    """The order in which repeats of a source became known, with the rows' origin as the last resort."""
    return KnownOrder.of(view.events[name], repeats_by(view, name), known_columns(view, name), ORIGIN_COLUMNS)


def repeated_from(order: KnownOrder, memory: RepeatMemory, rows: pl.DataFrame, shown: Ints, replaced: Ints) -> Ints:
    """The number from which on each row no longer counts; `NEVER_REPEATED` if it always does.

    Args:
        order: of the source.
        memory: of the source.
        rows: the accepted rows, with their origin, `__counted` and `__uncompared`.
        shown: the number from which on each row is known, like the position of a cut.
        replaced: the number from which on each row that was accepted before memory was recorded is replaced.

    For two such rows, and for two rows of history, it is stored which one counts.  All others are compared.
    """
    history = (rows["__partition"] == HISTORY_PARTITION).to_numpy()
    alone = rows["__uncompared"].fill_null(False).to_numpy()
    counted = rows["__counted"].fill_null(True).to_numpy()
    span = memory.span_of(rows)
    result = np.where(span == 0, replaced, NEVER_REPEATED)
    result[((span == 0) | history) & ~counted] = 0
    shown = np.where(alone, NEVER_REPEATED, shown)
    for number, (length, _) in enumerate(memory.spans, 1):
        new = span == number
        for mine, others in (
            (new & ~history, span <= number),
            (new & history, (span <= number) & ~history),
            ((span < number) & ~history, new),
            ((span < number) & history, new & ~history),
        ):
            mine = mine & ~alone
            if mine.any() and others.any():
                found = order.repeated_from(rows, np.where(others, shown, NEVER_REPEATED), length)
                result[mine] = np.minimum(result[mine], found[mine])
    return result
