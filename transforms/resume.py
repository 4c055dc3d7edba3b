"""Going on after a stop, with nothing but the tables: what was accepted, what was answered, and where to read on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from datetime import date
from typing import Any

import polars as pl

from schemas.live import repeats_by
from schemas.views import FeatureView
from transforms.clock import ALWAYS, FOREVER
from transforms.contracts import day_of
from transforms.ids import row_ids
from transforms.inventory import source_uri
from transforms.journal import ASKED, PENDING, Journal, Turn
from transforms.live_tables import app_of, features_live_uri, last_told, live_letters_uri, sources_root
from transforms.messages import ORIGIN
from transforms.micros import PLACE, digest, known_columns, rid
from transforms.replay import sources_of
from transforms.shards import RID
from transforms.tables import data_files, open_table, read_file

# Rows given to the shards in one turn.
SEED_ROWS = 200_000
# Times beyond these (the years 1899 and 9999) have no date in Python.
EARLIEST, LATEST = -(2**51), 253_402_214_400_000_000


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a job begins: the last turn, next offset per source and partition, and what the tables said of the clock."""

    turn: int
    next: dict[str, dict[str, int]]
    clock: dict[str, Any]
    counts: dict[str, dict[str, int]]
    versions: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find_start(view: FeatureView, store: str, begin: Mapping[str, Mapping[int, int]]) -> Start:
    """Where to go on: after the last commit of each source, or at `begin` (first offsets of the partitions) where there is none."""
    turn, offsets, clock, counts, versions = 0, {}, {}, {}, {}
    for name in sources_of(view):
        table = open_table(source_uri(sources_root(store), name))
        told = last_told(table, app_of(name))
        done = told.get("next", {}).get(name, {})
        offsets[name] = {str(number): int(done.get(str(number), first)) for number, first in begin[name].items()}
        if told:
            assert table is not None
            versions[name] = int(table.version())
            clock[name], counts[name] = told["clock"][name], told["counts"][name]
        turn = max(turn, told.get("turn", 0))
    answers = open_table(features_live_uri(store, view.name, view.fingerprint))
    turn = max(turn, last_told(answers, app_of(view.name)).get("turn", 0))
    if answers is not None:
        versions["?answers"] = int(answers.version())
    return Start(turn, offsets, clock, counts, versions)


def resume(journal: Journal, store: str, start: Start, now: int) -> list[Turn]:
    """Bring a new journal to where the tables stand; turns that give the shards what they need to know."""
    view = journal.view
    journal.turn_number, journal.began = start.turn, start.turn + 1
    journal.next = {name: {int(number): offset for number, offset in each.items()} for name, each in start.next.items()}
    journal.clock.load(start.clock)
    journal.counts.update({name: dict(each) for name, each in start.counts.items()})
    for name, partitions in journal.next.items():
        for number in partitions:
            journal.clock.expect(name, number, now)
            journal.clock.partitions[name][number].heard = now
    if view.spine.name in start.versions:
        _ask_again(journal, store, start, now)
    journal.advance(now)
    return _seed(journal, store, start)


def _ask_again(journal: Journal, store: str, start: Start, now: int) -> None:
    """Questions without an answer wait again; those with one are remembered."""
    view = journal.view
    floor = journal.clock.settled(view.spine.name, now)
    told = last_told(open_table(features_live_uri(store, view.name, view.fingerprint)), app_of(view.name))
    # Before this no question was waiting when the answers were last committed.
    low = ALWAYS
    if told:
        oldest = told["oldest_pending"]
        settled = told["clock"][view.spine.name]["settled"]
        low = min(FOREVER if oldest is None else oldest, settled - journal.keep, floor - journal.keep)
    questions = rows_from(store, view, view.spine.name, start.versions[view.spine.name], low)
    if not len(questions):
        return
    questions = questions.with_columns(
        row_ids(view.name, [questions[name] for name in (*view.key, view.time)]), digest(questions, list(view.spine.schema)),
        (pl.col(view.time).to_physical() < floor).alias("__late"), pl.col("__arrived").to_physical(),
    )  # fmt: skip
    refused = _letters(store, view)
    questions = (
        questions.join(refused, on=PLACE, how="anti")
        .sort(["row_id", *view.spine.schema, *PLACE])
        .unique("row_id", keep="first", maintain_order=True)
    )
    waiting = questions.join(_answered(store, view, start, low), on="row_id", how="anti")
    columns = [*view.spine.schema, *ORIGIN, "row_id", "__digest", "__late"]
    journal.stores[PENDING].add(waiting.select(columns))
    journal.stores[ASKED].add(questions.select("row_id", pl.col(view.time).to_physical().alias("time"), "__digest"))


def _seed(journal: Journal, store: str, start: Start) -> list[Turn]:
    """Turns that give the shards every event that a window can still reach."""
    view, turns = journal.view, []
    for name, source in view.events.items():
        if name not in start.versions:
            continue
        low = journal.horizon - 2 * view.reach(name) if journal.horizon > ALWAYS else ALWAYS
        rows = rows_from(store, view, name, start.versions[name], low)
        columns = view.columns_read(name)
        if repeats_by(view, name):
            gone = rows["__instead"].drop_nulls()
            rows = rows.with_columns(rid(rows)).filter(pl.col("__counted") & ~pl.col(RID).is_in(gone.implode()))
            columns = [*columns, RID]
            journal.stores[name].add(rows.select(*known_columns(view, name), RID))
        moment = pl.col(str(source.time)).to_physical()
        rows = rows.select(columns).filter(
            moment >= journal.horizon - view.reach(name) if journal.horizon > ALWAYS else True
        )
        for begin in range(0, len(rows), SEED_ROWS):
            turns.append(journal.seed(name, rows.slice(begin, SEED_ROWS)))
    return turns


def rows_from(store: str, view: FeatureView, source: str, version: int, low: int) -> pl.DataFrame:
    """Accepted rows of a source known from `low` µs on, as of a version of its table."""
    declared = sources_of(view)[source]
    table = open_table(source_uri(sources_root(store), source), version)
    assert table is not None
    extra = ["__counted", "__instead"] if repeats_by(view, source) else []
    columns = [*declared.schema, *ORIGIN, *extra]
    files = data_files(table, _day(low))
    parts = [pl.DataFrame(pl.from_arrow(read_file(file, columns))) for file in files]
    empty = pl.DataFrame(
        schema={
            **declared.schema,
            **ORIGIN,
            "__arrived": pl.Datetime("us", "UTC"),
            **({"__counted": pl.Boolean, "__instead": pl.Int64} if extra else {}),
        }
    )
    return pl.concat([empty, *parts]).filter(pl.col(str(declared.time)).to_physical() >= low)


def _answered(store: str, view: FeatureView, start: Start, low: int) -> pl.DataFrame:
    """Ids of the answers in the table."""
    none = pl.DataFrame(schema={"row_id": pl.Int64})
    if "?answers" not in start.versions:
        return none
    table = open_table(features_live_uri(store, view.name, view.fingerprint), start.versions["?answers"])
    assert table is not None
    files = data_files(table, _day(low))
    return pl.concat([none, *(pl.DataFrame(pl.from_arrow(read_file(file, ["row_id"]))) for file in files)])


def _letters(store: str, view: FeatureView) -> pl.DataFrame:
    """Places of the questions that were set aside."""
    none = pl.DataFrame(schema={name: ORIGIN[name] for name in PLACE})
    table = open_table(live_letters_uri(store, view.name))
    if table is None:
        return none
    read = [
        pl.DataFrame(pl.from_arrow(read_file(file, ["source", "partition", "offset", "place"])))
        for file in data_files(table)
    ]
    return pl.concat(
        [
            none,
            *(
                part.filter(pl.col("source") == view.spine.name).select(pl.col(name[2:]).alias(name) for name in PLACE)
                for part in read
            ),
        ]
    )


def _day(low: int) -> date | None:
    """The date to read from; None: all there are."""
    return None if low <= EARLIEST else day_of(min(low, LATEST))


def start_of(head: Mapping[str, Any]) -> Start:
    """`Start` of what `to_json` gave."""
    return Start(**json.loads(json.dumps(head)))
