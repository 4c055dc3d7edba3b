"""Windows of a year over millions of rows: wall time and peak memory, with even keys and with one heavy key.

    python -m benchmarks.long_windows [--copies 30] [--last_days N] [--only even,heavy] [--repeats 1]
                                      [--json FILE] [--keep FOLDER]

The data of `benchmarks.features` (30 copies: 10.1 million events and spine rows of one year), the view of
`benchmarks.long_case`: 3 keys × windows of a day and of 365 days × mean and max.  With `--last_days`, only the spine
rows of the last N days are computed; their windows reach back over everything.  The last feature rows are compared with
Polars.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import polars as pl

from benchmarks import features_case
from benchmarks.long_case import view
from benchmarks.measure import Measurement, Side, arguments, machine, raw, run, say, summary, write_json

SIDES = ("even", "heavy")
END = date(2014, 1, 1)
# Feature rows that are compared with Polars, which joins each spine row with all events of its key.
CHECKED = {"even": 1000, "heavy": 10}


def main(argv: Sequence[str]) -> int:
    parser = arguments("Windows of a year over millions of rows.")
    parser.set_defaults(repeats=1)
    parser.add_argument("--copies", type=int, default=30, help="how often the year is repeated (default 30)")
    parser.add_argument("--last_days", type=int, help="compute only the spine rows of the last days (default: all)")
    parser.add_argument("--only", default=",".join(SIDES), help=f"sides to run, of {', '.join(SIDES)}")
    flags = parser.parse_args(argv)
    more = [] if flags.last_days is None else ["--start", str(END - timedelta(days=flags.last_days))]
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        measured: dict[str, list[Measurement]] = {}
        features_case.write(str(folder / "one"), 1)
        warm = _side("warm-up", folder / "one", ["--start", str(END - timedelta(days=1))])
        modules = run(warm, folder / "warm-up", ())[1]
        for name in flags.only.split(","):
            features_case.write(str(folder / name), flags.copies, name == "heavy")
            for repetition in range(flags.repeats):
                out = folder / f"long-{name}-{repetition}"
                one, _ = run(_side(name, folder / name, more), out, modules)
                measured.setdefault(name, []).append(one)
                say(f"{name}: {one.seconds:.1f} s, peak {one.peak_mb:.0f} MB above {one.baseline_mb:.0f} MB")
            checked = CHECKED[name]
            say(
                f"{name}: {wrong(folder / name / 'sources', out, checked)} of the last {checked:,} feature rows "
                "differ from Polars"
            )
        print(summary(measured))
        if flags.json:
            write_json(flags.json, {"last_days": flags.last_days, "machine": machine(), "raw": raw(measured)})
    return 0


def _side(name: str, case: Path, flags: list[str]) -> Side:
    arguments = {"sources": str(case / "sources"), "flags": flags, "definition": "benchmarks.long_case"}
    return Side(name, "benchmarks.features_sides:pipeline", arguments)


def wrong(sources: Path, out: Path, checked: int) -> int:
    """How many of the last spine rows have another maximum over a year by some key, or a mean that differs by more than
    1e-6 of it."""
    table = out / "features" / view.name / view.fingerprint
    last = pl.scan_delta(str(table)).sort("asked_at", "flight_id").tail(checked).collect()
    known = pl.scan_parquet(sources / "departures" / "*.parquet")
    apart = pl.lit(False)
    for key in features_case.KEYS:
        pairs = known.join(last.lazy().select("flight_id", key, "asked_at"), on=key)
        pairs = pairs.filter(
            (pl.col("departed_at") < pl.col("asked_at"))
            & (pl.col("departed_at") >= pl.col("asked_at").dt.offset_by("-365d"))
        )
        found = pairs.group_by("flight_id").agg(
            pl.col("dep_delay").max().cast(pl.Float32).alias(f"{key}_max"),
            pl.col("dep_delay").mean().alias(f"{key}_mean"),
        )
        last = last.join(found.collect(engine="streaming"), on="flight_id", how="left")
        mean, highest = (pl.col(f"departures_by_{key}_dep_delay_{stat}_365d") for stat in ("mean", "max"))
        apart |= highest.ne_missing(pl.col(f"{key}_max")) | mean.is_null().ne(pl.col(f"{key}_mean").is_null())
        apart |= ((mean - pl.col(f"{key}_mean")).abs() > 1e-6 * mean.abs() + 1e-6).fill_null(False)
    return int(last.select(apart.sum()).item())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
