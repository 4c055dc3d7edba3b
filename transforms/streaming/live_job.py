"""What every live job has, whatever it computes."""

from __future__ import annotations

import dataclasses

from schemas.loading import Definition
from transforms.streaming.kafka import Broker


@dataclasses.dataclass(frozen=True, eq=False)
class LiveJob:
    """Where a live job reads and writes.

    Args:
        definition: the definition of the view and the model.
        store: the folder of the tables.
        run_id: the run.
        replaying: whether a replay sends the messages instead of Kafka.
        broker: the broker; None if none is named.
        prefix: the prefix of the names of all topics.
        sinks: "table", "topic" or both.
    """

    definition: Definition
    store: str
    run_id: str
    replaying: bool
    broker: Broker | None
    prefix: str
    sinks: tuple[str, ...]
