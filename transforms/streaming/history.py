"""History of a live job: rows from before its start, which are accepted once, before the first turn.

The rows of a source that were known before its start S are checked and counted as batch does.  They are written to the
live store's own table under partition −1, in one commit per source.  Recovery, parity and trace read them there like
all others.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
from collections.abc import Mapping, Sequence

import polars as pl
import pyarrow as pa

from schemas.errors import DataError, DefinitionError, StoreError
from schemas.live import accepted_rows, joined_sources, repeats_by
from schemas.sources import Source
from schemas.views import FeatureView
from transforms.records.record_batches import batch
from transforms.records.times import ALWAYS, FOREVER, day_of, now_us
from transforms.sources.dead_letters import VIEW_DEAD_LETTERS
from transforms.sources.inventory import HAS_FILES, source_files
from transforms.sources.listing import require_unchanged
from transforms.storage.delta_tables import DataFile, data_files, open_table, read_file, write_files
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY_PARTITION, Beginning, Beginnings, LoadedHistory
from transforms.streaming.completeness import SourceCompleteness
from transforms.streaming.fates import RepeatMemory, WindowReach
from transforms.streaming.history_files import HistoryFiles
from transforms.streaming.live_tables import (
    NewDeadLetters,
    TableWriter,
    application_of,
    last_commit_record,
    source_record,
)
from transforms.streaming.progress import CommitRecord

log = logging.getLogger("millrace.live")
# By source, the record of the newest commit of its table; None if there is no commit.
Records = Mapping[str, CommitRecord | None]


@dataclasses.dataclass(frozen=True, eq=False)
class Handover:
    """The history of a job, and how it gets into the store.

    Args:
        views: the views of the job, the newest definition first.
        store: the folder of the live job's tables.
        root: the folder of the sources' files; None: there are none.
        start: the job's --start, µs.
        keep: for how long (µs) after the watermark of the spine features are still computed for late spine rows.
        without: whether the job starts without history.
        sent: the time (µs) from which on the job is sent every row (ALWAYS: all rows); None: the rows of a topic.
        run_id: prefix of file names.
    """

    views: Sequence[FeatureView]
    store: str
    root: str | None
    start: int | None
    keep: int
    without: bool = False
    sent: int | None = None
    run_id: str = "history"

    @functools.cached_property
    def sources(self) -> dict[str, Source]:
        """The sources of the views."""
        return joined_sources(self.views)

    @functools.cached_property
    def events(self) -> list[str]:
        """The sources that some view reads events of."""
        return [name for name in self.sources if any(name in view.events for view in self.views)]

    def _repeats(self, name: str) -> bool:
        return any(repeats_by(view, name) for view in self.views)

    def check(self) -> None:
        """Checks that the job can begin.  Nothing is written.

        Raises:
            DefinitionError: a source has no history, and the job does not start without.
            StoreError: the table of a source in the live store was not written by a live job.
        """
        fresh = [name for name in self.sources if checked_record(self.store, name) is None]
        if self.without or self.sent == ALWAYS:
            return
        missing = [name for name in self.events if name in fresh and not self._present(name)]
        if missing:
            where = (
                "to read (--sources is left out, or is the live store itself)"
                if self.root is None
                else f"under {self.root}"
            )
            raise DefinitionError(
                f"View {self._reader(missing[0])!r}: a live job must have history, or be started without",
                f"there are no files of {', '.join(map(repr, missing))} {where}",
                "Name the folder of the sources' files or Delta tables with --sources, or add --without_history: "
                "feature rows are then marked __cold until every window has filled",
            )

    def _reader(self, name: str) -> str:
        """The name of a view that reads events of a source."""
        return next(view.name for view in self.views if name in view.events)

    def beginnings(self) -> Beginnings:
        """Accepts the rows of history that the job needs and the store does not have.

        Returns:
            The times from which the store has the rows of each source.

        Raises:
            DefinitionError, StoreError: see `check`.
        """
        self.check()
        records = {name: checked_record(self.store, name) for name in self.sources}
        known = recorded_beginnings(self.sources, self.store, records)
        fresh = [name for name in records if name not in known.sources]
        if self.without or self.sent == ALWAYS:
            start = ALWAYS if self.sent == ALWAYS else self.start
            since = FOREVER if self.sent is None else self.sent
            if self.sent == ALWAYS:
                fresh = [name for name in records if known.of(name).start is None]
            sources = {**known.sources, **dict.fromkeys(fresh, Beginning(start, since))}
            return dataclasses.replace(known, sources=sources)
        root = self.root
        given = (
            {}
            if root is None
            else {name: HistoryFiles.of(self.views, root, name) for name in records if self._present(name)}
        )
        return self._load(known, records, given, fresh)

    def _present(self, name: str) -> bool:
        """Whether a source has files."""
        if self.root is None:
            return False
        try:
            source_files(self.root, self.sources[name])
        except DataError as error:
            if error.rule.endswith(HAS_FILES):
                return False
            raise
        return True

    def _load(
        self, known: Beginnings, records: Records, given: Mapping[str, HistoryFiles], fresh: Sequence[str]
    ) -> Beginnings:
        """Accepts the history of sources that the store has no rows of, and earlier history that a view now needs.

        Args:
            known: the beginnings of the sources of which the store has rows.
            records: the records by source.
            given: the files by source.
            fresh: sources of which the store has no rows.
        """
        starts = {name: min(files.end, FOREVER if self.start is None else self.start) for name, files in given.items()}
        horizon = known.horizon if known.sources else self._first_horizon(starts)
        since = min(self._horizon_now(view, records[view.spine.name], horizon) for view in self.views)
        found = dataclasses.replace(known, horizon=horizon)
        for name in fresh:
            if name not in given:
                continue
            low = self._low(name, since, None) if name in self.events else starts[name]
            beginning = Beginning(starts[name], min(low, starts[name]))  # the topic has the rows from S on
            found = self._accept(found, name, beginning, given[name], (low, starts[name]))
        for name in self.events:
            if name in fresh or name not in given:
                continue
            before = found.of(name)
            low = self._low(name, since, records[name])
            start = _first_row(self.sources[name], self.store) if before.start is None else before.start
            until = start if before.start is None else min(start, before.since)
            if low < until < FOREVER:
                beginning = dataclasses.replace(before, start=start, since=low)
                found = self._accept(found, name, beginning, given[name], (low, until), records[name])
        return found

    def _first_horizon(self, starts: Mapping[str, int]) -> int:
        """The horizon (µs) of a job that begins with a store without rows, and with history until `starts`."""
        return min(self._first_horizon_of(view, starts) for view in self.views)

    def _first_horizon_of(self, view: FeatureView, starts: Mapping[str, int]) -> int:
        moment = starts.get(view.spine.name)
        if self.start is not None:
            moment = self.start if moment is None else moment
        elif moment is None or moment == ALWAYS:
            moment = min((each for each in starts.values() if each > ALWAYS), default=ALWAYS)
        return moment - self.keep if moment > ALWAYS else ALWAYS

    def _horizon_now(self, view: FeatureView, record: CommitRecord | None, horizon: int) -> int:
        """The horizon by the record of the spine's table: no features are computed for spine rows before it.

        For another definition of the view, features are computed again for all spine rows.
        """
        store, watermark = self.store, ALWAYS if record is None else record.watermark_of(view.spine.name)
        if record is None or watermark == ALWAYS:
            return horizon
        if open_table(features_live_uri(store, view.name, view.fingerprint)) is None:
            oldest = _first_row(view.spine, store)
        else:
            pending = record.of_view(view).oldest_pending
            oldest = FOREVER if pending is None else pending
        return max(horizon, min(watermark - self.keep, oldest))

    def _low(self, name: str, horizon: int, record: CommitRecord | None) -> int:
        """The time (µs) from which a source's rows are needed, by windows of spine rows from `horizon` on, or to find
        repeats."""
        reach = WindowReach.of(self.views, name)
        if reach.lifetime or horizon == ALWAYS:
            return ALWAYS
        if not self._repeats(name):
            return horizon - reach.bounded
        return horizon - reach.comparison_span(self._memory(name, record).length)

    def _memory(self, name: str, record: CommitRecord | None) -> RepeatMemory:
        """The memory of a source with repeats, by the record of the newest commit of its table."""
        before = CommitRecord() if record is None else record
        least = WindowReach.of(self.views, name).least_memory(self.keep)
        return before.memory.get(name, RepeatMemory()).grown(least, before.next_of(name))

    def _accept(
        self,
        found: Beginnings,
        name: str,
        beginning: Beginning,
        files: HistoryFiles,
        span: tuple[int, int],
        before: CommitRecord | None = None,
    ) -> Beginnings:
        """Accepts rows of a source in one commit, which also records the beginning of the source.

        Args:
            found: the beginnings of the sources so far.
            name: name of the source.
            beginning: of the source, without these rows.
            files: of the source.
            span: interval of times (µs) to accept.
            before: the record of the last commit of the source's table; None if there is none.
        """
        uri = source_uri(sources_root(self.store), name)
        schema = accepted_rows(self.sources[name], self._repeats(name))
        writer = TableWriter(uri, schema, application_of(name), self.run_id)
        table = open_table(uri)
        first = beginning.next
        written, offset = self._write_rows(name, files, span, writer, first)
        if first < offset or before is None:
            loaded = LoadedHistory(files.version, (first, offset), *span)
            beginning = dataclasses.replace(beginning, taken=(*beginning.taken, loaded))
        found = found.with_source(name, beginning)
        record = _record(before, name, found)
        if self._repeats(name):
            record = dataclasses.replace(record, memory={**record.memory, name: self._memory(name, before)})
        if not writer.commit(table, written, record.turn, record.to_json()):
            raise StoreError(
                "No other live job may write the tables of a live job",
                f"{uri} was written meanwhile",
                "Stop the other job first",
            )
        log.info(
            "history of %s: %d rows known in [%s, %s) accepted from %s",
            name,
            offset - first,
            _shown(span[0]),
            _shown(span[1]),
            files.version,
        )
        return found

    def _write_rows(
        self, name: str, files: HistoryFiles, span: tuple[int, int], writer: TableWriter, offset: int
    ) -> tuple[list[tuple[DataFile, dict[str, str]]], int]:
        """Writes the rows of a source in `span` to files and its dead letters to their table; commits no row.

        Args:
            offset: of the first row.

        Returns:
            The files, and the offset after the last row.
        """
        written: list[tuple[DataFile, dict[str, str]]] = []
        dead_letters: dict[FeatureView, list[pl.DataFrame]] = {view: [] for view in self.views}
        for rows, bad in files.pieces(*span) if name in self.events and span[0] < span[1] else ():
            for view, each in bad.items():
                dead_letters[view] += [each] if len(each) else []
            if len(rows):
                rows = _placed(rows, offset, writer.schema)
                offset += len(rows)
                written += write_files(batch(rows, writer.schema), writer.uri, self.run_id)
        require_unchanged(written, files.listings)
        for view, some in dead_letters.items():
            if some:
                self._write_dead_letters(view, pl.concat(some))
        return written, offset

    def _write_dead_letters(self, view: FeatureView, dead_letters: pl.DataFrame) -> None:
        uri, name = live_dead_letters_uri(self.store, view.name), view.name
        writer = TableWriter(uri, VIEW_DEAD_LETTERS, application_of(f"{name}/letters"), self.run_id)
        now = pl.lit(now_us(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        dead_letters = dead_letters.with_columns(
            pl.lit(name).alias("view"),
            now.alias("arrived"),
            now.dt.date().alias("date"),
            pl.lit(view.fingerprint).alias("fingerprint"),
        ).select(VIEW_DEAD_LETTERS.names)
        record = last_commit_record(open_table(uri), writer.app) or {"turn": 0, "next": {}}
        writer.append(dead_letters, int(record["turn"]), record, NewDeadLetters(writer.app))


def _record(before: CommitRecord | None, name: str, found: Beginnings) -> CommitRecord:
    """The record of a commit of history to the table of the source `name`: that of the last commit, and `found`."""
    record = CommitRecord(horizon=found.horizon) if before is None else before
    offsets = dict(record.next_of(name))
    if beginning := found.of(name).next:
        offsets[HISTORY_PARTITION] = beginning
    return dataclasses.replace(
        record,
        next={**record.next, name: offsets},
        counts={**record.counts, name: record.counts_of(name)},
        completeness={**record.completeness, name: record.completeness.get(name, SourceCompleteness())},
        beginnings=found,
    )


def recorded_beginnings(sources: Mapping[str, Source], store: str, records: Records) -> Beginnings:
    """The beginnings that the tables of sources record.

    The tables of a job that did not record them began with their first row.
    """
    found, horizon = {}, ALWAYS
    for name, record in records.items():
        if record is not None:
            horizon = max(horizon, record.beginnings.horizon)
            beginning = record.beginnings.sources.get(name)
            found[name] = Beginning(None, _first_row(sources[name], store)) if beginning is None else beginning
    return Beginnings(found, horizon)


def checked_record(store: str, name: str) -> CommitRecord | None:
    """The record of the newest commit of a source's table in the live store; None if there is none.

    Raises:
        StoreError: a live job has not written the table.
    """
    uri = source_uri(sources_root(store), name)
    table = open_table(uri)
    if table is not None and "__partition" not in {field.name for field in table.schema().fields}:
        raise StoreError(
            f"Source {name!r}: a live store's own table must have only rows that its jobs accepted",
            f"{uri} was written by something else",
            "Give the live job a --store of its own, and name the folder of that table with --sources: "
            "its rows are then history",
        )
    return source_record(store, name)


def _first_row(source: Source, store: str) -> int:
    """The time (µs) of the first row that was accepted from a source's topic; FOREVER if there is none."""
    table, time = open_table(source_uri(sources_root(store), source.name)), str(source.time)
    for _, files in itertools.groupby([] if table is None else data_files(table), lambda each: each.date):
        rows = pl.concat([pl.DataFrame(pl.from_arrow(read_file(each, [time, "__partition"]))) for each in files])
        first = rows.filter(pl.col("__partition") >= 0)[time].to_physical().min()
        if first is not None:
            return int(first)  # type: ignore[arg-type]
    return FOREVER


def _placed(rows: pl.DataFrame, offset: int, schema: pa.Schema) -> pl.DataFrame:
    """Rows as the table of accepted rows has them, with offsets of partition −1 from `offset` on."""
    time = next(iter(rows.columns))
    return rows.with_columns(
        pl.lit(HISTORY_PARTITION, pl.Int32).alias("__partition"),
        pl.int_range(offset, offset + pl.len(), dtype=pl.Int64).alias("__offset"),
        pl.lit(0, pl.Int32).alias("__place"),
        pl.lit(now_us(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("__arrived"),
        pl.col(time).dt.date().alias("date"),
    ).select(schema.names)


def _shown(moment: int) -> str:
    return "the beginning" if moment <= -(2**51) else str(day_of(moment)) if moment < 2**52 else "the end"
