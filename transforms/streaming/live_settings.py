"""The settings of the live engine."""

from __future__ import annotations

import dataclasses

from transforms.streaming.kafka import Broker
from transforms.streaming.progress import NO_EPOCH, Epoch, RecoveryPoint


@dataclasses.dataclass(frozen=True)
class LiveSettings:
    """How a live job works.  Times are µs.

    Args:
        store: the folder of the tables.
        run_id: prefix of file names.
        dimensions: the folder of the dimensions.
        shards: number of parallel shards; a single shard runs in the journal's step, so that nothing passes through the
            runner.
        keep: for how long after the watermark of the spine features are still computed for late spine rows.
        pace: minimum interval between turns; 0: each envelope is a turn, at the envelope's own time (replay).
        commit_every: minimum interval between commits.
        dimension_every: minimum interval between reads of the dimensions.
        prefix: prefix of topic names.
        table: whether feature rows are written to the table.
        kafka: the broker of the messages; None: a replay.
        begin: where a replay begins; None: with an empty store.
        epoch: epoch of the launch (see `epochs`).
    """

    store: str
    run_id: str
    dimensions: str
    shards: int = 1
    keep: int = 3_600_000_000
    pace: int = 200_000
    commit_every: int = 10_000_000
    dimension_every: int = 60_000_000
    prefix: str = ""
    table: bool = True
    kafka: Broker | None = None
    begin: RecoveryPoint | None = None
    epoch: Epoch = NO_EPOCH
