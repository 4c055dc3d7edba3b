"""The feature engine on millions of rows, against Polars, its own kernel, idiomatic Beam and Feast.

    python -m benchmarks.features [--copies 30] [--repeats 1] [--only polars,kernel,…] [--json FILE] [--keep FOLDER]

The year of flights `--copies` times (30: 10.1 million events and spine rows), with renamed keys and added noise; 3 keys
× 3 windows × mean and max; Parquet to Parquet, with events and spine rows in separate tables.  Statistics and schema
checks are left out. First, the pipeline's features are compared with those of Polars.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl

from benchmarks import features_case, features_join
from benchmarks.measure import Figures, Measurement, Side, arguments, machine, raw, run, say, summary, write_json
from transforms.features.plan import BLOCK_ROWS

SIDES = ("polars", "kernel", "slices", "shuffle", "triple", "heavy", "tenth", "idiomatic", "join", "feast")
# Feast's default store joins every row of a key with every other: it runs only if requested, on a thirtieth of the
# data, or not at all.
MORE_SIDES = ("feast_dask",)


def main(argv: Sequence[str]) -> int:
    parser = arguments("The feature engine against Polars, its own kernel and idiomatic Beam.")
    parser.add_argument(
        "--copies", type=int, default=30, help="how often the year is repeated (default 30: 10.1 million rows)"
    )
    parser.add_argument("--only", default=",".join(SIDES), help=f"sides to run, of {', '.join((*SIDES, *MORE_SIDES))}")
    flags = parser.parse_args(argv)
    wanted = flags.only.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        sides = make_sides(folder, flags.copies, wanted)
        measured: dict[str, list[Measurement]] = {name: [] for name in sides}
        modules = {name: run(_small(folder, side), folder / f"{name}-imports", ())[1] for name, side in sides.items()}
        for repetition in range(flags.repeats):
            for name, side in sides.items():
                one, _ = run(side, folder / f"{name}-{repetition}", modules[name])
                measured[name].append(one)
                say(
                    f"{name} {repetition + 1}/{flags.repeats}: {one.seconds:.2f} s, "
                    f"peak {one.peak_mb:.0f} MB above {one.baseline_mb:.0f} MB"
                )
        differing = compare_values(folder) if {"polars", "slices"} <= set(sides) else {}
        if {"join", "feast"} <= set(sides):
            differing |= features_join.differing(folder / "join-0", folder / "feast-0")
        figures = ratios(measured)
        print(summary(measured))
        for name, value in {**figures, **differing}.items():
            print(f"{name:<28}{value:.3f}")
        if flags.json:
            write_json(flags.json, {**figures, **differing, "machine": machine(), "raw": raw(measured)})
    return 0


def make_sides(folder: Path, copies: int, wanted: Sequence[str]) -> dict[str, Side]:
    """The requested sides with their data, which is written if it is missing."""

    def data(name: str, times: int, heavy: bool = False) -> str:
        features_case.write(str(folder / name), times, heavy)
        return str(folder / name / "sources")

    def millrace(name: str, sources: str, plan: str = "slices") -> Side:
        return Side(name, f"{module}:pipeline", {"sources": sources, "flags": ["--plan", plan]})

    def join() -> str:
        return features_join.write(data("even", copies), str(folder / "join"))

    def feast(name: str, sources: str, store: str) -> Side:
        arguments = {"sources": sources, "store": store}
        return Side(name, "benchmarks.features_join:feast", arguments, features_join.feast_python())

    module, tenth = "benchmarks.features_sides", max(copies // 10, 1)
    sides: dict[str, Callable[[], Side]] = {
        "polars": lambda: Side("polars", f"{module}:polars", {"sources": data("even", copies)}),
        "kernel": lambda: Side(
            "kernel", f"{module}:kernel", {"sources": data("even", copies), "block_rows": BLOCK_ROWS}
        ),
        "slices": lambda: millrace("slices", data("even", copies)),
        "shuffle": lambda: millrace("shuffle", data("even", copies), "shuffle"),
        "triple": lambda: millrace("triple", data("triple", 3 * copies)),
        "heavy": lambda: millrace("heavy", data("heavy", copies, True)),
        "tenth": lambda: millrace("tenth", data("tenth", tenth)),
        "idiomatic": lambda: Side("idiomatic", f"{module}:idiomatic", {"sources": data("tenth", tenth)}),
        "join": lambda: Side("join", "benchmarks.features_join:millrace", {"sources": join(), "flags": []}),
        "feast": lambda: feast("feast", join(), "duckdb"),
        "feast_dask": lambda: feast(
            "feast_dask", features_join.write(data("one", 1), str(folder / "join-one")), "dask"
        ),
    }
    return {name: make() for name, make in sides.items() if name in wanted}


def _small(folder: Path, side: Side) -> Side:
    """The same side on the first rows of a plain year, to find out what it imports."""
    small = folder / "small"
    if not small.exists():
        features_case.write(str(folder / "one"), 1)
        for name, source in (("schedule", features_case.schedule), ("departures", features_case.departures)):
            (small / name).mkdir(parents=True)
            rows = pl.read_parquet(folder / "one" / "sources" / name / "*.parquet").sort(str(source.time)).head(2000)
            rows.write_parquet(small / name / "part-0.parquet")
    sources = features_join.write(str(small), str(folder / "small-join")) if "features_join" in side.function else small
    return dataclasses.replace(side, arguments={**side.arguments, "sources": str(sources)})


def ratios(measured: dict[str, list[Measurement]]) -> dict[str, float]:
    """Ratios of medians, of one side to another."""

    def median(name: str, field: str) -> float:
        # Only Feast's stage counts: what comes before sets up its registry.
        found = [each.stages["join"] if "join" in each.stages else dataclasses.asdict(each) for each in measured[name]]
        return float(sorted(each[field] for each in found)[len(found) // 2])

    pairs: dict[str, tuple[str, str, str]] = {
        "wall_vs_polars": ("slices", "polars", "seconds"),
        "wall_vs_same_kernel": ("slices", "kernel", "seconds"),
        "shuffle_vs_same_kernel": ("shuffle", "kernel", "seconds"),
        "peak_vs_polars": ("slices", "polars", "peak_mb"),
        "wall_30m_vs_10m": ("triple", "slices", "seconds"),
        "peak_30m_vs_10m": ("triple", "slices", "peak_mb"),
        "heavy_key_vs_even": ("heavy", "slices", "seconds"),
        "idiomatic_beam_vs_wall": ("idiomatic", "tenth", "seconds"),
        "feast_vs_wall": ("feast", "join", "seconds"),
    }
    return {
        name: median(a, field) / median(b, field)
        for name, (a, b, field) in pairs.items()
        if a in measured and b in measured
    }


def compare_values(folder: Path) -> Figures:
    """Compares the features of the pipeline and of Polars: number of rows, and of values that differ by more than
    float32 rounding."""
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
