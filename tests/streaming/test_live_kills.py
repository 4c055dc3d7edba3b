"""Live jobs that are killed and frozen, on a real broker and engine: whatever happens, every message is accounted for
once."""

from __future__ import annotations

import itertools
import random
import signal
import time
from pathlib import Path

import pytest

from beam_pipelines.runtime.job_supervisor import CANCELLED_WITHIN
from deploy.streaming.kafka import Broker
from tests.support.live_fixtures import Live
from tests.support.live_histories import Kills, commits, history, killed
from tests.support.live_jobs import Slot, Stage, await_, end, high_marks, slots
from tests.support.live_turns import audit, run, stream
from transforms.records.times import FOREVER


@pytest.mark.live
@pytest.mark.timeout(280)
def test_launcher_prism_and_workers_are_killed_and_nothing_is_lost_or_twice(live: Live, tmp_path: Path) -> None:
    killed(live, tmp_path, 4, 1)


@pytest.mark.live
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(6))
def test_thirty_kills_of_the_features_job(live: Live, tmp_path: Path, seed: int) -> None:
    killed(live, tmp_path, 5, seed)


@pytest.mark.live
@pytest.mark.timeout(280)
def test_broker_stopped_and_workers_frozen_in_one_run_lose_nothing(live: Live, broker: Broker, tmp_path: Path) -> None:
    stage, to_send = Stage(live, tmp_path), slots(history())
    third = len(to_send) // 3
    assert live.workers.child is not None
    with stage.job("one", environment="EXTERNAL") as job:
        stage.send_slots(to_send[:third])
        await_(lambda: commits(stage) >= 3, 100, job)
        broker.stop()
        time.sleep(3)
        broker.start()
        before = commits(stage)
        stage.send_slots(to_send[third : 2 * third])
        await_(lambda: commits(stage) > before, 120, job)
        stage.send_slots(to_send[2 * third :])
        live.workers.child.signal(signal.SIGSTOP)  # amid bundles
        time.sleep(4)
        live.workers.child.signal(signal.SIGCONT)
        stage.beat(FOREVER)
        stage.flush()
        end(job)
    counts = stage.status("one")["counts"]
    assert not any(each.get("offsets_skipped") for each in counts.values())
    stage.audit()


@pytest.mark.live
@pytest.mark.timeout(280)
def test_ctrl_c_ends_the_job_of_a_frozen_runner_and_what_runs_on_there_writes_nothing_twice(
    live: Live, tmp_path: Path
) -> None:
    """The workers are the pool's: should Prism, thawed, not have heard of the end, they go on beside the restarted
    job."""
    stage, to_send, kills = Stage(live, tmp_path), slots(history()), Kills(live, tmp_path)
    half = len(to_send) // 2
    try:
        with kills.job(stage, "one", "workers") as job:
            stage.send_slots(to_send[:half])
            await_(lambda: commits(stage) >= 3, 100, job)
            kills.freeze()
            job.signal(signal.SIGINT)
            began = time.monotonic()
            assert job.wait(60) == 0
            assert CANCELLED_WITHIN < time.monotonic() - began < CANCELLED_WITHIN + 10
            assert "the runner has not answered for 10 s" in job.output()
            assert "Traceback" not in job.output()
        kills.freeze(False)
        with kills.job(stage, "one", "launcher") as job:
            stage.send_slots(to_send[half:])
            stage.beat(FOREVER)
            stage.flush()
            end(job)
        stage.audit()
    finally:
        kills.prism.stop()


@pytest.mark.live
@pytest.mark.timeout(280)
def test_ctrl_c_ends_a_job_of_which_the_broker_is_away(live: Live, broker: Broker, tmp_path: Path) -> None:
    stage, to_send = Stage(live, tmp_path), slots(history())
    with stage.job("one") as job:
        stage.send_slots(to_send[:8])
        await_(lambda: commits(stage) >= 3, 100, job)
        broker.stop()
        try:
            time.sleep(6)  # past a look at the topics
            job.signal(signal.SIGINT)
            assert job.wait(8) == 0, job.output()
        finally:
            broker.start()
    printed = job.output()
    assert "questions unaccounted for  0" in printed
    assert "Traceback" not in printed, printed


@pytest.mark.live
@pytest.mark.timeout(280)
def test_partitions_added_to_a_topic_are_read_too(live: Live, tmp_path: Path) -> None:
    stage, to_send = Stage(live, tmp_path, partitions=2), slots(history(), share=(2, 1))
    half = len(to_send) // 2
    with stage.job("one") as job:
        stage.send_slots(to_send[:half])
        await_(lambda: commits(stage) >= 3, 100, job)
        stage.grow("sales", 3)
        moved = [
            Slot([(name, 2 if name == "sales" else position, rows) for name, position, rows in slot.parts], slot.end)
            for slot in to_send[half:]
        ]
        stage.send_slots(moved, beats=False)
        stage.beat(to_send[-1].end)
        stage.flush()
        await_(lambda: "starting again, with all of them" in job.output(), 120, job)
        stage.beat(FOREVER)
        stage.beat(FOREVER, ["sales"], [2])
        stage.flush()
        printed = end(job)
    assert "sales has 3 partitions now, 2 before" in printed
    assert "questions unaccounted for  0" in printed
    stage.audit()


@pytest.mark.live
@pytest.mark.timeout(280)
def test_a_restart_needs_nothing_from_the_broker_that_was_read_before(live: Live, tmp_path: Path) -> None:
    """Retention shorter than the windows: what the first run read is deleted, the second seeds from `sources/`."""
    stage, to_send = Stage(live, tmp_path), slots(history())
    half = len(to_send) // 2
    with stage.job("first") as job:
        stage.send_slots(to_send[:half])
        stage.beat(FOREVER)
        stage.flush()
        end(job)
    first = stage.feature_rows()
    ends = high_marks(live.broker.bootstrap, [stage.topic(name) for name in stage.sources])
    live.broker.delete({position: offset for position, offset in ends.items() if offset})
    with stage.job("second") as job:  # the end that the first run heard is none: more rows come
        stage.send_slots(to_send[half:])
        stage.beat(FOREVER)
        stage.flush()
        printed = end(job)
    assert "questions unaccounted for  0" in printed
    feature_rows = stage.audit()
    assert feature_rows.join(first, on="row_id", how="semi").sort("row_id").equals(first.sort("row_id"))
    fresh = feature_rows.join(first, on="row_id", how="anti")
    assert len(fresh) > 40
    assert not fresh["__late"].any()
    # Windows of two days reach over the restart.
    assert fresh.sort("asked")["sales_by_shop_count_2d"].head(5).max() > 0  # type: ignore[operator]


@pytest.mark.live
@pytest.mark.timeout(280)
def test_records_deleted_before_they_were_read_are_counted_and_hold_nothing_up(live: Live, tmp_path: Path) -> None:
    stage, to_send = Stage(live, tmp_path), slots(history())
    with stage.job("first") as job:
        stage.send_slots(to_send[:8])
        await_(lambda: commits(stage) >= 3, 100, job)
        job.signal(signal.SIGINT)
        assert job.wait(60) in (0, 130), job.output()
    stage.send_slots(to_send[8:12])
    due, lost = stage.status("first")["next"]["sales"]["0"], stage.sent["sales", 0]
    live.broker.delete({(stage.topic("sales"), 0): lost})
    with stage.job("second") as job:
        stage.send_slots(to_send[12:20])
        await_(lambda: "offsets were not there to be read" in job.output(), 100, job)
        stage.send_slots(to_send[20:])
        stage.beat(FOREVER)
        stage.flush()
        printed = end(job)
    assert f"sales/0: the broker no longer has offsets {due} to {lost - 1}, which were not read" in printed
    assert f"live: {lost - due} offsets were not there to be read" in printed
    assert f", {lost - due} offsets_skipped" in printed
    assert stage.status("second")["counts"]["sales"]["offsets_skipped"] == lost - due > 0
    kept = set(stage.kept("sales").select("__partition", "__offset", "__place").iter_rows())
    dead = set(stage.dead_letters().filter(source="sales").select("partition", "offset", "place").iter_rows())
    missing = {position for position in stage.rows["sales"] - kept - dead if position[0] == 0 and position[1] < lost}
    stage.rows["sales"] -= missing  # the broker's loss
    assert missing
    stage.audit()


@pytest.mark.live
@pytest.mark.timeout(280)
@pytest.mark.parametrize("launcher", ["runs on", "is killed"])
def test_of_two_jobs_on_one_store_the_older_stops_and_every_row_is_written_once(
    live: Live, tmp_path: Path, launcher: str
) -> None:
    """Also where the older one's launcher is killed, and its job runs on in the worker pool."""
    stage, to_send = Stage(live, tmp_path), slots(history())
    with stage.job("one", environment="EXTERNAL") as one:
        stage.send_slots(to_send[:20])
        await_(lambda: commits(stage) > 0, 100, one)
        if launcher == "is killed":
            one.kill()
        with stage.job("two") as two:
            await_(lambda: "running: turn" in two.output(), 100, two)  # it has taken the tables over
            for slot in to_send[20:]:
                stage.send_slots([slot])
                time.sleep(0.05)
            stage.beat(FOREVER)
            stage.flush()
            end(two)
        if launcher == "runs on":
            assert one.wait(100) == 8
            assert "belongs to launch 2" in one.output()
    stage.audit()


def test_a_job_killed_at_every_step_of_its_commits_loses_nothing(tmp_path: Path) -> None:
    """Without Beam and broker, so that each moment is hit: after dead letters, after each source, before the feature
    rows."""
    done = 0
    for seed in itertools.count(1):
        chunks = stream(random.Random(seed))
        kills = {number: number % 6 for number in range(len(chunks))}
        store = tmp_path / str(seed)
        job = run(store, chunks, set(range(0, len(chunks), 2)), kills)
        audit(str(store), chunks, job)
        done += len(kills)
        if done >= 60:
            break
