"""A message cannot make a job need more than it should: bombs, deep nesting and crafted lengths are dead letters of
both live jobs, and the messages beside them are read."""

from __future__ import annotations

import bz2
import contextlib
import json
import lzma
import random
import resource
import struct
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from beam_pipelines import features_streaming, inference_streaming
from schemas import FeatureView, Source, Trailing
from schemas.errors import ContractError, DefinitionError
from schemas.live import live_schema
from tests.support import shop
from tests.support.crafted import running_code, with_schema
from transforms.inference.live_input import DecodeFeatureRows, to_score
from transforms.inference.live_records import BatchOrigin
from transforms.streaming.avro_messages import avro_rows, check_avro
from transforms.streaming.live_features import DecodeBundles
from transforms.streaming.message_limits import (
    DEFAULT_LIMITS,
    MessageLimits,
    check_arrow,
    check_json,
    json_depth,
    read_arrow,
)
from transforms.streaming.messages import Decoded, Message, decode, from_arrow, to_arrow
from transforms.streaming.micro_batches import micro_batches_of

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
ARRIVED = int(NOW.timestamp() * 1e6)
sales = Source(
    "sales", time="sold", ahead="1h", columns={"id": pl.Int64, "shop": pl.String, "due": pl.Datetime("us", "UTC")}
)
GOOD = pl.DataFrame([{"sold": NOW, "id": 1, "shop": "a", "due": NOW}], schema=sales.schema)
asked = Source("asked", time="sold", columns={"id": pl.Int64, "shop": pl.String, "at": pl.Datetime("us", "UTC")})
reads = Trailing(sales, by="shop", over="1h", stats={"id": "sum"})
view = FeatureView("v", asked, key="id", features=[reads])


def message(value: bytes, offset: int = 1, key: bytes | None = None) -> Message:
    return Message("sales", 0, offset, ARRIVED, key, value)


def beside_good_ones(value: bytes) -> dict[str, Any]:
    """The one dead letter of `value` between two messages that are read."""
    found = decode(sales, [message(to_arrow(GOOD), 0), message(value), message(to_arrow(GOOD), 2)])
    assert found.rows["__offset"].to_list() == [0, 2]
    (dead_letter,) = found.dead_letters.rows(named=True)
    assert (dead_letter["offset"], dead_letter["place"]) == (1, -1)
    return dead_letter


@pytest.fixture
def little_memory() -> Iterator[None]:
    """Two gigabytes beyond what the process has mapped."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def long(number: int) -> bytes:
    rest, result = (number << 1) ^ (number >> 63), bytearray()
    while rest > 0x7F:
        result.append(rest & 0x7F | 0x80)
        rest >>= 7
    return bytes([*result, rest])


def text(value: bytes) -> bytes:
    return long(len(value)) + value


def container(schema: object, *blocks: tuple[int, bytes], codec: bytes = b"null") -> bytes:
    """An Avro container of blocks (rows, bytes)."""
    stated = schema if isinstance(schema, bytes) else json.dumps(schema).encode()
    head = long(2) + text(b"avro.schema") + text(stated) + text(b"avro.codec") + text(codec) + long(0)
    sync = b"0123456789abcdef"
    return b"Obj\x01" + head + sync + b"".join(long(rows) + text(data) + sync for rows, data in blocks)


def record(*fields: tuple[str, object]) -> dict[str, object]:
    return {"type": "record", "name": "r", "fields": [{"name": name, "type": kind} for name, kind in fields]}


DECLARED = (("sold", {"type": "long", "logicalType": "timestamp-micros"}), ("id", "long"), ("shop", "string"))
DUE = ("due", {"type": "long", "logicalType": "timestamp-micros"})
ROW = long(ARRIVED) + long(1) + text(b"a") + long(ARRIVED)


def nested(depth: int) -> bytes:
    return b'{"type":"array","items":' * depth + b'"int"' + b"}" * depth


def with_more(kind: object) -> dict[str, object]:
    return record(*DECLARED, DUE, ("more", kind))


NULLS = {"type": "array", "items": "null"}
EMPTY = {"type": "record", "name": "e", "fields": []}
SELF = {"type": "record", "name": "n", "fields": [{"name": "n", "type": ["null", "n"]}]}
MANY = 2_000_000_000
AVRO: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "a schema that nests 10,000 levels": (
        container(json.dumps(record()).encode()[:-2] + nested(10_000), (1, b"")),
        "nests",
    ),
    "a field that nests 10,000 levels": (
        container(b'{"type":"record","name":"r","fields":[{"name":"a","type":' + nested(10_000) + b"}]}", (1, b"\0")),
        "must nest at most 64",
    ),
    "a type that contains itself": (
        container(with_more(SELF), (1, ROW + long(1) * 100_000 + long(0))),
        "contain itself",
    ),
    "two billion rows without bytes": (container(record(), (MANY, b"")), "at most 500,000 rows"),
    "rows of many blocks": (container(record(), *[(400_000, b"")] * 3), "at most 500,000 rows"),
    "a negative number of rows": (container(record(), (-1, b"")), "a block of -1 rows"),
    "an array of nulls": (container(with_more(NULLS), (1, ROW + long(MANY) + long(0))), "must have bytes"),
    "an array of empty records": (
        container(with_more({"type": "array", "items": EMPTY}), (1, ROW + long(MANY) + long(0))),
        "must have bytes",
    ),
    "an array of empty fixed": (
        container(
            with_more({"type": "array", "items": {"type": "fixed", "name": "f", "size": 0}}),
            (1, ROW + long(MANY) + long(0)),
        ),
        "must have bytes",
    ),
    "a deflate bomb": (
        lambda: container(record(*DECLARED, DUE), (1, zlib.compress(bytes(300 << 20), 9)[2:-4]), codec=b"deflate"),
        "expands",
    ),
    "a bzip2 bomb": (
        lambda: container(record(*DECLARED, DUE), (1, bz2.compress(bytes(300 << 20))), codec=b"bzip2"),
        "expands",
    ),
    "an xz bomb": (
        lambda: container(record(*DECLARED, DUE), (1, lzma.compress(bytes(300 << 20), preset=0)), codec=b"xz"),
        "expands",
    ),
    "a zstandard bomb": (
        lambda: container(
            record(*DECLARED, DUE), (1, pa.compress(bytes(300 << 20), "zstd", asbytes=True)), codec=b"zstandard"
        ),
        "expands",
    ),
    "a snappy bomb": (
        container(record(*DECLARED, DUE), (1, b"\xff\xff\xff\xff\x0f" + bytes(9)), codec=b"snappy"),
        "expands",
    ),
    "a codec nobody knows": (container(record(*DECLARED, DUE), (1, ROW), codec=b"lz9"), "is compressed by"),
    "a length beyond the bytes": (container(record(*DECLARED, DUE), (1, ROW))[:-20], "complete Avro container"),
    "types that name types that name types": (
        container(
            record(
                *DECLARED,
                DUE,
                ("t0", {"type": "record", "name": "t0", "fields": [{"name": "x", "type": "int"}]}),
                *(
                    (
                        f"t{n}",
                        {"type": "record", "name": f"t{n}", "fields": [{"name": c, "type": f"t{n - 1}"} for c in "ab"]},
                    )
                    for n in range(1, 40)
                ),
            ),
            (1, ROW),
        ),
        "columns",
    ),
    "a text in the place of a schema": (container(b'"string"', (1, text(b"a"))), "must be a record"),
    "no schema": (b"Obj\x01" + long(0) + bytes(16), "must be readable"),
}


@pytest.mark.parametrize("case", AVRO)
@pytest.mark.usefixtures("little_memory")
def test_avro_that_would_stop_a_job_is_a_dead_letter(case: str) -> None:
    made, words = AVRO[case]
    value = made if isinstance(made, bytes) else made()
    assert words in beside_good_ones(value)["rule"]


def test_avro_is_read_by_its_declared_columns() -> None:
    """Types that are named in a column that is left out, and compression of every kind."""
    kind = {"type": "enum", "name": "space.kind", "symbols": ["a", "b"]}
    schema = record(("more", {"type": "map", "values": kind}), *DECLARED[:2], ("shop", "space.kind"), DUE)
    row = long(1) + text(b"k") + long(1) + long(0) + long(ARRIVED) + long(1) + long(0) + long(ARRIVED)
    packed = {
        b"null": row * 3,
        b"deflate": zlib.compress(row * 3)[2:-4],
        b"bzip2": bz2.compress(row * 3),
        b"xz": lzma.compress(row * 3),
        b"zstandard": pa.compress(row * 3, "zstd", asbytes=True),
        b"snappy": pa.compress(row * 3, "snappy", asbytes=True) + struct.pack(">I", zlib.crc32(row * 3)),
    }
    for codec, data in packed.items():
        value = container(schema, (3, data), codec=codec)
        found = decode(sales, [message(value)])
        assert (found.rows["shop"].to_list(), len(found.dead_letters)) == (["a"] * 3, 0), codec
        assert check_avro(value) == len(row) * 3
        assert [*avro_rows(value, ["id"])[0]] == ["id"]


def arrow(table: pa.Table, compression: str | None = "zstd") -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def plain(rows: int = 1, **more: Any) -> pa.Table:
    times = pa.array([ARRIVED] * rows, pa.timestamp("us", "UTC"))
    return pa.table(
        {"sold": times, "id": pa.array(range(rows), pa.int64()), "shop": ["a"] * rows, "due": times, **more}
    )


def zeros(size: int) -> pa.Array:
    """A text of so many bytes."""
    return pa.Array.from_buffers(
        pa.large_string(), 1, [None, pa.py_buffer(np.array([0, size], np.int64)), pa.py_buffer(bytes(size))]
    )


def claiming(value: bytes, size: int) -> bytes:
    """The stream with its first compressed buffer claiming to expand to so many bytes."""
    at = value.index(pa.compress(b"", "zstd", asbytes=True)[:4])
    return value[: at - 8] + struct.pack("<q", size) + value[at:]


def dictionaries(rows: int, size: int) -> pa.Table:
    values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array(["x" * size]))
    table = plain(rows)
    return table.set_column(table.schema.get_field_index("shop"), "shop", values)


ARROW: dict[str, tuple[Callable[[], bytes], str]] = {
    "zstd that expands": (lambda: arrow(plain(more=zeros(300 << 20))), "expand to at most"),
    "lz4 that expands": (lambda: arrow(plain(more=zeros(300 << 20)), "lz4"), "expand to at most"),
    "a claim of 2**62 bytes": (lambda: claiming(arrow(plain(2000)), 2**62), "expand to at most"),
    "a claim of a negative size": (lambda: claiming(arrow(plain(2000)), -2), "a buffer of -2 bytes"),
    "a claim of another size": (lambda: claiming(arrow(plain(2000)), 100), ""),
    "a dictionary of one long text": (lambda: arrow(dictionaries(400_000, 1000)), "expand to at most"),
    "nulls without bytes": (lambda: arrow(plain(600_000, more=pa.nulls(600_000))), "at most 500,000 rows"),
    "too many columns": (lambda: arrow(plain(**{f"c{n}": [1] for n in range(5000)})), "at most 4,096 columns"),
    "two columns of one name": (
        lambda: arrow(pa.Table.from_arrays([*plain().columns, pa.array([1])], [*plain().column_names, "id"])),
        "own name",
    ),
    "the end left out": (lambda: arrow(plain(2000))[:-200], ""),
    "a type of Python": (
        lambda: arrow(with_schema(plain(), running_code(plain().schema, Path("/nowhere/ran"), "id"))),
        "py_extension_type",
    ),
    "a type of Python that nobody reads": (
        lambda: arrow(with_schema(plain(), running_code(plain().schema, Path("/nowhere/ran")))),
        "py_extension_type",
    ),
    "a type that pyarrow does not know": (
        lambda: arrow(
            plain().cast(
                plain().schema.set(1, pa.field("id", pa.int64(), metadata={b"ARROW:extension:name": b"some.id"}))
            )
        ),
        "an extension type",
    ),
    "seconds beyond microseconds": (
        lambda: arrow(plain().set_column(3, "due", pa.array([2**60], pa.timestamp("s", "UTC")))),
        "",
    ),
}


@pytest.mark.parametrize("case", ARROW)
@pytest.mark.usefixtures("little_memory")
def test_arrow_that_would_stop_a_job_is_a_dead_letter(case: str) -> None:
    made, words = ARROW[case]
    assert words in beside_good_ones(made())["rule"]


def test_what_arrow_expands_to_is_known_before() -> None:
    for compression in (None, "lz4", "zstd"):
        for table in (plain(5000), dictionaries(100, 10), plain(3, more=pa.array([[1, 2], None, []]))):
            value = arrow(table, compression)
            exact = sum(each.nbytes for each in pa.ipc.open_stream(value).read_all().to_batches())
            assert exact * 0.8 <= check_arrow(value) <= exact * 1.2 + 2000


def test_declared_columns_alone_are_decoded() -> None:
    value = arrow(plain(3, more=[[1], [2], None]))
    seen = []
    table = read_arrow(value, ["id", "shop", "absent"], seen.append)
    assert table.column_names == ["id", "shop"]
    assert table["id"].to_pylist() == [0, 1, 2]
    assert len(seen) == 1
    with pytest.raises(ContractError, match="A message must have declared columns"):
        read_arrow(value, ["absent"], seen.append)


JSON = {
    "nested": (b'[{"a":' + b"[" * 900 + b"]" * 900 + b"}]", "must nest at most 64 levels"),
    "nested very deep": (b"[" * 400_000 + b"]" * 400_000, "must nest at most 64 levels"),
    "never closed": (b'{"a":' * 400_000, "must nest at most 64 levels"),
    "many values": (b"[" + b"0," * 5_000_000 + b"0]", "expand to at most"),
    "many rows": (b"[" + b"{}," * 500_000 + b"{}]", "at most 500,000 rows"),
}


@pytest.mark.parametrize("case", JSON)
def test_json_that_would_stop_a_job_is_a_dead_letter(case: str) -> None:
    value, words = JSON[case]
    assert words in beside_good_ones(value)["rule"]


@given(
    st.recursive(
        st.text('a\\"[]{}é', max_size=5) | st.integers(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('\\"[{', max_size=3), inner, max_size=3),
    )
)
def test_the_depth_of_json_is_that_of_its_values(value: Any) -> None:
    def depth(each: Any) -> int:
        if not isinstance(each, list | dict):
            return 0
        return 1 + max(map(depth, each.values() if isinstance(each, dict) else each), default=0)

    for ascii_only in (True, False):
        assert json_depth(json.dumps(value, ensure_ascii=ascii_only).encode()) == depth(value)
    check_json(json.dumps(value).encode(), MessageLimits(depth=max(depth(value), 1)))


def test_times_that_no_table_can_hold_are_dead_letters() -> None:
    ends = [datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999999, UTC)]
    inside = GOOD.select(pl.all().repeat_by(2).explode()).with_columns(pl.Series("due", ends, GOOD.schema["due"]))
    assert len(decode(sales, [message(to_arrow(inside))]).rows) == 2
    beyond = inside.with_columns(pl.col("due") + pl.Series([-1, 1]).cast(pl.Duration("us")))
    found = decode(sales, [message(to_arrow(beyond))])
    assert len(found.rows) == 0
    assert found.dead_letters.select("place", "field", "rule").rows() == [
        (place, "due", "a time is in the years 1 to 9999") for place in (0, 1)
    ]


@pytest.mark.parametrize("beat", [b"-9999999999999999999", b"9999999999999999999", b"-4611686018427387905"])
def test_a_heartbeat_beyond_all_times_is_a_dead_letter(beat: bytes) -> None:
    (dead_letter,) = decode(sales, [message(beat, key=b"__heartbeat")]).dead_letters.rows(named=True)
    assert "a heartbeat is an integer" in dead_letter["rule"]
    origin = BatchOrigin.of(to_score(view, [message(beat, key=b"__heartbeat")]))
    assert [each.heartbeat for each in origin.ranges] == [None]
    assert len(origin.dead_letters) == 1


def feature_rows(rows: int = 2) -> pa.RecordBatch:
    """Feature rows as a live job sends them."""
    schema = live_schema(view)
    values = {
        pa.int64(): 1,
        pa.string(): "a",
        pa.timestamp("us", "UTC"): NOW,
        pa.date32(): NOW.date(),
        pa.float32(): 1.0,
        pa.int32(): 1,
        pa.bool_(): True,
    }
    return pa.RecordBatch.from_pylist([{field.name: values[field.type] for field in schema}] * rows, schema)


def scored(*values: bytes) -> tuple[pa.RecordBatch, list[dict[str, Any]]]:
    key = f"{view.fingerprint}:1".encode()
    rows = to_score(view, [message(value, offset, key) for offset, value in enumerate(values)])
    return rows, BatchOrigin.of(rows).dead_letters.rows(named=True)


@pytest.mark.usefixtures("little_memory")
def test_messages_that_would_stop_live_inference_are_dead_letters() -> None:
    table = pa.Table.from_batches([feature_rows()])
    bad = [
        arrow(with_schema(table, running_code(table.schema, Path("/nowhere/ran"), "id"))),
        arrow(with_schema(table, running_code(table.schema, Path("/nowhere/ran")))),
        arrow(table.append_column("more", pa.array(["x" * (150 << 20)] * 2))),
        claiming(arrow(pa.Table.from_batches([feature_rows(3000)])), 2**50),
    ]
    rows, dead_letters = scored(arrow(table), *bad, arrow(table))
    assert rows.num_rows == 4
    assert [each["offset"] for each in dead_letters] == [1, 2, 3, 4]
    for each, words in zip(dead_letters, ["extension", "extension", "expands", "expands"], strict=True):
        assert words in each["rule"]


def test_a_feature_row_of_the_year_10000_is_a_dead_letter_and_its_neighbours_are_scored() -> None:
    table = pa.Table.from_batches([feature_rows(4)])
    for name in ("sold", "at", "date"):
        kind = table.schema.field(name).type
        ends = [date(9999, 12, 31), None, date(1, 1, 1), date(2024, 1, 1)]
        series = pl.Series(ends).cast(pl.Date if kind == pa.date32() else pl.Datetime("us", "UTC"))
        beyond = (pl.Series([1, 0, -1, 0]) * (1 if kind == pa.date32() else 86_400_000_000)) + series.to_physical()
        column = beyond.fill_null(0).to_arrow().cast(pa.int32() if kind == pa.date32() else pa.int64()).cast(kind)
        changed = table.set_column(table.schema.get_field_index(name), table.schema.field(name), column)
        rows, dead_letters = scored(arrow(changed))
        assert rows.num_rows == 2
        assert [(each["place"], each["field"]) for each in dead_letters] == [(0, name), (2, name)]
        assert {each["rule"] for each in dead_letters} == {"a time is in the years 1 to 9999"}


def test_a_producer_with_a_wrong_clock_does_not_stop_live_inference() -> None:
    step = DecodeFeatureRows(view)
    step.setup()
    step.start_bundle()
    for stamp in (2**62, -1):
        step.messages = []
        assert (
            list(
                step.process(
                    message(to_arrow(feature_rows()), 0, f"{view.fingerprint}:1".encode())._replace(timestamp=stamp)
                )
            )
            == []
        )
        assert abs(step.messages[0].timestamp - datetime.now(UTC).timestamp() * 1e6) < 60e6


@pytest.mark.usefixtures("little_memory")
def test_many_messages_that_each_keep_the_limits_do_not_meet_in_one_micro_batch() -> None:
    """Each expands to 80 MB of a declared column and has some kilobytes: the limit on bytes alone takes hundreds."""
    table = plain().set_column(2, "shop", zeros(80 << 20))
    value = arrow(table)
    step = DecodeBundles([view])
    step.setup()
    step.start_bundle()
    for offset in range(3):
        made = list(step.process(message(value, offset)))
        assert len(made) == 1


@pytest.mark.parametrize("pipeline", [features_streaming, inference_streaming])
def test_the_limits_are_flags_of_both_live_jobs(pipeline: Any, tmp_path: Path, capsys: Any) -> None:
    definition, values = str(shop.write(tmp_path, 10)), {"rows": 2, "mb": 3, "columns": 4, "depth": 5}
    broker = ["--source=kafka", "--bootstrap=localhost:1", "--without_history"]
    flags = ["--streaming", "--definition", definition, "--store", str(tmp_path / "live"), *broker]
    if pipeline is inference_streaming:
        flags.remove("--without_history")
    options, _ = pipeline.parse([*flags, *(f"--max_message_{name}={value}" for name, value in values.items())])
    assert options.limits == MessageLimits(2, 3 << 20, 4, 5)
    assert pipeline.parse(flags)[0].limits == DEFAULT_LIMITS
    for bad in ("0", "-1", "x", "1e3", "99999999999999999999"):
        with pytest.raises(DefinitionError, match="is not a whole number from 1 to"):
            pipeline.parse([*flags, f"--max_message_rows={bad}"])


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        (MessageLimits(rows=2), "at most 2 rows"),
        (MessageLimits(expanded_bytes=50), "at most 50 bytes"),
        (MessageLimits(columns=2), "at most 2 columns"),
    ],
)
def test_both_live_jobs_decode_within_the_limits_that_they_are_given(limits: MessageLimits, words: str) -> None:
    decoding = DecodeBundles([view], limits=limits)
    scoring = DecodeFeatureRows(view, limits=limits)
    values = (to_arrow(pl.concat([GOOD] * 3)), to_arrow(feature_rows(3)))
    for step, value in zip((decoding, scoring), values, strict=True):
        step.setup()
        step.start_bundle()
        assert not list(step.process(message(value, 7, f"{view.fingerprint}:1".encode())))
        (made,) = step.finish_bundle()
        if step is decoding:
            found = micro_batches_of(made.value)[0].dead_letters
        else:
            found = BatchOrigin.of(made.value).dead_letters
        (dead_letter,) = found.rows(named=True)
        assert dead_letter["offset"] == 7
        assert words in dead_letter["rule"]


@given(
    st.randoms(use_true_random=False),
    st.integers(1, 8),
    st.sampled_from(["arrow", "dictionary", "zstd", "avro", "json"]),
)
def test_whatever_bytes_a_message_has_it_is_read_or_a_dead_letter(
    chance: random.Random, changes: int, kind: str
) -> None:
    start = {
        "arrow": lambda: to_arrow(GOOD),
        "dictionary": lambda: arrow(dictionaries(5, 3), None),
        "zstd": lambda: arrow(plain(50)),
        "avro": lambda: container(with_more({"type": "array", "items": "int"}), (1, ROW + long(0))),
        "json": lambda: b'[{"sold":"2024-05-01T12:00:00Z","id":1,"shop":"a","due":null}]',
    }[kind]()
    value = bytearray(start)
    for _ in range(changes):
        at = chance.randrange(len(value))
        value[at] = chance.choice(
            [0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256), value[at] ^ (1 << chance.randrange(8))]
        )
    value = value[: chance.randrange(len(value))] if chance.random() < 0.2 else value
    found: Decoded = decode(sales, [message(bytes(value))])
    assert len(found.rows) + len(found.dead_letters) <= DEFAULT_LIMITS.rows
    with contextlib.suppress(ContractError):
        from_arrow(bytes(value))
    scored(bytes(value))
