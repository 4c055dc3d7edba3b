"""Dimensions too large for a worker's memory: each block scans them and keeps only the rows it looks up."""

from __future__ import annotations

import tempfile

import polars as pl

from schemas.features import Lookup
from schemas.views import FeatureView
from transforms.features.block_inputs import ONE_ROW, BlockInput, dimension_rows, losing, tally_dimension
from transforms.features.plan import BLOCK_ROWS, FeaturePlan
from transforms.records.disk_partitions import DiskPartitions
from transforms.sources.reader import READ_CHUNK_ROWS, locate_rows, stream_slices


def rows_looked_up(plan: FeaturePlan, feature: Lookup, spine: pl.DataFrame) -> pl.DataFrame:
    """Reads the rows of a routed dimension for the keys in `spine`, in the order of `dimension_rows`.

    The first row of a key is the row that a `Lookup` over the whole dimension would use.
    """
    contract, slices = plan.contracts[feature.source.name], plan.dimensions[feature.source.name]
    types, keys = contract.source.schema, [right for _, right in feature.keys]
    wanted = spine.select(pl.col(left).cast(types[right], strict=False).alias(right) for left, right in feature.keys)
    wanted = wanted.drop_nulls().unique()
    parts = [read.frame.join(wanted, on=keys, how="semi") for read in stream_slices(contract, slices)]
    return dimension_rows(
        contract, pl.concat([pl.DataFrame(schema={name: types[name] for name in contract.read}), *parts])
    )


def account(view: FeatureView, plan: FeaturePlan, name: str, part_rows: int = BLOCK_ROWS) -> BlockInput:
    """Reads a dimension for its dead letters and tally only, one partition of keys at a time.

    Like `block_inputs.read_dimension`, but returns no rows.
    """
    contract, slices = plan.contracts[name], plan.dimensions[name]
    keys = list(
        dict.fromkeys(
            tuple(column for _, column in feature.keys)
            for feature in view.features
            if isinstance(feature, Lookup) and feature.source.name == name
        )
    )
    total, rows, dead_letters, refused = 0, 0, [], []
    with tempfile.TemporaryDirectory(prefix="millrace-") as folder:
        parts = -(-sum(each.rows for each in slices) // part_rows)
        spills = [DiskPartitions(folder, key, max(parts, 1)) for key in keys]
        for read in stream_slices(contract, slices):
            total += len(read.frame) + len(read.dead_letters)
            dead_letters.append(read.dead_letters)
            for spill in spills:
                spill.add(read.frame)
        for key, spill in zip(keys, spills, strict=True):
            found = []
            for part in range(spill.parts):
                chunks = list(spill.read(part, READ_CHUNK_ROWS))
                frame = dimension_rows(contract, pl.concat(chunks)) if chunks else pl.DataFrame()
                rows += len(frame) if key == keys[0] else 0
                found += [losing(frame, key)] if chunks else []
            conflicts = pl.concat(found) if found else None
            if conflicts is not None and len(conflicts):
                refused.append(conflicts)
                dead_letters.append(locate_rows(contract, slices, conflicts, key, ONE_ROW))
    used = rows - (len(pl.concat(refused).unique()) if refused else 0)
    nothing = pl.DataFrame(schema={column: contract.source.schema[column] for column in contract.columns})
    return BlockInput(nothing, *tally_dimension(name, total, used, dead_letters))
