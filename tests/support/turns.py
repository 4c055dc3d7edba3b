"""A live job without Beam: the same journal, shards and ledger, driven by hand, so that a test can stop it anywhere."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas import FeatureView
from schemas.live import joined_sources
from transforms.records.frame_packets import head_of
from transforms.streaming.epochs import record_memory
from transforms.streaming.journal import Journal, Turn
from transforms.streaming.live_features import decode_messages
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.live_tables import PendingTurns
from transforms.streaming.messages import Message
from transforms.streaming.micro_batches import micro_batches_of
from transforms.streaming.progress import NO_EPOCH
from transforms.streaming.recovery import RecoveryPoint, find_recovery_point, restore_journal
from transforms.streaming.shard_dofns import Assembly
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
    """One process of a live job, of one view or several."""

    def __init__(
        self,
        views: FeatureView | Sequence[FeatureView],
        store: Path,
        dimensions: Path,
        begin: Mapping[str, Mapping[int, int]],
        options: JobOptions = JobOptions(),
    ) -> None:
        run_id, shards, keep, start = options.run_id, options.shards, options.keep, options.start
        self.views = (views,) if isinstance(views, FeatureView) else tuple(views)
        self.view, self.store = self.views[0], str(store)
        self.live = LiveSettings(str(store), run_id, str(dimensions), shards=shards, keep=keep)
        self.journal = Journal(self.views, shards, keep)
        self.shards_of = [[Shard(view, number, shards) for number in range(shards)] for view in self.views]
        self.ledger = PendingTurns(self.views, str(store), run_id)
        self.assemblies = [Assembly(view, self.live) for view in self.views]
        for part in self.journal.parts:
            if part.keys.dimensions:
                part.dimensions = Assembly(part.view, self.live).dimensions  # of the journal's process
        self.sources = joined_sources(self.views)
        self.now = 0
        record_memory(self.views, str(store), run_id, NO_EPOCH, keep)
        start = start or find_recovery_point(self.views, str(store), begin)
        self.start = {
            name: {int(number): offset for number, offset in each.items()} for name, each in start.next.items()
        }
        for turn in restore_journal(self.journal, str(store), start, 0):
            self._pass_on(turn)
        if self.journal.answerable(0):
            self._pass_on(self.journal.turn([], 0))

    @property
    def shards(self) -> list[Shard]:
        """Those of the first view."""
        return self.shards_of[0]

    def take(self, messages: Sequence[Message]) -> None:
        """Decode messages, make a turn of them."""
        envelope = decode_messages(self.sources, messages)
        self.now = max(self.now, head_of(envelope)["arrived"])
        admitted, waiting = self.journal.admit(micro_batches_of(envelope), self.now)
        assert not waiting
        self._pass_on(self.journal.turn(admitted, self.now))

    def _pass_on(self, turn: Turn) -> None:
        self.ledger.take(turn.entry)
        for part in turn.views:
            answers = []
            for number, given in part.shards.items():
                answer = self.shards_of[part.view][number].apply(given)
                answers += [answer] if answer is not None else []
            if part.spine_rows is not None:
                assert part.spine_rows.shards == len(answers)
                self.ledger.take(self.assemblies[part.view].compute_features(part.spine_rows, answers))

    def commit(self) -> dict[str, Any]:
        return self.ledger.commit(turns).to_json() if (turns := self.ledger.whole()) else {}


def unread(messages: Iterable[Message], start: Mapping[str, Mapping[int, int]]) -> list[Message]:
    """What a consumer placed at `start` reads, of the topics that it reads."""
    mine = [each for each in messages if each.topic in start]
    return [each for each in mine if each.offset >= start[each.topic].get(each.partition, 0)]
