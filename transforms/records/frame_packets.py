"""Envelopes: a small JSON head and Polars frames as bytes, sent between live steps and stored in their state.

Plain bytes need no coder of their own on any runner, and one envelope keeps related frames together.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

import polars as pl

Frames = dict[str, pl.DataFrame]
# A JSON object: the head of an envelope, or the state that a live step writes.
Head = dict[str, Any]


def pack(head: Mapping[str, object], frames: Mapping[str, pl.DataFrame] | None = None) -> bytes:
    """Encodes a head and frames as bytes: one line of JSON, then each frame as an Arrow IPC stream (lz4).

    >>> head, frames = unpack(pack({"turn": 3}, {"rows": pl.DataFrame({"a": [1]})}))
    >>> head["turn"], frames["rows"]["a"].to_list()
    (3, [1])
    """
    bodies, sizes = [], []
    for name, frame in (frames or {}).items():
        sink = io.BytesIO()
        frame.write_ipc_stream(sink, compression="lz4")
        bodies.append(sink.getvalue())
        sizes.append((name, len(bodies[-1])))
    line = json.dumps({"head": head, "frames": sizes}, separators=(",", ":")).encode()
    return b"\n".join([line, b"".join(bodies)])


def unpack(envelope: bytes) -> tuple[Head, Frames]:
    """Decodes the head and the frames that `pack` encoded."""
    end = envelope.index(b"\n")
    line = json.loads(envelope[:end])
    frames, start = {}, end + 1
    for name, size in line["frames"]:
        frames[name] = pl.read_ipc_stream(envelope[start : start + size])
        start += size
    return line["head"], frames


def head_of(envelope: bytes) -> Head:
    """Decodes only the head of an envelope."""
    return json.loads(envelope[: envelope.index(b"\n")])["head"]
