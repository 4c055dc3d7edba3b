"""Training of XGBoost over example files: trials share a worker's cores, and the best is saved as a bundle."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import apache_beam as beam
import pyarrow as pa
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.timestamp import MIN_TIMESTAMP
from apache_beam.utils.windowed_value import WindowedValue

from schemas import Model
from schemas.splits import Split
from transforms.models.bundle import Bundle, save_bundle
from transforms.models.encoders import Fitted
from transforms.models.stored_records import ModelManifest, ProvenanceRecord
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.training.data_checks import bundle_files
from transforms.training.examples import ExamplesAccount
from transforms.training.hyperparameter_search import (
    Trial,
    TrialResult,
    best_result,
    budgets,
    last_of_each,
    over_folds,
    promoted,
)
from transforms.training.xgboost_checks import first_line, require_device
from transforms.training.xgboost_data import Matrices, is_external, matrices

if TYPE_CHECKING:
    from tensorflow_metadata.proto.v0.statistics_pb2 import DatasetFeatureStatisticsList
    from xgboost import Booster
    from xgboost.callback import TrainingCallback

log = logging.getLogger("millrace.training")
# Data set → metric → its value after each round, as XGBoost gives them.
EvaluationLog = dict[str, dict[str, list[float]]]

# XGBoost's names of our metrics, which it computes after each round.  The root of the Brier score orders models as the
# score does;
# its average precision interpolates between scores (Davis and Goadrich 2006).
_EVALUATED = {
    "auc": "auc",
    "average_precision": "aucpr",
    "log_loss": "logloss",
    "brier": "rmse",
    "rmse": "rmse",
    "mae": "mae",
    "accuracy": "merror",
}


def evaluated(model: Model) -> str:
    """XGBoost's name of the model's metric."""
    name = _EVALUATED[model.metric]
    return "mlogloss" if name == "logloss" and model.objective == "multi:softprob" else name


def train(
    model: Model, trial: Trial, data: Matrices, threads: int, classes: int = 1, device: str = "cpu"
) -> tuple[bytes, list[float], int]:
    """Train one booster.

    Args:
        threads: XGBoost's threads; another number may change the last bits of the booster.
        classes: see `classes_of`.
        device: `cpu`, or `cuda` with an optional number, as XGBoost names it.

    Returns:
        (UBJSON of the best rounds, the metric on validation after each round, number of rounds in the booster).
    """
    import xgboost

    params = {
        "tree_method": "hist",
        "nthread": threads,
        "verbosity": 0,
        **trial.params,
        "objective": model.objective,
        "device": device,
        "eval_metric": evaluated(model),
        "seed": model.seed,
        **({"num_class": classes} if classes > 1 else {}),
    }
    history: EvaluationLog = {}
    booster = xgboost.train(
        params,
        data.train,
        trial.rounds or model.rounds,
        evals=[(data.validate, "validate")],
        evals_result=history,
        verbose_eval=False,
        early_stopping_rounds=model.early_stopping or None,
        callbacks=[_progress(model, trial)],
    )
    values = [_ours(model.metric, value) for value in history["validate"][evaluated(model)]]
    rounds = booster.best_iteration + 1 if model.early_stopping else booster.num_boosted_rounds()
    if rounds < booster.num_boosted_rounds():
        booster = booster[:rounds]
    return bytes(booster.save_raw("ubj")), values, rounds


def classes_of(model: Model, account: ExamplesAccount) -> int:
    """Scores per row: the number of classes of a multi-class model, else 1."""
    if model.objective != "multi:softprob":
        return 1
    return 1 + max(int(label) for seen in account.labels.values() for label in seen)


def _ours(metric: str, value: float) -> float:
    return value * value if metric == "brier" else 1.0 - value if metric == "accuracy" else value


def _progress(model: Model, trial: Trial) -> TrainingCallback:
    import xgboost

    class Progress(xgboost.callback.TrainingCallback):
        """Logs a line every few seconds."""

        logged = time.monotonic()

        def after_iteration(self, booster: Booster, epoch: int, evals_log: EvaluationLog) -> bool:
            if time.monotonic() - self.logged > 5:
                self.logged = time.monotonic()
                value = _ours(model.metric, evals_log["validate"][evaluated(model)][-1])
                log.info(
                    "trial %d: round %d of %d, %s %.4f",
                    trial.index,
                    epoch + 1,
                    trial.rounds or model.rounds,
                    model.metric,
                    value,
                )
            return False

    return Progress()


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """What the trials of one run have in common.

    Args:
        model: the model to train.
        split: bounds of the splits; trials run on each fold.
        folder: folder that boosters are written to.
        cores: cores that the trials of one worker share.  The number is fixed at launch, since the last bits of sums
            depend on the number of threads.
        device: XGBoost's device.
    """

    model: Model
    split: Split
    folder: str
    cores: int
    device: str = "cpu"

    @property
    def folds(self) -> int:
        return len(self.split.folds) + 1


class TrialRunner:
    """Runs the trials of one process side by side, with one thread each if there are as many trials as cores.

    Trials share the binned rows, which are made once for each number of bins and fold.
    """

    def __init__(self, study: Study, account: ExamplesAccount, fitted: Sequence[Fitted], trials: int) -> None:
        self.study, self.account, self.fitted = study, account, fitted
        alone = study.device != "cpu" or is_external(fitted[-1], account)
        self.side = 1 if alone else max(1, min(study.cores, trials))
        self.threads = max(1, study.cores // self.side)
        self.lock, self.shared = threading.Lock(), dict[tuple[int | None, int], Matrices]()

    def matrices(self, trial: Trial) -> Matrices:
        bins = int(trial.params["max_bin"]) if "max_bin" in trial.params else None
        with self.lock:
            if (bins, trial.fold) not in self.shared:
                while len(self.shared) >= self.side:
                    del self.shared[next(iter(self.shared))]
                folds = self.study.split.folds
                fold = folds[trial.fold] if trial.fold < len(folds) else None
                self.shared[bins, trial.fold] = matrices(
                    self.study.model, self.fitted[trial.fold], self.account, self.study.cores, bins, fold
                )
            return self.shared[bins, trial.fold]

    def run(self, trial: Trial) -> TrialResult:
        """Train one trial and write its booster to the study's folder; returns its path and metric.

        A trial that XGBoost refuses gives a result with an error, and the search goes on.
        """
        import xgboost

        model, start = self.study.model, time.perf_counter()
        try:
            classes = classes_of(model, self.account)
            booster, history, rounds = train(
                model, trial, self.matrices(trial), self.threads, classes, self.study.device
            )
        except (xgboost.core.XGBoostError, TypeError, ValueError) as error:
            return TrialResult(trial, math.nan, error=first_line(error), seconds=time.perf_counter() - start)
        name = f"trial-{trial.index:03d}-{trial.rung}-{trial.fold}.ubj"
        write_file_atomically(self.study.folder, name, pa.py_buffer(booster))
        value = history[rounds - 1]
        booster_path = FileSystems.join(self.study.folder, name)
        return TrialResult(trial, value, rounds, tuple(history), booster_path, time.perf_counter() - start)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The chosen model on disk.

    Args:
        folder: folder of its bundle.
        digest: SHA-256 of its manifest.
        best: result of the chosen trial.
        results: results of all trials, in order.
    """

    folder: str
    digest: str
    best: TrialResult
    results: tuple[TrialResult, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class BundleRequest:
    """The bundle to save.

    Args:
        model: the declared model.
        folder: folder of the bundle.
        provenance: manifest entries that record where the model came from.
    """

    model: Model
    folder: str
    provenance: ProvenanceRecord


def save_best(
    results: Sequence[TrialResult],
    request: BundleRequest,
    account: ExamplesAccount,
    fitted: Fitted,
    statistics: DatasetFeatureStatisticsList | None = None,
) -> Trained:
    """Save the best trial's booster with the encoders and a manifest as a bundle.

    Args:
        results: results of every rung and fold.
        request: what to save, and where.
        account: counts of the examples.
        fitted: encoders fitted on the training split.
        statistics: TFDV statistics of the training split, saved with the model.
    """
    model = request.model
    results = over_folds(model, results)
    best = best_result(model, results)
    with FileSystems.open(best.booster, "application/octet-stream", "uncompressed") as handle:
        booster = handle.read()
    manifest: ModelManifest = {
        "model": model.name,
        "objective": model.objective,
        "classes": classes_of(model, account),
        "metric": model.metric,
        "problem": model.problem,
        "view": model.view.name,
        "fingerprint": model.rows.fingerprint,
        "key": list(model.view.key),
        "time": model.view.time,
        "inputs": fitted.inputs,
        "columns": fitted.names,
        "rounds": best.rounds,
        "params": dict(best.trial.params),
        "seed": model.seed,
        "examples": {name: each.as_json() for name, each in account.counts.items()},
        **request.provenance,
    }
    extra = {} if statistics is None else bundle_files(statistics, model)
    digest = save_bundle(Bundle(booster, fitted, manifest, extra), request.folder)
    return Trained(request.folder, digest, best, last_of_each(results))


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Train(beam.PTransform):
    """PCollection[Trial] → PCollection[Result], one per trial, rung and fold.

    Trials are spread over workers; those of one Beam bundle run side by side.

    Args:
        study: what the trials have in common.
        account: PCollection of one `ExamplesAccount` of the examples.
        fitted: for each fold, a PCollection of one `Fitted`.
    """

    study: Study
    account: beam.PCollection
    fitted: Sequence[beam.PCollection]

    def expand(self, trials: beam.PCollection) -> beam.PCollection:
        sides = [beam.pvalue.AsSingleton(each) for each in (self.account, *self.fitted)]
        results: list[beam.PCollection] = []
        for rung in range(len(budgets(self.study.model))):
            name = f"Rung{rung}" if rung else ""
            if rung:
                trials = (
                    results[-1]
                    | f"Gather{name}" >> beam.combiners.ToList()
                    | f"Promote{name}" >> beam.FlatMap(_promote, self.study, rung)
                )
            spread = (
                trials | f"Folds{name}" >> beam.FlatMap(_folds, self.study.folds) | f"Spread{name}" >> beam.Reshuffle()
            )
            results.append(spread | f"Trial{name}" >> beam.ParDo(_Trials(self.study), *sides))
        return results | beam.Flatten()


def _folds(trial: Trial, folds: int) -> list[Trial]:
    return [dataclasses.replace(trial, fold=fold) for fold in range(folds)]


def _promote(results: list[TrialResult], study: Study, rung: int) -> list[Trial]:
    return promoted(study.model, over_folds(study.model, results), rung - 1)


class _Trials(beam.DoFn):
    """Collects the trials of a Beam bundle and runs them side by side at its end."""

    def __init__(self, study: Study) -> None:
        self.study = study

    def start_bundle(self) -> None:
        self.trials: list[Trial] = []

    def process(self, trial: Trial, account: ExamplesAccount, *fitted: Fitted) -> None:
        self.trials.append(trial)
        self.sides = account, fitted

    def finish_bundle(self) -> Iterator[WindowedValue]:
        if self.trials:
            for result in side_by_side(self.study, *self.sides, self.trials):
                yield WindowedValue(result, MIN_TIMESTAMP, [GlobalWindow()])


def side_by_side(
    study: Study, account: ExamplesAccount, fitted: Sequence[Fitted], trials: Sequence[Trial]
) -> list[TrialResult]:
    """Run trials, at most as many at a time as there are cores, and return their results in order.

    Raises:
        DataError: the study's device is not available.
    """
    require_device(study.device)
    runner = TrialRunner(study, account, fitted, len(trials))
    ordered = sorted(trials, key=lambda each: (each.fold, each.params.get("max_bin") or 0, each.index))
    with ThreadPoolExecutor(runner.side, "trial") as pool:
        futures: list[Future[TrialResult]] = [pool.submit(runner.run, trial) for trial in ordered]
        return [future.result() for future in futures]
