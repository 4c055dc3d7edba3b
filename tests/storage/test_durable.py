"""A commit that was reported survives a power cut: files are flushed before the log names them, the log before a
report."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from schemas.errors import StoreError
from tests.support.crash_images import ROOT, Image, images, record
from transforms.storage import durable, log_entries
from transforms.storage.delta_tables import CommitTarget, commit, data_files, newest_version, open_table, read_file
from transforms.storage.delta_tables import write_files as write_data_files
from transforms.storage.log_entries import LogEntry, append_entry
from transforms.streaming.live_tables import NewRows, TableWriter

SCHEMA = pa.schema([("n", pa.int64()), ("at", pa.timestamp("us", "UTC")), ("date", pa.date32())])
DAYS = (date(2020, 1, 1), date(2020, 1, 2))


def rows(number: int) -> pa.RecordBatch:
    moment = datetime(2020, 1, 1, tzinfo=UTC)
    return pa.RecordBatch.from_pylist([{"n": number, "at": moment, "date": day} for day in DAYS], SCHEMA)


class _All(NewRows):
    def __call__(self, table: object, frame: pl.DataFrame) -> pl.DataFrame:
        return frame


def commits(folder: str, report: Callable[[Any], None]) -> None:
    """Commits of a batch job and of a live one, with checkpoints among them; reports (table, version, rows) of each."""
    log_entries.CHECKPOINT_EVERY = 3
    batch, live = f"{folder}/features/view/abc", f"{folder}/sources/q"
    for number in range(8):
        target = CommitTarget(batch, SCHEMA, DAYS, f"run-{number}", newest_version(batch))
        done = commit(target, write_data_files(rows(number), batch, target.run_id))
        report(("features/view/abc", done.version, [number] * 2))
    writer = TableWriter(live, SCHEMA, "live/q", "run-live")
    for number in range(4):
        frame = pl.DataFrame(pl.from_arrow(rows(number)))
        writer.append(frame, number, {"turn": number}, _All())
        report(("sources/q", number, sorted([*range(number + 1)] * 2)))


def held(folder: Path, table: str, version: int) -> list[int]:
    opened = open_table(str(folder / table), version)
    assert opened is not None
    return sorted(n for file in data_files(opened) for n in read_file(file, ["n"])["n"].to_pylist())


def holds_what_was_reported(image: Image, before: Path, after: Path) -> None:
    image.restore(before, after)
    for table in ("features/view/abc", "sources/q"):
        reported = [(version, numbers) for name, version, numbers in image.reports if name == table]
        newest = newest_version(str(after / table))
        for version, numbers in reported[-3:]:
            assert held(after, table, version) == numbers
        if newest is not None:  # a commit that was not reported is there wholly or not at all
            assert held(after, table, newest)
            assert newest >= max((version for version, _ in reported), default=0)
            later = CommitTarget(str(after / table), SCHEMA, DAYS, "later", newest)
            commit(later, write_data_files(rows(99), later.uri, "later"))
            assert held(after, table, newest + 1) == [99] * 2
        else:
            assert not reported
    shutil.rmtree(after)


def test_every_reported_commit_survives_a_cut_at_any_moment(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    operations = record("tests.storage.test_durable:commits", folder)
    found = list(images(operations))
    assert len([kind for kind, _, _ in operations if kind == "report"]) == 12
    assert any("checkpoint.parquet" in name for name in found[-1].names)
    last: tuple[Any, ...] = ()
    for image in found:
        # What differs in names aside alone is one image.
        visible = {name: each for name, each in image.names.items() if "/." not in name}
        if (this := (visible, image.reports)) != last:
            holds_what_was_reported(image, folder, tmp_path / "after")
        last = this


def test_a_record_without_flushes_of_the_log_loses_commits(tmp_path: Path) -> None:
    """The images can show a loss."""
    folder = tmp_path / "store"
    operations = [
        each
        for each in record("tests.storage.test_durable:commits", folder)
        if each[0] != "flush" or "_delta_log" not in each[1]
    ]
    *_, seen, flushed = images(operations)
    for i, image in enumerate((seen, flushed)):
        with pytest.raises((AssertionError, StoreError)):
            holds_what_was_reported(image, folder, tmp_path / f"after-{i}")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_library_writes_to_the_store_behind_our_back(tmp_path: Path) -> None:
    """Of the real system calls: whatever is opened to be written in the store is flushed, once, before its name."""
    folder, trace = tmp_path / "store", tmp_path / "trace"
    program = f"import tests.storage.test_durable as t; t.commits({str(folder)!r}, print)"
    command = [
        "strace",
        "-f",
        "-y",
        "-e",
        "trace=openat,fsync,fdatasync,rename,renameat2,link,linkat",
        "-o",
        str(trace),
    ]
    subprocess.run([*command, sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, timeout=300)
    written: Counter[str] = Counter()
    flushes: Counter[str] = Counter()
    for line in trace.read_text().splitlines():
        paths = [path for path in re.findall(r'["<]([^">]+)[">]', line) if path.startswith(f"{folder}/")]
        if not paths or "ENOENT" in line:
            continue
        if "openat(" in line and "O_CREAT" in line:
            written[paths[0]] += 1
        elif "sync(" in line:
            flushes[paths[0]] += 1
        elif "rename" in line or "link" in line:
            assert flushes[paths[0]] == written[paths[0]], f"named before it was flushed: {line}"
    assert written
    assert {path: flushes[path] for path in written} == written, "each file is flushed once"


def test_a_version_that_another_writer_took_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    target = CommitTarget(uri, SCHEMA, DAYS, "first")
    commit(target, write_data_files(rows(1), uri, "first"))
    stale = open_table(uri)
    second = CommitTarget(uri, SCHEMA, DAYS, "second", 0)
    commit(second, write_data_files(rows(2), uri, "second"))
    before = sorted(os.listdir(tmp_path / "table" / "_delta_log"))
    with pytest.raises(FileExistsError):
        append_entry(uri, stale, LogEntry(["date"], {}, ("third", 1)))
    assert sorted(os.listdir(tmp_path / "table" / "_delta_log")) == before, "and nothing is left of the attempt"
    assert held(tmp_path, "table", 1) == [2, 2]


def test_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    durable.write_file(str(path), b"one")
    durable.write_file(str(path), b"two")
    assert path.read_bytes() == b"two"
    with pytest.raises(FileExistsError):
        durable.write_file(str(path), b"three", exclusive=True)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
