"""A whole live job, a worker of which is really killed by a message: after a restart exactly that message is a dead
letter, and every other one is served."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from deploy.streaming.prism import Prism
from deploy.streaming.processes import running
from deploy.streaming.workers import WorkerPool
from tests.support.deadly import DEADLY
from tests.support.live_fixtures import Live
from tests.support.live_histories import commits, history
from tests.support.live_jobs import Stage, await_, end, slots
from transforms.records.times import FOREVER
from transforms.streaming.messages import to_arrow

pytestmark = [pytest.mark.live, pytest.mark.timeout(400)]
ROWS = 200  # of a message, at most


def test_a_message_that_kills_its_worker_is_the_only_dead_letter_after_a_restart(live: Live, tmp_path: Path) -> None:
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(DEADLY)  # of the workers and of what they start
    stage, to_send = Stage(live, tmp_path, partitions=2), slots(history(), share=(2, 1))
    third = len(to_send) // 3
    large = history()["sales"][:1]
    prism, pool = Prism(tmp_path), WorkerPool(tmp_path, path=[hook])
    with running(prism, pool):
        options = [*prism.options, *pool.options, f"--max_message_rows={ROWS}"]
        with stage.job("killed", options=options) as job:
            stage.send_slots(to_send[:third])
            await_(lambda: commits(stage), 120, job)
            stage.send_bad(
                "sales", 0, [b'{"DEADLY": 1}', to_arrow(pl.concat([large] * (ROWS + 1)))], to_send[third].end
            )
            stage.send_slots(to_send[third : 2 * third])
            code, printed = job.wait(150), job.output()
        assert code == 4, printed[-3000:]
        assert "Traceback" not in printed, printed[-3000:]
        assert "the same command goes on from the last commit" in printed
        before = len(stage.feature_rows())
        with stage.job("goes-on", options=options) as job:
            stage.send_slots(to_send[2 * third :])
            stage.beat(FOREVER)
            stage.flush()
            end(job)
        log = pool.log.read_text(errors="replace")
    assert log.count("kills the process that decodes it (SIGSEGV)") == 1, log[-3000:]
    feature_rows = stage.audit()  # each message once: a row, or one of the two dead letters
    assert len(feature_rows) > before
    whole = stage.dead_letters().filter(pl.col("place") == -1, pl.col("source") != "shops")
    (deadly, beyond) = whole.sort("offset")["rule"].to_list()
    assert "kills the process that does (SIGSEGV)" in deadly
    assert f"A message has at most {ROWS} rows" in beyond
    folder = stage.store / "crash_guard"
    assert not list(folder.rglob("suspect-*"))
