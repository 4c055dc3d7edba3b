"""Live features from Kafka to Kafka on one machine: throughput while catching up, and latency at a steady rate.

    python -m benchmarks.streaming [--sides catchup,lag] [--json FILE] [--keep FOLDER]

Not measured yet: predictions, a per-element DoFn doing the same, and memory over a long run.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import streaming_sides
from benchmarks.measure import arguments, machine, say, write_json
from benchmarks.streaming_rig import write_sources

SIDES = ("catchup", "lag")


def main(argv: Sequence[str]) -> int:
    parser = arguments("Live features from Kafka to Kafka.")
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)} (default: all)")
    parser.add_argument(
        "--years", type=int, default=2, help="years of flights to catch up with (default 2: 2 million events)"
    )
    parser.add_argument("--first", default="2013-01-01")
    parser.add_argument("--last", default=None)
    parser.add_argument("--rows", type=int, default=500, help="most rows of a message of the backlog (default 500)")
    parser.add_argument(
        "--offered", type=float, default=5000, help="events a second while latency is measured (default 5000)"
    )
    parser.add_argument("--seconds", type=float, default=60, help="for which latency is measured (default 60)")
    parser.add_argument("--flags", default="", help="further flags of the live job")
    flags = parser.parse_args(argv)
    wanted = flags.sides.split(",")
    if unknown := set(wanted) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    from deploy.streaming.toolchain import missing

    if lacking := missing():
        say(f"error: the streaming benchmark needs {'; '.join(lacking)}")
        return 8
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        sources = folder / "sources"
        if not sources.exists():
            write_sources(sources, flags.years)
        last = flags.last or f"{2013 + flags.years}-02-01"
        more = flags.flags.split()
        if "catchup" in wanted:
            figures["catchup"] = streaming_sides.catchup(
                folder / "catchup", sources, flags.first, last, flags.rows, more
            )
            say(json.dumps(figures["catchup"], indent=1))
        if "lag" in wanted:
            figures["lag"] = streaming_sides.lag(
                folder / "lag", sources, flags.first, flags.offered, flags.seconds, 30, more
            )
            say(json.dumps(figures["lag"], indent=1))
    keys = {"catchup": "events_per_second", "lag": "features_lag_p99_s"}
    headline = {key: figures[side][key] for side, key in keys.items() if side in figures}
    say(", ".join(f"{key} {value:,.2f}" for key, value in headline.items()))
    if flags.json:
        write_json(flags.json, {**headline, "raw": figures, "machine": machine()})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
