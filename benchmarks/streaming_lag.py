"""When each spine row could be computed and when it was, from only the topics and the broker's timestamps."""

from __future__ import annotations

import io

import numpy as np
import polars as pl

from benchmarks.streaming_rig import Rig
from schemas.durations import microseconds

HEARTBEAT = b"__heartbeat"
# Columns with the time at which a row was computed.
MOMENTS = ("__answered",)
NEVER = 2**62


def completed(rig: Rig) -> tuple[pl.DataFrame, dict[str, int]]:
    """For each spine row (`row_id`, `time` µs), the timestamp (`complete`, s) of the append that completed it; and what
    was in the topics.

    A spine row at t is complete once it has arrived itself, and every partition of every source has a row at or after t
    + lateness, or a heartbeat at or after t.
    """
    view = rig.view
    promises: dict[tuple[str, int], list[tuple[int, int]]] = {}
    spine_rows, counts = [], {"messages": 0, "rows": 0, "heartbeats": 0}
    sources = {view.spine.name: view.spine, **view.events}
    for record in rig.records(*rig.names):
        source, stamp = sources[record.topic], record.timestamp
        said = promises.setdefault((record.topic, record.partition), [])
        if record.key == HEARTBEAT:
            counts["heartbeats"] += 1
            said.append((stamp, int(record.value)))
            continue
        rows = pl.read_ipc_stream(io.BytesIO(record.value))
        counts["messages"] += 1
        counts["rows"] += len(rows)
        latest = rows[str(source.time)].to_physical().to_numpy().max()
        said.append((stamp, int(latest) - microseconds(source.lateness, zero=True)))
        if source is view.spine:
            spine_rows.append(rows.select(*view.key, view.time).with_columns(pl.lit(stamp).alias("there")))
    spine = pl.concat(spine_rows)
    from transforms.records.row_hashing import row_ids

    spine = spine.with_columns(row_ids(view.name, [spine[name] for name in (*view.key, view.time)]))
    moments = spine[view.time].to_physical().to_numpy()
    complete = spine["there"].to_numpy().astype(np.int64)
    for name in view.events:
        for number in range(rig.partitions):
            stamps, until = (np.array(each, np.int64) for each in zip(*promises[name, number], strict=True))
            first = np.searchsorted(np.maximum.accumulate(until), moments, "left")
            complete = np.maximum(complete, np.append(stamps, NEVER)[first])
    result = spine.select("row_id", pl.Series("time", moments), pl.Series("complete", complete / 1e6))
    return result, counts


def computed(rig: Rig, topic: str) -> pl.DataFrame:
    """For each computed row, the timestamp at which it was first appended (`computed`, s), and when it was made
    (`made`, s, by the worker's clock)."""
    parts = []
    for record in rig.records(topic):
        if record.key != HEARTBEAT:
            rows = pl.read_ipc_stream(io.BytesIO(record.value))
            made = next(rows[name].dt.timestamp("us") / 1e6 for name in MOMENTS if name in rows.columns)
            parts.append(rows.select("row_id", pl.lit(record.timestamp / 1e6).alias("computed"), made.alias("made")))
    schema = {"row_id": pl.Int64, "computed": pl.Float64, "made": pl.Float64}
    found = pl.concat(parts) if parts else pl.DataFrame(schema=schema)
    return found.group_by("row_id").agg(pl.col("computed").min(), pl.col("made").min(), pl.len().alias("times"))
