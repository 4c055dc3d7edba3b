"""The last step of training: check the gates, register the model, and move the alias `champion` if all gates hold."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping
from typing import TypeVar, cast

import jinja2
import pyarrow as pa

from schemas import Gates
from schemas.errors import StoreError
from transforms.evaluation.evaluate import Report, metrics_record
from transforms.evaluation.gates import BEATS, Rival, fairness_records, paired_differences, verdicts
from transforms.evaluation.shap import Explanation
from transforms.models.bundle import Bundle, load_bundle, read_bytes
from transforms.models.problem_identity import problem_of, require_same_problem
from transforms.models.registry import Registry, RunRecord
from transforms.models.stored_records import (
    ExplanationRecord,
    FindingsRecord,
    GateRecord,
    GateRules,
    ModelManifest,
    RegistrationRecord,
    RivalRecord,
    TrainingRecord,
    TrialRecord,
)
from transforms.reports.report import FILE, render
from transforms.storage.delta_tables import write_file_atomically
from transforms.storage.file_systems import FileSystems
from transforms.storage.stored_json import DAMAGE, parse_record, reason_of
from transforms.training.data_checks import Findings
from transforms.training.examples import ExamplesAccount
from transforms.training.hyperparameter_search import Trial, TrialResult
from transforms.training.trainer import Trained
from transforms.training.trial_log import log_trials

Record = TypeVar("Record")
# Files of a run's folder: its report as JSON, single rows with their contributions, and what registering needs later.
REPORT, POINTS, PENDING = "training.json", "explanation.json", "registration.json"
# The folder of the model within that of its run.
BUNDLE = "model"


@dataclasses.dataclass(frozen=True, eq=False)
class Publication:
    """Where a trained model goes.

    Args:
        name: name of the registered model.
        metric: the metric that chose among trials.
        gates: the gates to pass.
        registry: MLflow tracking URI.
        run_id: id of the run, which has one version however often it is repeated.
        folder: folder of the run, which receives `training.json` and the report.
        files: text of further artifacts by name, such as the definition.
    """

    name: str
    metric: str
    gates: Gates
    registry: str
    run_id: str
    folder: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class RunOutcome:
    """What a training run has found.

    Args:
        report: metrics of the test split.
        trained: the chosen model on disk.
        account: counts of the examples.
        findings: checks of the training data.
        rival: the champion on the same test rows.
        explanation: SHAP contributions.
    """

    report: Report
    trained: Trained
    account: ExamplesAccount
    findings: Findings
    rival: Rival
    explanation: Explanation


def publish_trained_model(outcome: RunOutcome, where: Publication) -> TrainingRecord:
    """Register the model with its report; returns the content of `training.json`.

    It can be repeated: a run has one version, and its own run promotes a version at most once.

    Raises:
        StoreError: the registry cannot be reached.  The bundle stays on disk, and `millrace register` registers it.
    """
    trained = outcome.trained
    content = _content(outcome, where)
    points = dataclasses.asdict(outcome.explanation)
    pending: RegistrationRecord = {
        "run_id": where.run_id,
        "digest": trained.digest,
        "files": dict(where.files),
        "example": points.pop("example"),
    }
    page = render(content, load_bundle(trained.folder, trained.digest).manifest, cast(ExplanationRecord, points))
    _write(where.folder, {POINTS: _text(points), PENDING: _text(pending), REPORT: _text(content), FILE: page})
    try:
        return register_model(content, pending, where.registry, where.folder)
    except StoreError as error:
        how = f"The model is kept in {trained.folder}; register it with: millrace register {where.run_id}"
        raise StoreError(error.rule, error.value, f"{error.fix.rstrip('.')}. {how}") from None


def _content(outcome: RunOutcome, where: Publication) -> TrainingRecord:
    """The content of `training.json`."""
    report, account, trained, explanation = outcome.report, outcome.account, outcome.trained, outcome.explanation
    found = verdicts(where.gates, report, where.metric, outcome.rival)
    found += outcome.findings.verdicts(where.gates.max_drift)
    metrics = metrics_record(report)
    content: TrainingRecord = {
        "model": where.name,
        "feature_rows": account.rows,
        "outside": account.outside,
        **metrics,  # type: ignore[typeddict-item]  # mypy fears that a report has the keys of registering
        "gates": [each.as_json() for each in found],
        "fairness": fairness_records(where.gates, report),
        "rival": _rival(outcome.rival, report),
        "rules": cast(GateRules, dataclasses.asdict(where.gates)),
        "splits": {name: each.as_json() for name, each in account.counts.items()},
        "labels": {name: {str(label): rows for label, rows in seen.items()} for name, seen in account.labels.items()},
        "rounds": trained.best.rounds,
        "validate": {where.metric: trained.best.value},
        "bundle": trained.folder,
        "trials": [_trial(each) for each in trained.results],
        "data": cast(FindingsRecord, dataclasses.asdict(outcome.findings)),
        "explanation": {
            "rows": explanation.rows,
            "unit": explanation.unit,
            "base": explanation.base,
            "inputs": explanation.inputs,
            "reason": explanation.reason,
        },
        "report": FileSystems.join(where.folder, FILE),
    }
    if account.missing:
        content["missing"] = dict(account.missing)
    return content


def register_model(content: TrainingRecord, pending: RegistrationRecord, uri: str, folder: str) -> TrainingRecord:
    """Register a model that `publish_trained_model` left on disk, with its trials and its report.

    The alias moves only if every gate holds and the champion is still the version that the model was compared with.

    Args:
        content: the content of `training.json`.
        pending: the content of `registration.json`.
        uri: MLflow tracking URI.
        folder: folder of the run.

    Returns:
        `content` with `model_version`, `champion` and `kept`, the reason why the champion was kept.

    Raises:
        StoreError: the registry cannot be reached, or a file of the model was altered.
        MismatchError: the name stands for another problem in the registry.
    """
    registry, name, run_id = Registry(uri), content["model"], pending["run_id"]
    bundle = load_bundle(FileSystems.join(folder, BUNDLE), pending["digest"])  # the store may have been moved
    require_same_problem(registry, name, problem_of(bundle.manifest))
    version = _register(registry, bundle, content, pending)
    champion, kept = _promote_if_better(registry, version, content, run_id)
    done: TrainingRecord = {**content, "model_version": version, "champion": champion, "kept": kept}
    page = render(done, bundle.manifest, _points(folder))
    _write(folder, {FILE: page, REPORT: _text(done)})
    registry.attach(name, run_id, FILE, page)
    if len(content["trials"]) > 1:
        (metric,) = content["validate"]
        log_trials(registry, name, run_id, metric, [_result(each) for each in content["trials"]])
    return done


def register_run(folder: str, run_id: str, uri: str) -> TrainingRecord:
    """Register the model that a run left in its folder; see `register_model`, whose result it returns.

    The files of the folder are read and checked whole before the registry is written to.

    Raises:
        StoreError: a file cannot be read, is not what `publish_trained_model` writes, or names something outside the
            run's folder; or the registry cannot be reached.
        MismatchError: the name stands for another problem in the registry.
    """
    content = read_record(TrainingRecord, folder, REPORT)
    pending = read_record(RegistrationRecord, folder, PENDING)
    try:
        _require_own(content, pending, folder, run_id)
        bundle = load_bundle(FileSystems.join(folder, BUNDLE), pending["digest"])
        if bundle.name != content["model"]:
            raise ValueError(f"the model is {bundle.name!r}, not {content['model']!r}")
        render(content, bundle.manifest, _points(folder))
        _params(bundle.manifest), _metrics(content), _tags(content), content["rival"]["version"]
        for each in content["trials"]:
            _result(each)
    except _DAMAGE as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise StoreError(
            f"{REPORT} and {PENDING} are as a training run left them",
            f"{folder}: {reason[:300]}",
            f"Restore them, or train again: millrace training --run_id {run_id}",
        ) from None
    return register_model(content, pending, uri, folder)


# What reading damaged JSON as something that it is not can raise.
_DAMAGE = (*DAMAGE, jinja2.TemplateError)


def read_record(kind: type[Record], folder: str, name: str) -> Record:
    """A record in a run's folder.

    Raises:
        StoreError: the file cannot be read, or is not as a run writes it.
    """
    text = read_bytes(folder, name)
    try:
        return parse_record(kind, text)
    except (ValueError, RecursionError) as error:
        value = f"{folder}/{name}: {reason_of(error)}"
        fix = "Restore the file, or train again"
        raise StoreError("The files of a run are JSON as a run writes it", value, fix) from None


def _require_own(content: TrainingRecord, pending: RegistrationRecord, folder: str, run_id: str) -> None:
    """Refuse a record of another run, and names of files that leave the run's folder.

    Raises:
        StoreError: see above.
    """
    fix = "Restore registration.json, or train again"
    if pending["run_id"] != run_id:
        raise StoreError("A run's folder holds its own record", f"{folder} that of {pending['run_id']!r}", fix)
    names = [name for name in pending["files"] if name in ("", ".", "..", "model") or "/" in name or "\0" in name]
    if names:
        value = f"{names[0]!r} in {folder}/{PENDING}"
        raise StoreError("A run registers files of its own folder, by their names alone", value, fix)
    if str(content["bundle"]).rstrip("/").split("/")[-2:] != [run_id, BUNDLE]:
        value = f"{content['bundle']!r} in {folder}/{REPORT}"
        raise StoreError(f"A run registers the model in its own folder, {BUNDLE}/", value, fix)


def _register(registry: Registry, bundle: Bundle, content: TrainingRecord, pending: RegistrationRecord) -> str:
    """Register the bundle with its parameters, metrics and files; returns the version."""
    with tempfile.TemporaryDirectory() as artifacts:
        for file, text in {**pending["files"], "report.json": _text(content)}.items():
            with open(os.path.join(artifacts, file), "w", encoding="utf-8") as handle:
                handle.write(text)
        record = RunRecord(
            params=_params(bundle.manifest),
            metrics=_metrics(content),
            artifacts=artifacts,
            tags=_tags(content),
            example=pending.get("example"),
        )
        return registry.register(bundle, pending["run_id"], record)


def _promote_if_better(
    registry: Registry, version: str, content: TrainingRecord, run_id: str
) -> tuple[str | None, str]:
    """Move the alias to `version` if its gates allow; returns the champion, and why it was kept or ""."""
    name = content["model"]
    champion = registry.champion(name)
    # An earlier attempt of this run may have promoted the version already.
    if failed_gates(content) or any(entry["version"] == version for entry in registry.history(name)):
        return champion, ""
    rival = content["rival"]
    # Earlier versions of Millrace let a gate hold that had not been judged, and their runs can still be registered.
    beaten = rival["version"] is None or all(each["judged"] for each in content["gates"] if BEATS in each["gate"])
    if beaten:
        why = f"every gate held in run {run_id}"
        champion = registry.replace(name, rival["version"], version, why, "millrace training")
        if champion == version:
            return version, ""
    shown = f"version {champion}" if champion else "none"
    return champion, f"the champion is {shown}, which was not compared with: millrace promote {version} --why …"


def failed_gates(content: TrainingRecord) -> list[GateRecord]:
    """The gates of a run's `training.json` that do not hold."""
    return [each for each in content["gates"] if not each["holds"]]


def rival_of(registry: Registry, name: str, run_id: str) -> str | None:
    """The version that a run's model is compared with.

    It is the champion; or the previous champion, if an earlier attempt of the same run promoted the present one.

    Raises:
        StoreError: the registry cannot be reached.
    """
    version = registry.champion(name)
    moves = [entry for entry in registry.history(name) if entry["version"] == version] if version is not None else []
    if moves and version is not None and registry.run_of(name, version) == run_id:
        before: str | None = moves[-1]["before"]
        return before
    return version


def _write(folder: str, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write_file_atomically(folder, name, pa.py_buffer(text.encode()))


def _points(folder: str) -> ExplanationRecord | None:
    """Single rows with their contributions, or None if the run wrote none.

    Raises:
        StoreError: the file cannot be read.
    """
    path = FileSystems.join(folder, POINTS)
    there = FileSystems.exists(path) if "://" in path else os.path.lexists(path)
    return read_record(ExplanationRecord, folder, POINTS) if there else None


def _rival(rival: Rival, report: Report) -> RivalRecord:
    """The champion in `training.json`: its metrics on the same rows, the paired differences, and its curves."""
    found: RivalRecord = {"version": rival.version, "reason": rival.reason, "metrics": None}
    if rival.report is not None:
        found["metrics"] = dict(rival.report.metrics)
        found["differences"] = paired_differences(report, rival.report)
        details = rival.report.details
        if "roc" in details:
            found["roc"] = details["roc"]
        if "precision_recall" in details:
            found["precision_recall"] = details["precision_recall"]
    return found


def _trial(result: TrialResult) -> TrialRecord:
    return {
        "trial": result.trial.index,
        "params": dict(result.trial.params),
        "value": None if result.error else result.value,
        "rounds": result.rounds,
        "seconds": result.seconds,
        "error": result.error,
        "rung": result.trial.rung,
        "folds": result.folds,
        "history": result.history,
    }


def _result(trial: TrialRecord) -> TrialResult:
    """The result of which `_trial` made an entry."""
    value = math.nan if trial["value"] is None else float(trial["value"])
    return TrialResult(
        Trial(trial["trial"], trial["params"], trial["rung"]),
        value,
        trial["rounds"],
        tuple(math.nan if value is None else value for value in trial["history"]),
        "",
        trial["seconds"],
        trial["error"],
        tuple(trial["folds"]),
    )


def _params(manifest: ModelManifest) -> dict[str, object]:
    chosen = ("objective", "metric", "seed", "rounds", "fingerprint", "split", "feature_table", "code_version")
    known: Mapping[str, object] = manifest
    return {**manifest["params"], **{name: known[name] for name in chosen if name in known}}


def _metrics(content: TrainingRecord) -> dict[str, float]:
    known = {f"test_{name}": value for name, value in content["metrics"].items()}
    known |= {f"validate_{name}": value for name, value in content["validate"].items()}
    return {name: value for name, value in known.items() if value is not None}


def _tags(content: TrainingRecord) -> dict[str, str]:
    failed = failed_gates(content)
    words = "; ".join(f"{each['gate']}: {each['reason']}" for each in failed)
    return {"millrace.gates": f"failed: {words}"[:4000] if failed else f"all {len(content['gates'])} hold"}


def _text(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
