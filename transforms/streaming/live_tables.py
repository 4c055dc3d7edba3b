"""Tables of a live job: what arrived, what was answered, what was set aside; one commit of each per interval.

The order of commits is letters, sources, features.  Each carries the offsets up to which it is whole, so that after a
kill at any moment the job reads on from there, and skips what is already in: nothing is lost, nothing is there twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable
from deltalake.transaction import CommitProperties, Transaction

from schemas.errors import StoreError
from schemas.live import accepted, live_schema, repeats_by
from schemas.views import FeatureView
from transforms.records.frame_packets import Frames, head_of, unpack
from transforms.records.record_batches import batch
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS
from transforms.storage.delta_log import commit_at
from transforms.storage.delta_tables import (
    COMMIT_ATTEMPTS,
    CommittedMeanwhile,
    DataFile,
    add_action,
    commit_attempt,
    create_table,
    data_files,
    delta_schema,
    read_file,
    retry_commits,
    write_files,
)
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.replay import sources_of

COMMIT_KEY = "millrace_live"
# Dates of answers whose ids stay in memory.
DAYS_CACHED = 8


def read_answers(view: FeatureView, file: DataFile) -> pl.DataFrame:
    """A file of the live feature table; a column that came with a later Millrace is null in what an earlier one wrote."""
    schema = pl.DataFrame(pl.from_arrow(live_schema(view).empty_table())).schema
    rows = pl.DataFrame(pl.from_arrow(read_file(file)))
    return rows.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in rows.columns
    ).select(schema.names())


def application_of(name: str) -> str:
    """The application under which a live job commits to the table of a source, a view's answers or a model's predictions."""
    return f"live/{name}"


def last_commit_record(table: DeltaTable | None, app: str) -> dict[str, Any]:
    """What the newest commit of `app` said about itself: turn, offsets, clock…; empty if there is none.

    However many commits of others, such as a vacuum's, came after it.

    Raises:
        StoreError: its commit is no longer in the log.
    """
    if table is None or table.transaction_version(app) is None:
        return {}
    for version in range(table.version(), -1, -1):
        if (said := commit_at(table.table_uri, version).get(COMMIT_KEY)) is not None:
            return dict(json.loads(said))
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
    """Appends to one table, each row once however often it is tried.

    Args:
        uri: the table.
        schema: with `date`.
        app: name of its transactions.
        run_id: begins the names of its files.
    """

    uri: str
    schema: pa.Schema
    app: str
    run_id: str

    def append(
        self, frame: pl.DataFrame, turn: int, record: Mapping[str, Any], fresh: NewRows, always: bool = False
    ) -> int:
        """Commit the rows of `frame` that are not in the table; how many that were.  `always`: what is told, also without rows.

        Raises:
            StoreError: the store refuses.
        """

        def attempt(table: DeltaTable | None) -> int:
            rows = fresh(table, frame)
            if not len(rows) and not always:
                return 0
            files = write_files(batch(rows.sort("date"), self.schema), self.uri, self.run_id)
            if not self.commit(table, files, turn, record):
                raise CommittedMeanwhile(self.uri)
            return len(rows)

        rule = f"A commit succeeds within {COMMIT_ATTEMPTS} attempts"
        return retry_commits(
            self.uri, attempt, StoreError(rule, self.uri, "Is another live job writing the same table?")
        )

    def commit(
        self,
        table: DeltaTable | None,
        files: Sequence[tuple[DataFile, dict[str, str]]],
        turn: int,
        record: Mapping[str, Any],
    ) -> bool:
        """Commit files that were written; False: somebody else has committed since `table` was opened.

        Raises:
            StoreError: the store refuses.
        """
        before = table.transaction_version(self.app) if table is not None else None
        version = turn if before is None else max(turn, before + 1)
        properties = CommitProperties(
            custom_metadata={COMMIT_KEY: json.dumps(record, separators=(",", ":")), "run_id": self.run_id},
            app_transactions=[Transaction(self.app, version)],
        )
        schema, actions = delta_schema(self.schema), [add_action(self.uri, file, values) for file, values in files]
        fix = "Check access and free space; nothing is lost, the job goes on from its last commit"
        try:
            with commit_attempt(self.uri, table, fix):
                if table is None:
                    create_table(self.uri, schema, actions, ["date"], properties)
                    return True
                known = {field.name for field in table.schema().fields}
                if later := [field for field in schema.fields if field.name not in known]:
                    table.alter.add_columns(later)  # of a table that an earlier Millrace made; null in the rows it has
                table.create_write_transaction([*actions], "append", schema, ["date"], commit_properties=properties)
                return True
        except CommittedMeanwhile:
            return False


class NewRows:
    """Which rows a table does not hold yet."""

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class BeyondOffsets(NewRows):
    """Rows whose offset lies at or after those that the table's last commit says it is whole to."""

    app: str
    source: str | None
    names: tuple[str, str, str]

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        done = last_commit_record(table, self.app).get("next", {})
        source, partition, offset = self.names
        keep = np.ones(len(frame), np.bool_)
        for name, partitions in done.items():
            if self.source is not None and name != self.source:
                continue
            for number, until in partitions.items():
                hit = (frame[partition].to_numpy() == int(number)) & (frame[offset].to_numpy() < until)
                if self.source is None:
                    if int(number) < 0:  # letters about rows of files, see `NewDeadLetters`
                        continue
                    hit &= (frame[source] == name).to_numpy()
                keep &= ~hit
        return frame if keep.all() else frame.filter(pl.Series(keep))


@dataclasses.dataclass(frozen=True, eq=False)
class NewDeadLetters(NewRows):
    """Letters about rows beyond the offsets of the last commit; and about a dimension's, of partition −1, those that the
    table does not hold: every worker that reads a version tells of it."""

    app: str

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        frame = BeyondOffsets(self.app, None, ("source", "partition", "offset"))(table, frame)
        if not (frame["partition"] < 0).any():
            return frame
        what = ["source", "partition", "offset", "place", "field", "rule", "value"]
        about = frame.filter(partition=-1).unique(what, keep="first", maintain_order=True)
        for file in () if table is None else data_files(table):
            known = pl.DataFrame(pl.from_arrow(read_file(file, what)))
            about = about.join(known, on=what, how="anti", nulls_equal=True)
        return pl.concat([frame.filter(pl.col("partition") >= 0), about])


class UnknownIds(NewRows):
    """Rows whose `row_id` is in none of the table's files of the same dates.  Each file's ids are read once."""

    def __init__(self) -> None:
        self.known: dict[date, dict[str, npt.NDArray[np.int64]]] = {}

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        if table is None or not len(frame):
            return frame
        keep = np.ones(len(frame), np.bool_)
        ids, days = frame["row_id"].to_numpy(), frame["date"]
        for day in days.unique().to_list():
            for known in self._ids(table, day):
                keep &= ~((days == day).to_numpy() & np.isin(ids, known))
        return frame if keep.all() else frame.filter(pl.Series(keep))

    def _ids(self, table: DeltaTable, day: date) -> list[npt.NDArray[np.int64]]:
        known = self.known.setdefault(day, {})
        for file in data_files(table, day, day + timedelta(days=1)):
            if file.path not in known:
                known[file.path] = read_file(file, ["row_id"])["row_id"].to_numpy()
        while len(self.known) > DAYS_CACHED:
            del self.known[min(each for each in self.known if each != day)]
        return list(known.values())


class PendingTurns:
    """Turns in order, with their answers, until they are committed."""

    def __init__(self, view: FeatureView, store: str, run_id: str, table: bool = True) -> None:
        self.view, self.store, self.run_id, self.table = view, store, run_id, table
        self.entries: dict[int, bytes] = {}
        self.answers: dict[int, bytes] = {}
        self.committed = 0
        self._ids = UnknownIds()
        self.rows = {"events": 0, "answered": 0, "letters": 0}
        self.shards = {"rows": 0, "bytes": 0}  # that answered last hold

    def take(self, envelope: bytes) -> None:
        head = head_of(envelope)
        if head["turn"] > self.committed:
            (self.answers if head.get("kind") == "features" else self.entries)[head["turn"]] = envelope

    def whole(self) -> list[int]:
        """Turns that can be committed: the next ones, answered in full."""
        result = []
        number = max(self.committed + 1, max((head_of(each)["began"] for each in self.entries.values()), default=0))
        while number in self.entries and (not head_of(self.entries[number])["questions"] or number in self.answers):
            result.append(number)
            number += 1
        return result

    def commit(self, turns: Sequence[int]) -> dict[str, Any]:
        """Commit `turns` and forget them; what the tables were told."""
        rows: dict[str, list[pl.DataFrame]] = {}
        for number in turns:
            head, frames = unpack(self.entries[number])
            for name, frame in frames.items():
                rows.setdefault(name, []).append(frame)
            if number in self.answers:
                answer, frames = unpack(self.answers[number])
                rows.setdefault("answers", []).append(frames["rows"])
                if "letters" in frames:  # about dimensions
                    rows.setdefault("letters", []).append(frames["letters"])
                self.shards = answer["state"]
        record = {
            name: head[name]
            for name in (
                "turn",
                "last",
                "next",
                "clock",
                "pending",
                "oldest_pending",
                "horizon",
                "counts",
                "started",
                "beginnings",
            )
        }
        whole: Frames = {name: pl.concat(parts) for name, parts in rows.items()}
        if "letters" in whole:
            self.rows["letters"] += self._dead_letters(whole["letters"], record)
        for name in sources_of(self.view):
            if f"rows:{name}" in whole:
                self.rows["events"] += self._source(name, whole[f"rows:{name}"], record)
        if "answers" in whole and self.table:
            uri = features_live_uri(self.store, self.view.name, self.view.fingerprint)
            writer = Writer(uri, live_schema(self.view), application_of(self.view.name), self.run_id)
            self.rows["answered"] += writer.append(whole["answers"], record["turn"], record, self._ids)
        for number in turns:
            del self.entries[number]
            self.answers.pop(number, None)
        self.committed = turns[-1]
        return {**record, "state": {"journal": head["state"], "shards": self.shards}}

    def _dead_letters(self, frame: pl.DataFrame, record: Mapping[str, Any]) -> int:
        arrived = _time("arrived")
        frame = frame.with_columns(pl.lit(self.view.name).alias("view"), arrived, arrived.dt.date().alias("date"))
        writer = Writer(
            live_dead_letters_uri(self.store, self.view.name),
            LIVE_DEAD_LETTERS,
            application_of(f"{self.view.name}/letters"),
            self.run_id,
        )
        return writer.append(frame, record["turn"], record, NewDeadLetters(writer.app))

    def _source(self, name: str, frame: pl.DataFrame, record: Mapping[str, Any]) -> int:
        source = sources_of(self.view)[name]
        frame = frame.with_columns(_time("__arrived"), pl.col(str(source.time)).dt.date().alias("date"))
        frame = frame.with_columns(
            pl.lit(True if column == "__counted" else None).alias(column)
            for column in ("__counted", "__instead")
            if repeats_by(self.view, name) and column not in frame.columns
        )
        writer = Writer(
            source_uri(sources_root(self.store), name), accepted(self.view, name), application_of(name), self.run_id
        )
        fresh = BeyondOffsets(writer.app, name, ("", "__partition", "__offset"))
        return writer.append(frame, record["turn"], record, fresh)


def _time(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
