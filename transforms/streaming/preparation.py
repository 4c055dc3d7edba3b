"""The decisions of a live features job before its graph is built: history, first offsets and output topics."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Mapping

from schemas.errors import MismatchError, StoreError
from schemas.live import live_sources
from schemas.views import FeatureView
from transforms.records.frame_packets import Head
from transforms.records.times import FOREVER, day_of
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri, source_uri, sources_root
from transforms.streaming.beginnings import HISTORY_PARTITION, of_topic
from transforms.streaming.epochs import take_epoch
from transforms.streaming.history import Handover
from transforms.streaming.journal import REJECTED
from transforms.streaming.kafka import Broker, begin_offsets, dead_letters_topic, ensure_topics, topic_of
from transforms.streaming.kafka_admin import OVERHEAD, check_reachable, size_limit, unread_offsets
from transforms.streaming.live_features import Sends
from transforms.streaming.live_settings import LiveSettings
from transforms.streaming.live_tables import features_record, source_record
from transforms.streaming.progress import NO_EPOCH, CommitRecord, Epoch, RecoveryPoint
from transforms.streaming.recovery import find_recovery_point
from transforms.streaming.replay import Replay, stream_digests
from transforms.streaming.store_owner import claim


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFeaturesJob:
    """What a live features job is to do.

    Args:
        view: the view whose features are computed.
        settings: the settings of the live engine.
        replay: how files are replayed; None: messages come from Kafka.
        broker: None if none is named.
        sinks: "table", "topic" or both.
        handover: the history from before the job's start.
    """

    view: FeatureView
    settings: LiveSettings
    replay: Replay | None
    broker: Broker | None
    sinks: tuple[str, ...]
    handover: Handover

    @property
    def topics(self) -> dict[str, str]:
        """The topic of each source."""
        return {name: f"{self.settings.prefix}{name}" for name in live_sources(self.view)}

    @property
    def stream(self) -> dict[str, object]:
        """Everything on which the offsets of its messages depend, by the names of flags."""
        if self.replay is None:
            return {"--source": "kafka", "--topic_prefix": self.settings.prefix}
        values = dataclasses.asdict(self.replay)
        del values["root"]  # a store and its sources may be moved
        days = {name: None if abs(values[name]) >= FOREVER else str(day_of(values[name])) for name in ("start", "end")}
        return {"--source": "replay", **{f"--{name}": each for name, each in {**values, **days}.items()}}

    @property
    def table(self) -> str:
        """Address of the live feature table."""
        return features_live_uri(self.settings.store, self.view.name, self.view.fingerprint)

    def required_broker(self) -> Broker:
        """The broker of a job that reads or writes topics."""
        assert self.broker is not None
        return self.broker

    def check_and_claim(self) -> None:
        """Checks that the job can start, and records in the store that it belongs to this view and stream.

        Raises:
            DefinitionError: a source has no history, and the job does not start without.
            StoreError: the store belongs to another view or stream, or a replay's files have changed since.
        """
        self.handover.check()
        rows = None if self.replay is None else stream_digests(self.view, self.replay)
        claim(self.view, self.settings.store, self.stream, rows)


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
    store, view = job.settings.store, job.view
    if job.replay is not None:
        nothing: dict[str, dict[int, int]] = {name: {} for name in job.topics}
        beginnings, epoch = job.handover.beginnings(), take_epoch(view, store, job.settings.run_id)
        start = find_recovery_point(view, store, nothing, beginnings)
        return LiveFeaturesPlan(job, start, sends=output_topics(job), epoch=epoch)
    available = begin_offsets(job.required_broker(), list(job.topics.values()))
    first = {name: available[topic] for name, topic in job.topics.items()}
    beginnings, epoch = job.handover.beginnings(), take_epoch(view, store, job.settings.run_id)
    start = find_recovery_point(view, store, first, beginnings)
    group = f"millrace-{view.name}-{job.settings.run_id}-{uuid.uuid4().hex[:8]}"
    return LiveFeaturesPlan(job, start, group, available, output_topics(job), epoch)


def output_topics(job: LiveFeaturesJob) -> Sends | None:
    """The topics of feature rows and dead letters, created if they are missing; None if the job writes only tables.

    Raises:
        StoreError: the broker cannot be reached, or refuses.
    """
    if "topic" not in job.sinks:
        return None
    broker, prefix = job.required_broker(), job.settings.prefix
    topics = topic_of(job.view, prefix), dead_letters_topic(job.view, prefix)
    ensure_topics(broker, topics)
    limits = [size_limit(broker, [topic]) for topic in topics]
    properties = {**broker.properties, "message.max.bytes": str(max(limits))}
    sender = dataclasses.replace(broker, properties=properties)
    return Sends(job.view, sender, prefix, max(limits[0] - OVERHEAD, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class LiveFeaturesFigures:
    """The figures of a job, from its last commit, its tables and its topics.

    Args:
        job: the job.
        record: record of the last commit; None if there was none.
        counts: counts of rows by source and by what became of them.
        rows_out: number of rows of the live feature table.
        commit_version: version of that table; None if there is none.
        recounted: of a store from which rows were erased, what `unaccounted` is by its tables.
    """

    job: LiveFeaturesJob
    record: CommitRecord | None
    counts: Mapping[str, Mapping[str, int]]
    rows_out: int
    commit_version: int | None
    recounted: int | None = None

    @property
    def unaccounted(self) -> int:
        """Number of accepted spine rows that have no feature row, are not rejected and are not pending."""
        if self.recounted is not None:
            return self.recounted
        counts = self.counts[self.job.view.spine.name]
        rejected = sum(counts.get(reason, 0) for reason in (REJECTED, "repeated", "conflicting", "too_late"))
        return counts["rows"] - self.rows_out - rejected - (0 if self.record is None else self.record.pending)

    def to_json(self) -> dict[str, object]:
        """For `run.json`."""
        figures: dict[str, object] = {
            "sources_root": self.job.settings.dimensions,
            "rows_in": sum(each["rows"] for each in self.counts.values()),
            "rows_out": self.rows_out,
            "pending": None if self.record is None else self.record.pending,
            "turns": None if self.record is None else self.record.turn,
            "sources": self.counts,
            "counts": self.counts,
            "table": self.job.table,
            "fingerprint": self.job.view.fingerprint,
            "commit_version": self.commit_version,
        }
        if self.job.settings.table:
            figures["questions_unaccounted_for"] = self.unaccounted
        return figures

    def check(self, ended: bool) -> None:
        """
        Args:
            ended: whether the job has read its sources to their end.

        Raises:
            MismatchError: the job has, and spine rows are unaccounted for.
        """
        if ended and self.job.settings.table and self.unaccounted:
            raise MismatchError(
                "Every spine row that a live job accepts has a feature row, is rejected or waits",
                f"{self.unaccounted} of {self.job.table} are none of these",
                "Please report it, with run.json",
            )


def live_features_figures(job: LiveFeaturesJob, status: Head) -> LiveFeaturesFigures:
    """The figures of a job.

    Args:
        job: the job.
        status: status of the last commit; empty if there was none in this run: then the tables have the record.
    """
    store, features = job.settings.store, open_table(job.table)
    records = {name: source_record(store, name) for name in job.topics}
    if status:
        record: CommitRecord | None = CommitRecord.of_json(status)
    else:
        committed = [features_record(job.view, store), *records.values()]
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
    rows_out = 0 if features is None else sum(file.rows for file in data_files(features))
    return LiveFeaturesFigures(job, record, counts, rows_out, None if features is None else features.version())


def unread_messages(job: LiveFeaturesJob, record: CommitRecord | None) -> dict[str, int]:
    """Number of messages after those of a commit, by source; empty if the broker cannot be reached."""
    broker, result = job.required_broker(), dict[str, int]()
    due = {topic: of_topic({} if record is None else record.next_of(name)) for name, topic in job.topics.items()}
    with contextlib.suppress(StoreError):
        check_reachable("The broker", "--bootstrap", broker.bootstrap)
        left = unread_offsets(broker, due)
        result = {name: sum(left[topic].values()) for name, topic in job.topics.items() if topic in left}
    return result
