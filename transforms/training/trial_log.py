"""Each trial of a search as a nested MLflow run, which is written once however often the step is repeated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from transforms.models.registry import RUN, Registry
from transforms.training.hyperparameter_search import TrialResult

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TRIAL, PARENT = "millrace.trial", "mlflow.parentRunId"
# Most metrics that MLflow accepts at a time.
BATCH = 1000


def log_trials(registry: Registry, name: str, run_id: str, metric: str, results: Sequence[TrialResult]) -> int:
    """Log `results` as children of the MLflow run of `run_id`; returns the number of runs written.

    A complete run is left unchanged; an incomplete one is completed.

    Raises:
        StoreError: the registry cannot be reached.
    """
    with registry.client(write=True) as client:
        parent = registry.run(client, name, run_id, {})
        experiment = parent.info.experiment_id
        known: dict[str, Run] = {}
        token = None
        while True:
            page = client.search_runs([experiment], f"tags.`{PARENT}` = '{parent.info.run_id}'", page_token=token)
            known |= {run.data.tags[TRIAL]: run for run in page}
            if not (token := page.token):
                break
        written = 0
        for result in results:
            run = known.get(str(result.trial.index))
            if run is not None and run.info.status in ("FINISHED", "FAILED"):
                continue
            if run is None:
                tags = {PARENT: parent.info.run_id, TRIAL: str(result.trial.index), f"{RUN}_of_parent": run_id}
                run = client.create_run(
                    experiment,
                    tags=tags,
                    run_name=f"{run_id} trial {result.trial.index}",
                    start_time=parent.info.start_time,
                )
            _log(client, run, metric, result)
            client.set_terminated(run.info.run_id, "FAILED" if result.error else "FINISHED")
            written += 1
        return written


def _log(client: MlflowClient, run: Run, metric: str, result: TrialResult) -> None:
    """Log one result.  Every metric has the run's start time, so that a repetition writes the same rows."""
    from mlflow.entities import Metric, Param, RunTag

    at, name = run.info.start_time, f"validate_{metric}"
    params = [Param(key, str(value)[:6000]) for key, value in result.trial.params.items()]
    values = [Metric(name, value, at, step) for step, value in enumerate(result.history) if not math.isnan(value)]
    ends = {f"best_{name}": result.value, "rounds": result.rounds, "rung": result.trial.rung, "seconds": result.seconds}
    ends |= {f"best_{name}_fold_{i}": value for i, value in enumerate(result.folds)}
    values += [Metric(key, float(value), at, 0) for key, value in ends.items() if not math.isnan(value)]
    client.log_batch(
        run.info.run_id, params=params[:100], tags=[RunTag("millrace.error", result.error)] if result.error else []
    )
    for start in range(0, len(values), BATCH):
        client.log_batch(run.info.run_id, metrics=values[start : start + BATCH])


def logged_metrics(registry: Registry, name: str, version: str) -> dict[str, float]:
    """The logged metrics of the run that made a registered version.

    Raises:
        StoreError: the registry cannot be reached.
    """
    with registry.client() as client:
        run = client.get_run(client.get_model_version(name, version).run_id)
        return {key: float(value) for key, value in run.data.metrics.items()}
