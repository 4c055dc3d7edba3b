"""`millrace erase`: a marked person, and a search over every byte of the store."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines.cli import main
from tests.support.marked_person import DEFINITION, PERSON, SOURCES, START, WHERE, Store, rows
from transforms.lineage.erasure_records import erasures
from transforms.storage.run_markers import remove_marker, write_marker


def whole(root: Path, delta: bool = False) -> Store:
    store = Store(root, DEFINITION.replace("INPUTS", "None").replace(", features=None", ""))
    text = store.definition.read_text()
    store.definition.write_text(
        text.replace("rounds=3)", "rounds=3, encode=ENCODERS)").replace(
            "ENCODERS",
            '{"orders_note": encoders.Ordinal(), "people_remark": encoders.Hashing(8), "note": encoders.Hashing(8)}',
        )
    )
    for name, frame in rows().items():
        store.put(name, frame, delta)
    return store


def of_models(path: str) -> bool:
    return path.startswith("registry/artifacts/") and "/artifacts/model/" in path


@pytest.mark.parametrize("delta", [False, True], ids=["parquet", "delta"])
def test_nothing_of_a_marked_person_is_left(delta: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = whole(tmp_path, delta)
    store.run()
    before = store.found()
    kinds = {path.split("/")[0] for path in before}
    assert {"sources", "features", "examples", "predictions", "registry"} <= kinds, "the search sees the marker"
    expected = {name: frame.filter(pl.col("cust") != PERSON) for name, frame in rows().items()}
    assert store.erase("orders", WHERE, "--dry_run") == 0
    assert store.found() == before, "a dry run changes nothing"
    for name in SOURCES:
        capsys.readouterr()
        assert store.erase(name) == 0
        printed = capsys.readouterr().out
        assert "not reached: topics" in printed
        assert "vw 1" in printed, "the model that learned from the rows is named"
    assert not [path for path in store.found() if not of_models(path)]
    store.run()
    assert not [path for path in store.found() if not (of_models(path))]
    artifacts = store.store / "registry" / "artifacts" / "vw"
    newest = max(artifacts.iterdir(), key=os.path.getmtime).name
    assert not [path for path in store.found() if newest in path], (
        "the model that was trained again knows nothing of it"
    )
    for name, frame in expected.items():
        folder = store.store / "sources" / name
        now = pl.read_delta(str(folder)) if delta else pl.read_parquet(folder / "a.parquet")
        assert now.sort("cust", *([] if name == "people" else ["k"])).equals(
            frame.sort("cust", *([] if name == "people" else ["k"]))
        )
    capsys.readouterr()
    trace = ["trace", *store.flags, "--key", f"cust={PERSON}", "--time"]
    assert main([*trace, START.isoformat()]) == 0
    assert f"erased on {datetime.now(UTC):%Y-%m-%d}" in capsys.readouterr().out
    assert main([*trace, (START + timedelta(days=500)).isoformat()]) == 3
    (prediction,) = next(each for each in erasures(str(store.store)) if each.source == "orders").prediction_ids[:1]
    assert main(["trace", *store.flags, "--prediction", str(prediction)]) == 0
    assert "erased on" in capsys.readouterr().out
    assert store.erase("orders") == 0
    assert "no row of orders matches" in capsys.readouterr().out


KILLED = """
import os, signal, sys
from transforms.lineage import erasure
from transforms.storage import rewriting
from beam_pipelines.cli import main

left = int(sys.argv[1])

def counted(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    return call

os.replace, os.remove, os.rename, os.link = map(counted, (os.replace, os.remove, os.rename, os.link))
rewriting._append = counted(rewriting._append)
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("delta", [False, True], ids=["parquet", "delta"])
def test_an_erasure_that_is_killed_is_completed_by_the_same_command(delta: bool, tmp_path: Path) -> None:
    store = whole(tmp_path, delta)
    store.run()
    arguments = ["erase", "orders", *store.flags, "--where", WHERE]
    kills = 0
    for step in (0, 4, 15, 40, 10_000):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(step), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        if done.returncode != -signal.SIGKILL:
            assert done.returncode == 0, done.stderr
            break
        kills += 1
    assert kills >= 2
    (record,) = erasures(str(store.store))
    assert record.finished is not None
    assert len(record.row_ids) == 6
    for name in ("returns", "people"):
        assert store.erase(name) == 0
    store.run()
    assert not [path for path in store.found() if not of_models(path)]


def test_a_store_at_work_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = Store(tmp_path, DEFINITION.replace(", features=INPUTS", ""))
    for name, frame in rows().items():
        store.put(name, frame)
    store.definition.write_text(store.definition.read_text().split("model = ")[0])
    before = store.found()
    folder = str(store.store / "runs" / "busy")
    for pipeline in ("features", "features --streaming"):
        write_marker(folder, pipeline, "busy")
        assert store.erase("orders") == 8
        assert "run busy" in capsys.readouterr().err
        assert [path for path in store.found() if not path.startswith("runs")] == before
        remove_marker(folder)
    assert store.erase("orders") == 0


@pytest.mark.parametrize(
    ("where", "printed"),
    [
        ("customer = 'a'", "declares: at, k, cust, note, price"),
        ("1 = 1", "--where names a column"),
        ("price + 1", "true or false"),
        ("cust =", "a condition on one row"),
        ("cust > 5", "fits the columns"),
    ],
)
def test_a_condition_that_says_nothing_of_a_row_is_refused(
    where: str, printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, DEFINITION.split("model = ")[0])
    store.put("orders", rows()["orders"])
    assert store.erase("orders", where) == 2
    assert printed in capsys.readouterr().err
    assert store.erase("order") == 2
    assert "Did you mean 'orders'" in capsys.readouterr().err
    assert not (store.store / "erasures").exists()
