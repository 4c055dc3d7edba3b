"""Dimensions of a live job: read again when they change, and kept serving when what is there cannot be read."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from random import Random

import polars as pl
import pytest
from test_live import SOURCES, read, run, stream, view
from turns import Job

from schemas.errors import ContractError, DataError
from transforms.clock import FOREVER
from transforms.dimensions import Dimensions
from transforms.live_tables import features_live_uri
from transforms.messages import Message, heartbeat

SHOPS = pl.DataFrame({"k": ["a", "b"], "size": [1, 2], "name": ["x", "y"], "rate": [0.1, 2.5]}, schema_overrides={"size": pl.Int32})  # fmt: skip


def dimensions(folder: Path) -> Dimensions:
    return Dimensions(view, str(folder / "in"), str(folder / "kept"), 0)


@pytest.fixture
def shops(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "shops" / "s.parquet"
    path.parent.mkdir(parents=True)
    SHOPS.cast({"size": view.dimensions["shops"].schema["size"]}).write_parquet(path)
    return path


def broken(path: Path, how: str) -> None:
    if how == "half a file":
        path.write_bytes(path.read_bytes()[:100])
    elif how == "a column gone":
        pl.read_parquet(path).drop("rate").write_parquet(path)
    elif how == "another type":
        pl.read_parquet(path).with_columns(pl.col("rate").cast(pl.String)).write_parquet(path)
    else:
        shutil.rmtree(path.parent)


@pytest.mark.parametrize("how", ["half a file", "a column gone", "another type", "all gone"])
def test_a_dimension_that_breaks_serves_on_as_it_was_until_it_is_mended(
    tmp_path: Path, shops: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    running = dimensions(tmp_path)
    running.refresh()
    before, version = running.frames["shops"], running.versions["shops"]
    good = shops.read_bytes()
    broken(shops, how)
    for each in (running, dimensions(tmp_path)):  # as it runs, and a worker that starts now
        caplog.clear()
        with caplog.at_level(logging.ERROR, "millrace.live"):
            each.refresh()
        assert f"dimension shops is broken; version {version} serves on" in caplog.text
        assert each.frames["shops"].equals(before)
        assert each.versions["shops"] == version
    shops.parent.mkdir(exist_ok=True)
    shops.write_bytes(good)
    pl.read_parquet(shops).with_columns(rate=pl.lit(7.0)).write_parquet(shops)
    running.refresh()
    assert running.versions["shops"] != version
    assert set(running.frames["shops"]["rate"]) == {7.0}


def test_a_dimension_that_never_could_be_read_is_refused(tmp_path: Path, shops: Path) -> None:
    broken(shops, "half a file")
    with pytest.raises(ContractError, match="Parquet"):
        dimensions(tmp_path).refresh()
    broken(shops, "all gone")
    with pytest.raises(DataError, match="has Parquet files"):
        dimensions(tmp_path).refresh()


def test_a_job_answers_on_while_its_dimension_is_broken(tmp_path: Path) -> None:
    """Through a kill too: the job that starts again finds the version that served."""
    chunks = stream(Random(5))
    half = len(chunks) // 2
    ends = [Message(name, number, 10**6, 2**51, *heartbeat(FOREVER)) for name in SOURCES for number in (0, 1)]
    job = run(tmp_path, [*chunks[:half], ends], {half}, {})
    served = set(read(features_live_uri(str(tmp_path), view.name, view.fingerprint))["__dimensions"])
    assert len(served) == 1
    broken(tmp_path / "in" / "shops" / "s.parquet", "half a file")
    job = Job(
        view, tmp_path, tmp_path / "in", {name: {0: 0, 1: 0} for name in SOURCES}, run_id="again", keep=30_000_000
    )
    for chunk in chunks[half:]:
        job.take([each._replace(offset=each.offset + 10**7) for each in chunk])
    job.commit()
    answers = read(features_live_uri(str(tmp_path), view.name, view.fingerprint))
    assert set(answers["__dimensions"]) == served
    assert len(answers) > 3
