"""Helpers and fixtures for: `millrace inference` on real files: a real feature table, a real registry, real
boosters."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import xgboost

from schemas.loading import load_definition
from transforms.models.bundle import Bundle
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import features_uri
from transforms.training.fit_encoders import fit

DAYS = 6
DEFINITION = """
import polars as pl
from schemas import Derived, FeatureView, Label, Model, Source, TimeSplit, Trailing, encoders

orders = Source("orders", time="asked_at", columns={"id": pl.Int64, "shop": pl.String, "amount": pl.Float32})
sales = Source("sales", time="sold_at", columns={"id": pl.Int64, "shop": pl.String, "paid": pl.Float32})
view = FeatureView("orders", spine=orders, key="id", features=[
    Derived(amount=pl.col("amount"), hour=pl.col("asked_at").dt.hour()),
    Trailing(sales, by="shop", over=("6h", "1d"), stats={"paid": ("mean", "count")}),
])
model = Model(view, label=Label(sales, on="id", value=pl.col("paid") > 20, within="1d"),
              split=TimeSplit(validate="1d", test="1d"), encode={"shop": encoders.Ordinal()})
"""


def write_sources(store: Path) -> None:
    random = np.random.default_rng(5)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    count = 400 * DAYS
    asked = [start + timedelta(seconds=int(s)) for s in np.sort(random.choice(DAYS * 86_400, count, replace=False))]
    shops = np.array(["a", "b", "c"])[random.integers(0, 3, count)]
    amount = (random.gamma(2, 10, count) * 100).round() / 100
    orders = {"asked_at": asked, "id": range(count), "shop": shops, "amount": amount.astype(np.float32)}
    sold = {
        "sold_at": [t + timedelta(minutes=7) for t in asked],
        "id": range(count),
        "shop": shops,
        "paid": amount.astype(np.float32),
    }
    for name, columns in {"orders": orders, "sales": sold}.items():
        folder = store / "sources" / name
        folder.mkdir(parents=True)
        time = {key: pl.Datetime("us", "UTC") for key in ("asked_at", "sold_at") if key in columns}
        pl.DataFrame(columns, schema_overrides=time).write_parquet(folder / "part.parquet", use_pyarrow=True)


def train(definition: str, store: Path, seed: int = 0) -> Bundle:
    """A booster over the table's features; which one matters little, that scores are its own does."""
    model = load_definition(definition).require_model()
    batch = feature_rows(definition, store)
    fitted = fit(model, [batch])
    label = (np.nan_to_num(fitted.apply(batch)[:, 0]) > 20).astype(np.float32)
    data = xgboost.DMatrix(fitted.apply(batch), label, feature_names=fitted.names)
    booster = xgboost.train(
        {"objective": "binary:logistic", "max_depth": 3, "nthread": 2, "base_score": 0.3 + seed / 10}, data, 5
    )
    view = model.view
    manifest = {
        "model": model.name,
        "objective": "binary:logistic",
        "classes": 1,
        "fingerprint": view.fingerprint,
        "view": view.name,
        "key": list(view.key),
        "time": view.time,
        "inputs": fitted.inputs,
    }
    return Bundle(bytes(booster.save_raw("ubj")), fitted, manifest)


def feature_rows(definition: str, store: Path) -> pa.RecordBatch:
    view = load_definition(definition).view
    table = open_table(features_uri(str(store), view.name, view.fingerprint))
    assert table is not None
    return read_group(data_files(table))
