"""The TFRecord reading loop of `transforms.storage.tfrecord_io` against Beam's own reader, on the same file.

    python -m benchmarks.tfrecord_read [--rows 200000] [--repeats 3]

Both read framed records, checksums included, from a gzipped file of `--rows` tf.Examples with 20 float features each.
Beam's reader runs as it does in a worker, without the overhead of a pipeline. The best of `--repeats` counts.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path

import numpy as np
import pyarrow as pa
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.tfrecordio import ReadFromTFRecord

from transforms.storage.tfrecord_codec import gzipped
from transforms.storage.tfrecord_io import read_records

FEATURES = 20


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="The TFRecord reading loop against Beam's own reader.")
    parser.add_argument("--rows", type=int, default=200_000, help="records in the file (default 200,000)")
    parser.add_argument("--repeats", type=int, default=3, help="how often each side reads the file (default 3)")
    flags = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder) / "rows.tfrecord.gz", flags.rows)
        ours = best(lambda: read_records(path), flags.rows, flags.repeats)
        beams = best(lambda: read_by_beam(path), flags.rows, flags.repeats)
    print(f"ours {ours:.2f} s, Beam {beams:.2f} s for {flags.rows:,} records: Beam takes {beams / ours:.2f} x as long")
    return 0


def write(path: Path, rows: int) -> str:
    """Writes a gzipped TFRecord file of `rows` examples, and returns its path."""
    values = np.random.default_rng(1).random((FEATURES, rows), np.float32)
    columns = {"id": pa.array(range(rows), pa.int64()), "date": pa.array([date(2024, 1, 1)] * rows, pa.date32())}
    columns |= {f"feature_{i}": pa.array(column) for i, column in enumerate(values)}
    batch = pa.RecordBatch.from_arrays(list(columns.values()), list(columns))
    path.write_bytes(b"".join(gzipped(batch)))
    return str(path)


def read_by_beam(path: str) -> Iterable[bytes]:
    """The records of the file, read by the source behind `ReadFromTFRecord`."""
    source = ReadFromTFRecord(path, compression_type=CompressionTypes.GZIP)._source
    for bundle in source.split(1 << 40):
        tracker = bundle.source.get_range_tracker(bundle.start_position, bundle.stop_position)
        yield from bundle.source.read(tracker)


def best(read: Callable[[], Iterable[bytes]], rows: int, repeats: int) -> float:
    """Seconds of the fastest of `repeats` complete reads."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        found = sum(1 for _ in read())
        seconds.append(time.perf_counter() - start)
        if found != rows:
            raise SystemExit(f"{rows:,} records were written, {found:,} were read")
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
