"""The messages between the steps of the live engine, and the only place that converts them to bytes.

    start, micro-batches → journal → ShardInput → shard → ShardFeatures ─┐
                              │    → ReadySpineRows ─────────────────────┴→ assembly → TurnFeatures ─┐
                              └────→ TurnEntry ──────────────────────────────────────────────────────┴→ commit

Steps that share a process pass these objects unchanged.  Between processes, and in checkpointed state, an object is
an envelope (see `frame_packets`).  Checkpoints hold envelopes of earlier versions, so the names in envelopes stay, even
if they are older than the names of the attributes.  Micro-batches are in `micro_batches`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import polars as pl

from transforms.records.frame_packets import Frames, Head, head_of, pack, unpack
from transforms.sources.dead_letters import MESSAGE_DEAD_LETTERS
from transforms.streaming.progress import CommitRecord, RecoveryPoint
from transforms.streaming.row_origin import RID
from transforms.streaming.time_buckets import StoreSize

# The names of a few frames: spine rows, rows of a table, and dead letters.
_SPINE_ROWS, _ROWS, _DEAD_LETTERS = "questions", "rows", "letters"
# The entry of a turn that has nothing to commit: it triggers a commit if the interval has passed.
TICK = pack({"kind": "tick", "turn": 0})


def start_envelope(start: RecoveryPoint) -> bytes:
    """The first message to the journal, which states where it continues."""
    return pack({"kind": "start", "index": None, "start": start.to_json()})


def start_of(envelope: bytes) -> RecoveryPoint | None:
    """The recovery point in an envelope for the journal; None if the envelope has micro-batches."""
    head = head_of(envelope)
    return RecoveryPoint.of_json(head["start"]) if head["kind"] == "start" else None


@dataclasses.dataclass(eq=False)
class ShardTables:
    """The rows that one turn sends to one shard.

    Args:
        rows: new events by source.
        replaced: by source, identities of events that are replaced by a repeat that was known earlier.
        old: by source, events of lifetime windows that the shard keeps only in compacted form.
        compacted: compacted events, by the number of their group.
        spine_rows: spine rows whose features are to be computed: `__position`, time and the keys of the groups.
    """

    rows: dict[str, pl.DataFrame] = dataclasses.field(default_factory=dict)
    replaced: dict[str, pl.Series] = dataclasses.field(default_factory=dict)
    old: dict[str, pl.DataFrame] = dataclasses.field(default_factory=dict)
    compacted: dict[int, pl.DataFrame] = dataclasses.field(default_factory=dict)
    spine_rows: pl.DataFrame | None = None

    @property
    def empty(self) -> bool:
        return not (self.rows or self.replaced or self.old or self.compacted) and self.spine_rows is None

    def to_frames(self) -> Frames:
        spine_rows = {} if self.spine_rows is None else {_SPINE_ROWS: self.spine_rows}
        return {
            **_prefixed("rows", self.rows),
            **_prefixed("retract", {name: each.to_frame(RID) for name, each in self.replaced.items()}),
            **_prefixed("old", self.old),
            **_prefixed("compacted", {str(group): each for group, each in self.compacted.items()}),
            **spine_rows,
        }

    @classmethod
    def of_frames(cls, frames: Frames) -> ShardTables:
        return cls(
            rows=_without_prefix("rows", frames),
            replaced={name: each[RID] for name, each in _without_prefix("retract", frames).items()},
            old=_without_prefix("old", frames),
            compacted={int(group): each for group, each in _without_prefix("compacted", frames).items()},
            spine_rows=frames.get(_SPINE_ROWS),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class ShardInput:
    """One turn for one shard.

    Args:
        turn: number of the turn.
        number: number of this input among those of the shard, which are applied in this order.
        horizon: no window that is still needed begins before this time (µs) minus its length.
        tables: the rows.
        held: for how long (µs) before the horizon the events of each source are held as they are.
        view: number of the view.
    """

    turn: int
    number: int
    horizon: int
    tables: ShardTables
    held: Mapping[str, int] = dataclasses.field(default_factory=dict)
    view: int = 0

    def to_envelope(self) -> bytes:
        head = {"turn": self.turn, "number": self.number, "horizon": self.horizon, **_of_view(self.view)}
        return pack({**head, "held": dict(self.held)} if self.held else head, self.tables.to_frames())

    @classmethod
    def of_envelope(cls, envelope: bytes) -> ShardInput:
        head, frames = unpack(envelope)
        tables = ShardTables.of_frames(frames)
        return cls(head["turn"], head["number"], head["horizon"], tables, head.get("held", {}), head.get("view", 0))


@dataclasses.dataclass(frozen=True, eq=False)
class ShardFeatures:
    """What one shard computed in one turn.

    Args:
        turn: number of the turn.
        shard: number of the shard.
        state: size of the shard's state.
        columns: for each number of a group, its features and the `__position` of their spine rows.
        view: number of the view.
    """

    turn: int
    shard: int
    state: StoreSize
    columns: Mapping[int, pl.DataFrame]
    view: int = 0

    def to_envelope(self) -> bytes:
        head = {"turn": self.turn, "shard": self.shard, "state": dataclasses.asdict(self.state), **_of_view(self.view)}
        return pack(head, {str(group): each for group, each in self.columns.items()})


@dataclasses.dataclass(frozen=True, eq=False)
class ReadySpineRows:
    """The spine rows of one turn whose sources are complete.

    Args:
        turn: number of the turn.
        shards: number of shards that compute features for them.
        cut: what the turn could see (see `row_origin.cut_of`).
        rows: the spine's columns, `row_id`, the origin, `__late` and `__cold`, in the order of `__position`.
        dimensions: by dimension, the version in which keys were looked up; None: no key comes from a dimension.
        view: number of the view.
    """

    turn: int
    shards: int
    cut: str
    rows: pl.DataFrame
    dimensions: Mapping[str, str] | None = None
    view: int = 0

    def to_envelope(self) -> bytes:
        versions = {} if self.dimensions is None else {"dimensions": dict(self.dimensions)}
        head = {"turn": self.turn, "parts": self.shards, "cut": self.cut, **_of_view(self.view), **versions}
        return pack(head, {_SPINE_ROWS: self.rows})


def assembly_input_of(envelope: bytes) -> ReadySpineRows | ShardFeatures:
    """The content of an envelope for the assembly."""
    head, frames = unpack(envelope)
    if "parts" in head:
        rows, view = frames[_SPINE_ROWS], head.get("view", 0)
        return ReadySpineRows(head["turn"], head["parts"], head["cut"], rows, head.get("dimensions"), view)
    columns = {int(group): each for group, each in frames.items()}
    return ShardFeatures(head["turn"], head["shard"], StoreSize(**head["state"]), columns, head.get("view", 0))


@dataclasses.dataclass(frozen=True, eq=False)
class TurnEntry:
    """What one turn accepted, for the tables.

    Args:
        record: the state of the job after this turn, for a commit.
        began: number of the first turn of the launch that made it.
        spine_rows: by number of a view, how many of its spine rows the turn computes the features of, if any.
        state: size of the journal's state.
        accepted: accepted rows by source.
        unreadable: dead letters of every view, with the columns `MESSAGE_DEAD_LETTERS`.
        dead_letters: by number of a view, its own ones, if any.
    """

    record: CommitRecord
    began: int
    spine_rows: Mapping[int, int]
    state: StoreSize
    accepted: Mapping[str, pl.DataFrame]
    unreadable: pl.DataFrame
    dead_letters: Mapping[int, pl.DataFrame] = dataclasses.field(default_factory=dict)

    @property
    def turn(self) -> int:
        return self.record.turn

    def to_envelope(self) -> bytes:
        head = {
            **self.record.to_json(),
            "began": self.began,
            "questions": {str(view): number for view, number in self.spine_rows.items()},
            "letters": len(self.unreadable) + sum(map(len, self.dead_letters.values())),
            "state": dataclasses.asdict(self.state),
        }
        own = _prefixed(_DEAD_LETTERS, {str(view): each for view, each in self.dead_letters.items()})
        return pack(head, {**_prefixed("rows", self.accepted), **_dead_letter_frames(self.unreadable), **own})


@dataclasses.dataclass(frozen=True, eq=False)
class TurnFeatures:
    """The feature rows of one turn.

    Args:
        turn: number of the turn.
        state: size of the state of the shards that computed them.
        rows: with the columns of `schemas.live.live_schema`.
        dead_letters: about dimensions, with the columns `MESSAGE_DEAD_LETTERS`.
        view: number of the view.
    """

    turn: int
    state: StoreSize
    rows: pl.DataFrame
    dead_letters: pl.DataFrame
    view: int = 0

    def to_envelope(self) -> bytes:
        state, letters = dataclasses.asdict(self.state), len(self.dead_letters)
        head = {"kind": "features", "turn": self.turn, "state": state, "letters": letters, **_of_view(self.view)}
        return pack(head, {_ROWS: self.rows, **_dead_letter_frames(self.dead_letters)})


def commit_input_of(envelope: bytes) -> TurnEntry | TurnFeatures | None:
    """The content of an envelope for the commits; None for `TICK`."""
    head, frames = unpack(envelope)
    kind = head.get("kind")
    if kind == "tick":
        return None
    dead_letters = frames.get(_DEAD_LETTERS, pl.DataFrame(schema=MESSAGE_DEAD_LETTERS))
    if kind == "features":
        return TurnFeatures(head["turn"], StoreSize(**head["state"]), frames[_ROWS], dead_letters, head.get("view", 0))
    spine_rows = head["questions"]
    if isinstance(spine_rows, int):  # an earlier version served one view
        spine_rows = {"0": spine_rows}
    return TurnEntry(
        CommitRecord.of_json(head),
        head["began"],
        {int(view): number for view, number in spine_rows.items()},
        StoreSize(**head["state"]),
        _without_prefix("rows", frames),
        dead_letters,
        {int(view): each for view, each in _without_prefix(_DEAD_LETTERS, frames).items()},
    )


def has_dead_letters(envelope: bytes) -> bool:
    """Whether an envelope for the commits has dead letters.  Its frames are not decoded."""
    return bool(head_of(envelope).get("letters"))


def _of_view(view: int) -> Head:
    """An entry of a head; none for the first view, which is the only one in envelopes of earlier versions."""
    return {"view": view} if view else {}


def _prefixed(prefix: str, frames: Mapping[str, pl.DataFrame]) -> Frames:
    return {f"{prefix}:{name}": each for name, each in frames.items()}


def _without_prefix(prefix: str, frames: Frames) -> Frames:
    start = f"{prefix}:"
    return {name.removeprefix(start): each for name, each in frames.items() if name.startswith(start)}


def _dead_letter_frames(dead_letters: pl.DataFrame) -> Frames:
    return {_DEAD_LETTERS: dead_letters} if len(dead_letters) else {}
