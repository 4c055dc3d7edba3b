"""What is stale follows from the data and the clock by which stamps are judged."""

import dataclasses
from datetime import UTC, date, datetime
from pathlib import Path

import apache_beam as beam
import numpy as np
import polars as pl
import pyarrow.parquet as pq

from beam_pipelines import features
from beam_pipelines.features import FeaturesOptions
from schemas import Source
from tests.support import shop
from tests.support.slices import slices_of
from transforms.features.source_digests import _dimension_digest
from transforms.records.row_hashing import combine_hashes, hash_column
from transforms.records.times import as_date
from transforms.sources.contracts import Contract
from transforms.sources.reader import READ_CHUNK_ROWS


def at(options: FeaturesOptions, moment: datetime) -> FeaturesOptions:
    """The same run, launched at `moment`."""
    return dataclasses.replace(options, now=int(moment.timestamp() * 1_000_000))


def test_spine_rows_too_far_ahead_are_computed_once_their_time_comes(tmp_path: Path) -> None:
    """Their file has not changed: a day of which some rows were set aside for their stamp does not count as known."""
    definition = shop.write(tmp_path, 600)
    options = features.parse(["--definition", str(definition), "--store", str(tmp_path), "--no-statistics"])
    first = at(options, datetime(2024, 2, 10, 9, tzinfo=UTC))
    pipeline = beam.Pipeline()
    features.build(pipeline, first, features.prepare(first))
    pipeline.run().wait_until_finish()
    assert features.prepare(first).plan is None, "nothing changed and no time has passed"
    later = features.prepare(at(options, datetime(2024, 2, 13, 9, tzinfo=UTC)))
    reasons = {as_date(day): why for day, why in later.stale.reasons.items()}
    assert reasons[date(2024, 2, 11)] == "visits changed on 2024-02-11"
    assert set(reasons) == {date(2024, 2, day) for day in (11, 12, 13, 14)}


def test_a_dimension_read_in_pieces_has_the_digest_of_the_whole_in_any_order(tmp_path: Path) -> None:
    shops = Source("shops", columns={"shop": pl.Int64, "size": pl.Float64})
    rows = pl.DataFrame(
        {"shop": np.arange(READ_CHUNK_ROWS + 1000), "size": np.random.default_rng(1).random(READ_CHUNK_ROWS + 1000)}
    )

    def digest(name: str, frame: pl.DataFrame, group: int) -> int:
        folder = tmp_path / name / "shops"
        folder.mkdir(parents=True)
        pq.write_table(frame.to_arrow(), folder / "part.parquet", row_group_size=group)
        contract = Contract(shops, ("shop", "size"))
        return _dimension_digest(contract, slices_of(str(tmp_path / name), contract))

    whole = digest("whole", rows, len(rows))
    assert digest("pieces", rows.sample(fraction=1, shuffle=True, seed=2), 70_000) == whole
    contract = Contract(shops, ("shop", "size"))
    hashes = combine_hashes([hash_column(rows[name]) for name in contract.columns])
    assert whole == int(np.add.reduce(hashes)), "the digest that tables hold already"
    changed = rows.with_columns(size=pl.when(pl.col("shop") == 77).then(0.0).otherwise("size"))
    assert digest("changed", changed, 70_000) != whole
