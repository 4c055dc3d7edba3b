"""Which of several rows a feature takes depends on the rows and the declaration alone, in batch and live."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import polars as pl
import pytest

from beam_pipelines import features, features_streaming
from beam_pipelines.commands import parity
from schemas import FeatureView, Label, load_definition
from schemas.sources import Source
from tests.support import oracles
from tests.support.tables import figures_of, rows_of
from transforms.storage.paths import features_live_uri
from transforms.training.labels import attach

T0 = datetime(2024, 1, 1, tzinfo=UTC)
HEAD = """
import polars as pl
from schemas import Derived, FeatureView, Latest, Lookup, Source, Trailing

WIDE = {
    "z": pl.Float64, "r": pl.Int64, "e": pl.Int64, "k": pl.Int64,
    "a": pl.Int64, "s": pl.String, "v": pl.Float64, "b": pl.Boolean,
}
ev = Source("ev", time="at", order="r", columns=WIDE)
bare = Source("bare", time="at", columns=WIDE)
once = Source("once", time="at", unique="e", columns=WIDE)
both = Source("both", time="at", unique=("e", "k"), order="r", columns=WIDE)
placed = Source("placed", time="at", event_time="was", order="r", columns=WIDE)
dim = Source("dim", columns={"z": pl.Float64, "k": pl.Int64, "a": pl.Int64, "s": pl.String})
q = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
"""
POOL = {
    "latest": 'Latest(ev, by="k", columns="s", max_age="1d", name="latest")',
    "ever": 'Latest(ev, by="k", columns="v", max_age="forever", name="ever")',
    "ends": 'Trailing(ev, by="k", over=("3h", "12h"), stats={"v": ("first", "last")}, name="ends")',
    "lifetime": 'Trailing(ev, by="k", over="all", stats={"s": ("first", "last")}, name="lifetime")',
    "kept": 'Trailing(once, by="k", over="6h", stats={"v": "sum", "*": "count"}, name="kept")',
    "where": 'Trailing(both, by="k", over="6h", where=pl.col("b"), stats={"a": ("sum", "median")}, name="where")',
    "newest": 'Latest(both, by="k", columns="s", max_age="6h", name="newest")',
    "placed": 'Trailing(placed, by="k", over="6h", stats={"s": "last"}, name="placed")',
    "dim": 'Lookup(dim, by="k", columns="s", name="looked")',
}
OTHERS = (
    ', Latest(ev, by="k", columns=("a", "b"), max_age="1h", name="o1")'
    ', Trailing(once, by="k", over="1h", stats={"a": "sum", "s": "n_unique"}, name="o2")'
    ', Lookup(dim, by="k", columns="a", name="o3")'
    ', Trailing(both, by="k", over="1h", stats={"v": "sum", "s": "count"}, name="o4")'
    ', Latest(placed, by="k", columns=("a", "v"), max_age="1h", name="o5")'
    ', Latest(bare, by="k", columns="s", max_age="1d", name="bare")'
)


def write(root: Path) -> dict[str, pl.DataFrame]:
    """Sources in which nearly every row ties with others, in another order in every file."""
    random = Random(7)
    frames: dict[str, pl.DataFrame] = {}
    for name in ("ev", "bare", "once", "both", "placed"):
        rows = []
        for _ in range(400):
            hour = random.randrange(48)
            rows.append(
                {
                    "at": T0 + timedelta(hours=hour),
                    "was": T0 + timedelta(hours=min(hour, 4 * random.randrange(12))),
                    "z": random.choice(
                        [None, float("nan"), -0.0, 0.0, *([2.0] if name == "bare" else [float("inf"), 1e300])]
                    ),
                    "r": random.choice([None, 1, 2]),
                    "e": hour // 2 * 3 + random.randrange(3),
                    "k": random.choice([1, 2, None]),
                    "a": random.randrange(3),
                    "s": random.choice(["x", "y", "é", None]),
                    "v": random.choice([None, float("nan"), -0.0, 0.25, 3.5]),
                    "b": random.choice([True, False, None]),
                }
            )
        frame = pl.DataFrame(rows, schema_overrides={"at": pl.Datetime("us", "UTC"), "was": pl.Datetime("us", "UTC")})
        frames[name] = frame if name == "placed" else frame.drop("was")
    frames["dim"] = pl.DataFrame(
        [
            {
                "z": random.choice([None, float("nan"), -0.0, 0.0, 2.0]),
                "k": random.choice([1, 2]),
                "a": random.randrange(3),
                "s": random.choice("xyw"),
            }
            for _ in range(9)
        ]
    )
    frames["q"] = pl.DataFrame(
        {"at": [T0 + timedelta(hours=3 * i + 1) for i in range(17)] * 2, "id": range(34), "k": [1] * 17 + [2] * 17},
        schema_overrides={"at": pl.Datetime("us", "UTC")},
    )
    for name, frame in frames.items():
        (root / "sources" / name).mkdir(parents=True)
        shuffled = frame.sample(fraction=1, shuffle=True, seed=3)
        shuffled[::2].write_parquet(root / "sources" / name / "0.parquet", row_group_size=50)
        shuffled[1::2].write_parquet(root / "sources" / name / "1.parquet", row_group_size=50)
    return frames


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, pl.DataFrame]]:
    folder = tmp_path_factory.mktemp("ties")
    return folder, write(folder)


def define(root: Path, chosen: Sequence[str], others: bool) -> tuple[str, FeatureView]:
    path = root / f"{'_'.join(chosen)}_{others}.py"
    listed = ", ".join(POOL[name] for name in chosen) + (OTHERS if others else "")
    path.write_text(HEAD + f'view = FeatureView("tied", spine=q, key="id", features=[{listed}])\n')
    return str(path), load_definition(str(path)).view


def read(uri: str) -> pl.DataFrame:
    return rows_of(uri).sort("at", "id")


def batch(root: Path, store: Path, chosen: Sequence[str], others: bool, *flags: str) -> pl.DataFrame:
    path, view = define(root, chosen, others)
    argv = [
        "--definition",
        path,
        "--store",
        str(store),
        "--sources",
        str(root / "sources"),
        "--max_dead_fraction",
        "1",
        *flags,
    ]
    assert features.main(argv) == 0
    return read(f"{store}/features/tied/{view.fingerprint}")


def settled(source: Source, frame: pl.DataFrame) -> pl.DataFrame:
    """Rows as docs/definition.md says: NaN is null; of repeats the first known stays, at one moment the smallest."""
    frame = frame.select(list(source.schema)).with_columns(pl.col(pl.Float64).fill_nan(None) + 0.0)
    rows = frame.rows(named=True)
    if source.time is None:
        by: tuple[str, ...] = ("k",)
    elif source.unique is None:
        return frame
    else:
        by = tuple(source.unique)
    kept: dict[Any, dict[str, Any]] = {}

    def position(row: dict[str, Any]) -> Any:
        return (
            row[source.time] if source.time else 0,
            *((row[name] is not None, row[name]) for name in [*(source.order or ()), *source.schema]),
        )

    for row in rows:
        key = tuple(row[name] for name in by)
        if None not in key and (key not in kept or position(row) < position(kept[key])):
            kept[key] = row
    return pl.DataFrame(list(kept.values()), schema=frame.schema)


@functools.cache
def expected(view: FeatureView, root: Path) -> pl.DataFrame:
    frames = {
        name: pl.concat([pl.read_parquet(f) for f in sorted((root / "sources" / name).glob("*.parquet"))])
        for name in (*view.sources, "q")
    }
    tables = {name: settled(source, frames[name]) for name, source in view.sources.items()}
    return pl.DataFrame(oracles.features(view, frames["q"].sort("at", "id"), tables), infer_schema_length=None)


def differing(found: pl.DataFrame, view: FeatureView, root: Path) -> list[str]:
    wanted = expected(view, root)
    return [name for name in view.columns if found[name].to_list() != wanted[name].to_list()]


@pytest.mark.parametrize("others", [False, True])
@pytest.mark.parametrize("name", POOL)
def test_a_feature_alone_and_in_company_is_that_of_the_rows(
    root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path, name: str, others: bool
) -> None:
    folder, _ = root
    _, view = define(folder, [name], others)
    assert differing(batch(folder, tmp_path, [name], others), view, folder) == []


@pytest.mark.parametrize(
    "flags", [("--plan", "shuffle"), ("--key_shards", "3", "--block_rows", "200"), ("--broadcast_mb", "0")]
)
def test_every_plan_takes_the_same_rows(
    root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    folder, _ = root
    _, view = define(folder, list(POOL), False)
    assert differing(batch(folder, tmp_path, list(POOL), False, *flags), view, folder) == []


def test_runs_of_single_days_take_the_same_rows(root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path) -> None:
    folder, _ = root
    _, view = define(folder, list(POOL), False)
    batch(folder, tmp_path, list(POOL), False, "--start", "2024-01-01", "--end", "2024-01-02")
    assert differing(batch(folder, tmp_path, list(POOL), False), view, folder) == []


@pytest.mark.parametrize("disorder", ["0s", "5h"])
def test_live_takes_the_same_rows_and_parity_agrees(
    root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path, disorder: str
) -> None:
    folder, _ = root
    chosen = [name for name in POOL if name != "dim"] if disorder != "0s" else list(POOL)
    path, view = define(folder, chosen, False)
    argv = ["--streaming", "--definition", path, "--store", str(tmp_path), "--sources", str(folder / "sources")]
    assert features_streaming.main([*argv, "--chunk", "1h", "--disorder", disorder]) == 0
    found = read(features_live_uri(str(tmp_path), "tied", view.fingerprint))
    if disorder == "0s":
        assert differing(found, view, folder) == []
    assert parity.main(["--definition", path, "--store", str(tmp_path)]) == 0


def test_rows_are_checked_by_the_columns_that_features_need(
    root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path
) -> None:
    """`z` is infinite in many rows: it only puts them in order, and no feature reads it."""
    folder, frames = root
    batch(folder, tmp_path, ["kept", "latest", "dim"], False, "--run_id", "r")
    sources = figures_of(tmp_path, "r")["sources"]
    assert frames["ev"]["z"].is_infinite().sum() > 0
    assert sources["ev"]["dead"] == 0
    assert sources["once"]["dead"] == 0
    plain = frames["dim"].select("k", "s").unique()
    assert sources["dim"]["used"] == 2
    assert sources["dim"]["repeated"] + sources["dim"]["dead"] == len(frames["dim"]) - 2
    assert sources["dim"]["dead"] >= len(plain) - 2


def test_what_is_read_for_the_order_is_what_can_decide() -> None:
    columns = {"z": pl.Int64, "k": pl.Int64, "v": pl.Float64, "last": pl.String}
    spine = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})

    def ordering(made: str, **source: Any) -> tuple[str, ...]:
        scope: dict[str, Any] = {}
        exec(HEAD, scope)
        ev = Source("ev", columns=columns, **source)
        feature = eval(made, {**scope, "ev": ev})
        return FeatureView("v", spine, "id", [feature]).columns_ordering("ev")

    timed = {"time": "at"}
    assert ordering('Latest(ev, by="k", columns="v", max_age="1d")', **timed, order="k") == ("z",)
    assert ordering('Latest(ev, by="k", columns="v", max_age="1d")', **timed) == (), "all are read"
    assert ordering('Latest(ev, by="k", columns="v", max_age="1d")', **timed, order="v") == (), "the order decides"
    assert ordering('Trailing(ev, by="k", over="1d", stats={"v": "sum"})', **timed) == (), "nothing is chosen"
    assert ordering('Trailing(ev, by="k", over="1d", stats={"v": "sum"})', **timed, unique="last") == ("z",)
    assert ordering('Trailing(ev, by="k", over="1d", stats={"*": "count"})', **timed, unique=("k", "last")) == ()
    assert ordering('Lookup(ev, by="k", columns="v")') == ("z",)
    assert ordering('Lookup(ev, by={"k": "z"}, columns="k")') == (), "what comes after cannot decide"


def test_a_view_has_another_fingerprint_where_its_choice_has_changed() -> None:
    """Where the columns that break ties are not those that it reads; their order is in it then."""
    spine = Source("q", time="at", columns={"id": pl.Int64, "k": pl.Int64})
    scope: dict[str, Any] = {}
    exec(HEAD, scope)

    def view(made: str, columns: Sequence[str], **source: Any) -> FeatureView:
        types = {name: pl.Float64 if name == "v" else pl.Int64 for name in columns}
        return FeatureView("v", spine, "id", [eval(made, {**scope, "ev": Source("ev", columns=types, **source)})])

    for made, source in (
        ('Latest(ev, by="k", columns="v", max_age="1d")', {"time": "at", "order": "k"}),
        ('Trailing(ev, by="k", over="1d", stats={"v": "first"})', {"time": "at", "order": "k"}),
        ('Trailing(ev, by="k", over="1d", stats={"v": "sum"})', {"time": "at", "unique": "k"}),
        ('Lookup(ev, by="k", columns="v")', {}),
    ):
        alike = [view(made, columns, **source) for columns in (("k", "v"), ("k", "v", "y", "z"))]
        assert alike[0].fingerprint == alike[1].fingerprint, "what stands behind cannot decide"
        changed = [
            view(made, columns, **source) for columns in (("y", "z", "k", "v"), ("z", "y", "k", "v"), ("z", "k", "v"))
        ]
        assert len({each.fingerprint for each in (alike[0], *changed)}) == 4
        assert {text for each in (*alike, *changed) for text in each.meanings.values()} == set(
            alike[0].meanings.values()
        )
    for made, source in (
        ('Latest(ev, by="k", columns="v", max_age="1d")', {"time": "at", "order": "v"}),
        ('Trailing(ev, by="k", over="1d", stats={"v": "sum"})', {"time": "at"}),
        ('Trailing(ev, by="k", over="1d", stats={"*": "count"})', {"time": "at", "unique": "k"}),
    ):
        assert view(made, ("k", "v"), **source).fingerprint == view(made, ("z", "v", "k"), **source).fingerprint, made


def test_a_table_whose_rows_were_taken_in_another_order_is_not_continued(
    root: tuple[Path, dict[str, pl.DataFrame]], tmp_path: Path
) -> None:
    """`bare` is read whole, so its order of columns is in no fingerprint: the manifest has it."""
    folder, _ = root
    path = folder / "turned.py"
    made = 'view = FeatureView("tied", spine=q, key="id", features=[Latest(bare, by="k", columns="s", max_age="1d")])\n'

    def run(head: str, run_id: str) -> tuple[FeatureView, pl.DataFrame, dict[str, Any]]:
        path.write_text(head + made)
        view = load_definition(str(path)).view
        argv = ["--definition", str(path), "--store", str(tmp_path), "--sources", str(folder / "sources")]
        assert features.main([*argv, "--run_id", run_id]) == 0
        reported = figures_of(tmp_path, run_id)
        return view, read(f"{tmp_path}/features/tied/{view.fingerprint}"), reported

    first, before, _ = run(HEAD, "first")
    assert run(HEAD, "again")[2]["rows_out"] == 0
    turned = HEAD.replace(
        'bare = Source("bare", time="at", columns=WIDE)',
        'bare = Source("bare", time="at", columns=dict(reversed(WIDE.items())))',
    )
    second, after, reported = run(turned, "turned")
    assert first.fingerprint == second.fingerprint
    assert reported["rows_out"] == len(after)
    assert differing(before, first, folder) == differing(after, second, folder) == []
    assert not before["bare_s"].equals(after["bare_s"]), "another row is taken"


def test_the_first_row_of_a_label_is_taken_by_declared_columns() -> None:
    ev = Source("ev", time="at", order="r", columns={"z": pl.Int64, "r": pl.Int64, "k": pl.Int64, "v": pl.Float64})
    label = Label(ev, on="k", value=pl.col("v"), within="1d")
    rows = {"at": [T0, T0, T0], "z": [3, 1, 2], "r": [1, 1, 1], "k": [1, 1, 1], "v": [1.0, 2.0, 3.0]}
    asked = pl.DataFrame({"k": [1], "at": [T0]}, schema={"k": pl.Int64, "at": pl.Datetime("us", "UTC")})
    for order in itertools.permutations(range(3)):
        events = pl.DataFrame({name: [values[i] for i in order] for name, values in rows.items()}, schema=ev.schema)
        assert attach(asked, events, label, "at")["__label"].to_list() == [2.0]
