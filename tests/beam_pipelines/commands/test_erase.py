"""`millrace erase`: a marked person, and a search over every byte of the store."""

import gzip
import os
import signal
import subprocess
import sys
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features, inference, training
from beam_pipelines.cli import main
from transforms.lineage.erasure_records import erasures
from transforms.storage.run_markers import remove_marker, write_marker

PERSON, NOTE = "Zaphkiel-Marked-7731", "Xylophonic-Remark-4419"
WHERE = f"cust = '{PERSON}'"
START = datetime(2024, 1, 1, tzinfo=UTC)
DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

orders = Source("orders", time="at", columns={
    "k": pl.Int64, "cust": pl.String, "note": pl.String, "price": pl.Float64})
returns = Source("returns", time="at", unique="k", columns={"k": pl.Int64, "cust": pl.String})
people = Source("people", columns={"cust": pl.String, "remark": pl.String})
view = FeatureView("vw", spine=orders, key="cust", features=[
    Derived(price=pl.col("price")),
    Latest(orders, by="cust", columns="note", max_age="forever"),
    Lookup(people, by="cust", columns="remark"),
    Trailing(orders, by="cust", over=("all", "9d"), stats={"price": ("mean", "count")}),
    Trailing(returns, by="cust", over="9d", stats={"*": "count"}),
])
model = Model(view, label=Label(returns, on="k", value=pl.lit(1), within="2d", absent=0),
    split=TimeSplit(validate="9d", test="9d"), params={"max_depth": 2}, rounds=3, features=INPUTS)
"""
SOURCES = ("orders", "returns", "people")


def rows() -> dict[str, pl.DataFrame]:
    orders = [
        {
            "at": START + timedelta(hours=4 * i),
            "k": i,
            "cust": PERSON if i % 50 == 0 else f"c{i % 7}",
            "note": NOTE if i % 50 == 0 else f"n{i % 3}",
            "price": float("inf") if i in (150, 151) else float(i * 37 % 101),
        }
        for i in range(300)
    ]
    returned = [
        {"at": row["at"] + timedelta(hours=5), "k": row["k"], "cust": row["cust"]}  # type: ignore[operator]
        for row in orders
        if row["price"] > 60  # type: ignore[operator]
    ]
    names = [PERSON, *(f"c{i}" for i in range(7))]
    frames = {
        "orders": pl.DataFrame(orders),
        "returns": pl.DataFrame(returned),
        "people": pl.DataFrame({"cust": names, "remark": [NOTE, *(f"r{i}" for i in range(7))]}),
    }
    return {name: frame.with_columns(pl.col(pl.Datetime).dt.cast_time_unit("us")) for name, frame in frames.items()}


class Store:
    def __init__(self, root: Path, definition: str) -> None:
        self.root, self.store, self.definition = root, root / "store", root / "definition.py"
        self.definition.write_text(definition)

    @property
    def flags(self) -> list[str]:
        return ["--definition", str(self.definition), "--store", str(self.store)]

    def put(self, name: str, frame: pl.DataFrame, delta: bool = False) -> None:
        folder = self.store / "sources" / name
        folder.mkdir(parents=True, exist_ok=True)
        if delta:
            half = len(frame) // 2
            for part in (frame[:half], frame[half:]):
                part.write_delta(str(folder), mode="append")
            frame.write_delta(str(folder), mode="overwrite")
        else:
            frame.write_parquet(folder / "a.parquet", row_group_size=70)

    def run(self) -> None:
        for pipeline in (features, training, inference):
            more = ["--max_dead_fraction", "1"] if pipeline is features else []
            assert pipeline.main([*self.flags, *more]) == 0

    def erase(self, source: str, where: str = WHERE, *flags: str) -> int:
        return main(["erase", source, *self.flags, "--where", where, *flags])

    def found(self) -> list[str]:
        """Files that hold a marker anywhere, decompressed; the log and statistics of Parquet files included."""
        names = []
        for path in sorted(self.store.rglob("*")):
            if path.is_file() and any(mark.encode() in held(path) for mark in (PERSON, NOTE)):
                names.append(str(path.relative_to(self.store)))
        return names


def held(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".gz":
        content += gzip.decompress(content)
    if content[:4] == b"PAR1":
        content += str(pl.read_parquet(path).to_dicts()).encode()
    for start in range(len(content) - 2) if path.suffix == ".db" else ():
        if content[start : start + 2] == b"\x78\x9c":
            content += zlib.decompressobj().decompress(content[start:])
    return content


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
        said = capsys.readouterr().out
        assert "not reached: topics" in said
        assert "vw 1" in said, "the model that learned from the rows is named"
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
rewriting._commit, rewriting._append = map(counted, (rewriting._commit, rewriting._append))
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
    ("where", "said"),
    [
        ("customer = 'a'", "declares: at, k, cust, note, price"),
        ("1 = 1", "--where names a column"),
        ("price + 1", "true or false"),
        ("cust =", "a condition on one row"),
        ("cust > 5", "fits the columns"),
    ],
)
def test_a_condition_that_says_nothing_of_a_row_is_refused(
    where: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path, DEFINITION.split("model = ")[0])
    store.put("orders", rows()["orders"])
    assert store.erase("orders", where) == 2
    assert said in capsys.readouterr().err
    assert store.erase("order") == 2
    assert "Did you mean 'orders'" in capsys.readouterr().err
    assert not (store.store / "erasures").exists()
