"""Live jobs: run until they end, are told everything, topics grow, or somebody says stop."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions
from apache_beam.runners.runner import PipelineState
from apache_beam.runners.worker import sdk_worker

from beam_pipelines.runtime.errors import recovered
from beam_pipelines.runtime.run_report import write_json
from schemas.errors import StoreError
from transforms.streaming.kafka import Broker
from transforms.streaming.kafka_admin import check_reachable, partitions_of, unread
from transforms.streaming.micro_batches import SKIPPED

log = logging.getLogger("millrace.live")
ENDED = (PipelineState.DONE, PipelineState.FAILED, PipelineState.CANCELLED, PipelineState.UNKNOWN)
# What of Beam's speaks in workers of a launcher whose runner has gone.
WORKER = tuple(
    logging.getLogger(f"apache_beam.runners.worker.{name}") for name in ("data_plane", "sdk_worker", "log_handler")
)
# Seconds between looks at the topics' partitions, that a runner may take to answer, and that a cancelled job may take to end.
LOOK, CANCELLED_WITHIN, ENDS_WITHIN = 5.0, 10.0, 30.0
# Seconds, beside three commits' time, without a commit while messages wait: then it is said.
STILL = 60.0


def check_connections(broker: Broker, options: PipelineOptions) -> None:
    """See that all a live job stands on is there, before it is started.

    Raises:
        StoreError: nobody listens at the address of broker, expansion service or runner.
    """
    check_reachable("The broker", "--bootstrap", broker.bootstrap)
    if broker.expansion is not None:
        check_reachable("The expansion service", "--expansion_service", broker.expansion)
    endpoint = options.view_as(PortableOptions).job_endpoint
    if endpoint and endpoint != "embed":
        check_reachable("The runner", "--job_endpoint", endpoint)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGTERM is heard as Ctrl-C, and Beam's threads that lose a runner leave it to the launcher to say so."""
    _quiet_logs()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@functools.cache
def _quiet_logs() -> None:
    """Keep Beam's threads quiet when they lose their runner: the launcher reports that once, in its own words.

    It stays so until the process ends, for some of the threads outlive the job.
    """
    hook = threading.excepthook

    def quietly(died: threading.ExceptHookArgs) -> None:
        if not isinstance(died.exc_value, grpc.RpcError):
            hook(died)

    threading.excepthook = quietly
    # `SdkHarness._execute` prints a traceback and logs it too; the filter below reaches only what is logged.  Beam declined
    # to remove such a repetition (apache/beam pull request 5020).  A test fails once Beam no longer prints it.
    sdk_worker.print = lambda *_, **__: None
    for each in WORKER:
        each.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], grpc.RpcError)))


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """What a launched job reads.

    Args:
        broker: where the topics are.
        begin: next offset per topic and partition.
        prefix: before the topics' names.
        status: file in which the job's commits say how far they are.
        commit_every: least time between them, µs.
        skipped: offsets that were not there to be read, in all launches before.
    """

    broker: Broker
    begin: Mapping[str, Mapping[int, int]]
    prefix: str
    status: str
    commit_every: int
    skipped: int = 0

    def there(self) -> bool:
        """Whether the broker can be asked: its client waits ten seconds for one that is away, and Ctrl-C with it."""
        try:
            check_reachable("The broker", "--bootstrap", self.broker.bootstrap)
        except StoreError:
            return False
        return True

    def grown(self) -> bool:
        """Whether a topic has more partitions than it had, which no reader would notice."""
        now = partitions_of(self.broker, list(self.begin))
        more = [topic for topic, count in now.items() if count > len(self.begin[topic])]
        for topic in more:
            log.warning(
                "%s has %d partitions now, %d before: starting again, with all of them",
                topic,
                now[topic],
                len(self.begin[topic]),
            )
        return bool(more)

    def unread(self) -> int:
        """Messages behind the last commit; 0 while the broker does not say."""
        status = read_status(self.status).get("next", {})
        due = {
            topic: {
                number: status.get(topic.removeprefix(self.prefix), {}).get(str(number), offset)
                for number, offset in partitions.items()
            }
            for topic, partitions in self.begin.items()
        }
        try:
            left = unread(self.broker, due)
        except StoreError:
            return 0
        return sum(left[topic].get(number, 0) for topic, partitions in self.begin.items() for number in partitions)


def warn_of_loss(begin: Mapping[str, Mapping[int, int]], due: Mapping[str, Mapping[int, int]]) -> None:
    """Say which messages (next offset `due` per topic and partition) were deleted before they were read."""
    for topic, partitions in begin.items():
        for number, first in partitions.items():
            if due[topic][number] < first:
                log.warning(
                    "%s/%d: the broker no longer has offsets %d to %d, which were not read; they are counted as %s",
                    topic,
                    number,
                    due[topic][number],
                    first - 1,
                    SKIPPED,
                )


def skipped_in(status: Mapping[str, Any]) -> int:
    """Offsets that were not there to be read, as a job's commit counts them."""
    return sum(int(each.get(SKIPPED, 0)) for each in (*status.get("counts", {}).values(), status.get("rows", {})))


def run_until(pipeline: beam.Pipeline, done: Callable[[], bool], text: str, reading: Reading) -> bool:
    """Run the job and cancel it once `done()`, on a signal, or as a topic has got more partitions, which no reader would notice.

    Args:
        pipeline: unbounded.
        done: whether all was told and is committed; asked five times a second.
        text: logged when it runs.
        reading: what it reads.

    Returns:
        Whether it is to be started again, from its last commit, with all partitions.

    Raises:
        MillraceError: the job failed.
    """
    job = _Job(pipeline.run())
    log.info(text)
    if not _watch(job, done, reading):
        return False
    deadline = time.monotonic() + ENDS_WITHIN
    try:
        while job.state not in ENDED and time.monotonic() < deadline:
            time.sleep(0.1)
    except grpc.RpcError as error:
        raise _gone(error) from None
    return True


class _Job:
    """A launched job, asked by threads of their own: a runner that is frozen, or behind a broken network, answers nobody.

    Args:
        result: what Beam gave for it.
    """

    def __init__(self, result: Any) -> None:
        self.result = result
        self._state: str | None = None
        self._error: grpc.RpcError | None = None
        threading.Thread(target=self._follow, name="state", daemon=True).start()

    @property
    def state(self) -> str | None:
        """As the runner told it last.

        Raises:
            grpc.RpcError: the runner is gone.
        """
        if self._error is not None:
            raise self._error
        return self._state

    def _follow(self) -> None:
        try:
            while self._state not in ENDED:
                self._state = self.result.state
                time.sleep(0.2)
        except grpc.RpcError as error:
            self._error = error

    def cancel(self) -> None:
        """Have it cancelled; a runner that does not answer within `CANCELLED_WITHIN` seconds is left to itself.

        Raises:
            grpc.RpcError: the runner is gone.
        """
        failed: list[Exception] = []

        def ask() -> None:
            try:
                self.result.cancel()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=ask, name="cancel", daemon=True)
        thread.start()
        thread.join(CANCELLED_WITHIN)
        if failed:
            raise failed[0]
        if thread.is_alive():
            log.warning(
                "the runner has not answered for %.0f s that it stops the job: leaving it.  Should the job run on there, its "
                "table still holds every row once; see the runner's log",
                CANCELLED_WITHIN,
            )


def _watch(job: _Job, done: Callable[[], bool], reading: Reading) -> bool:
    """Wait until the job ends, it is `done`, a signal comes, or topics have grown; whether they have."""
    again, looked = False, time.monotonic()
    turn, since, skipped = None, looked, reading.skipped
    try:
        while not again:
            if job.state in ENDED:
                if job.state not in (PipelineState.DONE, PipelineState.CANCELLED):
                    _failed(job.result)
                return False
            time.sleep(0.2)
            if done():
                break
            now = time.monotonic()
            if now - looked <= LOOK:
                continue
            looked = now
            if not reading.there():
                since = now
                continue
            again = reading.grown()
            status = read_status(reading.status)
            if status.get("turn") != turn or not (unread := reading.unread()):
                turn, since = status.get("turn"), now
            elif now - since > STILL + 3e-6 * reading.commit_every:
                log.warning(
                    "no commit for %.0f s, and %d messages wait: has the runner lost its workers?  Stop this job (Ctrl-C) "
                    "and start it again; it goes on from its last commit",
                    now - since,
                    unread,
                )
                since = now
            if (gone := skipped_in(status)) > skipped:
                log.warning(
                    "%d offsets were not there to be read: deleted before, compacted away, or a transaction's own; counted as %s",
                    gone - skipped,
                    SKIPPED,
                )
                skipped = gone
        job.cancel()
    except KeyboardInterrupt:
        log.info("stopping: what is not committed will be read again")
        with contextlib.suppress(grpc.RpcError):  # it was gone before
            job.cancel()
    except grpc.RpcError as error:
        raise _gone(error) from None  # as it was killed
    return again


def _failed(result: Any) -> None:
    """Raise what a failed job failed of."""
    try:
        result.wait_until_finish()
    except Exception as error:
        known = recovered(error)
        if known is not error:
            raise known from None
        raise _gone(error) from None


def _gone(error: Exception) -> StoreError:
    """The error of a job that its runner ended, or that ended with its runner, for a reason that is none of ours."""
    said = str(error.details() if isinstance(error, grpc.Call) else error)
    reason = next((line.strip() for line in said.splitlines() if line.strip()), "no word")
    fix = "See its log, and start it if it is gone; nothing is lost, the same command goes on from the last commit"
    return StoreError("The runner keeps the job running", reason[:500], fix)


def write_status(commit: tuple[bytes, bytes], path: str) -> None:
    """What a commit told, as the run's status."""
    write_json(path, json.loads(commit[1]))


def read_status(path: str) -> dict[str, Any]:
    """The run's status; empty before its first commit."""
    try:
        with open(path) as handle:
            return dict(json.load(handle))
    except (OSError, ValueError):
        return {}
