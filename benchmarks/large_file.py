"""One very large Parquet file as a source: time, and memory that depends on the block and not on the file.

    python -m benchmarks.large_file [--gb 5] [--group_rows 1048576] [--flags "--plan slices"]
                                    [--json FILE] [--keep FOLDER]

Events with a key, a time and eight numbers that no codec compresses, sorted by time, over a year; a million spine rows;
the mean of each number in the last day.  A second run with a tenth of the file shows what memory depends on.  Counts of
the last spine rows are compared with Polars.  Needs as much free disk as the file takes, and a little more.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.measure import Side, arguments, machine, raw, run, say, summary, write_json
from schemas import FeatureView, Source, Trailing

NUMBERS = tuple(f"n{i}" for i in range(8))
START, YEAR = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp() * 1e6), 365 * 86_400 * 10**6
ROW_BYTES = 8 * (2 + len(NUMBERS))
KEYS, SPINE_ROWS = 5000, 1_000_000

spine = Source("spine", time="at", columns={"id": pl.Int64, "key": pl.Int64})
events = Source("events", time="at", columns={"key": pl.Int64, **dict.fromkeys(NUMBERS, pl.Float64)})
view = FeatureView(
    "large",
    spine=spine,
    key="id",
    features=[Trailing(events, by="key", over="1d", stats={**dict.fromkeys(NUMBERS, "mean"), "*": "count"})],
)


def main(argv: Sequence[str]) -> int:
    parser = arguments("One very large file as a source.")
    parser.add_argument("--gb", type=float, default=5.0, help="10⁹ bytes of the file (default 5)")
    parser.add_argument(
        "--group_rows", type=int, default=2**20, help="rows of a row group, at most the default of 1048576"
    )
    parser.add_argument("--flags", default="", help="more flags of `millrace features`")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        measured, modules = {}, None
        for name, gb in (("small", 0.05), ("tenth", flags.gb / 10), ("whole", flags.gb)):
            sources = folder / name
            size = write(sources, round(gb * 1e9 / ROW_BYTES), flags.group_rows)
            side = Side(name, "benchmarks.large_file:pipeline", {"sources": str(sources), "flags": flags.flags.split()})
            one, modules = run(side, folder / f"{name}-out", modules or ())
            if name != "small":  # this run finds out what is imported, and warms up
                measured[name] = [one]
                say(
                    f"{name}, {size / 1e9:.2f} GB: {one.seconds:.1f} s, "
                    f"peak {one.peak_mb:.0f} MB above {one.baseline_mb:.0f} MB"
                )
            apart = compare(sources, folder / f"{name}-out")
            say(f"{name}: {apart} of the last {min(1000, SPINE_ROWS):,} counts differ from Polars")
            if flags.keep is None:
                shutil.rmtree(sources)
        figures = {
            "peak_mb": measured["whole"][0].peak_mb,
            "peak_vs_tenth": measured["whole"][0].peak_mb / measured["tenth"][0].peak_mb,
            "wall_vs_tenth": measured["whole"][0].seconds / measured["tenth"][0].seconds,
        }
        print(summary(measured))
        for name, value in figures.items():
            print(f"{name:<28}{value:.3f}")
        if flags.json:
            write_json(flags.json, {**figures, "machine": machine(), "raw": raw(measured)})
    return 0


def write(folder: Path, rows: int, group_rows: int) -> int:
    """Sources under `folder`, unless they are there; bytes of the events' file."""
    path = folder / "events" / "part-0.parquet"
    if not path.exists():
        random = np.random.default_rng(1)
        path.parent.mkdir(parents=True)
        (folder / "spine").mkdir()
        at = START + np.sort(random.integers(0, YEAR, SPINE_ROWS))
        stamps = pa.array(at, pa.timestamp("us", "UTC"))
        keys = pa.array(random.integers(0, KEYS, SPINE_ROWS))
        pq.write_table(
            pa.table({"id": np.arange(SPINE_ROWS), "key": keys, "at": stamps}),
            folder / "spine" / "part-0.parquet",
            row_group_size=131_072,
        )
        schema = pa.schema(
            [("at", pa.timestamp("us", "UTC")), ("key", pa.int64()), *((name, pa.float64()) for name in NUMBERS)]
        )
        with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
            for first in range(0, rows, 2**20):
                last = min(first + 2**20, rows)
                low, high = START + YEAR * first // rows, START + YEAR * last // rows
                columns = [np.sort(random.integers(low, high, last - first)), random.integers(0, KEYS, last - first)]
                columns += [random.random(last - first) for _ in NUMBERS]
                batch = pa.record_batch(
                    [pa.array(column).cast(field.type) for column, field in zip(columns, schema, strict=True)],
                    schema=schema,
                )
                writer.write_table(pa.Table.from_batches([batch]), row_group_size=group_rows)
    return path.stat().st_size


def pipeline(sources: str, out: str, flags: list[str]) -> dict[str, int]:
    """`millrace features`, Parquet to a Delta table."""
    from beam_pipelines import features

    code = features.main(
        [
            "--definition",
            "benchmarks.large_file",
            "--store",
            out,
            "--sources",
            sources,
            "--full",
            "--no-statistics",
            *flags,
        ]
    )
    return {"exit": code}


def compare(sources: Path, out: Path) -> int:
    """How many of the last spine rows have another count of events than a join in Polars."""
    ours = (
        pl.scan_delta(str(out / "features" / view.name / view.fingerprint))
        .select("id", "at", "key", "events_by_key_count_1d")
        .sort("at", descending=True)
        .head(1000)
        .collect()
    )
    seen = pl.scan_parquet(sources / "events" / "*.parquet").select(pl.col("at").alias("seen"), "key")
    pairs = (
        ours.lazy()
        .join(seen, on="key")
        .filter((pl.col("seen") < pl.col("at")) & (pl.col("seen") >= pl.col("at").dt.offset_by("-1d")))
    )
    counts = pairs.group_by("id").len().collect(engine="streaming")
    both = ours.join(counts, on="id", how="left").with_columns(pl.col("len").fill_null(0))
    return int((both["events_by_key_count_1d"] != both["len"]).sum())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
