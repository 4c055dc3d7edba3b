"""The last step of training: judge, register, and move the alias `champion` only if every gate holds."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from schemas import Gates
from schemas.errors import StoreError
from transforms.bundles import load
from transforms.datasets import Findings
from transforms.evaluation import Report, as_json
from transforms.examples import Account
from transforms.gates import Rival, fairness, verdicts
from transforms.registry import Registry
from transforms.searching import Result
from transforms.tables import write_aside
from transforms.training import Trained
from transforms.trial_runs import log_trials

# What a run leaves in its folder: its account, and what it takes to register its model later.
REPORT, PENDING = "training.json", "registration.json"


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
    report: Report, trained: Trained, account: Account, findings: Findings, rival: Rival, where: Publication
) -> dict[str, Any]:
    """Register the model with its report; returns what `training.json` says.

    Safe to repeat: a run has one version, and a version is promoted at most once by its own run.

    Raises:
        StoreError: the registry cannot be reached; the bundle stays on disk, and `millrace register` registers it later.
    """
    judged = verdicts(where.gates, report, where.metric, rival) + findings.verdicts(where.gates.max_drift)
    content = {
        "model": where.name, "feature_rows": account.rows, "outside": account.outside, **as_json(report),
        "gates": [dataclasses.asdict(each) for each in judged], "fairness": fairness(where.gates, report),
        "rival": {"version": rival.version, "metrics": None if rival.report is None else dict(rival.report.metrics)},
        "splits": {name: dataclasses.asdict(each) for name, each in account.counts.items()},
        "rounds": trained.best.rounds, "validate": {where.metric: trained.best.value}, "bundle": trained.folder,
        "trials": [_trial(each) for each in trained.results], "data": dataclasses.asdict(findings),
    }  # fmt: skip
    write_aside(where.folder, REPORT, pa.py_buffer(_text(content).encode()))
    pending = {"run_id": where.run_id, "digest": trained.digest, "files": dict(where.files)}
    write_aside(where.folder, PENDING, pa.py_buffer(_text(pending).encode()))
    try:
        content = enter(content, pending, where.registry, where.folder)
        if len(trained.results) > 1:
            log_trials(Registry(where.registry), where.name, where.run_id, where.metric, trained.results)
    except StoreError as error:
        how = f"The model is kept in {trained.folder}; register it with: millrace register {where.run_id}"
        raise StoreError(error.rule, error.value, f"{error.fix.rstrip('.')}. {how}") from None
    return content


def enter(content: Mapping[str, Any], pending: Mapping[str, Any], uri: str, folder: str) -> dict[str, Any]:
    """Register what `publish` left on disk; returns the account with `model_version` and `champion`.

    The alias moves only if every gate holds and the champion is still the one that the model was compared with.

    Raises:
        StoreError: the registry cannot be reached, or a file of the model was altered.
    """
    failed = [each for each in content["gates"] if not each["holds"]]
    registry, name, run_id = Registry(uri), content["model"], pending["run_id"]
    bundle = load(content["bundle"], pending["digest"])
    with tempfile.TemporaryDirectory() as artifacts:
        for file, text in {**pending["files"], "report.json": _text(content)}.items():
            with open(os.path.join(artifacts, file), "w", encoding="utf-8") as handle:
                handle.write(text)
        tags = _tags(content["gates"], failed)
        version = registry.register(bundle, run_id, _params(bundle.manifest), _metrics(content), artifacts, tags)
    champion = registry.champion(name)
    kept = ""
    if not failed and not any(entry["version"] == version for entry in registry.history(name)):
        if champion == content["rival"]["version"]:
            registry.promote(name, version, f"every gate held in run {run_id}", "millrace training")
            champion = version
        else:
            kept = f"the champion is version {champion}, which was not compared with: millrace promote {version}"
    done = {**content, "model_version": version, "champion": champion, "kept": kept}
    write_aside(folder, REPORT, pa.py_buffer(_text(done).encode()))
    return done


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
