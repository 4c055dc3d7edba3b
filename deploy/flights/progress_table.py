"""The line of figures that a live run prints while it works."""

from __future__ import annotations

import shutil
import sys
import time
from datetime import UTC, datetime
from typing import TypedDict

from deploy.flights.case import Figures
from deploy.flights.watch import Watch
from transforms.records.times import FOREVER


class Sent(TypedDict):
    """The producer's progress: rows sent, the time of the last (µs), and rows per partition of each topic."""

    done: bool
    rows: int
    time: int
    sent: dict[str, list[int]]


class ProgressTable:
    """A line of figures: on a terminal it replaces itself and is never wider than the terminal; elsewhere it is printed
    every five seconds."""

    COLUMNS = (
        ("sent to", 11),
        ("events", 10),
        ("complete", 11),
        ("spine", 9),
        ("computed", 9),
        ("lag s", 5),
        ("predicted", 9),
        ("model", 5),
    )

    # If there is space: the size of the features job's state.
    WIDE = (("held MB", 7), ("held rows", 9))

    def __init__(self) -> None:
        self.over, self.last = sys.stdout.isatty(), 0.0
        whole = self.COLUMNS + self.WIDE
        fits = shutil.get_terminal_size().columns > sum(width + 1 for _, width in whole)
        self.columns = whole if fits else self.COLUMNS
        self._write(" ".join(f"{name:>{width}}" for name, width in self.columns) + "\n")

    def __call__(
        self, sent: Sent, status: Figures, spine_rows: int, watch: Watch, lag: float | None, now: bool = False
    ) -> None:
        """Print the line if it is due.

        Args:
            sent: the producer's progress.
            status: the features job's `status.json`; empty before its first commit.
            spine_rows: number of spine rows sent.
            watch: what has been published.
            lag: seconds between the newest event sent and the newest spine row computed.
            now: print it in any case.
        """
        if not self.over and not now and time.monotonic() - self.last < 5:
            return
        self.last = time.monotonic()
        newest = max(watch.version_since, key=lambda version: watch.version_since[version], default="")
        values = (
            _instant(sent["time"]),
            f"{sent['rows']:,}",
            _instant(_watermark(status)),
            f"{spine_rows:,}",
            f"{len(watch.computed):,}",
            "" if lag is None else f"{lag:.1f}",
            f"{len(watch.predicted):,}",
            newest and f"v{newest}",
            *(
                f"{_held(status, what) / per:,.{digits}f}" if status else ""
                for what, per, digits in (("bytes", 1e6, 1), ("rows", 1, 0))
            ),
        )
        line = " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, self.columns, strict=False))
        # The old line is overwritten, and the rest of it cleared afterwards: clearing it first would flicker.
        self._write(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K" if self.over else f"{line}\n")

    def end(self) -> None:
        if self.over:
            self._write("\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def _instant(moment: int) -> str:
    if moment >= FOREVER:
        return "end"
    return datetime.fromtimestamp(moment / 1e6, UTC).strftime("%m-%d %H:%M") if moment > 0 else ""


def _watermark(status: Figures) -> int:
    """The time up to which all sources are complete, µs."""
    return min((each["settled"] for each in status.get("clock", {}).values()), default=0)


def _held(status: Figures, what: str) -> int:
    """Rows or bytes in the state of the job."""
    return sum(each[what] for each in status["state"].values())
