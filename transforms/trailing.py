"""Events and spine rows → features, block by block."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping

import apache_beam as beam
import polars as pl
import pyarrow as pa
from apache_beam import pvalue

from schemas.views import FeatureView
from transforms.batches import batch
from transforms.ids import row_ids
from transforms.inputs import Input, letters_batch, read_dimension, read_events, read_spine
from transforms.kernels import compute
from transforms.plan import Block, Plan

log = logging.getLogger("millrace.features")


@dataclasses.dataclass(eq=False)  # Beam sets the label
class TrailingFeatures(beam.PTransform):  # type: ignore[misc]
    """PCollection[Block] → tuple of PCollections: features (RecordBatch of `view.output_schema`, sorted by time and key),
    dead letters (RecordBatch of `DEAD_LETTERS`), and tallies (`inputs.Tally`).

    A block reads the slices it needs and is computed in one go; nothing is shuffled.
    """

    view: FeatureView
    plan: Plan

    def expand(self, blocks: beam.PCollection) -> tuple[beam.PCollection, beam.PCollection, beam.PCollection]:
        rules = dataclasses.replace(self.plan, blocks=())
        outputs = blocks | "Compute" >> beam.ParDo(ComputeBlock(self.view, rules, len(self.plan.blocks))).with_outputs(
            "letters", "tallies", main="features"
        )
        outputs.features.element_type = outputs.letters.element_type = pa.RecordBatch
        return outputs.features, outputs.letters, outputs.tallies


class ComputeBlock(beam.DoFn):  # type: ignore[misc]
    """Block → its features; tagged: its dead letters and tallies.  The first block accounts for the dimensions."""

    def __init__(self, view: FeatureView, plan: Plan, blocks: int) -> None:
        self.view, self.plan, self.blocks = view, plan, blocks

    def setup(self) -> None:
        self.dimensions = {name: read_dimension(self.view, self.plan, name) for name in self.plan.dimensions}

    def process(self, block: Block) -> Iterator[pa.RecordBatch | pvalue.TaggedOutput]:
        features, inputs = compute_block(
            self.view, self.plan, block, {name: read.frame for name, read in self.dimensions.items()}
        )
        if block.index == 0:
            inputs += self.dimensions.values()
        log.info("block %d of %d: %d rows", block.index + 1, self.blocks, features.num_rows)
        if features.num_rows:
            yield features
        letters = letters_batch(self.view, [each.letters for each in inputs])
        if letters.num_rows:
            yield pvalue.TaggedOutput("letters", letters)
        for each in inputs:
            yield pvalue.TaggedOutput("tallies", each.tally)


def compute_block(
    view: FeatureView, plan: Plan, block: Block, dimensions: Mapping[str, pl.DataFrame]
) -> tuple[pa.RecordBatch, list[Input]]:
    """The block's features, and the inputs they were computed from."""
    spine = read_spine(view, plan, block)
    events = {name: read_events(view, plan, block, name) for name in block.events}
    features = compute(view, spine.frame, {**dimensions, **{name: each.frame for name, each in events.items()}})
    return features_batch(view, features), [spine, *events.values()]


def features_batch(view: FeatureView, features: pl.DataFrame) -> pa.RecordBatch:
    """Computed features with `row_id` and `date`, as a RecordBatch of `view.output_schema`."""
    identity = row_ids(view.name, [features[name] for name in (*view.key, view.time)])
    return batch(features.with_columns(identity, pl.col(view.time).dt.date().alias("date")), view.output_schema)
