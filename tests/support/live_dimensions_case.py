"""Helpers and fixtures for: dimensions of a live job: read again when they change, and kept serving when what is there
cannot be read."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from tests.support import histories
from tests.support.live_turns import SOURCES, view
from tests.support.turns import Job, JobOptions
from transforms.streaming.messages import Message, heartbeat, to_arrow

SHOPS = pl.DataFrame(
    {"k": ["a", "b"], "size": [1, 2], "name": ["x", "y"], "rate": [0.1, 2.5]}, schema_overrides={"size": pl.Int32}
)


def computed_one(folder: Path, number: int, run_id: str) -> Job:
    """A job that has computed a spine row of its own."""
    job = Job(view, folder, folder / "in", {name: {0: 0, 1: 0} for name in SOURCES}, JobOptions(f"{run_id}{number}"))
    at = histories.at(10 * number)
    row = {"id": number, "k": "b", "t": at}
    spine_row = pl.DataFrame([row], schema_overrides=SOURCES["questions"].schema).select(
        pl.col(name) if name in row else pl.lit(None, kind).alias(name)
        for name, kind in SOURCES["questions"].schema.items()
    )
    until = int((at.timestamp() + 60) * 1e6)
    messages = [Message("questions", 0, 10 * number, 2**51, None, to_arrow(spine_row))]
    messages += [
        Message(name, position, 10 * number + 1, 2**51, *heartbeat(until)) for name in SOURCES for position in (0, 1)
    ]
    job.take(messages)
    return job
