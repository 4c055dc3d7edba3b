"""Errors on the command line: one message, an exit code, and the command that resumes the run.

A portable runner passes on a worker's error as the text of its traceback alone, so `recovered` and the log filter
have to parse that text.
"""

from __future__ import annotations

import functools
import logging
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from beam_pipelines.runtime.interrupts import INTERRUPT, STOPPED
from beam_pipelines.runtime.protection import protected_output, without_secrets
from schemas import errors
from schemas.errors import DefinitionError, MillraceError, StoreError

if TYPE_CHECKING:
    from beam_pipelines.runtime.run_report import Run

ERROR = re.compile(r"schemas\.errors\.(\w+Error): (.*)$", re.MULTILINE)
STEP = re.compile(r" ?\[while running '([^']*)'\]\.?")


class Translated(Exception):
    """Beam's `--dry_run` has reached the point of submission.  This is not an error: the command exits with 0."""


def recovered(error: BaseException) -> BaseException:
    """The MillraceError that a runner's `error` reports, with the name of the step; otherwise `error` itself."""
    text = str(error)
    step = STEP.search(text)
    where = f"It happened in step {step[1]!r}" if step else ""
    if isinstance(error, MillraceError):
        return type(error)(STEP.sub("", text), None, where) if step else error
    found = ERROR.findall(text)
    if not found:
        return error
    kind, message = found[-1]
    return getattr(errors, kind, MillraceError)(STEP.sub("", message), None, where)


def is_traceback_of_millrace_error(record: logging.LogRecord) -> bool:
    """Whether Beam logs the traceback of a MillraceError."""
    return bool(record.exc_info and isinstance(record.exc_info[1], MillraceError)) or (
        "schemas.errors." in record.getMessage()
    )


def guard(main: Callable[[Sequence[str]], int]) -> Callable[[Sequence[str]], int]:
    """Wrap `main`: a MillraceError becomes an exit code and a message, with the command that resumes the run."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str]) -> int:
        try:
            with protected_output():
                return reported(argv)
        except DefinitionError as error:  # raised for MILLRACE_UMASK
            print(f"millrace: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    def reported(argv: Sequence[str]) -> int:
        try:
            return main(argv)
        except BaseException as error:
            if not (isinstance(error, KeyboardInterrupt) or INTERRUPT.came):
                return report_error(error, argv)
            run = getattr(error, "run", None)
            how = "run the same command again" if run is None else f"to resume run {run.figures['run_id']}: "
            INTERRUPT.report(how + ("" if run is None else resume_command(run, argv)))
            return STOPPED

    return guarded


def report_error(error: BaseException, argv: Sequence[str]) -> int:
    """Prints why a command ended; returns the exit code, or raises `error` again if its kind is unknown."""
    known = error if isinstance(error, MillraceError) else as_store_error(error)
    if isinstance(error, Translated):
        print(f"millrace: {error}", flush=True)
        return 0
    if known is not None:
        print(f"millrace: {known}{resume_hint(error, argv)}", file=sys.stderr, flush=True)
        return known.exit_code
    if isinstance(
        error, Exception
    ):  # it is printed here, because Python itself would print control characters from data
        traceback.print_exception(error)
        how = resume_hint(error, argv)
        print(f"millrace: this is a defect, nothing half-done is visible{how}", file=sys.stderr, flush=True)
        return 70
    raise error


# Packages whose errors mean that an object store, or access to it, failed.
_OBJECT_STORES = ("apache_beam.io.filesystem", "botocore.", "google.api_core.", "google.auth.", "google.cloud.")


def as_store_error(error: BaseException) -> StoreError | None:
    """`error` as one message if a file system of Beam or an object store raised it; None if something else did."""
    if not type(error).__module__.startswith(_OBJECT_STORES):
        return None
    reason = " ".join(str(error).split()) or type(error).__name__
    return StoreError("The store can be reached, read and written", reason, "Check the address, and the access to it")


def resume_hint(error: BaseException, argv: Sequence[str]) -> str:
    """Lines that name the run that `error` ended, its table and dates, and the command that resumes it."""
    run = getattr(error, "run", None)
    if run is None:
        return ""
    where = f": {run.where}" if run.where else ""
    resume = resume_command(run, argv)
    return f"\n  in run {run.figures['run_id']} of {run.pipeline}{where}\n  to resume: {resume}"


def resume_command(run: Run, argv: Sequence[str]) -> str:
    """The command that resumes a run."""
    command, run_id = run.pipeline.split()[0], str(run.figures["run_id"])
    words = list(argv[1:] if argv and argv[0] == command else argv)
    kept = [
        word
        for i, word in enumerate(words)
        if not word.startswith("--run_id=") and word != "--run_id" and (i == 0 or words[i - 1] != "--run_id")
    ]
    return without_secrets(shlex.join(["millrace", command, *kept, *run.words, "--run_id", run_id]))
