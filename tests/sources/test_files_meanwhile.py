"""Files that are removed, replaced or added while a source is read: whoever lists files looks again at the end."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from beam_pipelines.cli import main
from schemas import FeatureView
from schemas.errors import DataError
from schemas.loading import load_definition
from transforms.lineage.counted_rows import BatchSide
from transforms.sources.contracts import Contract
from transforms.storage.delta_tables import open_table
from transforms.streaming import history_files, live_dimensions, replay
from transforms.streaming.history import Handover
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.replay import Replay, chunks
from transforms.verification.check import Verification

DEFINITION = """
import polars as pl
from schemas import FeatureView, Lookup, Source, Trailing

asked = Source("asked", time="at", columns={"id": pl.Int64, "k": pl.Int64})
events = Source("events", time="at", columns={"k": pl.Int64, "v": pl.Float64})
shops = Source("shops", columns={"k": pl.Int64, "size": pl.Int64})
view = FeatureView("vw", spine=asked, key="id", features=[
    Trailing(events, by="k", over="2d", stats={"v": "sum"}), Lookup(shops, by="k", columns="size")])
"""
HOW = ["a file removed", "a folder removed", "a file replaced"]


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "definition.py").write_text(DEFINITION)
    at = pl.datetime_range(pl.datetime(2024, 1, 1), pl.datetime(2024, 1, 5), "1h", time_zone="UTC", eager=True)
    rows = pl.DataFrame({"at": at.cast(pl.Datetime("us", "UTC")), "k": [i % 5 for i in range(len(at))]})
    frames = {
        "asked": rows.with_row_index("id").select("at", pl.col("id").cast(pl.Int64), "k"),
        "events": rows.with_columns(v=pl.lit(1.5)),
        "shops": pl.DataFrame({"k": range(5), "size": range(5)}),
    }
    for name, frame in frames.items():
        for number, part in enumerate(frame.iter_slices(40 if name != "shops" else 2)):
            path = tmp_path / "sources" / name / f"part={number}" / "a.parquet"
            path.parent.mkdir(parents=True)
            part.write_parquet(path)
    return tmp_path


def view_of(store: Path) -> FeatureView:
    return load_definition(str(store / "definition.py")).view


def disturb(folder: Path, how: str) -> None:
    path = folder / "part=1" / "a.parquet"
    if how == "a file removed":
        path.unlink()
    elif how == "a folder removed":
        shutil.rmtree(path.parent)
    elif how == "a file replaced":
        pl.read_parquet(path)[:-1].write_parquet(path)
    else:
        shutil.copytree(path.parent, folder / "part=9")


def after(owner: Any, name: str, source: Path, how: str, patch: pytest.MonkeyPatch) -> None:
    """Disturbs the files of a source when the function has read them."""
    function = getattr(owner, name)

    @functools.wraps(function)
    def disturbed(*arguments: Any, **named: Any) -> Any:
        found = function(*arguments, **named)
        if isinstance(found, Iterator):
            found = iter(list(found))
        read = arguments[0].source.name if isinstance(arguments[0], Contract) else source.name
        there = source.joinpath("part=1", "a.parquet").exists() and not source.joinpath("part=9").exists()
        if read == source.name and there:
            disturb(source, how)
        return found

    patch.setattr(owner, name, disturbed)


def read_replay(store: Path) -> None:
    list(chunks([view_of(store)], Replay(str(store / "sources"))))


def read_history(store: Path) -> None:
    end = 1_704_240_000_000_000  # 2024-01-03
    Handover([view_of(store)], str(store / "live"), str(store / "sources"), end, 3_600_000_000, sent=end).beginnings()


def read_dimension(store: Path) -> None:
    Dimensions(view_of(store), str(store / "sources"), str(store / "kept"), 0).refresh()


CASES = {
    "replay": (replay, "read_raw", "events", read_replay),
    "history": (history_files, "stream_slices", "events", read_history),
    "dimension": (live_dimensions, "read_slices", "shops", read_dimension),
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_a_source_that_changes_while_it_is_read_is_an_error(
    store: Path, case: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name, source, read = CASES[case]
    after(owner, name, store / "sources" / source, how, monkeypatch)
    with pytest.raises(DataError, match=f"Source '{source}': its files must not change"):
        read(store)
    assert open_table(str(store / "live" / "sources" / "events")) is None, "nothing was accepted"


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_added_meanwhile_is_named(
    store: Path, case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, source, read = CASES[case]
    after(owner, name, store / "sources" / source, "a file added", monkeypatch)
    with caplog.at_level(logging.WARNING, "millrace"):
        read(store)
    assert f"source {source}: not read, since they were added after the run began: " in caplog.text
    assert "part=9" in caplog.text


@pytest.mark.parametrize("how", HOW)
def test_verify_does_not_judge_by_a_source_that_changes(
    store: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--definition", str(store / "definition.py"), "--store", str(store)]
    assert main(["features", *flags]) == 0
    assert main(["verify", *flags]) == 0
    after(Verification, "of_files", store / "sources" / "events", how, monkeypatch)
    capsys.readouterr()
    assert main(["verify", *flags]) == 3
    assert "Source 'events': its files must not change" in capsys.readouterr().err


@pytest.mark.parametrize("how", HOW)
def test_a_comparison_with_batch_notices(store: Path, how: str) -> None:
    batch = BatchSide.of(view_of(store), None, str(store / "sources"))
    assert batch.checked("untouched") == "untouched"
    assert len(batch.rows("events")[0])
    disturb(store / "sources" / "events", how)
    with pytest.raises(DataError, match="its files must not change"):
        batch.checked("found")


def test_a_dimension_that_changes_while_it_is_read_serves_as_it_was(store: Path) -> None:
    dimensions = Dimensions(view_of(store), str(store / "sources"), str(store / "kept"), 0)
    dimensions.refresh()
    version = dimensions.versions["shops"]
    path = store / "sources" / "shops" / "part=0" / "a.parquet"
    pl.read_parquet(path).with_columns(size=pl.lit(9)).write_parquet(path)
    with pytest.MonkeyPatch.context() as patch:
        after(live_dimensions, "read_slices", store / "sources" / "shops", "a file replaced", patch)
        dimensions.refresh()
        assert dimensions.versions["shops"] == version
    dimensions.refresh()
    assert dimensions.versions["shops"] != version
    assert len(dimensions.frames["shops"]) == 4
