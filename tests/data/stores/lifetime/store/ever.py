"""One event a day; windows over all history, a window of two days beside them, and a view without the former."""

import polars as pl

from schemas import FeatureView, Source, Trailing

asks = Source("asks", time="at", columns={"id": pl.Int64, "k": pl.Int64})
events = Source("events", time="at", columns={"k": pl.Int64, "v": pl.Float64})
recent = Trailing(events, by="k", over="2d", stats={"v": "sum"}, name="recent")
ever = Trailing(events, by="k", over="all", stats={"*": "count", "v": ("sum", "max")}, name="ever")
view = FeatureView("ever", asks, key="id", features=[ever, recent])
plain = FeatureView("plain", asks, key="id", features=[recent])
