"""`millrace erase` on a live store: a marked person, a search over every byte of it, and what parity, verify and trace
then report; and on a full store, what erasing reaches."""

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features
from beam_pipelines.cli import main
from schemas.loading import load_definition
from tests.support.marked_person import PERSON, START, WHERE, LiveStore, with_shops
from tests.support.tables import rows_of
from tests.support.turns import Job, JobOptions
from transforms.lineage import erasure
from transforms.lineage.erasure_records import erasures
from transforms.records.times import FOREVER
from transforms.storage.paths import features_live_uri, features_uri, tables_below
from transforms.storage.run_markers import remove_marker, write_marker
from transforms.streaming.messages import Message, heartbeat, to_arrow

SOURCES = ("returns", "people", "orders")
# What a store may hold.  A new kind of table needs a rule for how rows are erased from it (docs/erase.md).
KNOWN = {
    *("sources", "features", "predictions", "examples", "dead_letters", "registry", "runs", "erasures"),
    *("features_live", "predictions_live", "dimensions", "live_view.json", "crash_guard"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("live")
    (root / "batch").mkdir()
    store = LiveStore(root)
    for name, frame in with_shops().items():
        store.batch.put(name, frame)
    store.batch.run()
    store.run_live()
    return root


@pytest.fixture
def store(built: Path, tmp_path: Path) -> LiveStore:
    shutil.rmtree(tmp_path)
    shutil.copytree(built, tmp_path, symlinks=True)
    return LiveStore(tmp_path)


def test_nothing_of_a_marked_person_is_left_in_a_live_store(
    store: LiveStore, capsys: pytest.CaptureFixture[str]
) -> None:
    view = load_definition(str(store.definition)).view
    kinds = {path.split("/")[0] for path in store.found()}
    held = {"sources", "features_live", "predictions_live", "dimensions", "dead_letters"}
    assert held <= kinds, "the search sees the marker"
    live = features_live_uri(str(store.store), view.name, view.fingerprint)
    before, predicted = rows_of(live), rows_of(str(store.store / "predictions_live" / "vw"))
    assert store.parity("before")["questions_erased"] == 0
    assert store.erase_live("orders") == 2
    assert "Add --keep_sources" in capsys.readouterr().err
    everywhere = [path for path in store.batch.found() if not path.startswith("registry/")]  # the model's, of both
    for name in SOURCES:
        assert store.erase_live(name, "--keep_sources") == 0
    assert not store.found()
    assert set(everywhere) <= set(store.batch.found()), "the other store has a command of its own"

    # Feature rows of the person and of whoever met it within the day are gone, all others are as they were.
    after = rows_of(live)
    met = before.join_where(
        with_shops()["orders"].filter(cust=PERSON).select(pl.col("at").alias("then"), pl.col("shop").alias("there")),
        pl.col("shop") == pl.col("there"),
        pl.col("at") >= pl.col("then"),
        pl.col("at") <= pl.col("then") + timedelta(days=1),
    )
    gone = before.join(after, on="row_id", how="anti")
    assert set(met["row_id"]) | set(before.filter(cust=PERSON)["row_id"]) == set(gone["row_id"])
    assert after.sort("row_id").equals(before.join(gone, on="row_id", how="anti").sort("row_id"))
    assert set(rows_of(str(store.store / "predictions_live" / "vw"))["row_id"]) == set(after["row_id"])

    # Beside a batch store that has the person still, and after it was erased there too.
    for run_id in ("beside", "both"):
        found = store.parity(run_id)
        others = len(gone.filter(pl.col("cust") != PERSON))
        assert found["questions_erased"] == others
        assert found["values_differing"] == found["questions_unaccounted_for"] == 0
        full = found["full_batch"]
        assert isinstance(full, dict)
        assert full["unexplained"] == 0
        assert set(full["rows_without_an_answer"]) == {"corrected or erased row"}
        assert full["answers_that_batch_lacks"] == {}
        assert main(["verify", *store.flags, "--live", "--rows", "all"]) == 0
        if run_id == "beside":
            for name in SOURCES:
                assert store.batch.erase(name) == 0
            assert features.main([*store.batch.flags, "--max_dead_fraction", "1", "--run_id", "again"]) == 0
    capsys.readouterr()
    now = f"erased on {datetime.now(UTC):%Y-%m-%d}"
    for row in gone.iter_rows(named=True):
        if row["row_id"] in (gone.filter(cust=PERSON)["row_id"][0], met.filter(pl.col("cust") != PERSON)["row_id"][0]):
            trace = ["trace", *store.flags, "--live", "--key", f"cust={row['cust']}", "--time", row["at"].isoformat()]
            assert main(trace) == 0
            assert now in capsys.readouterr().out
            prediction = predicted.filter(row_id=row["row_id"])["prediction_id"][0]
            assert main(["trace", *store.flags, "--prediction", str(prediction)]) == 0
            assert now in capsys.readouterr().out


def test_a_job_that_starts_again_knows_nothing_of_the_person(store: LiveStore) -> None:
    view = load_definition(str(store.definition)).view
    for name in SOURCES:
        assert store.erase_live(name, "--keep_sources") == 0
        assert store.batch.erase(name) == 0
    begin = {name: {0: 0, 1: 0} for name in ("orders", "returns")}
    job = Job(view, store.store, Path(store.sources), begin, JobOptions("b"))
    at = START + timedelta(days=60)
    asked = [{"at": at, "k": 1000 + i, "cust": cust, "shop": "s0"} for i, cust in enumerate((PERSON, "c1"))]
    spine = pl.DataFrame(asked, schema=view.spine.schema, orient="row")
    first = {name: job.start[name][0] for name in ("orders", "returns")}
    messages = [Message("orders", 0, first["orders"], 2**51, None, to_arrow(spine))]
    for name in ("orders", "returns"):
        messages += [
            Message(name, 0, first[name] + (name == "orders"), 2**51, *heartbeat(FOREVER)),
            Message(name, 1, job.start[name][1], 2**51, *heartbeat(FOREVER)),
        ]
    job.take(messages)
    job.commit()
    made = rows_of(features_live_uri(str(store.store), view.name, view.fingerprint)).filter(at=at).sort("cust")
    person, other = made.rows(named=True)
    assert (person["cust"], person["orders_by_cust_price_count_all"], person["orders_note"]) == (PERSON, 0, None)
    assert person["people_remark"] is None
    kept = with_shops()["orders"].filter(cust="c1")
    assert other["orders_by_cust_price_count_all"] == kept["price"].is_finite().sum()
    assert store.parity("after")["values_differing"] == 0


def test_erasing_reaches_every_table_of_a_full_store(store: LiveStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch and live in one folder: a new kind of table makes this test fail."""
    shutil.copytree(store.batch.store, store.store, dirs_exist_ok=True, ignore=shutil.ignore_patterns("sources"))
    assert {path.name for path in store.store.iterdir()} <= KNOWN
    tables, reached = set(tables_below(str(store.store))), set[str]()
    rewrite = erasure.rewrite_delta

    def rewritten(uri: str, *arguments: object) -> int:
        reached.add(str(Path(uri).relative_to(store.store)))
        return rewrite(uri, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(erasure, "rewrite_delta", rewritten)
    for name in ("orders", "returns"):
        assert store.erase(name) == 0
    removed = tables - set(tables_below(str(store.store)))
    assert {name.split("/")[0] for name in tables} == KNOWN & {name.split("/")[0] for name in tables}
    assert {name.split("/")[0] for name in removed} == {"features"}
    assert reached | removed == tables
    assert {name.split("/")[0] for name in reached} == {
        *("sources", "predictions", "dead_letters", "features_live", "predictions_live")
    }


HELD = """
import sys
from beam_pipelines.{module} import {name}
from {owner} import {function} as before

def held(*arguments, **named):
    print("held", flush=True)
    sys.stdin.readline()
    return before(*arguments, **named)

import {owner}
{owner}.{function} = held
sys.exit({name}(sys.argv[1:]))
"""


def test_a_run_and_an_erasure_do_not_work_on_a_store_together(
    store: LiveStore, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = store.batch

    def started(code: str, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code, *arguments]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != "held":
            assert line or process.poll() is None
        return process

    def released(process: subprocess.Popen[str]) -> None:
        process.communicate("go\n", timeout=120)
        assert process.returncode == 0

    more = ["--max_dead_fraction", "1"]
    run = started(
        HELD.format(module="features", name="main", owner="beam_pipelines.features", function="execute"),
        *[*batch.flags, *more, "--run_id", "slow", "--full"],
    )
    assert batch.erase("orders") == 8
    assert "run slow (features)" in capsys.readouterr().err
    assert not list(erasures(str(batch.store)))
    released(run)
    everything = batch.found()
    erase = HELD.format(module="cli", name="main", owner="beam_pipelines.commands.erase", function="erase")
    run = started(erase, "erase", "orders", *batch.flags, "--where", WHERE)
    for pipeline in ("features", "training", "inference", "verify", "vacuum", "erase"):
        arguments = ["erase", "returns", "--where", WHERE, *batch.flags] if pipeline == "erase" else [pipeline]
        arguments += [] if pipeline == "erase" else batch.flags[2:] if pipeline == "vacuum" else batch.flags
        assert main(arguments) == 8, pipeline
        assert "(erase) has started" in capsys.readouterr().err
    assert main(["compact", *batch.flags[2:]]) == 8
    assert "(erase) has started" in capsys.readouterr().err
    assert main(["inference", "--streaming", *batch.flags]) == 8
    assert batch.found() == everything
    released(run)
    assert main(["features", *batch.flags, *more]) == 0
    # The live store, whose job may run elsewhere although its launcher is gone.
    folder = str(store.store / "runs" / "gone")
    write_marker(folder, "features --streaming", "gone")
    assert store.erase_live("returns", "--keep_sources") == 8
    remove_marker(folder)


def test_a_recorded_definition_serves_where_none_is_named(store: LiveStore, capsys: pytest.CaptureFixture[str]) -> None:
    batch = ["--store", str(store.batch.store)]
    assert main(["erase", "orders", *batch, "--where", WHERE]) == 0
    assert "by the definition that model vw 1 has recorded" in capsys.readouterr().out
    assert main(["erase", "order", *batch, "--where", WHERE]) == 2
    assert "looked at: vw 1" in capsys.readouterr().err
    assert main(["erase", "orders", "--store", str(store.store), "--where", WHERE]) == 2
    assert "looked at: none" in capsys.readouterr().err


REPEATING = """import polars as pl
from schemas import FeatureView, Source, Trailing

asked = Source("asked", time="t", columns={"id": pl.Int64, "shop": pl.String})
paid = Source("paid", time="at", unique="bill", columns={"bill": pl.Int64, "cust": pl.String, "shop": pl.String})
view = FeatureView("paying", asked, "id", [Trailing(paid, by="shop", over="2h", stats={"*": "count"})])
"""


def test_a_row_that_repeated_an_erased_one_counts_and_nothing_that_saw_it_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of one bill, the person's row came first, at another shop."""
    (tmp_path / "definition.py").write_text(REPEATING)
    start = datetime(2024, 3, 1, tzinfo=UTC)
    bills = [(0.1, 1, "person", "x"), (0.2, 1, "other", "y"), (0.3, 2, "other", "y"), (0.4, 3, "other", "z")]
    paid = [
        {"at": start + timedelta(hours=at), "bill": bill, "cust": who, "shop": shop} for at, bill, who, shop in bills
    ]
    asked = [{"t": start + timedelta(hours=1), "id": n, "shop": shop} for n, shop in enumerate("xyz")]
    for name, some in (("paid", paid), ("asked", asked)):
        (tmp_path / "in" / name).mkdir(parents=True)
        pl.DataFrame(some).with_columns(pl.col(pl.Datetime).dt.cast_time_unit("us")).write_parquet(
            tmp_path / "in" / name / "part.parquet"
        )
    flags = ["--definition", str(tmp_path / "definition.py"), "--store", str(tmp_path / "live")]
    read = ["--sources", str(tmp_path / "in")]
    assert main(["features", "--streaming", *flags, "--source", "replay", *read, "--without_history"]) == 0
    view = load_definition(str(tmp_path / "definition.py")).view
    uri = features_live_uri(str(tmp_path / "live"), view.name, view.fingerprint)
    counts = dict(rows_of(uri).select("shop", view.feature_names[-1]).iter_rows())
    assert counts == {"x": 1, "y": 1, "z": 1}
    where = ["--where", "cust = 'person'", "--keep_sources"]
    assert main(["erase", "paid", *flags, *read, *where]) == 0
    assert rows_of(uri)["shop"].to_list() == ["z"]
    # A replay would send the person's row again, which the files still have.
    capsys.readouterr()
    assert main(["features", "--streaming", *flags, "--source", "replay", *read, "--without_history"]) == 4
    assert "rows of paid were erased" in capsys.readouterr().err
    assert rows_of(uri)["shop"].to_list() == ["z"]
    assert main(["parity", *flags]) == 0
    assert main(["verify", *flags, "--live", "--rows", "all"]) == 0


def test_a_row_of_history_that_repeated_an_erased_one_counts_as_in_batch(tmp_path: Path) -> None:
    """Whether a row of history counts is stored when it is taken over, and decided anew when another one is erased.

    Bill 1: the person's row came first, then two others; bill 2: one of the person's that repeats another's.
    """
    (tmp_path / "definition.py").write_text(REPEATING.replace('"2h"', '"20d"'))
    start = datetime(2024, 3, 1, tzinfo=UTC)
    bills = [
        (1, 1, "person", "x"),
        (2, 1, "other", "y"),
        (3, 1, "third", "z"),
        (4, 2, "other", "y"),
        (5, 2, "person", "z"),
    ]
    paid = [
        {"at": start + timedelta(hours=at), "bill": bill, "cust": who, "shop": shop} for at, bill, who, shop in bills
    ]
    asked = [
        {"t": start + timedelta(days=day), "id": day * 9 + n, "shop": shop}
        for day in (0, 2)
        for n, shop in enumerate("xyz")
    ]
    for name, some in (("paid", paid), ("asked", asked)):
        (tmp_path / "in" / name).mkdir(parents=True)
        pl.DataFrame(some).with_columns(pl.col(pl.Datetime).dt.cast_time_unit("us")).write_parquet(
            tmp_path / "in" / name / "part.parquet"
        )
    flags = ["--definition", str(tmp_path / "definition.py"), "--store", str(tmp_path / "live")]
    read = ["--sources", str(tmp_path / "in")]
    streaming = ["features", "--streaming", *flags, "--source", "replay", *read, "--start", "2024-03-02"]
    assert main(streaming) == 0
    view = load_definition(str(tmp_path / "definition.py")).view
    name, uri = view.feature_names[-1], features_live_uri(str(tmp_path / "live"), view.name, view.fingerprint)
    assert dict(rows_of(uri).select("shop", name).iter_rows()) == {"x": 1, "y": 1, "z": 0}
    assert main(["erase", "paid", *flags, *read, "--where", "cust = 'person'"]) == 0
    stored = rows_of(str(tmp_path / "live" / "sources" / "paid")).sort("at").select("cust", "__counted").rows()
    assert stored == [("other", True), ("third", False), ("other", True)]

    begin = {each: {0: 0, 1: 0} for each in ("asked", "paid")}
    job = Job(view, tmp_path / "live", tmp_path / "in", begin, JobOptions("b"))
    again = pl.DataFrame(
        [{"t": start + timedelta(days=3), "id": 90 + n, "shop": shop} for n, shop in enumerate("xyz")],
        schema=view.spine.schema,
    )
    messages = [Message("asked", 0, job.start["asked"][0], 2**51, None, to_arrow(again))]
    for each in begin:
        messages += [
            Message(
                each, number, job.start[each][number] + (each == "asked" and number == 0), 2**51, *heartbeat(FOREVER)
            )
            for number in (0, 1)
        ]
    job.take(messages)
    job.commit()
    again.write_parquet(tmp_path / "in" / "asked" / "more.parquet")
    batch = [*flags[:2], "--store", str(tmp_path / "batch"), *read, "--run_id", "f"]
    assert main(["features", *batch]) == 0
    expected = rows_of(features_uri(str(tmp_path / "batch"), view.name, view.fingerprint))
    made = rows_of(uri).filter(pl.col("id") >= 90)
    both = made.join(expected, on="row_id", suffix="_batch")
    assert both.sort("shop").select("shop", name, f"{name}_batch").rows() == [("x", 0, 0), ("y", 2, 2), ("z", 0, 0)]
    parity = ["parity", *flags, "--batch_store", str(tmp_path / "batch"), *read]
    assert main(parity) == 0
    assert main(["verify", *flags, "--live", "--rows", "all"]) == 0
