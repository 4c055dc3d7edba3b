"""The examples that training leaves, read by TensorFlow and by TFDV."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from beam_pipelines import features, training
from tests.support import shop
from transforms.models.bundle import load_bundle
from transforms.validation.tfdv_schema import parse_statistics


def test_tensorflow_and_tfdv_read_the_examples_of_a_run(tmp_path: Path) -> None:
    import tensorflow as tf
    import tensorflow_data_validation as tfdv

    path = shop.write(tmp_path, 800)
    common = ["--definition", str(path), "--store", str(tmp_path)]
    path.write_text(shop.DEFINITION.replace('"auc": 0.6', '"auc": 0.1'))
    assert features.main([*common, "--run_id", "f"]) == 0
    assert training.main([*common, "--run_id", "t", "--threads=1"]) == 0
    counts = json.loads((tmp_path / "runs/t/training.json").read_text())["splits"]
    folder = tmp_path / "examples/buying/t"
    for split, each in counts.items():
        rows = pl.concat([pl.read_parquet(file) for file in sorted(folder.glob(f"{split}-*.parquet"))])
        records = tf.data.TFRecordDataset([str(file) for file in sorted(folder.glob(f"{split}-*.tfrecord.gz"))], "GZIP")
        found = [tf.train.Example.FromString(record.numpy()).features.feature for record in records]
        assert len(found) == len(rows) == each["entered"]
        assert [each["__label"].float_list.value[0] for each in found] == rows["__label"].to_list()
        assert [each["shop"].bytes_list.value[0].decode() for each in found] == rows["shop"].to_list()
        ages = [each["age"].float_list.value[0] if each["age"].float_list.value else None for each in found]
        assert ages == rows["age"].to_list()

    theirs = tfdv.generate_statistics_from_tfrecord(str(folder / "train-*.tfrecord.gz"))
    ours = parse_statistics(load_bundle(tmp_path / "runs/t/model").extra["statistics.pb"])
    assert theirs.datasets[0].num_examples == ours.datasets[0].num_examples == counts["train"]["entered"]
    known = {feature.path.step[0]: feature for feature in theirs.datasets[0].features}
    for feature in ours.datasets[0].features:
        other = known[feature.path.step[0]]
        kind = feature.WhichOneof("stats")
        mine, its = getattr(feature, kind), getattr(other, kind)
        assert mine.common_stats.num_missing == its.common_stats.num_missing
        if kind == "num_stats":
            assert (mine.mean, mine.min, mine.max) == pytest.approx((its.mean, its.min, its.max))
        else:
            assert mine.unique == its.unique
