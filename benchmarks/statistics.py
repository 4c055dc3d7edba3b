"""Statistics of a feature table: Millrace's, the same figures by Polars alone, and TFDV's on a tenth of the rows.

    python -m benchmarks.statistics [--rows 10000000] [--columns 18] [--json FILE]

The relevant limit (0.6 × a straightforward Polars feature program) is checked by `benchmarks/features.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from benchmarks.measure import Figures, Side

FILE_ROWS = 1_000_000


def write(folder: Path, rows: int, columns: int) -> None:
    """Feature-like floats: every third smooth, skewed, or repeated values, every other with one value in ten
    missing."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, start in enumerate(range(0, rows, FILE_ROWS)):
        n = min(FILE_ROWS, rows - start)
        made = (rng.normal(10, 40, n), rng.exponential(12, n) ** 2, rng.integers(0, 60, n))
        table = {}
        for column in range(columns):
            values = rng.permutation(made[column % 3]).astype(np.float32)
            table[f"f{column}"] = pa.array(values, mask=rng.random(n) < 0.1 if column % 2 else None)
        pq.write_table(pa.table(table), folder / f"{number:03}.parquet", compression="lz4", use_dictionary=False)


def millrace(source: str, out: str) -> Figures:
    """What the features pipeline does with each batch, and the proto at the end."""
    from transforms.validation.statistics import columns_described, describe_batch, describe_nothing, statistics_proto

    paths = sorted(Path(source).glob("*.parquet"))
    schema = pq.read_schema(paths[0])
    columns = columns_described(schema, schema.names)
    total = describe_nothing(columns)
    for path in paths:
        (batch,) = pq.read_table(path, use_threads=False).combine_chunks().to_batches()
        total = total + describe_batch(batch, columns)
    statistics = statistics_proto(total)
    Path(out).write_bytes(statistics.SerializeToString())
    return {"rows": total.rows, "mean": statistics.datasets[0].features[0].num_stats.mean}


def polars(source: str, out: str) -> Figures:
    """The same figures in one lazy query: moments, quantiles, and ten equal widths."""
    data = pl.scan_parquet(f"{source}/*.parquet")
    names = data.collect_schema().names()
    figures = [
        expression.name.suffix(f"_{suffix}")
        for suffix, expression in {
            "missing": pl.all().null_count(),
            "mean": pl.all().mean(),
            "std": pl.all().std(ddof=0),
            "zeros": (pl.all() == 0).sum(),
            "min": pl.all().min(),
            "max": pl.all().max(),
            **{f"q{i}": pl.all().quantile(i / 10) for i in range(1, 10)},
        }.items()
    ]
    found = data.select(figures).collect().row(0, named=True)
    width = {name: (found[f"{name}_max"] - found[f"{name}_min"]) / 10 for name in names}
    bins = [
        ((pl.col(name) - found[f"{name}_min"]) / width[name]).cast(pl.Int32).value_counts().implode().alias(name)
        for name in names
    ]
    histograms = data.select(bins).collect()
    Path(out).write_text(str(found) + str(histograms))
    return {"mean": found[f"{names[0]}_mean"]}


def tfdv(source: str, out: str, files: int) -> Figures:
    """TFDV's in-memory function, on the first files."""
    import tensorflow_data_validation

    frame = pl.read_parquet(sorted(Path(source).glob("*.parquet"))[:files]).to_pandas()
    found = tensorflow_data_validation.generate_statistics_from_dataframe(frame)
    Path(out).write_bytes(found.SerializeToString())
    return {"rows": len(frame)}


def main(argv: Sequence[str]) -> int:
    """Measure and print."""
    parser = measure.arguments(str(__doc__).splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--columns", type=int, default=18)
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"source-{flags.rows}-{flags.columns}"
        if not source.exists():
            write(source, flags.rows, flags.columns)
        files = max(1, flags.rows // FILE_ROWS // 10)
        sides = [
            Side("millrace", "benchmarks.statistics:millrace", {"source": str(source)}),
            Side("polars", "benchmarks.statistics:polars", {"source": str(source)}),
            Side("tfdv", "benchmarks.statistics:tfdv", {"source": str(source), "files": files}),
        ]
        measured, _ = measure.compare(sides, flags.repeats, folder)
    share = files * min(FILE_ROWS, flags.rows) / flags.rows
    ratios = {
        **measure.ratios(measured, "millrace", "polars"),
        "tfdv_seconds_per_row_vs_millrace": measure.ratios(measured, "tfdv", "millrace")["wall_vs_millrace"] / share,
    }
    measure.say(measure.summary(measured))
    measure.say("\n".join(f"{name:<36}{value:.3f}" for name, value in ratios.items()))
    if flags.json:
        measure.write_json(flags.json, {**ratios, "machine": measure.machine(), "runs": measure.raw(measured)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
