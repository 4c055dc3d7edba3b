"""Makes the stores beside this file.  Run once, with the code of commit 3d8d05f, whose modules it
imports; it is kept to say how they were made.

`PYTHONPATH=. python tests/data/stores/make_stores.py [NAME…]` from the project's root writes `NAME.tar.gz`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl

from beam_pipelines import cli
from schemas import load_definition
from transforms import replay
from transforms.messages import Message
from transforms.tables import data_files, open_table, read_file

HERE = Path(__file__).parent
# Where they are made; `tests/support/stores.py` writes another folder in its place where the registry names it.
ROOT = Path("/tmp/millrace-stores")
START = datetime(2024, 3, 1, tzinfo=UTC)
MOMENT = pl.Datetime("us", "UTC")
IMPORTS = """import polars as pl
from schemas import Derived, FeatureView, Gates, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

"""


def at(days: float, microseconds: int = 0) -> datetime:
    return START + timedelta(days=days, microseconds=microseconds)


class Made:
    """A store being made: `<ROOT>/<name>/store`, its definitions beside it."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, ROOT / name
        self.store = self.folder / "store"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.store.mkdir(parents=True)
        self.expected: dict[str, Any] = {"fingerprints": {}}

    def define(self, text: str, file: str = "definition.py") -> Path:
        path = self.folder / file
        path.write_text(IMPORTS + text.strip() + "\n")
        self.expected["fingerprints"][file] = load_definition(str(path)).view.fingerprint
        return path

    def put(self, source: str, frame: pl.DataFrame, file: str = "part-0.parquet", root: Path | None = None) -> None:
        path = (root or self.store / "sources") / source / file
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path, use_pyarrow=True)
        os.utime(path, (1_710_000_000, 1_710_000_000))  # whole seconds, which an archive keeps

    def millrace(self, command: str, *flags: str, definition: str = "definition.py", store: Path | None = None) -> None:
        where = ["--definition", str(self.folder / definition), "--store", str(store or self.store)]
        assert cli.main([command, *where, *flags]) == 0

    def rows(self, *position: str) -> pl.DataFrame:
        """The table at a place of the store; `*` stands for the only name there."""
        (path,) = self.store.glob("/".join(position))
        table = open_table(str(path))
        assert table is not None
        parts = [pl.DataFrame(pl.from_arrow(read_file(file))) for file in data_files(table)]
        return pl.concat(parts, how="diagonal_relaxed")

    def pack(self) -> None:
        (self.folder / "expected.json").write_text(json.dumps(self.expected, indent=1, ensure_ascii=False) + "\n")
        shutil.copy(self.folder / "expected.json", HERE / f"{self.name}.json")
        for path in self.store.rglob("__pycache__"):
            shutil.rmtree(path)
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)

        def nobody(entry: tarfile.TarInfo) -> tarfile.TarInfo:
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            return entry

        path = HERE / f"{self.name}.tar.gz"
        with tarfile.open(path, "w:gz", compresslevel=9, format=tarfile.PAX_FORMAT) as archive:
            for each in sorted(self.folder.iterdir()):
                archive.add(each, each.name, filter=nobody)
        print(f"{path.name}: {path.stat().st_size:,} bytes", file=sys.stderr)


# -- shop ----------------------------------------------------------------------------------------------------------

SHOP_SOURCES = """
visits = Source("visits", time="asked", columns={"visit": pl.Int64, "shop": pl.String, "age": pl.Float64})
sales = Source("sales", time="sold", unique="visit", order="visit", lateness="2h",
               columns={"visit": pl.Int64, "shop": pl.String, "amount": pl.Float64})
stock = Source("stock", time="counted", lateness="2h",
               columns={"shop": pl.String, "pieces": pl.Int64, "note": pl.String})
shops = Source("shops", columns={"shop": pl.String, "city": pl.String, "rent": pl.Float64})
"""
SHOP_MODEL = """
model = Model(
    view, Label(sales, on="visit", value=pl.col("amount") > 0, within="1d", absent=0),
    TimeSplit("5d", "5d", embargo="1d"),
    encode={"shop": encoders.OneHot(), "shops_city": encoders.Ordinal(), "stock_note": encoders.Ordinal()},
    params={"max_depth": 3, "eta": 0.3}, rounds=8, gates=Gates(at_least={"auc": 0.5}),
)
"""
SHOP = (
    SHOP_SOURCES
    + """
view = FeatureView("buying", visits, key="visit", features=[
    Derived(age=pl.col("age"), decades=pl.col("age") / 10.0),
    Trailing(sales, by="shop", over=("1d", "3d"),
             stats={"amount": ("mean", "sum", "std", "max", "q95", "count"), "*": "count"}),
    Trailing(sales, by="shop", over="2d", where=pl.col("amount") > 5.0, stats={"*": "count"}, name="dear"),
    Trailing(visits, by="shop", over="2d", stats={"age": "mean", "visit": "n_unique"}),
    Latest(stock, by="shop", columns=("pieces", "note"), max_age="3d"),
    Lookup(shops, by="shop", columns=("city", "rent")),
    Derived(busy=pl.col("sales_by_shop_count_1d") + 1),
])
"""
    + SHOP_MODEL
)
LIVE = (
    SHOP_SOURCES
    + """
view = FeatureView("buying", visits, key="visit", features=[
    Derived(age=pl.col("age"), decades=pl.col("age") / 10.0),
    Trailing(sales, by="shop", over=("1d", "all"),
             stats={"amount": ("mean", "sum", "std", "max", "last", "count"), "*": "count"}),
    Trailing(stock, by="shop", over="all", stats={"pieces": ("sum", "min", "first"), "note": "last", "*": "count"}),
    Latest(stock, by="shop", columns=("pieces", "note"), max_age="forever"),
    Latest(sales, by="shop", columns=("visit", "amount"), max_age="2d"),
    Lookup(shops, by="shop", columns=("city", "rent")),
])
"""
    + SHOP_MODEL.replace(
        "encoders.Ordinal()}", 'encoders.Ordinal(), "stock_by_shop_note_last_all": encoders.Ordinal()}'
    )
)


def shop_sources(visits: int, days: int, seed: int) -> dict[str, pl.DataFrame]:
    """Rows at moments of their own, with repeats of sales and rows that break their contract."""
    random = np.random.default_rng(seed)

    def moments(n: int) -> list[datetime]:
        return [at(0, int(t)) for t in np.sort(random.choice(days * 86_400_000, n, replace=False)) * 1000]

    asked = moments(visits)
    shop = random.choice(np.array(["north", "south", "west"]), visits).tolist()
    age = np.round(random.normal(40, 10, visits), 1)
    ages = [None if gone else float(a) for a, gone in zip(age, random.random(visits) < 0.05, strict=True)]
    chance = np.where(np.array(shop) == "north", 0.7, 0.2) + (age - 40) / 50
    bought = np.flatnonzero(random.random(visits) < chance)
    frames = {
        "visits": pl.DataFrame(
            {"asked": asked, "visit": range(visits), "shop": shop, "age": ages},
            schema={"asked": MOMENT, "visit": pl.Int64, "shop": pl.String, "age": pl.Float64},
        ),
        "sales": pl.DataFrame(
            {
                "sold": [asked[i] + timedelta(hours=2, microseconds=int(i) + 1) for i in bought],
                "visit": bought,
                "shop": [shop[i] for i in bought],
                "amount": (random.integers(1, 1000, len(bought)) / 100).tolist(),
            },
            schema={"sold": MOMENT, "visit": pl.Int64, "shop": pl.String, "amount": pl.Float64},
        ),
        "stock": pl.DataFrame(
            {
                "counted": moments(visits // 4),
                "shop": random.choice(np.array(["north", "south", "west"]), visits // 4),
                "pieces": [None if i % 9 == 0 else i * 7 % 50 for i in range(visits // 4)],
                "note": ["full", "low", None, "out"] * (visits // 16) + ["full"] * (visits // 4 % 4),
            },
            schema={"counted": MOMENT, "shop": pl.String, "pieces": pl.Int64, "note": pl.String},
        ),
        "shops": pl.DataFrame(
            {"shop": ["north", "south", "east"], "city": ["Oslo", None, "Rome"], "rent": [0.1, 2.5, 7.25]}
        ),
    }
    sales, every = frames["sales"], frames["visits"]
    again = sales[5:60:4].with_columns(pl.col("sold").dt.offset_by("9h"), amount=pl.lit(99.0))
    endless = sales[7:9].with_columns(amount=pl.lit(float("inf")), visit=pl.col("visit") + 1_000_000)
    timeless = sales[9:10].with_columns(sold=pl.lit(None, MOMENT), visit=pl.lit(2_000_000, pl.Int64))
    keyless = every[3:5].with_columns(visit=pl.lit(None, pl.Int64))
    twice = every[10:13]
    conflict = every[20:21].with_columns(age=pl.lit(1e6))  # larger, so it loses
    frames["sales"] = pl.concat([sales, again, endless, timeless]).sort("sold", nulls_last=True, maintain_order=True)
    frames["visits"] = pl.concat([every, keyless, twice, conflict]).sort("asked", maintain_order=True)
    return frames


def as_delta(path: Path, frame: pl.DataFrame) -> None:
    """Rows appended to a Delta table that is partitioned by week: a file per day would make many small ones."""
    weekly = frame.with_columns(week=pl.col("sold").dt.week().cast(pl.Int32))
    weekly.write_delta(path, mode="append", delta_write_options={"partition_by": ["week"]})


def shop() -> None:
    made = Made("shop")
    made.define(SHOP)
    frames = shop_sources(visits=900, days=30, seed=11)
    sales, half = frames["sales"].filter(pl.col("sold").is_not_null()), at(18)
    late = sales.filter(pl.col("sold") < half)[40:44]  # known on their days, and delivered with the second half
    for name in ("visits", "stock", "shops"):
        made.put(name, frames[name])
    early = sales.filter(pl.col("sold") < half).join(late, on=["sold", "visit"], how="anti", maintain_order="left")
    as_delta(made.store / "sources" / "sales", early)
    made.millrace("features", "--run_id", "first", "--end", str(half.date()))
    as_delta(made.store / "sources" / "sales", pl.concat([sales.filter(pl.col("sold") >= half), late]))
    made.millrace("features", "--run_id", "second")
    made.millrace("training", "--run_id", "learn", "--no-keep_examples", "--threads", "1")
    made.millrace("inference", "--run_id", "score")
    features = made.rows("features", "buying", "*")
    made.expected |= {
        "rows": len(features),
        "letters": len(made.rows("dead_letters", "features")),
        "predictions": len(made.rows("predictions", "buying")),
        "model": "buying",
        "version": "1",
    }
    made.pack()


# -- lifetime ------------------------------------------------------------------------------------------------------

LIFETIME = """
ev = Source("ev", time="at", columns={"k": pl.Int64, "v": pl.Float64})
q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
done = Source("done", time="at", unique="id", columns={"id": pl.Int64})
view = FeatureView("vw", spine=q, key="id", features=[
    Derived(k=pl.col("k")),
    Trailing(ev, by="k", over="all", stats={"*": "count", "v": ("sum", "mean", "min", "max", "first", "last")}),
    Latest(ev, by="k", columns="v", max_age="forever"),
])
model = Model(view, label=Label(done, on="id", value=pl.lit(1), within="1d", absent=0),
              split=TimeSplit(validate="8d", test="8d"),
              params={"max_depth": 2, "eta": 0.3}, rounds=4, gates=Gates(at_least={"auc": 0.0}))
"""
LIFETIME_DAYS = 40


def lifetime_sources(days: Sequence[int]) -> dict[str, pl.DataFrame]:
    """One event per key and day, at six; six spine rows on each of the days, at noon."""
    events = [
        (at(day + 0.25 + key / 1000), key, float(day * 10 + key) / 4)
        for day in range(LIFETIME_DAYS)
        for key in (1, 2, 3)
    ]
    asked = [(at(day + 0.5 + number / 1000), day * 10 + number, number % 3 + 1) for day in days for number in range(6)]
    return {
        "ev": pl.DataFrame(events, schema={"at": MOMENT, "k": pl.Int64, "v": pl.Float64}, orient="row"),
        "q": pl.DataFrame(asked, schema={"at": MOMENT, "id": pl.Int64, "k": pl.Int64}, orient="row"),
        "done": pl.DataFrame(
            [(moment + timedelta(hours=1), number) for moment, number, key in asked if (number * 7 + key) % 5 < 2],
            schema={"at": MOMENT, "id": pl.Int64},
            orient="row",
        ),
    }


def lifetime_truth(asked: pl.DataFrame, events: pl.DataFrame) -> dict[str, dict[str, Any]]:
    """The features of every spine row, by looking at every event: id → name → value."""
    found = {}
    for spine_row in asked.iter_rows(named=True):
        seen = events.filter(pl.col("k") == spine_row["k"], pl.col("at") < spine_row["at"]).sort("at")["v"].to_list()
        some = bool(seen)
        found[str(spine_row["id"])] = {
            "ev_by_k_count_all": len(seen),
            "ev_by_k_v_sum_all": sum(seen) if some else None,
            "ev_by_k_v_mean_all": float(np.float32(sum(seen) / len(seen))) if some else None,
            "ev_by_k_v_min_all": min(seen, default=None),
            "ev_by_k_v_max_all": max(seen, default=None),
            "ev_by_k_v_first_all": seen[0] if some else None,
            "ev_by_k_v_last_all": seen[-1] if some else None,
            "ev_v": seen[-1] if some else None,
        }
    return found


def lifetime(name: str, days: Sequence[int], late: bool) -> None:
    made = Made(name)
    made.define(LIFETIME)
    frames = lifetime_sources(days)
    for source, frame in frames.items():
        made.put(source, frame)
    made.millrace("features", "--run_id", "first", *(() if late else ("--end", str(at(20).date()))))
    events = frames["ev"]
    if late:
        more = pl.DataFrame({"at": [at(0.2)], "k": [1], "v": [0.5]}, schema=events.schema)
        made.put("ev", more, "late.parquet")
        events = pl.concat([events, more])
    made.millrace("features", "--run_id", "second")
    made.millrace("training", "--run_id", "learn", "--no-keep_examples", "--threads", "1")
    made.millrace("inference", "--run_id", "score")
    right = lifetime_truth(frames["q"], events)
    rows = made.rows("features", "vw", "*").sort("id")
    stored = {
        str(row["id"]): {column: row[column] for column in right[str(row["id"])]} for row in rows.iter_rows(named=True)
    }
    made.expected |= {
        "right": right,
        "stored": stored,
        "wrong_rows": sum(stored[each] != right[each] for each in right),
    }
    made.pack()


# -- narrow and ties -----------------------------------------------------------------------------------------------

NARROW = """
q = Source("q", time="at", columns={"id": pl.Int64, "qty": pl.Int32, "cents": pl.Int32,
           "level": pl.Int8, "name": pl.String})
view = FeatureView("narrow", spine=q, key="id", features=[
    Derived(total=pl.col("qty") * pl.col("cents"), slack=pl.col("name").str.len_bytes() - 10, h=pl.col("name").hash(1),
            raised=pl.col("level") + pl.col("level"),
            bytes=pl.col("level").cast(pl.UInt8, strict=False) + pl.lit(200, pl.UInt8)),
    Derived(qty=pl.col("qty"), half=pl.col("qty") / 2),
    Trailing(q, by="name", over="9d", stats={"qty": ("sum", "max")}),
])
"""
WIDE = """
q = Source("q", time="at", columns={"id": pl.Int64, "qty": pl.Int32, "cents": pl.Int32,
           "level": pl.Int8, "name": pl.String})
view = FeatureView("wide", spine=q, key="id", features=[
    Derived(qty=pl.col("qty"), level=pl.col("level"), half=pl.col("qty") / 2, long=pl.col("name").str.len_bytes()),
    Trailing(q, by="name", over="9d", stats={"qty": ("sum", "max"), "cents": "mean", "*": "count"}),
])
"""


def narrow() -> None:
    made = Made("narrow")
    for file, text in (("narrow.py", NARROW), ("wide.py", WIDE)):
        made.define(text, file)
    names = ["abc", "b", "c", "d", "e", "f", "g", "h"]
    qty, cents, level = (
        [100_000, 3, -5, None, 2**31 - 1, 50_000, 7, 1],
        [99_999, 10, 7, 2, 2, 50_000, None, 1],
        [100, 1, -100, None, 127, 64, 55, 56],
    )
    made.put(
        "q",
        pl.DataFrame(
            {
                "at": [at(i) for i in range(8)],
                "id": range(8),
                "qty": qty,
                "cents": cents,
                "level": level,
                "name": names,
            },
            schema={
                "at": MOMENT,
                "id": pl.Int64,
                "qty": pl.Int32,
                "cents": pl.Int32,
                "level": pl.Int8,
                "name": pl.String,
            },
        ),
    )
    for name in ("narrow", "wide"):
        for run, end in (("first", ("--end", str(at(5).date()))), ("second", ())):
            made.millrace("features", "--run_id", f"{name}-{run}", *end, definition=f"{name}.py")
    made.expected["stored"] = {
        view: made.rows("features", view, "*").sort("id").drop("row_id", "date", "at").to_dicts()
        for view in ("narrow", "wide")
    }
    made.expected["right"] = {
        "narrow": [
            {
                "id": i,
                "total": None if q is None or c is None else q * c,
                "slack": len(n) - 10,
                "raised": None if v is None else 2 * v,
                "bytes": None if v is None or v < 0 else v + 200,
            }
            for i, (q, c, v, n) in enumerate(zip(qty, cents, level, names, strict=True))
        ]
    }
    made.pack()


REPEATS = """
ev = Source("ev", time="at", unique="eid", columns={"eid": pl.Int64, "k": pl.Int64, "a": pl.Int64, "v": pl.Float64})
q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
view = FeatureView("NAME", spine=q, key="id", features=[Trailing(ev, by="k", over="1d", stats={"v": "sum"})EXTRA])
"""
TIES = """
ev = Source("tied", time="at", order="rank", columns={"rank": pl.Int64, "k": pl.Int64, "a": pl.Int64, "s": pl.String})
dim = Source("dim", columns={"k": pl.Int64, "a": pl.Int64, "s": pl.String})
q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
view = FeatureView("NAME", spine=q, key="id", features=[
    Latest(ev, by="k", columns="s", max_age="1d"), Lookup(dim, by="k", columns="s")EXTRA
])
"""
TIED_VIEWS = {
    "repeats_alone": (REPEATS, ""),
    "repeats_with_more": (REPEATS, ', Trailing(ev, by="k", over="1d", stats={"a": "sum"}, name="z")'),
    "ties_alone": (TIES, ""),
    "ties_with_more": (
        TIES,
        ', Trailing(ev, by="k", over="1d", stats={"a": "sum"}, name="z"), Lookup(dim, by="k", columns="a", name="o")',
    ),
}


def ties() -> None:
    made = Made("ties")
    for name, (text, extra) in TIED_VIEWS.items():
        made.define(text.replace("NAME", name).replace("EXTRA", extra), f"{name}.py")
    early = [at(day + 0.25) for day in (0, 0, 0, 1, 1)]
    made.put(
        "ev",
        pl.DataFrame(
            {"at": early, "eid": [7, 7, 7, 8, 9], "k": [1] * 5, "a": [1, 2, 3, 4, 5], "v": [9.0, 5.0, 7.0, 1.0, 2.0]}
        ).with_columns(pl.col("at").cast(MOMENT)),
    )
    made.put(
        "tied",
        pl.DataFrame(
            {"at": early[:2] + early[3:], "rank": [1] * 4, "k": [1] * 4, "a": [1, 2, 3, 4], "s": ["y", "x", "z", "w"]}
        ).with_columns(pl.col("at").cast(MOMENT)),
    )
    made.put("dim", pl.DataFrame({"k": [1, 1], "a": [1, 2], "s": ["y", "x"]}))
    made.put(
        "q", pl.DataFrame({"at": [at(0.5), at(1.5)], "id": [1, 2], "k": [1, 1]}).with_columns(pl.col("at").cast(MOMENT))
    )
    for name in TIED_VIEWS:
        for run, end in (("first", ("--end", str(at(1).date()))), ("second", ())):
            made.millrace("features", "--run_id", f"{name}-{run}", *end, definition=f"{name}.py")
    made.expected["stored"] = {
        view: made.rows("features", view, "*").sort("id").drop("row_id", "date", "at").to_dicts() for view in TIED_VIEWS
    }
    repeats = [{"id": 1, "ev_by_k_v_sum_1d": 9.0}, {"id": 2, "ev_by_k_v_sum_1d": 3.0}]
    # At one moment the greatest by `order`, then by all columns is the last; of a dimension's rows the smallest is
    # used.
    tied = [{"id": 1, "tied_s": "x", "dim_s": "y"}, {"id": 2, "tied_s": "w", "dim_s": "y"}]
    made.expected["right"] = {
        "repeats_alone": repeats,
        "repeats_with_more": repeats,
        "ties_alone": tied,
        "ties_with_more": tied,
    }
    made.pack()


# -- live ----------------------------------------------------------------------------------------------------------

LIVE_FLAGS = ("--chunk", "6h", "--disorder", "5h", "--keep", "12h", "--seed", "3", "--commit_every", "0s")


@contextlib.contextmanager
def stopped_after(count: int | None, chunks: list[list[Message]]) -> Iterator[None]:
    """Of a replay only so many chunks come: the job is stopped behind them.  Every chunk is kept in `chunks`."""
    whole: Callable[..., Iterator[list[Message]]] = replay.chunks

    def some(*arguments: Any) -> Iterator[list[Message]]:
        chunks[:] = list(whole(*arguments))
        return itertools.islice(iter(chunks), count)

    with mock.patch.object(replay, "chunks", some):
        yield


def messages_frame(messages: Sequence[Message]) -> pl.DataFrame:
    return pl.DataFrame(
        [each[:6] for each in messages],
        schema={
            "topic": pl.String,
            "partition": pl.Int64,
            "offset": pl.Int64,
            "timestamp": pl.Int64,
            "key": pl.Binary,
            "value": pl.Binary,
        },
        orient="row",
    )


def live() -> None:
    made = Made("live")
    made.define(LIVE)
    files = made.folder / "sources"
    for name, frame in shop_sources(visits=400, days=20, seed=12).items():
        made.put(name, frame, root=files)
    chunks: list[list[Message]] = []
    flags = ("--streaming", "--sources", str(files), *LIVE_FLAGS)

    def features(store: Path, run: str, count: int | None) -> None:
        with stopped_after(count, chunks):
            made.millrace("features", *flags, "--run_id", run, store=store)

    other = ROOT / "live-whole"
    shutil.rmtree(other, ignore_errors=True)
    features(other, "whole", None)
    features(made.store, "began", len(chunks) * 11 // 20)
    for name, count in (("before", slice(0, len(chunks) * 11 // 20)), ("to_come", slice(len(chunks) * 11 // 20, None))):
        rows = [messages_frame(chunk).with_columns(pl.lit(i).alias("chunk")) for i, chunk in enumerate(chunks[count])]
        pl.concat(rows).write_parquet(made.folder / f"messages_{name}.parquet", use_pyarrow=True)
    # The model comes from batch features over the same rows: same definition, same fingerprint.
    batch = ROOT / "live-batch"
    shutil.rmtree(batch, ignore_errors=True)
    shutil.copytree(files, batch / "sources")
    registry = f"sqlite:///{made.store}/registry/mlflow.db"
    made.millrace("features", "--run_id", "batch", store=batch)
    made.millrace(
        "training", "--run_id", "learn", "--no-keep_examples", "--threads", "1", "--registry", registry, store=batch
    )
    made.millrace("inference", "--streaming", "--run_id", "scored", "--commit_every", "0s")
    view = load_definition(str(made.folder / "definition.py")).view
    table = open_table(f"{other}/features_live/buying/{view.fingerprint}")
    assert table is not None
    parts = [pl.DataFrame(pl.from_arrow(read_file(file))) for file in data_files(table)]
    whole = pl.concat(parts).sort("row_id")
    whole.write_parquet(made.folder / "answers_whole.parquet", use_pyarrow=True)
    began = made.rows("features_live", "buying", "*")
    made.expected |= {
        "chunks": len(chunks),
        "answers_whole": len(whole),
        "answers_stored": len(began),
        "late_answers": int(whole["__late"].sum()),
        "letters_stored": len(made.rows("dead_letters", "live_buying")),
        "predictions_stored": len(made.rows("predictions_live", "buying")),
    }
    made.pack()


STORES: Mapping[str, Callable[[], None]] = {
    "shop": shop,
    "lifetime_good": lambda: lifetime("lifetime_good", range(LIFETIME_DAYS), late=False),
    "lifetime_poisoned": lambda: lifetime("lifetime_poisoned", range(1, LIFETIME_DAYS, 2), late=True),
    "narrow": narrow,
    "ties": ties,
    "live": live,
}

if __name__ == "__main__":
    for name in sys.argv[1:] or STORES:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                STORES[name]()
        except BaseException:
            print(said.getvalue(), file=sys.stderr)
            raise
