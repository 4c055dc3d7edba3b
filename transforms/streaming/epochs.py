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

from deltalake import DeltaTable

from schemas.errors import ConflictError
from schemas.views import FeatureView
from transforms.storage.delta_tables import COMMIT_ATTEMPTS, CommittedMeanwhile, open_table, retry_commits
from transforms.streaming.live_tables import TableWriter, last_commit_record, writers_of
from transforms.streaming.progress import NO_EPOCH, Epoch


def take_epoch(view: FeatureView, store: str, run_id: str) -> Epoch:
    """Takes over the tables of a features job.  From now on, no earlier launch commits to them.

    Args:
        view: the view of the job.
        store: the folder of the tables.
        run_id: recorded in the commits.

    Returns:
        The epoch of this launch.

    Raises:
        ConflictError: other launches keep doing the same at the same time.
        StoreError: the store cannot be written.
    """
    number, exhausted = 0, ConflictError("A live job is started once", store, "Are several launches starting it?")
    for _ in range(COMMIT_ATTEMPTS):
        writers = list(writers_of(view, store, run_id, NO_EPOCH))
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
