"""A live job that is killed at every step of its commits: every message is accounted for once."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

from test_live import audit, run, stream


def test_a_job_killed_at_every_step_of_its_commits_loses_nothing(tmp_path: Path) -> None:
    """Without Beam and broker, so that each moment is hit: after letters, after each source, before the answers."""
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
