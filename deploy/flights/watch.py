"""What the live jobs have published so far, read by a consumer of their output topics."""

from __future__ import annotations

import io
import time
from collections import Counter

import polars as pl

from schemas.views import FeatureView
from transforms.streaming.messages import HEARTBEAT


class Watch:
    """Reads the features topic and the predictions topic.

    Attributes:
        computed: ids of the spine rows that have a feature row.
        until: greatest time of these spine rows, µs.
        predicted: model version of the first prediction of each row.
        version_since: when the first prediction of each version was read, in seconds of `time.monotonic`.
        rows: rows read by topic, repeats included.
    """

    def __init__(self, view: FeatureView, bootstrap: str, features: str, predictions: str) -> None:
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        self.time, self.features, self.predictions = view.time, features, predictions
        self.computed: set[int] = set()
        self.predicted: dict[int, str] = {}
        self.rows = Counter[str]()
        self.until = 0
        self.version_since: dict[str, float] = {}
        self.consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "watch",
                "enable.auto.commit": False,
                "log_level": 0,
                "isolation.level": "read_committed",
            }
        )
        found = self.consumer.list_topics(timeout=10).topics
        self.consumer.assign(
            [
                TopicPartition(topic, number, OFFSET_BEGINNING)
                for topic in (features, predictions)
                for number in found[topic].partitions
            ]
        )

    def read(self, within: float) -> None:
        """Read what arrives within so many seconds."""
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0:
            for message in self.consumer.consume(500, timeout=min(left, 0.2)):
                if message.error() is None and message.key() != HEARTBEAT:
                    rows, topic = pl.read_ipc_stream(io.BytesIO(message.value() or b"")), str(message.topic())
                    self.rows[topic] += len(rows)
                    self._add_features(rows) if topic == self.features else self._add_predictions(rows)

    def _add_features(self, rows: pl.DataFrame) -> None:
        self.computed.update(rows["row_id"].to_list())
        self.until = int(rows[self.time].to_physical().to_numpy().max(initial=self.until))

    def _add_predictions(self, rows: pl.DataFrame) -> None:
        for row, version in rows.select("row_id", "model_version").iter_rows():
            self.predicted.setdefault(row, version)
            self.version_since.setdefault(version, time.monotonic())

    def close(self) -> None:
        self.consumer.close()
