"""The decisions of a live features job before its graph is built: history, first offsets and output topics."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import uuid
from collections.abc import Mapping

from schemas.errors import MismatchError, StoreError
from schemas.live import joined_sources, newest_versions
from schemas.views import FeatureView
from transforms.records.frame_packets import Head
from transforms.records.times import FOREVER, day_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY_PARTITION, of_topic
from transforms.streaming.epochs import record_memory, take_epoch
from transforms.streaming.history import Handover
from transforms.streaming.kafka import Broker, begin_offsets, dead_letters_topic, ensure_topics, topic_of
from transforms.streaming.kafka_admin import OVERHEAD, check_reachable, size_limit, unread_offsets
from transforms.streaming.live_features import Sends
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.live_tables import features_record, features_table, source_record
from transforms.streaming.progress import NO_EPOCH, CommitRecord, Epoch, RecoveryPoint, ViewRecord
from transforms.streaming.recovery import find_recovery_point
from transforms.streaming.replay import Replay, stream_digests
from transforms.streaming.store_owner import RecordedDefinition, claim
from transforms.streaming.view_journal import REJECTED


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFeaturesJob:
    """What a live features job is to do.

    Args:
        views: the views whose features are computed, the newest definition first.
        settings: the settings of the live engine.
        replay: how files are replayed; None: messages come from Kafka.
        broker: None if none is named.
        sinks: "table", "topic" or both.
        handover: the history from before the job's start.
        drop: names of views that earlier jobs served and this one does not.
        definitions: of the views, by `version_name`.
    """

    views: tuple[FeatureView, ...]
    settings: LiveSettings
    replay: Replay | None
    broker: Broker | None
    sinks: tuple[str, ...]
    handover: Handover
    drop: tuple[str, ...] = ()
    definitions: Mapping[str, RecordedDefinition] = dataclasses.field(default_factory=dict)

    @property
    def view(self) -> FeatureView:
        """The first view."""
        return self.views[0]

    @property
    def topics(self) -> dict[str, str]:
        """The topic of each source."""
        return {name: f"{self.settings.prefix}{name}" for name in joined_sources(self.views)}

    @property
    def stream(self) -> dict[str, object]:
        """Everything on which the offsets of its messages depend, by the names of flags."""
        if self.replay is None:
            return {"--source": "kafka", "--topic_prefix": self.settings.prefix}
        values = dataclasses.asdict(self.replay)
        del values["root"]  # a store and its sources may be moved
        days = {name: None if abs(values[name]) >= FOREVER else str(day_of(values[name])) for name in ("start", "end")}
        return {"--source": "replay", **{f"--{name}": each for name, each in {**values, **days}.items()}}

    def table(self, view: FeatureView) -> str:
        """Address of the live feature table of a view."""
        return features_live_uri(self.settings.store, view.name, view.fingerprint)

    def required_broker(self) -> Broker:
        """The broker of a job that reads or writes topics."""
        assert self.broker is not None
        return self.broker

    def check_and_claim(self) -> None:
        """Checks that the job can start, and records in the store that it belongs to these views and this stream.

        Raises:
            DefinitionError: a source has no history, and the job does not start without.
            StoreError: the store serves another view, or has read another stream, or a replay's files have changed
                since.
        """
        self.handover.check()
        replay = self.replay
        rows = None if replay is None else functools.partial(stream_digests, self.views, replay)
        claim(self.views, self.settings.store, self.stream, self.drop, self.definitions, rows)


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFeaturesPlan:
    """What one launch of the job does.

    Args:
        job: the job.
        start: the state of the tables from which the job continues.
        group: the consumer group of the launch; empty for a replay.
        first_available: per topic, first offset by partition that the broker still has; empty for a replay.
        sends: the output topics; None if rows are only written to tables.
        epoch: of this launch.
    """

    job: LiveFeaturesJob
    start: RecoveryPoint
    group: str = ""
    first_available: Mapping[str, Mapping[int, int]] = dataclasses.field(default_factory=dict)
    sends: Sends | None = None
    epoch: Epoch = NO_EPOCH

    @property
    def settings(self) -> LiveSettings:
        """The settings of the engine.  For a replay, they contain the recovery point; a job on Kafka gets it as a
        message."""
        begin = None if self.job.replay is None else self.start
        return dataclasses.replace(self.job.settings, begin=begin, epoch=self.epoch)

    @property
    def due(self) -> dict[str, dict[int, int]]:
        """Per topic, next offset by partition."""
        return self._due(self.start.next)

    def finished_at(self, status: Head) -> bool:
        """Whether every message has been read and committed, and no message follows the ends of the partitions.

        Args:
            status: of the last commit; empty before the first.
        """
        record = CommitRecord.of_json(status)
        if not record.last or record.turn <= self.start.turn:
            return False
        due = self._due(record.next)
        try:
            left = unread_offsets(self.job.required_broker(), due)
        except StoreError:  # the next call tries again
            return False
        return all(number in due[topic] and not count for topic, each in left.items() for number, count in each.items())

    def _due(self, offsets: Mapping[str, Mapping[int, int]]) -> dict[str, dict[int, int]]:
        return {topic: of_topic(offsets[name]) for name, topic in self.job.topics.items()}


def prepare_live_features(job: LiveFeaturesJob) -> LiveFeaturesPlan:
    """Loads history that the store lacks, takes its tables over from earlier launches, finds where to continue, and
    creates missing output topics.

    Raises:
        DefinitionError: a source has no history, and the job does not start without.
        StoreError: the broker cannot be reached, or a topic is missing.
    """
    store, views = job.settings.store, job.views
    if job.replay is not None:
        nothing: dict[str, dict[int, int]] = {name: {} for name in job.topics}
        beginnings, epoch = job.handover.beginnings(), take_epoch(views, store, job.settings.run_id)
        record_memory(views, store, job.settings.run_id, epoch, job.settings.keep)
        start = find_recovery_point(views, store, nothing, beginnings)
        return LiveFeaturesPlan(job, start, sends=output_topics(job), epoch=epoch)
    available = begin_offsets(job.required_broker(), list(job.topics.values()))
    first = {name: available[topic] for name, topic in job.topics.items()}
    beginnings, epoch = job.handover.beginnings(), take_epoch(views, store, job.settings.run_id)
    record_memory(views, store, job.settings.run_id, epoch, job.settings.keep)
    start = find_recovery_point(views, store, first, beginnings)
    group = f"millrace-{store_name(store)}-{job.settings.run_id}-{uuid.uuid4().hex[:8]}"
    return LiveFeaturesPlan(job, start, group, available, output_topics(job), epoch)


def output_topics(job: LiveFeaturesJob) -> Sends | None:
    """The topics of feature rows and dead letters, created if they are missing; None if the job writes only tables.

    Raises:
        StoreError: the broker cannot be reached, or refuses.
    """
    if "topic" not in job.sinks:
        return None
    broker, prefix = job.required_broker(), job.settings.prefix
    newest = newest_versions(job.views)
    features = [topic_of(view, prefix) for view in newest]
    dead_letters = [dead_letters_topic(view, prefix) for view in newest]
    ensure_topics(broker, [*features, *dead_letters])
    limits = [min(size_limit(broker, [topic]) for topic in features), size_limit(broker, dead_letters)]
    properties = {**broker.properties, "message.max.bytes": str(max(limits))}
    sender = dataclasses.replace(broker, properties=properties)
    return Sends(job.views, sender, prefix, max(limits[0] - OVERHEAD, 1))


def store_name(store: str) -> str:
    """The name of a store, by which its job is known to a broker: the last part of its address."""
    return store.rstrip("/").rsplit("/", 1)[-1] or "store"


@dataclasses.dataclass(frozen=True, eq=False)
class ViewFigures:
    """The figures of one view of a job.

    Args:
        view: the view.
        record: what the last commit recorded of it.
        accepted: number of spine rows that were accepted from the topic.
        rows_out: rows of its live feature table.
        commit_version: version of that table; None if there is none.
        recounted: of a store from which rows were erased, what `unaccounted` is by its tables.
    """

    view: FeatureView
    record: ViewRecord
    accepted: int
    rows_out: int
    commit_version: int | None
    recounted: int | None = None

    @property
    def unaccounted(self) -> int:
        """Accepted spine rows that have no feature row, are not rejected and are not pending."""
        if self.recounted is not None:
            return self.recounted
        counts = self.record.counts.get(self.view.spine.name, {})
        rejected = sum(counts.get(reason, 0) for reason in (REJECTED, "repeated", "conflicting", "too_late"))
        return self.accepted - self.rows_out - rejected - self.record.pending

    def to_json(self) -> Head:
        """For `run.json`."""
        return {
            "view": self.view.name,
            "fingerprint": self.view.fingerprint,
            "rows_out": self.rows_out,
            "pending": self.record.pending,
            "counts": {name: dict(each) for name, each in self.record.counts.items()},
            "commit_version": self.commit_version,
            "questions_unaccounted_for": self.unaccounted,
        }


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFeaturesFigures:
    """The figures of a job: of its last commit, its tables and its topics.

    Args:
        job: the job.
        record: the record of the last commit; None if there was none.
        counts: counts of rows by source and by what became of them.
        views: of its views.
    """

    job: LiveFeaturesJob
    record: CommitRecord | None
    counts: Mapping[str, Mapping[str, int]]
    views: tuple[ViewFigures, ...]

    @property
    def unaccounted(self) -> int:
        """As of each view, of all of them."""
        return sum(each.unaccounted for each in self.views)

    def to_json(self) -> dict[str, object]:
        """For `run.json`.  The table is the first view's; the figures of several views stand under `views` too."""
        first = self.views[0]
        figures: dict[str, object] = {
            "sources_root": self.job.settings.dimensions,
            "rows_in": sum(each["rows"] for each in self.counts.values()),
            "rows_out": sum(each.rows_out for each in self.views),
            "pending": None if self.record is None else self.record.pending,
            "turns": None if self.record is None else self.record.turn,
            "sources": self.counts,
            "counts": self.counts,
            "table": self.job.table(first.view),
            "fingerprint": first.view.fingerprint,
            "commit_version": first.commit_version,
        }
        if len(self.views) > 1:
            figures["views"] = [each.to_json() for each in self.views]
        if self.job.settings.table:
            figures["questions_unaccounted_for"] = self.unaccounted
        return figures

    def check(self, ended: bool) -> None:
        """
        Args:
            ended: whether the job has read its sources to their end.

        Raises:
            MismatchError: it has, and spine rows are unaccounted for.
        """
        for each in self.views:
            if ended and self.job.settings.table and each.unaccounted:
                raise MismatchError(
                    "Every spine row that a live job accepts must have a feature row, be rejected or be pending",
                    f"{each.unaccounted} of {self.job.table(each.view)} are none of these",
                    "Please report it, with run.json",
                )


def live_features_figures(job: LiveFeaturesJob, status: Head) -> LiveFeaturesFigures:
    """The figures of a job.

    Args:
        job: the job.
        status: status of the last commit; empty if there was none in this run: then the tables have the record.
    """
    store = job.settings.store
    records = {name: source_record(store, name) for name in job.topics}
    if status:
        record: CommitRecord | None = CommitRecord.of_json(status)
    else:
        committed = [*(features_record(view, store) for view in job.views), *records.values()]
        record = max((each for each in committed if each is not None), key=lambda each: each.turn, default=None)
    counts: dict[str, dict[str, int]] = {}
    for name, own in records.items():
        table = open_table(source_uri(sources_root(store), name))
        history = 0 if own is None else own.next_of(name).get(HISTORY_PARTITION, 0)
        rows = 0 if table is None else sum(file.rows for file in data_files(table))
        known = {} if record is None else record.counts_of(name)
        counts[name] = {**known, "rows": rows - history, "history": history}
    if job.replay is None:
        for name, messages in unread_messages(job, record).items():
            counts[name]["unread"] = messages
    views = tuple(_view_figures(view, store, record, counts[view.spine.name]["rows"]) for view in job.views)
    return LiveFeaturesFigures(job, record, counts, views)


def _view_figures(view: FeatureView, store: str, record: CommitRecord | None, accepted: int) -> ViewFigures:
    table = features_table(view, store)
    rows_out = 0 if table is None else sum(file.rows for file in data_files(table))
    known = ViewRecord() if record is None else record.of_view(view)
    return ViewFigures(view, known, accepted, rows_out, None if table is None else table.version())


def unread_messages(job: LiveFeaturesJob, record: CommitRecord | None) -> dict[str, int]:
    """Number of messages after those of a commit, by source; empty if the broker cannot be reached."""
    broker, result = job.required_broker(), dict[str, int]()
    due = {topic: of_topic({} if record is None else record.next_of(name)) for name, topic in job.topics.items()}
    with contextlib.suppress(StoreError):
        check_reachable("The broker", "--bootstrap", broker.bootstrap)
        left = unread_offsets(broker, due)
        result = {name: sum(left[topic].values()) for name, topic in job.topics.items() if topic in left}
    return result
