"""The feature engine on millions of rows, against Polars, its own kernel, idiomatic Beam and Feast.

    python -m benchmarks.features [--copies 30] [--repeats 1] [--only polars,kernel,…] [--json FILE] [--keep FOLDER]

The year of flights `--copies` times (30: 10.1 million events and questions), keys renamed, noise added; 3 keys × 3 windows ×
mean and max; Parquet to Parquet, events and questions in separate tables.  Statistics and schema checks are not part of it.
Before anything is compared, the pipeline's features are held against those of Polars.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks import features_case
from benchmarks.measure import Measurement, Side, arguments, machine, raw, run, say, summary, write_json
from transforms.plan import BLOCK_ROWS

SIDES = ("polars", "kernel", "slices", "shuffle", "triple", "heavy", "tenth", "idiomatic")


def main(argv: Sequence[str]) -> int:
    parser = arguments("The feature engine against Polars, its own kernel and idiomatic Beam.")
    parser.add_argument(
        "--copies", type=int, default=30, help="how often the year is repeated (default 30: 10.1 million rows)"
    )
    parser.add_argument("--only", default=",".join(SIDES), help=f"sides to run, of {', '.join(SIDES)}")
    flags = parser.parse_args(argv)
    wanted = flags.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        sides = {name: side for name, side in make_sides(folder, flags.copies).items() if name in wanted}
        measured: dict[str, list[Measurement]] = {name: [] for name in sides}
        modules = {name: run(_small(folder, side), folder / f"{name}-imports", ())[1] for name, side in sides.items()}
        for repetition in range(flags.repeats):
            for name, side in sides.items():
                one, _ = run(side, folder / f"{name}-{repetition}", modules[name])
                measured[name].append(one)
                say(
                    f"{name} {repetition + 1}/{flags.repeats}: {one.seconds:.2f} s, peak {one.peak_mb:.0f} MB above {one.baseline_mb:.0f} MB"
                )
        differing = compare_values(folder) if {"polars", "slices"} <= set(sides) else {}
        figures = ratios(measured)
        print(summary(measured))
        for name, value in {**figures, **differing}.items():
            print(f"{name:<28}{value:.3f}")
        if flags.json:
            write_json(flags.json, {**figures, **differing, "machine": machine(), "raw": raw(measured)})
    return 0


def make_sides(folder: Path, copies: int) -> dict[str, Side]:
    """Each side with its data, which is written where it is missing."""

    def data(name: str, times: int, heavy: bool = False) -> str:
        features_case.write(str(folder / name), times, heavy)
        return str(folder / name / "sources")

    here, module = data("even", copies), "benchmarks.features_sides"
    tenth = data("tenth", max(copies // 10, 1))
    return {
        "polars": Side("polars", f"{module}:polars", {"sources": here}),
        "kernel": Side("kernel", f"{module}:kernel", {"sources": here, "block_rows": BLOCK_ROWS}),
        "slices": Side("slices", f"{module}:pipeline", {"sources": here, "flags": ["--plan", "slices"]}),
        "shuffle": Side("shuffle", f"{module}:pipeline", {"sources": here, "flags": ["--plan", "shuffle"]}),
        "triple": Side(
            "triple", f"{module}:pipeline", {"sources": data("triple", 3 * copies), "flags": ["--plan", "slices"]}
        ),
        "heavy": Side(
            "heavy", f"{module}:pipeline", {"sources": data("heavy", copies, True), "flags": ["--plan", "slices"]}
        ),
        "tenth": Side("tenth", f"{module}:pipeline", {"sources": tenth, "flags": ["--plan", "slices"]}),
        "idiomatic": Side("idiomatic", f"{module}:idiomatic", {"sources": tenth}),
    }


def _small(folder: Path, side: Side) -> Side:
    """The same side on one plain year's head, to learn what it imports."""
    small = folder / "small"
    if not small.exists():
        features_case.write(str(folder / "one"), 1)
        for name, source in (("schedule", features_case.schedule), ("departures", features_case.departures)):
            (small / name).mkdir(parents=True)
            rows = pl.read_parquet(folder / "one" / "sources" / name / "*.parquet").sort(str(source.time)).head(2000)
            rows.write_parquet(small / name / "part-0.parquet")
    return Side(side.name, side.function, {**side.arguments, "sources": str(small)})


def ratios(measured: dict[str, list[Measurement]]) -> dict[str, float]:
    """Of medians, each side over another."""

    def median(name: str, field: str) -> float:
        values = sorted(getattr(each, field) for each in measured[name])
        return float(values[len(values) // 2])

    pairs: dict[str, tuple[str, str, str]] = {
        "wall_vs_polars": ("slices", "polars", "seconds"), "wall_vs_same_kernel": ("slices", "kernel", "seconds"),
        "shuffle_vs_same_kernel": ("shuffle", "kernel", "seconds"), "peak_vs_polars": ("slices", "polars", "peak_mb"),
        "wall_30m_vs_10m": ("triple", "slices", "seconds"), "peak_30m_vs_10m": ("triple", "slices", "peak_mb"),
        "heavy_key_vs_even": ("heavy", "slices", "seconds"), "idiomatic_beam_vs_wall": ("idiomatic", "tenth", "seconds"),
    }  # fmt: skip
    return {
        name: median(a, field) / median(b, field)
        for name, (a, b, field) in pairs.items()
        if a in measured and b in measured
    }


def compare_values(folder: Path) -> dict[str, Any]:
    """Features of the pipeline and of Polars: rows, and values further apart than float32 rounding."""
    theirs = pl.scan_parquet(folder / "polars-0" / "features.parquet")
    (table,) = (folder / "slices-0" / "features" / features_case.view.name).iterdir()
    ours = pl.scan_delta(str(table))
    names = list(features_case.view.columns)
    keys = ["flight_id"]
    joined = ours.select(*keys, *names).join(theirs.select(*keys, *names), on=keys, suffix="_theirs")
    apart = [
        ((pl.col(name) - pl.col(f"{name}_theirs")).abs() > 1e-6 * pl.col(name).abs()).sum()
        + (pl.col(name).is_null() != pl.col(f"{name}_theirs").is_null()).sum()
        for name in names
    ]
    counts = joined.select(pl.len().alias("rows"), pl.sum_horizontal(apart).alias("apart")).collect()
    return {"rows_compared": float(counts["rows"][0]), "values_apart": float(counts["apart"][0])}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
