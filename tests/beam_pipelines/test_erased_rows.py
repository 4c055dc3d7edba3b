"""Rows that are gone from a source are gone from every table after the next run: as if it were the store's first."""

import os
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from beam_pipelines import features, inference
from beam_pipelines.runtime.errors import guard
from schemas.loading import load_definition
from tests.support.inference_case import DEFINITION, train, write_sources
from transforms.models.registry import Registry, registry_uri
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import dead_letters_uri, features_uri, predictions_uri

START = datetime(2024, 1, 1, tzinfo=UTC)
TIMES = {"orders": "asked_at", "sales": "sold_at"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with bad rows, features, a champion and its predictions."""
    root = tmp_path_factory.mktemp("built")
    (root / "definition.py").write_text(DEFINITION)
    store = root / "store"
    write_sources(store)
    for name, time in TIMES.items():
        path = store / "sources" / name / "part.parquet"
        rows = pl.read_parquet(path)
        # Of each day one bad row, and two rows without a plausible time in row groups of their own.
        bad = rows[::400].with_columns(pl.lit(float("inf"), pl.Float32).alias("amount" if name == "orders" else "paid"))
        bad = bad.with_columns(id=pl.col("id") + 100_000)
        never = rows[:1].with_columns(pl.lit(None, pl.Datetime("us", "UTC")).alias(time), id=pl.lit(-1, pl.Int64))
        pl.concat([rows, bad]).sort(time).write_parquet(path, row_group_size=700)
        never.write_parquet(path.with_name("never.parquet"))
        pl.concat([never, rows[900:901].with_columns(id=pl.lit(-2, pl.Int64))]).write_parquet(
            path.with_name("mixed.parquet")
        )
    assert run(root, store, features) == 0
    registry = Registry(registry_uri(str(store)))
    registry.register(train(str(root / "definition.py"), store), "run-1")
    registry.promote("orders", "1", "a test")
    assert run(root, store, inference) == 0
    return root


def run(root: Path, store: Path, pipeline: object, *flags: str) -> int:
    more = ("--max_dead_fraction", "1", "--verify", "0") if pipeline is features else ()
    arguments = ["--definition", str(root / "definition.py"), "--store", str(store), *more, *flags]
    return guard(pipeline.main)(arguments)  # type: ignore[attr-defined]


def tables(root: Path, store: Path) -> dict[str, pl.DataFrame]:
    view = load_definition(str(root / "definition.py")).view
    uris = {
        "features": features_uri(str(store), view.name, view.fingerprint),
        "predictions": predictions_uri(str(store), "orders"),
        "dead_letters": dead_letters_uri(str(store), "features"),
    }
    found = {}
    for name, uri in uris.items():
        table = open_table(uri)
        files = [] if table is None else data_files(table)
        if files:
            rows: pl.DataFrame = pl.from_arrow(read_group(files))  # type: ignore[assignment]
            if "file" in rows.columns:
                rows = rows.with_columns(pl.col("file").str.split("/sources/").list.last())
            found[name] = rows.select(sorted(rows.columns))
            found[name] = found[name].sort(found[name].columns)
    return found


def day(number: int) -> datetime:
    return START + timedelta(days=number)


KEPT = {
    "the last days": {"orders": lambda at: at < day(3), "sales": lambda at: at < day(4)},
    "the last days of the spine alone": {"orders": lambda at: at < day(3)},
    "the first days": {"orders": lambda at: at >= day(2), "sales": lambda at: at >= day(2)},
    "a day in between": {"orders": lambda at: (at < day(2)) | (at >= day(3))},
    "all but one day": {"orders": lambda at: (at >= day(2)) & (at < day(3))},
    "all events": {"sales": lambda at: at < day(0)},
    "some rows of each day": {"orders": lambda at: at.dt.minute() < 40, "sales": lambda at: at.dt.minute() < 30},
    "bad rows": {"orders": lambda at: pl.col("amount").is_finite(), "sales": lambda at: pl.col("paid").is_finite()},
    "rows without a time": {"orders": lambda at: at.is_not_null(), "sales": lambda at: at.is_not_null()},
}


def erase_rows(store: Path, kept: dict[str, object]) -> None:
    for name, keep in kept.items():
        for path in sorted((store / "sources" / name).glob("*.parquet")):
            rows = pl.read_parquet(path)
            # A comparison with no time is not true, so rows without a time stay only where they are named.
            at = pl.col(TIMES[name])
            rest = rows.filter(keep(at) | at.is_null() if "time" not in str(keep(at)) else keep(at))  # type: ignore[operator]
            rest.write_parquet(path, row_group_size=700)


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["continued", "full"])
@pytest.mark.parametrize("which", KEPT)
def test_every_table_is_what_a_fresh_store_holds(
    which: str, flags: tuple[str, ...], built: Path, tmp_path: Path
) -> None:
    store, fresh = tmp_path / "store", tmp_path / "fresh"
    shutil.copytree(built / "store", store, copy_function=shutil.copy2)
    erase_rows(store, KEPT[which])
    shutil.copytree(store / "sources", fresh / "sources", copy_function=shutil.copy2)
    os.symlink(store / "registry", fresh / "registry")
    for each, more in ((store, flags), (fresh, ())):
        assert run(built, each, features, *more) == 0
        assert run(built, each, inference) == 0
    compare(tables(built, store), tables(built, fresh))


def compare(found: dict[str, pl.DataFrame], wanted: dict[str, pl.DataFrame]) -> None:
    assert found.keys() == wanted.keys()
    for name, rows in wanted.items():
        assert_frame_equal(found[name].drop("model_version", strict=False), rows.drop("model_version", strict=False))


@pytest.mark.parametrize("flags", [(), ("--full",)], ids=["continued", "full"])
def test_a_spine_without_rows_leaves_no_rows(flags: tuple[str, ...], built: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(built / "store", store, copy_function=shutil.copy2)
    erase_rows(store, {"orders": lambda at: at < day(0)})
    assert run(built, store, features, *flags) == 0
    assert "features" not in tables(built, store)
    assert run(built, store, inference) == 0
    assert "predictions" not in tables(built, store)
    assert run(built, store, inference) == 3  # and there is nothing left to remove


@pytest.mark.parametrize(
    "flags", [("--start", "2024-01-03"), ("--start", "2024-01-04", "--end", "2024-01-09"), ("--end", "2024-01-08")]
)
def test_an_interval_removes_its_days_whose_rows_are_gone(flags: tuple[str, ...], built: Path, tmp_path: Path) -> None:
    store, fresh = tmp_path / "store", tmp_path / "fresh"
    shutil.copytree(built / "store", store, copy_function=shutil.copy2)
    erase_rows(store, KEPT["the last days"])
    shutil.copytree(store / "sources", fresh / "sources", copy_function=shutil.copy2)
    os.symlink(store / "registry", fresh / "registry")
    for each, more in ((store, flags), (fresh, ())):
        assert run(built, each, features, *more) == 0
        assert run(built, each, inference, *more) == 0
    compare(tables(built, store), tables(built, fresh))


SMALL = """
import polars as pl
from schemas import FeatureView, Lookup, Source, Trailing

asks = Source("asks", time="at", columns={"id": pl.Int64, "g": pl.String})
events = Source("events", time="at", columns={"g": pl.String, "v": pl.Float64})
groups = Source("groups", columns={"g": pl.String, "w": pl.Float64})
view = FeatureView("small", spine=asks, key="id", features=[
    Lookup(groups, by="g", columns="w"), Trailing(events, by="g", over="1d", stats={"v": "sum"}),
])
"""


class Small:
    """A store whose files are written, changed and removed between the runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, root / "store"
        (root / "definition.py").write_text(SMALL)

    def put(self, path: str, **columns: list[object]) -> None:
        file = self.store / "sources" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        types = {"at": pl.Datetime("us", "UTC")} if "at" in columns else {}
        pl.DataFrame(columns, schema_overrides=types).write_parquet(file)

    def run(self, *flags: str) -> None:
        assert run(self.root, self.store, features, "--no-statistics", *flags) == 0

    def dead_letters(self, store: Path) -> pl.DataFrame:
        table = open_table(dead_letters_uri(str(store), "features"))
        files = [] if table is None else data_files(table)
        if not files:
            return pl.DataFrame(schema=["source", "file", "row", "field", "rule", "value", "date"])
        rows: pl.DataFrame = pl.from_arrow(read_group(files))  # type: ignore[assignment]
        rows = rows.with_columns(pl.col("file").str.split("/sources/").list.last())
        return rows.sort("source", "file", "row")

    def check(self) -> pl.DataFrame:
        fresh = self.root / "fresh"
        shutil.copytree(self.store / "sources", fresh / "sources")
        assert run(self.root, fresh, features, "--no-statistics") == 0
        found, wanted = self.dead_letters(self.store), self.dead_letters(fresh)
        shutil.rmtree(fresh)
        assert found.rows() == wanted.rows()
        return found


def test_dead_letters_are_those_of_the_files_as_they_are(tmp_path: Path) -> None:
    """Of dimensions, of rows without a time, of days without spine rows, of contradictions, of files that are gone."""
    small = Small(tmp_path)
    small.put("groups/a.parquet", g=["a", "b", "b"], w=[1.0, float("inf"), 2.0])
    small.put("asks/1.parquet", at=[day(1), day(1), None], id=[1, 1, 9], g=["a", "b", "a"])
    small.put("events/1.parquet", at=[day(0), None, day(0)], g=["a", "a", "a"], v=[1.0, 2.0, float("inf")])
    small.put("events/never.parquet", at=[None], g=["a"], v=[5.0])
    small.run()
    assert len(small.check()) == 6
    small.put("asks/2.parquet", at=[day(7)], id=[2], g=["b"])
    small.put("events/5.parquet", at=[day(5), None, day(6)], g=["a"] * 3, v=[float("inf"), 1.0, 1.0])
    small.run()
    assert len(small.check()) == 8, "two of days without spine rows, none twice"
    small.run("--start", "2024-01-02", "--end", "2024-01-03")
    assert len(small.check()) == 8
    small.put("events/5.parquet", at=[day(6), day(6)], g=["a"] * 2, v=[1.0, 1.0])
    small.put("groups/a.parquet", g=["a", "b", "b"], w=[1.0, 3.0, 2.0])
    small.run()
    assert len(small.check()) == 6, "nothing is computed again, and yet the dead letters follow the files"
    (tmp_path / "store" / "sources" / "events" / "never.parquet").unlink()
    small.put("asks/1.parquet", at=[day(1), day(1), None], id=[1, 1, 9], g=["b", "a", "a"])
    small.put("groups/a.parquet", g=["a", "b"], w=[1.0, 2.0])
    small.run()
    small.check()
    small.put("asks/3.parquet", at=[day(3), day(3)], id=[1, 1], g=["b", "a"])
    small.put("events/1.parquet", at=[day(0)], g=["a"], v=[1.0])
    small.run("--refresh")
    small.check()
    before = (tmp_path / "store" / "dead_letters" / "features" / "_delta_log").glob("*")
    count = len(list(before))
    small.run()
    assert len(list((tmp_path / "store" / "dead_letters" / "features" / "_delta_log").glob("*"))) == count


def test_two_runs_on_different_days_with_a_bad_dimension_row_both_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = Small(tmp_path)
    small.put("groups/a.parquet", g=["a", "b"], w=[1.0, float("inf")])
    small.put("asks/1.parquet", at=[day(1), day(2)], id=[1, 2], g=["a", "b"])
    small.put("events/1.parquet", at=[day(0)], g=["a"], v=[1.0])
    small.run("--start", "2024-01-02", "--end", "2024-01-03")
    build = features.build

    def meanwhile(*arguments: object) -> None:
        build(*arguments)  # type: ignore[arg-type]
        monkeypatch.setattr(features, "build", build)
        small.run("--start", "2024-01-02", "--end", "2024-01-03", "--full")

    monkeypatch.setattr(features, "build", meanwhile)
    small.run("--start", "2024-01-03", "--end", "2024-01-04")
    assert len(small.check()) == 1
