"""Computes a block's features from rows in memory, events on disk and columns of an older table."""

from __future__ import annotations

import dataclasses

import numpy as np
import polars as pl
import pyarrow as pa

from schemas.feature_groups import SourceFeature
from schemas.features import Lookup
from schemas.views import FeatureView
from transforms.features.column_reuse import Copies, copied_columns
from transforms.features.kernel import KernelTables, Stage, feature_columns, output_columns, stages
from transforms.features.key_partitions import KeyedEvents
from transforms.features.plan import FeaturePlan
from transforms.features.routed_dimensions import rows_looked_up
from transforms.records.record_batches import batch
from transforms.records.row_hashing import row_ids
from transforms.records.times import day_number


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTables:
    """Where the features of a block are read from.

    Args:
        tables: the rows in memory.
        plan: lists the dimensions whose rows are read when they are looked up.
        on_disk: the block's events, if they do not fit in memory; `tables` then has none.
    """

    tables: KernelTables
    plan: FeaturePlan
    on_disk: KeyedEvents | None = None

    def columns(self, view: FeatureView, stage: Stage, frame: pl.DataFrame) -> list[pl.Series]:
        """Returns the columns of the features that a stage reads, in the order of the rows of `frame`."""
        columns, features = self.tables.split(stage.reading)
        in_memory: list[SourceFeature] = []
        for feature in features:
            if isinstance(feature, Lookup) and feature.source.name in self.plan.routed:
                rows = {feature.source.name: rows_looked_up(self.plan, feature, frame)}
                columns += feature_columns(view, [feature], frame, KernelTables(rows))
            elif isinstance(feature, Lookup) or self.on_disk is None:
                in_memory.append(feature)
        columns += feature_columns(view, in_memory, frame, self.tables)
        if self.on_disk is not None:
            columns += self.on_disk.feature_columns(features, frame)
        return columns


def compute_features(
    view: FeatureView, spine: pl.DataFrame, inputs: BlockTables, copies: Copies | None = None
) -> pa.RecordBatch:
    """Computes the features of a block's spine rows, as `kernel.compute` does, except the columns of `copies`.

    The columns of `copies` are read from the older table. They are computed if a file of that table is gone, or has
    other rows.
    """
    if copies is None or not len(spine):
        return features_batch(view, compute_stages(view, spine, inputs))
    days = day_number(spine[view.time].to_physical().to_numpy())
    parts, positions = [], []
    for names, chosen in copies.classes(np.unique(days).tolist()).items():
        position = np.flatnonzero(np.isin(days, chosen))
        some = spine[position]
        copied = copied_columns(view, copies, some, names, chosen) if names else {}
        tables = dataclasses.replace(inputs.tables, columns=copied)
        parts.append(compute_stages(view, some, dataclasses.replace(inputs, tables=tables)))
        positions.append(position)
    order = np.argsort(np.concatenate(positions), kind="stable")
    return features_batch(view, pl.concat(parts)[order])


def compute_stages(view: FeatureView, spine: pl.DataFrame, inputs: BlockTables) -> pl.DataFrame:
    """Computes the view's features stage by stage; see `kernel.compute`."""
    frame = spine
    for stage in stages(view):
        frame = stage.derive(view, frame.with_columns(inputs.columns(view, stage, frame)))
    return output_columns(view, frame)


def features_batch(view: FeatureView, features: pl.DataFrame) -> pa.RecordBatch:
    """Converts computed features to a RecordBatch of `view.output_schema`, with `row_id` and `date`."""
    identity = row_ids(view.name, [features[name] for name in (*view.key, view.time)])
    return batch(features.with_columns(identity, pl.col(view.time).dt.date().alias("date")), view.output_schema)
