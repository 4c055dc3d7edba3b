"""Tables of a live job that others write to as well: the job's last record is found however many commits follow it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from deltalake import DeltaTable

from schemas.errors import StoreError
from tests.support.live_turns import audit, run, stream
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import sources_root
from transforms.streaming.live_tables import TableWriter, application_of, last_commit_record


@contextlib.contextmanager
def others_commit(times: int) -> Iterator[None]:
    """After every commit of the job others commit to the table as well, as a vacuum or a change of properties does."""
    append = TableWriter.append

    def crowded(self: TableWriter, *args: Any) -> int:
        done = append(self, *args)
        table = open_table(self.uri)
        for number in range(times if table is not None else 0):
            DeltaTable(self.uri).alter.set_table_properties({"delta.targetFileSize": str(2**20 + number)})
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TableWriter, "append", crowded)
        yield


def test_commits_of_others_between_two_of_the_job_do_not_make_it_read_again(tmp_path: Path) -> None:
    chunks = stream(Random(7), 3)
    with others_commit(21):
        job = run(tmp_path, chunks, {1}, {2: None})
    audit(str(tmp_path), chunks, job)
    table = open_table(f"{sources_root(str(tmp_path))}/events")
    assert table is not None
    assert table.version() > 21


def test_a_table_of_others_alone_has_no_record_and_a_lost_log_is_reported(tmp_path: Path) -> None:
    chunks = stream(Random(7), 3)
    run(tmp_path, chunks, {1}, {})
    table = open_table(f"{sources_root(str(tmp_path))}/events")
    assert table is not None
    assert last_commit_record(table, application_of("another view")) == {}
    assert last_commit_record(table, application_of("events"))["turn"] > 0
    log = Path(sources_root(str(tmp_path))) / "events" / "_delta_log" / f"{table.version():020}.json"
    table.create_checkpoint()
    log.unlink()
    table = open_table(f"{sources_root(str(tmp_path))}/events")
    with pytest.raises(StoreError, match="log can be read"):
        last_commit_record(table, application_of("events"))
