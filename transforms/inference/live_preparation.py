"""The decisions of a live inference job before its graph is built: first model, output tables and topics, offsets."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import uuid
from collections.abc import Mapping

from schemas.errors import MillraceError, StoreError
from schemas.live import live_predictions
from schemas.views import FeatureView
from transforms.inference.champion_model import Serving, check_model, open_checked
from transforms.inference.live_output import Outlet, begin_at
from transforms.inference.live_records import ScoringState, next_offsets
from transforms.models.bundle import load_bundle
from transforms.models.registry import CHAMPION, Registry
from transforms.models.scoring import ARM, PinnedModel
from transforms.records.frame_packets import Head
from transforms.storage.delta_tables import data_files, open_table
from transforms.storage.paths import features_live_uri
from transforms.streaming.kafka import Broker, begin_offsets, ensure_topics, topic_of
from transforms.streaming.kafka_admin import unread_offsets
from transforms.streaming.live_job import LiveJob
from transforms.streaming.live_tables import application_of, last_commit_record
from transforms.streaming.micro_batches import SKIPPED

log = logging.getLogger("millrace.serving")


@dataclasses.dataclass(frozen=True, eq=False)
class LiveInferenceRequest:
    """What a live inference job is to do.

    Args:
        job: where the job reads and writes; a replay reads the live feature table instead of the features topic.
        registry: MLflow tracking URI.
        alias: the version with this alias scores.
        poll: interval between reads of the alias, µs.
        threads: XGBoost threads per worker.
        pace: replay: time between messages, µs.
        commit_every: minimum interval between commits, µs.
    """

    job: LiveJob
    registry: str
    alias: str
    poll: int
    threads: int
    pace: int
    commit_every: int

    @property
    def view(self) -> FeatureView:
        return self.job.definition.view

    @property
    def model(self) -> str:
        """The registered name."""
        return self.job.definition.require_model().name

    @property
    def name(self) -> str:
        """The name in output tables and topics: the model's; for another alias than the champion's, with that alias."""
        return self.model if self.alias == CHAMPION else f"{self.model}.{self.alias}"

    @property
    def topic(self) -> str:
        """The topic of feature rows."""
        return topic_of(self.view, self.job.prefix)

    @property
    def train_command(self) -> str:
        """The command that trains a model of the definition."""
        return shlex.join(["millrace", "training", "--definition", self.job.definition.name, "--store", self.job.store])


@dataclasses.dataclass(frozen=True, eq=False)
class LiveInferencePlan:
    """What one launch of the job does.

    Args:
        request: the job.
        serving: the settings of scoring, with the first model.
        outlet: where predictions are written.
        start: the state from which the job continues.
        first_available: first offset by partition that the topic still has; empty for a replay.
        group: the consumer group of the launch.
    """

    request: LiveInferenceRequest
    serving: Serving
    outlet: Outlet
    start: ScoringState
    first_available: Mapping[int, int]
    group: str

    @property
    def broker(self) -> Broker:
        """The broker of a job that reads or writes topics."""
        assert self.request.job.broker is not None
        return self.request.job.broker

    @property
    def finished(self) -> bool:
        """Whether all rows were scored before the launch, so that the last commit is at the end of every partition."""
        return self.start.at_end and self._nothing_unread(self.start.next)

    def finished_at(self, status: Head) -> bool:
        """Whether all rows are scored and committed.

        Args:
            status: status of the last commit; empty before the first.
        """
        if not status.get("last") or int(status["turn"]) <= self.start.turn:
            return False
        return self._nothing_unread(next_offsets(status, self.start.source))

    def _nothing_unread(self, due: Mapping[int, int]) -> bool:
        """Whether no message follows the ends, as one does after a restart of the features job."""
        try:
            left = unread_offsets(self.broker, {self.request.topic: due})[self.request.topic]
        except StoreError:  # the next call tries the broker again
            return False
        return all(number in due and not count for number, count in left.items())


def prepare_live_inference(request: LiveInferenceRequest) -> LiveInferencePlan:
    """Find the first model and the offsets to read from, check the inputs and outputs, and create missing topics.

    Raises:
        StoreError: no model has the alias, or there is no broker, topic or live feature table.
        MismatchError: the model or the predictions table was made for other features.
    """
    view = request.view
    outlet = Outlet(
        view,
        request.name,
        request.job.store,
        request.job.run_id,
        prefix=request.job.prefix,
        table="table" in request.job.sinks,
        commit_every=request.commit_every,
        kafka=None if request.job.replaying else request.job.broker,
        arm=ARM if request.alias == CHAMPION else request.alias,
    )
    serving = first_model(request, outlet)
    outlet = dataclasses.replace(outlet, classes=serving.classes)
    check_live_target(outlet)
    first_available: Mapping[int, int] = {}
    if request.job.replaying:
        check_replayable(request)
    else:
        assert request.job.broker is not None
        first_available = begin_offsets(request.job.broker, [request.topic])[request.topic]
    if "topic" in request.job.sinks:
        assert request.job.broker is not None
        ensure_topics(request.job.broker, outlet.topics)
    log.info("version %s of %r serves from the start", serving.first.version, request.model)
    start = begin_at(outlet, first_available or {0: 0})
    group = f"millrace-{outlet.model}-{request.job.run_id}-{uuid.uuid4().hex[:8]}"
    return LiveInferencePlan(request, serving, outlet, start, first_available, group)


def check_replayable(request: LiveInferenceRequest) -> None:
    """
    Raises:
        StoreError: there is no live feature table.
    """
    uri = features_live_uri(request.job.store, request.view.name, request.view.fingerprint)
    if open_table(uri) is None:
        fix = "Run first: millrace features --streaming, or read a topic with --source kafka"
        raise StoreError("A replay reads the live feature table", f"no table at {uri}", fix)


def first_model(request: LiveInferenceRequest, outlet: Outlet) -> Serving:
    """The version with the alias.  If it is broken, the version of the last commit, and an error is logged.

    Raises:
        StoreError: no version has the alias, or the registry or the files cannot be read.
        MismatchError: the version was trained on other features, and no version served before.
    """
    name, registry = request.model, Registry(request.registry)
    version = registry.bearer(name, request.alias)
    if version is None:
        value = f"no version of {name!r} has the alias {request.alias!r} in {request.registry}"
        fix = f"Train one with: {request.train_command}; or: millrace promote VERSION --why …"
        raise StoreError("A live job has a model before it starts", value, fix)
    try:
        return serving_with(request, outlet, registry, version)
    except MillraceError as error:
        before = last_commit_record(open_table(outlet.uri), application_of(outlet.model)).get("version")
        if before is None or before == version:
            raise
        log.error(
            "version %s of %r is refused, version %s, which served before, serves on: %s", version, name, before, error
        )
        return serving_with(request, outlet, registry, str(before))


def serving_with(request: LiveInferenceRequest, outlet: Outlet, registry: Registry, version: str) -> Serving:
    """The settings of scoring with a first version, which is loaded and checked.

    Raises:
        StoreError: its files are missing or altered.
        MismatchError: it was trained on other features.
    """
    _, folder, digest = registry.locate(request.model, version)
    bundle = load_bundle(folder, digest)
    check_model(bundle, version, request.view, request.train_command)
    serving = Serving(
        request.registry,
        request.model,
        request.view,
        PinnedModel(folder, version, digest),
        classes=bundle.classes,
        alias=request.alias,
        arm=outlet.arm,
        poll=request.poll,
        threads=request.threads,
    )
    open_checked(serving, serving.first)
    return serving


def check_live_target(outlet: Outlet) -> None:
    """
    Raises:
        StoreError: the predictions table has other columns, such as those of another number of classes.
    """
    table, wanted = open_table(outlet.uri), live_predictions(outlet.view, outlet.classes)
    if table is not None and (found := {field.name for field in table.schema().fields}) != set(wanted.names):
        value = f"{outlet.uri}: only one of them has {', '.join(sorted(found ^ set(wanted.names)))}"
        fix = "Give the model a new name, or move the old table away"
        raise StoreError("The table of live predictions has this model's columns", value, fix)


def live_inference_figures(plan: LiveInferencePlan, status: Head) -> dict[str, object]:
    """The figures of `run.json`.

    Args:
        plan: the last launch.
        status: status of the last commit; empty if there was none.
    """
    table, rows = open_table(plan.outlet.uri), status.get("rows", {})
    return {
        "rows_in": rows.get("read", 0),
        "rows_out": 0 if table is None else sum(file.rows for file in data_files(table)),
        "repeated": rows.get("repeated", 0),
        "set_aside": rows.get("letters", 0),
        SKIPPED: rows.get(SKIPPED, 0),
        "swaps": status.get("swaps", []),
        "refused": status.get("refused", []),
        "by_version": status.get("by_version", {}),
        "model": plan.request.model,
        "model_version": status.get("version", plan.serving.first.version),
        "fingerprint": plan.request.view.fingerprint,
        "predictions": plan.outlet.uri,
        "commit_version": None if table is None else table.version(),
    }
