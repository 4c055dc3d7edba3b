"""A month of flights live: features and predictions as events arrive, then parity with batch.

Rows of the sources from before the month are the job's history, so that every window is filled from the first feature
row on.

    ./run_local.sh stream

It uses Kafka and Prism where Java, Maven and Go are present, else it replays the month in one process.

Everything that it starts runs on free ports of loopback, and ends with it, even on Ctrl-C.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.run_report import progress, read_json, write_json
from deploy.flights.case import Case, Figures, models
from deploy.flights.in_process import in_process
from schemas.errors import DataError


def main(argv: Sequence[str]) -> int:
    """Runs everything; returns 0 if every spine row was computed and scored once, and live equals batch to the bit."""
    parser = argparse.ArgumentParser(prog="./run_local.sh stream", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", default="out", help="folder of the store that ./run_local.sh made, or makes (default: out)"
    )
    parser.add_argument("--month", default="2013-03", help="the month to replay (default: 2013-03)")
    parser.add_argument("--seconds", type=float, default=90, help="how long its replay takes (default: 90)")
    parser.add_argument("--embedded", action="store_true", help="a replay in one process, without Kafka and Prism")
    parser.add_argument("--features_only", action="store_true", help="no model, no predictions")
    flags = parser.parse_args(argv)
    from deploy.streaming.toolchain import missing
    from examples.flights import data

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # running processes end as on Ctrl-C
    progress()
    lacking = missing()
    embedded = flags.embedded or bool(lacking)
    print(
        f"live through {'a replay in one process' if embedded else 'Kafka and Prism'}"
        + (f"; missing: {'; '.join(lacking)}" if lacking else ""),
        flush=True,
    )
    out, year, month = Path(flags.out).resolve(), int(flags.month[:4]), int(flags.month[5:])
    start, end = f"{flags.month}-01", f"{year + month // 12}-{month % 12 + 1:02}-01"
    data.write(str(out / "store"))  # existing files stay unchanged
    first, second = ("", "") if flags.features_only else models(out / "store")
    case = Case(
        out / "store", out / "stream" / time.strftime("%Y%m%d-%H%M%S"), start, end, flags.seconds, first, second
    )
    case.folder.mkdir(parents=True)
    if embedded:
        figures = in_process(case)
    else:
        from deploy.flights.through_kafka import through_kafka

        figures = through_kafka(case)
    figures["parity"] = parity(case)
    write_json(str(case.folder / "run.json"), figures)
    print(
        f"\n{json.dumps(figures, indent=2)}\n\n"
        f"written to {case.folder / 'run.json'}; the log of each process is beside it"
    )
    check(figures)
    return 0


def check(figures: Figures) -> None:
    """Checks that each spine row was computed and scored once, and that live equals the full batch table.

    Raises:
        DataError: a row is missing or doubled, or a value differs.
    """
    spine_rows, scored = figures["questions"], figures["parity"].get("predictions")
    counts = {"computed": figures["answered"], "computed in the table": figures["parity"]["answers_compared"]}
    if scored is not None:
        counts |= {"predicted": figures["predicted"], "predicted in the table": scored["predictions"]}
        counts["scored again by a batch job"] = sum(scored["compared"].values())
    for what, count in counts.items():
        if count != spine_rows:
            fix = "Please report it, with the folder above"
            raise DataError(f"Every spine row is {what} once", f"{count:,} of {spine_rows:,}", fix)
    full = figures["parity"]["full_batch"]
    compared = full.get("answers_compared", 0) + full.get("answers_of_dates_not_computed", 0)
    if full.get("values_differing") != 0 or compared != spine_rows:
        raise DataError(
            "Live feature rows equal those of the batch table, from the first one on",
            f"{full.get('values_differing', 'no')} values of {compared:,} feature rows differ from {full['batch']}",
            "See the causes above, and in run.json",
        )
    if scored is not None and len(scored["compared"]) < 2:
        version = ", ".join(scored["compared"])
        print(f"note: version {version} scored all rows; the champion changed after the last", flush=True)


def parity(case: Case) -> Figures:
    """Computes every live feature row again in batch.

    Raises:
        MismatchError: a bit differs.
    """
    from beam_pipelines.commands import parity

    parity.main([*case.common, "--run_id", "parity", *(case.registry if case.first else ())])
    found = read_json(os.path.join(case.live, "runs", "parity", "run.json"))
    return {name: value for name, value in found.items() if name not in ("features", "pipeline", "run_id")}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(guard(main)(sys.argv[1:]))
