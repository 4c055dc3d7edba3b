"""Spine rows that wait until their sources are complete, and recently computed ones, so that each is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import polars as pl

from schemas.views import FeatureView
from transforms.features.packed_events import Keys
from transforms.records.columns import moments_of, with_series
from transforms.records.row_hashing import key_hashes, row_ids
from transforms.records.times import ALWAYS, FOREVER
from transforms.sources.dead_letters import message_dead_letters
from transforms.streaming.row_origin import ORIGIN_COLUMNS, digest
from transforms.streaming.time_buckets import MINUTE, TimeBuckets

# Up to this many new spine rows are looked up one by one.
FEW = 256
# The rules by which a spine row that keeps the contract may be rejected.
TOO_LATE = "a question comes no later than the spine's lateness and --keep allow"
CONFLICTING = "one key asks one question at one time (the smallest, or the answered one, was kept)"
# Names of the two stores in checkpoints.
PENDING, KNOWN_SPINE_ROWS = "?pending", "?asked"


class PendingSpineRows:
    """The spine rows of a live job.

    Args:
        view: the view.
        keep: for how long (µs) after the watermark of the spine features are still computed for late rows.
        count: called with (source, what, number) of rows that are counted.
    """

    def __init__(self, view: FeatureView, keep: int, count: Callable[[str, str, int], None]) -> None:
        self.view, self.count = view, count
        self.pending = TimeBuckets(view.time, MINUTE * 10)
        self.known = TimeBuckets("time", max(keep // 4, MINUTE))

    def __len__(self) -> int:
        return len(self.pending)

    @property
    def stores(self) -> Mapping[str, TimeBuckets]:
        return {PENDING: self.pending, KNOWN_SPINE_ROWS: self.known}

    def add(self, rows: pl.DataFrame, watermark: int, since: int) -> list[pl.DataFrame]:
        """Adds new spine rows.

        Args:
            rows: the spine's columns and the origin.
            watermark: the watermark of the spine (µs) before these rows; ALWAYS if there is none yet.
            since: rows before it (µs) are too late to be computed; ALWAYS: none is.

        Returns:
            Dead letters for the rows that are too late or contradict an earlier one.
        """
        view, spine = self.view, self.view.spine.name
        rows = identified(view, rows)
        dead_letters = []
        if since > ALWAYS:
            early = moments_of(rows, view.time) < since
            if early.any():
                old = rows.filter(pl.Series(early))
                moment = pl.col(view.time).cast(pl.String)
                dead_letters.append(message_dead_letters(spine, old, view.time, TOO_LATE, moment))
                self.count(spine, "too_late", len(old))
                rows = rows.filter(pl.Series(~early))
        rows = with_series(rows, [pl.Series("__late", moments_of(rows, view.time) < watermark)])
        if not self._alone(rows):
            before = self.known.take(("row_id",), key_hashes(rows, ["row_id"]), ALWAYS, FOREVER)
            if before or rows["row_id"].n_unique() < len(rows):
                rows, conflicts = self._distinct(rows, before)
                dead_letters += conflicts
        if late := int(rows["__late"].sum()):
            self.count(spine, "late_questions", late)
        self.restore(rows, rows)
        return dead_letters

    def restore(self, pending: pl.DataFrame, known: pl.DataFrame) -> None:
        """Adds spine rows that are known to be distinct: the pending ones, and all known ones."""
        self.pending.add(pending)
        moments = pl.Series("time", moments_of(known, self.view.time), pl.Int64)
        self.known.add(pl.DataFrame([known["row_id"], moments, known["__digest"]]))

    def take_until(self, bound: int) -> pl.DataFrame | None:
        """Removes the spine rows at or before `bound` µs.  Returns them in order of time, or None."""
        taken = self.pending.take_before(bound)
        if not taken:
            return None
        ready = pl.concat(taken).sort(self.view.time, "row_id")
        self.count(self.view.spine.name, "answered", len(ready))
        return ready

    def evict(self, bound: int) -> None:
        """Drops computed spine rows from before `bound` µs: if such a row is repeated, the repeat is too late
        anyway."""
        self.known.evict(bound)

    def oldest(self) -> int | None:
        """Time of the oldest spine row that waits, µs."""
        return min((int(moments_of(frame, self.view.time).min()) for frame in self.pending.all()), default=None)

    def _alone(self, rows: pl.DataFrame) -> bool:
        """Whether no row has the id of another one, new or known."""
        if len(rows) > FEW:
            return False
        ids = Keys(rows, [("row_id",)]).distinct(("row_id",))
        return len(ids.keys) == len(rows) and not self.known.holds(("row_id",), ids)

    def _distinct(self, rows: pl.DataFrame, before: list[pl.DataFrame]) -> tuple[pl.DataFrame, list[pl.DataFrame]]:
        """Compares new spine rows with each other and with known ones that have the same ids.

        Identical rows count once.  Of different rows with the same id, the smallest stays, unless one has been
        computed.

        Returns:
            The rows to add, some of which were pending; and dead letters for the rows that differ.
        """
        known = (
            pl.concat(before).join(rows, on="row_id", how="semi")
            if before
            else pl.DataFrame(schema={"row_id": pl.Int64, "time": pl.Int64, "__digest": pl.UInt64})
        )
        pending = self.pending.drop("row_id", known["row_id"].to_numpy()) if len(known) else None
        computed = known if pending is None else known.join(pending, on="row_id", how="anti")
        again = rows.join(computed, on="row_id", how="semi")
        rest = rows.join(computed, on="row_id", how="anti")
        if pending is not None:
            rest = pl.concat([pending.select(rest.columns), rest])
        order = ["row_id", *self.view.spine.schema, *ORIGIN_COLUMNS]
        kept = rest.sort(order).unique("row_id", keep="first", maintain_order=True)
        lost = rest.join(kept, on=["row_id", *ORIGIN_COLUMNS], how="anti")
        same = pl.concat(
            [
                lost.join(kept, on=["row_id", "__digest"], how="semi"),
                again.join(computed, on=["row_id", "__digest"], how="semi"),
            ]
        )
        self.count(self.view.spine.name, "repeated", len(same))
        conflicts = pl.concat([lost, again]).join(same, on=["row_id", *ORIGIN_COLUMNS], how="anti")
        self.known.drop("row_id", kept["row_id"].to_numpy())
        return kept, [self._conflicting(conflicts)] if len(conflicts) else []

    def _conflicting(self, rows: pl.DataFrame) -> pl.DataFrame:
        view = self.view
        self.count(view.spine.name, "conflicting", len(rows))
        key = pl.concat_str([pl.col(name).cast(pl.String) for name in view.key], separator=", ")
        return message_dead_letters(view.spine.name, rows, ", ".join(view.key), CONFLICTING, key)


def about_spine_rows() -> pl.Expr:
    """Whether a dead letter is of a spine row that kept the contract, and was rejected then."""
    rule = pl.col("rule").str
    return rule.starts_with(TOO_LATE) | rule.starts_with("one key asks one question")  # as earlier versions said it


def identified(view: FeatureView, rows: pl.DataFrame) -> pl.DataFrame:
    """Spine rows with `row_id` and the digest of their content."""
    return with_series(
        rows,
        [row_ids(view.name, [rows[name] for name in (*view.key, view.time)]), digest(rows, list(view.spine.schema))],
    )
