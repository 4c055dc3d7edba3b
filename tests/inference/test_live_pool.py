"""Live jobs over an external worker pool, as Flink runs Python: both jobs in a row, and a pool that stands still."""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features_streaming as live_features
from beam_pipelines.runtime import job_supervisor
from deploy.streaming.processes import Child
from schemas.loading import load_definition
from tests.support.live_fixtures import Live
from tests.support.live_histories import commits, history
from tests.support.live_inference_case import ROWS, House
from tests.support.live_jobs import Stage, await_, end, slots
from transforms.lineage.feature_parity import check_parity
from transforms.models.registry import registry_uri
from transforms.records.times import FOREVER
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import features_live_uri

pytestmark = [pytest.mark.live, pytest.mark.timeout(280)]
ROOT = Path(__file__).parents[2]


class Heard(logging.Handler):
    """Collects log messages."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += f"{record.getMessage()}\n"


def test_a_job_that_commits_nothing_while_messages_wait_is_reported(
    live: Live, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its workers are frozen, longer than a commit may take here: once it runs a second, not a minute."""
    monkeypatch.setattr(job_supervisor, "LOOK", 0.5)
    stage, to_send, heard = Stage(live, tmp_path), slots(history()), Heard()
    pool, log, failed = live.workers.child, logging.getLogger("millrace.live"), list[BaseException]()
    assert pool is not None

    def whole() -> bool:
        """Whether all that was sent is committed."""
        committed = stage.status("one").get("next", {})
        return all(committed.get(name, {}).get(str(number)) == offset for (name, number), offset in stage.sent.items())

    def meddle() -> None:
        try:
            stage.send_slots(to_send[:8])
            await_(lambda: commits(stage) >= 3, 100)
            await_(whole, 30)
            monkeypatch.setattr(job_supervisor, "STILL", 1.0)
            time.sleep(4)
            stage.send_slots(to_send[8:10])  # after a pause, and read at once
            await_(whole, 30)
            assert "no commit" not in heard.text
            pool.signal(signal.SIGSTOP)
            stage.send_slots(to_send[10:12])
            await_(lambda: "no commit for" in heard.text, 60)
        except BaseException as error:
            failed.append(error)
        pool.signal(signal.SIGCONT)
        stage.send_slots(to_send[12:])
        stage.beat(FOREVER)
        stage.flush()

    log.addHandler(heard)
    meddling = threading.Thread(target=meddle)
    meddling.start()
    try:
        assert live_features.main(stage.flags("one", live.options("EXTERNAL"))) == 0
    finally:
        meddling.join()
        log.removeHandler(heard)
    assert not failed, failed
    assert "messages wait: has the runner lost its workers?  Stop this job (Ctrl-C) and start it again" in heard.text
    stage.audit()


def test_both_jobs_over_a_pool_give_what_batch_gives_and_one_restarts_amid(
    house: House, built: House, live: Live, tmp_path: Path
) -> None:
    """From the sources' topics to predictions; the features job is stopped on the way and goes on from its last
    commit."""
    view, store, prefix = load_definition(house.definition).view, tmp_path / "both", "both-"
    status = tmp_path / "sent.json"
    live.broker.create(*(f"{prefix}{name}" for name in ("orders", "sales", f"{view.name}.features")), partitions=2)
    common = ["--definition", house.definition, "--bootstrap", live.broker.bootstrap, "--topic_prefix", prefix]
    beam = [
        "--store",
        str(store),
        "--expansion_service",
        live.expansion.address,
        "--commit_every=500ms",
        *live.options("EXTERNAL"),
    ]
    registry = registry_uri(str(house.store))

    def job(module: str, run_id: str, *flags: str) -> Child:
        command = [
            sys.executable,
            "-m",
            f"beam_pipelines.{module}",
            "--streaming",
            "--source=kafka",
            "--run_id",
            run_id,
            *common,
            *beam,
            *flags,
        ]
        return Child(command, tmp_path / f"{run_id}.log", cwd=ROOT)

    def feature_rows() -> int:
        table = open_table(features_live_uri(str(store), view.name, view.fingerprint))
        return 0 if table is None else sum(file.rows for file in data_files(table))

    producer = [
        sys.executable,
        "-m",
        "deploy.streaming.producer",
        *common,
        "--sources",
        str(built.store.parent / "source" / "sources"),
        "--start",
        "2024-01-01",
        "--end",
        "2024-01-08",
        "--speed",
        str(7 * 86_400 / 20),
        "--share=3,1",
        "--status",
        str(status),
    ]

    def rows_sent() -> int:
        return int(json.loads(status.read_text())["rows"]) if status.exists() else 0

    with (
        job("inference", "scores", "--registry", registry) as scores,
        job("features", "first", "--without_history") as first,
    ):
        for each in (scores, first):
            await_(lambda each=each: "running: " in each.output(), 150, each)
        with Child(producer, tmp_path / "producer.log", cwd=ROOT) as sending:
            await_(lambda: rows_sent() > ROWS, 100, sending)  # of 2 x ROWS: the sources' together
            sending.signal(signal.SIGSTOP)  # however slow the machine is, the rest is the second job's
            await_(lambda: feature_rows() > 0, 100, first)
            first.signal(signal.SIGINT)
            assert first.wait(60) == 0, first.output()
            assert feature_rows() < ROWS
            with job("features", "second", "--without_history") as second:
                sending.signal(signal.SIGCONT)
                assert sending.wait(100) == 0, sending.output()
                printed = end(second)
        end(scores, 60)
    assert "questions unaccounted for  0" in printed
    found = check_parity(view, str(store))
    assert (found.feature_rows, found.differing, found.uncomputed) == (ROWS, 0, 0)
    table = open_table(str(store / "predictions_live" / "orders"))
    assert table is not None
    predicted = pl.DataFrame(pl.from_arrow(read_group(data_files(table)))).sort("row_id")
    expected = house.expected("1")
    assert predicted.select(expected.columns).equals(expected)
