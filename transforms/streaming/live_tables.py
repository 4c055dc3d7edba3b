"""Tables of a live job: accepted rows, feature rows and dead letters, with one commit of each per interval.

Dead letters are committed first, then sources, then feature rows.  Each commit records the offsets up to which its
table is complete.  So after a kill at any moment the job continues from there and skips rows that are already in a
table: no row is lost, and none is written twice.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta

import numpy as np
import polars as pl
import pyarrow as pa
from deltalake import DeltaTable

from schemas.errors import ConflictError, StoreError
from schemas.live import accepted_rows, joined_sources, live_schema, live_sources, repeats_by
from schemas.views import FeatureView
from transforms.records.arrays import Ints
from transforms.records.frame_packets import Head
from transforms.records.record_batches import batch
from transforms.sources.dead_letters import VIEW_DEAD_LETTERS
from transforms.storage.delta_log import commit_at
from transforms.storage.delta_tables import (
    COMMIT_ATTEMPTS,
    CommittedMeanwhile,
    DataFile,
    add_actions,
    append_commit,
    commit_attempt,
    data_files,
    delta_schema,
    open_table,
    read_file,
    retry_commits,
    schema_with_columns,
    table_root,
    write_files,
)
from transforms.storage.log_entries import LogEntry
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.storage.stored_json import explain_damage, parse_object
from transforms.streaming.progress import NO_EPOCH, CommitRecord, Epoch
from transforms.streaming.step_messages import TurnEntry, TurnFeatures
from transforms.streaming.time_buckets import StoreSize

COMMIT_KEY = "millrace_live"
# The most dates of feature rows whose ids stay in memory.
DAYS_CACHED = 8


def read_feature_rows(view: FeatureView, file: DataFile) -> pl.DataFrame:
    """A file of the live feature table; a column that its version of Millrace did not have is null."""
    schema = pl.DataFrame(pl.from_arrow(live_schema(view).empty_table())).schema
    rows = pl.DataFrame(pl.from_arrow(read_file(file)))
    return rows.with_columns(
        pl.lit(None, dtype).alias(name) for name, dtype in schema.items() if name not in rows.columns
    ).select(schema.names())


def application_of(name: str) -> str:
    """The application id of a live job's commits to the table of a source, a view or a model."""
    return f"live/{name}"


def is_of_live_job(store: str, name: str) -> bool:
    """Whether a live job has committed to the table of this source ("sources/orders")."""
    source = name.split("/")[-1]
    table = open_table(source_uri(sources_root(store), source))
    return table is not None and table.transaction_version(application_of(source)) is not None


def last_commit_record(table: DeltaTable | None, app: str) -> Head:
    """The record of the newest commit of `app`: turn, offsets, completeness and so on; empty if there is none.

    Any number of other commits, such as those of a vacuum, may follow it.

    Raises:
        StoreError: the commit is no longer in the log.
    """
    if table is None or table.transaction_version(app) is None:
        return {}
    for version in range(table.version(), -1, -1):
        if (record := commit_at(table.table_uri, version).get(COMMIT_KEY)) is not None:
            with explain_damage("A live table's log must be readable", table_root(table)):
                return parse_object(record)
    return {}


def source_record(store: str, name: str) -> CommitRecord | None:
    """The record of the newest commit of a source's table; None if there is none."""
    return _record(open_table(source_uri(sources_root(store), name)), name)


def features_table(view: FeatureView, store: str) -> DeltaTable | None:
    """The live feature table of a view; None if there is none."""
    return open_table(features_live_uri(store, view.name, view.fingerprint))


def read_dead_letters(file: DataFile) -> pl.DataFrame:
    """A file of a live job's dead letters; a column that its version of Millrace did not have is null."""
    names = VIEW_DEAD_LETTERS.names
    rows = pl.DataFrame(pl.from_arrow(read_file(file, names, optional=("fingerprint",))))
    if "fingerprint" not in rows.columns:
        rows = rows.with_columns(pl.lit(None, pl.String).alias("fingerprint"))
    return rows.select(names)


def of_version(view: FeatureView) -> pl.Expr:
    """Whether a dead letter of a view is of this version: its own, or of all versions."""
    return pl.col("fingerprint").is_null() | (pl.col("fingerprint") == view.fingerprint)


def features_record(view: FeatureView, store: str) -> CommitRecord | None:
    """The record of the newest commit of the live feature table; None if there is none."""
    return _record(features_table(view, store), view.name)


def _record(table: DeltaTable | None, name: str) -> CommitRecord | None:
    record = last_commit_record(table, application_of(name))
    return CommitRecord.of_json(record) if record else None


@dataclasses.dataclass(frozen=True, eq=False)
class TableWriter:
    """Appends rows to one table, each once, however often the append is retried.

    Args:
        uri: address of the table.
        schema: its columns, with `date`.
        app: application id of the commits.
        run_id: prefix of file names.
        epoch: epoch of the launch that appends; without a number it is never refused.
    """

    uri: str
    schema: pa.Schema
    app: str
    run_id: str
    epoch: Epoch = NO_EPOCH

    def append(self, frame: pl.DataFrame, turn: int, record: Head, fresh: NewRows, always: bool = False) -> int:
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
            ConflictError: a job that started later writes the table.
            StoreError: the store cannot be written.
        """

        def attempt(table: DeltaTable | None) -> int:
            self._check_epoch(table)
            rows = fresh(table, frame)
            if not len(rows) and not always:
                return 0
            files = write_files(batch(rows.sort("date"), self.schema), self.uri, self.run_id)
            if not self.commit(table, files, turn, record):
                raise CommittedMeanwhile(self.uri)
            return len(rows)

        rule = f"A commit must succeed within {COMMIT_ATTEMPTS} attempts"
        return retry_commits(
            self.uri,
            attempt,
            StoreError(rule, f"it did not on {self.uri}", "Is another live job writing the same table?"),
        )

    def commit(
        self,
        table: DeltaTable | None,
        files: Sequence[tuple[DataFile, dict[str, str]]],
        turn: int,
        record: Head,
    ) -> bool:
        """Commits written files.  Returns False if another job has committed since `table` was opened.

        Raises:
            StoreError: the store cannot be written.
        """
        before = table.transaction_version(self.app) if table is not None else None
        version = turn if before is None else max(turn, before + 1)
        record = {**record, **self.epoch.to_json()}
        schema = delta_schema(self.schema)
        known = set() if table is None else {field.name for field in table.schema().fields}
        entry = LogEntry(
            partition_by=["date"],
            metadata={COMMIT_KEY: json.dumps(record, separators=(",", ":")), "run_id": self.run_id},
            application=(self.app, version),
            added=add_actions(self.uri, files),
            schema=None if known >= {field.name for field in schema.fields} else schema_with_columns(table, schema),
        )
        fix = "Check access and free space; no row is lost, the job continues from its last commit"
        try:
            with commit_attempt(self.uri, table, fix):
                append_commit(self.uri, table, entry)
                return True
        except CommittedMeanwhile:
            return False

    def _check_epoch(self, table: DeltaTable | None) -> None:
        mine = self.epoch
        if not mine.number:
            return
        theirs = Epoch.of_record(last_commit_record(table, self.app))
        if theirs.number > mine.number or (theirs.number == mine.number and theirs.launch != mine.launch):
            raise ConflictError(
                "Only the job that was started last may write the tables of a live store",
                f"{self.uri} belongs to launch {theirs.number} ({theirs.launch}), "
                f"and this is launch {mine.number} ({mine.launch})",
                "This job has stopped; the other one continues from the last commit: nothing is lost or written twice",
            )


class NewRows:
    """Finds the rows that a table does not have yet."""

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class BeyondOffsets(NewRows):
    """Finds rows whose offset is at or after the offsets of the table's last commit."""

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
    """Finds dead letters beyond the offsets of the last commit, and those of dimensions that the table does not have.

    The latter have partition −1, and every worker that reads a version of a dimension reports them.
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
    """Finds rows whose `row_id` is in none of the table's files of the same dates.  The ids of each file are read
    once."""

    def __init__(self) -> None:
        self.known: dict[date, dict[str, Ints]] = {}

    def __call__(self, table: DeltaTable | None, frame: pl.DataFrame) -> pl.DataFrame:
        if table is None or not len(frame):
            return frame
        keep = np.ones(len(frame), np.bool_)
        ids, days = frame["row_id"].to_numpy(), frame["date"]
        for day in days.unique().to_list():
            for known in self._ids(table, day):
                keep &= ~((days == day).to_numpy() & np.isin(ids, known))
        return frame if keep.all() else frame.filter(pl.Series(keep))

    def _ids(self, table: DeltaTable, day: date) -> list[Ints]:
        known = self.known.setdefault(day, {})
        for file in data_files(table, day, day + timedelta(days=1)):
            if file.path not in known:
                known[file.path] = read_file(file, ["row_id"])["row_id"].to_numpy()
        while len(self.known) > DAYS_CACHED:
            del self.known[min(each for each in self.known if each != day)]
        return list(known.values())


@dataclasses.dataclass(frozen=True, eq=False)
class CommitStatus:
    """A commit, for `status.json`.

    Args:
        record: what the commit records.
        journal, shards: size of their state.
        rows: number of rows that the launch has committed, by table.
    """

    record: CommitRecord
    journal: StoreSize
    shards: StoreSize
    rows: Mapping[str, int]

    def to_json(self) -> Head:
        state = {"journal": dataclasses.asdict(self.journal), "shards": dataclasses.asdict(self.shards)}
        return {**self.record.to_json(), "state": state, "rows": dict(self.rows)}


@dataclasses.dataclass(frozen=True, eq=False)
class Writers:
    """The writers of a features job.

    Args:
        dead_letters: by name of a view.
        sources: by source, of its accepted rows.
        features: of feature rows, in the order of the views.
    """

    dead_letters: Mapping[str, TableWriter]
    sources: Mapping[str, TableWriter]
    features: tuple[TableWriter, ...]

    def __iter__(self) -> Iterator[TableWriter]:
        yield from self.dead_letters.values()
        yield from self.sources.values()
        yield from self.features


def writers_of(views: Sequence[FeatureView], store: str, run_id: str, epoch: Epoch) -> Writers:
    """The writers of a launch of a job.

    Args:
        views: its views.
        store: the folder of the tables.
        run_id: prefix of file names.
        epoch: of the launch.
    """

    def writer(uri: str, schema: pa.Schema, app: str) -> TableWriter:
        return TableWriter(uri, schema, application_of(app), run_id, epoch)

    def features(view: FeatureView) -> TableWriter:
        return writer(features_live_uri(store, view.name, view.fingerprint), live_schema(view), view.name)

    names, root = dict.fromkeys(view.name for view in views), sources_root(store)
    return Writers(
        {name: writer(live_dead_letters_uri(store, name), VIEW_DEAD_LETTERS, f"{name}/letters") for name in names},
        {
            name: writer(
                source_uri(root, name), accepted_rows(source, any(repeats_by(view, name) for view in views)), name
            )
            for name, source in joined_sources(views).items()
        },
        tuple(features(view) for view in views),
    )


class PendingTurns:
    """Turns in order, with their feature rows, until they are committed.

    Args:
        views: the views of the job.
        store: the folder of the tables.
        run_id: prefix of file names.
        table: whether feature rows are written to the tables.
        epoch: of the launch.
    """

    def __init__(
        self, views: Sequence[FeatureView], store: str, run_id: str, table: bool = True, epoch: Epoch = NO_EPOCH
    ) -> None:
        self.views, self.table, self.writers = tuple(views), table, writers_of(views, store, run_id, epoch)
        self.sources = joined_sources(self.views)
        self.entries: dict[int, TurnEntry] = {}
        self.features: dict[tuple[int, int], TurnFeatures] = {}
        self.committed = 0
        self._ids = [UnknownIds() for _ in self.views]
        self.rows = {"events": 0, "answered": 0, "letters": 0}
        self._shards = [StoreSize() for _ in self.views]  # of the shards at the last turn

    def take(self, part: TurnEntry | TurnFeatures | None) -> None:
        """Adds a part of a turn, unless the turn is committed already; None is ignored."""
        if part is None or part.turn <= self.committed:
            return
        if isinstance(part, TurnFeatures):
            self.features[part.turn, part.view] = part
        else:
            self.entries[part.turn] = part

    def envelopes(self) -> list[bytes]:
        """Everything that is not committed."""
        entries = [each.to_envelope() for each in self.entries.values()]
        return entries + [each.to_envelope() for each in self.features.values()]

    def whole(self) -> list[int]:
        """The next turns whose feature rows are complete: they can be committed."""
        result = []
        number = max(self.committed + 1, max((each.began for each in self.entries.values()), default=0))
        while number in self.entries and all(
            (number, view) in self.features for view in self.entries[number].spine_rows
        ):
            result.append(number)
            number += 1
        return result

    def commit(self, turns: Sequence[int]) -> CommitStatus:
        """Commits `turns` and drops them."""
        entries = [self.entries[number] for number in turns]
        record = entries[-1].record
        features = [
            [self.features[number, view] for number in turns if (number, view) in self.features]
            for view in range(len(self.views))
        ]
        for name, writer in self.writers.dead_letters.items():
            self.rows["letters"] += self._dead_letters(name, writer, entries, features, record)
        for name in self.sources:
            if accepted := [each.accepted[name] for each in entries if name in each.accepted]:
                self.rows["events"] += self._source(name, pl.concat(accepted), record)
        for view, some in enumerate(features):
            if some:
                self._shards[view] = some[-1].state
            if some and self.table:
                rows = pl.concat([each.rows for each in some])
                writer = self.writers.features[view]
                self.rows["answered"] += writer.append(rows, record.turn, record.to_json(), self._ids[view])
        for number in turns:
            del self.entries[number]
            for view in range(len(self.views)):
                self.features.pop((number, view), None)
        self.committed = turns[-1]
        return CommitStatus(record, entries[-1].state, sum(self._shards, StoreSize()), dict(self.rows))

    def _dead_letters(
        self,
        name: str,
        writer: TableWriter,
        entries: Sequence[TurnEntry],
        features: Sequence[Sequence[TurnFeatures]],
        record: CommitRecord,
    ) -> int:
        """Commits the dead letters of the versions of a view: unreadable ones once, and their own ones of each."""
        versions = {number: view for number, view in enumerate(self.views) if view.name == name}
        sources = {source for view in versions.values() for source in live_sources(view)}
        parts = [
            each.unreadable.filter(pl.col("source").is_in(list(sources))).with_columns(_fingerprint(None))
            for each in entries
            if len(each.unreadable)
        ]
        for number, view in versions.items():
            own = [each.dead_letters[number] for each in entries if number in each.dead_letters]
            own += [each.dead_letters for each in features[number]]
            parts += [each.with_columns(_fingerprint(view)) for each in own if len(each)]
        if not any(map(len, parts)):
            return 0
        arrived = _time("arrived")
        frame = pl.concat(parts).with_columns(pl.lit(name).alias("view"), arrived, arrived.dt.date().alias("date"))
        return writer.append(frame, record.turn, record.to_json(), NewDeadLetters(writer.app))

    def _source(self, name: str, frame: pl.DataFrame, record: CommitRecord) -> int:
        time = str(self.sources[name].time)
        frame = frame.with_columns(_time("__arrived"), pl.col(time).dt.date().alias("date"))
        writer = self.writers.sources[name]
        fresh = BeyondOffsets(writer.app, name, ("", "__partition", "__offset"))
        return writer.append(frame, record.turn, record.to_json(), fresh)


def _fingerprint(view: FeatureView | None) -> pl.Expr:
    return pl.lit(None if view is None else view.fingerprint, pl.String).alias("fingerprint")


def _time(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
