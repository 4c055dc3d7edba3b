"""How a view's work is cut: time blocks, each of which sees its spine rows and every event their windows can reach.

A plan decides where rows are computed, never what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl

from schemas.durations import DAY
from schemas.errors import DataError
from schemas.views import FeatureView
from transforms.contracts import EPOCH, Contract, day_of
from transforms.sources import ALWAYS, Slice, repeats_of, slices_of
from transforms.tables import days_between

# Rows (spine and events) of one block: large enough for the kernel, small enough for memory.
BLOCK_ROWS = 1_600_000


@dataclasses.dataclass(frozen=True)
class Block:
    """Spine rows of `[start, end)` µs, and the slices that hold them and the events they can see.

    `own` is the span whose events and dead letters this block accounts for; blocks' own spans do not overlap.
    """

    index: int
    start: int
    end: int
    own: tuple[int, int]
    spine: tuple[Slice, ...]
    events: Mapping[str, tuple[Slice, ...]]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Blocks that tile an interval.

    `dates` are those the run answers for (None: all there are); `reached` is the span of time any window can see.
    """

    start: int
    end: int
    dates: tuple[date, ...] | None
    reached: tuple[int, int]
    blocks: tuple[Block, ...]
    dimensions: Mapping[str, tuple[Slice, ...]]
    repeats: Mapping[str, pl.DataFrame]
    contracts: Mapping[str, Contract]
    spine: Contract


def make_contracts(view: FeatureView, now: int) -> tuple[Contract, dict[str, Contract]]:
    """The spine's contract and those of the sources.

    The spine as a source of events is read under the very rules of the spine: a row is good or bad, not both.
    """
    spine = Contract(view.spine, tuple(view.spine.schema), tuple(view.key), now)
    sources = {
        name: spine if source is view.spine else Contract(source, tuple(view.columns_read(name)), now=now)
        for name, source in view.sources.items()
    }
    return spine, sources


def make_plan(
    view: FeatureView, root: str, start: date | None, end: date | None, now: int, block_rows: int = BLOCK_ROWS
) -> Plan:
    """Cut the interval `[start, end)` of the spine in `root` (None: all there is) into blocks, from footers alone.

    Raises:
        DataError: no spine rows in the interval, or a source without files.
        ContractError: files that cannot be read as declared.
    """
    spine_contract, contracts = make_contracts(view, now)
    spine = slices_of(root, spine_contract)
    events = {
        name: spine if view.events[name] is view.spine else slices_of(root, contracts[name]) for name in view.events
    }
    dimensions = {name: tuple(slices_of(root, contracts[name])) for name in view.dimensions}
    low, high = _extent(spine, spine_contract)
    first = low if start is None else _microseconds(start)
    last = high if end is None else _microseconds(end)
    inside = [each for each in spine if each.low < last and each.high >= first]
    if not inside or first >= last:
        where = f"[{day_of(first)}, {day_of(max(last, first))})"
        raise DataError(
            f"Source {view.spine.name!r} has rows in the interval", f"none in {where}; there are rows from {day_of(low)} to {day_of(high - 1)}" if low < high else "no rows at all",
            "Choose another --start and --end, or write the rows first",
        )  # fmt: skip
    cuts = _cuts(inside, events, first, last, block_rows)
    unbounded = start is None and end is None
    blocks = tuple(
        Block(
            index, begin, stop,
            (ALWAYS if start is None and begin == first else begin, 2**62 if end is None and stop == last else stop),
            _overlapping(spine, begin, stop),
            {name: _overlapping(events[name], begin - view.reach(name), stop) for name in events},
        )
        for index, (begin, stop) in enumerate(zip(cuts[:-1], cuts[1:], strict=True))
    )  # fmt: skip
    repeats = {
        name: repeats_of(contracts[name], [each for each in events[name] if each.low < last])
        for name in events
        if view.events[name].unique
    }
    dates = None if unbounded else days_between(day_of(first), day_of(last - 1) + timedelta(days=1))
    reached = (
        max(first, min((each.low for each in inside), default=first)),
        min(last, max((each.high for each in inside), default=last) + 1),
    )
    return Plan(first, last, dates, reached, blocks, dimensions, repeats, contracts, spine_contract)


def _extent(spine: Sequence[Slice], contract: Contract) -> tuple[int, int]:
    """Whole days that hold every plausible spine row."""
    lows = [max(each.low, contract.earliest) for each in spine if each.high >= contract.earliest]
    highs = [min(each.high, contract.latest - 1) for each in spine if each.low < contract.latest]
    if not lows or not highs:
        return 0, 0
    return min(lows) // DAY * DAY, (max(highs) // DAY + 1) * DAY


def _overlapping(slices: Sequence[Slice], low: int, high: int) -> tuple[Slice, ...]:
    return tuple(each for each in slices if each.low < high and each.high >= low)


def _cuts(
    spine: Sequence[Slice], events: Mapping[str, Sequence[Slice]], first: int, last: int, block_rows: int
) -> list[int]:
    """Bounds of blocks of about `block_rows` rows, at midnights unless one day alone is too much.

    Rows are taken to spread evenly over their row group's span.
    """
    days = np.arange(first // DAY, -(-last // DAY) + 1) * DAY
    rows = np.zeros(len(days) - 1)
    for each in (*spine, *(each for slices in events.values() for each in slices)):
        low, high = max(each.low, ALWAYS), max(each.high, each.low) + 1
        share = np.clip(np.minimum(days[1:], high) - np.maximum(days[:-1], low), 0, None) / (high - low)
        rows += share * each.rows
    cuts, held = [first], 0.0
    for i, day_rows in enumerate(rows):
        if held and held + day_rows > block_rows:
            cuts.append(int(days[i]))
            held = 0.0
        pieces = int(day_rows // block_rows)
        for piece in range(1, pieces + 1) if pieces else ():
            cut = int(days[i]) + DAY * piece // (pieces + 1)
            if first < cut < last:
                cuts.append(cut)
        held = day_rows / (pieces + 1) if pieces else held + day_rows
    return [*dict.fromkeys(cut for cut in cuts if cut < last), last]


def _microseconds(day: date) -> int:
    return (day - EPOCH.date()).days * DAY
