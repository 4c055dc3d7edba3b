"""A launch of a live job takes the store's tables over: what an earlier one still commits is refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from schemas.errors import ConflictError
from tests.support import market
from tests.support.tables import rows_of
from tests.support.turns import Job, JobOptions, unread
from transforms.lineage.feature_parity import check_parity
from transforms.storage.delta_tables import open_table
from transforms.storage.paths import features_live_uri, source_uri, sources_root
from transforms.streaming.epochs import take_epoch
from transforms.streaming.live_tables import last_commit_record, source_record, writers_of
from transforms.streaming.progress import Epoch
from transforms.streaming.replay import Replay, chunks_of

HOUR = 3_600_000_000
BEGIN = {name: {0: 0, 1: 0} for name in market.sources() if name != "shops"}


def launched(folder: Path, run_id: str) -> Job:
    """A job that begins as a launch does."""
    view, store = market.load(folder), folder / "live"
    epoch = take_epoch([view], str(store), run_id)
    job = Job(view, store, folder / "sources", BEGIN, JobOptions(run_id))
    job.ledger.writers = writers_of([view], str(store), run_id, epoch)
    return job


@pytest.mark.parametrize("seen", [2, 5])
def test_a_job_that_was_left_running_commits_nothing_more(tmp_path: Path, seen: int) -> None:
    frames = market.sources()
    market.write(tmp_path, {"shops": frames["shops"]})
    view = market.load(tmp_path)
    sent = {name: frame for name, frame in frames.items() if name != "shops"}
    chunks = [list(some) for some in chunks_of([view], sent, Replay("", partitions=2, chunk=12 * HOUR))]
    older = launched(tmp_path, "older")
    for some in chunks[:seen]:
        older.take(some)
    older.commit()
    for some in chunks[seen : seen + 2]:  # in turns that it has not committed
        older.take(some)
    newer = launched(tmp_path, "newer")
    for some in chunks:
        newer.take(unread(some, newer.start))
    newer.commit()
    before = {name: source_record(str(tmp_path / "live"), name) for name in BEGIN}
    with pytest.raises(ConflictError, match=r"belongs to launch 2 \(\w{8}\), and this is launch 1 "):
        older.commit()
    assert {name: source_record(str(tmp_path / "live"), name) for name in BEGIN} == before
    for name in BEGIN:
        rows = rows_of(source_uri(sources_root(str(tmp_path / "live")), name))
        assert len(rows) == len(rows.unique(["__partition", "__offset", "__place"]))
    feature_rows = rows_of(features_live_uri(str(tmp_path / "live"), view.name, view.fingerprint))
    assert feature_rows["row_id"].n_unique() == len(feature_rows) > 0
    checked = check_parity(view, str(tmp_path / "live"))
    assert (checked.differing, checked.unaccounted) == (0, 0)


def test_launches_at_one_moment_have_epochs_of_their_own(tmp_path: Path) -> None:
    frames = market.sources()
    market.write(tmp_path, {"shops": frames["shops"]})
    view, store = market.load(tmp_path), str(tmp_path / "live")
    sent = {name: frame for name, frame in frames.items() if name != "shops"}
    job = launched(tmp_path, "first")
    for some in chunks_of([view], sent, Replay("", partitions=2, chunk=96 * HOUR)):
        job.take(some)
    job.commit()
    found: list[Epoch] = []
    threads = [threading.Thread(target=lambda n=n: found.append(take_epoch([view], store, f"r{n}"))) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len({each.number for each in found}) == 4
    last = max(found, key=lambda each: each.number)
    for writer in writers_of([view], store, "t", Epoch()):
        if table := open_table(writer.uri):
            assert Epoch.of_record(last_commit_record(table, writer.app)) == last
    assert len(rows_of(features_live_uri(store, view.name, view.fingerprint)))


def test_an_empty_store_has_the_first_epoch_and_no_tables(tmp_path: Path) -> None:
    market.write(tmp_path, {"shops": market.sources()["shops"]})
    first, second = (take_epoch([market.load(tmp_path)], str(tmp_path / "live"), "t") for _ in range(2))
    assert (first.number, second.number) == (1, 1)
    assert first != second
    assert not (tmp_path / "live").exists()


def test_of_two_jobs_that_began_with_an_empty_store_the_first_to_commit_goes_on(tmp_path: Path) -> None:
    frames = market.sources()
    market.write(tmp_path, {"shops": frames["shops"]})
    sent = {name: frame for name, frame in frames.items() if name != "shops"}
    one, two = launched(tmp_path, "one"), launched(tmp_path, "two")
    for some in chunks_of(one.views, sent, Replay("", partitions=2, chunk=96 * HOUR)):
        one.take(some)
        two.take(some)
    two.commit()
    with pytest.raises(ConflictError, match="belongs to launch 1"):
        one.commit()
    assert check_parity(one.view, one.store).differing == 0
    third = launched(tmp_path, "third")
    assert third.ledger.writers.features[0].epoch.number == 2
