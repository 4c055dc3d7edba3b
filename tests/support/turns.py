"""A live job without Beam: the same journal, shards and ledger, driven by hand, so that a test can stop it anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas import FeatureView
from schemas.live import live_sources
from transforms.records.frame_packets import head_of
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.live_features import decode_messages
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.live_tables import PendingTurns
from transforms.streaming.messages import Message
from transforms.streaming.micro_batches import micro_batches_of
from transforms.streaming.recovery import RecoveryPoint, find_recovery_point, restore_journal
from transforms.streaming.shard_dofns import AssembleDoFn
from transforms.streaming.shards import Shard

HOUR = 3_600_000_000


@dataclass(frozen=True)
class JobOptions:
    """What a job may be started with; `start` is where it goes on from, found in its store by default."""

    run_id: str = "t"
    shards: int = 2
    keep: int = HOUR
    start: RecoveryPoint | None = None


class Job:
    """One process of a live job."""

    def __init__(
        self,
        view: FeatureView,
        store: Path,
        dimensions: Path,
        begin: Mapping[str, Mapping[int, int]],
        options: JobOptions = JobOptions(),
    ) -> None:
        run_id, shards, keep, start = options.run_id, options.shards, options.keep, options.start
        self.view, self.store = view, str(store)
        self.live = LiveSettings(str(store), run_id, str(dimensions), shards=shards, keep=keep)
        self.journal = Journal(view, shards, keep)
        self.shards = [Shard(view, number, shards) for number in range(shards)]
        self.ledger = PendingTurns(view, str(store), run_id)
        self.assemble = AssembleDoFn(view, self.live)
        self.assemble.setup()
        if self.journal.keys.dimensions:
            looked_up = AssembleDoFn(view, self.live)  # of the journal's process
            looked_up.setup()
            self.journal.dimensions = looked_up.dimensions
        self.sources = live_sources(view)
        self.now = 0
        start = start or find_recovery_point(view, str(store), begin)
        self.start = {
            name: {int(number): offset for number, offset in each.items()} for name, each in start.next.items()
        }
        for turn in restore_journal(self.journal, str(store), start, 0):
            self._pass_on(turn)
        if self.journal.answerable(0):
            self._pass_on(self.journal.turn([], 0))

    def take(self, messages: Sequence[Message]) -> None:
        """Decode messages, make a turn of them."""
        envelope = decode_messages(self.sources, messages)
        self.now = max(self.now, head_of(envelope)["arrived"])
        admitted, waiting = self.journal.admit(micro_batches_of(envelope), self.now)
        assert not waiting
        self._pass_on(self.journal.turn(admitted, self.now))

    def _pass_on(self, turn: Turn) -> None:
        feature_rows = []
        for number, given in turn.shards.items():
            feature_row = self.shards[number].apply(given)
            feature_rows += [feature_row] if feature_row is not None else []
        self.ledger.take(turn.entry)
        if turn.spine_rows is not None:
            assert turn.spine_rows.shards == len(feature_rows)
            self.ledger.take(self.assemble.compute_features(turn.spine_rows, feature_rows))

    def commit(self) -> dict[str, Any]:
        return self.ledger.commit(turns).to_json() if (turns := self.ledger.whole()) else {}


def unread(messages: Iterable[Message], start: Mapping[str, Mapping[int, int]]) -> list[Message]:
    """What a consumer placed at `start` reads."""
    return [each for each in messages if each.offset >= start[each.topic].get(each.partition, 0)]
