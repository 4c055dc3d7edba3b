"""Trains XGBoost over example files: one trial an element, rows through an iterator, the best trial saved as a bundle."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from schemas import Model, encoders
from schemas.errors import DataError, DefinitionError
from schemas.models import RISING
from transforms.bundles import Bundle, save
from transforms.encoders import Fitted
from transforms.examples import Account, Shard, read_shard
from transforms.fitting import LABEL
from transforms.tables import write_aside

log = logging.getLogger("millrace.training")

# Our metrics as XGBoost computes them after each round.  The root of the Brier score orders models as the score does.
EVALUATED = {
    "auc": "auc", "average_precision": "aucpr", "log_loss": "logloss", "brier": "rmse", "rmse": "rmse", "mae": "mae",
    "accuracy": "merror",
}  # fmt: skip
# What the model fixes and `params` may not.
FIXED = ("objective", "num_class", "eval_metric", "seed", "random_state", "verbosity", "process_type", "updater")
# Bytes of encoded rows kept between XGBoost's passes over the examples; beyond, each pass encodes again.
KEPT = 256 << 20


@dataclasses.dataclass(frozen=True)
class Trial:
    """One set of XGBoost parameters to try."""

    index: int
    params: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a trial.

    Args:
        trial: which.
        value: the model's metric on validation at the best round; NaN where the trial failed.
        rounds: up to and including the best.
        history: the metric on validation after each round.
        booster: path of its UBJSON.
        seconds: it took.
        error: why it failed.
    """

    trial: Trial
    value: float
    rounds: int = 0
    history: tuple[float, ...] = ()
    booster: str = ""
    seconds: float = 0.0
    error: str = ""


def trials(model: Model) -> list[Trial]:
    """The trials of a model's search, decided by its seed; one with `model.params` where there is none.

    Raises:
        DefinitionError: a parameter that the model itself decides, or a method not built yet.
    """
    search = model.search
    for name in (*model.params, *(search.space if search else ())):
        if name in FIXED:
            raise DefinitionError(
                f"params leaves {', '.join(FIXED)} to the model",
                repr(name),
                "Say it in Model(objective=…, metric=…, seed=…)",
            )
    if search is None:
        return [Trial(0, dict(model.params))]
    if search.method != "random":
        raise DefinitionError("A search is random so far", repr(search.method), 'Write Search(…, method="random")')
    return [
        Trial(i, {**model.params, **{name: _drawn(values, np.random.default_rng((search.seed, i, j))) for j, (name, values) in enumerate(search.space.items())}})
        for i in range(search.trials)
    ]  # fmt: skip


def _drawn(values: Any, random: np.random.Generator) -> Any:
    if isinstance(values, list):
        return values[int(random.integers(len(values)))]
    low, high = values
    share = float(random.random())
    if all(isinstance(value, int) for value in values):
        return low + int(share * (high + 1 - low))
    if low > 0:
        return float(math.exp(math.log(low) + share * (math.log(high) - math.log(low))))
    return low + share * (high - low)


def train(
    model: Model, trial: Trial, fitted: Fitted, account: Account, threads: int = 0
) -> tuple[bytes, list[float], int]:
    """Train one booster.

    Args:
        threads: of XGBoost; 0 takes every core.

    Returns:
        (UBJSON of the best rounds, the metric on validation after each round, number of rounds in the booster).
    """
    import xgboost

    classes = classes_of(model, account)
    params = {
        "tree_method": "hist", "nthread": threads or os.cpu_count(), "verbosity": 0, **trial.params, "objective": model.objective,
        "eval_metric": EVALUATED[model.metric], "seed": model.seed, **({"num_class": classes} if classes > 1 else {}),
    }  # fmt: skip
    bins = {"max_bin": int(params["max_bin"])} if "max_bin" in params else {}
    columns = {"enable_categorical": "c" in fitted.types, "nthread": params["nthread"], **bins}
    learn = _matrix(fitted, account.of("train"), **columns)
    judge = _matrix(fitted, account.of("validate"), ref=learn, **columns)
    history: dict[str, dict[str, list[float]]] = {}
    booster = xgboost.train(
        params, learn, model.rounds, evals=[(judge, "validate")], evals_result=history, verbose_eval=False,
        early_stopping_rounds=model.early_stopping or None, callbacks=[_progress(model, trial)],
    )  # fmt: skip
    values = [_ours(model.metric, value) for value in history["validate"][EVALUATED[model.metric]]]
    rounds = booster.best_iteration + 1 if model.early_stopping else booster.num_boosted_rounds()
    if rounds < booster.num_boosted_rounds():
        booster = booster[:rounds]
    return bytes(booster.save_raw("ubj")), values, rounds


def classes_of(model: Model, account: Account) -> int:
    """Scores per row: the number of classes of a multi-class model, else 1."""
    if model.objective != "multi:softprob":
        return 1
    return 1 + max(int(label) for seen in account.labels.values() for label in seen)


def _ours(metric: str, value: float) -> float:
    return value * value if metric == "brier" else 1.0 - value if metric == "accuracy" else value


def _matrix(fitted: Fitted, shards: Sequence[Shard], **options: Any) -> Any:
    """The encoded rows of `shards`, in XGBoost's histogram bins."""
    import xgboost

    class Rows(xgboost.DataIter):
        """XGBoost reads all rows several times over; what fits into `KEPT` is encoded once."""

        def __init__(self) -> None:
            self.kept: list[tuple[Any, Any]] = []
            self.keeps = sum(each.rows for each in shards) * 4 * (len(fitted.names) + 1) <= KEPT
            self.complete = False
            self.source: Iterator[tuple[Any, Any]] = iter(())
            super().__init__()

        def reset(self) -> None:
            if not self.complete:
                self.kept.clear()
            self.source = iter(self.kept) if self.complete else encoded(fitted, shards)

        def next(self, input_data: Any) -> bool:
            part = next(self.source, None)
            if part is None:
                self.complete = self.keeps
                return False
            if self.keeps and not self.complete:
                self.kept.append(part)
            matrix, label = part
            input_data(data=matrix, label=label, feature_names=fitted.names, feature_types=fitted.types)
            return True

    rows = Rows()
    matrix = xgboost.QuantileDMatrix(rows, **options)
    rows.kept.clear()
    return matrix


def encoded(fitted: Fitted, shards: Iterable[Shard]) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """(matrix float32 [rows, columns], labels float32 [rows]) of each row group."""
    for shard in shards:
        for batch in read_shard(shard, [*fitted.inputs, LABEL]):
            yield fitted.apply(batch), batch.column(batch.num_columns - 1).to_numpy(zero_copy_only=False)


def _progress(model: Model, trial: Trial) -> Any:
    import xgboost

    class Progress(xgboost.callback.TrainingCallback):
        """A line every few seconds."""

        said = time.monotonic()

        def after_iteration(self, booster: Any, epoch: int, evals_log: Any) -> bool:
            if time.monotonic() - self.said > 5:
                self.said = time.monotonic()
                value = _ours(model.metric, evals_log["validate"][EVALUATED[model.metric]][-1])
                log.info("trial %d: round %d of %d, %s %.4f", trial.index, epoch + 1, model.rounds, model.metric, value)
            return False

    return Progress()


def run_trial(trial: Trial, model: Model, folder: str, threads: int, account: Account, fitted: Fitted) -> Result:
    """Train one trial, leave its booster in `folder`, return where and how good it is.

    A trial that XGBoost refuses is a result with an error, not the end of the search.
    """
    import xgboost

    start = time.perf_counter()
    try:
        booster, history, rounds = train(model, trial, fitted, account, threads)
    except xgboost.core.XGBoostError as error:
        reason = next(
            (line for line in str(error).splitlines() if "Check failed" in line or "Invalid" in line),
            str(error).splitlines()[0],
        )
        return Result(trial, math.nan, error=reason.strip()[:300], seconds=time.perf_counter() - start)
    name = f"trial-{trial.index:03d}.ubj"
    write_aside(folder, name, pa.py_buffer(booster))
    value = history[rounds - 1]
    return Result(trial, value, rounds, tuple(history), FileSystems.join(folder, name), time.perf_counter() - start)


def choose(model: Model, results: Iterable[Result]) -> Result:
    """The trial with the best metric on validation; of equals the first.

    Raises:
        DataError: every trial failed.
    """
    rising = model.metric in RISING
    ordered = sorted(results, key=lambda each: each.trial.index)
    worked = [each for each in ordered if not math.isnan(each.value)]
    if not worked:
        raise DataError(
            "A trial succeeds",
            f"{len(ordered)} failed, the first with: {ordered[0].error or 'an undefined metric'}",
            "Correct the model's params",
        )
    return max(worked, key=lambda each: each.value if rising else -each.value)


@dataclasses.dataclass(frozen=True)
class Trained:
    """The chosen model on disk.

    Args:
        folder: of its bundle.
        digest: SHA-256 of its manifest.
        best: the trial it came from.
        results: of all trials, in order.
    """

    folder: str
    digest: str
    best: Result
    results: tuple[Result, ...]


def save_best(
    results: Sequence[Result],
    model: Model,
    folder: str,
    provenance: Mapping[str, Any],
    account: Account,
    fitted: Fitted,
) -> Trained:
    """Save the best trial's booster with the encoders and a manifest as a bundle in `folder`."""
    best = choose(model, results)
    with FileSystems.open(best.booster, "application/octet-stream", "uncompressed") as handle:
        booster = handle.read()
    manifest = {
        "model": model.name, "objective": model.objective, "classes": classes_of(model, account), "metric": model.metric,
        "view": model.view.name, "fingerprint": model.view.fingerprint, "key": list(model.view.key), "time": model.view.time,
        "inputs": fitted.inputs, "columns": fitted.names, "rounds": best.rounds, "params": dict(best.trial.params), "seed": model.seed,
        "examples": {name: dataclasses.asdict(each) for name, each in account.counts.items()}, **provenance,
    }  # fmt: skip
    digest = save(Bundle(booster, fitted, manifest), folder)
    return Trained(folder, digest, best, tuple(sorted(results, key=lambda each: each.trial.index)))


def require_trainable(model: Model) -> None:
    """Refuse what this version cannot train honestly, before anything is read.

    Raises:
        DefinitionError: naming the input or the parameter.
    """
    trials(model)
    for column, encoder in model.encode.items():
        if isinstance(encoder, encoders.Target):
            raise DefinitionError(
                "A target encoder shows each training row only labels known before it, which is not built yet",
                f"{column!r}: {encoder}", "Use Ordinal, OneHot, Native or Hashing",
            )  # fmt: skip


@dataclasses.dataclass(eq=False)  # Beam sets the label
class Train(beam.PTransform):
    """PCollection[Trial] → PCollection[Result], each trial where a worker is free.

    Args:
        model: what to train.
        folder: where boosters go.
        account: one `Account`, of the examples.
        fitted: one `Fitted`.
        threads: of XGBoost in each trial; 0 takes every core.
    """

    model: Model
    folder: str
    account: beam.PCollection
    fitted: beam.PCollection
    threads: int = 0

    def expand(self, trials: beam.PCollection) -> beam.PCollection:
        sides = beam.pvalue.AsSingleton(self.account), beam.pvalue.AsSingleton(self.fitted)
        return (
            trials
            | "Spread" >> beam.Reshuffle()
            | "Trial" >> beam.Map(run_trial, self.model, self.folder, self.threads, *sides)
        )
