"""The sides of `benchmarks/features.py`; each reads the same two Parquet sources and writes its features."""

from __future__ import annotations

import bisect
import os
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from benchmarks.features_case import KEYS, STATS, WINDOWS, view

if TYPE_CHECKING:
    import polars as pl

    from benchmarks.measure import Figures
    from transforms.sources.slices import Slice

HOURS = {"1h": 3600, "3h": 3 * 3600, "24h": 24 * 3600}


def polars(sources: str, out: str) -> Figures:
    """A straightforward Polars program: sort, `rolling_*_by`, `.over`, on both cores."""
    import polars as pl

    spine = (
        pl.read_parquet(f"{sources}/schedule/*.parquet").rename({"asked_at": "at"}).with_columns(is_spine=pl.lit(True))
    )
    events = (
        pl.read_parquet(f"{sources}/departures/*.parquet")
        .rename({"departed_at": "at"})
        .with_columns(is_spine=pl.lit(False))
    )
    both = pl.concat([events, spine], how="diagonal").sort("at")
    for key in KEYS:
        both = both.with_columns(
            getattr(pl.col("dep_delay"), f"rolling_{stat}_by")("at", window, closed="left")
            .over(key)
            .cast(pl.Float32)
            .alias(f"departures_by_{key}_dep_delay_{stat}_{window}")
            for stat in STATS
            for window in WINDOWS
        )
    features = both.filter("is_spine").drop("is_spine", "dep_delay")
    os.makedirs(out, exist_ok=True)
    features.write_parquet(f"{out}/features.parquet")
    return {"rows": len(features)}


def kernel(sources: str, out: str, block_rows: int) -> Figures:
    """The same kernel called in one plain process, block by block; no Beam, no contracts, no commits."""

    from transforms.features.kernel import KernelTables, compute
    from transforms.features.plan import plan_features

    plan = plan_features(view, sources, None, None, 2**61, block_rows)
    os.makedirs(out, exist_ok=True)
    rows = 0
    for block in plan.blocks:
        spine = _read(block.spine, "asked_at", block.start, block.end)
        events = _read(block.events["departures"], "departed_at", block.start - view.reach("departures"), block.end)
        features = compute(view, spine.sort("asked_at", "flight_id"), KernelTables({"departures": events}))
        features.write_parquet(f"{out}/{block.index:05d}.parquet", compression="lz4")
        rows += len(features)
    return {"rows": rows}


def _read(slices: Iterable[Slice], time: str, low: int, high: int) -> pl.DataFrame:
    import polars as pl
    import pyarrow.parquet as pq

    files: dict[str, list[int]] = {}
    for each in slices:
        files.setdefault(each.path, []).append(each.group)
    parts = [pl.DataFrame(pq.ParquetFile(path).read_row_groups(groups)) for path, groups in files.items()]
    whole = pl.concat(parts)
    return whole.filter((pl.col(time).to_physical() >= low) & (pl.col(time).to_physical() < high))


def pipeline(sources: str, out: str, flags: list[str], definition: str = "benchmarks.features_case") -> Figures:
    """`millrace features`, Parquet to a Delta table."""
    from beam_pipelines import features

    code = features.main(
        ["--definition", definition, "--store", out, "--sources", sources, "--full", "--no-statistics", *flags]
    )
    return {"exit": code}


def idiomatic(sources: str, out: str) -> Figures:
    """The usual program with stock transforms: rows as dicts, CoGroupByKey by key, and bisection in a list per key."""
    import apache_beam as beam
    import pyarrow as pa

    fields = [
        ("flight_id", pa.int64()),
        *((f"{key}_{stat}_{window}", pa.float32()) for key in KEYS for stat in STATS for window in WINDOWS),
    ]
    os.makedirs(out, exist_ok=True)
    with beam.Pipeline() as p:
        spine = p | "Spine" >> beam.io.ReadFromParquet(f"{sources}/schedule/*.parquet")
        events = p | "Events" >> beam.io.ReadFromParquet(f"{sources}/departures/*.parquet")
        parts = []
        for key in KEYS:
            keyed = spine | f"SpineBy_{key}" >> beam.Map(
                lambda row, key=key: (row[key], (row["asked_at"], row["flight_id"]))
            )
            known = events | f"EventsBy_{key}" >> beam.Map(
                lambda row, key=key: (row[key], (row["departed_at"], row["dep_delay"]))
            )
            joined = {"spine": keyed, "known": known} | f"Join_{key}" >> beam.CoGroupByKey()
            parts.append(joined | f"Windows_{key}" >> beam.FlatMap(_windows, key))
        rows = (
            parts
            | beam.Flatten()
            | beam.GroupByKey()
            | "Row"
            >> beam.Map(lambda item: {"flight_id": item[0], **{k: v for part in item[1] for k, v in part.items()}})
        )
        _ = rows | beam.io.WriteToParquet(f"{out}/features", pa.schema(fields))
    return {}


def _windows(
    item: tuple[str, dict[str, Iterable[tuple[datetime, float]]]], key: str
) -> Iterator[tuple[int, dict[str, float | None]]]:
    known = sorted((_seconds(at), value) for at, value in item[1]["known"])
    times, values = [at for at, _ in known], [value for _, value in known]
    for at, flight in item[1]["spine"]:
        now = _seconds(at)
        end = bisect.bisect_left(times, now)
        row: dict[str, float | None] = {}
        for window in WINDOWS:
            inside = values[bisect.bisect_left(times, now - HOURS[window]) : end]
            row[f"{key}_mean_{window}"] = sum(inside) / len(inside) if inside else None
            row[f"{key}_max_{window}"] = max(inside) if inside else None
        yield int(flight), row


def _seconds(at: datetime) -> float:
    return (
        float(at.replace(tzinfo=UTC).timestamp())
        if isinstance(at, datetime) and at.tzinfo is None
        else float(at.timestamp())
    )
