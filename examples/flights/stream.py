"""The live case: a month of flights through Kafka and Prism, features and predictions as they come, then parity with
batch.

What the sources hold from before the month is handed over as history, so that every window is filled from the first
feature row on.

    ./run_local.sh stream

It uses Kafka and Prism where Java, Maven and Go are present, else it replays the month in one process.

Everything it starts runs on free ports of loopback and ends with it, on Ctrl-C too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import logging
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import polars as pl

from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.run_report import progress, read_json, write_json
from schemas.errors import DataError, GateError
from schemas.loading import load_definition
from schemas.views import FeatureView
from transforms.records.times import FOREVER
from transforms.streaming.messages import HEARTBEAT

if TYPE_CHECKING:
    from deploy.streaming.processes import Child
    from transforms.models.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
DEFINITION = "examples.flights.definition"
# The model that takes over halfway: the same with fewer rounds.
SECOND = (
    "import dataclasses\n\nfrom examples.flights.definition import model as first, view\n\n"
    "model = dataclasses.replace(first, rounds=150)\n"
)
SHARE = "6,3,1,0"  # of the rows, per partition: uneven, the last one idle
DRAIN = 180.0  # seconds within which the rest is computed and scored
Figures = dict[str, Any]  # of run.json and status.json


class Sent(TypedDict):
    """What the producer says of itself: rows sent, the time of the last (µs), and rows per partition of each topic."""

    done: bool
    rows: int
    time: int
    sent: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One live run: `store` holds the sources and the models, `folder` what comes of it."""

    store: Path
    folder: Path
    start: str
    end: str
    seconds: float
    first: str
    second: str

    @property
    def live(self) -> Path:
        return self.folder / "store"

    @functools.cached_property
    def view(self) -> FeatureView:
        return load_definition(DEFINITION).view

    @property
    def registry(self) -> list[str]:
        """The models are those of the store, whoever scores."""
        return [f"--registry=sqlite:///{self.store}/registry/mlflow.db"]

    @property
    def common(self) -> list[str]:
        return ["--definition", DEFINITION, "--store", str(self.live)]


def main(argv: Sequence[str]) -> int:
    """Run it all; 0 when every spine row was computed and scored once, and live equals batch to the bit."""
    parser = argparse.ArgumentParser(prog="./run_local.sh stream", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--out", default="out", help="folder of the store that ./run_local.sh made, or makes (default: out)"
    )
    parser.add_argument("--month", default="2013-03", help="the month to replay (default: 2013-03)")
    parser.add_argument("--seconds", type=float, default=90, help="how long its replay takes (default: 90)")
    parser.add_argument("--embedded", action="store_true", help="a replay in one process, without Kafka and Prism")
    parser.add_argument("--features_only", action="store_true", help="no model, no predictions")
    flags = parser.parse_args(argv)
    from deploy.streaming.toolchain import missing

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is running ends as on Ctrl-C
    progress()
    lacking = missing()
    embedded = flags.embedded or bool(lacking)
    print(
        f"live through {'a replay in one process' if embedded else 'Kafka and Prism'}"
        + (f"; missing: {'; '.join(lacking)}" if lacking else ""),
        flush=True,
    )
    from examples.flights import data

    out, year, month = Path(flags.out).resolve(), int(flags.month[:4]), int(flags.month[5:])
    start, end = f"{flags.month}-01", f"{year + month // 12}-{month % 12 + 1:02}-01"
    data.write(str(out / "store"))  # leaves what is there as it is
    first, second = ("", "") if flags.features_only else models(out / "store")
    case = Case(
        out / "store", out / "stream" / time.strftime("%Y%m%d-%H%M%S"), start, end, flags.seconds, first, second
    )
    case.folder.mkdir(parents=True)
    figures = (in_process if embedded else through_kafka)(case)
    figures["parity"] = parity(case)
    write_json(str(case.folder / "run.json"), figures)
    print(
        f"\n{json.dumps(figures, indent=2)}\n\n"
        f"written to {case.folder / 'run.json'}; what each process said is beside it"
    )
    return judge(figures)


def judge(figures: Figures) -> int:
    """0 when nothing is missing or doubled; what differs from batch has been refused before.

    Raises:
        DataError: a row is missing or doubled, or a value differs.
    """
    asked, scored = figures["questions"], figures["parity"].get("predictions")
    counts = {"answered": figures["answered"], "answered in the table": figures["parity"]["answers_compared"]}
    if scored is not None:
        counts |= {"predicted": figures["predicted"], "predicted in the table": scored["predictions"]}
        counts["scored again by a batch job"] = sum(scored["compared"].values())
    for what, count in counts.items():
        if count != asked:
            fix = "Please report it, with the folder above"
            raise DataError(f"Every question is {what} once", f"{count:,} of {asked:,}", fix)
    full = figures["parity"]["full_batch"]
    compared = full.get("answers_compared", 0) + full.get("answers_of_dates_not_computed", 0)
    if full.get("values_differing") != 0 or compared != asked:
        raise DataError(
            "Live answers are the batch table's, from the first one on",
            f"{full.get('values_differing', 'no')} values of {compared:,} answers differ from {full['batch']}",
            "See the causes above, and in run.json",
        )
    if scored is not None and len(scored["compared"]) < 2:
        print(f"note: version {', '.join(scored['compared'])} scored all; the swap came after the last row", flush=True)
    return 0


# -- before: the sources and two models ----------------------------------------------------------------------------


def models(store: Path) -> tuple[str, str]:
    """Two registered versions, the champion first; whatever is missing for them is made."""
    from transforms.models.registry import Registry, registry_uri

    name, registry = load_definition(DEFINITION).require_model().name, Registry(registry_uri(str(store)))
    for definition in (DEFINITION, str(second_definition(store))):
        if len(versions(registry, name)) < (1 if definition == DEFINITION else 2):
            from beam_pipelines import features, training

            if definition == DEFINITION:
                features.main(["--definition", DEFINITION, "--store", str(store)])
            with contextlib.suppress(GateError):  # it is registered all the same
                training.main(["--definition", definition, "--store", str(store)])
    champion, known = registry.champion(name), versions(registry, name)
    first = champion or known[0]
    return first, next(version for version in reversed(known) if version != first)


def versions(registry: Registry, name: str) -> list[str]:
    return [version for model, version in registry.models() if model == name]


def second_definition(store: Path) -> Path:
    path = store / "second_definition.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(SECOND)
    return path


@contextlib.contextmanager
def swapping(case: Case) -> Iterator[Callable[[], None]]:
    """A function that makes the second version champion; afterwards the first is it again."""
    from transforms.models.registry import Registry, registry_uri

    if not case.first:
        yield lambda: None
        return
    name, registry = load_definition(DEFINITION).require_model().name, Registry(registry_uri(str(case.store)))

    def promote(version: str, why: str) -> None:
        registry.promote(name, version, why)

    promote(case.first, "examples/flights/stream.py begins with it")
    try:
        yield lambda: promote(case.second, "examples/flights/stream.py swaps halfway")
    finally:
        promote(case.first, "examples/flights/stream.py has ended")


# -- Kafka and Prism -----------------------------------------------------------------------------------------------


def through_kafka(case: Case) -> Figures:
    """The month through a broker; both live pipelines over the Job API."""
    from deploy.streaming.expansion import Expansion
    from deploy.streaming.kafka import Broker
    from deploy.streaming.prism import Prism
    from deploy.streaming.processes import running

    name = load_definition(DEFINITION).require_model().name
    features_topic, predictions_topic = f"{case.view.name}.features", f"{name}.predictions"
    began = time.monotonic()
    broker, expansion, prism = Broker(case.folder), Expansion(case.folder), Prism(case.folder)
    try:
        with running(broker, expansion, prism), swapping(case) as swap:
            broker.create(*case.view.events, partitions=len(SHARE.split(",")))
            broker.create(features_topic, f"{case.view.name}.dead_letters", predictions_topic)
            kafka = [
                "--streaming",
                "--source=kafka",
                "--bootstrap",
                broker.bootstrap,
                "--expansion_service",
                expansion.address,
            ]
            where = [*kafka, *prism.options, "--environment_type=LOOPBACK"]
            with contextlib.ExitStack() as stack:
                children = {
                    "live": pipeline(
                        case,
                        "live",
                        # What the sources hold from before the month is handed over as history.
                        [*where, "--sources", str(case.store / "sources"), "--start", case.start, "--commit_every=2s"],
                    )
                }
                if case.first:
                    children["inference"] = pipeline(
                        case, "inference", [*where, *case.registry, "--poll=1s", "--commit_every=2s"]
                    )
                for child in reversed(children.values()):
                    stack.enter_context(child)
                print(f"started in {time.monotonic() - began:.1f} s; logs in {case.folder}", flush=True)
                children["producer"] = stack.enter_context(produce(case, broker.bootstrap))
                watch = Watch(case, broker.bootstrap, features_topic, predictions_topic)
                stack.callback(watch.close)
                figures = follow(case, watch, children, swap)
                for name, child in children.items():  # each ends by itself when the one before it has told all
                    if child.wait(60):
                        raise DataError(
                            "The live processes end well", f"{name}: {tail(case, name)}", f"See {case.folder}"
                        )
        return figures
    finally:
        shutil.rmtree(case.folder / "data", ignore_errors=True)  # the broker's


def pipeline(case: Case, name: str, flags: Sequence[str]) -> Child:
    """A live pipeline as a process of its own."""
    from deploy.streaming.processes import Child

    command = [sys.executable, "-m", f"beam_pipelines.{name}", *case.common, "--run_id", name, *flags]
    return Child(command, case.folder / f"{name}.log", cwd=ROOT, grace=20)


def produce(case: Case, bootstrap: str) -> Child:
    """The producer, as a process of its own."""
    from deploy.streaming.processes import Child

    days = (datetime.fromisoformat(case.end) - datetime.fromisoformat(case.start)).days
    flags = [
        "--definition",
        DEFINITION,
        "--sources",
        str(case.store / "sources"),
        "--bootstrap",
        bootstrap,
        "--start",
        case.start,
        "--end",
        case.end,
        "--speed",
        str(days * 86_400 / case.seconds),
        "--share",
        SHARE,
        "--status",
        str(case.folder / "producer.json"),
    ]
    return Child([sys.executable, "-m", "deploy.streaming.producer", *flags], case.folder / "producer.log", cwd=ROOT)


class Watch:
    """What a consumer of the output topics sees."""

    def __init__(self, case: Case, bootstrap: str, features: str, predictions: str) -> None:
        from confluent_kafka import OFFSET_BEGINNING, Consumer, TopicPartition

        self.case, self.features, self.predictions = case, features, predictions
        self.answered: set[int] = set()
        self.predicted: dict[int, str] = {}
        self.rows = Counter[str]()
        self.until = 0  # greatest time of an answered question, µs
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

    def look(self, within: float) -> None:
        """Take in what came within so many seconds."""
        deadline = time.monotonic() + within
        while (left := deadline - time.monotonic()) > 0:
            for message in self.consumer.consume(500, timeout=min(left, 0.2)):
                if message.error() is None and message.key() != HEARTBEAT:
                    rows, topic = pl.read_ipc_stream(io.BytesIO(message.value() or b"")), str(message.topic())
                    self.rows[topic] += len(rows)
                    self._answer(rows) if topic == self.features else self._predict(rows)

    def _answer(self, rows: pl.DataFrame) -> None:
        self.answered.update(rows["row_id"].to_list())
        self.until = int(rows[self.case.view.time].to_physical().to_numpy().max(initial=self.until))

    def _predict(self, rows: pl.DataFrame) -> None:
        for row, version in rows.select("row_id", "model_version").iter_rows():
            self.predicted.setdefault(row, version)
            self.version_since.setdefault(version, time.monotonic())

    def close(self) -> None:
        self.consumer.close()


def follow(case: Case, watch: Watch, children: dict[str, Child], swap: Callable[[], None]) -> Figures:
    """Show what happens until everything sent has come out at the other end, or `DRAIN` seconds have passed since the
    last was sent.

    Raises:
        DataError: a process ended before its time.
    """
    show, lags = Table(), list[float]()
    told: Sent = {"done": False, "rows": 0, "time": 0, "sent": {}}
    done_at = swapped_at = None
    speed = (datetime.fromisoformat(case.end) - datetime.fromisoformat(case.start)).total_seconds() / case.seconds
    first_day = datetime.fromisoformat(case.start).replace(tzinfo=UTC).timestamp()
    began = time.monotonic()
    while True:
        watch.look(0.5)
        with contextlib.suppress(OSError):
            told = json.loads((case.folder / "producer.json").read_text())
        questions = sum(told["sent"].get(case.view.spine.name, []))
        for name, child in children.items():
            if not child.running and not (told["done"] and child.wait() == 0):
                raise DataError(
                    "The live processes run until everything is sent",
                    f"{name} ended: {tail(case, name)}",
                    f"See {case.folder}",
                )
        if case.first and swapped_at is None and told["time"] / 1e6 > first_day + speed * case.seconds / 2:
            swap()
            swapped_at = time.monotonic()
        lag = max(told["time"] - watch.until, 0) / 1e6 / speed if watch.until else None
        lags += [lag] if lag is not None and not told["done"] else []
        show(told, description_after(case), questions, watch, lag)
        done_at = done_at or (time.monotonic() if told["done"] else None)
        ended = not children["live"].running  # the last commit is in
        complete = (
            told["done"]
            and ended
            and len(watch.answered) >= questions
            and (not case.first or len(watch.predicted) >= questions)
        )
        if complete or (done_at is not None and time.monotonic() - done_at > DRAIN):
            break
    drained = time.monotonic()
    watch.look(2)  # whatever comes twice
    show(told, description_after(case), questions, watch, None, True)
    show.end()
    seen = watch.version_since.get(case.second)
    return {
        "mode": "kafka and prism",
        "events": told["rows"],
        "questions": questions,
        "answered": len(watch.answered),
        **(
            {}
            if not case.first
            else {
                "predicted": len(watch.predicted),
                "predictions": watch.rows[watch.predictions],
                "by_version": dict(Counter(watch.predicted.values())),
                "swap_seen_after_s": round(seen - swapped_at, 2) if seen and swapped_at else None,
            }
        ),
        "events_per_second": round(told["rows"] / case.seconds),
        "lag_s": {"median": quantile(lags, 0.5), "p99": quantile(lags, 0.99)},
        "drained_after_s": round(drained - done_at, 2) if done_at else None,
        "seconds": round(drained - began, 1),
    }


class Table:
    """A line of figures: over itself on a terminal, never wider than that; one in five seconds elsewhere."""

    COLUMNS = (
        ("sent to", 11),
        ("events", 10),
        ("clock", 11),
        ("asked", 9),
        ("answered", 9),
        ("lag s", 5),
        ("predicted", 9),
        ("model", 5),
    )

    # Where there is room: what the features job holds in its state.
    WIDE = (("held MB", 7), ("held rows", 9))

    def __init__(self) -> None:
        self.over, self.last = sys.stdout.isatty(), 0.0
        whole = self.COLUMNS + self.WIDE
        fits = shutil.get_terminal_size().columns > sum(width + 1 for _, width in whole)
        self.columns = whole if fits else self.COLUMNS
        self._say(" ".join(f"{name:>{width}}" for name, width in self.columns) + "\n")

    def __call__(
        self,
        sent: Sent,
        described: Figures,
        questions: int,
        watch: Watch,
        lag: float | None,
        now: bool = False,
    ) -> None:
        if not self.over and not now and time.monotonic() - self.last < 5:
            return
        self.last = time.monotonic()
        newest = max(watch.version_since, key=lambda version: watch.version_since[version], default="")
        values = (
            clock(sent["time"]),
            f"{sent['rows']:,}",
            clock(settled(described)),
            f"{questions:,}",
            f"{len(watch.answered):,}",
            "" if lag is None else f"{lag:.1f}",
            f"{len(watch.predicted):,}",
            newest and f"v{newest}",
            *(
                f"{held(described, what) / per:,.{digits}f}" if described else ""
                for what, per, digits in (("bytes", 1e6, 1), ("rows", 1, 0))
            ),
        )
        line = " ".join(f"{value:>{width}}" for value, (_, width) in zip(values, self.columns, strict=False))
        # What was there is written over, and only then cleared behind: a line cleared first flickers.
        self._say(f"\r{line[: shutil.get_terminal_size().columns - 1]}\x1b[K" if self.over else f"{line}\n")

    def end(self) -> None:
        if self.over:
            self._say("\n")

    def _say(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


def clock(moment: int) -> str:
    if moment >= FOREVER:
        return "end"
    return datetime.fromtimestamp(moment / 1e6, UTC).strftime("%m-%d %H:%M") if moment > 0 else ""


def description_after(case: Case) -> Figures:
    """What the last commit of the features said; empty before the first."""
    try:
        return dict(json.loads((case.live / "runs" / "live" / "status.json").read_text()))
    except (OSError, ValueError):
        return {}


def settled(told: Figures) -> int:
    """Up to when everything is known."""
    return min((each["settled"] for each in told.get("clock", {}).values()), default=0)


def held(told: Figures, what: str) -> int:
    """Rows or bytes that the job holds in its state."""
    return sum(each[what] for each in told["state"].values())


def quantile(values: Sequence[float], share: float) -> float | None:
    return round(sorted(values)[min(int(len(values) * share), len(values) - 1)], 2) if values else None


def tail(case: Case, name: str) -> str:
    log = case.folder / f"{name}.log"
    return " | ".join(log.read_text(errors="replace").strip().splitlines()[-3:]) if log.exists() else "no word"


# -- in one process -------------------------------------------------------------------------------------------------


def in_process(case: Case) -> Figures:
    """The month replayed through the same steps on the runner in this process, then its feature rows scored; the
    champion changes halfway."""
    from beam_pipelines import features_streaming, inference_streaming

    between = ["--start", case.start, "--end", case.end]
    flags = ["--streaming", "--source=replay", "--chunk=6h", "--sources", str(case.store / "sources"), *between]
    features_streaming.main([*case.common, "--run_id", "live", *flags])
    found = read_json(os.path.join(case.live, "runs", "live", "run.json"))
    figures = {
        "mode": "replay in one process",
        "events": found["rows_in"],
        "questions": found["counts"][case.view.spine.name]["rows"],
        "answered": found["rows_out"],
        "seconds": found["seconds"],
    }
    if case.first:
        log = logging.getLogger("millrace.serving")
        with swapping(case) as swap:
            log.addHandler(halfway := Halfway(swap))
            try:
                paced = ["--streaming", "--source=replay", "--poll=100ms", "--pace=100ms"]
                inference_streaming.main([*case.common, *case.registry, "--run_id", "inference", *paced])
            finally:
                log.removeHandler(halfway)
        made = read_json(os.path.join(case.live, "runs", "inference", "run.json"))
        figures |= {
            "predicted": made["rows_out"],
            "by_version": made["by_version"],
            "swaps": made["swaps"],
            "seconds": round(found["seconds"] + made["seconds"], 1),
        }
    return figures


class Halfway(logging.Handler):
    """Calls `swap` when half of the feature rows have been read."""

    def __init__(self, swap: Callable[[], None]) -> None:
        super().__init__()
        self.swap: Callable[[], None] | None = swap

    def emit(self, record: logging.LogRecord) -> None:
        from transforms.inference.live_input import REPLAY

        if self.swap is not None and record.msg == REPLAY and 2 * record.args[0] >= record.args[1]:  # type: ignore[index,operator]
            swap, self.swap = self.swap, None
            swap()


# -- after ---------------------------------------------------------------------------------------------------------


def parity(case: Case) -> Figures:
    """Compute every live feature row again in batch.

    Raises:
        MismatchError: a bit differs.
    """
    from beam_pipelines.commands import parity

    parity.main([*case.common, "--run_id", "parity", *(case.registry if case.first else ())])
    found = read_json(os.path.join(case.live, "runs", "parity", "run.json"))
    return {name: value for name, value in found.items() if name not in ("features", "pipeline", "run_id")}


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(guard(main)(sys.argv[1:]))
