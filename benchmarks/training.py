"""Training against the same work done natively: 1 million rows × 30, memory at 20 million, trials side by side.

    python -m benchmarks.training [--repeats 3] [--json FILE] [--rows 1000000] [--big 20000000] [--small 20000]
                                  [--only NAME …]

`pipeline_vs_native`: `millrace training` with one trial against a script that calls Polars, TFDV, TensorFlow's record
writer and XGBoost for the same reads, statistics, encodings, example files, training and metrics; the pipeline also
registers the model.  `training_vs_native`: its training step against XGBoost over the same example files.
`peak_20m_gb`: memory above the imports of training on `--big` examples.  `trials_speedup`: eight trials of `--small`
rows on two cores, against one after another with both cores each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.measure import Measurement, Side, arguments, compare, machine, ratios, raw, say, summary, write_json
from benchmarks.training_sides import write_shards, write_store

SIDES = "benchmarks.training_sides"
PARTS = ("pipeline", "training", "memory", "trials")
AUC_APART = 0.003
Measured = Mapping[str, Sequence[Measurement]]


def main(argv: Sequence[str]) -> int:
    parser = arguments("Training against the same work done natively.")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--big", type=int, default=20_000_000, help="examples whose peak memory is taken")
    parser.add_argument("--big_rounds", type=int, default=20)
    parser.add_argument("--small", type=int, default=20_000, help="examples of each of eight trials")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    flags = parser.parse_args(argv)
    figures: dict[str, object] = {"benchmark": "training", "rows": flags.rows, "machine": machine()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.keep or Path(temporary)
        store = folder / "store"
        if not store.exists():
            write_store(store, flags.rows)
        for name in flags.only:
            figures |= globals()[f"_{name}"](flags, folder, str(store))
    say("\n" + ", ".join(f"{name} {value:.2f}" for name, value in figures.items() if isinstance(value, float)))
    if flags.json:
        write_json(flags.json, figures)
    return 0


def _pipeline(flags: argparse.Namespace, folder: Path, store: str) -> dict[str, object]:
    sides = [
        Side("native", f"{SIDES}:native", {"store": store}),
        Side("pipeline", f"{SIDES}:pipeline", {"store": store}),
    ]
    measured, _ = compare(sides, flags.repeats, folder / "runs")
    say(summary(measured))
    _agree(measured)
    return {
        "pipeline_vs_native": ratios(measured, "pipeline", "native")["wall_vs_native"],
        "raw_pipeline": raw(measured),
    }


def _training(flags: argparse.Namespace, folder: Path, store: str) -> dict[str, object]:
    inputs = {"store": store, "shards": _shards(folder, flags.rows)}
    sides = [Side("native", f"{SIDES}:train_native", inputs), Side("ours", f"{SIDES}:train_ours", inputs)]
    measured, _ = compare(sides, flags.repeats, folder / "runs-training")
    say(summary(measured))
    _agree(measured)
    return {"training_vs_native": _stage(measured, "ours") / _stage(measured, "native"), "raw_training": raw(measured)}


def _memory(flags: argparse.Namespace, folder: Path, store: str) -> dict[str, object]:
    from benchmarks.measure import run

    side = Side(
        "big", f"{SIDES}:train_ours", {"store": store, "shards": _shards(folder, flags.big), "rounds": flags.big_rounds}
    )
    # The warm-up of the others finds out what to import.
    small = Side("small", f"{SIDES}:train_ours", {"store": store, "shards": _shards(folder, 500_000), "rounds": 2})
    _, modules = run(small, folder / "small", ())
    measured, _ = run(side, folder / "big", modules)
    say(summary({f"{flags.big} examples": [measured]}))
    return {"peak_20m_gb": measured.peak_mb / 1000, "peak_rows": flags.big, "raw_memory": raw({"big": [measured]})}


def _trials(flags: argparse.Namespace, folder: Path, store: str) -> dict[str, object]:
    inputs = {"store": store, "shards": _shards(folder, flags.small, max(flags.small // 10, 1))}
    sides = [
        Side(name, f"{SIDES}:search", {**inputs, "side": side})
        for name, side in (("sequence", False), ("side by side", True))
    ]
    measured, _ = compare(sides, flags.repeats, folder / "runs-trials")
    say(summary(measured))
    return {
        "trials_speedup": _stage(measured, "sequence") / _stage(measured, "side by side"),
        "raw_trials": raw(measured),
    }


def _shards(folder: Path, rows: int, each: int = 250_000) -> str:
    path = folder / f"shards-{rows}"
    if not path.exists():
        write_shards(path, rows, min(each, max(rows // 10, 1)))
    return str(path)


def _stage(measured: Measured, name: str) -> float:
    return statistics.median(each.stages["train"]["seconds"] for each in measured[name])


def _agree(measured: Measured) -> None:
    found = [runs[0].result["auc"] for runs in measured.values()]
    if abs(found[0] - found[1]) > AUC_APART:
        raise SystemExit(f"The two sides did not train the same: AUC {found}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
