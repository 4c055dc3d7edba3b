"""Tables of a live job: accepted rows, feature rows and dead letters, with one commit of each per interval.

Dead letters are committed first, then sources, then feature rows.  Each commit records the offsets up to which its
table is complete.  So after a kill at any moment the job continues from there and skips rows that are already in a
table: no row is lost, and none is written twice.
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

from schemas.errors import StoreError
from schemas.live import accepted, live_schema, repeats_by
from schemas.views import FeatureView
from transforms.records.frame_packets import head_of, unpack
from transforms.records.record_batches import batch
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS
from transforms.storage.delta_log import commit_at
from transforms.storage.delta_tables import (
    COMMIT_ATTEMPTS,
    CommittedMeanwhile,
    DataFile,
    add_action,
    append_commit,
    commit_attempt,
    data_files,
    delta_schema,
    read_file,
    retry_commits,
    with_columns,
    write_files,
)
from transforms.storage.log_entries import LogEntry
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.replay import sources_of

COMMIT_KEY = "millrace_live"
# The entries of a turn's head that its commit records.
RECORDED = (
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
# The most dates of feature rows whose ids stay in memory.
DAYS_CACHED = 8


def read_answers(view: FeatureView, file: DataFile) -> pl.DataFrame:
    """A file of the live feature table; a column that its version of Millrace did not have is null."""
    schema = pl.DataFrame(pl.from_arrow(live_schema(view).empty_table())).schema
    rows = pl.DataFrame(pl.from_arrow(read_file(file)))
    return rows.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in rows.columns
    ).select(schema.names())


def application_of(name: str) -> str:
    """The application id of a live job's commits to the table of a source, a view or a model."""
    return f"live/{name}"


def last_commit_record(table: DeltaTable | None, app: str) -> dict[str, Any]:
    """The record of the newest commit of `app`: turn, offsets, completeness and so on; empty if there is none.

    Any number of other commits, as of a vacuum, may follow it.

    Raises:
        StoreError: the commit is no longer in the log.
    """
    if table is None or table.transaction_version(app) is None:
        return {}
    for version in range(table.version(), -1, -1):
        if (record := commit_at(table.table_uri, version).get(COMMIT_KEY)) is not None:
            return dict(json.loads(record))
    return {}


@dataclasses.dataclass(frozen=True, eq=False)
class Writer:
    """Appends rows to one table, each once, however often the append is retried.

    Args:
        uri: address of the table.
        schema: its columns, with `date`.
        app: application id of the commits.
        run_id: prefix of file names.
    """

    uri: str
    schema: pa.Schema
    app: str
    run_id: str

    def append(
        self, frame: pl.DataFrame, turn: int, record: Mapping[str, Any], fresh: NewRows, always: bool = False
    ) -> int:
        """Commits the rows of `frame` that are not in the table.

        Args:
            frame: rows with the columns of the schema.
            turn: number of the commit.
            record: what the commit records.
            fresh: finds the rows that are not in the table.
            always: whether to commit even without rows.

        Returns:
            Number of committed rows.

        Raises:
            StoreError: the store cannot be written.
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
        """Commits written files.  Returns False if another job has committed since `table` was opened.

        Raises:
            StoreError: the store cannot be written.
        """
        before = table.transaction_version(self.app) if table is not None else None
        version = turn if before is None else max(turn, before + 1)
        schema = delta_schema(self.schema)
        known = set() if table is None else {field.name for field in table.schema().fields}
        entry = LogEntry(
            partition_by=["date"],
            metadata={COMMIT_KEY: json.dumps(record, separators=(",", ":")), "run_id": self.run_id},
            application=(self.app, version),
            added=[add_action(self.uri, file, values) for file, values in files],
            schema=None if known >= {field.name for field in schema.fields} else with_columns(table, schema),
        )
        fix = "Check access and free space; no row is lost, the job continues from its last commit"
        try:
            with commit_attempt(self.uri, table, fix):
                append_commit(self.uri, table, entry)
                return True
        except CommittedMeanwhile:
            return False


class NewRows:
    """Finds the rows that a table does not have yet."""

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class BeyondOffsets(NewRows):
    """Rows whose offset is at or after the offsets of the table's last commit."""

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
                    if int(number) < 0:  # dead letters of rows of files, see `NewDeadLetters`
                        continue
                    hit &= (frame[source] == name).to_numpy()
                keep &= ~hit
        return frame if keep.all() else frame.filter(pl.Series(keep))


@dataclasses.dataclass(frozen=True, eq=False)
class NewDeadLetters(NewRows):
    """Dead letters beyond the offsets of the last commit, and those of dimensions that the table does not have.

    The latter are of partition −1, and every worker that reads a version of a dimension reports them.
    """

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


@dataclasses.dataclass(frozen=True, eq=False)
class _TurnRows:
    """Rows of some turns: dead letters, accepted rows by source, and feature rows."""

    dead_letters: list[pl.DataFrame] = dataclasses.field(default_factory=list)
    accepted: dict[str, list[pl.DataFrame]] = dataclasses.field(default_factory=dict)
    features: list[pl.DataFrame] = dataclasses.field(default_factory=list)


class PendingTurns:
    """Turns in order, with their feature rows, until they are committed."""

    def __init__(self, view: FeatureView, store: str, run_id: str, table: bool = True) -> None:
        self.view, self.store, self.run_id, self.table = view, store, run_id, table
        self.entries: dict[int, bytes] = {}
        self.features: dict[int, bytes] = {}
        self.committed = 0
        self._ids = UnknownIds()
        self.rows = {"events": 0, "answered": 0, "letters": 0}
        self.shards = {"rows": 0, "bytes": 0}  # the state of the shards at the last turn

    def take(self, envelope: bytes) -> None:
        head = head_of(envelope)
        if head["turn"] > self.committed:
            (self.features if head.get("kind") == "features" else self.entries)[head["turn"]] = envelope

    def whole(self) -> list[int]:
        """The next turns whose feature rows are complete: they can be committed."""
        result = []
        number = max(self.committed + 1, max((head_of(each)["began"] for each in self.entries.values()), default=0))
        while number in self.entries and (not head_of(self.entries[number])["questions"] or number in self.features):
            result.append(number)
            number += 1
        return result

    def commit(self, turns: Sequence[int]) -> dict[str, Any]:
        """Commits `turns` and drops them.  Returns the record of the commit."""
        head, rows = self._collect(turns)
        record = {name: head[name] for name in RECORDED}
        if rows.dead_letters:
            self.rows["letters"] += self._dead_letters(pl.concat(rows.dead_letters), record)
        for name in sources_of(self.view):
            if name in rows.accepted:
                self.rows["events"] += self._source(name, pl.concat(rows.accepted[name]), record)
        if rows.features and self.table:
            uri = features_live_uri(self.store, self.view.name, self.view.fingerprint)
            writer = Writer(uri, live_schema(self.view), application_of(self.view.name), self.run_id)
            self.rows["answered"] += writer.append(pl.concat(rows.features), record["turn"], record, self._ids)
        for number in turns:
            del self.entries[number]
            self.features.pop(number, None)
        self.committed = turns[-1]
        return {**record, "state": {"journal": head["state"], "shards": self.shards}}

    def _collect(self, turns: Sequence[int]) -> tuple[dict[str, Any], _TurnRows]:
        """The head of the last turn's entry, and the rows of all `turns`."""
        rows = _TurnRows()
        for number in turns:
            head, frames = unpack(self.entries[number])
            for name, frame in frames.items():
                if name == "letters":
                    rows.dead_letters.append(frame)
                else:
                    rows.accepted.setdefault(name.removeprefix("rows:"), []).append(frame)
            if number in self.features:
                features_head, frames = unpack(self.features[number])
                rows.features.append(frames["rows"])
                if "letters" in frames:  # dead letters of dimensions
                    rows.dead_letters.append(frames["letters"])
                self.shards = features_head["state"]
        return head, rows

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
