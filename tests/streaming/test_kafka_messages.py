"""Messages in and out: three formats, one contract, and a dead letter with its position for whatever breaks it."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas import FeatureView, Source, Trailing
from schemas.errors import StoreError
from schemas.live import live_schema
from transforms.records.record_batches import batch
from transforms.sources.contracts import Contract
from transforms.streaming.kafka import Broker, begin_offsets, dead_letter_messages, feature_row_messages
from transforms.streaming.live_features import DecodeBundles
from transforms.streaming.messages import (
    HEARTBEAT,
    Message,
    by_partition,
    decode,
    decode_topic,
    from_arrow,
    heartbeat,
    to_arrow,
    to_json,
)
from transforms.streaming.micro_batches import MicroBatch, micro_batch_envelope, micro_batches_of
from transforms.streaming.view_contracts import sort_rows

NOW = datetime(2024, 5, 1, 12, tzinfo=UTC)
ARRIVED = int(NOW.timestamp() * 1e6)
sales = Source(
    "sales",
    time="sold",
    unique="id",
    ahead="1h",
    columns={
        "id": pl.Int64,
        "shop": pl.String,
        "price": pl.Float64,
        "few": pl.Int8,
        "fast": pl.Boolean,
        "day": pl.Date,
        "rate": pl.Float32,
    },
)
ROW: dict[str, Any] = {
    "sold": NOW,
    "id": 1,
    "shop": "a",
    "price": 9.99,
    "few": 3,
    "fast": True,
    "day": NOW.date(),
    "rate": 0.5,
}


def frame(*changes: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame([{**ROW, **each} for each in changes], schema=sales.schema, orient="row")


def message(value: bytes, offset: int = 0, partition: int = 0, key: bytes | None = None) -> Message:
    return Message("sales", partition, offset, ARRIVED, key, value)


def avro(rows: pl.DataFrame, without: str = "") -> bytes:
    fastavro = pytest.importorskip("fastavro")
    fields = [
        {"name": "sold", "type": {"type": "long", "logicalType": "timestamp-micros"}},
        {"name": "id", "type": "int"},
        {"name": "shop", "type": ["null", "string"]},
        {"name": "price", "type": "double"},
        {"name": "few", "type": "int"},
        {"name": "fast", "type": "boolean"},
        {"name": "day", "type": {"type": "int", "logicalType": "date"}},
        {"name": "rate", "type": "float"},
    ]
    sink = io.BytesIO()
    fields = [each for each in fields if each["name"] != without]
    fastavro.writer(sink, {"type": "record", "name": "sale", "fields": fields}, rows.to_dicts())
    return sink.getvalue()


@given(
    st.lists(
        st.tuples(
            st.none() | st.text(max_size=5),
            st.none() | st.floats(-1e30, 1e30),
            st.integers(-(2**63), 2**63 - 1),
            st.integers(-128, 127),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_json_and_arrow_say_the_same(values: list[tuple[Any, ...]]) -> None:
    rows = frame(
        *(
            {"shop": shop, "price": price, "id": number, "few": few, "sold": NOW - timedelta(microseconds=few + 200)}
            for shop, price, number, few in values
        )
    )
    as_arrow = decode(sales, [message(to_arrow(rows))])
    lines = to_json(rows)
    one_by_one = decode(sales, [message(line, offset) for offset, line in enumerate(lines)])
    together = decode(sales, [message(b"[" + b",".join(lines) + b"]")])
    for found in (as_arrow, one_by_one, together):
        assert not len(found.dead_letters)
        assert found.rows.select(sales.schema.keys()).equals(rows)
    assert as_arrow.rows["__place"].to_list() == together.rows["__place"].to_list() == list(range(len(rows)))
    assert one_by_one.rows["__offset"].to_list() == list(range(len(rows)))


def test_avro_containers_are_read() -> None:
    rows = frame({}, {"id": 2, "shop": None})
    value = avro(rows)
    found = decode(sales, [message(value)])
    assert not len(found.dead_letters), found.dead_letters["rule"].to_list()
    assert found.rows["shop"].to_list() == ["a", None]
    assert found.rows["sold"].to_list() == [NOW, NOW]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"\x00\x01garbage", "Arrow IPC stream, json or an avro"),
        (b"", "Arrow IPC stream, json or an avro"),
        (b'{"id": 1', "delimiter"),
        (
            b'{"id": "one", "sold": "2024-05-01T12:00:00Z", "shop": "a", "price": 1, '
            b'"few": 1, "fast": true, "day": "2024-05-01", "rate": 1}',
            "'id' must be Int64",
        ),
        (
            b'{"id": 1.5, "sold": "2024-05-01T12:00:00Z", "shop": "a", "price": 1, '
            b'"few": 1, "fast": true, "day": "2024-05-01", "rate": 1}',
            "'id' must be Int64",
        ),
        (
            b'{"id": 1, "sold": "2024-05-01T12:00:00", "shop": "a", "price": 1, '
            b'"few": 1, "fast": true, "day": "2024-05-01", "rate": 1}',
            "ISO 8601 with a time zone",
        ),
        (
            b'{"id": 1, "sold": "2024-05-01T12:00:00Z", "shop": "a", "price": 1, '
            b'"few": 300, "fast": true, "day": "2024-05-01", "rate": 1}',
            "a number beyond it",
        ),
        (b'{"id": 1, "shop": "a"}', "declared column 'sold'"),
        (b"[1, 2]", "object or a list"),
        (b"Obj\x01nonsense", "Avro container"),
        (b"\xff\xff\xff\xff nonsense", ""),
        (to_arrow(frame({}).drop("sold")), "declared column 'sold'"),
        (to_arrow(frame({}).with_columns(pl.col("price").cast(pl.String))), "'price' must be Float64"),
    ],
)
def test_a_malformed_message_becomes_a_dead_letter_and_spoils_no_other(value: bytes, reason: str) -> None:
    good = [message(line, offset) for offset, line in enumerate(to_json(frame({}, {"id": 2})))]
    found = decode(sales, [good[0], message(value, 7, key=b"k"), good[1]._replace(offset=8)])
    assert found.rows["id"].to_list() == [1, 2]
    (dead_letter,) = found.dead_letters.rows(named=True)
    assert (dead_letter["source"], dead_letter["partition"], dead_letter["offset"], dead_letter["place"]) == (
        "sales",
        0,
        7,
        -1,
    )
    assert reason.lower() in dead_letter["rule"].lower()


def test_bad_rows_of_a_good_message_become_dead_letters_with_their_position() -> None:
    rows = frame(
        {}, {"id": None}, {"price": float("inf")}, {"sold": None}, {"sold": datetime(1970, 1, 1, tzinfo=UTC)}, {"id": 6}
    )
    found = decode(sales, [message(to_arrow(rows), 3, 1)])
    assert found.rows["id"].to_list() == [1, None, 1, 6]  # whoever reads a source, a row has a plausible time
    assert found.dead_letters["place"].to_list() == [3, 4]
    kept, broken = sort_rows(Contract(sales, tuple(sales.schema)), found.rows)
    assert kept["id"].to_list() == [1, 6]
    dead_letters = pl.concat([found.dead_letters, *broken]).sort("place")
    assert dead_letters["place"].to_list() == [1, 2, 3, 4]
    assert set(dead_letters["offset"]) == {3}
    assert set(dead_letters["partition"]) == {1}
    assert dead_letters["field"].to_list() == ["id", "price", "sold", "sold"]


def test_a_column_that_a_row_does_not_have_is_absent_and_not_null() -> None:
    """In every format; and a message of several rows is read, whichever columns each of them has."""
    columns = ["sold", "id", "shop", "few", "fast", "day", "rate"]
    some = frame({"shop": None}, {"id": 2}).select(columns)
    without = to_json(some)
    mixed = b"[" + without[0] + b"," + to_json(frame({"id": 3}))[0] + b',{"sold":"2024-05-01T11:00:00Z"}]'
    values = [to_arrow(some), avro(frame({"shop": None}, {"id": 2}), "price"), mixed, *without]
    found = decode(sales, [message(value, offset) for offset, value in enumerate(values)])
    assert not len(found.dead_letters), found.dead_letters["rule"].to_list()
    absent = [None if text is None else json.loads(text) for text in found.rows["__absent"]]
    price, most = ["price"], [name for name in sales.schema if name != "sold"]
    assert absent == [price, price, price, price, price, None, most, price, price]
    assert found.rows["price"].null_count() == 8
    assert found.rows["shop"].to_list() == [None, "a", None, "a", None, "a", None, None, "a"]
    assert found.rows["__place"].to_list() == [0, 1, 0, 1, 0, 1, 2, 0, 0]


def test_a_stamp_further_ahead_than_declared_is_set_aside() -> None:
    rows = frame(
        {"sold": NOW + timedelta(hours=1)},
        {"sold": NOW + timedelta(hours=1, microseconds=1)},
        {"sold": NOW + timedelta(days=365)},
        {"sold": NOW - timedelta(days=365 * 15)},
    )
    found = decode(sales, [message(to_arrow(rows))])
    assert len(found.rows) == 2  # from 2009 it may be: that does not stop the watermark, which never goes back
    assert found.dead_letters["place"].to_list() == [1, 2]
    assert "at most 1h ahead" in found.dead_letters["rule"][0]


def test_heartbeats_are_no_rows() -> None:
    key, value = heartbeat(123)
    found = decode(
        sales,
        [message(value, 0, key=key), message(b"later", 1, key=HEARTBEAT), message(heartbeat(99)[1], 2, key=key)],
    )
    assert found.heartbeat == 123
    assert len(found.rows) == 0
    assert found.dead_letters["offset"].to_list() == [1]


def test_messages_are_put_in_order_of_offsets_by_partition() -> None:
    some = [message(b"", 2), message(b"", 0, 1), message(b"", 1), message(b"", 0)]
    assert {position: [each.offset for each in group] for position, group in by_partition(some).items()} == {
        ("sales", 0): [0, 1, 2],
        ("sales", 1): [0],
    }


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=12))
def test_partitions_read_in_one_go_are_those_read_one_by_one(sent: list[tuple[int, int]]) -> None:
    kinds: list[tuple[bytes | None, bytes]] = [
        (None, to_arrow(frame({}, {"price": None}))),
        (None, to_arrow(frame({"id": None}, {"id": 7}))),
        (None, to_json(frame({"id": 8}))[0]),
        (None, b"oops"),
        heartbeat(123),
        (HEARTBEAT, b"soon"),
    ]
    some = [message(kinds[kind][1], offset, where, kinds[kind][0]) for offset, (where, kind) in enumerate(sent)]
    partitions = [group for _, group in sorted(by_partition(some).items())]
    together = decode_topic(sales, partitions)
    parts = [("sales", group[0].partition, group[0].offset, group[-1].offset + 1, len(group)) for group in partitions]
    sent_on = [
        MicroBatch(*part, held.heartbeat, held.rows, held.dead_letters)
        for part, held in zip(parts, together, strict=True)
    ]
    carried = micro_batches_of(micro_batch_envelope(sent_on, ARRIVED))
    for group, held, micro_batch in zip(partitions, together, carried, strict=True):
        alone, by = decode(sales, group), ["offset", "place", "rule"]
        assert held.rows.equals(alone.rows)
        assert held.dead_letters.sort(by).equals(alone.dead_letters.sort(by))
        assert held.heartbeat == alone.heartbeat == micro_batch.heartbeat
        assert (micro_batch.partition, micro_batch.messages) == (group[0].partition, len(group))
        assert micro_batch.rows.equals(alone.rows)
        assert micro_batch.dead_letters.equals(held.dead_letters)


def test_a_bundle_of_many_messages_becomes_envelopes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = to_arrow(frame({}, {"id": 2}))
    monkeypatch.setattr("transforms.streaming.live_features.ENVELOPE_BYTES", 2 * len(rows))
    spine = Source("asks", time="t", columns={"id": pl.Int64})
    reads = Trailing(sales, by={"id": "id"}, over="1h", stats={"price": "sum"})
    step = DecodeBundles([FeatureView("v", spine, key="id", features=[reads])])
    step.setup()
    step.start_bundle()
    some = [message(rows, offset) for offset in range(5)]
    envelopes = [each.value for sent in some for each in step.process(sent)]
    envelopes += [each.value for each in step.finish_bundle()]
    step.start_bundle()
    assert not list(step.finish_bundle())
    found = [micro_batch for envelope in envelopes for micro_batch in micro_batches_of(envelope)]
    assert [(micro_batch.first, micro_batch.next, len(micro_batch.rows)) for micro_batch in found] == [
        (0, 2, 4),
        (2, 4, 4),
        (4, 5, 2),
    ]


def test_feature_rows_are_sent_as_arrow_with_their_row_ids() -> None:
    spine = Source("asks", time="t", columns={"id": pl.Int64})
    view = FeatureView(
        "v", spine, key="id", features=[Trailing(sales, by={"id": "id"}, over="1h", stats={"price": "sum"})]
    )
    schema = live_schema(view)
    rows = pl.DataFrame(
        {"t": [NOW] * 2500, "id": range(2500), "sales_by_id_price_sum_1h": [1.0] * 2500, "row_id": range(2500)}
    )
    rows = rows.with_columns(
        pl.lit(NOW.date()).alias("date"), *(pl.lit(None).alias(name) for name in schema.names if name.startswith("__"))
    )
    pairs = list(feature_row_messages(batch(rows.select(schema.names), schema), view.fingerprint))
    assert [key.decode() for key, _ in pairs] == [f"{view.fingerprint}:{first:016x}" for first in (0, 1000, 2000)]
    assert pa.Table.from_batches([from_arrow(value) for _, value in pairs])["row_id"].to_pylist() == list(range(2500))


def test_dead_letters_are_sent_as_json() -> None:
    dead_letters = decode(sales, [message(b"oops", 5)]).dead_letters
    ((key, value),) = dead_letter_messages(dead_letters)
    assert key == b"sales/0/5/-1"
    assert json.loads(value)["value"] == "oops"


def test_a_broker_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transforms.streaming.kafka.TIMEOUT_SECONDS", 0.5)
    with pytest.raises(StoreError, match=r"broker must be reachable.*127\.0\.0\.1:1"):
        begin_offsets(Broker("127.0.0.1:1"), ["sales"])
