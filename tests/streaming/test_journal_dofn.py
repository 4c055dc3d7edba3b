"""The journal's step by hand: what it reports when a job starts again from its tables."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from tests.support.live_turns import SOURCES, run, stream, view
from tests.support.state_cells import Cell
from transforms.records.frame_packets import head_of, pack
from transforms.streaming.journal_dofn import TimedJournalDoFn
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.mirrored_state import SINGLE_KEY
from transforms.streaming.recovery import find_recovery_point


@pytest.mark.parametrize("ended", [True, False])
def test_a_job_that_had_ended_reports_it_when_it_starts_again_and_another_waits(tmp_path: Path, ended: bool) -> None:
    """Killed between its last commit and its last report, it has nothing left to read that could wake it."""
    chunks = stream(Random(5), 3)  # rows of every source
    run(tmp_path, chunks if ended else chunks[:-1], {len(chunks) - 1}, {})
    begin = {name: {0: 0, 1: 0} for name in SOURCES}
    start = find_recovery_point([view], str(tmp_path), begin)
    step = TimedJournalDoFn(
        [view], LiveSettings(str(tmp_path), "again", str(tmp_path / "in"), pace=1000, keep=30_000_000)
    )
    step.setup()
    head, bag, wake, *slots = (Cell() for _ in range(11))
    first = pack({"kind": "start", "index": None, "start": start.to_json()})
    list(step.process((SINGLE_KEY, first), head, bag, wake, *slots))
    printed = [
        head_of(each.value[1]) for each in step.woken(SINGLE_KEY, head, bag, wake, *slots) if each.tag == "entries"
    ]
    assert any(each.get("last") for each in printed) == ended
    if ended:
        assert printed[-1]["turn"] > start.turn
    again = [
        head_of(each.value[1]) for each in step.woken(SINGLE_KEY, head, bag, wake, *slots) if each.tag == "entries"
    ]
    assert [each.get("kind") for each in again] == ["tick"]  # once is enough
