"""Rows that break the contract of one view and not of another, as messages, and what each view shall make of them, by
loops over the rows that were sent."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from schemas import FeatureView, Latest, Source, Trailing
from schemas.live import live_sources, repeats_by
from tests.support import oracles
from tests.support.live_turns import read
from transforms.lineage.feature_parity import check_parity
from transforms.records.times import FOREVER
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, sources_root
from transforms.streaming.fates import RepeatMemory
from transforms.streaming.live_tables import source_record
from transforms.streaming.messages import Message, heartbeat, to_arrow
from transforms.streaming.row_origin import cut_of

SECOND = 1_000_000
START = 1_700_000_000 * SECOND
COLUMNS = {"u": pl.Int64, "k": pl.String, "v": pl.Float64, "w": pl.Float64, "s": pl.String}
asked = Source("asked", time="t", lateness="1s", columns={"id": pl.Int64, "k": pl.String, "x": pl.Float64})
events = Source("events", time="at", lateness="4s", unique="u", order="u", columns=COLUMNS)
# The same topics, as another view declares them: every row counts, and there is one column more.
every_event = Source("events", time="at", lateness="4s", order=("u", "v"), columns={**COLUMNS, "z": pl.Int32})
questions = Source("asked", time="t", lateness="1s", order=("id", "x"), columns=dict(asked.columns))
polled = Source("polled", time="t", lateness="2s", columns={"id": pl.Int64, "k": pl.String})
SENT = {"asked": asked, "events": every_event, "polled": polled}
PLACE = ("__partition", "__offset", "__place")


def version_of(column: str, over: tuple[str, ...]) -> FeatureView:
    """A version of the view `versions`, which reads one column of the events."""
    stats = ("last", "first") if column == "s" else ("sum", "max")
    features = [
        Trailing(events, by="k", over=over, stats={column: stats, "*": "count"}),
        Latest(events, by="k", columns=column, max_age="9s"),
    ]
    return FeatureView("versions", asked, "id", features)


VERSIONS = [version_of("v", ("5s",)), version_of("w", ("8s",)), version_of("v", ("6s", "all"))]
BESIDE = FeatureView(
    "beside",
    asked,
    "id",
    [
        Trailing(events, by="k", over=("3s", "all"), stats={"s": ("first", "last"), "*": "count"}),
        Trailing(asked, by="k", over="7s", stats={"x": "sum"}, name="crowd"),
    ],
)
POLLS = FeatureView(
    "polls",
    polled,
    "id",
    [
        Trailing(every_event, by="k", over="12s", stats={"v": ("sum", "count"), "z": "max"}),
        Trailing(questions, by="k", over=("4s", "all"), stats={"x": ("sum", "count")}),
    ],
)
VIEWS = [*VERSIONS, BESIDE, POLLS]


@dataclasses.dataclass(frozen=True)
class Sent:
    """A row as it was sent, with its place; a column that it does not have is not among the values."""

    source: str
    values: dict[str, Any]
    partition: int
    offset: int
    place: int

    @property
    def at(self) -> int:
        return int(self.values[str(SENT[self.source].time)])

    @property
    def origin(self) -> tuple[int, int, int]:
        return self.partition, self.offset, self.place

    def keeps(self, view: FeatureView) -> bool:
        """Whether it keeps the contract of a view, by plain words."""
        if self.source == view.spine.name:
            needed, keys = list(view.spine.schema), list(view.key)
        else:
            needed, keys = view.columns_read(self.source), list(view.events[self.source].unique or ())
        values = [self.values.get(name) for name in needed]
        return (
            all(name in self.values for name in needed)
            and all(self.values[name] is not None for name in keys)
            and not any(isinstance(value, float) and math.isinf(value) for value in values)
        )


def moment(value: int) -> str:
    return str(pl.Series([value]).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")[0])


def message(source: Source, rows: list[dict[str, Any]], partition: int, offset: int, form: str) -> Message:
    """Rows as JSON, or as Arrow if all have the same columns."""
    time = str(source.time)
    if form == "arrow" and len({tuple(row) for row in rows}) == 1:
        schema = {name: pl.Int64 if name == time else source.schema[name] for name in rows[0]}
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        value = to_arrow(frame.with_columns(pl.col(time).cast(pl.Datetime("us", "UTC"))))
    else:
        value = json.dumps([{**row, time: moment(row[time])} for row in rows]).encode()
    return Message(source.name, partition, offset, 2**51, None, value)


def a_row(chance: random.Random, source: Source, at: int) -> dict[str, Any]:
    if source.name == "events":
        number = [0.0, 0.25, 12.5, None, math.inf]
        row = {
            "at": at,
            "u": chance.choice([0, 1, 2, 3, 4, 5, None]),
            "k": chance.choice("ab"),
            "v": chance.choice(number),
            "w": chance.choice(number),
            "s": chance.choice(["x", "y", None]),
            "z": chance.choice([1, 2, None]),
        }
    else:
        row = {"t": at, "id": chance.randrange(6), "k": chance.choice("ab")}
        if source.name == "asked":
            row["x"] = chance.choice([0.5, 0.5, math.inf])
    for name in [each for each in row if each != source.time]:
        if chance.random() < 0.06:
            del row[name]
    return row


def made(chance: random.Random, count: int) -> tuple[list[list[Message]], list[Sent]]:
    """Messages in the order in which they arrive, in chunks, and the rows that they hold."""
    messages, sent = list[Message](), list[Sent]()
    offsets = {(name, partition): 0 for name in SENT for partition in (0, 1)}
    for step in range(count):
        source = SENT[chance.choice(["asked", "polled", "events", "events"])]
        rows = []
        for _ in range(chance.choice([1, 1, 2])):
            at = START + (step + chance.choice([0, 0, 1, -2, -9])) * SECOND + chance.choice([0, 0, 1])
            rows.append(a_row(chance, source, at))
        partition = chance.randrange(2)
        offset = offsets[source.name, partition]
        offsets[source.name, partition] += 1
        messages.append(message(source, rows, partition, offset, chance.choice(["json", "arrow"])))
        sent += [Sent(source.name, row, partition, offset, place) for place, row in enumerate(rows)]
    chunks, begin = [], 0
    while begin < len(messages):
        size = chance.randrange(1, 9)
        chunks.append(messages[begin : begin + size])
        begin += size
    ends = [Message(*position, offset, 2**51, *heartbeat(FOREVER)) for position, offset in offsets.items()]
    return [*chunks, ends], sent


def counting(
    view: FeatureView, name: str, rows: list[Sent], alone: set[tuple[int, int, int]], memory: RepeatMemory
) -> list[Sent]:
    """Of a source's rows that keep the contract, those that repeat none, by comparing all pairs."""
    good, by = [row for row in rows if row.keeps(view)], repeats_by(view, name)
    if not by:
        return good
    source = view.events[name]
    held = list(source.schema) if source is view.spine else view.columns_held(name)

    def order(row: Sent) -> tuple[Any, ...]:
        values = [row.values.get(column) for column in source.ties(held) if column != source.time]
        ties = [
            (value is not None, ("" if column == "s" else 0) if value is None else value)
            for column, value in zip([c for c in source.ties(held) if c != source.time], values, strict=True)
        ]
        return row.at, *ties, *row.origin

    def length(*pair: Sent) -> int:
        """The memory of the row that was accepted later."""
        spans = [
            length for length, first in memory.spans if any(first.get(row.partition, 0) <= row.offset for row in pair)
        ]
        return spans[-1]

    def repeats(row: Sent, other: Sent) -> bool:
        return (
            all(row.values[column] == other.values[column] for column in by)
            and other.origin not in alone
            and order(other) < order(row)
            and row.at - other.at <= length(row, other)
        )

    return [row for row in good if row.origin in alone or not any(repeats(row, other) for other in good)]


def frame(source: Source, rows: list[Sent]) -> pl.DataFrame:
    time = str(source.time)
    values = [{name: row.values.get(name) for name in source.schema} for row in rows]
    table = pl.DataFrame(values, schema={**source.schema, time: pl.Int64}, orient="row")
    return table.with_columns(pl.col(time).cast(pl.Datetime("us", "UTC"))).select(source.schema.keys())


def memory_of(served: Sequence[Sequence[FeatureView]], name: str, keep: int) -> int:
    """For how long jobs that served these views, one after the other, recognise repeats of a source."""
    lengths = [0]
    for views in served:
        some = [view for view in views if name in view.events]
        if any(repeats_by(view, name) for view in some):
            lengths.append(2 * max(view.reach(name) for view in some) or keep)
    return max(lengths)


def audit(view: FeatureView, store: Path, sent: list[Sent], memory: dict[str, int], last: bool = True) -> int:
    """Checks the feature rows of a view against all rows that were sent.

    Args:
        last: whether the view was served to the end, so that no spine row is missing.

    Returns:
        How many feature rows there are.
    """
    table = read(features_live_uri(str(store), view.name, view.fingerprint))
    if not len(table):
        return 0
    parity = check_parity(view, str(store))
    assert parity.differing == 0, {n: e.examples for n, e in parity.features.items() if e.differing}
    assert parity.unaccounted == 0 or not last
    alone, spans = {}, {}
    for name in view.events:
        record = source_record(str(store), name)
        spans[name] = RepeatMemory() if record is None else record.memory.get(name, RepeatMemory())
        assert spans[name].length <= memory.get(name, 0)
        rows = read(f"{sources_root(str(store))}/{name}")
        alone[name] = set(rows.filter("__uncompared").select(PLACE).iter_rows()) if len(rows) else set()
    for row in table.iter_rows(named=True):
        cut = cut_of(row["__cut"])
        assert {name for name, _ in cut} <= live_sources(view).keys()
        tables = {}
        for name, source in view.events.items():
            seen = [each for each in sent if each.source == name and each.offset < cut.get((name, each.partition), 0)]
            tables[name] = frame(source, counting(view, name, seen, alone[name], spans[name]))
        origin = tuple(row[name] for name in PLACE)
        (spine,) = [each for each in sent if each.source == view.spine.name and each.origin == origin]
        assert spine.keeps(view)
        (expected,) = oracles.features(view, frame(view.spine, [spine]), tables)
        assert {name: row[name] for name in view.columns} == {name: expected[name] for name in view.columns}
    return len(table)


def rejected(view: FeatureView, store: Path) -> list[tuple[str, int, int, int]]:
    """Places of the dead letters of a version of a view, without those of spine rows that kept the contract."""
    letters = read(live_dead_letters_uri(str(store), view.name))
    if not len(letters):
        return []
    own = (pl.col("fingerprint") == view.fingerprint) | pl.col("fingerprint").is_null()
    broken = letters.filter(own, ~pl.col("rule").str.contains("one key asks|a question comes"))
    return list(broken.select("source", "partition", "offset", "place").iter_rows())
