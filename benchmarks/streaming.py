"""Live features and predictions from Kafka to Kafka on one machine: throughput, latency and memory.

A DoFn per element is measured beside them for scale.

    python -m benchmarks.streaming [--sides catchup,per_element,lag,predictions,soak,turns] [--repeats 1]
                                   [--json FILE] [--keep FOLDER]

Broker, KafkaIO, Prism, the jobs and the producer share the machine.  The side `turns` needs none of them: it measures
what one small turn costs (`turn_fixed_ms`), and a replay of many.  `--json` contains only what was measured.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import streaming_sides, streaming_turns
from benchmarks.measure import arguments, machine, say, write_json
from benchmarks.streaming_rig import SHARE, YEAR_DAYS, champion, write_sources
from benchmarks.streaming_sides import Seen

SIDES = ("catchup", "per_element", "lag", "predictions", "soak", "turns")
# The main figure of each side.
HEADLINES = {
    "catchup": "events_per_second",
    "lag": "features_lag_p99_s",
    "predictions": "predictions_lag_p99_s",
    "soak": "soak_memory_growth",
    "turns": "turn_fixed_ms",
}


def main(argv: Sequence[str]) -> int:
    parser = arguments("Live features and predictions from Kafka to Kafka.")
    parser.set_defaults(repeats=1)
    parser.add_argument("--sides", default=",".join(SIDES), help=f"of {', '.join(SIDES)} (default: all)")
    parser.add_argument(
        "--years", type=int, default=2, help="years of flights to catch up with (default 2: 2 million events)"
    )
    parser.add_argument("--first", default="2013-01-01")
    parser.add_argument("--rows", type=int, default=500, help="most rows of a message of the backlog (default 500)")
    parser.add_argument(
        "--offered", type=float, default=5000, help="events a second while latency is measured (default 5000)"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, help="for which latency is measured, after 30 (default 60)"
    )
    parser.add_argument("--days", type=int, default=5, help="of flights per element (default 5)")
    parser.add_argument("--soak_minutes", type=float, default=15, help="(default 15)")
    parser.add_argument(
        "--share",
        default=SHARE,
        help="of the rows, per partition of every topic, while latency is measured "
        f"(default {SHARE}: uneven, one idle)",
    )
    parser.add_argument("--flags", default="", help="further flags of the live features job")
    flags = parser.parse_args(argv)
    wanted = flags.sides.split(",")
    if unknown := set(wanted) - set(SIDES):
        parser.error(f"--sides: {', '.join(sorted(unknown))}; there are {', '.join(SIDES)}")
    from deploy.streaming.toolchain import missing

    if wanted != ["turns"] and (lacking := missing()):
        say(f"error: the streaming benchmark needs {'; '.join(lacking)}")
        return 8
    with tempfile.TemporaryDirectory() as temporary:
        figures = measured(flags, [each for each in SIDES if each in wanted], flags.keep or Path(temporary))
    headline = {key: median(figures[side], key) for side, key in HEADLINES.items() if side in figures}
    if {"catchup", "per_element"} <= figures.keys():
        headline["vs_per_element"] = headline["events_per_second"] / median(figures["per_element"], "events_per_second")
    if "turns" in figures:
        headline |= {key: median(figures["turns"], key) for key in ("replay_s", "replay_cpu_s")}
    say(", ".join(f"{key} {value:,.3f}" for key, value in headline.items()))
    if flags.json:
        write_json(flags.json, {**headline, "raw": figures, "machine": machine()})
    return 0


def median(runs: Sequence[Seen], name: str) -> float:
    """The median of a number over the runs of a side."""
    numbers = [each[name] for each in runs]
    return statistics.median(number for number in numbers if isinstance(number, int | float))


def measured(flags: argparse.Namespace, sides: Sequence[str], folder: Path) -> dict[str, list[Seen]]:
    """The figures of each side, from `repeats` runs."""
    more = flags.flags.split()
    steady = streaming_sides.Load(flags.first, flags.offered, flags.seconds, warm_up=30, share=flags.share)
    long_years = (
        math.ceil(flags.soak_minutes * 60 * flags.offered / streaming_sides.PER_SECOND / 86_400 / YEAR_DAYS) + 1
    )

    def sources(years: int) -> Path:
        path = folder / f"sources{years}"
        if not path.exists():
            write_sources(path, years)
        return path

    run: dict[str, Callable[[Path], Seen]] = {
        "catchup": lambda to: streaming_sides.catchup(
            to, sources(flags.years), flags.first, f"{2013 + flags.years}-02-01", flags.rows, more
        ),
        "per_element": lambda to: streaming_sides.per_element(
            to, sources(flags.years), flags.first, flags.days, flags.rows
        ),
        "lag": lambda to: streaming_sides.lag(to, sources(flags.years), steady, more),
        "predictions": lambda to: streaming_sides.lag(
            to, sources(flags.years), steady, more, registry=champion(folder / "models")
        ),
        "soak": lambda to: streaming_sides.soak(
            to, sources(long_years), flags.first, flags.offered, flags.soak_minutes, more
        ),
        "turns": lambda to: {**streaming_turns.turn(to, sources(1)), **streaming_turns.replay(to, sources(1))},
    }
    figures: dict[str, list[Seen]] = {}
    for number in range(flags.repeats):
        for side in sides:
            found = run[side](folder / f"{side}{number}")
            figures.setdefault(side, []).append(found)
            say(f"{side}: {json.dumps(found, indent=1)}")
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
