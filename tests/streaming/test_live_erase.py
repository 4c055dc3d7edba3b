"""Rows erased from the store of a live job on Kafka, and a store that is moved meanwhile: the job goes on from its
tables alone, with a key from a Lookup too."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import cli
from tests.support import market
from tests.support.live_fixtures import Live
from tests.support.live_histories import commits, history
from tests.support.live_jobs import Stage, await_, end, slots
from tests.support.tables import figures_of
from transforms.records.times import FOREVER

# Sales by the area of the visited shop: the key comes from a Lookup.
BY_ZONE = """    Derived(zone=(pl.col("shops_area") % 3).cast(pl.Int32)),
    Trailing(sales, by={"zone": "city"}, over="2d", stats={"price": ("mean", "count")}, name="nearby"),
])"""
WHERE = "sale % 7 = 0"


def definition() -> str:
    """The market's, with sales by the zone of the visited shop: a key from a Lookup."""
    begin, _, rest = market.DEFINITION.rpartition("])")
    return begin + BY_ZONE + rest


@pytest.mark.live
@pytest.mark.timeout(900)
def test_a_job_goes_on_after_rows_were_erased_and_its_store_was_moved(live: Live, tmp_path: Path) -> None:
    stage, told = Stage(live, tmp_path, definition=definition()), slots(history())
    half = len(told) // 2
    with stage.job("one") as job:
        stage.send_slots(told[:half])
        await_(lambda: sum(len(stage.kept(name)) for name in stage.sources) > 0 and commits(stage) > 1, 200, job)
        await_(lambda: len(stage.feature_rows()) > 10, 200, job)
        job.signal(signal.SIGTERM)
        assert job.wait(200) == 0, job.output()[-3000:]
    moved = tmp_path / "moved here"
    os.rename(stage.store, moved)
    stage.store = moved
    flags = ["--definition", str(stage.definition), "--store", str(moved)]
    before, kept = stage.kept("sales"), pl.sql_expr(f"NOT ({WHERE})")
    assert 0 < len(before.filter(kept)) < len(before)
    feature_rows = stage.feature_rows()
    assert cli.main(["erase", "sales", *flags, "--where", WHERE]) == 0
    left = stage.kept("sales")
    assert left.filter(kept).height == left.height == before.filter(kept).height
    assert 0 < len(stage.feature_rows()) < len(feature_rows)
    assert cli.main(["verify", *flags, "--live", "--rows", "all", "--run_id", "v1"]) == 0
    with stage.job("two") as job:
        stage.send_slots(told[half:])
        stage.beat(FOREVER)
        stage.flush()
        end(job, 400)
    # What was read before is not read again, and what came after is there, whatever the condition says.
    after = stage.kept("sales")
    ids = ["__partition", "__offset", "__place"]
    again = after.join(before.filter(~kept).select(ids), on=ids)
    assert again.height == 0
    assert after.join(left.select(ids), on=ids).height == left.height
    assert cli.main(["parity", *flags, "--run_id", "p1"]) == 0
    found = figures_of(moved, "p1")
    assert found["values_differing"] == found["questions_unaccounted_for"] == 0
    assert found["questions_erased"] > 0
    assert cli.main(["verify", *flags, "--live", "--rows", "all", "--run_id", "v2"]) == 0
    assert stage.feature_rows()["nearby_by_zone_price_count_2d"].max() > 0
    assert not (tmp_path / "store").exists()
