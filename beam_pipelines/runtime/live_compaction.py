"""Compaction during a live job: in a process of its own, which does not delay the feature rows."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence

log = logging.getLogger("millrace.live")
# The minimum interval between two compactions, µs; and seconds within which a child must end when the job ends.
LEAST, ENDS_WITHIN = 1_000_000, 5.0
LOW_PRIORITY = 10  # in the units of `nice`
# Tables that the live jobs write: a job compacts its own.
FEATURES_TABLES = ("sources/*", "features_live/*", "dead_letters/live_*")
PREDICTIONS_TABLES = ("predictions_live/*", "dead_letters/live_predictions_*")


@contextlib.contextmanager
def compacting(store: str, tables: Sequence[str], interval: int) -> Iterator[None]:
    """Runs `millrace compact` for these tables of a store at an interval (µs; 0: never) while the job runs."""
    if interval <= 0 or "://" in store:
        yield
        return
    compactor = _Compactor(store, tuple(tables), max(interval, LEAST) / 1e6)
    thread = threading.Thread(target=compactor.run, name="compaction", daemon=True)
    thread.start()
    try:
        yield
    finally:
        compactor.stop()
        thread.join(ENDS_WITHIN)


class _Compactor:
    """
    Args:
        store: folder of the tables.
        tables: patterns of their names.
        seconds: seconds between two compactions.
    """

    def __init__(self, store: str, tables: tuple[str, ...], seconds: float) -> None:
        self.command = [sys.executable, "-m", "beam_pipelines.cli", "compact", *tables, "--store", store]
        self.seconds = seconds
        self._ended = threading.Event()
        self._child: subprocess.Popen[str] | None = None

    def run(self) -> None:
        """Compacts until `stop`."""
        while not self._ended.wait(self.seconds):
            # It runs in its own session: Ctrl-C reaches only the job, which stops its child.
            self._child = subprocess.Popen(
                self.command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
            with contextlib.suppress(OSError):  # it may have ended already
                os.setpriority(os.PRIO_PROCESS, self._child.pid, LOW_PRIORITY)
            _, errors = self._child.communicate()
            if self._child.returncode and not self._ended.is_set():
                lines = [line for line in errors.splitlines() if line.strip()]
                log.warning("compaction failed, and will be tried again: %s", " ".join(lines[-3:])[:500] or "no word")

    def stop(self) -> None:
        """Ends the running compaction; files that it has written are left to vacuum."""
        self._ended.set()
        child = self._child
        if child is not None and child.poll() is None:
            child.terminate()
