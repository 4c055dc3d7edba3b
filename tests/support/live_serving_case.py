"""Helpers and fixtures for: live inference on a real broker and a real engine: swaps under load, kills, and what ends
up in topic and table."""

from __future__ import annotations

import random

import polars as pl

from schemas.loading import load_definition
from tests.support.live_fixtures import Live
from tests.support.live_inference_case import House
from transforms.streaming.kafka import Broker, Sender


def flags(house: House, live: Live, prefix: str, run_id: str, environment: str = "LOOPBACK") -> list[str]:
    return [
        "--streaming",
        "--source=kafka",
        "--definition",
        house.definition,
        "--store",
        str(house.store),
        "--run_id",
        run_id,
        "--bootstrap",
        live.broker.bootstrap,
        "--expansion_service",
        live.expansion.address,
        "--topic_prefix",
        prefix,
        *live.options(environment),
    ]


def topics(house: House, live: Live, partitions: int = 4) -> tuple[str, Sender, str]:
    """A prefix of its own, a way to send, and the features topic."""
    prefix = f"p{random.randrange(10**9)}-"
    topic = f"{prefix}{load_definition(house.definition).view.name}.features"
    live.broker.create(topic, partitions=partitions)
    return prefix, Sender(Broker(live.broker.bootstrap)), topic


def check(house: House, rows: pl.DataFrame) -> None:
    """Each row is what a batch job with the named version computes from the feature row."""
    for version in rows["model_version"].unique():
        expected = house.expected(version)
        mine = rows.filter(model_version=version).select(expected.columns)
        assert mine.join(expected, on=expected.columns, how="semi", nulls_equal=True).height == mine.height
