"""Every readable row is accepted, and each view sorts them by its own contract: the journal, a job that continues and
parity agree with a loop over the messages that were sent."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import tempfile
from pathlib import Path
from typing import Any

import polars as pl
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import FeatureView, Latest, Source, Trailing
from tests.support import oracles
from tests.support.live_turns import read
from tests.support.turns import Job, JobOptions, unread
from transforms.lineage.feature_parity import check_parity
from transforms.records.times import FOREVER
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, sources_root
from transforms.streaming.fates import least_memory
from transforms.streaming.messages import Message, heartbeat, to_arrow
from transforms.streaming.row_origin import cut_of
from transforms.streaming.view_contracts import contract_of, keeps, sort_rows

SECOND = 1_000_000
START = 1_700_000_000 * SECOND
asked = Source("asked", time="t", lateness="1s", columns={"id": pl.Int64, "k": pl.String, "x": pl.Float64})
events = Source(
    "events",
    time="at",
    lateness="4s",
    unique="u",
    order="u",
    columns={"u": pl.Int64, "k": pl.String, "v": pl.Float64, "w": pl.Float64, "s": pl.String},
)
SOURCES = {"asked": asked, "events": events}


def view_of(column: str, over: tuple[str, ...]) -> FeatureView:
    """A version of the view, which reads one column of the events."""
    stats = ("last", "first") if column == "s" else ("sum", "max")
    features = [
        Trailing(events, by="k", over=over, stats={column: stats, "*": "count"}),
        Latest(events, by="k", columns=column, max_age="9s"),
    ]
    return FeatureView("versions", asked, "id", features)


VIEWS = [view_of("v", ("5s",)), view_of("w", ("8s",)), view_of("v", ("6s", "all")), view_of("s", ("7s", "all"))]


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
        return int(self.values[str(SOURCES[self.source].time)])

    def keeps(self, view: FeatureView) -> bool:
        """Whether it keeps the contract of a view, by plain words."""
        if self.source == "asked":
            needed, keys = list(asked.schema), ["id"]
        else:
            needed, keys = view.columns_read("events"), ["u"]
        values = [self.values.get(name) for name in needed]
        return (
            all(name in self.values for name in needed)
            and all(self.values[name] is not None for name in keys)
            and not any(isinstance(value, float) and math.isinf(value) for value in values)
        )


def moment(value: int) -> str:
    return pl.Series([value]).cast(pl.Datetime("us")).dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")[0]


def message(source: Source, rows: list[dict[str, Any]], partition: int, offset: int, form: str) -> Message:
    """Rows as JSON, or as Arrow if all have the same columns."""
    time = str(source.time)
    if form == "arrow" and len({tuple(row) for row in rows}) == 1:
        frame = pl.DataFrame(
            rows, schema={name: source.schema[name] for name in rows[0] if name != time} | {time: pl.Int64}
        )
        value = to_arrow(frame.with_columns(pl.col(time).cast(pl.Datetime("us", "UTC"))))
    else:
        value = json.dumps([{**row, time: moment(row[time])} for row in rows]).encode()
    return Message(source.name, partition, offset, 2**51, None, value)


def made(chance: random.Random, count: int) -> tuple[list[list[Message]], list[Sent]]:
    """Messages in the order in which they arrive, in chunks, and the rows that they hold."""
    messages, sent = list[Message](), list[Sent]()
    offsets = {(name, partition): 0 for name in SOURCES for partition in (0, 1)}
    for step in range(count):
        source = chance.choice([asked, events, events])
        rows = []
        for _ in range(chance.choice([1, 1, 2])):
            at = START + (step + chance.choice([0, 0, 1, -2, -9])) * SECOND + chance.choice([0, 0, 1])
            if source is asked:
                row = {
                    "t": at,
                    "id": chance.randrange(6),
                    "k": chance.choice("ab"),
                    "x": chance.choice([0.5, 0.5, math.inf]),
                }
            else:
                number = [0.0, 0.25, 12.5, None, math.inf]
                row = {
                    "at": at,
                    "u": chance.choice([0, 1, 2, 3, 4, 5, None]),
                    "k": chance.choice("ab"),
                    "v": chance.choice(number),
                    "w": chance.choice(number),
                    "s": chance.choice(["x", "y", None]),
                }
            for name in [each for each in row if each != source.time]:
                if chance.random() < 0.06:
                    del row[name]
            rows.append(row)
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


def counting(view: FeatureView, rows: list[Sent], alone: set[tuple[int, int, int]], memory: int) -> list[Sent]:
    """Of the events that keep the contract, those that repeat none, by comparing all pairs."""
    good = [row for row in rows if row.keeps(view)]
    held = view.columns_held("events")

    def order(row: Sent) -> tuple[Any, ...]:
        ties = [
            (row.values.get(name) is not None, row.values.get(name) or 0) for name in events.ties(held) if name != "s"
        ]
        text = [row.values.get("s") or ""] if "s" in held else []
        return row.at, *ties, *text, row.partition, row.offset, row.place

    def compared(row: Sent) -> bool:
        return (row.partition, row.offset, row.place) not in alone

    return [
        row
        for row in good
        if not compared(row)
        or not any(
            other.values["u"] == row.values["u"]
            and compared(other)
            and order(other) < order(row)
            and row.at - other.at <= memory
            for other in good
        )
    ]


def frame(source: Source, rows: list[Sent]) -> pl.DataFrame:
    time = str(source.time)
    values = [{name: row.values.get(name) for name in source.schema} for row in rows]
    made = pl.DataFrame(values, schema={**source.schema, time: pl.Int64}, orient="row")
    return made.with_columns(pl.col(time).cast(pl.Datetime("us", "UTC"))).select(source.schema.keys())


def audit(view: FeatureView, store: Path, sent: list[Sent], memory: int) -> int:
    """Checks the feature rows of a view against all rows that were sent.  Returns how many there are."""
    table = read(features_live_uri(str(store), view.name, view.fingerprint))
    if not len(table):
        return 0
    parity = check_parity(view, str(store))
    assert parity.differing == parity.unaccounted == 0
    stored = (
        read(f"{sources_root(str(store))}/events") if any(row.source == "events" for row in sent) else pl.DataFrame()
    )
    alone = (
        set(stored.filter("__uncompared").select("__partition", "__offset", "__place").iter_rows())
        if len(stored)
        else set()
    )
    for row in table.iter_rows(named=True):
        cut = cut_of(row["__cut"])
        seen = [
            each for each in sent if each.source == "events" and each.offset < cut.get(("events", each.partition), 0)
        ]
        place = row["__partition"], row["__offset"], row["__place"]
        (spine,) = [
            each for each in sent if each.source == "asked" and (each.partition, each.offset, each.place) == place
        ]
        assert spine.keeps(view)
        tables = {"events": frame(events, counting(view, seen, alone, memory))}
        (expected,) = oracles.features(view, frame(asked, [spine]), tables)
        assert {name: row[name] for name in view.columns} == {name: expected[name] for name in view.columns}
    return len(table)


@settings(max_examples=25, deadline=None)
@given(
    chance=st.randoms(use_true_random=True),
    count=st.integers(1, 40),
    served=st.lists(st.sampled_from(VIEWS), min_size=1, max_size=3),
    shards=st.sampled_from([1, 2]),
    keep=st.sampled_from([1, 30]),
)
def test_each_version_of_a_view_counts_the_rows_that_keep_its_own_contract(
    chance: random.Random, count: int, served: list[FeatureView], shards: int, keep: int
) -> None:
    """One after the other serves the store, each from the tables of the one before."""
    chunks, sent = made(chance, count)
    begin = {name: {0: 0, 1: 0} for name in SOURCES}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        parts = sorted(chance.sample(range(1, len(chunks)), min(len(served) - 1, len(chunks) - 1)))
        bounds = [0, *parts, len(chunks)]
        memory = 0
        for view, first, end in zip(served, bounds, bounds[1:], strict=False):
            memory = max(memory, least_memory(view, "events", keep * SECOND))
            job = Job(view, store, store, begin, JobOptions(f"r{first}", shards, keep * SECOND))
            for number in range(first, end):
                for chunk in chunks[: number + 1] if number == first else [chunks[number]]:
                    if again := unread(chunk, job.start):
                        job.take(again)
                if chance.random() < 0.3:
                    job.commit()
            job.commit()
        accepted = {
            (name, *place)
            for name in SOURCES
            if len(rows := read(f"{sources_root(folder)}/{name}"))
            for place in rows.select("__partition", "__offset", "__place").iter_rows()
        }
        assert accepted == {(row.source, row.partition, row.offset, row.place) for row in sent}
        view = served[min(len(served), len(bounds) - 1) - 1]
        letters = read(live_dead_letters_uri(folder, view.name))
        rejected = (
            letters.filter(pl.col("rule").str.contains("one key asks|a question comes").not_())
            if len(letters)
            else letters
        )
        places = list(rejected.select("source", "partition", "offset", "place").iter_rows()) if len(rejected) else []
        assert len(places) == len(set(places))
        broken = {(row.source, row.partition, row.offset, row.place) for row in sent if not row.keeps(view)}
        assert len(bounds) > 2 or set(places) == broken
        audit(view, store, sent, memory)


rows_of_events = st.lists(
    st.fixed_dictionaries(
        {
            "u": st.sampled_from([None, 1, 2]),
            "k": st.sampled_from(["a", None]),
            "v": st.sampled_from([None, 1.0, math.inf, 1e39]),
            "w": st.sampled_from([None, 1.0, -math.inf]),
            "s": st.sampled_from([None, "x"]),
            "absent": st.sets(st.sampled_from(["u", "k", "v", "w", "s"]), max_size=2),
        }
    ),
    max_size=12,
)


@given(rows=rows_of_events, view=st.sampled_from(VIEWS))
def test_a_row_keeps_the_contract_or_is_one_dead_letter(rows: list[dict[str, Any]], view: FeatureView) -> None:
    frame = pl.DataFrame(
        {
            "at": pl.Series([START] * len(rows), dtype=pl.Int64).cast(pl.Datetime("us", "UTC")),
            **{
                name: pl.Series(
                    [None if name in row["absent"] else row[name] for row in rows], dtype=events.schema[name]
                )
                for name in events.columns
            },
            "__absent": pl.Series(
                [json.dumps(sorted(row["absent"])) if row["absent"] else None for row in rows], dtype=pl.String
            ),
            "__partition": pl.Series([0] * len(rows), dtype=pl.Int32),
            "__offset": pl.Series(range(len(rows)), dtype=pl.Int64),
            "__place": pl.Series([0] * len(rows), dtype=pl.Int32),
            "__arrived": pl.Series([START] * len(rows), dtype=pl.Int64),
        }
    )
    contract = contract_of(view, "events")
    read = set(contract.columns)

    def good(row: dict[str, Any]) -> bool:
        numbers = [row[name] for name in ("v", "w") if name in read and row[name] is not None]
        return not row["absent"] & read and row["u"] is not None and all(abs(each) < 3.5e38 for each in numbers)

    expected = [number for number, row in enumerate(rows) if good(row)]
    kept, broken = sort_rows(contract, frame)
    assert kept["__offset"].to_list() == expected
    assert keeps(contract, frame).nonzero()[0].tolist() == expected
    dead = pl.concat(broken)["offset"].to_list() if broken else []
    assert sorted(dead) == [number for number in range(len(rows)) if number not in expected]
