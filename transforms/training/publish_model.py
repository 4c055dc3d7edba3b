"""The last step of training: judge, register, and move the alias `champion` only if every gate holds."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from apache_beam.io.filesystems import FileSystems

from schemas import Gates
from schemas.errors import StoreError
from transforms.evaluation.evaluate import Report, as_json
from transforms.evaluation.gates import BEATS, Rival, fairness, paired, verdicts
from transforms.evaluation.shap import Explanation
from transforms.models.bundle import load
from transforms.models.problem_identity import problem_of, require_same_problem
from transforms.models.registry import Registry
from transforms.reports.report import FILE, render
from transforms.storage.delta_tables import write_aside
from transforms.training.data_checks import Findings
from transforms.training.examples import Account
from transforms.training.hyperparameter_search import Result, Trial
from transforms.training.trainer import Trained
from transforms.training.trial_log import log_trials

# What a run leaves in its folder: its account, single rows with their contributions, and what it takes to register its
# model later.
REPORT, POINTS, PENDING = "training.json", "explanation.json", "registration.json"


@dataclasses.dataclass(frozen=True, eq=False)
class Publication:
    """Where a trained model goes.

    Args:
        name: of the registered model.
        metric: that chose among trials.
        gates: to pass.
        registry: MLflow tracking URI.
        run_id: registers once, however often it is repeated.
        folder: of the run; `training.json` is left there.
        files: text of further artifacts by name, such as the definition.
    """

    name: str
    metric: str
    gates: Gates
    registry: str
    run_id: str
    folder: str
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)


def publish(
    report: Report,
    trained: Trained,
    account: Account,
    findings: Findings,
    rival: Rival,
    explanation: Explanation,
    where: Publication,
) -> dict[str, Any]:
    """Register the model with its report; returns what `training.json` says.

    Safe to repeat: a run has one version, and a version is promoted at most once by its own run.

    Raises:
        StoreError: the registry cannot be reached; the bundle stays on disk, and `millrace register` registers it later.
    """
    judged = verdicts(where.gates, report, where.metric, rival) + findings.verdicts(where.gates.max_drift)
    content = {
        "model": where.name,
        "feature_rows": account.rows,
        "outside": account.outside,
        **as_json(report),
        "gates": [dataclasses.asdict(each) for each in judged],
        "fairness": fairness(where.gates, report),
        "rival": _rival(rival, report),
        "rules": dataclasses.asdict(where.gates),
        "splits": {name: dataclasses.asdict(each) for name, each in account.counts.items()},
        "labels": account.labels,
        "rounds": trained.best.rounds,
        "validate": {where.metric: trained.best.value},
        "bundle": trained.folder,
        "trials": [_trial(each) for each in trained.results],
        "data": dataclasses.asdict(findings),
        "explanation": {name: getattr(explanation, name) for name in ("rows", "unit", "base", "inputs", "reason")},
        "report": FileSystems.join(where.folder, FILE),
    }
    points = dataclasses.asdict(explanation)
    pending = {
        "run_id": where.run_id,
        "digest": trained.digest,
        "files": dict(where.files),
        "example": points.pop("example"),
    }
    manifest = load(trained.folder, trained.digest).manifest
    _leave(
        where.folder,
        {
            POINTS: _text(points),
            PENDING: _text(pending),
            REPORT: _text(content),
            FILE: render(content, manifest, points),
        },
    )
    try:
        content = register_model(content, pending, where.registry, where.folder)
    except StoreError as error:
        how = f"The model is kept in {trained.folder}; register it with: millrace register {where.run_id}"
        raise StoreError(error.rule, error.value, f"{error.fix.rstrip('.')}. {how}") from None
    return content


def register_model(content: Mapping[str, Any], pending: Mapping[str, Any], uri: str, folder: str) -> dict[str, Any]:
    """Register what `publish` left on disk, its trials and its report too; returns the account with `model_version` and `champion`.

    The alias moves only if every gate holds and the champion is still the one that the model was compared with.

    Raises:
        StoreError: the registry cannot be reached, or a file of the model was altered.
        MismatchError: the name stands for another problem in the registry.
    """
    failed = [each for each in content["gates"] if not each["holds"]]
    registry, name, run_id = Registry(uri), content["model"], pending["run_id"]
    bundle = load(content["bundle"], pending["digest"])
    require_same_problem(registry, name, problem_of(bundle.manifest))
    with tempfile.TemporaryDirectory() as artifacts:
        for file, text in {**pending["files"], "report.json": _text(content)}.items():
            with open(os.path.join(artifacts, file), "w", encoding="utf-8") as handle:
                handle.write(text)
        tags = _tags(content["gates"], failed)
        example = pending.get("example")
        version = registry.register(
            bundle, run_id, _params(bundle.manifest), _metrics(content), artifacts, tags, example
        )
    champion = registry.champion(name)
    kept = ""
    moves = registry.history(name)
    # A run killed within its promotion has written down a move that never came.
    half = bool(moves) and moves[-1]["version"] == version and moves[-1]["before"] == champion
    if not failed and (half or not any(entry["version"] == version for entry in moves)):
        rival = content["rival"]
        # Earlier versions let a gate hold that had not been judged, and their runs can still be registered.
        beaten = rival["version"] is None or all(each["judged"] for each in content["gates"] if BEATS in each["gate"])
        if champion == rival["version"] and beaten:
            registry.promote(name, version, f"every gate held in run {run_id}", "millrace training")
            champion = version
        else:
            kept = f"the champion is {f'version {champion}' if champion else 'none'}, which was not compared with: millrace promote {version} --why …"
    done = {**content, "model_version": version, "champion": champion, "kept": kept}
    page = render(done, bundle.manifest, _points(folder))
    _leave(folder, {FILE: page, REPORT: _text(done)})
    registry.attach(name, run_id, FILE, page)
    if len(content["trials"]) > 1:
        (metric,) = content["validate"]
        log_trials(registry, name, run_id, metric, [_result(each) for each in content["trials"]])
    return done


def rival_of(registry: Registry, name: str, run_id: str) -> str | None:
    """The version that a run's model is compared with: the champion, or the one before where that is the run's own, which an
    earlier attempt promoted.

    Raises:
        StoreError: the registry cannot be reached.
    """
    version = registry.champion(name)
    moves = [entry for entry in registry.history(name) if entry["version"] == version] if version is not None else []
    if moves and version is not None and registry.run_of(name, version) == run_id:
        before: str | None = moves[-1]["before"]
        return before
    return version


def _leave(folder: str, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        write_aside(folder, name, pa.py_buffer(text.encode()))


def _points(folder: str) -> dict[str, Any] | None:
    """Single rows with their contributions, where the run left any."""
    try:
        with FileSystems.open(FileSystems.join(folder, POINTS)) as handle:
            found: dict[str, Any] = json.loads(handle.read())
            return found
    except OSError:
        return None


def _rival(rival: Rival, report: Report) -> dict[str, Any]:
    """The champion as the account has it: its metrics on the same rows, its curves, and by how much they are surpassed."""
    found: dict[str, Any] = {"version": rival.version, "reason": rival.reason, "metrics": None}
    if rival.report is not None:
        curves = {
            name: rival.report.details[name] for name in ("roc", "precision_recall") if name in rival.report.details
        }
        found |= {"metrics": dict(rival.report.metrics), "differences": paired(report, rival.report), **curves}
    return found


def _trial(result: Result) -> dict[str, Any]:
    shown = {
        "params": dict(result.trial.params),
        "value": None if result.error else result.value,
        "rounds": result.rounds,
    }
    return {
        "trial": result.trial.index,
        **shown,
        "seconds": result.seconds,
        "error": result.error,
        "rung": result.trial.rung,
        "folds": result.folds,
        "history": result.history,
    }


def _result(trial: Mapping[str, Any]) -> Result:
    """What `_trial` made an entry of."""
    value = math.nan if trial["value"] is None else float(trial["value"])
    return Result(
        Trial(trial["trial"], trial["params"], trial["rung"]),
        value,
        trial["rounds"],
        tuple(trial["history"]),
        "",
        trial["seconds"],
        trial["error"],
        tuple(trial["folds"]),
    )


def _params(manifest: Mapping[str, Any]) -> dict[str, object]:
    chosen = ("objective", "metric", "seed", "rounds", "fingerprint", "split", "feature_table", "code_version")
    return {**manifest["params"], **{name: manifest[name] for name in chosen if name in manifest}}


def _metrics(content: Mapping[str, Any]) -> dict[str, float]:
    known = {f"test_{name}": value for name, value in content["metrics"].items()}
    known |= {f"validate_{name}": value for name, value in content["validate"].items()}
    return {name: value for name, value in known.items() if value is not None}


def _tags(judged: Sequence[Mapping[str, Any]], failed: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    words = "; ".join(f"{each['gate']}: {each['reason']}" for each in failed)
    return {"millrace.gates": f"failed: {words}"[:4000] if failed else f"all {len(judged)} hold"}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
