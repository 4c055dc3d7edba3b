"""The case of `benchmarks/long_windows.py`: like that of `benchmarks/features.py`, with windows of a year."""

from __future__ import annotations

from benchmarks.features_case import KEYS, departures, schedule
from schemas import FeatureView, Trailing

view = FeatureView(
    "long",
    spine=schedule,
    key="flight_id",
    features=[Trailing(departures, by=key, over=("24h", "365d"), stats={"dep_delay": ("mean", "max")}) for key in KEYS],
)
