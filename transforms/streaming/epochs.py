"""Epochs: each launch of a live job takes over the tables of its store from all earlier launches.

A launcher may be killed while its job continues in another process, and the job may be started again.  Then both would
commit to the same tables, and the older one might record earlier offsets than the newer one has recorded.  So each
launch begins with an empty commit on every table that it writes, which records its epoch, and no launch commits to a
table that records a later one (see `live_tables.Writer`).

Where a table does not exist yet, there is nothing to record an epoch in.  Of two launches that began with an empty
store, the first that commits to a table keeps it, and the other one stops.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Sequence

from deltalake import DeltaTable

from schemas.errors import ConflictError
from schemas.live import repeats_by
from schemas.views import FeatureView
from transforms.storage.delta_tables import COMMIT_ATTEMPTS, CommittedMeanwhile, open_table, retry_commits
from transforms.streaming.fates import RepeatMemory, WindowReach
from transforms.streaming.live_tables import TableWriter, last_commit_record, writers_of
from transforms.streaming.progress import NO_EPOCH, CommitRecord, Epoch, memory_to_json


def take_epoch(views: Sequence[FeatureView], store: str, run_id: str) -> Epoch:
    """Takes over the tables of a features job.  From now on, no earlier launch commits to them.

    Args:
        views: the views of the job.
        store: the folder of the tables.
        run_id: recorded in the commits.

    Returns:
        The epoch of this launch.

    Raises:
        ConflictError: other launches keep doing the same at the same time.
        StoreError: the store cannot be written.
    """
    number, exhausted = (
        0,
        ConflictError(
            "A live job must be started once",
            f"several launches start on {store} at the same time",
            "Stop the others, then run the same command again",
        ),
    )
    for _ in range(COMMIT_ATTEMPTS):
        writers = list(writers_of(views, store, run_id, NO_EPOCH))
        recorded = [Epoch.of_record(last_commit_record(open_table(each.uri), each.app)) for each in writers]
        number = 1 + max(number, *(each.number for each in recorded))
        epoch = Epoch(number, uuid.uuid4().hex[:8])
        if all(_take(dataclasses.replace(each, epoch=epoch), exhausted) for each in writers):
            return epoch
    raise exhausted


def _take(writer: TableWriter, exhausted: ConflictError) -> bool:
    """Records the epoch in a table, if there is one.  Returns False if another launch has taken this or a later one."""

    def attempt(table: DeltaTable | None) -> bool:
        record = last_commit_record(table, writer.app)
        if not record:  # its first commit will record the epoch
            return True
        if Epoch.of_record(record).number >= writer.epoch.number:
            return False
        if not writer.commit(table, [], int(record.get("turn", 0)), record):
            raise CommittedMeanwhile(writer.uri)
        return True

    return retry_commits(writer.uri, attempt, exhausted)


def record_memory(views: Sequence[FeatureView], store: str, run_id: str, epoch: Epoch, keep: int) -> None:
    """Records for how long a launch recognises repeats, before it computes anything.

    It may be longer than before, if the job serves other views.  Parity and later launches must know of it even if the
    launch accepts no row.

    Args:
        views: the views of the job.
        store: the folder of the tables.
        run_id: recorded in the commits.
        epoch: of the launch.
        keep: for how long (µs) features are still computed for late spine rows.

    Raises:
        ConflictError: another launch has taken the tables over.
        StoreError: the store cannot be written.
    """
    exhausted = ConflictError("A live job is started once", store, "Are several launches starting it?")
    for name, writer in writers_of(views, store, run_id, epoch).sources.items():
        least = WindowReach.of(views, name).least_memory(keep)

        def attempt(
            table: DeltaTable | None, name: str = name, writer: TableWriter = writer, least: int = least
        ) -> None:
            record = last_commit_record(table, writer.app)
            if not record:  # its first commit will record it
                return
            known = CommitRecord.of_json(record)
            before = known.memory.get(name, RepeatMemory())
            memory = before.grown(least, known.next_of(name))
            if memory == before:
                return
            record = {**record, **memory_to_json({**known.memory, name: memory})}
            if not writer.commit(table, [], known.turn, record):
                raise CommittedMeanwhile(writer.uri)

        if any(repeats_by(view, name) for view in views):
            retry_commits(writer.uri, attempt, exhausted)
