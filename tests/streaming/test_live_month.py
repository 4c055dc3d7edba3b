"""A month of real flights through a real broker and engine, and the same by batch: not a bit differs."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from deploy.streaming.processes import Child
from examples.flights import data
from schemas.live import live_sources
from schemas.loading import load_definition
from tests.support.live_fixtures import Live
from tests.support.live_jobs import high_marks
from tests.support.tables import rows_of
from transforms.lineage.feature_parity import check_parity
from transforms.storage.paths import features_live_uri, sources_root
from transforms.streaming.beginnings import of_topic

ROOT = Path(__file__).parents[2]
DEFINITION = "examples.flights.definition"
START, END, SECONDS = "2013-03-01", "2013-04-01", 40


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_month_with_uneven_partitions_an_idle_one_and_a_pause_is_batch_to_the_bit(live: Live, tmp_path: Path) -> None:
    """Partitions 6 : 3 : 1 : 0; the job stops in the middle, a third of the month comes meanwhile, and it catches
    up."""
    view, store, prefix = load_definition(DEFINITION).view, tmp_path / "live", "month-"
    data.write(str(tmp_path / "store"))
    sources = list(live_sources(view))
    live.broker.create(*(prefix + name for name in sources), partitions=4)
    common = [
        "--definition",
        DEFINITION,
        "--sources",
        str(tmp_path / "store" / "sources"),
        "--bootstrap",
        live.broker.bootstrap,
        "--topic_prefix",
        prefix,
    ]
    job = [
        sys.executable,
        "-m",
        "beam_pipelines.features",
        *common,
        "--streaming",
        "--source=kafka",
        "--store",
        str(store),
        "--run_id=month",
        "--expansion_service",
        live.expansion.address,
        "--commit_every=2s",
        "--start",
        START,
        *live.options(),
    ]
    producer = [
        sys.executable,
        "-m",
        "deploy.streaming.producer",
        *common,
        "--start",
        START,
        "--end",
        END,
        "--speed",
        str(31 * 86_400 / SECONDS),
        "--share=6,3,1,0",
        "--status",
        str(tmp_path / "told.json"),
    ]

    def reported() -> float:
        """The share of the month that has been sent."""
        try:
            at = json.loads((tmp_path / "told.json").read_text())["time"] / 1e6
        except (OSError, ValueError):
            return 0.0
        return float(at - data_start) / (31 * 86_400)

    data_start = pl.Series([START]).str.to_datetime("%Y-%m-%d", time_zone="UTC")[0].timestamp()
    with Child(producer, tmp_path / "producer.log", cwd=ROOT) as sending:
        with Child(job, tmp_path / "job.log", cwd=ROOT) as first:
            while reported() < 0.4:
                assert first.running, first.output()
                assert sending.running, sending.output()
                time.sleep(0.2)
            first.signal(signal.SIGINT)
            assert first.wait(60) in (0, 130), first.output()
        while reported() < 0.7:
            assert sending.running, sending.output()
            time.sleep(0.2)
        with Child(job, tmp_path / "job.log", cwd=ROOT) as second:
            assert sending.wait(SECONDS + 120) == 0, sending.output()
            assert second.wait(300) == 0, second.output()
    assert "questions unaccounted for  0" in second.output()
    ends = high_marks(live.broker.bootstrap, [prefix + name for name in sources])
    status = json.loads((store / "runs" / "month" / "status.json").read_text())
    assert {
        (prefix + name, number): offset
        for name, each in status["next"].items()
        for number, offset in of_topic(each).items()
    } == ends
    sent = json.loads((tmp_path / "told.json").read_text())["sent"]
    for name in sources:
        kept = rows_of(f"{sources_root(str(store))}/{name}", ["__partition", "__offset", "__place"])
        kept = kept.filter(pl.col("__partition") >= 0)
        assert kept.is_unique().all()
        by_partition = dict(kept["__partition"].value_counts().iter_rows())
        assert [by_partition.get(number, 0) for number in range(4)] == sent[name]
    spine = sent[view.spine.name]
    assert spine[0] > spine[1] > spine[2] > spine[3] == 0  # uneven, the last idle
    feature_rows = rows_of(features_live_uri(str(store), view.name, view.fingerprint), ["row_id", "__late"])
    assert feature_rows["row_id"].n_unique() == len(feature_rows) == sum(spine)
    assert not feature_rows["__late"].any()
    found = check_parity(view, str(store))
    assert found.feature_rows == len(feature_rows)
    assert found.differing == 0, {name: each.examples for name, each in found.features.items() if each.differing}
    print(f"{sum(each.rows for each in found.features.values()):,} values, {found.cuts} cuts: 0 differ")
