"""A block's inputs: its questions, the events they can see, the dimensions they look up; and an account of every row."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from schemas.errors import DataError
from schemas.features import Lookup
from schemas.tables import DEAD_LETTERS
from schemas.views import FeatureView
from transforms.features.plan import Block, Plan
from transforms.records.record_batches import batch
from transforms.sources.contracts import Contract
from transforms.sources.day_digests import Digests, add
from transforms.sources.inventory import Slice
from transforms.sources.reader import LETTERS, Read, read_slices, stream_slices, without_repeats
from transforms.storage.delta_tables import DataFile

Written = list[tuple[DataFile, dict[str, str]]]


COUNTS = ("read", "used", "outside", "repeated", "dead")
AS_EVENTS = " (as events)"
ONE_ROW = "one key has one row (the smallest was kept)"


@dataclasses.dataclass(frozen=True)
class Tally:
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

    def __add__(self, other: Tally) -> Tally:
        return Tally(
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


def add_tallies(tallies: Iterable[Tally | Mapping[str, Tally]]) -> dict[str, Tally]:
    """Sums per source, in any order of merging."""
    result: dict[str, Tally] = {}
    for each in tallies:
        for tally in [each] if isinstance(each, Tally) else each.values():
            result[tally.source] = result[tally.source] + tally if tally.source in result else tally
    return result


def conserve(files: Written, tallies: Mapping[str, Tally], spine: str) -> Written:
    """`files` if every row read is accounted for and every question is answered in them.

    Raises:
        DataError: nothing is committed then.
    """
    lost = [tally for tally in tallies.values() if not tally.conserved]
    answered = sum(file.rows for file, _ in {file.path: (file, values) for file, values in files}.values())
    if lost or answered != tallies.get(spine, Tally(spine)).used:
        raise DataError("Rows are conserved: read = used + outside + repeated + dead, and every question is answered once",
                        f"{answered} answers to {tallies.get(spine, Tally(spine)).used} questions; {lost or 'accounts balance'}",
                        "Nothing was committed; a source may have changed while it was read: run the same command again")  # fmt: skip
    return files


def digests_read(tallies: Mapping[str, Tally]) -> dict[str, Digests]:
    """Digests by day per source."""
    return {label.removesuffix(AS_EVENTS): tally.digests for label, tally in tallies.items() if tally.digests}


@dataclasses.dataclass(frozen=True, eq=False)
class Input:
    """Rows to use, dead letters (schema of `read_slices`), and the account of both."""

    frame: pl.DataFrame
    letters: pl.DataFrame
    tally: Tally


def read_spine(view: FeatureView, plan: Plan, block: Block) -> Input:
    """The block's questions, each once, sorted by time and key."""
    # A spine that is a source of events too is digested as that, once.
    span = None if view.spine.name in view.events else block.spans.get(view.spine.name)
    reads = stream_slices(plan.spine, block.spine, block.start, block.end, own=block.own, span=span)
    return settle_spine(view, plan, block, joined(reads))


def joined(reads: Iterable[Read]) -> Read:
    """What pieces of a source hold together."""
    reads = list(reads)
    letters = concat_letters([each.letters for each in reads])
    return Read(pl.concat([each.frame for each in reads]), letters, add([each.digests for each in reads]))


def settle_spine(view: FeatureView, plan: Plan, block: Block, read: Read) -> Input:
    """Questions that were `read`, each once; contradictions are told."""
    spine, conflicts = distinct(read.frame, (view.time, *view.key))
    rule = "one key asks one question at one time (the smallest row was kept)"
    letters = concat_letters([read.letters, locate(plan.spine, block.spine, conflicts, view.key, rule)])
    total = len(read.frame) + len(read.letters)
    tally = Tally(view.spine.name, total, len(spine), 0, total - len(spine) - len(letters), len(letters), read.digests)
    return Input(spine, letters, tally)


def read_events(view: FeatureView, plan: Plan, block: Block, name: str) -> Input:
    """Events that the block's windows can reach, repeats removed; letters and account of those that the block owns."""
    return settle_events(view, plan, block, name, read_slices(**_within_reach(view, plan, block, name)))


def stream_events(view: FeatureView, plan: Plan, block: Block, name: str) -> Iterator[Read]:
    """As `read_events`, in pieces, repeats still there."""
    return stream_slices(**_within_reach(view, plan, block, name))


def _within_reach(view: FeatureView, plan: Plan, block: Block, name: str) -> dict[str, Any]:
    """What to read of `name` for a block."""
    contract, span = plan.contracts[name], block.spans.get(name)
    # The spine's own letters are told where it is read as the spine.
    own = (0, 0) if contract is plan.spine else block.owns(name)
    low = min(block.start - view.reach(name), block.owns(name)[0], span[0] if span else block.start)
    return {"contract": contract, "slices": block.events[name], "low": low, "high": block.end, "own": own, "span": span}


def settle_events(view: FeatureView, plan: Plan, block: Block, name: str, read: Read) -> Input:
    """Events that were `read`, without repeats, and the account of those that the block owns."""
    contract = plan.contracts[name]
    if contract is plan.spine:  # one key asks one question at one time, whoever counts them
        kept, _ = distinct(read.frame, (view.time, *view.key))
    else:
        kept = without_repeats(contract.source, read.frame, plan.repeats.get(name))
    moment = pl.col(str(contract.source.time)).to_physical()
    since, until = block.owns(name)
    mine = (moment >= since) & (moment < until)
    first, last = plan.reached
    reached = mine & (moment >= first - view.reach(name)) & (moment < last)
    good = int(read.frame.select(mine.sum()).item())
    counts = kept.select(mine.sum().alias("mine"), reached.sum().alias("reached")).row(0)
    dead = len(read.letters)
    tally = Tally(
        label(plan, name), good + dead, counts[1], counts[0] - counts[1], good - counts[0], dead, read.digests
    )
    return Input(kept, read.letters, tally)


def label(plan: Plan, name: str) -> str:
    """How accounts call the events of `name`: a spine that is a source of events too is read twice."""
    return name + AS_EVENTS if plan.contracts[name] is plan.spine else name


def read_dimension(view: FeatureView, plan: Plan, name: str) -> Input:
    """A dimension, one row per key of each `Lookup`, its letters dated at the start of the interval."""
    contract, slices = plan.contracts[name], plan.dimensions[name]
    read = read_slices(contract, slices)
    frame = dimension_rows(contract, read.frame)
    letters, refused = contradictions(view, contract, slices, frame)
    used = len(frame) - refused
    # A row that loses for one Lookup may serve another with other keys, so it stays in the frame, after the winner.
    return Input(
        frame, *tell_dimension(plan, name, len(read.frame) + len(read.letters), used, [read.letters, *letters])
    )


def dimension_rows(contract: Contract, frame: pl.DataFrame) -> pl.DataFrame:
    """A dimension's rows without the columns that only put them in order, each once; of one key's rows the first is looked up."""
    order = contract.source.ties(frame.columns)
    if not contract.ordering:
        return frame.unique().sort(order)
    columns = list(contract.columns)
    return frame.sort(order).unique(columns, keep="first", maintain_order=True).select(columns)


def losing(frame: pl.DataFrame, key: Sequence[str]) -> pl.DataFrame:
    """Rows of a dimension (`dimension_rows`) that stand below another one of their key."""
    several = frame.filter(frame.select(pl.struct(key).is_duplicated()).to_series())
    return several.join(
        several.unique(key, keep="first", maintain_order=True), on=frame.columns, how="anti", nulls_equal=True
    )


def contradictions(
    view: FeatureView, contract: Contract, slices: Sequence[Slice], frame: pl.DataFrame
) -> tuple[list[pl.DataFrame], int]:
    """(Letters for the rows of a dimension that lose to another one of their key, per `Lookup`; how many rows lose for one.)"""
    letters, refused = [], []
    for feature in view.features:
        if isinstance(feature, Lookup) and feature.source.name == contract.source.name:
            key = tuple(column for _, column in feature.keys)
            conflicts = losing(frame, key)
            refused.append(conflicts)
            letters.append(locate(contract, slices, conflicts, key, ONE_ROW))
    return letters, len(pl.concat(refused).unique())


def tell_dimension(
    plan: Plan, name: str, total: int, used: int, letters: Sequence[pl.DataFrame]
) -> tuple[pl.DataFrame, Tally]:
    """A dimension's letters, dated at the start of the interval, and its account, of `total` rows read."""
    dead = (
        concat_letters(letters)
        .unique(["file", "row"], keep="first", maintain_order=True)
        .with_columns(pl.lit(plan.start, pl.Int64).alias("time"))
    )
    return dead, Tally(name, total, used, 0, total - used - len(dead), len(dead))


def distinct(frame: pl.DataFrame, by: Sequence[str]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """(One row per value of `by`, sorted by it; the rows that contradict those.)

    Identical rows count once; of differing ones the smallest by all columns stays.
    """
    frame = frame.sort(by, maintain_order=True)
    if len(frame) < 2:
        return frame, frame.clear()
    same = pl.all_horizontal(pl.col(name).eq_missing(pl.col(name).shift(1)) for name in by)
    if not frame.select(same.slice(1).any()).item():
        return frame, frame.clear()
    frame = frame.unique().sort([*by, *(name for name in frame.columns if name not in by)])
    kept = frame.unique(by, keep="first", maintain_order=True)
    return kept, frame.join(kept, on=frame.columns, how="anti", nulls_equal=True)


def locate(
    contract: Contract, slices: Sequence[Slice], rows: pl.DataFrame, key: Sequence[str], rule: str
) -> pl.DataFrame:
    """Dead letters for every occurrence of `rows` in their files."""
    parts = []
    for each in slices if len(rows) else ():
        found = read_slices(contract, [each], numbered=True).frame.join(
            rows, on=rows.columns, how="semi", nulls_equal=True
        )
        value = pl.concat_str([pl.col(name).cast(pl.String).fill_null("null") for name in key], separator=", ")
        time = pl.col(contract.source.time).to_physical() if contract.source.time is not None else pl.lit(0, pl.Int64)
        parts.append(found.select(
            pl.lit(contract.source.name).alias("source"), pl.lit(each.path).alias("file"), pl.col("__row").alias("row"),
            pl.lit(", ".join(key)).alias("field"), pl.lit(rule).alias("rule"), value.alias("value"), time.alias("time"),
        ))  # fmt: skip
    return concat_letters(parts)


def concat_letters(letters: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """Letters of several reads."""
    return pl.concat([pl.DataFrame(schema=LETTERS), *letters])


def letters_batch(view: FeatureView, letters: Sequence[pl.DataFrame]) -> pa.RecordBatch:
    """Dead letters as a RecordBatch of `DEAD_LETTERS`; those without any time are dated 1970-01-01."""
    date = pl.col("time").clip(0).cast(pl.Datetime("us")).dt.date().alias("date")
    return batch(
        concat_letters(letters)
        .with_columns(date, pl.lit(view.name).alias("view"))
        .sort("date", "source", "file", "row"),
        DEAD_LETTERS,
    )
