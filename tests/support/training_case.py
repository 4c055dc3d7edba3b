"""Helpers and fixtures for: training through the iterator against XGBoost on whole arrays, for every kind of
objective."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, encoders
from schemas.splits import LABEL
from transforms.training.examples import ExamplesAccount, ExampleShard
from transforms.training.labels import LabelCounts
from transforms.training.trainer import Study

SPINE = Source("spine", time="t", columns={"k": pl.Int64, "word": pl.String, "x": pl.Float32, "y": pl.Float32})
VIEW = FeatureView("v", SPINE, key="k", features=[Derived(x=pl.col("x"), y=pl.col("y"))])
LABELS = Label(Source("e", time="at", columns={"k": pl.Int64, "z": pl.Float32}), on="k", value=pl.col("z"), within="1d")


def model(objective: str = "binary:logistic", metric: str = "auc", **more: Any) -> Model:
    more = {
        "params": {"max_depth": 3},
        "rounds": 8,
        "encode": {"word": encoders.Native(), "x": encoders.Standardize()},
    } | more
    return Model(VIEW, LABELS, TimeSplit("1d", "1d"), objective=objective, metric=metric, **more)


def examples(
    folder: Path, objective: str, parts: int = 3, rows: int = 900
) -> tuple[ExamplesAccount, dict[str, pa.Table]]:
    """Example files with something to learn, `parts` of them for each split."""
    random = np.random.default_rng(8)
    shards, tables, seen = [], {}, {}
    for split in ("train", "validate"):
        x, y = random.normal(size=(2, rows)).astype(np.float32)
        word = random.choice(np.array(["a", "b", "c"]), rows)
        signal = x + (word == "b") + random.normal(size=rows) * 0.5
        label = {"binary:logistic": signal > 0.3, "multi:softprob": np.digitize(signal, [-0.5, 0.8])}.get(
            objective, np.exp(signal)
        )
        columns = {
            "x": pa.array(x),
            "y": pa.array(y, mask=random.random(rows) < 0.2),
            "word": pa.array(word),
            LABEL: pa.array(label.astype(np.float32)),
        }
        tables[split] = pa.table(columns)
        seen[split] = (
            dict.fromkeys(np.unique(label.astype(float)).tolist(), 1)
            if "log" in objective or "multi" in objective
            else {}
        )
        for i in range(parts):
            low, high = rows * i // parts, rows * (i + 1) // parts
            path = folder / f"{split}-{parts}-{i}.parquet"
            pq.write_table(tables[split].slice(low, high - low), path, row_group_size=100)
            shards.append(ExampleShard(split, i, str(path), high - low))
    return ExamplesAccount(
        2 * rows, {name: LabelCounts(rows, 0, 0, 0, rows) for name in tables}, seen, tuple(shards)
    ), tables


def study(model: Model, folder: Path, cores: int = 1) -> Study:
    split = model.split.resolve(datetime(2024, 1, 1, tzinfo=UTC))
    return Study(model, split, str(folder), cores)
