"""Whatever happens to a store, in whatever order, windows over all history are those of a store made anew.

Hypothesis makes up what happens: rows that come late, are deleted or rewritten, days without rows between other days,
runs of some days or of all, by other plans, under a changed view and back, killed before their commit and launched
again. After each run the table is compared with one of a fresh store, with the kernel over all rows at once, and with a
scan of every row in plain Python. Every snapshot that the next run may start from is compared with the summary of all
rows before it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule
from polars.testing import assert_frame_equal

from beam_pipelines import features
from beam_pipelines.commands.vacuum import vacuum
from schemas import FeatureView, Source
from schemas.durations import DAY
from schemas.errors import DataError
from schemas.loading import Definition
from tests.support import oracles
from tests.support.without_beam import outputs_of, perform
from transforms.features.kernel import KernelTables, compute
from transforms.features.lifetime_snapshots import lifetime_groups, read_summary
from transforms.features.lifetime_summaries import summarise
from transforms.features.manifest_store import read_manifest
from transforms.features.source_digests import digest_changes
from transforms.features.staleness import usable_snapshots
from transforms.records.times import as_date
from transforms.sources.inventory import take_inventory
from transforms.storage import date_spans
from transforms.storage.delta_tables import open_table

START, DAYS = datetime(2024, 1, 1, tzinfo=UTC), 10
FIRST_DAY = (START.date() - date(1970, 1, 1)).days
MOMENT = pl.Datetime("us", "UTC")

DEFINITION = """
import polars as pl
import pytest
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing

asks = Source("asks", time="at", columns={"id": pl.Int64, "k": pl.Int64, "x": pl.Float64})
pays = Source("pays", time="at", unique="no", columns={"no": pl.Int64, "k": pl.Int64, "v": pl.Float64, "s": pl.String})
shops = Source("shops", columns={"k": pl.Int64, "town": pl.Int64})
EVER = [
    Trailing(
        pays,
        by="k",
        over=("all", "2d"),
        stats={
            "*": "count",
            "v": ("count", "sum", "mean", "std", "min", "max", "first", "last"),
            "s": ("first", "last"),
        },
    ),
    Trailing(pays, by="k", over="all", where=pl.col("v") > 5, stats={"*": "count", "v": "sum"}, name="large"),
    Latest(pays, by="k", columns=("v", "s"), max_age="forever"),
    Trailing(asks, by="k", over="all", stats={"*": "count", "x": "sum"}),
    Lookup(shops, by="k", columns="town"),
    Trailing(pays, by={"shops_town": "k"}, over="all", stats={"v": "sum"}, name="in_town"),
    Derived(mean=pl.col("pays_by_k_v_sum_all") / pl.col("pays_by_k_count_all")),
]
MORE = [
    Trailing(pays, by="k", over="3d", stats={"v": "max"}, name="recent"),
    Trailing(pays, by="k", over="all", stats={"s": "count"}, name="named"),
]
"""
MODULE: dict[str, Any] = {}
exec(DEFINITION, MODULE)  # as the pipelines load it
SOURCES: dict[str, Source] = {name: MODULE[name] for name in ("asks", "pays", "shops")}
VIEWS = [
    FeatureView("ever", SOURCES["asks"], key="id", features=more)
    for more in (MODULE["EVER"], [*MODULE["EVER"], *MODULE["MORE"]])
]
FROM_SHOPS = ["shops_town", "in_town_by_shops_town_v_sum_all"]

Row = dict[str, Any]
hours = st.sampled_from([0, 6, 12, 12, 18])
days = st.integers(0, DAYS - 1)
payments = st.fixed_dictionaries(
    {
        "at": st.builds(lambda day, hour: START + timedelta(days=day, hours=hour), days, hours),
        "no": st.none(),  # a fresh one, unless it is to repeat another row's
        "k": st.sampled_from([1, 1, 2, None]),
        "v": st.sampled_from([0.1, 1e-5, 7.0, 1e10, None, float("inf"), -3.25]),
        "s": st.sampled_from(["a", "b", None]),
    }
)
spine_rows = st.fixed_dictionaries(
    {
        "at": st.builds(lambda day, hour: START + timedelta(days=day, hours=hour), days, hours),
        "k": st.sampled_from([1, 1, 2, None]),
        "x": st.sampled_from([0.5, 2.0, None]),
    }
)
of_some = st.integers(0, 99)  # decides which
changes = st.one_of(
    st.tuples(st.just("late rows"), st.lists(payments, min_size=1, max_size=3)),
    st.tuples(st.just("questions"), st.lists(spine_rows, min_size=1, max_size=4)),
    st.tuples(st.just("days with spine rows"), st.sets(days, min_size=1, max_size=4)),
    st.tuples(st.just("repeats"), st.lists(payments, min_size=1, max_size=2), of_some),
    st.tuples(st.just("deleted"), st.sampled_from(["asks", "pays", "pays"]), of_some),
    st.tuples(st.just("day deleted"), st.sampled_from(["asks", "pays"]), days),
    st.tuples(st.just("rewritten"), st.sampled_from(["asks", "pays"]), of_some),
    st.tuples(st.just("dimension"), st.dictionaries(st.sampled_from([1, 2]), st.sampled_from([1, 2]), max_size=2)),
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """How a run is launched."""

    view: int
    bounds: tuple[int, int] | None
    full: bool
    refresh: bool
    block_rows: int
    plan: str
    key_shards: str
    again: bool  # under the run id of the run before
    killed: bool  # before its commit
    cleaned: bool  # the store was vacuumed before it

    @property
    def words(self) -> list[str]:
        found = ["--block_rows", str(self.block_rows), "--plan", self.plan, "--key_shards", self.key_shards]
        for name, chosen in (("--full", self.full), ("--refresh", self.refresh)):
            found += [name] if chosen else []
        if self.bounds is not None:
            first, last = (str(START.date() + timedelta(days=day)) for day in self.bounds)
            found += ["--start", first, "--end", last]
        return found


seldom = st.sampled_from([False, False, False, False, True])
runs = st.builds(
    Flags,
    view=st.sampled_from([0, 0, 0, 1]),
    bounds=st.none() | st.none() | st.tuples(days, st.integers(1, 4)).map(lambda each: (each[0], each[0] + each[1])),
    full=seldom,
    refresh=seldom,
    block_rows=st.sampled_from([2, 8, 800_000]),
    plan=st.sampled_from(["auto", "slices", "shuffle"]),
    key_shards=st.sampled_from(["auto", "auto", "2"]),
    again=seldom,
    killed=seldom,
    cleaned=seldom,
)


class Sequences(RuleBasedStateMachine):
    """A store, its sources as lists of rows by file, and of which days each table was computed with which dimension."""

    beam = False

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="millrace-sequences-"))
        self.files: dict[str, dict[str, list[Row]]] = {"asks": {"0": []}, "pays": {"0": []}}
        self.town: list[dict[int, int]] = [{1: 2}]
        self.known: list[dict[int, int]] = [{}, {}]  # per view and day, the dimension that it was computed with
        self.numbers, self.launched = 0, 0
        self.sizes = date_spans.SPAN_ROWS, date_spans.FILE_ROWS, date_spans.FEW_FILES
        (self.root / "definition.py").write_text(
            DEFINITION + "view = FeatureView('ever', asks, key='id', features=EVER)\n"
        )
        (self.root / "more.py").write_text(
            DEFINITION + "view = FeatureView('ever', asks, key='id', features=EVER + MORE)\n"
        )
        self.change(("dimension", {1: 2}))
        for source in self.files:
            self.write(source, "0", [])

    def teardown(self) -> None:
        date_spans.SPAN_ROWS, date_spans.FILE_ROWS, date_spans.FEW_FILES = self.sizes
        shutil.rmtree(self.root)

    @initialize(
        paid=st.lists(payments, max_size=8),
        spine_days=st.sets(days, min_size=1, max_size=6),
        sizes=st.tuples(st.integers(1, 12), st.integers(2, 30), st.integers(0, 3)),
    )
    def begin(self, paid: list[Row], spine_days: set[int], sizes: tuple[int, int, int]) -> None:
        # Partitions of one date, of some and of all; several files in one; merged at once or later.
        date_spans.SPAN_ROWS, date_spans.FILE_ROWS, date_spans.FEW_FILES = sizes
        self.change(("late rows", paid))
        self.change(("days with spine rows", spine_days))

    @rule(several=st.lists(changes, max_size=2), flags=runs)
    def run(self, several: list[Any], flags: Flags) -> None:
        for each in several:
            self.change(each)
        self.launch(flags)

    # What happens to the sources.

    def change(self, what: tuple[Any, ...]) -> None:
        kind, *rest = what
        if kind == "late rows":
            self.add("pays", rest[0])
        elif kind == "questions":
            self.add("asks", rest[0])
        elif kind == "days with spine rows":
            self.add(
                "asks", [{"at": START + timedelta(days=day, hours=12), "k": 1, "x": 0.5} for day in sorted(rest[0])]
            )
        elif kind == "repeats":
            choose = random.Random(rest[1])
            there = [row["no"] for rows in self.files["pays"].values() for row in rows]
            self.add("pays", [{**row, "no": choose.choice(there)} for row in rest[0]] if there else rest[0])
        elif kind in ("deleted", "day deleted"):
            self.delete(rest[0], *((random.Random(rest[1]), None) if kind == "deleted" else (None, rest[1])))
        elif kind == "rewritten":
            self.rewrite(rest[0], random.Random(rest[1]))
        else:
            self.town.append(rest[0])
            rows = [{"k": key, "town": town} for key, town in rest[0].items()]
            self.write("shops", "0", rows)

    def add(self, source: str, rows: list[Row]) -> None:
        name = "id" if source == "asks" else "no"
        fresh = []
        for row in rows:
            self.numbers += 1
            fresh.append({**row, name: self.numbers if row.get(name) is None else row[name]})
        self.numbers += 1
        self.files[source][str(self.numbers)] = fresh
        self.write(source, str(self.numbers), fresh)

    def delete(self, source: str, choose: random.Random | None, day: int | None) -> None:
        """Some rows of one file, or a file, or all rows of a day."""
        files = self.files[source]
        if choose is not None and len(files) > 1 and choose.random() < 0.3:
            name = choose.choice(sorted(files))
            del files[name]
            (self.root / "sources" / source / f"{name}.parquet").unlink()
            return
        for name, rows in files.items():
            kept = [
                row
                for row in rows
                if (
                    choose.random() < 0.7 if choose is not None else row["at"].date() != as_date(FIRST_DAY + (day or 0))
                )
            ]
            if len(kept) < len(rows):
                files[name] = kept
                self.write(source, name, kept)

    def rewrite(self, source: str, choose: random.Random) -> None:
        """The same rows in other files, in another order."""
        rows = [row for some in self.files[source].values() for row in some]
        choose.shuffle(rows)
        for name in self.files[source]:
            (self.root / "sources" / source / f"{name}.parquet").unlink()
        half = choose.randrange(len(rows) + 1)
        self.files[source] = {}
        for some in (rows[:half], rows[half:]):
            self.add(source, some)

    def write(self, source: str, name: str, rows: list[Row]) -> None:
        folder = self.root / "sources" / source
        folder.mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame(rows, schema=SOURCES[source].schema, orient="row")
        frame.write_parquet(folder / f"{name}.parquet", row_group_size=3)

    # Runs.

    def options(self, flags: Flags, folder: str, run_id: str) -> features.FeaturesOptions:
        path = self.root / ("more.py" if flags.view else "definition.py")
        argv = ["--definition", str(path), "--store", str(self.root / folder), "--sources", str(self.root / "sources")]
        options = features.parse([*argv, "--run_id", run_id, "--no-statistics", *flags.words])
        return dataclasses.replace(options, definition=Definition("d", str(path), VIEWS[flags.view], None))

    def launch(self, flags: Flags) -> None:
        self.launched += not (flags.again and self.launched)
        options = self.options(flags, "store", f"run{self.launched}")
        if flags.cleaned:
            with contextlib.redirect_stdout(io.StringIO()):
                assert vacuum(["--store", options.store, "--older_than", "0s", "--retention", "0s", "--force"]) == 0
        before = self.table(options)
        if before is None and not any(self.files["asks"].values()):
            return
        try:
            work = features.prepare(options)
        except DataError as error:
            if "must have rows in the interval" not in str(error):
                raise
            return
        if flags.killed:
            if work.plan is not None:
                outputs_of(VIEWS[flags.view], work.plan, options.table, work.segments, work.chains, work.copies)
            return
        if self.beam:
            path = self.root / ("more.py" if flags.view else "definition.py")
            argv = ["--definition", str(path), "--store", options.store, "--sources", options.sources]
            with contextlib.redirect_stdout(io.StringIO()):
                assert features.main([*argv, "--run_id", options.run_id, "--no-statistics", *flags.words]) == 0
        else:
            perform(options)
        if work.plan is not None:
            done = {day for first, last in work.plan.ranges for day in range(first // DAY, last // DAY)}
            known = {} if work.plan.dates is None else self.known[flags.view]
            self.known[flags.view] = {**known, **dict.fromkeys(done, len(self.town) - 1)}
        self.check(flags, options, before)

    def table(self, options: features.FeaturesOptions) -> pl.DataFrame | None:
        if open_table(options.table) is None:
            return None
        return pl.read_delta(options.table).sort("at", "id")

    # What is right.

    def rows(self, town: int) -> dict[str, pl.DataFrame]:
        """The sources' good rows, repeats removed, with one of the dimensions there have been."""
        frames = {
            name: pl.DataFrame(
                [row for rows in files.values() for row in rows], schema=SOURCES[name].schema, orient="row"
            )
            for name, files in self.files.items()
        }
        pays = frames["pays"].filter(pl.col("v").is_null() | pl.col("v").is_finite())
        first = pays.sort("at", "no", "k", "v", "s").unique("no", keep="first", maintain_order=True)
        shops = [{"k": key, "town": where} for key, where in self.town[town].items()]
        return {**frames, "pays": first, "shops": pl.DataFrame(shops, schema=SOURCES["shops"].schema, orient="row")}

    def check(self, flags: Flags, options: features.FeaturesOptions, before: pl.DataFrame | None) -> None:
        view, got = VIEWS[flags.view], self.table(options)
        assert got is not None
        day = pl.col("date").cast(pl.Int32)
        inside = pl.lit(True)
        if flags.bounds is not None:
            first, last = (FIRST_DAY + each for each in flags.bounds)
            inside = (day >= first) & (day < last)
            if before is not None:
                assert_frame_equal(got.filter(~inside), before.filter(~inside), check_exact=True)
            else:
                assert got.filter(~inside).is_empty()
        got = got.filter(inside)
        known = self.known[flags.view]
        days = got.select(day.unique())["date"]
        current = all(each in known and self.town[known[each]] == self.town[-1] for each in days)
        assert current or not flags.refresh
        self.check_against(view, got, inside)
        fresh = self.fresh(flags).filter(inside)
        unsure = [] if current else FROM_SHOPS
        assert_frame_equal(got.drop(unsure), fresh.drop(unsure), check_exact=True)
        if flags.bounds is None:
            self.check_snapshots(view, options)

    def check_against(self, view: FeatureView, got: pl.DataFrame, inside: pl.Expr) -> None:
        """The kernel over all rows at once, and a scan of every row, each with the dimension that the day used."""
        known = self.known[VIEWS.index(view)]
        days = got.select(pl.col("date").cast(pl.Int32).unique())["date"].to_list()
        for town in {known[day] for day in days} or {len(self.town) - 1}:
            tables = self.rows(town)
            some = [as_date(day) for day in days if known[day] == town]
            spine_rows = (
                tables["asks"].filter(pl.col("at").dt.date().is_in(some) if days else pl.lit(True)).sort("at", "id")
            )
            spine_rows = spine_rows if days else spine_rows.filter(inside_of(spine_rows, inside))
            kernel = compute(view, spine_rows, KernelTables(tables))
            columns = [*view.context, *view.columns]
            mine = got.filter(pl.col("date").is_in(some)).select(columns)
            assert_frame_equal(mine, kernel.select(columns), check_exact=True)
            scanned = pl.DataFrame(oracles.features(view, spine_rows, tables), schema=mine.schema, orient="row")
            rounded = [name for name in view.columns if "_std_" in name]
            assert_frame_equal(mine.drop(rounded), scanned.drop(rounded), check_exact=True)

    def fresh(self, flags: Flags) -> pl.DataFrame:
        """The table of a store made anew."""
        plain = dataclasses.replace(
            flags, bounds=None, full=False, refresh=False, block_rows=800_000, plan="auto", key_shards="auto"
        )
        options = self.options(plain, "fresh", "fresh")
        if any(self.files["asks"].values()):
            perform(options)
            table = self.table(options)
            shutil.rmtree(options.store)
            assert table is not None
            return table
        return pl.DataFrame(schema=self.table(self.options(plain, "store", "none")).schema)  # type: ignore[union-attr]

    def check_snapshots(self, view: FeatureView, options: features.FeaturesOptions) -> None:
        """Whatever the next run may start from is the summary of all rows before."""
        manifest = read_manifest(open_table(options.table))
        current = digest_changes(take_inventory(view, options.sources, options.now), manifest)
        tables, groups = self.rows(0), lifetime_groups(view).values()
        for until, files in usable_snapshots(view, manifest, current, 2**62):
            for file, group in zip(files, groups, strict=True):
                source, keys = group[0].source, [column for _, column in group[0].keys]
                events = tables[source.name].filter(pl.col("at").to_physical() < until)
                assert_summaries_equal(read_summary(options.table, file), summarise(group, events), keys)


def inside_of(spine_rows: pl.DataFrame, inside: pl.Expr) -> pl.Series:
    return (
        spine_rows.with_columns(pl.col("at").dt.date().alias("date")).select(inside.alias("in")).to_series()
        if len(spine_rows)
        else pl.Series([], dtype=pl.Boolean)
    )


def assert_summaries_equal(got: pl.DataFrame, expected: pl.DataFrame, keys: list[str]) -> None:
    """But for the order of rows and columns, and for digits that are zero everywhere."""
    found = []
    for frame in (got, expected):
        zero = [
            name
            for name in frame.columns
            if name.split(" ")[-1].lstrip("sq-").isdigit() and not (frame[name] != 0).any()
        ]
        frame = frame.drop(zero).sort(keys)
        found.append(frame.select(sorted(frame.columns)))
    assert_frame_equal(*found, check_exact=True)


class ThroughBeam(Sequences):
    """The same with every run through the pipeline's `main`."""

    beam = True


def looking(examples: int, steps: int = 6) -> settings:
    return settings(
        max_examples=examples, stateful_step_count=steps, deadline=None, suppress_health_check=list(HealthCheck)
    )


class TestSequences(Sequences.TestCase):  # type: ignore[name-defined, misc]
    settings = looking(50, steps=4)


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestManySequences(Sequences.TestCase):  # type: ignore[name-defined, misc]
    settings = looking(1000)


@pytest.mark.slow
@pytest.mark.timeout(7200)
class TestSequencesThroughBeam(ThroughBeam.TestCase):  # type: ignore[name-defined, misc]
    settings = looking(50)


PLAIN = Flags(0, None, False, False, 800_000, "auto", "auto", again=False, killed=False, cleaned=False)


@pytest.fixture
def story() -> Iterator[Sequences]:
    """A store with a payment on each day."""
    made = Sequences()
    made.add("pays", [pay(day) for day in range(DAYS)])
    yield made
    made.teardown()


def pay(day: int, hour: int = 6) -> Row:
    return {"at": START + timedelta(days=day, hours=hour), "no": None, "k": 1, "v": 2.0**day, "s": "a"}


def ask(story: Sequences, days: Iterable[int], **how: Any) -> None:
    story.change(("days with spine rows", set(days)))
    story.launch(dataclasses.replace(PLAIN, **how))


@pytest.mark.parametrize("beam", [False, True])
@pytest.mark.parametrize(
    ("first", "then"), [(range(5), (5, 7, 9)), (range(10), (2, 4, 6)), ((5, 8), ()), ((1, 3, 5), ())]
)
def test_days_apart_from_each_other_are_computed_in_one_run(
    story: Sequences, first: Iterable[int], then: Iterable[int], beam: bool
) -> None:
    story.beam = beam
    ask(story, first)
    story.add("pays", [] if then else [pay(1, 7)])  # late
    ask(story, then)
    story.add("pays", [pay(0, 7)])
    story.launch(dataclasses.replace(PLAIN, block_rows=2, plan="shuffle"))


def test_a_launch_that_was_killed_leaves_the_snapshots_of_the_one_before(story: Sequences) -> None:
    ask(story, (2, 5))
    story.add("pays", [pay(1, 7)])
    late = str(story.numbers)
    story.launch(dataclasses.replace(PLAIN, again=True, killed=True))  # under the run id that committed before
    story.files["pays"][late] = []
    story.write("pays", late, [])
    ask(story, (8,))


def test_spine_rows_that_were_all_deleted_may_come_back(story: Sequences) -> None:
    ask(story, (2, 5, 7))
    spine_rows = dict(story.files["asks"])
    for name in spine_rows:
        story.files["asks"][name] = []
        story.write("asks", name, [])
    story.launch(PLAIN)
    story.files["asks"] = spine_rows
    for name, rows in spine_rows.items():
        story.write("asks", name, rows)
    story.launch(PLAIN)


@pytest.mark.parametrize("change", ["deleted", "late"])
def test_full_on_some_days_does_not_hide_what_changed_on_others(story: Sequences, change: str) -> None:
    ask(story, range(9))
    if change == "deleted":
        story.delete("pays", None, 2)
    else:
        story.add("pays", [pay(2, 7)])
    story.launch(dataclasses.replace(PLAIN, full=True, bounds=(5, 6)))
    story.launch(PLAIN)
    ask(story, (9,))
