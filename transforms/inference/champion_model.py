"""The model behind a registry alias in a live job: it is polled while the job runs and swapped between two batches.

Each worker process has one model and a thread that polls the alias.  The thread downloads, checks and warms up a new
version, and then swaps it in with one assignment.  If a version is broken, it is refused and the previous one keeps
serving.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterable, Sequence

import pyarrow as pa
from apache_beam.metrics import Metrics
from apache_beam.ml.inference.base import ModelHandler

from schemas.errors import MillraceError, MismatchError, StoreError
from schemas.feature_rows import FeatureRows
from schemas.live import SEEN, live_predictions, scorable
from schemas.views import FeatureView
from transforms.inference.live_records import BatchOrigin, Refusal, ServingModel, Swap
from transforms.models.bundle import Bundle
from transforms.models.registry import CHAMPION, Registry
from transforms.models.scoring import ARM, PinnedModel, Scorer, open_scorer, predict
from transforms.storage.file_systems import FileSystems

log = logging.getLogger("millrace.serving")
# The most swaps and refusals that a worker reports.
KEPT_ENTRIES = 20
# A value that changes when the files of a folder change.
FolderState = tuple[object, ...]


@dataclasses.dataclass(frozen=True)
class Serving:
    """The settings of a live job's scoring.

    Args:
        registry: MLflow tracking URI.
        model: registered name.
        view: the view whose rows are scored.
        first: the version that served at launch; a worker that starts while the alias names a broken version uses it.
        classes: number of scores per row.  Each is a column, so the number is fixed at launch.
        alias: the version with this alias serves.
        arm: a part of the identity of every prediction.
        poll: interval between reads of the alias, µs.
        threads: XGBoost threads per worker.
    """

    registry: str
    model: str
    view: FeatureView
    first: PinnedModel
    classes: int = 1
    alias: str = CHAMPION
    arm: str = ARM
    poll: int = 5_000_000
    threads: int = 1


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model, and the time from which it serves (µs since 1970)."""

    scorer: Scorer
    since: int

    @property
    def version(self) -> str:
        return self.scorer.version


def check_model(bundle: Bundle, version: str, view: FeatureView | FeatureRows, train: str) -> None:
    """Checks that a model was trained on the features that the definition describes now.

    Args:
        bundle: the model.
        version: its version in the registry.
        view: the view of the definition, or the feature rows of its model.
        train: the command that trains a model.

    Raises:
        MismatchError: fingerprints of a view or inputs differ.
    """
    rows = view if isinstance(view, FeatureRows) else FeatureRows((view,))
    views = bundle.manifest.get("views") or [{"view": bundle.manifest["view"], "fingerprint": bundle.fingerprint}]
    then, now = [(each["view"], each["fingerprint"]) for each in views], [(v.name, v.fingerprint) for v in rows.views]
    if then != now:
        trained, described = ([f"{name}/{fingerprint}" for name, fingerprint in each] for each in (then, now))
        value = (
            f"version {version} of {bundle.name!r} was trained on {' and '.join(trained)}, "
            f"the definition describes {' and '.join(described)}"
        )
        fix = (
            f"Train again with: {train}; or restore the definition it was trained with. "
            "If it is the same, a newer Millrace computes some of its features differently "
            "(see CHANGELOG.md): train again"
        )
        raise MismatchError("A model scores the features it was trained on (view/fingerprint)", value, fix)
    known = {field.name: str(field.type) for field in rows.schema}
    wanted = bundle.encoders.inputs
    if wrong := [f"{name}: {kind}" for name, kind in wanted.items() if known.get(name) != kind]:
        value = f"{', '.join(wrong)}, not in the view of {rows.fingerprint}"
        raise MismatchError(f"Version {version} takes inputs of the view", value, "Train again on this view")


def open_checked(serving: Serving, model: PinnedModel) -> Scorer:
    """Load a model and check it: its files are as registered, it fits these features, and it scores a test row.

    Raises:
        StoreError: files are missing or altered.
        MismatchError: the model was trained on other features, or returns another number of scores.
    """
    scorer = open_scorer(model, serving.threads)
    bundle, view = scorer.bundle, serving.view
    check_model(bundle, scorer.version, view, "millrace training")
    if bundle.classes != serving.classes:
        value = f"version {scorer.version} gives {bundle.classes}, the job began with {serving.classes}"
        fix = "Start the job anew with a predictions table of its own: give the model another name"
        raise MismatchError("A live job's scores are the same columns throughout", value, fix)
    schema = scorable(view)
    row = pa.RecordBatch.from_arrays([pa.nulls(1, field.type) for field in schema], schema=schema)
    predict(scorer, row, serving.arm, SEEN.names)
    return scorer


class Champion:
    """The version with the alias, in this process.

    Args:
        serving: the settings.
        watch: whether a thread polls the alias.

    Raises:
        MillraceError: neither the version with the alias nor the version of the launch can serve.
    """

    def __init__(self, serving: Serving, watch: bool = True) -> None:
        self.serving, self.worker = serving, f"{socket.gethostname()}/{os.getpid()}"
        self.swaps: list[Swap] = []
        self.refused: list[Refusal] = []
        self._registry, self._lock, self._stop = Registry(serving.registry), threading.Lock(), threading.Event()
        self._skipped: tuple[str, FolderState] | None = None
        self._trouble, self._folder, self._recorded = "", "", ""
        self._counts = {"swaps": 0, "refused": 0}
        self._current: LoadedModel | None = None
        self.look()
        if self._current is None:
            self._swap(open_checked(serving, serving.first))
        if watch:
            _open.add(self)
            threading.Thread(
                target=_watch, args=(weakref.ref(self), self._stop, serving.poll / 1e6), daemon=True
            ).start()

    @property
    def current(self) -> LoadedModel:
        assert self._current is not None
        return self._current

    def acquire(self) -> tuple[LoadedModel, int]:
        """The model that serves, and the current time (µs), which is before the `since` of any model that replaces
        it."""
        with self._lock:
            return self.current, time.time_ns() // 1000

    def take_counts(self) -> dict[str, int]:
        """Counts of swaps and refusals since the last call."""
        with self._lock:
            result, self._counts = self._counts, {"swaps": 0, "refused": 0}
            return result

    def record_first_rows(self, loaded: LoadedModel, rows: pa.RecordBatch) -> None:
        """Record the first rows that a model scores in this process."""
        with self._lock:
            if self._recorded == loaded.version or loaded is not self._current or not rows.num_rows:
                return
            self._recorded = loaded.version
        positions = [f"{each.source}/{each.partition}@{each.first}" for each in BatchOrigin.of(rows).ranges]
        log.warning(
            "version %s of %r scores from %s on",
            loaded.version,
            self.serving.model,
            ", ".join(positions) or "the next row",
        )

    def look(self) -> None:
        """Read the alias; if it names another version, swap that version in if it can serve."""
        serving = self.serving
        try:
            version = self._registry.bearer(serving.model, serving.alias)
            if version is None:
                value = f"no version of {serving.model!r} has the alias {serving.alias!r} in {serving.registry}"
                raise StoreError("A version has the alias of a live job", value, "Set it with: millrace promote")
        except Exception as error:  # on any error of the registry, the model in memory keeps serving
            self._report(error)
            return
        if self._trouble:
            log.warning(
                "the registry can be reached again: version %s has the alias %r of %r",
                version,
                serving.alias,
                serving.model,
            )
            self._trouble = ""
        if self._current is not None and version == self._current.version:
            self._skipped = None
        elif self._skipped is None or self._skipped != (version, _state(self._folder)):
            self._try(version)

    def close(self) -> None:
        """Stop polling; the model in memory keeps serving."""
        self._stop.set()

    def _try(self, version: str) -> None:
        serving, began = self.serving, time.perf_counter()
        try:
            _, folder, digest = self._registry.locate(serving.model, version)
        except Exception as error:
            self._report(error)
            return
        self._folder, state = folder, _state(folder)
        try:
            scorer = open_checked(serving, PinnedModel(folder, version, digest))
        except Exception as error:  # a broken model may raise any exception
            self._refuse(version, error)
            self._skipped = version, state
            return
        self._skipped = None
        self._swap(scorer, time.perf_counter() - began)

    def _swap(self, scorer: Scorer, took: float = 0.0) -> None:
        before = self._current
        with self._lock:
            loaded = LoadedModel(scorer, time.time_ns() // 1000)
            self._current = loaded
            if before is not None:
                swap = Swap(loaded.since, before.version, loaded.version)
                self.swaps = [*self.swaps, swap][-KEPT_ENTRIES:]
                self._counts["swaps"] += 1
        which = f"version {loaded.version} of {self.serving.model!r}"
        if before is None:
            log.info("%s serves", which)
        else:
            log.warning(
                "%s serves instead of version %s since %s (loaded, checked and warmed in %.2f s)",
                which,
                before.version,
                _moment(loaded.since),
                took,
            )

    def _refuse(self, version: str, error: Exception) -> None:
        serving = "what served at launch" if self._current is None else f"version {self._current.version}"
        known = isinstance(error, MillraceError)
        rule = error.rule if isinstance(error, MillraceError) else "A model can be loaded and scores a row"
        value, fix = (error.value, error.fix) if isinstance(error, MillraceError) else (repr(error)[:300], "")
        entry = Refusal(time.time_ns() // 1000, version, rule, str(value), fix)
        with self._lock:
            self.refused = [*self.refused, entry][-KEPT_ENTRIES:]
            self._counts["refused"] += 1
        log.error(
            "version %s of %r is refused, %s serves on: %s  "
            "It is tried again when the alias moves or its files change.",
            version,
            self.serving.model,
            serving,
            error if known else f"{rule}. Got: {value}.",
        )

    def _report(self, error: Exception) -> None:
        """Report an error of the registry once, until the error changes."""
        if str(error) != self._trouble:
            self._trouble = str(error)
            serving = "the version of the launch" if self._current is None else f"version {self._current.version}"
            log.warning("%s continues to serve while the registry is tried again: %s", serving, error)


_open: weakref.WeakSet[Champion] = weakref.WeakSet()


def close_all() -> None:
    """Stop the polling threads of this process."""
    for champion in list(_open):
        champion.close()


def _watch(champion: weakref.ref[Champion], stop: threading.Event, poll: float) -> None:
    while not stop.wait(poll):
        if (alive := champion()) is None:
            return
        alive.look()
        del alive


def _state(folder: str) -> FolderState:
    """A value that changes when the files of a folder change."""
    try:
        if "://" in folder:
            (found,) = FileSystems.match([FileSystems.join(folder, "*")])
            return tuple(
                sorted((each.path, each.size_in_bytes, each.last_updated_in_seconds) for each in found.metadata_list)
            )
        with os.scandir(folder) as entries:
            stats = [(entry.name, entry.stat()) for entry in entries]
        return tuple(sorted((name, each.st_size, each.st_mtime_ns, each.st_ino) for name, each in stats))
    except Exception as error:  # missing or unreadable: the value stays the same until this changes
        return (type(error).__name__,)


def _moment(at: int) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(at // 1_000_000)) + f".{at // 1000 % 1000:03} UTC"


class ChampionHandler(ModelHandler[pa.RecordBatch, pa.RecordBatch, Champion]):
    """RunInference over live feature rows: each batch is scored by the model that serves at that moment.

    The input is batches of `schemas.live.scorable(view)`, the output is `schemas.live.live_predictions(view, classes)`.
    The `BatchOrigin` in the metadata passes through, and the `ServingModel` of this worker is added.
    """

    def __init__(self, serving: Serving) -> None:
        super().__init__()
        self.serving = serving
        self._counters = {name: Metrics.counter("millrace.serving", name) for name in ("swaps", "refused")}
        self._version = Metrics.gauge("millrace.serving", "model_version")

    def load_model(self) -> Champion:
        return Champion(self.serving)

    def run_inference(
        self, batch: Sequence[pa.RecordBatch], model: Champion, inference_args: dict[str, object] | None = None
    ) -> Iterable[pa.RecordBatch]:
        rows: pa.RecordBatch = batch  # RunInference passes a batch unchanged
        loaded, at = model.acquire()
        for name, number in model.take_counts().items():
            if number:
                self._counters[name].inc(number)
        if loaded.version.isdigit():
            self._version.set(int(loaded.version))
        model.record_first_rows(loaded, rows)
        return [score_live(self.serving, model, loaded, at, rows)]

    def should_skip_batching(self) -> bool:
        return True

    def get_num_bytes(self, batch: Sequence[pa.RecordBatch]) -> int:
        return int(batch.nbytes)  # type: ignore[attr-defined]

    def get_metrics_namespace(self) -> str:
        return "millrace.serving"


def score_live(
    serving: Serving, champion: Champion, loaded: LoadedModel, at: int, rows: pa.RecordBatch
) -> pa.RecordBatch:
    """Predictions of one model for a batch, with the scoring time `at` (µs)."""
    schema = live_predictions(serving.view, serving.classes)
    if rows.num_rows:
        made = predict(loaded.scorer, rows, serving.arm, SEEN.names)
        columns = [
            *made.columns,
            pa.repeat(pa.scalar(at, pa.int64()), rows.num_rows).cast(schema.field("__scored").type),
        ]
    else:
        columns = [pa.array([], field.type) for field in schema]
    serving_model = ServingModel(champion.worker, loaded.version, loaded.since, tuple(champion.refused))
    metadata = {**BatchOrigin.of(rows).to_metadata(), **serving_model.to_metadata()}
    return pa.RecordBatch.from_arrays(columns, schema=schema.with_metadata(metadata))
