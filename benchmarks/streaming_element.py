"""The windows of the flights example in the usual stateful DoFn: one element per row, a bag of rows per key.

It does less than the live job: it computes a spine row at once from the events that have arrived, checks no contract,
drops no repeats, records no cut, joins no dimension, and does not assemble the parts of a feature row.

python -m benchmarks.streaming_element --bootstrap H:P --expansion_service H:P --topic NAME [any Beam option]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import apache_beam as beam
import polars as pl
from apache_beam import typehints
from apache_beam.coders import FastPrimitivesCoder
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.timeutil import TimeDomain
from apache_beam.transforms.userstate import (
    BagRuntimeState,
    BagStateSpec,
    ReadModifyWriteRuntimeState,
    ReadModifyWriteStateSpec,
    RuntimeTimer,
    TimerSpec,
    on_timer,
)

from benchmarks.streaming_rig import DEFINITION
from schemas.features import Trailing
from schemas.live import live_sources
from schemas.loading import load_definition
from transforms.streaming.groups import shard_groups
from transforms.streaming.kafka import Broker, Produce, ReadTopics, begin_offsets, set_group_offsets
from transforms.streaming.messages import HEARTBEAT, Message

# (group and key as text, (microseconds, the columns that are read from an event, or the id of a spine row))
Row = dict[str, Any]  # an event, by column
Element = tuple[str, tuple[int, Row | str]]
KEEP_SECONDS = 60.0
WHERE: dict[str | None, Callable[[Row], bool]] = {
    "late": lambda row: row["dep_delay"] is not None and row["dep_delay"] > 15
}


def quantile(values: list[float], share: float) -> float | None:
    """Linear interpolation between the two nearest."""
    if not values:
        return None
    ordered, position = sorted(values), share * (len(values) - 1)
    low = int(position)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (position - low)


STATS: dict[str, Callable[[list[float]], float | None]] = {
    "count": len,
    "mean": lambda values: sum(values) / len(values) if values else None,
    "median": lambda values: quantile(values, 0.5),
    "q75": lambda values: quantile(values, 0.75),
}


class Rows(beam.DoFn):
    """Message → a keyed element for each event and group that reads it, and for each spine row and group."""

    def setup(self) -> None:
        view = load_definition(DEFINITION).view
        self.spine, self.view, self.groups = view.spine, view, shard_groups(view)
        self.sources = live_sources(view)

    def process(self, message: Message) -> Iterator[Element]:
        if message.key == HEARTBEAT:
            return
        source = self.sources[message.topic]
        rows = pl.read_ipc_stream(message.value).with_columns(pl.col(str(source.time)).dt.timestamp("us"))
        for position, row in enumerate(rows.iter_rows(named=True)):
            moment = row[str(source.time)]
            for number, group in enumerate(self.groups):
                if group.source == source.name and all(row[name] is not None for name in group.source_columns):
                    read = {name: row[name] for name in self.view.columns_read(source.name)}
                    yield json.dumps([number, *(row[name] for name in group.source_columns)]), (moment, read)
                if source is self.spine:
                    row_id = f"{message.partition}/{message.offset}/{position}/{number}"
                    yield json.dumps([number, *(row[name] for name in group.spine_columns)]), (moment, row_id)


class Windows(beam.DoFn):
    """Puts the events of a key into its bag; computes a spine row's windows from the bag; sometimes removes events that
    are out of reach."""

    EVENTS = BagStateSpec("events", FastPrimitivesCoder())
    NEWEST = ReadModifyWriteStateSpec("newest", FastPrimitivesCoder())
    CLEAN = TimerSpec("clean", TimeDomain.REAL_TIME)

    def setup(self) -> None:
        self.groups = shard_groups(load_definition(DEFINITION).view)

    def process(
        self,
        element: Element,
        events: BagRuntimeState = beam.DoFn.StateParam(EVENTS),
        newest: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(NEWEST),
        clean: RuntimeTimer = beam.DoFn.TimerParam(CLEAN),
    ) -> Iterator[tuple[str, bytes]]:
        key, (moment, what) = element
        if isinstance(what, dict):
            events.add((moment, what))
            known = newest.read()
            if known is None:
                clean.set(time.time() + KEEP_SECONDS)
            if known is None or moment > known:
                newest.write(moment)
            return
        group = self.groups[json.loads(key)[0]]
        before = [each for each in events.read() if moment - group.reach <= each[0] < moment]
        feature_row: dict[str, object] = {}
        for feature in group.features:
            condition = WHERE.get(feature.name) if feature.where is not None else None
            mine = before if condition is None else [each for each in before if condition(each[1])]
            if not isinstance(feature, Trailing):
                own = [each for each in mine if feature.length is None or each[0] >= moment - feature.length]
                last = max(own, key=lambda each: each[0])[1] if own else {}
                feature_row |= {name: last.get(column) for column, name in feature.renamed.items()}
                continue
            for each in feature.statistics:
                inside = [row for at, row in mine if at >= moment - (each.length or 0)]
                values = (
                    [1.0] * len(inside)
                    if each.column == "*"
                    else [row[each.column] for row in inside if row[each.column] is not None]
                )
                feature_row[each.name] = STATS[each.stat](values)
        yield what, json.dumps(feature_row).encode()

    @on_timer(CLEAN)
    def cleaned(
        self,
        key: str = beam.DoFn.KeyParam,
        events: BagRuntimeState = beam.DoFn.StateParam(EVENTS),
        newest: ReadModifyWriteRuntimeState = beam.DoFn.StateParam(NEWEST),
        clean: RuntimeTimer = beam.DoFn.TimerParam(CLEAN),
    ) -> None:
        edge = newest.read() - self.groups[json.loads(key)[0]].reach
        kept = [each for each in events.read() if each[0] >= edge]
        events.clear()
        for each in kept:
            events.add(each)
        clean.set(time.time() + KEEP_SECONDS)


def main(argv: Sequence[str]) -> int:
    """Runs until a signal stops it."""
    parser = argparse.ArgumentParser()
    for name in ("bootstrap", "expansion_service", "topic"):
        parser.add_argument(f"--{name}", required=True)
    flags, rest = parser.parse_known_args(argv)
    broker, topics = (
        Broker(flags.bootstrap, flags.expansion_service),
        tuple(live_sources(load_definition(DEFINITION).view)),
    )
    group = f"element-{uuid.uuid4().hex[:8]}"
    set_group_offsets(broker, group, begin_offsets(broker, topics))

    pipeline = beam.Pipeline(options=PipelineOptions(["--streaming", *rest]))
    rows = pipeline | "Topics" >> ReadTopics(broker, topics, group) | "Rows" >> beam.ParDo(Rows())
    rows.element_type = typehints.Tuple[str, Any]
    computed = rows | "Windows" >> beam.ParDo(Windows())
    _ = computed | "Send" >> Produce(broker, Messages(flags.topic))
    result = pipeline.run()
    print("running: until it is stopped", flush=True)
    result.wait_until_finish()
    return 0


class Messages:
    """The message of a feature row."""

    def __init__(self, topic: str) -> None:
        self.topic = topic

    def __call__(self, feature_row: tuple[str, bytes]) -> list[tuple[str, bytes, bytes]]:
        return [(self.topic, feature_row[0].encode(), feature_row[1])]


if __name__ == "__main__":
    from benchmarks import streaming_element

    sys.exit(streaming_element.main(sys.argv[1:]))
