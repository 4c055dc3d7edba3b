"""Sources in very many small files, and in one large one: the same answers, in time and memory that follow the rows."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from tests.support import market
from tests.support.features_runs import answers, run, same
from tests.support.tables import figures_of

ROOT = Path(__file__).parents[2]
MEASURED = """
import json, resource, sys
from beam_pipelines.cli import main
before = resource.getrusage(resource.RUSAGE_SELF)
code = main(sys.argv[1:])
after = resource.getrusage(resource.RUSAGE_SELF)
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"code": code, "cpu": cpu, "mb": after.ru_maxrss / 1024}))
"""


def measured(*argv: str) -> dict[str, Any]:
    """Exit code, CPU seconds and greatest memory (MB) of `millrace ARGV` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEASURED, *argv], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def scattered(store: Path, frames: dict[str, pl.DataFrame], files: int) -> Path:
    """The market with its sales in so many files."""
    market.write(store, frames)
    folder = store / "sources" / "sales"
    table = pq.read_table(folder / "part-0.parquet")
    (folder / "part-0.parquet").unlink()
    for i in range(files):
        first, last = len(table) * i // files, len(table) * (i + 1) // files
        pq.write_table(table.slice(first, last - first), folder / f"part-{i:05d}.parquet")
    return store


def test_five_hundred_files_give_what_one_gives(tmp_path: Path) -> None:
    frames = market.spoiled(market.sources(400))
    run(market.write(tmp_path / "one", frames, group=10_000))
    run(scattered(tmp_path / "many", frames, 500))
    same(answers(tmp_path / "many"), answers(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_thousand_files_take_seconds_and_no_memory_of_their_own(tmp_path: Path) -> None:
    """CPU seconds, since others may be at work here: about 17 + 5 were measured, and 1 GB with all imports."""
    frames = market.sources(7000)
    for name, files in (("one", 1), ("many", 10_000)):
        store = scattered(tmp_path / name, frames, files)
        flags = ("--definition", str(market.define(store)), "--store", str(store))
        first = measured("features", *flags, "--run_id", "first")
        again = measured("features", *flags, "--run_id", "again")
        assert figures_of(store, "again")["nothing_to_do"]
        if name == "one":
            baseline = first
    print(baseline, first, again)
    same(answers(tmp_path / "many"), answers(tmp_path / "one"))
    assert first["cpu"] < baseline["cpu"] + 60
    assert again["cpu"] < 30
    assert first["mb"] < baseline["mb"] + 300
