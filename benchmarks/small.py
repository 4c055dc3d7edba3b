"""Small data: files, bytes and seconds that a store of some thousand rows costs.

    python -m benchmarks.small [--json FILE] [--repeats 3] [--files 100000]
                               [--only files,value,small_files,training,commands,flushes]

Two made-up cases: 15,000 taxi-like trips over a year, and 1,434 sparse rows over ten months.  Each goes through the
three pipelines; then the files of its tables are counted, and compared with the same rows written as one Parquet file
per table. Training is compared with XGBoost alone on the same matrix, and a change of one value with the full run, both
timed from the first line of `main` (a process that has imported everything).  Flushes to the disk (fsync) are counted
and timed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest import mock

import numpy as np
import polars as pl

from benchmarks.measure import ROOT, Figures, Side, arguments, machine, run, say, stage, write_json

PARTS = ("files", "value", "small_files", "training", "commands", "flushes")
PARAMS, ROUNDS = {"max_depth": 6, "eta": 0.1}, 100
DEFINITION = f"""
import polars as pl
from schemas import Derived, FeatureView, Gates, Label, Latest, Lookup, Model, Source, TimeSplit, Trailing, encoders

trips = Source("trips", time="at", columns={{
    "trip": pl.Int64, "zone": pl.String, "driver": pl.Int64, "fare": pl.Float64, "far": pl.Float32
}})
tips = Source("tips", time="at", unique="trip", order="trip", columns={{
    "trip": pl.Int64, "zone": pl.String, "tip": pl.Float64
}})
zones = Source("zones", columns={{"zone": pl.String, "area": pl.String}})
view = FeatureView(
    "small", spine=trips, key="trip",
    features=[
        Derived(far=pl.col("far"), hour=pl.col("at").dt.hour()),
        Trailing(trips, by="zone", over=("1h", "1d", "7d"), stats={{"fare": ("mean", "count")}}),
        Trailing(tips, by="zone", over=("7d", "28d"), stats={{"tip": ("mean", "max")}}),
        Latest(trips, by="driver", columns="fare", max_age="28d", name="last"),
        Lookup(zones, by="zone", columns="area"),
    ],
)
model = Model(
    view, label=Label(tips, on="trip", value=pl.col("tip") > 2, within="1d", absent=0),
    split=TimeSplit("30d", "30d", embargo="1d"), encode={{"zones_area": encoders.OneHot()}},
    params={PARAMS!r}, rounds={ROUNDS}, gates=Gates(),
)
"""


def write_case(folder: Path, rows: int, days: int) -> None:
    """Definition and sources of a case of `rows` trips over `days`, the same every time."""
    random = np.random.default_rng(7)
    second = np.sort(random.choice(days * 86_400, rows, replace=False))
    at = pl.Series("at", second * 1_000_000 + int(datetime(2023, 1, 1, tzinfo=UTC).timestamp() * 1e6))
    zone = np.array([f"zone {i}" for i in range(50)])[random.integers(0, 50, rows)]
    fare = np.round(random.lognormal(2.5, 0.6, rows), 2)
    trips = pl.DataFrame(
        {
            "at": at.cast(pl.Datetime("us", "UTC")),
            "trip": np.arange(rows),
            "zone": zone,
            "driver": random.integers(0, 200, rows),
            "fare": fare,
            "far": random.gamma(2, 2, rows).astype(np.float32),
        }
    )
    tip = np.round(np.maximum(fare * random.normal(0.12, 0.1, rows), 0), 2)
    tips = trips.select(pl.col("at") + timedelta(minutes=20), "trip", "zone", tip=pl.Series(tip))
    zones = pl.DataFrame({"zone": [f"zone {i}" for i in range(50)], "area": [f"area {i % 7}" for i in range(50)]})
    for name, frame in {"trips": trips, "tips": tips, "zones": zones}.items():
        path = folder / "store" / "sources" / name
        path.mkdir(parents=True)
        frame.write_parquet(path / "all.parquet")
    (folder / "definition.py").write_text(DEFINITION)


def _pipelines(folder: Path, *names: str) -> None:
    from beam_pipelines import features, inference, training

    common = ["--definition", str(folder / "definition.py"), "--store", str(folder / "store")]
    for name in names:
        main: Callable[[Sequence[str]], int] = {"features": features, "training": training, "inference": inference}[
            name
        ].main
        with stage(name):
            if code := main(common):
                raise SystemExit(code)


def whole_case(out: str, rows: int, days: int) -> None:
    """A side: the three pipelines on a fresh case in the folder `out`."""
    folder = Path(out)
    write_case(folder, rows, days)
    _pipelines(folder, "features", "training", "inference")


def one_value(out: str, rows: int, days: int) -> None:
    """A side: features of a fresh case; then again after one fare in the middle of the year has changed."""
    folder = Path(out)
    write_case(folder, rows, days)
    with stage("full"):
        _pipelines(folder, "features")
    path = folder / "store" / "sources" / "trips" / "all.parquet"
    trips = pl.read_parquet(path)
    changed = pl.when(pl.col("trip") == rows // 2).then(pl.col("fare") + 1).otherwise(pl.col("fare"))
    trips.with_columns(changed.alias("fare")).write_parquet(path)
    with stage("changed"):
        _pipelines(folder, "features")


def small_files(out: str, files: int) -> None:
    """A side: features of a source of so many files of one row each."""
    folder = Path(out)
    write_case(folder, files, 300)
    path = folder / "store" / "sources" / "trips"
    trips = pl.read_parquet(path / "all.parquet")
    (path / "all.parquet").unlink()
    for i in range(files):
        trips[i : i + 1].write_parquet(path / f"{i:06}.parquet", statistics=True)
    with stage("features"):
        _pipelines(folder, "features")


def flushed_case(out: str, rows: int, days: int) -> None:
    """A side: features of a fresh case; writes the calls of fsync, each with its seconds, to `flushes.json`."""
    folder, flush, calls = Path(out), os.fsync, list[tuple[float, float]]()

    def timed(handle: int) -> None:
        begin = time.perf_counter()
        flush(handle)
        calls.append((begin, time.perf_counter()))

    write_case(folder, rows, days)
    with mock.patch("os.fsync", timed):
        _pipelines(folder, "features")
    (folder / "flushes.json").write_text(json.dumps(sorted(calls)))


def training_alone(out: str, store: str) -> None:
    """A side: XGBoost on the examples that a run of the training pipeline has left, with the same parameters."""
    import xgboost

    examples = sorted(Path(store).glob("examples/*/*/"))[-1]
    parts = {
        name: pl.concat([pl.read_parquet(path) for path in sorted(examples.glob(f"**/{name}-*.parquet"))])
        for name in ("train", "validate")
    }
    numbers = [
        name
        for name, kind in parts["train"].schema.items()
        if kind.is_numeric() and name not in ("trip", "row_id", "__label")
    ]
    with stage("xgboost"):
        matrices = [
            xgboost.DMatrix(part.select(numbers).to_numpy(), part["__label"].to_numpy()) for part in parts.values()
        ]
        params = {**PARAMS, "objective": "binary:logistic"}
        xgboost.train(params, matrices[0], ROUNDS, evals=[(matrices[1], "validate")], verbose_eval=False)


@dataclasses.dataclass(frozen=True)
class TableSize:
    """A table's data files and rows, the bytes under its folder, and those of its rows as one Parquet file."""

    name: str
    files: int
    rows: int
    bytes: int
    one_file_bytes: int

    @property
    def allowed(self) -> float:
        """The most data files that a table of so many rows may have."""
        return 10 + self.rows / 5000


def table_sizes(store: Path) -> list[TableSize]:
    """Every Delta table of the store."""
    from deltalake import DeltaTable

    sizes = []
    for log in sorted(store.glob("**/_delta_log")):
        table, sink = DeltaTable(str(log.parent)), io.BytesIO()
        rows = pl.read_delta(str(log.parent))
        rows.write_parquet(sink)
        sizes.append(
            TableSize(
                str(log.parent.relative_to(store)),
                len(table.file_uris()),
                len(rows),
                bytes_below(log.parent),
                len(sink.getvalue()),
            )
        )
    return sizes


def bytes_below(folder: Path) -> int:
    """Bytes of all files in `folder` and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def count_files(folder: Path) -> dict[str, float]:
    """Files and bytes of the tables of two small stores."""
    most, over, ours, theirs = 0, 0.0, 0, 0
    for name, rows, days in (("trips", 15_000, 365), ("sparse", 1_434, 300)):
        out = folder / name
        run(Side(name, "benchmarks.small:whole_case", {"rows": rows, "days": days}), out, ())
        for table in table_sizes(out / "store"):
            say(
                f"{name}: {table.name}: {table.files} data files of {table.rows:,} rows (at most {table.allowed:.0f}), "
                f"{table.bytes:,} bytes, as one file {table.one_file_bytes:,}"
            )
            most, over = max(most, table.files), max(over, table.files / table.allowed)
            ours, theirs = ours + table.bytes, theirs + table.one_file_bytes
        for each in sorted((out / "store").iterdir()):
            files = sum(path.is_file() for path in each.rglob("*"))
            say(f"{name}: {each.name}: {bytes_below(each):,} bytes in {files:,} files")
    return {"files_most_per_table": most, "files_vs_allowed": over, "store_vs_one_file_bytes": ours / theirs}


def _stages(side: Side, folder: Path, repeats: int, keep: bool = False) -> dict[str, float]:
    """The fastest seconds of each stage of `side`; imports are done before the clock starts."""
    _, modules = run(side, folder / f"{side.name}-warm-up", ())
    found: dict[str, list[dict[str, float]]] = {}
    for i in range(repeats):
        measured, _ = run(side, folder / f"{side.name}-{i}", modules)
        for name, each in measured.stages.items():
            found.setdefault(name, []).append(each)
    for name, runs in found.items():
        say(f"{side.name}: {name}: {min(each['cpu_seconds'] for each in runs):.2f} s of CPU time")
    return {name: min(each["seconds"] for each in runs) for name, runs in found.items()}


def change_one_value(folder: Path, repeats: int) -> dict[str, float]:
    seconds = _stages(Side("value", "benchmarks.small:one_value", {"rows": 15_000, "days": 365}), folder, repeats)
    say(f"full run {seconds['full']:.2f} s, after one value changed {seconds['changed']:.2f} s")
    return {"one_value_vs_full": seconds["changed"] / seconds["full"]}


def read_small_files(folder: Path, files: int) -> dict[str, float]:
    measured, _ = run(Side("small_files", "benchmarks.small:small_files", {"files": files}), folder / "small_files", ())
    seconds = measured.stages["features"]["seconds"]
    say(f"{files:,} files of one row: {seconds:.1f} s, {measured.stages['features']['cpu_seconds']:.1f} s of CPU time")
    return {"small_files_s": seconds}


def count_flushes(folder: Path) -> dict[str, float]:
    """Flushes of a features run, and the seconds in which at least one was under way."""
    out = folder / "flushes"
    measured, _ = run(Side("flushes", "benchmarks.small:flushed_case", {"rows": 15_000, "days": 365}), out, ())
    calls = json.loads((out / "flushes.json").read_text())
    seconds, until = 0.0, 0.0
    for begin, end in calls:
        seconds += max(end - max(begin, until), 0.0)
        until = max(until, end)
    whole = measured.stages["features"]["seconds"]
    say(f"features of 15,000 rows: {len(calls):,} flushes, {seconds:.2f} s of {whole:.2f} s")
    return {"flushes": len(calls), "flushes_s": seconds}


def train(folder: Path, repeats: int) -> dict[str, float]:
    ours = _stages(Side("trained", "benchmarks.small:whole_case", {"rows": 15_000, "days": 365}), folder, repeats)
    store = str(folder / "trained-0" / "store")
    alone = _stages(Side("xgboost", "benchmarks.small:training_alone", {"store": store}), folder, repeats)
    say(f"training pipeline {ours['training']:.2f} s, XGBoost alone {alone['xgboost']:.2f} s")
    return {"training_beyond_xgboost_s": ours["training"] - alone["xgboost"]}


def commands(folder: Path, repeats: int) -> dict[str, float]:
    """Seconds of commands from the shell, median."""
    case = folder / "commands"
    run(Side("commands", "benchmarks.small:whole_case", {"rows": 1_434, "days": 300}), case, ())
    common = ["--definition", str(case / "definition.py"), "--store", str(case / "store")]
    prediction = pl.read_delta(str(next((case / "store").glob("predictions/*"))))["prediction_id"][0]
    lines = {
        "help": ["--help"],
        "plan": ["plan", *common],
        "tables": ["tables", *common[2:]],
        "models": ["models", *common[2:]],
        "trace": ["trace", "--prediction", str(prediction), *common],
    }
    # A command starts from byte code, as it does wherever Python may write it.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    found = {}
    for name, argv in lines.items():
        times, used = [], []
        for _ in range(max(repeats, 3)):
            start, before = time.perf_counter(), os.times()
            done = subprocess.run(
                [sys.executable, "-m", "beam_pipelines.cli", *argv],
                cwd=ROOT,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            times.append(time.perf_counter() - start)
            used.append(sum(os.times()[2:4]) - sum(before[2:4]))
            if done.returncode:
                raise SystemExit(f"millrace {' '.join(argv)} failed with exit code {done.returncode}:\n{done.stderr}")
        found[f"{name}_s"] = statistics.median(times)
        say(f"millrace {name}: {found[f'{name}_s']:.2f} s, {statistics.median(used):.2f} s of CPU time")
    return found


def main(argv: Sequence[str]) -> int:
    parser = arguments("What small data cost: files, bytes, seconds.")
    parser.add_argument("--files", type=int, default=100_000, help="small files to read (default 100000)")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    flags = parser.parse_args(argv)
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        parts: dict[str, Callable[[], dict[str, float]]] = {
            "files": lambda: count_files(folder),
            "value": lambda: change_one_value(folder, flags.repeats),
            "small_files": lambda: read_small_files(folder, flags.files),
            "training": lambda: train(folder, flags.repeats),
            "commands": lambda: commands(folder, flags.repeats),
            "flushes": lambda: count_flushes(folder),
        }
        for name in flags.only.split(","):
            figures |= parts[name]()
    say(json.dumps(figures))
    if flags.json:
        write_json(flags.json, {"benchmark": "small", **figures, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
