"""The whole case on a year of flights: data, features, training and inference, with their figures in
`<out>/run.json`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beam_pipelines.runtime.errors import guard
from beam_pipelines.runtime.run_report import read_json, write_json

DEFINITION = "examples.flights.definition"


def main(argv: Sequence[str]) -> int:
    """Runs the three pipelines one after the other, like three commands; returns 0 when a champion has scored the
    year."""
    arguments = argparse.ArgumentParser(prog="./run_local.sh", description=__doc__)
    arguments.add_argument("--out", default="out", help="folder for the store and run.json (default: out)")
    flags, beam_args = arguments.parse_known_args(argv)
    store = os.path.join(os.path.abspath(flags.out), "store")
    from examples.flights import data

    print("data: " + ", ".join(f"{rows:,} {source}" for source, rows in data.write(store).items()), flush=True)
    figures: dict[str, Any] = {}
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for name in ("features", "training", "inference"):
        figures[name] = _run(name, store, f"{name}-{stamp}-{os.getpid()}", beam_args)
    summary = {
        "auc": figures["training"]["auc"],
        "report": figures["training"]["report"],
        "seconds": {name: figures[name]["seconds"] for name in figures},
        "feature_rows": figures["features"]["table_rows"],
        "prediction_rows": figures["inference"]["rows_out"],
        "model_version": figures["inference"]["model_version"],
    }
    path = os.path.join(os.path.abspath(flags.out), "run.json")
    write_json(path, summary)
    print(
        f"\n{json.dumps(summary, indent=2)}\n\nwritten to {path}; "
        f"look into the store with: .venv/bin/millrace tables --store {store}"
    )
    return 0


def _run(name: str, store: str, run_id: str, beam_args: Sequence[str]) -> dict[str, Any]:
    import importlib

    # Imports are shown separately: they are the cost of a process, not of the work.
    start = time.perf_counter()
    module = importlib.import_module(f"beam_pipelines.{name}")
    imported = time.perf_counter() - start
    code = module.main(["--definition", DEFINITION, "--store", store, "--run_id", run_id, *beam_args])
    if code:
        raise SystemExit(code)
    return {**read_json(os.path.join(store, "runs", run_id, "run.json")), "import_seconds": imported}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    sys.exit(guard(main)(sys.argv[1:]))
