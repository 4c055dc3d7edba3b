"""A changed view takes what it can from its older table, and the bits are those of a full computation."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beam_pipelines import features
from beam_pipelines.commands.plan import main as plan_main
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing
from schemas.errors import StoreError
from schemas.feature_groups import without_columns
from schemas.features import Feature
from schemas.loading import Definition
from tests.support import shop
from tests.support.tables import rows_of
from transforms.features.column_reuse import sources_needed
from transforms.features.manifest_store import WriteManifest, read_manifest
from transforms.features.preparation import PreparedRun
from transforms.features.trailing_features import ComputeBlock
from transforms.sources.tallies import add_tallies
from transforms.storage.delta_tables import CommitTarget, commit, data_files, open_table, write_files

START, DAYS = datetime(2024, 1, 1, tzinfo=UTC), 10
NOW = int(datetime(2024, 3, 1, tzinfo=UTC).timestamp() * 1_000_000)
KEYS = {"shop": pl.String, "item": pl.Int64}

asks = Source("asks", time="at", columns={"ask": pl.Int64, **KEYS, "weight": pl.Float64})
sales = Source(
    "sales",
    time="sold",
    unique="sale",
    order="sale",
    columns={"sale": pl.Int64, **KEYS, "price": pl.Float64, "pieces": pl.Float64},
)
views = Source("views", time="seen", columns={**KEYS, "seconds": pl.Float64, "page": pl.String})
items = Source("items", columns={"item": pl.Int64, "size": pl.Int32, "kind": pl.String})

# Each may be in a view or not; some need others above them.
POOL: list[Callable[[], Feature]] = [
    lambda: Trailing(sales, by="shop", over=("1d", "3d"), stats={"price": ("mean", "count")}),
    lambda: Trailing(sales, by="item", over="2d", stats={"price": ("std", "q75"), "*": "count"}),
    lambda: Trailing(sales, by="shop", over="3d", stats={"pieces": "sum"}, name="volume"),
    lambda: Trailing(sales, by=("shop", "item"), over="4d", stats={"price": ("first", "last")}, name="ends"),
    lambda: Trailing(sales, by="shop", over="2d", where=pl.col("pieces") > 3, stats={"*": "count"}, name="big"),
    lambda: Latest(sales, by="item", columns=("price", "pieces"), max_age="2d"),
    lambda: Trailing(views, by="item", over=("12h", "2d"), stats={"seconds": ("mean", "max")}),
    lambda: Latest(views, by="shop", columns=("seconds", "page"), max_age="1d"),
    lambda: Trailing(asks, by="shop", over="1d", stats={"*": "count", "weight": "mean"}),
    lambda: Lookup(items, by="item", columns=("size", "kind")),
    lambda: Derived(doubled=pl.col("weight") * 2),
]
WIDER = Trailing(sales, by="shop", over=("1d", "3d", "5d"), stats={"price": ("mean", "count", "max")})


def make(numbers: Sequence[int], wider: bool = False, chained: bool = False) -> FeatureView:
    """The view of the chosen features; `wider` changes the first, `chained` adds features that use others."""
    chosen = [POOL[i]() for i in sorted(numbers)]
    chosen = (
        [
            WIDER,
            *(
                each
                for each in chosen
                if not (isinstance(each, Trailing) and each.name is None and each.by == "shop" and each.source is sales)
            ),
        ]
        if wider
        else chosen
    )
    if chained:
        chosen = [each for each in chosen if not (isinstance(each, Latest) and each.source is views)]
        chosen += [
            Latest(views, by="shop", columns=("seconds", "page"), max_age="1d"),
            Derived(near=pl.col("views_seconds").cast(pl.Int64)),
            Trailing(sales, by={"near": "item"}, over="2d", stats={"price": "mean"}, name="chained"),
        ]
    return FeatureView("evolving", asks, key="ask", features=chosen or [POOL[10]()])


Frames = dict[str, pl.DataFrame]


def history(seed: int, rows: int = 60) -> Frames:
    random = np.random.default_rng(seed)

    def times(count: int) -> pl.Series:
        minutes = np.sort(random.integers(0, DAYS * 24 * 6, count)) * 10  # ties
        return pl.Series([START + timedelta(minutes=int(m)) for m in minutes], dtype=pl.Datetime("us", "UTC"))

    def keys(count: int) -> dict[str, Any]:
        return {"shop": random.choice(["a", "b", "c"], count), "item": random.integers(0, 5, count)}

    money = np.round(random.lognormal(2, 1, rows * 3), 2)
    return {
        "asks": pl.DataFrame(
            {"at": times(rows), "ask": np.arange(rows), **keys(rows), "weight": random.normal(size=rows)}
        ),
        "sales": pl.DataFrame(
            {
                "sold": times(rows),
                "sale": np.arange(rows),
                **keys(rows),
                "price": money[:rows],
                "pieces": money[rows : 2 * rows],
            }
        ),
        "views": pl.DataFrame(
            {"seen": times(rows), **keys(rows), "seconds": money[2 * rows :], "page": random.choice(["x", "y"], rows)}
        ),
        "items": pl.DataFrame(
            {
                "item": np.arange(5),
                "size": random.integers(1, 9, 5).astype(np.int32),
                "kind": random.choice(["k", "l"], 5),
            }
        ),
    }


def put(store: Path, frames: Frames) -> None:
    for name, frame in frames.items():
        folder = store / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        time = {"asks": "at", "sales": "sold", "views": "seen"}.get(name)
        parts = (
            [("all", frame)]
            if time is None
            else [(str(k), part) for (k,), part in frame.group_by(pl.col(time).dt.day() // 4)]
        )
        for k, part in parts:
            part.write_parquet(folder / f"{k}.parquet")


def prepare(
    store: Path, view: FeatureView, run_id: str = "r", days: tuple[int, int] | None = None, full: bool = False
) -> tuple[features.FeaturesOptions, PreparedRun]:
    definition = store / "definition.py"
    definition.write_text(shop.DEFINITION)
    argv = ["--definition", str(definition), "--store", str(store), "--run_id", run_id, "--block_rows", "90"]
    argv += ["--full"] if full else []
    if days is not None:
        argv += [
            "--start",
            str(START.date() + timedelta(days=days[0])),
            "--end",
            str(START.date() + timedelta(days=days[1])),
        ]
    options = features.parse([*argv, "--no-statistics"])
    options = dataclasses.replace(options, definition=Definition("d", str(definition), view, None), now=NOW)
    return options, features.prepare(options)


def computed(
    view: FeatureView, work: PreparedRun, uri: str, copies: bool = True
) -> tuple[list[pa.RecordBatch], list[Any]]:
    """What the blocks of a run give: features and tallies."""
    plan = work.plan
    assert plan is not None
    step = ComputeBlock(
        view, dataclasses.replace(plan, blocks=()), len(plan.blocks), uri, work.copies if copies else None
    )
    step.setup()
    step.start_bundle()
    out = [*(each for block in plan.blocks for each in step.process(block)), *step.rest()]
    return [each for each in out if isinstance(each, pa.RecordBatch)], [
        each.value for each in out if getattr(each, "tag", "") == "tallies"
    ]


def load(store: Path, view: FeatureView, run_id: str, days: tuple[int, int] | None = None) -> PreparedRun:
    """A run without Beam."""
    options, work = prepare(store, view, run_id, days)
    if work.plan is not None:
        batches, tallies = computed(view, work, options.table)
        files = [file for each in batches for file in write_files(each, options.table, run_id)]
        manifest = WriteManifest(view, options.table, run_id, work.plan.ranges, work.current, work.plan.dates is None)
        target = CommitTarget(options.table, view.output_schema, work.plan.dates, run_id, work.base)
        commit(target, files, manifest, (add_tallies(tallies),))
    return work


def bits(batches: Sequence[pa.RecordBatch]) -> pl.DataFrame:
    """Rows in order, floats as the integers that their bits are."""
    frame = pl.DataFrame(pl.from_arrow(pa.Table.from_batches(batches))).sort("at", "ask")
    floats = [name for name in frame.columns if frame[name].dtype == pl.Float32]
    as_bits = [pl.Series(f"{name} bits", frame[name].fill_null(math.pi).to_numpy().view(np.int32)) for name in floats]
    return frame.with_columns(as_bits)


def check(store: Path, view: FeatureView) -> PreparedRun:
    """What would be copied and computed is, bit for bit, what computing it all gives."""
    options, work = prepare(store, view)
    if work.plan is not None:
        some, _ = computed(view, work, options.table)
        every, _ = computed(view, work, options.table, copies=False)
        assert bits(some).equals(bits(every))
    return work


def copied(work: PreparedRun) -> dict[int, set[str]]:
    """Columns by day, counted from the first."""
    if work.copies is None:
        return {}
    first = (START.date() - date(1970, 1, 1)).days
    return {day - first: set(names) for day, names in work.copies.columns.items()}


# -- changes of the data between the older table and the newer --------------------------------------------------------


def edit(frames: Frames, source: str, time: str, day: int, **values: Any) -> Frames:
    """Change the rows of a day."""
    chosen = pl.col(time).dt.date() == START.date() + timedelta(days=day)
    changes = [pl.when(chosen).then(pl.lit(value)).otherwise(name).alias(name) for name, value in values.items()]
    return {**frames, source: frames[source].with_columns(changes)}


CHANGES: dict[str, Callable[[Frames, int], Frames]] = {
    "nothing": lambda frames, day: frames,
    "a price": lambda frames, day: edit(frames, "sales", "sold", day, price=1.25),
    "pieces": lambda frames, day: edit(frames, "sales", "sold", day, pieces=1.25),
    "infinite pieces": lambda frames, day: edit(frames, "sales", "sold", day, pieces=math.inf),
    "infinite prices": lambda frames, day: edit(frames, "sales", "sold", day, price=math.inf),
    "a question": lambda frames, day: edit(frames, "asks", "at", day, weight=0.5),
    "an infinite question": lambda frames, day: edit(frames, "asks", "at", day, weight=math.inf),
    "views": lambda frames, day: edit(frames, "views", "seen", day, page="z"),
    "late rows": lambda frames, day: {
        **frames,
        "views": pl.concat(
            [frames["views"], edit(frames, "views", "seen", day, seconds=3.5)["views"].filter(pl.col("seconds") == 3.5)]
        ).sort("seen"),
    },
    "a repeat": lambda frames, day: {
        **frames,
        "sales": frames["sales"].with_columns(
            sale=pl.when(pl.col("sale") == day * 5 + 1).then(day * 5).otherwise("sale")
        ),
    },
    "a dimension": lambda frames, day: {
        **frames,
        "items": frames["items"].with_columns(size=pl.col("size") + (pl.col("item") == day % 5).cast(pl.Int32)),
    },
}


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_copied_is_what_would_be_computed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any view after any other, whatever changed before, between and after the loads of the older table."""
    store = tmp_path_factory.mktemp("store")
    some = st.sets(st.sampled_from(range(len(POOL))), min_size=2)
    old = make(sorted(data.draw(some, "old")), chained=data.draw(st.booleans(), "old chained"))
    new = make(
        sorted(data.draw(some, "new")), data.draw(st.booleans(), "wider"), data.draw(st.booleans(), "new chained")
    )
    change = st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, DAYS - 1))
    frames = history(data.draw(st.integers(0, 5), "seed"))
    for name, day in data.draw(st.lists(change, max_size=1), "before"):
        frames = CHANGES[name](frames, day)
    put(store, frames)
    load(store, old, "first", data.draw(st.sampled_from([None, (0, 6)]), "first span"))
    for name, day in data.draw(st.lists(change, max_size=2), "between"):
        frames = CHANGES[name](frames, day)
    put(store, frames)
    load(store, old, "second", data.draw(st.sampled_from([None, (4, 9), (6, 10)]), "second span"))
    for name, day in data.draw(st.lists(change, max_size=2), "after"):
        frames = CHANGES[name](frames, day)
    put(store, frames)
    if old.fingerprint != new.fingerprint:
        check(store, new)


def test_an_unchanged_view_with_a_window_more_computes_only_that(tmp_path: Path) -> None:
    put(tmp_path, history(1))
    old, new = make([0, 6, 7, 9]), make([0, 6, 7, 9], wider=True)
    load(tmp_path, old, "old")
    work = check(tmp_path, new)
    days = copied(work)
    assert set(days) == set(range(DAYS))
    added = {name for name in new.columns if re.search("_5d|_max_[135]d", name) and "sales" in name}
    assert all(names == set(new.columns) - added for names in days.values())
    assert len(added) == 5


def test_a_new_column_of_a_source_keeps_the_others_where_footers_show_no_infinity(tmp_path: Path) -> None:
    frames = history(2)
    put(tmp_path, frames)
    old, new = make([0, 6]), make([0, 2, 6])  # `volume` reads `pieces`, which the older view did not
    load(tmp_path, old, "old")
    assert set.union(*copied(check(tmp_path, new)).values()) == set(old.columns)
    put(tmp_path, CHANGES["infinite pieces"](frames, 3))
    assert not any("sales" in name for names in copied(check(tmp_path, new)).values() for name in names)


def test_rows_of_one_moment_are_not_taken_from_a_view_that_read_other_columns(tmp_path: Path) -> None:
    """`order` may leave ties, and what breaks them are the columns that are read."""
    put(tmp_path, history(2))
    load(tmp_path, make([0, 5]), "old")
    work = check(tmp_path, make([0, 4, 5]))
    assert {"sales_price", "sales_pieces"} <= set.union(*copied(work).values()), "the same columns are read"
    load(tmp_path, make([0, 3]), "older")
    assert not any("ends" in name for names in copied(check(tmp_path, make([2, 3]))).values() for name in names)


@pytest.mark.parametrize(
    ("change", "spoiled", "days"),
    [
        ("a price", "sales_by_shop_price_mean_3d", range(4, 8)),
        ("views", "views_page", range(4, 6)),
        ("a dimension", "items_size", range(DAYS)),
        ("a question", "views_page", range(4, 5)),
    ],
)
def test_a_change_spoils_the_days_it_reaches_and_no_more(
    tmp_path: Path, change: str, spoiled: str, days: range
) -> None:
    frames = history(3)
    put(tmp_path, frames)
    load(tmp_path, make([0, 7, 9]), "old")
    put(tmp_path, CHANGES[change](frames, 4))
    found = copied(check(tmp_path, make([0, 7, 9, 10])))
    assert {day for day in range(DAYS) if spoiled not in found.get(day, set())} == set(days)


def test_a_stale_day_of_the_older_table_is_not_copied(tmp_path: Path) -> None:
    """Another run moved its manifest on, but did not compute the day again."""
    frames = history(4)
    put(tmp_path, frames)
    old = make([0, 7])
    load(tmp_path, old, "first")
    put(tmp_path, CHANGES["a price"](frames, 2))
    load(tmp_path, old, "second", (7, 9))
    found = copied(check(tmp_path, make([0, 7, 10])))
    assert not {2, 3, 4, 5} & set(found)
    assert {0, 1, 6, 7, 8} <= set(found)


def test_full_and_another_spine_copy_nothing(tmp_path: Path) -> None:
    put(tmp_path, history(5))
    load(tmp_path, make([0]), "old")
    new = make([0, 10])
    assert prepare(tmp_path, new)[1].copies is not None
    assert prepare(tmp_path, new, full=True)[1].copies is None
    other = Source("asks", time="at", not_before="2000-01-01", columns=dict(asks.columns))
    moved = FeatureView("evolving", other, key="ask", features=[POOL[0]()])
    assert prepare(tmp_path, moved)[1].copies is None or moved.fingerprint == make([0]).fingerprint
    keyed = FeatureView("evolving", asks, key=("ask", "shop"), features=[POOL[0]()])
    assert prepare(tmp_path, keyed)[1].copies is None


def test_a_table_written_under_two_sets_of_rules_serves_nobody(tmp_path: Path) -> None:
    """A spine's `not_before` is not in the fingerprint, and yet decides which rows count."""
    put(tmp_path, history(5))
    late = Source("asks", time="at", not_before="2024-01-03", columns=dict(asks.columns))
    old, same = make([0]), FeatureView("evolving", late, key="ask", features=[POOL[0]()])
    assert old.fingerprint == same.fingerprint
    load(tmp_path, old, "first", (0, 6))
    load(tmp_path, same, "second", (5, 9))
    table = open_table(str(tmp_path / "features" / "evolving" / old.fingerprint))
    assert read_manifest(table).about == {}
    assert prepare(tmp_path, make([0, 10]))[1].copies is None


def test_a_file_that_is_gone_has_its_columns_computed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, history(6))
    load(tmp_path, make([0]), "old")
    new = make([0, 10])
    options, work = prepare(tmp_path, new)
    assert work.copies is not None
    for files in work.copies.files.values():
        Path(files[0].path).unlink()
    some, _ = computed(new, work, options.table)
    every, _ = computed(new, work, options.table, copies=False)
    assert bits(some).equals(bits(every))


def test_an_older_table_with_other_rows_is_not_used(tmp_path: Path) -> None:
    put(tmp_path, history(6))
    load(tmp_path, make([0]), "old")
    new = make([0, 10])
    options, work = prepare(tmp_path, new)
    assert work.copies is not None
    fewer, others = [files[0].path for files in work.copies.files.values()][:2]
    assert fewer != others
    pl.read_parquet(fewer).head(0).write_parquet(fewer)
    pl.read_parquet(others).with_columns(pl.col("row_id") + 1).write_parquet(others)
    some, _ = computed(new, work, options.table)
    assert bits(some).equals(bits(computed(new, work, options.table, copies=False)[0]))


def test_the_older_table_stays_and_the_newer_serves_the_next(tmp_path: Path) -> None:
    put(tmp_path, history(7))
    first, second, third = make([0]), make([0, 6]), make([0, 6, 9])
    load(tmp_path, first, "one")
    before = data_files(open_table(str(tmp_path / "features" / "evolving" / first.fingerprint)))  # type: ignore[arg-type]
    load(tmp_path, second, "two")
    work = check(tmp_path, third)
    assert work.copies is not None
    assert work.copies.uri.endswith(second.fingerprint)
    assert set.union(*copied(work).values()) == set(second.columns)
    assert data_files(open_table(str(tmp_path / "features" / "evolving" / first.fingerprint))) == before  # type: ignore[arg-type]


def test_a_spoiled_manifest_of_another_table_stops_nobody(tmp_path: Path) -> None:
    put(tmp_path, history(7))
    old = make([0])
    load(tmp_path, old, "one")
    (manifest,) = (tmp_path / "features" / "evolving" / old.fingerprint / "_manifests").iterdir()
    manifest.write_text("{")
    with pytest.raises(StoreError):
        prepare(tmp_path, old)
    assert prepare(tmp_path, make([0, 6]))[1].copies is None


def test_what_a_feature_needs_follows_the_features_it_uses() -> None:
    needs = sources_needed(make([0, 3], chained=True))
    assert needs["sales_by_shop_price_mean_1d"] == {("sales", False)}
    assert needs["ends_by_shop_item_price_last_4d"] == {("sales", True)}
    assert needs["near"] == {("views", True)}
    assert needs["chained_by_near_price_mean_2d"] == {("sales", False), ("views", True)}


def test_the_rest_of_features_has_exactly_the_other_columns() -> None:
    view = make(range(10))
    reading = [each for each in view.features if not isinstance(each, Derived)]
    every = [name for name in view.columns if name != "doubled"]
    for gone in (every[:1], every[::2], every, []):
        left = [name for each in without_columns(reading, gone) for name in each.outputs(view.spine.schema)]
        assert sorted(left) == sorted(set(every) - set(gone))


def test_a_pipeline_backfills_a_changed_view_and_the_plan_shows_how(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    definition = shop.write(tmp_path, 600)
    flags = ["--definition", str(definition), "--store", str(tmp_path)]
    lifetime = shop.DEFINITION.replace('over="3d"', 'over=("3d", "all")')
    definition.write_text(lifetime)
    assert features.main([*flags, "--end", "2024-02-20"]) == 0
    definition.write_text(lifetime.replace('("3d", "all")', '("3d", "7d", "all")'))
    capsys.readouterr()
    assert plan_main(flags) == 0
    out = capsys.readouterr().out
    backfill = out[out.index("\ncopied columns\n") :]
    assert re.search(r"2024-01-01–2024-02-19 +50 +\d+ +4 +2\n", backfill)
    assert re.search(r"2024-02-20–2024-02-29 +10 +\d+ +0 +6\n", backfill)
    assert "sales_by_shop_amount_mean_7d" in backfill
    assert features.main([*flags, "--run_id", "copying"]) == 0
    uri = re.search(r"table +(\S+)", capsys.readouterr().out)
    assert uri is not None

    some = rows_of(uri[1]).sort("row_id")
    assert features.main([*flags, "--full"]) == 0
    assert some.equals(rows_of(uri[1]).sort("row_id"))
    assert features.main(flags) == 0
