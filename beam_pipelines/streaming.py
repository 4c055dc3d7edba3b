"""Live jobs: run until they end, are told everything, or somebody says stop."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import apache_beam as beam
from apache_beam.runners.runner import PipelineState

from beam_pipelines.reporting import write_json

log = logging.getLogger("millrace.live")
ENDED = (PipelineState.DONE, PipelineState.FAILED, PipelineState.CANCELLED, PipelineState.UNKNOWN)


def run_until(pipeline: beam.Pipeline, done: Callable[[], bool], text: str) -> bool:
    """Run the job and cancel it once `done()`, on SIGINT or SIGTERM; whether it was done.

    Args:
        pipeline: unbounded.
        done: whether all was told and is committed; asked five times a second.
        text: logged when it runs.
    """
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        result = pipeline.run()
        log.info(text)
        return watch(result, done)
    finally:
        signal.signal(signal.SIGTERM, before)


def watch(result: Any, done: Callable[[], bool]) -> bool:
    """Wait until the job ends, `done()`, or a signal comes; whether it was done."""
    try:
        while result.state not in ENDED:
            time.sleep(0.2)
            if done():
                result.cancel()
                return True
        if result.state not in (PipelineState.DONE, PipelineState.CANCELLED):
            result.wait_until_finish()
        return result.state == PipelineState.DONE
    except KeyboardInterrupt:
        log.info("stopping: what is not committed will be read again")
    result.cancel()
    return False


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
