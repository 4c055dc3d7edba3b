"""History handed over to a live job: rows from before its start, accepted once, before the first turn.

A source's rows known before its start S are judged, counted and told repeats as batch does, and written into the live
store's own table under partition −1, by one commit a source.  From there recovery, parity and trace see them like any others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from schemas.errors import ContractError, DataError, DefinitionError, StoreError
from schemas.live import accepted, repeats_by
from schemas.sources import Source
from schemas.views import FeatureView, lifetime_sources
from transforms.features.block_inputs import distinct, joined
from transforms.records.record_batches import batch
from transforms.records.times import ALWAYS, FOREVER, day_number, day_of, days_in, midnight
from transforms.sources.contracts import Contract
from transforms.sources.dead_letters import LIVE_DEAD_LETTERS, as_message_dead_letters
from transforms.sources.inventory import Slice, files_of, survey, version_of
from transforms.sources.reader import CHUNK_ROWS, Repeats, repeats_of, stream_slices, without_repeats
from transforms.storage.delta_tables import DataFile, data_files, open_table, read_file, write_files
from transforms.storage.paths import features_live_uri, live_dead_letters_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY, Beginning, Beginnings
from transforms.streaming.live_tables import NewDeadLetters, Writer, application_of, last_commit_record
from transforms.streaming.micro_batches import ORIGIN_COLUMNS, row_identity
from transforms.streaming.replay import sources_of
from transforms.streaming.shards import RID

log = logging.getLogger("millrace.live")


@dataclasses.dataclass(frozen=True, eq=False)
class Handover:
    """What history a job is given.

    Args:
        view: whose.
        store: of the live job.
        root: folder of the sources' files; None: there are none.
        start: the job's --start, µs.
        keep: so late a question is still answered, µs.
        without: start without history.
        sent: the job is sent every row from this time on (µs; ALWAYS: all there are); None: what a topic has.
        run_id: begins the names of files.
    """

    view: FeatureView
    store: str
    root: str | None
    start: int | None
    keep: int
    without: bool = False
    sent: int | None = None
    run_id: str = "history"

    def check(self) -> None:
        """See that the job can begin, before anything is written.

        Raises:
            DefinitionError: a source has no history, and the job was not told to start without.
            StoreError: a source's table in the live store is none of a live job's.
        """
        fresh = [name for name in sources_of(self.view) if not batch_record(self.view, self.store, name)]
        if self.without or self.sent == ALWAYS:
            return
        missing = [name for name in self.view.events if name in fresh and not self._present(name)]
        if missing:
            raise DefinitionError(
                f"View {self.view.name!r}: a live job knows its history, or says that it starts without",
                f"no files of {', '.join(map(repr, missing))} {'to read (--sources is left out, or is the live store itself)' if self.root is None else f'under {self.root}'}",
                "Name the folder of the sources' files or Delta tables with --sources, or add --without_history: answers are then "
                "marked __cold until every window has filled",
            )

    def beginnings(self) -> Beginnings:
        """Take in what the job needs of history and the store does not have; where every source's rows begin.

        Raises:
            DefinitionError, StoreError: see `check`.
        """
        self.check()
        told = {name: batch_record(self.view, self.store, name) for name in sources_of(self.view)}
        known = recorded(self.view, self.store, told)
        fresh = [name for name in told if name not in known.sources]
        if self.without or self.sent == ALWAYS:
            start = ALWAYS if self.sent == ALWAYS else self.start
            since = FOREVER if self.sent is None else self.sent
            if self.sent == ALWAYS:
                fresh = [name for name in told if known.of(name).start is None]
            return dataclasses.replace(
                known, sources={**known.sources, **dict.fromkeys(fresh, Beginning(start, since))}
            )
        given = {
            name: _Files.of(self.view, self.root, name)
            for name in told
            if self.root is not None and self._present(name)
        }
        return self._take_in(known, told, given, fresh)

    def _present(self, name: str) -> bool:
        """Whether a source has files."""
        if self.root is None:
            return False
        try:
            files_of(self.root, sources_of(self.view)[name])
        except DataError as error:
            if error.rule.endswith("has Parquet files"):
                return False
            raise
        return True

    def _take_in(
        self,
        known: Beginnings,
        told: Mapping[str, Mapping[str, Any]],
        given: Mapping[str, _Files],
        fresh: Sequence[str],
    ) -> Beginnings:
        starts = {name: min(files.end, FOREVER if self.start is None else self.start) for name, files in given.items()}
        horizon = known.horizon
        if not known.sources:
            moment = starts.get(self.view.spine.name)
            if self.start is not None:
                moment = self.start if moment is None else moment
            elif moment is None or moment == ALWAYS:
                moment = min((each for each in starts.values() if each > ALWAYS), default=ALWAYS)
            horizon = moment - self.keep if moment > ALWAYS else ALWAYS
        since = _horizon_now(self.view, self.store, told[self.view.spine.name], self.keep, horizon)
        found = dataclasses.replace(known, horizon=horizon)
        for name in fresh:
            if name not in given:
                continue
            low = self._low(name, since) if name in self.view.events else starts[name]
            beginning = Beginning(starts[name], min(low, starts[name]))  # the topic has what comes after S
            found = self._accept(found, name, beginning, given[name], (low, starts[name]), {})
        for name in self.view.events:
            if name in fresh or name not in given:
                continue
            before = found.of(name)
            low = self._low(name, since)
            start = _first_row(self.view, self.store, name) if before.start is None else before.start
            until = start if before.start is None else min(start, before.since)
            if low < until < FOREVER:
                beginning = dataclasses.replace(before, start=start, since=low)
                found = self._accept(found, name, beginning, given[name], (low, until), told[name])
        return found

    def _low(self, name: str, horizon: int) -> int:
        """From when on the windows of questions from `horizon` on, and the memory of repeats, reach a source's rows."""
        if name in lifetime_sources(self.view) or horizon == ALWAYS:
            return ALWAYS
        return horizon - self.view.reach(name) * (2 if repeats_by(self.view, name) else 1)

    def _accept(
        self,
        found: Beginnings,
        name: str,
        beginning: Beginning,
        files: _Files,
        span: tuple[int, int],
        told: Mapping[str, Any],
    ) -> Beginnings:
        """Accept the rows of the times `span` in one commit, with what it says of the source's beginning."""
        view, uri = self.view, source_uri(sources_root(self.store), name)
        writer = Writer(uri, accepted(view, name), application_of(name), self.run_id)
        table = open_table(uri)
        known = _counted_rows(view, self.store, name) if told and repeats_by(view, name) else None
        first = offset = beginning.next
        written: list[tuple[DataFile, dict[str, str]]] = []
        dead_letters = []
        for rows, bad in files.pieces(*span) if name in view.events and span[0] < span[1] else ():
            dead_letters += [bad] if len(bad) else []
            if known is not None:
                rows = self._beside(name, rows, known)
            if len(rows):
                rows = _placed(rows, offset, writer.schema)
                offset += len(rows)
                written += write_files(batch(rows, writer.schema), uri, self.run_id)
        if first < offset or not told:
            taken = {"version": files.version, "offsets": [first, offset], "from": span[0], "until": span[1]}
            beginning = dataclasses.replace(beginning, taken=(*beginning.taken, taken))
        found = found.with_source(name, beginning)
        if dead_letters:
            self._write_letters(pl.concat(dead_letters))
        said = {
            **(told or {"turn": 0, "last": False, "pending": 0, "oldest_pending": None, "horizon": found.horizon}),
            **{what: {name: {}, **told.get(what, {})} for what in ("next", "counts")},
            "clock": {name: {"settled": ALWAYS, "partitions": {}}, **told.get("clock", {})},
            "started": found.starts,
            "beginnings": found.to_json(),
        }
        if beginning.next:
            said["next"] = {**said["next"], name: {**said["next"][name], str(HISTORY): beginning.next}}
        if not writer.commit(table, written, int(said["turn"]), said):
            raise StoreError("A live job starts while no other one writes its tables", uri, "Stop the other job first")
        log.info(
            "history of %s: %d rows known in [%s, %s) accepted from %s",
            name,
            offset - first,
            _shown(span[0]),
            _shown(span[1]),
            files.version,
        )
        return found

    def _beside(self, name: str, rows: pl.DataFrame, known: pl.DataFrame) -> pl.DataFrame:
        """Older rows beside those that were accepted before: of one `unique` value the first known counts."""
        unique, moment = list(repeats_by(self.view, name)), str(sources_of(self.view)[name].time)
        mine = rows.filter("__counted").select(*unique, pl.col(moment).alias("__mine")).unique(unique)
        both = known.join(mine, on=unique)
        if not len(both):
            return rows
        earlier = both.filter(pl.col(moment) <= pl.col("__mine")).select(*unique, pl.lit(True).alias("__known"))
        later = both.filter(pl.col(moment) > pl.col("__mine"))
        if name not in lifetime_sources(self.view):  # a restart reads back no further to find what replaced a row
            far = pl.col("__mine").dt.offset_by(f"{2 * self.view.reach(name)}us")
            later = later.filter(pl.col(moment) <= far)
        replaced = later.sort(moment, RID).select(*unique, pl.col(RID).alias("__gone"))
        replaced = replaced.unique(unique, keep="first")  # a row names one that it replaces
        rows = rows.join(earlier.unique(unique), on=unique, how="left", maintain_order="left")
        rows = rows.join(replaced, on=unique, how="left", maintain_order="left")
        counts = pl.col("__counted") & pl.col("__known").is_null()
        return rows.with_columns(
            counts.alias("__counted"), pl.when(counts).then(pl.col("__gone")).alias("__instead")
        ).drop("__known", "__gone")

    def _write_letters(self, dead_letters: pl.DataFrame) -> None:
        uri, name = live_dead_letters_uri(self.store, self.view.name), self.view.name
        writer = Writer(uri, LIVE_DEAD_LETTERS, application_of(f"{name}/letters"), self.run_id)
        now = pl.lit(_now(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
        dead_letters = dead_letters.with_columns(
            pl.lit(name).alias("view"), now.alias("arrived"), now.dt.date().alias("date")
        ).select(LIVE_DEAD_LETTERS.names)
        told = last_commit_record(open_table(uri), writer.app) or {"turn": 0, "next": {}}
        writer.append(dead_letters, int(told["turn"]), told, NewDeadLetters(writer.app))


@dataclasses.dataclass(frozen=True, eq=False)
class _Files:
    """A source's files: contract, row groups, and which version of it they are."""

    view: FeatureView
    source: Source
    contract: Contract
    slices: tuple[Slice, ...]
    version: str

    @classmethod
    def of(cls, view: FeatureView, root: str, name: str) -> _Files:
        source = sources_of(view)[name]
        if source is view.spine:
            contract = Contract(source, tuple(source.schema), tuple(view.key), _now())
        else:
            contract = Contract(
                source, tuple(view.columns_read(name)), now=_now(), ordering=view.columns_ordering(name)
            )
        version = version_of(root, source)
        others = tuple(column for column in source.schema if column not in contract.columns)
        try:
            contract, slices = survey(root, dataclasses.replace(contract, ordering=others), version)
        except ContractError:  # columns that no feature needs may be missing, as in batch
            contract, slices = survey(root, contract, version)
        return cls(view, source, contract, tuple(slices), _version_text(root, source, version, slices))

    @property
    def end(self) -> int:
        """Behind its last plausible time, µs; ALWAYS where there is none."""
        inside = [each.high for each in self.slices if self.contract.earliest <= each.high < self.contract.latest]
        return max(inside) + 1 if inside else ALWAYS

    def pieces(self, low: int, high: int) -> Iterator[tuple[pl.DataFrame, pl.DataFrame]]:
        """(Rows known in `[low, high)` µs, of some days at a time, in order, with what became of them; dead letters.)"""
        repeats = repeats_of(self.contract, self.slices) if self.source.unique else None
        for begin, end in self._spans(low, high):
            some = [each for each in self.slices if each.high >= begin and each.low < end]
            own = (ALWAYS if begin == low and low <= self.contract.earliest else begin, end)
            read = joined(stream_slices(self.contract, some, begin, end, own=own))
            yield self._judged(read.frame, repeats), self._dead_letters(read.dead_letters)

    def _spans(self, low: int, high: int) -> Iterator[tuple[int, int]]:
        """`[low, high)` cut between days, so that each part has some `CHUNK_ROWS` rows, or is one day."""
        floor = day_number(max(low, self.contract.earliest))
        days = np.zeros(max(days_in(high) - floor, 0) + 1)
        for each in self.slices:  # taken to spread evenly over their row groups
            if each.high >= midnight(floor) and each.low < high:
                first, last = day_number(each.low) - floor, day_number(each.high) - floor
                first, last = max(first, 0), min(last + 1, len(days) - 1)
                share = each.rows / (day_number(each.high) - day_number(each.low) + 1)
                days[first] += share
                days[last] -= share
        begin, rows = low, 0.0
        for number, more in enumerate(np.cumsum(days)[:-1].tolist()):
            if rows and rows + more > CHUNK_ROWS:
                yield begin, midnight(floor + number)
                begin, rows = midnight(floor + number), 0.0
            rows += more
        yield begin, high

    def _judged(self, rows: pl.DataFrame, repeats: Repeats | None) -> pl.DataFrame:
        source, time = self.source, str(self.source.time)
        rows = rows.with_columns(
            pl.lit(None, dtype).alias(name) for name, dtype in source.schema.items() if name not in rows.columns
        ).select(source.schema.keys())
        rows = rows.sort(list(dict.fromkeys([time, *source.tie_order])), maintain_order=True)
        by = repeats_by(self.view, source.name)
        if not by:
            return rows
        numbered = rows.with_row_index("__number")
        if source is self.view.spine:
            kept = distinct(numbered.select(*source.schema, "__number"), [*by])[0]
        else:
            judged = numbered.select(*self.view.columns_held(source.name), "__number")
            kept = without_repeats(source, judged, None if repeats is None else repeats.first)
        return numbered.with_columns(
            pl.col("__number").is_in(kept["__number"].implode()).alias("__counted"),
            pl.lit(None, pl.Int64).alias("__instead"),
        ).drop("__number")

    def _dead_letters(self, dead_letters: pl.DataFrame) -> pl.DataFrame:
        return as_message_dead_letters(dead_letters, HISTORY, (each.path for each in self.slices), self.version)


def recorded(view: FeatureView, store: str, told: Mapping[str, Mapping[str, Any]]) -> Beginnings:
    """Where the rows of those sources begin that have been accepted from, as their tables say.

    Tables of a job that did not write it down began with their first row.
    """
    sources, horizon = {}, ALWAYS
    for name, each in told.items():
        if not each:
            continue
        said = Beginnings.of_json(each.get("beginnings"))
        horizon = max(horizon, said.horizon)
        sources[name] = said.sources.get(name) or Beginning(None, _first_row(view, store, name))
    return Beginnings(sources, horizon)


def batch_record(view: FeatureView, store: str, name: str) -> dict[str, Any]:
    """What a source's table in the live store says of itself.

    Raises:
        StoreError: no live job made it.
    """
    uri = source_uri(sources_root(store), name)
    table = open_table(uri)
    if table is not None and "__partition" not in {field.name for field in table.schema().fields}:
        raise StoreError(
            f"Source {name!r}: a live store's own table holds the rows that its jobs accepted",
            f"{uri} was written by something else",
            "Give the live job a --store of its own, and name the folder of that table with --sources: its rows are then history",
        )
    return last_commit_record(table, application_of(name))


def _horizon_now(view: FeatureView, store: str, told: Mapping[str, Any], keep: int, horizon: int) -> int:
    """No question before it will be answered, as the spine's table says.  Of another definition all are asked again."""
    watermark = int(told.get("clock", {}).get(view.spine.name, {}).get("settled", ALWAYS))
    if watermark == ALWAYS:
        return horizon
    if open_table(features_live_uri(store, view.name, view.fingerprint)) is None:
        oldest = _first_row(view, store, view.spine.name)
    else:
        waits = told.get("oldest_pending")
        oldest = FOREVER if waits is None else int(waits)
    return max(horizon, min(watermark - keep, oldest))


def _first_row(view: FeatureView, store: str, name: str) -> int:
    """The time of the first row that was accepted from a source's topic; FOREVER without any."""
    table, time = open_table(source_uri(sources_root(store), name)), str(sources_of(view)[name].time)
    for _, files in itertools.groupby([] if table is None else data_files(table), lambda each: each.date):
        rows = pl.concat([pl.DataFrame(pl.from_arrow(read_file(each, [time, "__partition"]))) for each in files])
        first = rows.filter(pl.col("__partition") >= 0)[time].to_physical().min()
        if first is not None:
            return int(first)  # type: ignore[arg-type]
    return FOREVER


def _counted_rows(view: FeatureView, store: str, name: str) -> pl.DataFrame:
    """Of the accepted rows that count: what repeats are told by, their times, and who they are."""
    table, time = open_table(source_uri(sources_root(store), name)), str(sources_of(view)[name].time)
    wanted = list(dict.fromkeys([*repeats_by(view, name), time, *ORIGIN_COLUMNS, "__counted", "__instead"]))
    parts = [pl.DataFrame(pl.from_arrow(read_file(each, wanted))) for each in data_files(table)] if table else []
    empty = pl.DataFrame(pl.from_arrow(accepted(view, name).empty_table())).select(wanted)
    rows = pl.concat([empty, *parts])
    rows = rows.with_columns(row_identity(rows))
    gone = rows["__instead"].drop_nulls()
    names = dict.fromkeys([*repeats_by(view, name), time, RID])
    return rows.filter("__counted", ~pl.col(RID).is_in(gone.implode())).select(list(names))


def _placed(rows: pl.DataFrame, offset: int, schema: pa.Schema) -> pl.DataFrame:
    """Rows as a live table holds them, under the offsets of partition −1 from `offset` on."""
    time = next(iter(rows.columns))
    return rows.with_columns(
        pl.lit(HISTORY, pl.Int32).alias("__partition"),
        pl.int_range(offset, offset + pl.len(), dtype=pl.Int64).alias("__offset"),
        pl.lit(0, pl.Int32).alias("__place"),
        pl.lit(_now(), pl.Int64).cast(pl.Datetime("us")).dt.replace_time_zone("UTC").alias("__arrived"),
        pl.col(time).dt.date().alias("date"),
    ).select(schema.names)


def _version_text(root: str, source: Source, version: int | None, slices: Sequence[Slice]) -> str:
    """A Delta table's version, or a digest of what files there are."""
    if version is not None:
        return f"version {version}"
    stamps = {each.path: each.stamp for each in slices}
    folder = len(source_uri(root, source.name))
    listed = [f"{path[folder:]} {stamps.get(path, '')}" for path in files_of(root, source)]
    return f"files {hashlib.sha256(chr(10).join(listed).encode()).hexdigest()[:16]}"


def _shown(moment: int) -> str:
    return "the beginning" if moment <= -(2**51) else str(day_of(moment)) if moment < 2**52 else "the end"


def _now() -> int:
    return time.time_ns() // 1000
