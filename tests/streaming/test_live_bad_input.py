"""Whatever a topic may hold and a broker may do, on a real broker and engine: each with its message, and nothing
lost."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.support import market
from tests.support.live_fixtures import Live
from tests.support.live_histories import EVENTS, commits, history
from tests.support.live_jobs import Stage, await_, end, slots
from transforms.records.times import FOREVER
from transforms.streaming.messages import to_arrow, to_json

pytestmark = [pytest.mark.live, pytest.mark.timeout(280)]
# As `market.DEFINITION`, with a partition that is silent for two seconds no longer waited for.
IDLE = re.sub(r'(Source\("\w+", time="\w+")', r'\1, idle="10s"', market.DEFINITION)
assert IDLE.count("idle") == 3


def spoil(stage: Stage, moment: int) -> None:
    """Bad input of every kind to topic and partition 0 of every source, as if it arrived at `moment`, µs."""
    chance, frames = random.Random(5), history(12)
    next_year = datetime.now(UTC) + timedelta(days=365)
    for name in EVENTS:
        time_column, frame = market.TIMES[name], frames[name][:3].filter(pl.col(market.TIMES[name]).is_not_null())
        arrow, texts = to_arrow(frame), to_json(frame)
        flipped = bytearray(arrow)
        flipped[len(arrow) // 2] ^= 0xFF
        stage.send_bad(
            name,
            0,
            [
                b"",
                b"\x00garbage",
                chance.randbytes(300),
                arrow[: len(arrow) // 2],
                texts[0][:-5],
                b"[1, 2]",
                to_arrow(frame.rename({time_column: "moment"})),  # the schema changes amid the topic
                to_arrow(frame.with_columns(shop=pl.lit(1.5))),
            ],
            moment,
        )
        # A row without a column that the view reads: it is accepted, for views that do not.
        stage.send(name, 0, texts[0].replace(b'"shop"', b'"Shop"'), moment, rows=1)
        for far in (datetime(2009, 1, 1, tzinfo=UTC), next_year):
            strange = frame.with_columns(pl.lit(far, pl.Datetime("us", "UTC")).alias(time_column))
            if name == "visits":
                strange = strange.with_columns(visit=pl.int_range(pl.len()) + far.year * 1000)
            if name == "sales":
                strange = strange.with_columns(sale=pl.int_range(pl.len()) + far.year * 1000)
            if name == "stock":
                strange = strange.with_columns(seen=pl.lit(far, pl.Datetime("us", "UTC")))
            # A producer whose clock is a year ahead: in the rows and in the record.
            stage.send_frame(name, 0, strange, int(far.timestamp() * 1e6) if far == next_year else moment)
        stage.beat_badly(name, 0, b"soon", moment)
        stage.beat_badly(name, 0, b"9" * 5000, moment)
        stage.beat_badly(name, 0, str(int(next_year.timestamp() * 1e6)).encode(), moment)
        if name == "visits":  # a spine row of now: an old one would rightly be late
            now = pl.from_epoch(pl.lit(moment - 1_000_000), "us").dt.replace_time_zone("UTC")
            frame = frame.with_columns(now.alias(time_column), visit=pl.int_range(pl.len()) + 900_000)
        good = to_json(frame)
        stage.send(name, 0, good[0], moment, rows=1)  # and on with good rows, in another format


def limit(stage: Stage, most: int) -> None:
    """The greatest size of a message to the topic of feature rows."""
    entry = ConfigEntry("max.message.bytes", str(most), incremental_operation=AlterConfigOpType.SET)
    resource = ConfigResource(ResourceType.TOPIC, stage.outputs[0], incremental_configs=[entry])
    admin = stage.live.broker.admin()
    for done in admin.incremental_alter_configs([resource]).values():
        done.result(10)


def test_bad_input_an_idle_partition_and_a_full_topic_in_one_replay(live: Live, tmp_path: Path) -> None:
    stage = Stage(live, tmp_path, definition=IDLE, config={"max.message.bytes": "1200"})
    to_send = slots(history())
    third = len(to_send) // 3
    speaking = range(3)  # the fourth sends nothing before the end

    def heard(slot: int, happened: Callable[[], Any]) -> Callable[[], Any]:
        """Whether it happened, as the others speak on: when all are silent nothing moves the watermark."""

        def look() -> Any:
            stage.beat(to_send[slot].end, partitions=speaking)
            stage.flush()
            time.sleep(0.4)
            return happened()

        return look

    with stage.job("full") as job:  # no feature row fits
        stage.send_slots(to_send[:third], partitions=speaking)
        assert job.wait(120) == 4, job.output()
        printed = job.output()
    assert "The broker accepts the messages of a job" in printed
    assert "max.message.bytes" in printed
    assert "no message is lost" in printed
    assert "Traceback" not in printed, printed
    assert not len(stage.feature_rows())
    limit(stage, 16_000)  # a few do: messages are made smaller
    with stage.job("goes-on") as job:
        await_(heard(third - 1, lambda: len(stage.feature_rows()) > 10), 120, job)
        spoil(stage, to_send[third].end)
        stage.send_slots(to_send[third : 2 * third], partitions=speaking)
        before = commits(stage)
        await_(heard(2 * third - 1, lambda: commits(stage) > before), 120, job)
        stage.send_slots(to_send[2 * third :], partitions=speaking)
        known = len(stage.feature_rows())
        await_(heard(-1, lambda: len(stage.feature_rows()) > known), 120, job)  # without a word of the idle one
        stage.beat(FOREVER)
        stage.flush()
        printed = end(job)
    assert "questions unaccounted for  0" in printed
    feature_rows, dead_letters = stage.audit(), stage.dead_letters()
    assert len(feature_rows) > 110
    for name in EVENTS:
        mine = dead_letters.filter(source=name)
        whole = mine.filter(pl.col("place") == -1)
        assert len(whole) == 8 + 3, (name, whole["rule"].to_list())
        assert mine.filter(pl.col("place") >= 0)["rule"].str.contains("declared column 'shop'").sum() == 1
        assert mine["rule"].str.contains("ahead of its arrival").sum() >= 3 + 1
        assert any(mine["rule"].str.contains(f"{market.TIMES[name]}")), mine["rule"].to_list()
    # Neither 2009 nor next year has moved the watermark: good spine rows are not late, and old ones are counted as
    # such.
    assert not feature_rows.filter(pl.col("visit") < market.START.year * 1000)["__late"].any()
    counts = stage.status("goes-on")["counts"]
    assert all(counts[name].get("late", 0) + counts[name].get("beyond", 0) >= 3 for name in ("sales", "stock")), counts
    assert stage.status("goes-on")["clock"]["visits"]["settled"] < datetime.now(UTC).timestamp() * 1e6


def launched(stage: Stage, **changes: str) -> tuple[int, str, float]:
    """Exit status, output and seconds of a job with other flags."""
    began = time.monotonic()
    flags = [f"--{name}={value}" for name, value in changes.items()]
    with stage.job("refused", options=[*stage.live.options(), *flags]) as job:
        return job.wait(120), job.output(), time.monotonic() - began


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"topic_prefix": "none-"}, ["Every source has its topic", "'none-", "--topic_prefix"]),
        ({"bootstrap": "127.0.0.1:1"}, ["The broker can be reached", "127.0.0.1:1", "refused", "--bootstrap"]),
        (
            {"expansion_service": "localhost:1"},
            ["The expansion service can be reached", "localhost:1", "--expansion_service"],
        ),
        ({"job_endpoint": "localhost:1"}, ["The runner can be reached", "localhost:1", "--job_endpoint"]),
    ],
)
def test_what_is_missing_is_named_at_once(
    live: Live, tmp_path: Path, changes: dict[str, str], words: Sequence[str]
) -> None:
    stage = Stage(live, tmp_path, partitions=1)
    code, printed, seconds = launched(stage, **changes)
    assert code == 4, printed
    assert all(word in printed for word in words), printed
    assert "Traceback" not in printed
    assert seconds < 90
    assert not (stage.store / "sources").exists()
