"""TFRecord files: what comes back is what was written, to the bit; what is broken is refused by its place."""

import gzip
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pytest
from apache_beam.testing.test_pipeline import TestPipeline as Pipeline
from apache_beam.testing.util import assert_that
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ContractError, StoreError
from transforms.storage.tfrecord_codec import gzipped
from transforms.storage.tfrecord_io import (
    ReadExamples,
    WriteTFRecordFiles,
    matching_files,
    publish_tfrecord_files,
    read_examples,
    write_tfrecord_file,
)

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("small", pa.int32()),
        ("x", pa.float32()),
        ("flag", pa.bool_()),
        ("name", pa.string()),
        ("at", pa.timestamp("us", "UTC")),
        ("date", pa.date32()),
    ]
)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
VALUES = st.fixed_dictionaries(
    {
        "id": st.none() | st.integers(-(2**63), 2**63 - 1),
        "small": st.none() | st.integers(-(2**31), 2**31 - 1),
        "x": st.none() | st.floats(width=32, allow_nan=False),
        "flag": st.none() | st.booleans(),
        "name": st.none() | st.text(max_size=20),
        "at": st.none() | st.integers(-(2**50), 2**52).map(lambda us: EPOCH + timedelta(microseconds=us)),
        "date": st.none() | st.dates(date(1900, 1, 1), date(2200, 1, 1)),
    }
)


def batch_of(rows: list[dict[str, object]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([row[f.name] for row in rows], f.type) for f in SCHEMA], schema=SCHEMA)


def numbered(count: int, start: int = 0, day: int = 1) -> pa.RecordBatch:
    """Rows that differ, all of one date."""
    ids = np.arange(start, start + count)
    rows = [
        {
            "id": i,
            "small": i % 7,
            "x": i / 3,
            "flag": i % 2 == 0,
            "name": f"n{i}",
            "at": EPOCH,
            "date": date(2024, 1, day),
        }
        for i in ids.tolist()
    ]
    return batch_of(rows)


def written(path: Path, *batches: pa.RecordBatch) -> str:
    path.write_bytes(b"".join(part for batch in batches for part in gzipped(batch)))
    return str(path)


@given(rows=st.lists(VALUES, max_size=30), at_once=st.integers(1, 40))
def test_what_was_written_comes_back(tmp_path_factory: pytest.TempPathFactory, rows: list, at_once: int) -> None:
    path = written(tmp_path_factory.getbasetemp() / "rows.tfrecord.gz", batch_of(rows))
    found = list(read_examples(path, SCHEMA, at_once))
    assert all(0 < each.num_rows <= at_once for each in found)
    assert pa.Table.from_batches(found, SCHEMA).equals(pa.Table.from_batches([batch_of(rows)]))


def test_tensorflows_own_files_are_read(tmp_path: Path) -> None:
    import tensorflow as tf

    def example(i: int) -> bytes:
        feature = {
            "id": tf.train.Feature(int64_list=tf.train.Int64List(value=[i])),
            "name": tf.train.Feature(bytes_list=tf.train.BytesList(value=[f"é{i}".encode()])),
            "other": tf.train.Feature(float_list=tf.train.FloatList(value=[1.0, 2.0])),
            **({"x": tf.train.Feature(float_list=tf.train.FloatList(value=[i / 3]))} if i % 2 else {}),
        }
        return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()

    for kind in ("GZIP", ""):
        with tf.io.TFRecordWriter(str(tmp_path / f"f{kind}"), options=kind) as writer:
            for i in range(50):
                writer.write(example(i))
        (found,) = read_examples(str(tmp_path / f"f{kind}"), SCHEMA)
        assert found.column(0).to_pylist() == list(range(50))
        assert found.column(4).to_pylist() == [f"é{i}" for i in range(50)]
        assert found.column(2).to_pylist() == [np.float32(i / 3) if i % 2 else None for i in range(50)]
        assert found.column(3).null_count == 50  # left out everywhere


def test_readers_in_threads_do_not_mix_their_rows(tmp_path: Path) -> None:
    """One decoder in two threads handed out the other's rows; each reader has its own."""
    paths = [written(tmp_path / f"{i}.gz", numbered(3_000, i * 10_000)) for i in range(4)]

    def ids(path: str) -> list[int]:
        return [i for each in read_examples(path, SCHEMA, 500) for i in each.column(0).to_pylist()]

    with ThreadPoolExecutor(4) as threads:
        for i, found in enumerate(threads.map(ids, paths)):
            assert found == list(range(i * 10_000, i * 10_000 + 3_000))


def test_any_flipped_bit_is_noticed(tmp_path: Path) -> None:
    content = gzip.decompress(b"".join(gzipped(numbered(3))))
    path = tmp_path / "rows.tfrecord"
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 4
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=r"rows\.tfrecord, record \d+: "):
            list(read_examples(str(path), SCHEMA))


@pytest.mark.parametrize("packed", [True, False])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, packed: bool) -> None:
    content = b"".join(gzipped(numbered(5)))
    whole = content if packed else gzip.decompress(content)
    path = tmp_path / "rows"
    sizes = {len(whole) // 5 * i for i in range(1, 5)} if packed else set(range(1, len(whole)))
    record = len(whole) // 5
    for size in sizes if packed else sorted(sizes - {record * i for i in range(6)})[::7]:
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="TFRecord file is whole"):
            list(read_examples(str(path), SCHEMA))


def test_what_is_no_example_and_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    rows = numbered(10)
    path = written(tmp_path / "rows.gz", rows)
    with pytest.raises(ContractError, match=r"rows\.gz, records 0 to 9.*name"):
        list(read_examples(path, pa.schema([("name", pa.float32())])))
    large = written(tmp_path / "large.gz", numbered(10, 1000))
    with pytest.raises(ContractError, match="records 0 to 9"):
        list(read_examples(large, pa.schema([("id", pa.int8())])))
    import tensorflow as tf

    two = tf.train.Feature(int64_list=tf.train.Int64List(value=[1, 2]))
    with tf.io.TFRecordWriter(str(tmp_path / "two")) as writer:
        writer.write(tf.train.Example(features=tf.train.Features(feature={"id": two})).SerializeToString())
    with pytest.raises(ContractError, match="feature 'id' has 2 values"):
        list(read_examples(str(tmp_path / "two"), SCHEMA))
    with tf.io.TFRecordWriter(str(tmp_path / "text")) as writer:
        writer.write(b"no example")
    with pytest.raises(ContractError, match="records 0 to 0"):
        list(read_examples(str(tmp_path / "text"), SCHEMA))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="matches some"):
        matching_files(str(tmp_path / "*.gz"))
    with pytest.raises(StoreError, match="nothing"):
        list(read_examples(str(tmp_path / "nothing"), SCHEMA))


def test_parts_are_published_in_order_of_date_and_replace_older_ones(tmp_path: Path) -> None:
    prefix = str(tmp_path / "out" / "scores")
    parts = [write_tfrecord_file(numbered(10, i, day=4 - i), prefix, "run") for i in range(3)]
    assert not [name for name in os.listdir(tmp_path / "out") if not name.startswith(".")]  # nothing to see yet
    again = write_tfrecord_file(numbered(10, 0, day=4), prefix, "run")
    assert again == parts[0]
    names = publish_tfrecord_files([*parts, again], prefix)
    assert sorted(os.listdir(tmp_path / "out")) == [f"scores-0000{i}-of-00003.tfrecord.gz" for i in range(3)]
    found = [next(read_examples(name, SCHEMA)).column(0)[0].as_py() for name in names]
    assert found == [2, 1, 0]
    assert publish_tfrecord_files(parts, prefix) == names  # as after a retry
    assert len(os.listdir(tmp_path / "out")) == 3

    publish_tfrecord_files([write_tfrecord_file(numbered(4, 7), prefix, "next")], prefix)
    assert os.listdir(tmp_path / "out") == ["scores-00000-of-00001.tfrecord.gz"]


def test_reading_and_writing_in_a_pipeline(tmp_path: Path) -> None:
    paths = tuple(written(tmp_path / f"{i}.gz", numbered(100, i * 100, day=i + 1)) for i in range(3))
    with Pipeline() as pipeline:
        parts = pipeline | ReadExamples(paths, SCHEMA) | WriteTFRecordFiles(str(tmp_path / "copy"), "run")
        rows = parts | beam.Map(lambda found: sorted(each.rows for each in found))
        assert_that(rows, lambda found: found == [[100, 100, 100]] or pytest.fail(str(found)))
        _ = parts | beam.Map(publish_tfrecord_files, str(tmp_path / "copy"))
    copies = matching_files(str(tmp_path / "copy-*.tfrecord.gz"))
    found = [i for path in copies for each in read_examples(path, SCHEMA) for i in each.column(0).to_pylist()]
    assert found == list(range(300))
