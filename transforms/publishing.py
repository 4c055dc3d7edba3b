"""The last step of training: judge, register, and move the alias `champion` only if every gate holds."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from schemas import Gates
from transforms.bundles import load
from transforms.datasets import Findings
from transforms.evaluation import Report, Verdict, as_json, verdicts
from transforms.examples import Account
from transforms.registry import Registry
from transforms.searching import Result
from transforms.tables import write_aside
from transforms.training import Trained
from transforms.trial_runs import log_trials

REPORT = "training.json"


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
    report: Report, trained: Trained, account: Account, findings: Findings, where: Publication
) -> dict[str, Any]:
    """Register the model with its report; returns what `training.json` says.

    Safe to repeat: a run has one version, and a version is promoted at most once by its own run.

    Raises:
        StoreError: the registry cannot be reached; the bundle stays on disk.
    """
    judged = verdicts(where.gates, report) + findings.verdicts(where.gates.max_drift)
    content = {
        "model": where.name, "feature_rows": account.rows, "outside": account.outside, **as_json(report, judged),
        "splits": {name: dataclasses.asdict(each) for name, each in account.counts.items()},
        "rounds": trained.best.rounds, "validate": {where.metric: trained.best.value}, "bundle": trained.folder,
        "trials": [_trial(each) for each in trained.results], "data": dataclasses.asdict(findings),
    }  # fmt: skip
    failed = [each for each in judged if not each.holds]
    registry = Registry(where.registry)
    bundle = load(trained.folder, trained.digest)
    with tempfile.TemporaryDirectory() as artifacts:
        for name, text in {**where.files, "report.json": _text(content)}.items():
            with open(os.path.join(artifacts, name), "w", encoding="utf-8") as handle:
                handle.write(text)
        version = registry.register(
            bundle, where.run_id, _params(bundle.manifest), _metrics(content), artifacts, _tags(judged, failed)
        )
    if len(trained.results) > 1:
        log_trials(registry, where.name, where.run_id, where.metric, trained.results)
    content["model_version"] = version
    if not failed and not any(entry["version"] == version for entry in registry.history(where.name)):
        registry.promote(where.name, version, f"every gate held in run {where.run_id}", "millrace training")
    content["champion"] = registry.champion(where.name)
    write_aside(where.folder, REPORT, pa.py_buffer(_text(content).encode()))
    return content


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


def _tags(judged: list[Verdict], failed: list[Verdict]) -> dict[str, str]:
    words = "; ".join(f"{each.gate}: {each.reason}" for each in failed)
    return {"millrace.gates": f"failed: {words}"[:4000] if failed else f"all {len(judged)} hold"}


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
