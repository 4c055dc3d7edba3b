"""Compares live predictions with a batch job's: each feature row is scored again, by the version that its prediction
names.
"""

from __future__ import annotations

import dataclasses
from datetime import date, timedelta

import polars as pl
from deltalake import DeltaTable

from schemas.views import FeatureView
from transforms.inference.live_output import Outlet
from transforms.models.registry import Registry
from transforms.models.scoring import PinnedModel, Scorer, open_scorer, predict
from transforms.records.record_batches import batch, frame
from transforms.records.value_text import format_value
from transforms.storage.delta_tables import data_files, open_table, read_group
from transforms.storage.paths import features_live_uri

EXAMPLES = 3


@dataclasses.dataclass
class Rescored:
    """The result of a comparison.

    Args:
        feature_rows: number of rows in the live feature table.
        predictions: number of rows in the table of live predictions.
        missing: feature rows without a prediction.
        doubled: further predictions of a row that has one.
        stray: predictions of a row that the feature table lacks.
        other_cut: predictions of a feature row that had another cut on the topic than in the table; not compared.
        compared: number of predictions compared, by version.
        differing: predictions that differ in any bit from a batch job's.
        examples: some of those, as text.
    """

    feature_rows: int = 0
    predictions: int = 0
    missing: int = 0
    doubled: int = 0
    stray: int = 0
    other_cut: int = 0
    compared: dict[str, int] = dataclasses.field(default_factory=dict)
    differing: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The result as in `run.json`, where two keys are older than the names here."""
        names = {"feature_rows": "answers", "other_cut": "otherwise"}
        return {names.get(name, name): value for name, value in dataclasses.asdict(self).items()}


def rescore(
    view: FeatureView, store: str, model: str, registry: str, start: date | None = None, end: date | None = None
) -> Rescored:
    """Compares the predictions of `[start, end)`, a date at a time, so that memory holds one date.

    Raises:
        StoreError: the registry, or a version's files, cannot be read.
    """
    found, scorers, models = Rescored(), dict[str, Scorer](), Registry(registry)
    feature_rows = open_table(features_live_uri(store, view.name, view.fingerprint))
    made = open_table(Outlet(view, model, store, "").uri)
    every = [file for table in (feature_rows, made) if table is not None for file in data_files(table, start, end)]
    for day in sorted({file.date for file in every}):
        rows, published = _rows(feature_rows, day), _rows(made, day)
        found.feature_rows += 0 if rows is None else len(rows)
        found.predictions += 0 if published is None else len(published)
        if published is None or rows is None:
            found.missing += 0 if rows is None else len(rows)
            found.stray += 0 if published is None else len(published)
            continue
        once = published.unique("row_id", keep="first", maintain_order=True)
        found.doubled += len(published) - len(once)
        found.missing += rows.join(once, on="row_id", how="anti").height
        found.stray += once.join(rows, on="row_id", how="anti").height
        same = once.join(rows, on=["row_id", "__cut"], how="semi")
        found.other_cut += once.join(rows, on="row_id", how="semi").height - same.height
        for (version,), part in same.group_by("model_version", maintain_order=True):
            name = str(version)
            if name not in scorers:
                _, folder, digest = models.locate(model, name)
                scorers[name] = open_scorer(PinnedModel(folder, name, digest))
            _compare(found, view, scorers[name], rows.join(part, on="row_id", how="semi"), part)
    return found


def _rows(table: DeltaTable | None, day: date) -> pl.DataFrame | None:
    files = [] if table is None else data_files(table, day, day + timedelta(days=1))
    return frame(read_group(files)) if files else None


def _compare(found: Rescored, view: FeatureView, scorer: Scorer, rows: pl.DataFrame, published: pl.DataFrame) -> None:
    again = frame(predict(scorer, batch(rows, view.output_schema), str(published["arm"][0]))).sort("row_id")
    published = published.select(again.columns).sort("row_id")
    # As bits: two NaN are equal, 0.0 and −0.0 are not.
    floats = [pl.col(name).reinterpret(signed=True) for name, dtype in again.schema.items() if dtype.is_float()]
    same = (
        again.with_columns(floats)
        .select(
            pl.all_horizontal(
                pl.col(name).eq_missing(column) for name, column in _columns(published.with_columns(floats))
            )
        )
        .to_series()
    )
    found.compared[scorer.version] = found.compared.get(scorer.version, 0) + len(published)
    found.differing += int((~same).sum())
    for live, batched in zip(
        published.filter(~same).rows(named=True), again.filter(~same).rows(named=True), strict=True
    ):
        if len(found.examples) < EXAMPLES:
            differ = [
                f"{name} {format_value(live[name], dtype)} live, {format_value(batched[name], dtype)} batch"
                for name, dtype in again.schema.items()
                if live[name] != batched[name]
            ]
            found.examples.append(f"row {live['row_id']} by version {scorer.version}: {'; '.join(differ)}")


def _columns(rows: pl.DataFrame) -> list[tuple[str, pl.Series]]:
    return [(name, rows[name].alias(f"published:{name}")) for name in rows.columns]
