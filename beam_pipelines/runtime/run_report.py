"""The report of a run: progress on the terminal, a closing table, and `run.json`."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from beam_pipelines.runtime.errors import Translated, is_traceback_of_millrace_error, recovered
from beam_pipelines.runtime.protection import printable, terminal_of, without_secrets
from schemas import errors
from schemas.errors import MillraceError, in_one_line
from transforms.records.frame_packets import Head
from transforms.storage import durable
from transforms.storage.file_systems import FileSystems
from transforms.storage.run_markers import MARKER, begin_run, remove_marker
from transforms.storage.stored_json import read_object

if TYPE_CHECKING:
    import apache_beam as beam
    from apache_beam.runners.runner import PipelineResult

log = logging.getLogger("millrace")


class Run:
    """The figures of one run.  As a context manager, it prints them at the end and writes `<folder>/run.json`.

    with Run("features", run_id, folder) as run:
        run["rows out"] = 336776
    """

    def __init__(self, pipeline: str, run_id: str, folder: str, quiet: bool = False) -> None:
        self.pipeline, self.folder, self.quiet = pipeline, folder, quiet
        self.figures: dict[str, object] = {"pipeline": pipeline, "run_id": run_id}
        self.where = ""  # its table and dates, for messages
        self.words: tuple[str, ...] = ()  # flags that choose what the command works on, for the command that resumes it
        progress()

    def __setitem__(self, name: str, value: object) -> None:
        self.figures[name] = value

    def update(self, figures: Mapping[str, object]) -> None:
        self.figures.update(figures)

    def __enter__(self) -> Run:
        self.start = time.perf_counter()
        self._alone()
        try:
            begin_run(self.folder, self.pipeline, str(self.figures["run_id"]))
        except (MillraceError, KeyboardInterrupt) as error:
            error.run = self  # type: ignore[union-attr]
            raise
        return self

    def _alone(self) -> None:
        """Refuses a run id that another pipeline has used, because both would write the same files."""
        for name in (MARKER, "run.json"):
            try:
                other = read_json(FileSystems.join(self.folder, name))["pipeline"]
            except Exception:  # each of Beam's file systems has its own error for a missing file
                continue
            if other != self.pipeline:
                raise errors.DefinitionError(
                    "A --run_id names one run of one pipeline",
                    f"{self.figures['run_id']!r}, which is a run of {other} in {self.folder}",
                    "Choose another, or leave it out and have one made up",
                )

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            error.run = self  # type: ignore[attr-defined]  # `guard` prints how to resume it
        if error is None or isinstance(error, MillraceError):
            remove_marker(self.folder)  # after another error the job may still run elsewhere
        if error is not None:
            return
        seconds = time.perf_counter() - self.start
        self.figures["seconds"] = round(seconds, 3)
        rows = self.figures.get("rows_out")
        if isinstance(rows, int) and rows:
            self.figures["rows_per_second"] = round(rows / max(seconds, 1e-9))
        write_json(FileSystems.join(self.folder, "run.json"), self.figures)
        if not self.quiet:
            print(figures_table(self.pipeline, self.figures), flush=True)


def figures_table(title: str, figures: dict[str, object]) -> str:
    """The figures as lines of a name and a value; nested figures are only in `run.json`."""
    flat = {
        name.replace("_", " "): _text(value)
        for name, value in figures.items()
        if not isinstance(value, dict | list) and name != "pipeline"
    }
    tallies = figures.get("sources")
    for source, tally in tallies.items() if isinstance(tallies, dict) else ():
        flat[source] = ", ".join(f"{count:,} {what}" for what, count in tally.items() if count)
    width = max(map(len, flat), default=0)
    lines = [f"\n{title}", *(f"  {name:<{width}}  {value}" for name, value in flat.items())]
    views = figures.get("views")
    lines += (
        [figures_table(f"{title}: {name}", each) for name, each in views.items()] if isinstance(views, dict) else []
    )
    return "\n".join(lines)


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return (
        f"{value:,.4g}"
        if isinstance(value, float) and abs(value) < 1000
        else f"{value:,.0f}"
        if isinstance(value, float)
        else in_one_line(str(value))
    )


def write_json(path: str, value: object) -> None:
    """Writes `value` as a JSON file; on a local disk, atomically and durably."""
    text = without_secrets(json.dumps(value, indent=2, default=str)) + "\n"
    if "://" in path:
        with FileSystems.create(path, mime_type="application/json") as handle:
            handle.write(text.encode())
        return
    try:
        durable.write_file(path, text.encode())
    except OSError as error:
        raise errors.StoreError(
            "The store can be written",
            f"{path}: {error.strerror}",
            "Free space or grant access, then run the same command again",
        ) from None


def read_json(path: str) -> Head:
    """Reads the JSON object in a file.

    Raises:
        StoreError: it cannot be read, or has other content.
    """
    rule, fix = "A file of a run is a JSON object", "Restore the file, or run again under another --run_id"
    return read_object(path, rule, fix)


def progress() -> None:
    """Prints the library's log records: on a terminal, each replaces the last; elsewhere, line by line."""
    if not log.handlers:
        log.addHandler(_Progress())
        log.setLevel(logging.INFO)
        log.propagate = False
        for name in (
            "apache_beam.runners.common",
            "apache_beam.runners.worker.sdk_worker",
            "apache_beam.runners.portability.fn_api_runner.fn_runner",
            "root",  # logs the messages of a portable runner
        ):
            logging.getLogger(name).addFilter(lambda record: not is_traceback_of_millrace_error(record))


class _Progress(logging.StreamHandler):  # type: ignore[type-arg]
    def __init__(self) -> None:
        super().__init__(sys.stderr)
        self.over = sys.stderr.isatty()

    def emit(self, record: logging.LogRecord) -> None:
        line = in_one_line(f"{record.name.removeprefix('millrace.')}: {record.getMessage()}")
        try:
            if self.over and record.levelno < logging.WARNING:
                terminal_of(sys.stderr).write(f"\r\x1b[K{printable(line)[:100]}")
            else:
                terminal_of(sys.stderr).write(f"{printable(line)}\n")
            sys.stderr.flush()
        except (OSError, ValueError):
            pass


def execute(pipeline: beam.Pipeline) -> PipelineResult:
    """Run the pipeline to its end.

    Raises:
        MillraceError: a step raised it, on any worker.
        Translated: the flags contain `--dry_run`.
    """
    # Commands without a pipeline do not import Beam.
    from apache_beam.options.pipeline_options import TestOptions

    from beam_pipelines.runtime.beam_workers import end_bundles_at_once, listen_on_loopback

    result = None
    listen_on_loopback()
    end_bundles_at_once()
    try:
        result = pipeline.run()
        result.wait_until_finish()
    except Exception as error:
        known = recovered(error)
        if known is error:
            raise
        raise known from None
    finally:
        if sys.stderr.isatty():
            terminal_of(sys.stderr).write("\r\x1b[K")
    if (job := getattr(result, "job", None)) is not None and pipeline.options.view_as(TestOptions).dry_run:
        raise Translated(f"translated {len(job.proto_pipeline.components.transforms)} steps; a dry run submits nothing")
    return result
