"""A point-in-time join as in Feast: the newest values of a feature table for each spine row, at most a day old.

The spine rows are those of `features_case` that name a plane; the feature table has a row of six numbers for every
departure. A plane has at most one row and one spine row at any time, because Feast's choice among several is random.

Feast has its own environment (its pins contradict Millrace's), which is made here once: see `feast_python`.  Functions
that run there import nothing of Millrace.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.measure import Figures
    from schemas import FeatureView

FEAST = "feast[duckdb]==0.47.0"
NUMBERS = tuple(f"f{i}" for i in range(6))


def feast_python() -> str:
    """Python of an environment with Feast, in `$MILLRACE_CACHE`, else in `millrace` below `$XDG_CACHE_HOME` or
    `~/.cache`.

    Raises:
        SystemExit: the environment cannot be made.
    """
    cache = os.environ.get("MILLRACE_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "millrace"
    )
    folder = Path(cache) / FEAST.translate({ord(sign): "-" for sign in "[]="})
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        uv = shutil.which("uv")
        make = (
            [uv, "venv", "-q", "--python", "3.11", str(folder)] if uv else [sys.executable, "-m", "venv", str(folder)]
        )
        install = (
            [uv, "pip", "install", "-q", "--python", str(python), FEAST]
            if uv
            else [str(python), "-m", "pip", "install", "-q", FEAST]
        )
        for command in (make, install):
            if subprocess.run(command, check=False).returncode:
                raise SystemExit(f"no environment for Feast: {' '.join(command)} failed")
        (folder / "made").touch()
    return str(python)


def view() -> FeatureView:
    """The same join as a view."""
    import polars as pl

    from schemas import FeatureView, Latest, Source

    spine = Source("spine", time="asked_at", columns={"flight_id": pl.Int64, "tailnum": pl.String})
    plane = Source("plane", time="known_at", columns={"tailnum": pl.String, **dict.fromkeys(NUMBERS, pl.Float32)})
    return FeatureView(
        "join",
        spine=spine,
        key="flight_id",
        features=[Latest(plane, by="tailnum", columns=NUMBERS, max_age="1d")],
    )


def write(case: str, folder: str) -> str:
    """Writes the sources `spine` and `plane` under `folder`, from those of `features_case` under `case`; and Feast's
    spine.

    Feast's join sees a row that became known at the very time of the spine row, and Millrace's does not. So Feast's
    spine rows are a microsecond earlier, and for Feast a row expires a microsecond earlier.
    """
    import numpy as np
    import polars as pl

    if os.path.exists(f"{folder}/done"):
        return folder
    known = (
        pl.read_parquet(f"{case}/departures/*.parquet", columns=["tailnum", "departed_at"])
        .drop_nulls()
        .unique()
        .rename({"departed_at": "known_at"})
        .sort("known_at", "tailnum")
    )
    random = np.random.default_rng(3)
    known = known.with_columns(pl.Series(name, random.random(len(known), np.float32)) for name in NUMBERS)
    spine = (
        pl.read_parquet(f"{case}/schedule/*.parquet", columns=["flight_id", "tailnum", "asked_at"])
        .drop_nulls()
        .sort("flight_id")
        .unique(["tailnum", "asked_at"], keep="first", maintain_order=True)
        .sort("asked_at", "flight_id")
    )
    before = spine.with_columns(event_timestamp=pl.col("asked_at").dt.offset_by("-1us")).drop("asked_at")
    for name, frame in (("plane", known), ("spine", spine), ("spine_feast", before)):
        os.makedirs(f"{folder}/{name}", exist_ok=True)
        frame.write_parquet(f"{folder}/{name}/part-0.parquet", row_group_size=131_072, compression="lz4")
    Path(folder, "done").touch()
    return folder


def millrace(sources: str, out: str, flags: list[str]) -> Figures:
    """`millrace features` of that view, Parquet to a Delta table."""
    from beam_pipelines import features

    os.makedirs(out, exist_ok=True)
    Path(out, "definition.py").write_text("from benchmarks import features_join\n\nview = features_join.view()\n")
    return {
        "exit": features.main(
            [
                "--definition",
                f"{out}/definition.py",
                "--store",
                out,
                "--sources",
                sources,
                "--full",
                "--no-statistics",
                *flags,
            ]
        )
    }


def feast(sources: str, out: str, store: str) -> Figures:
    """`get_historical_features` with the offline store named (`duckdb` or `dask`), Parquet to Parquet; the registry is
    made before the stage `join` is timed."""
    import pandas as pd
    import pyarrow.parquet as pq
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
    from feast.data_format import ParquetFormat
    from feast.types import Float32
    from feast.value_type import ValueType

    from benchmarks.measure import stage

    os.makedirs(out, exist_ok=True)
    config = RepoConfig(
        project="join",
        registry=f"{out}/registry.db",
        provider="local",
        offline_store={"type": store},
        online_store=None,
        entity_key_serialization_version=3,
    )
    plane = Entity(name="plane", join_keys=["tailnum"], value_type=ValueType.STRING)
    rows = FileSource(
        name="rows", path=f"{sources}/plane/part-0.parquet", timestamp_field="known_at", file_format=ParquetFormat()
    )
    day = timedelta(days=1) - timedelta(microseconds=1)
    features = FeatureView(
        name="plane",
        entities=[plane],
        ttl=day,
        schema=[Field(name=name, dtype=Float32) for name in NUMBERS],
        source=rows,
    )
    repository = FeatureStore(config=config)
    repository.apply([plane, features])
    with stage("join"):
        spine = pd.read_parquet(f"{sources}/spine_feast/part-0.parquet")
        job = repository.get_historical_features(spine, features=[f"plane:{name}" for name in NUMBERS])
        found = job.to_arrow()
        pq.write_table(found, f"{out}/features.parquet", compression="lz4")
    return {"rows": found.num_rows}


def differing(ours: Path, theirs: Path) -> Figures:
    """Number of spine rows in both results, and of those with a different value."""
    import polars as pl

    made = view()
    mine = pl.scan_delta(str(ours / "features" / made.name / made.fingerprint)).select(
        "flight_id", *(f"plane_{name}" for name in NUMBERS)
    )
    other = pl.scan_parquet(theirs / "features.parquet").select("flight_id", *NUMBERS)
    joined = mine.join(other, on="flight_id")
    apart = pl.any_horizontal(pl.col(f"plane_{name}").ne_missing(pl.col(name).cast(pl.Float32)) for name in NUMBERS)
    counted = joined.select(
        pl.len().alias("rows"), apart.sum().alias("apart"), pl.col("plane_f0").count().alias("found")
    ).collect()
    return {f"join_{name}": float(counted[name][0]) for name in counted.columns}
