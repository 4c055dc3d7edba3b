"""Helpers and fixtures for: live answers against the slow and obvious one: random arrival, ties, late rows, repeats,
and stops at any moment."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.views import lifetime_sources
from tests.support import histories, oracles
from tests.support.turns import Job, JobOptions, unread
from transforms.lineage.feature_parity import check_parity
from transforms.records.times import FOREVER
from transforms.storage.delta_tables import data_files, open_table, read_file
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, sources_root
from transforms.streaming.live_dimensions import kept_version
from transforms.streaming.live_tables import TableWriter
from transforms.streaming.messages import Message, heartbeat, to_arrow
from transforms.streaming.row_origin import ORIGIN_COLUMNS, cut_of, row_identity

events = Source(
    "events",
    time="at",
    lateness="5s",
    columns={"k": pl.String, "g": pl.Int32, "v": pl.Float64, "n": pl.Int64, "s": pl.String, "b": pl.Boolean},
)
sales = Source(
    "sales", time="at", lateness="2s", unique="n", order="v", columns={"k": pl.String, "n": pl.Int64, "v": pl.Float64}
)
placed = Source("placed", time="at", event_time="happened", columns={"k": pl.String, "v": pl.Float64, "s": pl.String})
spine_rows = Source("questions", time="t", lateness="1s", columns=dict(histories.spine_rows.columns))
shops = histories.shops
view = FeatureView(
    "everything",
    spine_rows,
    key="id",
    features=[
        Derived(double=pl.col("x") * 2, near=pl.col("g") // 2),
        Trailing(
            events,
            by="k",
            over=("1s", "10s", "1m"),
            stats={
                "v": ("count", "sum", "mean", "std", "min", "max", "median", "q95", "first", "last", "n_unique"),
                "s": ("last", "n_unique"),
                "*": "count",
            },
        ),
        Trailing(
            events, by=("k", "g"), over="30s", where=pl.col("v") > 0, name="positive", stats={"v": ("sum", "var")}
        ),
        Trailing(events, by="b", over="5s", stats={"v": ("mean", "last")}),
        Trailing(sales, by="k", over=("10s", "1m"), stats={"v": ("sum", "mean", "first"), "n": "max", "*": "count"}),
        Latest(sales, by="k", columns=("v", "n"), max_age="20s"),
        Trailing(placed, by="k", over="10s", stats={"v": ("sum", "last"), "*": "count"}),
        Latest(events, by="g", columns=("v", "s"), max_age="20s"),
        Trailing(spine_rows, by="k", over="10s", stats={"x": ("mean", "last"), "*": "count"}, name="crowd"),
        Lookup(shops, by="k", columns=("size", "rate")),
        Derived(rated=pl.col("x") * pl.col("shops_rate"), more=pl.col("events_by_k_v_sum_10s") + pl.col("double")),
    ],
)
SOURCES = {source.name: source for source in (spine_rows, events, sales, placed)}
VALUES: dict[str, list[Any]] = {
    "id": [1, 2, 3, 4, 5, 6],
    "k": ["a", "b", 'é/"', "", "a=b c", None],
    "g": [1, 2, -5, None],
    "on": [None],
    "b": [True, False, None],
    "x": [0.0, 0.5, 3.25, None],
    "v": [0.0, 0.1, 1.0, 1e-5, 1e10, 4194304.25, 12.34, -99.99, None],
    "n": [1, 2, -5, 10**15],
    "s": ["x", "y", "", None],
}


def frame(random: Random, source: Source, size: int, step: int = 1) -> pl.DataFrame:
    """Rows of a source with many ties, at 70 moments `step` seconds apart or a microsecond beside them."""

    def moment() -> Any:
        return histories.at(step * random.randrange(70), random.choice([0, 0, 0, 1, -1, 500_000]))

    rows = []
    for _ in range(size):
        row = {name: random.choice(VALUES[name]) for name in source.columns}
        row[str(source.time)] = moment()
        if source is sales:
            row["n"] = random.randrange(8)
        if source.event_time is not None:
            row[source.event_time] = min(moment(), row[str(source.time)])
        rows.append(row)
    return pl.DataFrame(rows, schema=source.schema, orient="row")


def stream(random: Random, scale: int = 1, step: int = 1) -> list[list[Message]]:
    """Messages in the order they arrive, in chunks: any order of rows, any partition, several rows a message or one."""
    rows: list[tuple[str, pl.DataFrame]] = []
    for source, size in ((spine_rows, 12), (events, 25), (sales, 15), (placed, 10)):
        made = frame(random, source, random.randrange(size * scale), step)
        rows += [(source.name, part) for part in made.iter_slices(random.choice([1, 1, 3])) if len(part)]
    random.shuffle(rows)
    if random.random() < 0.7:  # mostly in order: late rows are the exception
        slack = step * random.choice([0, 3, 10])
        rows.sort(
            key=lambda each: each[1][str(SOURCES[each[0]].time)].max() + timedelta(seconds=random.uniform(0, slack))
        )  # type: ignore[operator]
    return delivered(random, rows)


def delivered(random: Random, rows: list[tuple[str, pl.DataFrame]]) -> list[list[Message]]:
    """Parts in the order in which they arrive, in chunks, on two partitions; at last each says that nothing follows."""
    offsets: dict[tuple[str, int], int] = {}
    messages = []
    for name, part in rows:
        position = name, random.randrange(2)
        messages.append(Message(*position, offsets.get(position, 0), 2**51, None, to_arrow(part)))
        offsets[position] = offsets.get(position, 0) + 1
    chunks, start = [], 0
    while start < len(messages):
        size = random.randrange(1, 12)
        chunks.append(messages[start : start + size])
        start += size
    ends = [
        Message(name, number, offsets.get((name, number), 0), 2**51, *heartbeat(FOREVER))
        for name in SOURCES
        for number in (0, 1)
    ]
    return [*chunks, ends]


def read(uri: str) -> pl.DataFrame:
    table = open_table(uri)
    return (
        pl.concat([pl.DataFrame(pl.from_arrow(read_file(file))) for file in data_files(table)], how="diagonal")
        if table
        else pl.DataFrame()
    )


class Killed(Exception):
    pass


@contextlib.contextmanager
def dying_after(appends: int) -> Iterator[None]:
    """The process dies when so many tables have been committed."""
    append, done = TableWriter.append, []

    def counted(self: TableWriter, *args: Any) -> int:
        if len(done) == appends:
            raise Killed
        done.append(self.uri)
        return append(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "append", counted)
        yield


def run(
    store: Path,
    chunks: list[list[Message]],
    commits: set[int],
    kills: Mapping[int, int | None],
    keep: int = 30_000_000,
    make: Callable[..., Job] = functools.partial(Job, view),
) -> Job:
    """A job over `chunks`, committing after some and killed after others, perhaps amid a commit; it starts again from
    the tables."""
    dimensions = store / "in"
    (dimensions / "shops").mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {"k": ["a", "b"], "size": [1, None], "name": ["x", "y"], "rate": [0.1, 2.5]}, schema=shops.schema
    ).write_parquet(dimensions / "shops" / "s.parquet")
    begin = {name: {0: 0, 1: 0} for name in SOURCES}
    job = make(store, dimensions, begin, JobOptions(keep=keep))
    for number, chunk in enumerate(chunks):
        job.take(unread(chunk, job.start))
        if number in commits:
            job.commit()
        if number in kills:
            amid = kills[number]
            if amid is not None:
                with dying_after(amid), contextlib.suppress(Killed):
                    job.commit()
            job = make(store, dimensions, begin, JobOptions(f"r{number}", keep=keep))
            for earlier in chunks[: number + 1]:
                if again := unread(earlier, job.start):
                    job.take(again)
    job.commit()
    return job


def audit(folder: str, chunks: list[list[Message]], job: Job) -> None:
    """Every row is in its table once, every spine row computed once or rejected, and every feature row is what batch
    gives."""
    view, every = job.view, totals(chunks)
    for name in SOURCES:  # every row is in its table once
        assert (len(read(f"{sources_root(folder)}/{name}")) or 0) == every[name]
    if not every["questions"]:
        return
    rows = read(f"{sources_root(folder)}/questions")
    distinct = rows.unique(["id", "t"])
    feature_rows = read(features_live_uri(folder, view.name, view.fingerprint))
    dead_letters = read(live_dead_letters_uri(folder, view.name))
    lost = dead_letters.filter(pl.col("rule").str.contains("no later than")) if len(dead_letters) else dead_letters
    refused = (
        rows.join(lost.select(pl.col(name[2:]).alias(name) for name in ORIGIN_COLUMNS), on=ORIGIN_COLUMNS, how="semi")
        if len(lost)
        else rows.clear()
    )
    unanswered = distinct.join(feature_rows, on=["id", "t"], how="anti") if len(feature_rows) else distinct
    assert len(unanswered.join(refused, on=["id", "t"], how="anti")) == 0
    assert not len(job.journal.stores["?pending"])
    if not len(feature_rows):
        return
    assert feature_rows["row_id"].n_unique() == len(feature_rows)
    found = check_parity(view, folder)
    assert found.differing == 0, {name: each.examples for name, each in found.features.items() if each.differing}
    assert found.feature_rows == len(feature_rows)
    against_oracle(view, folder, feature_rows.head(4))


def totals(chunks: list[list[Message]]) -> dict[str, int]:
    from transforms.streaming.messages import from_arrow

    result = dict.fromkeys(SOURCES, 0)
    for message in (message for chunk in chunks for message in chunk if message.key is None):
        result[message.topic] += from_arrow(message.value).num_rows
    return result


def against_oracle(view: FeatureView, folder: str, feature_rows: pl.DataFrame) -> None:
    """A few answers by scanning every row that their cut shows."""
    for feature_row in feature_rows.iter_rows(named=True):
        cut = cut_of(feature_row["__cut"])
        versions = json.loads(feature_row["__dimensions"])
        assert versions.keys() == view.dimensions.keys()
        tables = {name: kept_version(f"{folder}/dimensions", name, version) for name, version in versions.items()}
        for name in SOURCES:
            rows = read(f"{sources_root(folder)}/{name}")
            seen = [row["__offset"] < cut.get((name, row["__partition"]), 0) for row in rows.iter_rows(named=True)]
            rows = (
                rows.filter(pl.Series(seen, dtype=pl.Boolean))
                if len(rows)
                else pl.DataFrame(schema=SOURCES[name].schema)
            )
            if name in lifetime_sources(view) and "__counted" in rows.columns:  # state does not remember all history
                replaced = rows["__instead"].drop_nulls().implode()
                rows = rows.filter(pl.col("__counted"), ~row_identity(rows).is_in(replaced))
            elif name == "sales":  # the first known stays
                rows = rows.sort("n", "at", "v", "k").unique("n", keep="first")
            elif name == "questions":  # each is sent once; of contradicting ones the smallest counts
                rows = rows.sort("t", "id", *spine_rows.columns).unique(["t", "id"], keep="first")
            tables[name] = rows.select(SOURCES[name].schema.keys())
        position = (
            (pl.col("__partition") == feature_row["__partition"])
            & (pl.col("__offset") == feature_row["__offset"])
            & (pl.col("__place") == feature_row["__place"])
        )
        spine_row = read(f"{sources_root(folder)}/questions").filter(position).select(spine_rows.schema.keys())
        (expected,) = oracles.features(view, spine_row, tables)
        for name in view.columns:
            assert same(feature_row[name], expected[name]), (name, feature_row[name], expected[name])


def same(left: Any, right: Any) -> bool:
    return type(left) is type(right) and bool(left == right)
