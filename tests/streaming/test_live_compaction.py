"""A live store that is compacted after every commit: jobs go on, recover and compare with batch as without."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from beam_pipelines import cli
from tests.support.live_fixtures import Live
from tests.support.live_histories import commits, history
from tests.support.live_jobs import Stage, await_, end, slots
from tests.support.live_turns import audit, run, stream, view
from tests.support.turns import Job
from transforms.records.times import FOREVER
from transforms.storage.compaction import MOST_FILES
from transforms.storage.delta_log import COMPACTION
from transforms.storage.delta_log import commits as log_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import tables_below


class CompactedJob(Job):
    """A job whose tables are compacted after each commit."""

    def commit(self) -> dict[str, Any]:
        result = super().commit()
        assert cli.main(["compact", "--store", self.store, "--most_files", "1"]) == 0
        return result


@settings(max_examples=8, phases=(Phase.explicit, Phase.generate), deadline=None)
@given(seed=st.integers(0, 2**32))
def test_kills_and_restarts_on_a_compacted_store(seed: int) -> None:
    random = Random(seed)
    chunks = stream(random)
    commits = {random.randrange(len(chunks)) for _ in range(random.randrange(1, 6))}
    kills = {random.randrange(len(chunks)): random.choice([None, 1, 2, 3, 4, 5]) for _ in range(random.randrange(4))}
    with tempfile.TemporaryDirectory() as folder:
        job = run(Path(folder), chunks, commits, kills, make=functools.partial(CompactedJob, view))
        audit(folder, chunks, job)
        for name in tables_below(folder):
            table = open_table(f"{folder}/{name}")
            assert table is not None
            days = [file.date for file in data_files(table)]
            assert len(days) == len(set(days))


@pytest.mark.live
@pytest.mark.timeout(280)
def test_a_live_job_compacts_its_tables_while_it_runs_and_is_killed(live: Live, tmp_path: Path) -> None:
    stage, to_send = Stage(live, tmp_path), slots(history(), hours=1)[:60]  # so that a date has many commits
    stage.beginning.append("--compact_every=2s")
    with stage.job("one") as job:
        for slot in to_send[:30]:
            stage.send_slots([slot])
            before = commits(stage)
            await_(lambda before=before: commits(stage) > before, 100, job)  # type: ignore[misc]
        job.kill()
    with stage.job("two") as job:
        stage.send_slots(to_send[30:])
        stage.beat(FOREVER)
        stage.flush()
        end(job)
    stage.audit()
    uris = [f"{stage.store}/{name}" for name in tables_below(str(stage.store))]
    assert any(COMPACTION in entry for uri in uris for entry in log_of(uri))
    assert "compaction failed" not in "".join((tmp_path / f"{run}.log").read_text() for run in ("one", "two"))
    assert cli.main(["compact", "--store", str(stage.store)]) == 0
    for uri in uris:
        table = open_table(uri)
        assert table is not None
        days = [file.date for file in data_files(table)]
        assert all(days.count(day) <= MOST_FILES for day in set(days)), uri
    stage.audit()
