"""Windows longer than a block: the events that all windows of a block contain are reduced to summaries.

For spine rows in `[a, b)`, every window `[t − W, t)` with W > b − a contains all events of `[b − W, a)`, the interior.
Only the events of `[a − W, b − W)` and `[a, b)`, the edges, are in some windows and not in others. So a block with
windows of a year keeps only the events of twice its own length in memory, no matter how many events a key has:

- Counts, sums and extremes of the interior are one exact row per key (`lifetime_summaries.summarise`). The values of
  the edges are added to it.
- For `first`, `last` and `Latest` the interior needs at most one row per key and column. Only these rows are kept.

Medians, quantiles and distinct counts have no such summary: their windows keep all events.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import polars as pl

from schemas.feature_groups import window_lengths, without_columns
from schemas.features import COMPACT, ORDERED, Latest, Trailing
from schemas.sources import Source
from transforms.features.lifetime_summaries import Summary, merge_summaries, summarise

# A window is split if it is longer than this many times the span of the spine rows.
LONG = 2


def position(source: Source) -> pl.Expr:
    """The time, in µs, that decides which windows contain an event."""
    return pl.col(str(source.event_time or source.time)).to_physical()


@dataclasses.dataclass(frozen=True, eq=False)
class WindowPart:
    """Features of one group that are computed from the same rows.

    Args:
        earliest: events before this time are in no window, µs.
        length: length in µs of the windows whose interior is reduced; None: all events are kept.
        interior: the interior `[interior[0], interior[1])`, µs.
        summed: whether the interior is reduced to a summary; otherwise to the rows that can be first or last.
    """

    features: tuple[Trailing | Latest, ...]
    earliest: int
    length: int | None = None
    interior: tuple[int, int] = (0, 0)
    summed: bool = False

    def events(self, chunks: Iterable[pl.DataFrame], nothing: pl.DataFrame) -> tuple[pl.DataFrame, Summary | None]:
        """Returns the rows that the kernel needs, and the summary of the other rows."""
        row_position, source = position(self.features[0].source), self.features[0].source
        low, high = self.interior
        inside = (row_position >= low) & (row_position < high) & (pl.col(str(source.time)).to_physical() < high)
        rows, kept, summary = [nothing], [nothing], None
        for chunk in chunks:
            chunk = chunk.filter(row_position >= self.earliest)
            if self.length is None:
                rows.append(chunk)
                continue
            rows.append(chunk.filter(~inside))
            interior = chunk.filter(inside)
            if not len(interior):
                continue
            if self.summed:
                keys = [column for _, column in self.features[0].keys]
                summary = merge_summaries(
                    summary, summarise([_over_all_events(each) for each in self.features], interior), keys
                )
            else:
                kept = [firsts_and_lasts(self.features, pl.concat([*kept, interior]))]
        return pl.concat([*rows, *kept]), None if summary is None else Summary(summary, self.interior[1], self.length)


def split_windows(features: Sequence[Trailing | Latest], span: tuple[int, int], start: int) -> list[WindowPart]:
    """Splits `features` of one group, for spine rows in `span` (µs), by how the events of their windows can be reduced.

    Args:
        start: lifetime windows contain the events from this time on, µs. Earlier events are in a separate summary.
    """
    first, last = span
    by: dict[tuple[int | None, bool], list[Trailing | Latest]] = {}
    for feature in features:
        if isinstance(feature, Latest):
            by.setdefault((_long(feature.length, span), False), []).append(feature)
            continue
        chosen: dict[tuple[int | None, bool], list[str]] = {}
        for each in feature.statistics:
            length, summed = _long(each.length, span), each.stat in COMPACT and each.stat not in ORDERED
            if not (each.stat in ORDERED or (summed and feature.source.event_time is None)):
                length = None
            chosen.setdefault((length, summed and length is not None), []).append(each.name)
        for kind, names in chosen.items():
            others = [each.name for each in feature.statistics if each.name not in names]
            by.setdefault(kind, []).extend(without_columns([feature], others))  # type: ignore[arg-type]
    parts = []
    for (length, summed), some in by.items():
        lengths = [length for feature in some for length in window_lengths(feature)]
        earliest = min(start if each is None else first - each for each in lengths)
        interior = (0, 0) if length is None else (last - length, first)
        parts.append(WindowPart(tuple(some), earliest, length, interior, summed))
    return parts


def _long(length: int | None, span: tuple[int, int]) -> int | None:
    return length if length is not None and length > LONG * (span[1] - span[0]) > 0 else None


def _over_all_events(feature: Trailing | Latest) -> Trailing | Latest:
    """The same statistics over all events."""
    assert isinstance(feature, Trailing)
    return dataclasses.replace(feature, over="all")


def firsts_and_lasts(features: Sequence[Trailing | Latest], events: pl.DataFrame) -> pl.DataFrame:
    """Selects from `events` the rows that can be the first or last of a window, each once.

    All of `events` are in the same windows.
    """
    source, keys = features[0].source, [column for _, column in features[0].keys]
    wanted = {("", "last") for feature in features if isinstance(feature, Latest)}
    wanted |= {
        (each.column, each.stat) for feature in features if isinstance(feature, Trailing) for each in feature.statistics
    }
    rows = events.sort([position(source), *source.ties(events.columns)])
    row = pl.int_range(len(rows), dtype=pl.Int64)
    picked = {
        f"# {column} {stat}": (pl.when(pl.col(column).is_not_null()).then(row) if column else row, stat)
        for column, stat in sorted(wanted)
    }
    found = (
        rows.select(*keys, *(expr.alias(name) for name, (expr, _) in picked.items()))
        .group_by(keys)
        .agg(pl.col(name).min() if stat == "first" else pl.col(name).max() for name, (_, stat) in picked.items())
    )
    return rows[np.unique(np.concatenate([found[name].drop_nulls().to_numpy() for name in picked]))]
