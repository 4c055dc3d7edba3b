"""Supervision of a live job: it runs until it ends, has committed all input, its topics grow, or a signal stops it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PipelineOptions, PortableOptions
from apache_beam.runners.runner import PipelineResult, PipelineState

from beam_pipelines.runtime.beam_workers import end_bundles_at_once, listen_on_loopback, quiet_lost_connections
from beam_pipelines.runtime.errors import recovered
from beam_pipelines.runtime.run_report import write_json
from schemas.errors import StoreError
from transforms.records.frame_packets import Head
from transforms.storage.stored_json import DAMAGE, parse_object, read_regular
from transforms.streaming.kafka import Broker
from transforms.streaming.kafka_admin import check_reachable, partitions_of, unread_offsets
from transforms.streaming.micro_batches import SKIPPED

log = logging.getLogger("millrace.live")
ENDED = (PipelineState.DONE, PipelineState.FAILED, PipelineState.CANCELLED, PipelineState.UNKNOWN)
# Seconds between two checks of the topics; seconds for the runner to acknowledge a cancellation, and for a cancelled
# job to end.
LOOK, CANCELLED_WITHIN, ENDS_WITHIN = 5.0, 10.0, 30.0
# Seconds without a commit, beyond three commit intervals, after which a backlog is reported.
STILL = 60.0


def check_connections(broker: Broker, options: PipelineOptions) -> None:
    """Check that the broker, the expansion service and the runner of a live job accept connections.

    Raises:
        StoreError: no process listens at one of their addresses.
    """
    check_reachable("The broker", "--bootstrap", broker.bootstrap)
    if broker.expansion is not None:
        check_reachable("The expansion service", "--expansion_service", broker.expansion)
    endpoint = options.view_as(PortableOptions).job_endpoint
    if endpoint and endpoint != "embed":
        check_reachable("The runner", "--job_endpoint", endpoint)


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Handle SIGTERM as Ctrl-C, and set up the workers of this process (see `beam_workers`)."""
    quiet_lost_connections()
    listen_on_loopback()
    end_bundles_at_once()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """The input of a launched job.

    Args:
        broker: the Kafka cluster that has the topics.
        begin: the next offset to read, by topic and partition.
        prefix: the prefix of the topics' names.
        status: path of the job's `status.json`, which each commit replaces.
        commit_every: minimum interval between commits, µs.
        skipped: number of offsets that earlier launches could not read.
    """

    broker: Broker
    begin: Mapping[str, Mapping[int, int]]
    prefix: str
    status: str
    commit_every: int
    skipped: int = 0

    def broker_is_reachable(self) -> bool:
        """Whether the broker accepts connections.  Its client would block for ten seconds, and Ctrl-C with it."""
        try:
            check_reachable("The broker", "--bootstrap", self.broker.bootstrap)
        except StoreError:
            return False
        return True

    def has_new_partitions(self) -> bool:
        """Whether a topic has more partitions than at launch: a running job does not read those."""
        now = partitions_of(self.broker, list(self.begin))
        grown = [topic for topic, count in now.items() if count > len(self.begin[topic])]
        for topic in grown:
            log.warning(
                "%s has %d partitions now, %d before: starting again, with all of them",
                topic,
                now[topic],
                len(self.begin[topic]),
            )
        return bool(grown)

    def backlog(self) -> int:
        """Number of messages after the last commit; 0 while the broker does not respond."""
        committed = read_status(self.status).get("next", {})
        due = {
            topic: {
                number: committed.get(topic.removeprefix(self.prefix), {}).get(str(number), offset)
                for number, offset in partitions.items()
            }
            for topic, partitions in self.begin.items()
        }
        try:
            left = unread_offsets(self.broker, due)
        except StoreError:
            return 0
        return sum(left[topic].get(number, 0) for topic, partitions in self.begin.items() for number in partitions)


def warn_of_loss(begin: Mapping[str, Mapping[int, int]], due: Mapping[str, Mapping[int, int]]) -> None:
    """Warn of messages that the broker deleted before they were read.

    Args:
        begin: the first offset that the broker has, by topic and partition.
        due: the next offset to read, by topic and partition.
    """
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


def skipped_in(status: Head) -> int:
    """Number of offsets that the job could not read, as its last commit counts them."""
    return sum(int(each.get(SKIPPED, 0)) for each in (*status.get("counts", {}).values(), status.get("rows", {})))


def run_until(pipeline: beam.Pipeline, done: Callable[[], bool], text: str, reading: Reading) -> bool:
    """Run the job, and cancel it when `done()`, on a signal, or when a topic has new partitions.

    Args:
        pipeline: an unbounded pipeline.
        done: whether all input is committed; called five times a second.
        text: a message to log when the job has started.
        reading: the job's input.

    Returns:
        Whether the job must be started again, from its last commit and with all partitions.

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
        raise _runner_error(error) from None
    return True


class _Job:
    """A launched job.  Separate threads call the runner, because a frozen or unreachable runner blocks its caller.

    Args:
        result: what `Pipeline.run` returned.
    """

    def __init__(self, result: PipelineResult) -> None:
        self.result = result
        self._state: str | None = None
        self._error: grpc.RpcError | None = None
        threading.Thread(target=self._follow, name="state", daemon=True).start()

    @property
    def state(self) -> str | None:
        """The last state that the runner reported.

        Raises:
            grpc.RpcError: the connection to the runner is lost.
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
        """Cancel the job.  After `CANCELLED_WITHIN` seconds, this no longer waits for the runner.

        Raises:
            grpc.RpcError: the connection to the runner is lost.
        """
        failed: list[Exception] = []

        def request() -> None:
            try:
                self.result.cancel()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=request, name="cancel", daemon=True)
        thread.start()
        thread.join(CANCELLED_WITHIN)
        if failed:
            raise failed[0]
        if thread.is_alive():
            log.warning(
                "the runner has not answered for %.0f s that it stops the job: leaving it.  "
                "Should the job run on there, its table still holds every row once; see the runner's log",
                CANCELLED_WITHIN,
            )


class _InputMonitor:
    """Compares a job's commits with its topics every `LOOK` seconds, and warns of what is wrong.

    Args:
        reading: the job's input.
    """

    def __init__(self, reading: Reading) -> None:
        self.reading, self.skipped = reading, reading.skipped
        self.turn: object = None  # time of the last commit that was seen
        self.looked = self.committed = time.monotonic()

    def has_new_partitions(self) -> bool:
        """Checks the topics if it is time to; returns whether one has partitions that the job does not read."""
        now = time.monotonic()
        if now - self.looked <= LOOK:
            return False
        self.looked = now
        if not self.reading.broker_is_reachable():
            self.committed = now  # there may be nothing to commit
            return False
        grown = self.reading.has_new_partitions()
        status = read_status(self.reading.status)
        self._warn_of_missing_commits(status, now)
        self._warn_of_skipped_offsets(status)
        return grown

    def _warn_of_missing_commits(self, status: Head, now: float) -> None:
        if status.get("turn") != self.turn or not (backlog := self.reading.backlog()):
            self.turn, self.committed = status.get("turn"), now
        elif now - self.committed > STILL + 3e-6 * self.reading.commit_every:
            log.warning(
                "no commit for %.0f s, and %d messages wait: has the runner lost its workers?  Stop this job (Ctrl-C) "
                "and start it again; it goes on from its last commit",
                now - self.committed,
                backlog,
            )
            self.committed = now

    def _warn_of_skipped_offsets(self, status: Head) -> None:
        if (skipped := skipped_in(status)) > self.skipped:
            log.warning(
                "%d offsets were not there to be read: deleted before, compacted away, or a transaction's own; "
                "counted as %s",
                skipped - self.skipped,
                SKIPPED,
            )
            self.skipped = skipped


def _watch(job: _Job, done: Callable[[], bool], reading: Reading) -> bool:
    """Wait until the job ends, or cancel it when it is `done`, on a signal, or when topics have new partitions.

    Returns:
        Whether topics have new partitions.
    """
    monitor, again = _InputMonitor(reading), False
    try:
        while not again:
            if job.state in ENDED:
                if job.state not in (PipelineState.DONE, PipelineState.CANCELLED):
                    _raise_failure(job.result)
                return False
            time.sleep(0.2)
            if done():
                break
            again = monitor.has_new_partitions()
        job.cancel()
    except KeyboardInterrupt:
        log.info("stopping: what is not committed will be read again")
        with contextlib.suppress(grpc.RpcError):  # the runner may be gone already
            job.cancel()
    except grpc.RpcError as error:
        raise _runner_error(error) from None
    return again


def _raise_failure(result: PipelineResult) -> None:
    """Raise the error of a failed job."""
    try:
        result.wait_until_finish()
    except Exception as error:
        known = recovered(error)
        if known is not error:
            raise known from None
        raise _runner_error(error) from None


def _runner_error(error: Exception) -> StoreError:
    """The error of a job that its runner ended, or whose runner is gone."""
    text = str(error.details() if isinstance(error, grpc.Call) else error)
    reason = next((line.strip() for line in text.splitlines() if line.strip()), "no word")
    fix = "See its log, and start it if it is gone; nothing is lost, the same command goes on from the last commit"
    return StoreError("The runner keeps the job running", reason[:500], fix)


def write_status(commit: tuple[bytes, bytes], path: str) -> None:
    """Write the second element of a commit, a JSON object, as the run's status."""
    write_json(path, json.loads(commit[1]))


def read_status(path: str) -> Head:
    """Read the run's status; it is empty before the first commit."""
    try:
        return parse_object(read_regular(path))
    except (OSError, *DAMAGE):
        return {}
