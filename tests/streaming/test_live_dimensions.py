"""Dimensions of a live job: read again when they change, and kept serving when what is there cannot be read."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from pathlib import Path
from random import Random

import polars as pl
import pytest

from schemas.errors import ContractError, DataError
from tests.support.live_dimensions_case import SHOPS, computed_one
from tests.support.live_turns import SOURCES, Killed, dying_after, read, run, stream, view
from tests.support.turns import Job, JobOptions
from transforms.records.times import FOREVER
from transforms.storage.paths import features_live_uri, live_dead_letters_uri
from transforms.streaming.kafka import Broker
from transforms.streaming.live_dimensions import Dimensions
from transforms.streaming.live_features import Sends
from transforms.streaming.messages import Message, heartbeat


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
        assert f"dimension shops is broken; version {version} stays in use" in caplog.text
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
    with pytest.raises(DataError, match="must have files"):
        dimensions(tmp_path).refresh()


def test_a_job_goes_on_while_its_dimension_is_broken(tmp_path: Path) -> None:
    """Through a kill too: the job that starts again finds the version that served."""
    chunks = stream(Random(5))
    half = len(chunks) // 2
    ends = [Message(name, number, 10**6, 2**51, *heartbeat(FOREVER)) for name in SOURCES for number in (0, 1)]
    job = run(tmp_path, [*chunks[:half], ends], {half}, {})
    served = set(read(features_live_uri(str(tmp_path), view.name, view.fingerprint))["__dimensions"])
    assert len(served) == 1
    broken(tmp_path / "in" / "shops" / "s.parquet", "half a file")
    job = Job(
        view, tmp_path, tmp_path / "in", {name: {0: 0, 1: 0} for name in SOURCES}, JobOptions("again", keep=30_000_000)
    )
    for chunk in chunks[half:]:
        job.take([each._replace(offset=each.offset + 10**7) for each in chunk])
    job.commit()
    feature_rows = read(features_live_uri(str(tmp_path), view.name, view.fingerprint))
    assert set(feature_rows["__dimensions"]) == served
    assert len(feature_rows) > 3


def test_rows_of_a_dimension_that_break_its_contract_are_reported_once_per_version(tmp_path: Path) -> None:
    """However many jobs and workers read the version, and whatever is killed between."""
    good = SHOPS.cast({"size": view.dimensions["shops"].schema["size"]})
    endless = good[:1].with_columns(k=pl.lit("c"), rate=pl.lit(float("inf")))
    other = good[1:].with_columns(size=pl.lit(9, pl.Int32))  # "b" has a smaller one
    kinds = {"bad": pl.concat([good, endless, other]), "better": pl.concat([good, other]), "good": good}
    endless_told = (2, 0, "rate", "a number is finite", "inf")
    other_told = (0, "k", "one key has one row (the smallest was kept)", "b")
    path, expected = tmp_path / "in" / "shops" / "s.parquet", dict[tuple[object, ...], None]()
    path.parent.mkdir(parents=True)
    for number, kind in enumerate(["good", "bad", "bad", "better", "bad", "good"]):
        kinds[kind].write_parquet(path)
        jobs = [computed_one(tmp_path, number, run_id) for run_id in ("a", "b")]
        version = jobs[0].assemblies[0].dimensions.versions["shops"]
        with contextlib.suppress(Killed), dying_after(1 if number == 1 else 9):  # dead letters come before all else
            jobs[0].commit()
        jobs[1].commit()
        here = [endless_told, (3, *other_told)] if kind == "bad" else [(2, *other_told)] if kind == "better" else []
        expected |= {(*each[:3], f"{each[3]} (s.parquet, version {version})", each[4]): None for each in here}
        dead_letters = read(live_dead_letters_uri(str(tmp_path), view.name)) if expected else pl.DataFrame()
        if expected:
            assert set(dead_letters.select("source", "partition", "view").rows()) == {("shops", -1, view.name)}
            found = (
                dead_letters.sort("arrived", "place", "offset")
                .select("offset", "place", "field", "rule", "value")
                .rows()
            )
            assert found == list(expected)
    assert len(expected) == 3


def test_dead_letters_about_a_dimension_go_to_their_topic_with_the_feature_rows(tmp_path: Path) -> None:
    path = tmp_path / "in" / "shops" / "s.parquet"
    path.parent.mkdir(parents=True)
    good = SHOPS.cast({"size": view.dimensions["shops"].schema["size"]})
    pl.concat([good, good[:1].with_columns(rate=pl.lit(float("inf")))]).write_parquet(path)
    job = computed_one(tmp_path, 1, "a")
    (feature_rows,) = job.ledger.features.values()
    sent = list(Sends((view,), Broker("nowhere:1"), "p-", 900_000).feature_rows((b"", feature_rows.to_envelope())))
    assert [topic for topic, _, _ in sent] == ["p-everything.features", "p-everything.dead_letters"]
    assert sent[1][1] == b"shops/-1/2/0"
    assert json.loads(sent[1][2])["rule"].startswith("a number is finite (s.parquet, version ")
