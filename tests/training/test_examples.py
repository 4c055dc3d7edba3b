"""Examples: every row accounted for, the same bytes twice, and files that TensorFlow reads."""

from __future__ import annotations

import gzip
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beam_pipelines import features, training
from schemas.splits import SPLITS
from tests.support import shop
from transforms.storage import tfrecord_codec
from transforms.storage.tfrecord_io import read_examples
from transforms.training import examples
from transforms.training.examples import ExamplePlan, ExamplesAccount

SCHEMA = pa.schema(
    [
        ("a float with a long name é", pa.float32()),
        ("d", pa.float64()),
        ("i", pa.int64()),
        ("s", pa.string()),
        ("b", pa.bool_()),
        ("day", pa.date32()),
        ("at", pa.timestamp("us", "UTC")),
        ("small", pa.int8()),
    ]
)
row = st.fixed_dictionaries(
    {
        SCHEMA.names[0]: st.one_of(st.none(), st.floats(width=32, allow_nan=False)),
        "d": st.one_of(st.none(), st.floats(width=32, allow_nan=False)),
        "i": st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1)),
        "s": st.one_of(st.none(), st.text(max_size=5), st.just("x" * 300)),
        "b": st.sampled_from([None, True, False]),
        "day": st.sampled_from([None, date(1969, 12, 31), date(2024, 2, 29)]),
        "at": st.sampled_from([None, datetime(2024, 2, 29, 12, 30, 1, 5, tzinfo=UTC)]),
        "small": st.one_of(st.none(), st.integers(-128, 127)),
    }
)


def batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([each[n] for each in rows], SCHEMA.field(n).type) for n in SCHEMA.names], schema=SCHEMA
    )


def parsed(record: bytes) -> dict[str, Any]:
    """A tf.Example by TensorFlow's own protos."""
    import tensorflow as tf

    result = {}
    for name, feature in tf.train.Example.FromString(record).features.feature.items():
        (value,) = getattr(feature, feature.WhichOneof("kind")).value
        result[name] = value
    return result


def stored(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, datetime):
        return int((value - datetime(1970, 1, 1, tzinfo=UTC)).total_seconds() * 1e6)
    return (value - date(1970, 1, 1)).days if isinstance(value, date) else value


@pytest.fixture(scope="session")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfrecords") / "rows.tfrecord.gz"


@settings(max_examples=30)
@given(rows=st.lists(row, min_size=1, max_size=12), skipped=st.integers(0, 3))
def test_tensorflow_reads_what_was_written(path: Path, rows: list[dict[str, Any]], skipped: int) -> None:
    import tensorflow as tf

    content = batch([rows[0]] * skipped + rows).slice(skipped)
    path.write_bytes(b"".join(tfrecord_codec.gzipped(content)))
    found = [parsed(record.numpy()) for record in tf.data.TFRecordDataset(str(path), "GZIP")]
    assert found == [{name: stored(value) for name, value in each.items() if value is not None} for each in rows]


KINDS = {
    pa.float32(): st.floats(width=32, allow_nan=False),
    pa.int64(): st.one_of(st.integers(0, 300), st.integers(-(2**63), 2**63 - 1)),
    pa.int16(): st.integers(0, 300),
    pa.large_string(): st.one_of(st.text(max_size=3), st.just("y" * 200)),
    pa.dictionary(pa.int8(), pa.string()): st.sampled_from(["", "one", "three"]),
}


@settings(max_examples=60)
@given(data=st.data())
def test_bytes_are_those_of_tensorflow(data: st.DataObject) -> None:
    """Of any columns, in TensorFlow's order of names; rows are written a few at a time."""
    import tensorflow as tf

    long = data.draw(st.lists(st.sampled_from([0, 1, 90, 130]), min_size=1, max_size=4))
    names = [f"{i}{'x' * length}" for i, length in enumerate(long)]
    kinds = [data.draw(st.sampled_from(list(KINDS))) for _ in names]
    rows = data.draw(st.lists(st.tuples(*(st.one_of(st.none(), KINDS[kind]) for kind in kinds)), max_size=9))
    columns = [pa.array([row[i] for row in rows], kind) for i, kind in enumerate(kinds)]
    expected = []
    for row in rows:
        example = tf.train.Example(features=tf.train.Features())  # which is written even if it is empty
        for name, kind, value in zip(names, kinds, row, strict=True):
            feature = example.features.feature[name] if value is not None else None
            if isinstance(value, str):
                feature.bytes_list.value.append(value.encode())
            elif pa.types.is_floating(kind) and feature is not None:
                feature.float_list.value.append(value)
            elif feature is not None:
                feature.int64_list.value.append(value)
        expected.append(example.SerializeToString(deterministic=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tfrecord_codec, "CACHED_ROWS", 4)
        content = tfrecord_codec.records(pa.RecordBatch.from_arrays(columns, names))
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(content)
        assert [record.numpy() for record in tf.data.TFRecordDataset(file.name)] == expected


def test_many_rows_make_several_members_and_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pa.RecordBatch.from_pydict(
        {"x": pa.array(range(1000)), "word": pa.array([f"w{i % 7}" for i in range(1000)])}
    )
    one = b"".join(tfrecord_codec.gzipped(whole))
    monkeypatch.setattr(tfrecord_codec, "CHUNK_ROWS", 16)
    monkeypatch.setattr(tfrecord_codec, "MEMBER_ROWS", 64)
    several = b"".join(tfrecord_codec.gzipped(whole))
    assert gzip.decompress(one) == gzip.decompress(several)
    assert several.count(b"\x1f\x8b\x08") >= 16
    assert b"".join(tfrecord_codec.gzipped(whole)) == several
    assert gzip.decompress(b"".join(tfrecord_codec.gzipped(whole.slice(0, 0)))) == b""


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> ExamplePlan:
    store = tmp_path_factory.mktemp("examples")
    path = shop.write(store, 1200)
    assert features.main(["--definition", str(path), "--store", str(store), "--run_id", "f"]) == 0
    return training.resolve(training.parse(["--definition", str(path), "--store", str(store), "--run_id", "e"]))[0]


def made(plan: ExamplePlan) -> ExamplesAccount:
    accounts = []
    for block in plan.blocks:
        parts, account = examples.make_examples(plan, block)
        shards = tuple(examples.write_shard(plan, name, block, rows) for name, rows in parts.items())
        accounts.append(ExamplesAccount(account.rows, account.counts, account.labels, shards))
    return examples.require_usable(examples.add_accounts(accounts), plan)


def test_examples_hold_every_row_once_with_its_label(planned: ExamplePlan) -> None:
    account = made(planned)
    assert account.rows == 1200
    sources = Path(planned.folder).parents[2] / "sources"
    sold = set(pl.read_parquet(sources / "sales/part.parquet")["visit"].to_list())
    seen: list[int] = []
    for split in SPLITS:
        rows = pl.concat([pl.from_arrow(each) for shard in account.of(split) for each in examples.read_shard(shard)])
        assert isinstance(rows, pl.DataFrame)
        assert len(rows) == account.counts[split].entered > 50
        assert rows["__label"].to_list() == [float(visit in sold) for visit in rows["visit"]]
        late = rows["__label_time"] - rows["asked"]
        assert set(late.dt.total_hours().to_list()) == {2, 24}
        seen += rows["visit"].to_list()
    assert len(seen) == len(set(seen)) == sum(each.entered for each in account.counts.values())


def test_tfrecords_hold_what_parquet_holds(planned: ExamplePlan) -> None:
    schema = examples.schema_of(planned.model)
    for shard in made(planned).shards:
        (ours,) = read_examples(shard.path.replace(".parquet", ".tfrecord.gz"), schema)
        theirs = pa.Table.from_batches(examples.read_shard(shard)).combine_chunks().to_batches()[0]
        assert pl.DataFrame(pl.from_arrow(ours)).equals(pl.DataFrame(pl.from_arrow(theirs)))


def test_again_gives_the_same_files_and_clears_what_others_left(planned: ExamplePlan) -> None:
    made(planned)
    folder = Path(planned.folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {name.split("-")[0] for name in before} == set(SPLITS)
    (folder / "train-00007-of-00009.parquet").write_bytes(b"left by a larger plan")
    made(planned)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
