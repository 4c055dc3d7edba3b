"""What one small turn of live features costs, and a replay of many of them.  It needs no broker.

- `turn`: the journal's step as a job with one shard runs it: envelope in, envelopes and state out, called by hand.  A
  month of flights comes first as one turn; then every three minutes of a day are a turn, of six rows on average, with
  a heartbeat on every partition, so that each turn computes the features of its spine rows.
- `replay`: the command, over four days in turns of three minutes: 11,011 rows in 1,722 turns.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypedDict

from benchmarks.measure import ROOT
from transforms.streaming.messages import Message

DEFINITION = "examples.flights.definition"
START, DAYS, BEFORE = datetime(2013, 3, 1, tzinfo=UTC), 4, 28
MINUTES = 3


class MemoryState:
    """Beam's state of a key, in memory."""

    def __init__(self) -> None:
        self.value: bytes | None = None
        self.values: list[bytes] = []

    def read(self) -> Any:
        return self.value if self.value is not None else self.values

    def write(self, value: bytes) -> None:
        self.value = value

    def add(self, value: bytes) -> None:
        self.values.append(value)

    def clear(self) -> None:
        self.values = []


class Cost(TypedDict):
    """Milliseconds of CPU (all threads, mean) and of wall time (median) per turn.

    There are those of turns that compute features, those of other turns, and those to decode the messages of a turn.
    """

    turns: int
    rows: int
    turn_fixed_ms: float
    turn_fixed_wall_ms: float
    quiet_turn_ms: float
    quiet_turn_wall_ms: float
    decode_ms: float
    decode_wall_ms: float


def microseconds(moment: datetime) -> int:
    return int(moment.timestamp()) * 1_000_000


def envelopes(sources: Path, days: int) -> Iterator[tuple[bytes, int, float, float]]:
    """Envelopes of a replay, the month before `START` as one; rows of each, and CPU and wall seconds to decode it."""
    from schemas.live import live_sources
    from schemas.loading import load_definition
    from transforms.records.frame_packets import head_of
    from transforms.streaming.live_features import decode_messages
    from transforms.streaming.messages import heartbeat
    from transforms.streaming.replay import Replay, chunks

    view = load_definition(DEFINITION).view
    declared, border = live_sources(view), microseconds(START)
    replay = Replay(
        str(sources),
        start=microseconds(START - timedelta(days=BEFORE)),
        end=microseconds(START + timedelta(days=days)),
        chunk=MINUTES * 60_000_000,
    )
    before: list[Message] = []
    offsets: dict[tuple[str, int], int] = {}
    index = 0
    for messages in chunks([view], replay):
        if messages and messages[-1].timestamp < border:
            before += messages
            continue
        end = max(each.timestamp for each in messages)
        for some in [before, messages] if before else [messages]:
            beats = [Message(topic, partition, 0, end, *heartbeat(end)) for topic in declared for partition in range(2)]
            sent = [numbered(each, offsets) for each in [*some, *(beats if some is messages else ())]]
            cpu, wall = time.process_time(), time.perf_counter()
            envelope = decode_messages(declared, sent, index=index)
            spent = time.process_time() - cpu, time.perf_counter() - wall
            yield envelope, sum(each[-1] for each in head_of(envelope)["parts"]), *spent
            index += 1
        before = []


def numbered(message: Message, offsets: dict[tuple[str, int], int]) -> Message:
    """The message, with the next offset of its partition."""
    partition = message.topic, message.partition
    offsets[partition] = offsets.get(partition, -1) + 1
    return message._replace(offset=offsets[partition])


def turn(out: Path, sources: Path, days: int = 1) -> Cost:
    """The cost of each turn of `days` days."""
    from schemas.loading import load_definition
    from transforms.streaming.journal_dofn import JournalDoFn
    from transforms.streaming.live_settings import LiveSettings
    from transforms.streaming.mirrored_state import SINGLE_KEY
    from transforms.streaming.time_buckets import SLOTS

    step = JournalDoFn([load_definition(DEFINITION).view], LiveSettings(str(out), "turns", str(sources), shards=1))
    step.setup()
    head, bag, *slots = (MemoryState() for _ in range(2 + SLOTS))
    decoding: list[tuple[float, float]] = []
    computing: list[tuple[float, float]] = []
    quiet: list[tuple[float, float]] = []
    total = 0
    for number, (envelope, rows, *decode) in enumerate(envelopes(sources, days)):
        cpu, wall = time.process_time(), time.perf_counter()
        outputs = list(step.process((SINGLE_KEY, envelope), head, bag, *slots))
        seconds = time.process_time() - cpu, time.perf_counter() - wall
        if number < 20:  # the month before, and one-time preparations
            continue
        total += rows
        decoding.append((decode[0], decode[1]))
        (computing if any(each.tag == "features" for each in outputs) else quiet).append(seconds)

    (cpu_ms, wall_ms), (quiet_cpu, quiet_wall), (decode_cpu, decode_wall) = map(cost, (computing, quiet, decoding))
    return Cost(
        turns=len(computing),
        rows=total,
        turn_fixed_ms=cpu_ms,
        turn_fixed_wall_ms=wall_ms,
        quiet_turn_ms=quiet_cpu,
        quiet_turn_wall_ms=quiet_wall,
        decode_ms=decode_cpu,
        decode_wall_ms=decode_wall,
    )


def cost(seconds: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean of the CPU times and median of the wall times, ms."""
    if not seconds:
        return 0.0, 0.0
    cpus, walls = zip(*seconds, strict=True)
    return round(statistics.fmean(cpus) * 1000, 2), round(statistics.median(walls) * 1000, 2)


def replay(out: Path, sources: Path, days: int = DAYS) -> dict[str, float]:
    """CPU and wall seconds of the command, its start included."""
    command = [
        *(sys.executable, "-W", "ignore", "-m", "beam_pipelines.features", "--streaming", "--source=replay"),
        *("--definition", DEFINITION, "--sources", str(sources), "--store", str(out / "store"), "--run_id=replay"),
        *("--start", f"{START:%Y-%m-%d}", "--end", f"{START + timedelta(days=days):%Y-%m-%d}"),
        *(f"--chunk={MINUTES}m", "--without_history"),
    ]
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds, after = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"the replay ended with exit code {done.returncode}:\n{(done.stdout + done.stderr)[-4000:]}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"replay_s": round(seconds, 2), "replay_cpu_s": round(cpu, 2)}
