"""Sources in very many small files, and in one large one: the same feature rows, in time and memory that depend on the
rows."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from polars.testing import assert_frame_equal

from schemas.errors import ContractError
from schemas.sources import Source
from tests.support import market
from tests.support.features_runs import feature_rows, run, same
from tests.support.tables import figures_of
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.contracts import Contract
from transforms.sources.day_digests import add_digests
from transforms.sources.inventory import Slices, survey_files
from transforms.sources.reader import ReadOptions, read_slices, stream_slices

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
    same(feature_rows(tmp_path / "many"), feature_rows(tmp_path / "one"))


TIMES = [pa.timestamp("ms", "UTC"), pa.timestamp("us", "UTC"), pa.timestamp("ns", "America/New_York")]
TEXTS = [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]


def many_kinds(folder: Path, files: int) -> tuple[Contract, Slices]:
    """A source in small files of several schemas, in runs of one schema; some of them hold bad rows."""
    folder.mkdir(parents=True)
    for i in range(files):
        kind, rows = i // 20, 1 + i % 3
        at = pa.array([1_700_000_000_000 + 1000 * (3 * i + j) for j in range(rows)], pa.timestamp("ms", "UTC"))
        names = pa.array([f"k{(i + j) % 7}" for j in range(rows)])
        values = pa.array([float("inf") if i % 11 == 3 else i + j / 7 for j in range(rows)])
        columns = {
            "at": at.cast(TIMES[kind % 3]),
            "k": names.dictionary_encode() if kind % 3 == 2 else names.cast(TEXTS[kind % 3]),
            "x": values.cast(pa.float32() if kind % 2 else pa.float64()),
        }
        if i == 47:
            columns["k"] = pa.Array.from_buffers(
                pa.string(),
                rows,
                [None, pa.array([*range(rows + 1)], pa.int32()).buffers()[1], pa.py_buffer(b"\xff" * rows)],
            )
        table = pa.table(columns if kind % 4 else {"more": pa.nulls(rows, pa.int8()), **columns})
        table = table.replace_schema_metadata({"writer": f"number {i}"})
        pq.write_table(table, folder / f"{i:04}.parquet", row_group_size=2)
    source = Source("ev", time="at", columns={"k": pl.String, "x": pl.Float64})
    contract = Contract(source, ("at", "k", "x"), required=("k",))
    return contract, survey_files(str(folder.parent), contract).slices


def test_small_files_read_together_are_what_each_is_by_itself(tmp_path: Path) -> None:
    contract, slices = many_kinds(tmp_path / "ev", 300)
    options = ReadOptions(span=(-(2**62), 2**62))
    alone = [read_slices(contract, [each], options) for each in slices]
    together = read_slices(contract, slices, options)
    assert_frame_equal(together.frame, pl.concat([each.frame for each in alone]))
    assert_frame_equal(together.dead_letters, pl.concat([each.dead_letters for each in alone]))
    assert together.digests == add_digests([each.digests for each in alone])
    assert {*together.dead_letters["rule"]} == {"a text is UTF-8", "a number is finite"}
    spoiled = together.dead_letters.filter(pl.col("rule") == "a text is UTF-8")
    assert spoiled.select(pl.col("file").str.slice(-12), "row", "value").rows() == [
        ("0047.parquet", row, "bytes ff") for row in range(3)
    ]
    pieces = list(stream_slices(contract, slices, options, chunk=50))
    assert len(pieces) > 5
    assert_frame_equal(pl.concat([each.frame for each in pieces]), together.frame)


def test_the_damaged_one_of_many_small_files_is_named(tmp_path: Path) -> None:
    contract, slices = many_kinds(tmp_path / "ev", 150)
    path = tmp_path / "ev" / "0101.parquet"
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)  # pages, not the footer: the listing does not look there
    path.write_bytes(content)
    with pytest.raises(ContractError, match=r"0101\.parquet"):
        read_slices(contract, [dataclasses.replace(each, stamp="") for each in slices])


def test_row_groups_and_listings_are_pickled_whole_and_once(tmp_path: Path) -> None:
    contract, slices = many_kinds(tmp_path / "ev", 100)
    listing = survey_files(str(tmp_path), contract).listing
    for each in (slices, slices[:3], listing):
        assert pickle.loads(pickle.dumps(each)) == each
    assert type(pickle.loads(pickle.dumps(slices))) is Slices
    assert len(pickle.dumps([slices] * 5)) < 2 * len(pickle.dumps(slices))
    assert slices.overlapping(ALWAYS, FOREVER) is slices


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
    same(feature_rows(tmp_path / "many"), feature_rows(tmp_path / "one"))
    assert first["cpu"] < baseline["cpu"] + 60
    assert again["cpu"] < 30
    assert first["mb"] < baseline["mb"] + 300
