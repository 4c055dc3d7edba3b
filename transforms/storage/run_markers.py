"""Which runs are at work on a store: each writes a marker when it starts and removes it when it ends.

The marker of a run that was killed stays; it counts for as long as a run may take.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from datetime import UTC, datetime

import pyarrow as pa

from schemas.errors import ConflictError, MillraceError
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import explain_damage, parse_object, read_regular

MARKER = "started.json"
# The pipeline that the marker of an erasure names.
ERASE = "erase"


@dataclasses.dataclass(frozen=True)
class RunMarker:
    """A run that has started and not ended: when it started, and the process that launched it."""

    run_id: str
    pipeline: str
    started: datetime
    host: str
    pid: int

    @property
    def launcher_lives(self) -> bool:
        """Whether the process still exists.  A process of another machine cannot be seen from here."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            return True
        return True

    @property
    def may_be_at_work(self) -> bool:
        """Whether its launching process exists or cannot be seen from here, or its job runs elsewhere."""
        return self.launcher_lives or self.host != socket.gethostname() or self.pipeline.endswith("--streaming")


def write_marker(folder: str, pipeline: str, run_id: str) -> None:
    """Records that the run with this folder has started.

    Raises:
        StoreError: the store cannot be written.
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    entry = {
        "run_id": run_id,
        "pipeline": pipeline,
        "started": started,
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    write_file_atomically(folder, MARKER, pa.py_buffer(json.dumps(entry, indent=2).encode()))


def begin_run(folder: str, pipeline: str, run_id: str) -> None:
    """Writes the marker of a run, then checks that no erasure works on the store; for an erasure, that no run does.

    Args:
        folder: the folder of the run, `<store>/runs/<run>`.

    Raises:
        ConflictError: see `require_no_erasure`; the marker is removed.
        StoreError: the store cannot be written, or a marker cannot be read.
    """
    write_marker(folder, pipeline, run_id)
    try:
        require_no_erasure(folder.rstrip("/").rsplit("/", 2)[0], pipeline, run_id)
    except MillraceError:
        remove_marker(folder)
        raise


def remove_marker(folder: str) -> None:
    """Records that the run has ended."""
    path = FileSystems.join(folder, MARKER)
    if "://" not in path:
        with contextlib.suppress(OSError):
            os.remove(path)
    elif FileSystems.exists(path):
        FileSystems.delete([path])


def running_runs(store: str) -> list[RunMarker]:
    """Every run that has started and not ended, or was killed.

    Raises:
        StoreError: a mark cannot be read.
    """
    return [_read(path) for path in _markers(FileSystems.join(store, "runs"))]


def require_no_erasure(store: str, pipeline: str, run_id: str = "") -> None:
    """Checks that no erasure works on a store; for an erasure, that no run does.

    Each run writes its marker first and then looks for others: if two start at the same time, at least one sees the
        other.

    Args:
        store: its folder; erasures do not work at addresses with a scheme.
        pipeline: the pipeline that checks.
        run_id: its own run, which is left out.

    Raises:
        ConflictError: see above.
        StoreError: a mark cannot be read.
    """
    for each in running_runs(store) if "://" not in store else ():
        if each.run_id != run_id and each.may_be_at_work and ERASE in (pipeline, each.pipeline):
            raise ConflictError(
                "Nothing works on a store while rows are erased from it",
                f"run {each.run_id} ({each.pipeline}), started {each.started:%Y-%m-%d %H:%M} UTC on {each.host}",
                f"Wait for it or stop it. If it was killed, delete {store}/runs/{each.run_id}/{MARKER}",
            )


def _markers(folder: str) -> Iterator[str]:
    if "://" in folder:
        yield from (each.path for each in FileSystems.match([f"{folder}/*/{MARKER}"])[0].metadata_list)
    elif os.path.isdir(folder):
        paths = (os.path.join(entry.path, MARKER) for entry in os.scandir(folder) if entry.is_dir())
        yield from sorted(path for path in paths if os.path.exists(path))


def _read(path: str) -> RunMarker:
    with explain_damage("The mark of a run can be read", path, "If that run has ended, delete the file"):
        entry = parse_object(read_regular(path))
        names = [entry[name] for name in ("run_id", "pipeline", "host")]
        if not all(isinstance(name, str) for name in names) or not isinstance(entry["pid"], int):
            raise ValueError("names of another type than text, or no process")
        started = datetime.fromisoformat(entry["started"])
        if started.tzinfo is None:
            raise ValueError(f"the start {started} has no time zone")
        return RunMarker(names[0], names[1], started, names[2], entry["pid"])
