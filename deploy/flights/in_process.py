"""The month replayed in this process, without Kafka and Prism."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from beam_pipelines.runtime.run_report import read_json
from deploy.flights.case import Case, Figures, swapping


def in_process(case: Case) -> Figures:
    """Replays the month through the same steps on the runner in this process, then scores its feature rows; the
    champion changes halfway."""
    from beam_pipelines import features_streaming, inference_streaming

    between = ["--start", case.start, "--end", case.end]
    flags = ["--streaming", "--source=replay", "--chunk=6h", "--sources", str(case.store / "sources"), *between]
    features_streaming.main([*case.common, "--run_id", "live", *flags])
    found = read_json(os.path.join(case.live, "runs", "live", "run.json"))
    figures = {
        "mode": "replay in one process",
        "events": found["rows_in"],
        "questions": found["counts"][case.view.spine.name]["rows"],
        "answered": found["rows_out"],
        "seconds": found["seconds"],
    }
    if case.first:
        log = logging.getLogger("millrace.serving")
        with swapping(case) as swap:
            log.addHandler(halfway := Halfway(swap))
            try:
                paced = ["--streaming", "--source=replay", "--poll=100ms", "--pace=100ms"]
                inference_streaming.main([*case.common, *case.registry, "--run_id", "inference", *paced])
            finally:
                log.removeHandler(halfway)
        made = read_json(os.path.join(case.live, "runs", "inference", "run.json"))
        figures |= {
            "predicted": made["rows_out"],
            "by_version": made["by_version"],
            "swaps": made["swaps"],
            "seconds": round(found["seconds"] + made["seconds"], 1),
        }
    return figures


class Halfway(logging.Handler):
    """Calls `swap` when half of the feature rows have been read."""

    def __init__(self, swap: Callable[[], None]) -> None:
        super().__init__()
        self.swap: Callable[[], None] | None = swap

    def emit(self, record: logging.LogRecord) -> None:
        from transforms.inference.live_input import REPLAY

        if self.swap is not None and record.msg == REPLAY and 2 * record.args[0] >= record.args[1]:  # type: ignore[index,operator]
            swap, self.swap = self.swap, None
            swap()
